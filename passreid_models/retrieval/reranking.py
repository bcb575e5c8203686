"""k-reciprocal re-ranking (Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017,
arXiv 1701.08398) of the gallery, with the semantics of the authors' code."""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from passreid_models.retrieval.k_reciprocal import encode, jaccard, minima, nearest
from passreid_models.retrieval.protocol import own_rows
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
        query: Any,
        gallery: Any,
        lambda_value: float,
        budget_mb: float,
    ) -> None:
        """
        Args:
            pairs: Similarities of queries and gallery that have a finite descriptor.
            finite: Whether each query and each gallery image has one.
            farthest: Largest squared distance of each query ``[Q]``.
            query: Encodings of the queries: CSR ``[Q, N]``, N images in all.
            gallery: Encodings of the gallery: CSR ``[G, N]``.
            lambda_value: Weight of the original distance.
            budget_mb: Memory for temporary arrays.
        """
        self.shape, self.device, self.finite = torch.Size((len(finite[0]), len(finite[1]))), pairs.device, finite
        self._pairs, self._farthest, self._lambda, self._budget_mb = pairs, farthest, lambda_value, budget_mb
        self._query, self._gallery = query, gallery.tocsc()

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
    *,
    own: ArrayLike | None = None,
) -> Reranked:
    """Re-rank a gallery by distances that also measure how many nearest neighbours a query and a gallery image share.

    A distance is ``lambda_value`` x squared distance / the query's largest + (1 - ``lambda_value``) x Jaccard distance
    of the sets of k-reciprocal neighbours, which are searched among queries and gallery together, without labels, and
    without images whose descriptor is not finite. If queries are themselves in the gallery, give their rows there as
    ``own``, so that each image counts once.

    Args:
        query: Descriptors ``[Q, C]``.
        gallery: Descriptors ``[G, C]``.
        k1: Neighbours of an image, itself not counted; fewer where there are fewer images.
        k2: Nearest images, itself included, whose encodings are averaged.
        lambda_value: Weight of the original distance, 0..1.
        metric: ``cosine`` or ``euclidean``, as in ``rank``.
        budget_mb: Memory for temporary arrays on top of a copy of the descriptors and some 2 kB an image, in MB.
        own: Row in the gallery of each query's own image ``[Q]``; -1 where there is none.

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
    finite, rows = pairs.finite, own_rows(own, pairs.shape)
    if not all(mask.all() for mask in finite):
        kept = [torch.from_numpy(mask).to(pairs.device) for mask in finite]
        pairs = Similarities(pairs.query[kept[0]], pairs.gallery[kept[1]], metric)
        kept_rows = np.append(np.where(finite[1], np.cumsum(finite[1]) - 1, -1), -1)  # of each row; the last is for -1
        rows = kept_rows[rows[finite[0]]]
    alone = rows < 0
    count = int(alone.sum())
    images = torch.cat([pairs.query[torch.from_numpy(alone).to(pairs.device)], pairs.gallery])
    rows = np.where(alone, np.cumsum(alone) - 1, count + rows)  # of each query in the images
    joint = Similarities(images, images, metric)
    if k1 >= len(images):
        _logger.warning(f"re-ranking of {len(images)} images: k1 is {len(images) - 1} instead of {k1}")
        k1 = len(images) - 1
    farthest = np.empty(len(images), dtype=np.float32)
    neighbours = nearest(joint, max(k1 + 1, k2), budget_mb, farthest)
    farthest = np.clip(farthest, 1e-12, np.finfo(np.float32).max)  # it is 0 where all images are alike
    v = encode(joint, neighbours, k1 + 1, round(k1 / 2) + 1, k2, farthest, budget_mb)
    scales = torch.from_numpy(farthest[rows]).to(pairs.device)
    return Reranked(pairs, finite, scales, v[rows], v[count:], lambda_value, budget_mb)
