"""mAP, mINP and CMC by the Market-1501 protocol.

The gallery is not ranked: the rank of a match is 1 plus the number of kept images with a greater similarity, counted in
the sorted values of its row, and of those with the same similarity and a lower index.

Shapes: Q queries, G gallery images, R rows of a chunk, M matches.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from passreid_models.retrieval.protocol import Pairs, Protocol, indices
from passreid_models.retrieval.reranking import Reranked
from passreid_models.retrieval.similarity import Similarities, as_tensor, chunks, require_count, require_finite

__all__ = ["RetrievalMetrics", "evaluate", "evaluate_distances"]


@dataclass(frozen=True)
class RetrievalMetrics:
    """Retrieval metrics in 0..1 over the counted queries, and the values of each query.

    Attributes:
        mAP: Mean average precision.
        mINP: Mean of number of matches / rank of the last match (arXiv 2001.04193, section 4.1).
        cmc: ``cmc[k - 1]`` is the share of queries with a match among the first k, ``[max_rank]``.
        num_queries: Queries that have a match and are counted.
        average_precision: Average precision of each query ``[Q]``; NaN where it is not counted.
        first_match: Rank of each query's first match ``[Q]``, from 1; 0 where it is not counted.
        num_not_finite: Queries and gallery images whose descriptor is not finite; they are left out.
    """

    mAP: float
    mINP: float
    cmc: Tensor
    num_queries: int
    average_precision: Tensor = field(repr=False)
    first_match: Tensor = field(repr=False)
    num_not_finite: int = 0

    @property
    def rank1(self) -> float:
        """Share of queries whose best hit is a match, in 0..1."""
        return self.rank(1)

    def rank(self, k: int) -> float:
        """Share of queries with a match among the first ``k``.

        Raises:
            ValueError: If ``k`` is not 1 to the length of the CMC curve.
        """
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"rank must be 1 to {len(self.cmc)}, the length of the CMC curve (max_rank); got {k}")
        return float(self.cmc[k - 1])


def evaluate(
    query: Tensor | ArrayLike,
    gallery: Tensor | ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike | None = None,
    gallery_camids: ArrayLike | None = None,
    *,
    own: ArrayLike | None = None,
    max_rank: int = 50,
    metric: str = "cosine",
    budget_mb: float = 256.0,
) -> RetrievalMetrics:
    """mAP, mINP and CMC of descriptors by the Market-1501 protocol.

    Gallery images of the query's identity and camera are left out, and so are junk images (identity -1); queries
    without a remaining match are not counted. A distractor (identity 0) is a person whom no query shows. Equal
    similarities are ranked by gallery index. Queries and gallery images whose descriptor is not finite, such as the NaN
    rows of unreadable images, are left out like junk, and their number is in the result.

    For data of one camera or without cameras, omit the cameras: no image is then left out by camera. If the queries are
    themselves in the gallery, give their rows there as ``own``.

    Args:
        query: Descriptors ``[Q, C]``.
        gallery: Descriptors ``[G, C]``.
        query_pids: Identities ``[Q]``.
        gallery_pids: Identities ``[G]``.
        query_camids: Cameras ``[Q]``, or None.
        gallery_camids: Cameras ``[G]``, or None.
        own: Row in the gallery of each query's own image ``[Q]``, which is left out; -1 where there is none.
        max_rank: Length of the CMC curve.
        metric: ``cosine`` or ``euclidean``, as in ``rank``.
        budget_mb: Memory on top of the descriptors, in MB; one query at a time where that takes more.

    Raises:
        ValueError: If shapes do not match, a camera is below 0, no descriptor of queries or gallery is finite, or no
            query has a match.
    """
    pairs = Similarities(query, gallery, metric)
    protocol = Protocol(pairs.finite, query_pids, gallery_pids, query_camids, gallery_camids, own)
    return _score(pairs, protocol, max_rank, budget_mb)


def evaluate_distances(
    distances: Tensor | ArrayLike | Reranked,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike | None = None,
    gallery_camids: ArrayLike | None = None,
    *,
    own: ArrayLike | None = None,
    max_rank: int = 50,
    budget_mb: float = 256.0,
) -> RetrievalMetrics:
    """mAP, mINP and CMC from distances, such as re-ranked ones, by the protocol of ``evaluate``.

    Args:
        distances: Distances ``[Q, G]``, or the result of ``rerank``. A row or column without a finite number is of an
            image without a descriptor, and is left out; infinity elsewhere ranks last.
        query_pids: Identities ``[Q]``.
        gallery_pids: Identities ``[G]``.
        query_camids: Cameras ``[Q]``, or None.
        gallery_camids: Cameras ``[G]``, or None.
        own: Row in the gallery of each query's own image ``[Q]``, which is left out; -1 where there is none.
        max_rank: Length of the CMC curve.
        budget_mb: Memory on top of the distances, in MB; one query at a time where that takes more.

    Raises:
        ValueError: If shapes do not match, a camera is below 0, a distance is NaN in a row and a column with finite
            ones, nothing is finite, or no query has a match.
    """
    if not isinstance(distances, Reranked):
        distances = as_tensor(distances)
        if distances.ndim != 2:
            raise ValueError(f"expected distances [Q, G], got {tuple(distances.shape)}")
    finite = distances.finite if isinstance(distances, Reranked) else _finite(distances, budget_mb)
    protocol = Protocol(finite, query_pids, gallery_pids, query_camids, gallery_camids, own)
    return _score(_NegatedDistances(distances), protocol, max_rank, budget_mb)


def _finite(distances: Tensor, budget_mb: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row and each column has a finite distance, bool ``[Q]`` and ``[G]``.

    Raises:
        ValueError: If none is finite, or one is NaN in a row and a column that have.
    """
    rows, columns = (torch.full((n,), not distances.numel(), device=distances.device) for n in distances.shape)
    parts = list(chunks(len(distances), 2 * max(1, len(columns)), budget_mb, distances.device))
    for start, stop in parts:
        finite = distances[start:stop].isfinite()
        rows[start:stop] |= finite.any(dim=1)
        columns |= finite.any(dim=0)
    result = rows.cpu().numpy(), columns.cpu().numpy()
    require_finite(result)
    for start, stop in parts:
        wrong = distances[start:stop].isnan() & rows[start:stop, None] & columns
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"the distance of query {start + row} and gallery image {column} is NaN; expected a number, or a whole "
                "row or column that is not finite, of an image without a descriptor"
            )
    return result


