"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017,
arXiv 1701.08398) of the gallery, with the semantics of the authors' code."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from passreid_models.retrieval.k_reciprocal import encode, jaccard, minima, nearest
from passreid_models.retrieval.similarity import Similarities, chunks, require_count

__all__ = ["Reranked", "rerank"]

_logger = logging.getLogger(__name__)


class Reranked:
    """Re-ranked distances of queries and gallery, ``shape`` ``[Q, G]``, computed on demand; the result of ``rerank``.

    Only sparse encodings are held, so that memory does not grow with Q x G. ``finite`` tells which queries and gallery
    images have a finite descriptor, bool ``[Q]`` and ``[G]``; distances of others are infinite.
    """

    def __init__(
        self,
        pairs: Similarities,
        finite: tuple[np.ndarray, np.ndarray],
        farthest: Tensor,
        v: Any,
        lambda_value: float,
        budget_mb: float,
    ) -> None:
        """
        Args:
            pairs: Similarities of queries and gallery that have a finite descriptor.
            finite: Whether each query and each gallery image has one.
            farthest: Largest squared distance of each query ``[Q]``.
            v: Encodings of the queries, then of the gallery: CSR ``[Q + G, Q + G]``.
            lambda_value: Weight of the original distance.
            budget_mb: Memory for temporary arrays.
        """
        self.shape, self.device, self.finite = torch.Size((len(finite[0]), len(finite[1]))), pairs.device, finite
        self._pairs, self._farthest, self._lambda, self._budget_mb = pairs, farthest, lambda_value, budget_mb
        self._query, self._gallery = v[: pairs.shape[0]], v[pairs.shape[0] :].tocsc()

    def rows(self, start: int, stop: int) -> Tensor:
        """Distances ``[stop - start, G]`` of some queries, as a new tensor."""
        if all(mask.all() for mask in self.finite):
            return self._rows(start, stop)
        rows, columns = np.flatnonzero(self.finite[0][start:stop]), np.flatnonzero(self.finite[1])
        before = int(self.finite[0][:start].sum())
        distances = torch.full((stop - start, self.shape[1]), torch.inf, device=self.device)
        index = torch.from_numpy(rows)[:, None].to(self.device), torch.from_numpy(columns).to(self.device)
        distances[index] = self._rows(before, before + len(rows))
        return distances

    def _rows(self, start: int, stop: int) -> Tensor:
        """Distances of queries and gallery images with a finite descriptor."""
        distances = self._pairs.distances(self._pairs.rows(start, stop))
        distances.div_(self._farthest[start:stop, None]).mul_(self._lambda)
        v = self._query[start:stop]
        firsts = self._gallery.indptr[v.indices]
        for first, last, terms in minima(v, self._gallery, firsts, self._pairs.shape[1], self._budget_mb):
            shape = last - first, self._pairs.shape[1]
            sums = np.bincount(terms.pairs, terms.values, shape[0] * shape[1]).astype(np.float32).reshape(shape)
            distances[first:last] += (1 - self._lambda) * torch.from_numpy(jaccard(sums)).to(self.device)
        return distances

    def dense(self) -> Tensor:
        """All distances ``[Q, G]``."""
        distances = torch.empty(self.shape, device=self.device)
        for start, stop in chunks(self.shape[0], 24 * self.shape[1], self._budget_mb, self.device):
            distances[start:stop] = self.rows(start, stop)
        return distances


def rerank(
    query: Tensor | ArrayLike,
    gallery: Tensor | ArrayLike,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    metric: str = "cosine",
    budget_mb: float = 256.0,
) -> Reranked:
    """Re-rank a gallery by distances that also measure how many nearest neighbours a query and a gallery image share.

    A distance is ``lambda_value`` x squared distance / the query's largest + (1 - ``lambda_value``) x Jaccard distance
    of the sets of k-reciprocal neighbours, which are searched among queries and gallery together, without labels, and
    without images whose descriptor is not finite.

    Args:
        query: Descriptors ``[Q, C]``.
        gallery: Descriptors ``[G, C]``.
        k1: Neighbours of an image, itself not counted; fewer where there are fewer images.
        k2: Nearest images, itself included, whose encodings are averaged.
        lambda_value: Weight of the original distance, 0..1.
        metric: ``cosine`` or ``euclidean``, as in ``rank``.
        budget_mb: Memory for temporary arrays on top of a copy of the descriptors and some 2 kB an image, in MB.

    Returns:
        Distances for ``evaluate_distances``; ``rows(start, stop)`` and ``dense()`` return them as tensors.

    Raises:
        ValueError: If shapes do not match, no descriptor of queries or gallery is finite, an option is out of its
            range, or scipy is not installed.
    """
    pairs = Similarities(query, gallery, metric)
    for name, value in (("k1", k1), ("k2", k2)):
        require_count(name, value)
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value must be in 0..1, got {lambda_value}")
    finite = pairs.finite
    if not all(mask.all() for mask in finite):
        kept = [torch.from_numpy(mask).to(pairs.device) for mask in finite]
        pairs = Similarities(pairs.query[kept[0]], pairs.gallery[kept[1]], metric)
    images = torch.cat([pairs.query, pairs.gallery])
    joint = Similarities(images, images, metric)
    if k1 >= len(images):
        _logger.warning(f"re-ranking of {len(images)} images: k1 is {len(images) - 1} instead of {k1}")
        k1 = len(images) - 1
    farthest = np.empty(len(images), dtype=np.float32)
    neighbours = nearest(joint, max(k1 + 1, k2), budget_mb, farthest)
    farthest = np.clip(farthest, 1e-12, np.finfo(np.float32).max)  # it is 0 where all images are alike
    v = encode(joint, neighbours, k1 + 1, round(k1 / 2) + 1, k2, farthest, budget_mb)
    scales = torch.from_numpy(farthest[: pairs.shape[0]]).to(pairs.device)
    return Reranked(pairs, finite, scales, v, lambda_value, budget_mb)
