"""Ranking: the most similar gallery images of each query."""

from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from passreid_models.retrieval.similarity import LEAST, Similarities, as_tensor, chunks, require_count, top

__all__ = ["Ranking", "rank"]


class Ranking(NamedTuple):
    """Most similar gallery images of each query in descending order, both fields ``[Q, K]``."""

    indices: Tensor
    similarities: Tensor


def rank(
    query: Tensor | ArrayLike,
    gallery: Tensor | ArrayLike,
    topk: int = 5,
    metric: str = "cosine",
    budget_mb: float = 256.0,
) -> Ranking:
    """Rank the ``topk`` most similar gallery images of each query.

    Equal similarities are ordered by gallery index; gallery images whose descriptor is not finite
    (unreadable ones) come last, with -inf.

    Args:
        query: Descriptors ``[Q, C]``, or one ``[C]``.
        gallery: Descriptors ``[G, C]``.
        topk: Number of hits; all G where the gallery is smaller.
        metric: ``cosine``, or ``euclidean``, whose similarity is the negative squared distance: for the multi-neck UDA
            weights, whose descriptors are compared without normalisation.
        budget_mb: Memory for similarities, in MB; one query at a time where that takes more.

    Returns:
        Indices into the gallery and similarities, ``[Q, K]`` each.

    Raises:
        ValueError: If the shapes do not match, the gallery is empty, a query's descriptor or the whole gallery is not
            finite, ``topk`` is no whole number, or ``topk`` or ``budget_mb`` is too small.
    """
    if query is not gallery:
        query = as_tensor(query)
        query = query[None] if query.ndim == 1 else query
    pairs = Similarities(query, gallery, metric)
    require_count("topk", topk)
    if len(rows := (~pairs.finite[0]).nonzero()[0]):
        shown = ", ".join(map(str, rows[:5])) + (", .." if len(rows) > 5 else "")
        raise ValueError(f"{len(rows)} query descriptors are not finite and cannot be ranked, in rows {shown}")
    return rank_pairs(pairs, topk, budget_mb)


def rank_pairs(pairs: Similarities, topk: int, budget_mb: float = 256.0) -> Ranking:
    """Ranking of similarities that are prepared and checked: see ``rank``."""
    num_queries, num_gallery = pairs.shape
    width = min(topk, num_gallery)
    indices = torch.empty(num_queries, width, dtype=torch.int64, device=pairs.device)
    similarities = torch.empty(num_queries, width, device=pairs.device)
    for start, stop in chunks(num_queries, 8 * num_gallery + 64 * width, budget_mb, pairs.device):
        similarities[start:stop], indices[start:stop] = top(pairs.rows(start, stop), width)
    similarities[similarities == LEAST] = -torch.inf
    return Ranking(indices, similarities)