class _NegatedDistances:
    def __init__(self, distances: Tensor | Reranked) -> None:
        self.distances, self.shape, self.device = distances, distances.shape, distances.device
        image_bytes = 28 if isinstance(distances, Reranked) else distances.element_size()
        self.row_bytes = image_bytes * self.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        if isinstance(self.distances, Reranked):
            return self.distances.rows(start, stop).neg_()
        rows = self.distances[start:stop]
        rows = -(rows if rows.dtype in (torch.float32, torch.float64) else rows.float())
        return rows.nan_to_num_(nan=torch.finfo(rows.dtype).min)  # -inf too becomes the least finite number


def _score(
    similarities: Similarities | _NegatedDistances, protocol: Protocol, max_rank: int, budget_mb: float
) -> RetrievalMetrics:
    require_count("max_rank", max_rank)
    num_queries, num_gallery = similarities.shape
    precision, inverse_penalty = np.full(num_queries, np.nan), np.full(num_queries, np.nan)
    first = np.zeros(num_queries, dtype=np.int64)
    on_cpu = similarities.device.type == "cpu"
    image_bytes = 5 if on_cpu else 24  # on a GPU also of the sorted row and its order
    row_bytes = image_bytes * num_gallery + 100 * protocol.max_same_pid + similarities.row_bytes
    for start, stop in chunks(num_queries, row_bytes, budget_mb, similarities.device):
        matches, left_out = protocol.matches(start, stop)
        if not len(matches.rows):
            continue
        rows = similarities.rows(start, stop)
        protocol.hide(rows, left_out)
        ranks = match_ranks(rows, matches)
        ranks = ranks[np.lexsort((ranks, matches.rows))]  # ascending within each query, from 1
        counts = np.bincount(matches.rows)
        counted, counts = np.flatnonzero(counts), counts[counts > 0]
        ends = np.cumsum(counts)
        nth = np.arange(1, len(ranks) + 1) - np.repeat(ends - counts, counts)
        queries = start + counted
        precision[queries] = np.add.reduceat(nth / ranks, ends - counts) / counts
        first[queries], inverse_penalty[queries] = ranks[ends - counts], counts / ranks[ends - 1]
    count = int((first > 0).sum())
    if not count:
        raise ValueError(protocol.explain_no_match())
    hits = np.bincount(first[(first > 0) & (first <= max_rank)], minlength=max_rank + 1)[1:].cumsum()
    return RetrievalMetrics(
        mAP=float(np.mean(precision[first > 0])),
        mINP=float(np.mean(inverse_penalty[first > 0])),
        cmc=torch.from_numpy(hits / count).float(),
        num_queries=count,
        average_precision=torch.from_numpy(precision),
        first_match=torch.from_numpy(first),
        num_not_finite=protocol.num_not_finite,
    )


