"""k-reciprocal encoding (Zhong et al., arXiv 1701.08398, sections 3.2 to 3.4), sparse and chunked.

Two images are k-reciprocal neighbours if each is among the other's k nearest. An image is encoded by weights over its
reciprocal neighbours, and the Jaccard distance of two images follows from the sum of the minima of their weights. Both
re-ranking and clustering are built on it. No N x N matrix is made: only the K nearest neighbours of each image are
kept, and the encoding V is a sparse matrix with some 50 to 100 entries per row.

Shapes: N images, K neighbours, R rows of a chunk, M pairs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from passreid_models.retrieval.protocol import integer_ranges
from passreid_models.retrieval.similarity import Similarities, chunks, top
from passreid_models.runtime import require

TERM_BYTES = 64  # temporary memory per minimum of two weights
CACHED_TERMS = 2**17  # more at a time exceed the processor's cache and take longer


def sparse() -> Any:
    """Import ``scipy.sparse``.

    Raises:
        ValueError: If scipy is not installed; the message says how to install it.
    """
    return require("scipy.sparse", "reid", "re-ranking and clustering need scipy")


def nearest(pairs: Similarities, k: int, budget_mb: float, farthest: np.ndarray | None = None) -> np.ndarray:
    """Find the ``k`` nearest of each of N images, ``[N, K]``: the image itself first, ties by index.

    Args:
        pairs: Similarities of all images with all.
        k: Neighbours, the image itself included.
        budget_mb: Memory for similarities.
        farthest: Array ``[N]`` that is filled with each image's largest squared distance.
    """
    num = pairs.shape[0]
    indices = np.empty((num, min(k, num)), dtype=np.int32)
    for start, stop in chunks(num, 5 * num, budget_mb, pairs.device):
        rows = pairs.rows(start, stop)
        if farthest is not None:
            farthest[start:stop] = pairs.distances(rows.amin(dim=1)).cpu().numpy()
        own = torch.arange(start, stop, device=rows.device)
        rows[own - start, own] = torch.inf  # itself first, even among its duplicates
        indices[start:stop] = top(rows, k)[1].cpu().numpy()
    return indices


def encode(
    pairs: Similarities, neighbours: np.ndarray, k: int, half: int, k2: int, scales: np.ndarray | None, budget_mb: float
) -> Any:
    """Encode N images: V, a CSR array ``[N, N]`` of float32 whose rows sum to 1.

    Args:
        pairs: Similarities of all images with all.
        neighbours: Nearest neighbours of each image ``[N, K]``, itself first.
        k: Neighbours that may be reciprocal, the image itself included.
        half: ``k`` of the neighbours' sets, by which an image's set is expanded.
        k2: Nearest images, itself included, whose encodings are averaged; 1: no query expansion.
        scales: Divisors of each image's squared distances ``[N]``: weights are ``exp(-distance / scale)``, normalised.
            None, as in Cluster Contrast: they are ``exp(-(2 - 2 x.y))``, which is the same for unit vectors alone.
        budget_mb: Memory for temporary arrays.
    """
    csr = sparse().csr_array
    num = len(neighbours)
    near, near_half = _reciprocal(neighbours[:, :k]), _reciprocal(neighbours[:, :half])
    sizes, half_t = np.diff(near_half.indptr), near_half.T.tocsr()
    values, columns, counts = [], [], []
    for start, stop in chunks(num, 32 * k * (half + k), budget_mb, torch.device("cpu")):
        near_rows = near[start:stop]
        shared = (near_rows @ half_t).multiply(near_rows).tocoo()  # images that neighbour and image have in common
        accepted = 3 * shared.data > 2 * sizes[shared.col]
        ones = np.ones(int(accepted.sum()), dtype=np.int32)
        candidates = csr((ones, (shared.row[accepted], shared.col[accepted])), shape=shared.shape)
        expanded = (near_rows + candidates @ near_half).tocsr()
        expanded.sort_indices()
        counts.append(np.diff(expanded.indptr))
        columns.append(expanded.indices)
        rows = np.repeat(np.arange(start, stop), counts[-1])
        values.append(_weights(pairs, rows, columns[-1], scales, budget_mb))
    v = _csr(np.concatenate(values), np.concatenate(columns), np.concatenate(counts))
    if k2 > 1:
        near_k2 = neighbours[:, :k2]
        v = _csr(np.full(near_k2.size, 1 / near_k2.shape[1], dtype=np.float32), near_k2.ravel(), near_k2.shape[1]) @ v
        v.sort_indices()
    return v


def _csr(values: np.ndarray, columns: np.ndarray, counts: np.ndarray | int) -> Any:
    """Make a square CSR array with ``counts`` entries per row."""
    if isinstance(counts, int):
        counts = np.full(len(columns) // counts, counts)
    pointers = np.concatenate([[0], np.cumsum(counts)])
    return sparse().csr_array((values, columns, pointers), shape=(len(counts), len(counts)))


def _reciprocal(neighbours: np.ndarray) -> Any:
    """Make a CSR array ``[N, N]`` of ones where two images are among each other's neighbours."""
    forward = _csr(np.ones(neighbours.size, dtype=np.int32), neighbours.ravel(), neighbours.shape[1])
    forward.sort_indices()
    return forward.multiply(forward.T.tocsr()).tocsr()


