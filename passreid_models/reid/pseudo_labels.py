"""Pseudo-labels: Jaccard distances of k-reciprocal neighbours, and DBSCAN on their sparse graph.

The method is that of Cluster Contrast (arXiv 2103.11568), whose code PASS uses; no N x N matrix is made for N images.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from passreid_models.retrieval.k_reciprocal import encode, jaccard, minima, nearest, sparse
from passreid_models.retrieval.similarity import Similarities, as_tensor
from passreid_models.runtime import require

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["cluster_features", "jaccard_distances"]

_logger = logging.getLogger(__name__)


def jaccard_distances(
    features: Tensor | ArrayLike,
    k1: int = 30,
    k2: int = 6,
    eps: float | None = None,
    metric: str = "cosine",
    budget_mb: float = 256.0,
) -> "csr_array":
    """Jaccard distances between images by their k-reciprocal neighbours; only those below 1 are stored.

    Args:
        features: Descriptors ``[N, C]``, on the device that computes.
        k1: Number of nearest neighbours of an image, itself included; all images if there are fewer.
        k2: Number of nearest images, itself included, whose encodings are averaged.
        eps: Largest distance to store; by default all below 1.
        metric: ``cosine``; or ``euclidean``, the published rule for descriptors that are not L2-normalised (multi
            neck): neighbours by squared Euclidean distance, weights ``exp(-(2 - 2 x.y))`` of the descriptors as they
            are.
        budget_mb: Memory for temporary arrays on top of the descriptors and the result, in MB.

    Returns:
        ``[N, N]``, symmetric; zeros, such as the diagonal, are stored. A distance that is not stored is 1, or, with
        ``eps``, larger than ``eps``.

    Raises:
        ValueError: If the descriptors are not finite numbers ``[N, C]``, an option is out of range, or scipy is not
            installed.
    """
    x = _to_descriptors(features)
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if eps is not None and not 0 < eps < 1:
        raise ValueError(f"eps must be between 0 and 1, a Jaccard distance; got {eps}")
    csr, num = sparse().csr_array, len(x)
    if not num:
        return csr((0, 0), dtype=np.float32)
    if num < k1:
        _logger.warning(f"clustering of {num} images: k1 is {num} instead of {k1}; the distances are unreliable")
        k1 = num
    pairs = Similarities(x, x, metric)
    half = min(k1, round(k1 / 2) + 1)
    neighbours = nearest(pairs, max(k1, k2), budget_mb)
    v = encode(pairs, neighbours, k1, half, k2, None, budget_mb)
    own = np.arange(num, dtype=np.int32)
    rows, columns, values = [own], [own], [np.zeros(num, dtype=np.float32)]
    for i, j, distances in _upper_half(v, eps, budget_mb):
        rows += [i, j]
        columns += [j, i]
        values += [distances, distances]
    graph = csr((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(num, num))
    graph.sort_indices()
    return graph


def _upper_half(v: Any, eps: float | None, budget_mb: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield pairs ``i < j`` and their Jaccard distances, in chunks."""
    num = v.shape[0]
    places = sparse().csr_array((np.arange(v.nnz), v.indices, v.indptr), shape=v.shape).tocsc()
    columns_v = sparse().csc_array((v.data[places.data], places.indices, places.indptr), shape=v.shape)
    firsts = np.empty(v.nnz, dtype=np.int64)
    firsts[places.data] = np.arange(1, v.nnz + 1)  # for each entry, the place after it in its column
    for start, _, terms in minima(v, columns_v, firsts, num, budget_mb, most_rows=2**32 // num):
        # summed by sorting integers: the pair in the upper half of the bits, the minimum in the lower one
        keys = terms.pairs.view(np.uint64) << np.uint64(32)
        keys |= terms.values.view(np.uint32)
        keys.sort()
        pairs = keys >> np.uint64(32)
        begins = np.flatnonzero(np.diff(pairs, prepend=np.uint64(2**63)))
        if not len(begins):
            continue
        distances = jaccard(np.add.reduceat(keys.astype(np.uint32).view(np.float32), begins))
        kept = distances < 1 if eps is None else distances <= eps
        rows, columns = np.divmod(pairs[begins[kept]], np.uint64(num))
        yield (rows + np.uint64(start)).astype(np.int32), columns.astype(np.int32), distances[kept]


def cluster_features(
    features: Tensor | ArrayLike,
    eps: float = 0.6,
    min_samples: int = 4,
    k1: int = 30,
    k2: int = 6,
    metric: str = "cosine",
    budget_mb: float = 256.0,
) -> np.ndarray:
    """Pseudo-labels of images: DBSCAN on their Jaccard distances.

    Args:
        features: Descriptors ``[N, C]``, on the device that computes.
        eps: Largest Jaccard distance between neighbours; published: 0.6 for Market-1501, 0.7 for MSMT17.
        min_samples: Neighbours, itself included, that make an image the core of a cluster.
        k1: Number of nearest neighbours of an image, itself included; all images if there are fewer.
        k2: Number of nearest images, itself included, whose encodings are averaged.
        metric: As of ``jaccard_distances``.
        budget_mb: Memory for temporary arrays on top of the descriptors and the graph, in MB.

    Returns:
        Labels ``[N]``: -1 for outliers, clusters counted from 0 in the order of their first images.

    Raises:
        ValueError: If the descriptors are not finite numbers ``[N, C]``, an option is out of range, or scikit-learn is
            not installed.
    """
    if min_samples < 1:
        raise ValueError(f"min_samples must be 1 or more, got {min_samples}")
    dbscan = find_dbscan()
    graph = jaccard_distances(features, k1, k2, eps, metric, budget_mb)
    if not graph.shape[0]:
        return np.empty(0, dtype=np.int64)
    labels = dbscan(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(graph)
    clusters, first_images = np.unique(labels[labels >= 0], return_index=True)
    numbers = np.full(len(clusters) + 1, -1)  # the last entry stays -1: outliers index it
    numbers[clusters[np.argsort(first_images)]] = np.arange(len(clusters))
    return numbers[labels]


def find_dbscan() -> Any:
    """Return the class ``DBSCAN`` of scikit-learn.

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    return require("sklearn.cluster", "reid", "clustering needs scikit-learn").DBSCAN


def _to_descriptors(features: Tensor | ArrayLike) -> Tensor:
    """Convert to float32 ``[N, C]``; refuse other shapes, and rows that are not finite."""
    x = as_tensor(features)
    if x.ndim != 2:
        raise ValueError(f"expected descriptors [N, C], got {tuple(x.shape)}")
    x = x.float()
    bad = (~x.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"descriptors of {len(bad)} images are not finite, the first in row {bad[0]}: leave these images out"
        )
    return x