def match_ranks(similarities: Tensor, matches: Pairs) -> np.ndarray:
    """Rank of each match ``[M]`` in its row, from 1, among the entries above -inf.

    Args:
        similarities: Similarities ``[R, G]`` without NaN; -inf for left-out images.
        matches: Rows and columns of the matches, by row.
    """
    index = indices(matches, similarities)
    values = similarities[index]  # [M]
    counts = np.bincount(matches.rows, minlength=len(similarities))
    count_entries = _counts_by_row if similarities.device.type == "cpu" else _counts_at_once
    greater, equal = count_entries(similarities, values, counts)
    ranks = greater + 1
    columns = torch.arange(similarities.shape[1], device=values.device)
    for part in (equal > 1).nonzero()[:, 0].split(max(1, len(similarities) // 2)):
        before = (similarities[index[0][part]] == values[part, None]) & (columns < index[1][part, None])
        ranks[part] += before.sum(dim=1)
    return ranks.cpu().numpy()


def _counts_by_row(similarities: Tensor, values: Tensor, counts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Count, for each value, the entries of its row that are greater and those that are equal.

    Row by row in threads: a row fits in the processor's cache, entries below its last match need no sorting, and numpy
    sorts floats 8 times as fast as torch.
    """
    counted = np.flatnonzero(counts)
    ends = np.cumsum(counts)[counted]
    starts = ends - counts[counted]
    matrix, thresholds = similarities.numpy(), values.numpy()
    lowest = np.minimum.reduceat(thresholds, starts)
    greater, equal = np.empty((2, len(thresholds)), dtype=np.int64)

    def count(part: np.ndarray) -> None:
        for i in part:
            row, match = matrix[counted[i]], slice(starts[i], ends[i])
            kept = row.compress(row >= lowest[i])  # twice as fast as a boolean index
            kept.sort()
            upper = kept.searchsorted(thresholds[match], "right")
            greater[match] = len(kept) - upper
            equal[match] = upper - kept.searchsorted(thresholds[match])

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(count, np.array_split(np.arange(len(counted)), 4 * threads)))
    return torch.from_numpy(greater), torch.from_numpy(equal)


def _counts_at_once(similarities: Tensor, values: Tensor, counts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Count the same as ``_counts_by_row`` in few calls, for a GPU."""
    nth = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(np.arange(len(counts)), counts)
    index = indices(Pairs(rows, nth), values)
    padded = values.new_zeros(len(counts), int(counts.max()))
    padded[index] = values
    ordered = similarities.sort(dim=1).values
    upper = torch.searchsorted(ordered, padded, right=True)[index]
    return similarities.shape[1] - upper, upper - torch.searchsorted(ordered, padded)[index]