def _weights(
    pairs: Similarities, rows: np.ndarray, columns: np.ndarray, scales: np.ndarray | None, budget_mb: float
) -> np.ndarray:
    """Weights ``[M]`` of images ``columns`` in the sets of images ``rows`` (ascending); they sum to 1 in each set."""
    distances = np.empty(len(rows), dtype=np.float32)
    is_raw = scales is None and pairs.metric == "euclidean"
    for start, stop in chunks(len(rows), 16 * pairs.gallery.shape[1], budget_mb, pairs.device):
        i, j = (torch.from_numpy(x[start:stop]).long().to(pairs.device) for x in (rows, columns))
        chunk = 2 - 2 * pairs.products(i, j) if is_raw else pairs.distances(pairs.at(i, j))
        distances[start:stop] = chunk.cpu().numpy()
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    counts = np.diff(firsts, append=len(rows))
    if is_raw:  # long descriptors have distances far below 0, whose exponential overflows
        distances -= np.repeat(np.minimum.reduceat(distances, firsts), counts)
    else:
        distances[rows == columns] = 0  # exactly
    weights = np.exp(-distances if scales is None else -distances / scales[rows])
    return weights / np.repeat(np.add.reduceat(weights, firsts), counts)


class Minima(NamedTuple):
    """Minima of two images' weights in one column, ``[M]`` each: pair numbers (row of the chunk x width + row of the
    other encoding) and values."""

    pairs: np.ndarray
    values: np.ndarray


def minima(
    v: Any, other: Any, firsts: np.ndarray, width: int, budget_mb: float, most_rows: int = 2**31
) -> Iterator[tuple[int, int, Minima]]:
    """Yield the minima above 0 of the rows of two encodings, by chunk of rows of ``v``: start, stop and its minima.

    Args:
        v: Encodings, CSR ``[R, N]``.
        other: Encodings to compare with, CSC ``[N', N]``.
        firsts: For each entry of ``v``, the position in ``other`` from which its column is compared.
        width: Multiplier in the pair numbers, N' or more.
        budget_mb: Memory for temporary arrays; one row at a time where that takes more.
        most_rows: Largest number of rows in a chunk.
    """
    counts = other.indptr[v.indices + 1] - firsts
    ends = np.concatenate([[0], np.cumsum(counts)])[v.indptr]  # [R + 1] terms before each row
    limit = min(budget_mb * 2**20 / TERM_BYTES, CACHED_TERMS)
    start = 0
    while start < v.shape[0]:
        stop = min(int(np.searchsorted(ends, ends[start] + limit, "right")) - 1, start + most_rows)
        stop = max(stop, start + 1)
        entries = slice(v.indptr[start], v.indptr[stop])
        count = counts[entries]
        positions = integer_ranges(firsts[entries], count)
        rows = np.repeat(np.arange(stop - start) * width, np.diff(v.indptr[start : stop + 1]))
        pairs = np.repeat(rows, count)
        pairs += other.indices[positions]
        yield start, stop, Minima(pairs, np.minimum(np.repeat(v.data[entries], count), other.data[positions]))
        start = stop


def jaccard(sums: np.ndarray) -> np.ndarray:
    """Jaccard distances from sums of minima, for weights that sum to 1 (equation 10); clipped at 0 against rounding."""
    return np.maximum(1 - sums / (2 - sums), 0)
