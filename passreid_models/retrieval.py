"""Ranking a gallery and scoring the ranking: pure functions on descriptors, identities and cameras.

Shapes: Q queries, G gallery images, C descriptor width, K hits wanted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["Ranking", "RetrievalMetrics", "evaluate", "rank"]


class Ranking(NamedTuple):
    """The best gallery images of each query, best first: both ``[Q, K]``."""

    indices: Tensor
    similarities: Tensor


@dataclass(frozen=True)
class RetrievalMetrics:
    """Scores in 0..1; ``cmc[k - 1]`` is the share of queries with a match among the first k."""

    mAP: float
    cmc: Tensor
    num_queries: int

    @property
    def rank1(self) -> float:
        return float(self.cmc[0])


def rank(query: Tensor, gallery: Tensor, topk: int = 5, metric: str = "cosine", chunk: int = 256) -> Ranking:
    """The ``topk`` most similar gallery images of each query.

    Equal similarities are ordered by gallery index; rows of NaN (unreadable images) come last, with -inf. Memory grows
    with ``chunk`` x G, not with Q x G.

    Args:
        query: Descriptors ``[Q, C]``, or one ``[C]``.
        gallery: Descriptors ``[G, C]``.
        topk: Hits wanted; all G where the gallery is smaller.
        metric: ``cosine``, or ``euclidean``, whose similarity is the negative squared distance: for the multi-neck UDA
            weights, whose descriptors are compared as they come.
        chunk: Queries compared at a time.

    Returns:
        Indices into the gallery and similarities, ``[Q, K]`` each.

    Raises:
        ValueError: If the shapes do not match, the gallery is empty, or ``topk`` is less than 1.
    """
    query = query[None] if query.ndim == 1 else query
    _check_pair(query, gallery)
    if topk < 1:
        raise ValueError(f"topk must be 1 or more, got {topk}")
    query, gallery = _prepare(query, metric), _prepare(gallery, metric)
    indices, similarities = [], []
    for part in query.split(chunk):
        sorted_ = _similarities(part, gallery, metric).sort(dim=1, descending=True, stable=True)
        similarities.append(sorted_.values[:, :topk])
        indices.append(sorted_.indices[:, :topk])
    return Ranking(torch.cat(indices), torch.cat(similarities))


def evaluate(
    query: Tensor,
    gallery: Tensor,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike,
    gallery_camids: ArrayLike,
    max_rank: int = 50,
    metric: str = "cosine",
    chunk: int = 256,
) -> RetrievalMetrics:
    """mAP and CMC by the Market-1501 protocol.

    Gallery images of the query's identity and camera are left out, and so are junk images (identity -1); queries
    without a remaining match are not counted.

    Args:
        query: Descriptors ``[Q, C]``.
        gallery: Descriptors ``[G, C]``.
        query_pids: Identities ``[Q]``.
        gallery_pids: Identities ``[G]``; 0 is a distractor.
        query_camids: Cameras ``[Q]``.
        gallery_camids: Cameras ``[G]``.
        max_rank: Length of the CMC curve.
        metric: ``cosine`` or ``euclidean``, as in ``rank``.
        chunk: Queries compared at a time.

    Raises:
        ValueError: If shapes do not match, or no query has a match under another camera.
    """
    _check_pair(query, gallery)
    q_pids, g_pids = np.asarray(query_pids), np.asarray(gallery_pids)
    q_cams, g_cams = np.asarray(query_camids), np.asarray(gallery_camids)
    for name, ids, features in (
        ("query_pids", q_pids, query),
        ("query_camids", q_cams, query),
        ("gallery_pids", g_pids, gallery),
        ("gallery_camids", g_cams, gallery),
    ):
        if ids.shape != (len(features),):
            raise ValueError(f"{name} must hold one entry an image, {len(features)}; got the shape {ids.shape}")
    query, gallery = _prepare(query, metric), _prepare(gallery, metric)
    precisions, cmc = [], np.zeros(max_rank)
    for start in range(0, len(query), chunk):
        sorted_ = _similarities(query[start : start + chunk], gallery, metric).sort(dim=1, descending=True, stable=True)
        for q, order in enumerate(sorted_.indices.cpu().numpy(), start):
            same = g_pids[order] == q_pids[q]
            kept = (g_pids[order] != -1) & ~(same & (g_cams[order] == q_cams[q]))
            hits = np.flatnonzero(same[kept])
            if len(hits):
                precisions.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
                cmc[hits[0] :] += 1
    if not precisions:
        raise ValueError(
            "no query has a match in the gallery under another camera: is this data of a single camera, "
            "or are identities of query and gallery disjoint?"
        )
    count = len(precisions)
    return RetrievalMetrics(float(np.mean(precisions)), torch.from_numpy(cmc / count).float(), count)


def _prepare(descriptors: Tensor, metric: str) -> Tensor:
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    return F.normalize(descriptors.float(), dim=1) if metric == "cosine" else descriptors.float()


def _similarities(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    """Similarities ``[Q, G]`` of prepared descriptors; NaN, which torch sorts above all numbers, becomes -inf."""
    products = query @ gallery.T
    if metric == "euclidean":
        products = 2 * products - query.square().sum(1, keepdim=True) - gallery.square().sum(1)
    return products.nan_to_num(nan=-torch.inf)


def _check_pair(query: Tensor, gallery: Tensor) -> None:
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1] or not len(gallery):
        raise ValueError(
            f"expected descriptors [Q, C] and [G, C], G > 0; got {tuple(query.shape)} and {tuple(gallery.shape)}"
        )
