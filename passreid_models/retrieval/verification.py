"""Verification that two images show the same person: ROC, equal error rate, thresholds for a false positive rate.

Every kept pair of query and gallery is counted in a histogram of ``BINS`` equal bins over all possible similarities, so
that rates are exact for thresholds at the edges of bins: 2e-6 apart for cosines.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from passreid_models.retrieval.protocol import JUNK, Protocol, indices
from passreid_models.retrieval.similarity import Similarities, chunks

__all__ = ["ROC", "roc"]

BINS = 2**20
CURVE_POINTS = 1000
PLOT_BINS = 128


@dataclass(frozen=True)
class ROC:
    """True and false positive rates by similarity threshold; pairs at least as similar pass for the same person.

    Attributes:
        eer: Equal error rate: false positive rate = false negative rate, interpolated between neighbouring thresholds.
        eer_threshold: Threshold of the equal error rate; the middle of its range if there are several.
        num_positives: Pairs of one identity.
        num_negatives: Pairs of two identities.
        fpr: False positive rates of the curve, ascending, for plotting.
        tpr: True positive rates of the curve.
        thresholds: Thresholds of the curve, descending from infinity.
        histogram_edges: Edges of the bins of both histograms, for plotting ``[B + 1]``.
        positive_histogram: Pairs of one identity by similarity ``[B]``.
        negative_histogram: Pairs of two identities by similarity ``[B]``.
        num_not_finite: Queries and gallery images whose descriptor is not finite; they are left out.
    """

    eer: float
    eer_threshold: float
    num_positives: int
    num_negatives: int
    fpr: np.ndarray = field(repr=False)
    tpr: np.ndarray = field(repr=False)
    thresholds: np.ndarray = field(repr=False)
    histogram_edges: np.ndarray = field(repr=False)
    positive_histogram: np.ndarray = field(repr=False)
    negative_histogram: np.ndarray = field(repr=False)
    _edges: np.ndarray = field(repr=False)  # [BINS + 1], ascending
    _positives: np.ndarray = field(repr=False)  # [BINS + 1] pairs at or above each edge
    _negatives: np.ndarray = field(repr=False)
    num_not_finite: int = 0

    def threshold(self, fpr: float) -> float:
        """Least similarity threshold whose false positive rate is at most ``fpr``.

        With fewer negatives than ``1 / fpr`` no negative may pass, and the threshold says little about other data.

        Raises:
            ValueError: If ``fpr`` is not in 0..1.
        """
        return float(self._edges[self._edge(fpr)])

    def tpr_at(self, fpr: float) -> float:
        """True positive rate at ``threshold(fpr)``; NaN with fewer negatives than ``1 / fpr``: too few to measure it.

        Raises:
            ValueError: If ``fpr`` is not in 0..1.
        """
        edge = self._edge(fpr)
        return float(self._positives[edge]) / self.num_positives if fpr * self.num_negatives >= 1 else math.nan

    def rates(self, threshold: float) -> tuple[float, float]:
        """False and true positive rate of a similarity threshold, which is rounded up to the edge of a bin."""
        edge = int(np.searchsorted(self._edges, threshold))
        if edge > BINS:
            return 0.0, 0.0
        return float(self._negatives[edge]) / self.num_negatives, float(self._positives[edge]) / self.num_positives

    def _edge(self, fpr: float) -> int:
        if not 0 <= fpr <= 1:
            raise ValueError(f"fpr must be in 0..1, got {fpr}")
        # rounded, since 0.29 of 100 pairs is 28.999999999999996
        max_passing = math.floor(round(fpr * self.num_negatives, 6))
        return BINS + 1 - int(np.searchsorted(self._negatives[::-1], max_passing, "right"))


def roc(
    query: Tensor | ArrayLike,
    gallery: Tensor | ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike | None = None,
    gallery_camids: ArrayLike | None = None,
    *,
    own: ArrayLike | None = None,
    metric: str = "cosine",
    budget_mb: float = 256.0,
) -> ROC:
    """Error rates of "the same person" by similarity threshold, over the pairs that ``evaluate`` keeps.

    Pairs of one identity are positives, all others negatives, distractors included. Left out are junk (identity -1, on
    either side), images whose descriptor is not finite, pairs of one identity under one camera, and queries' own
    images.

    Args:
        query: Descriptors ``[Q, C]``.
        gallery: Descriptors ``[G, C]``.
        query_pids: Identities ``[Q]``.
        gallery_pids: Identities ``[G]``.
        query_camids: Cameras ``[Q]``, or None.
        gallery_camids: Cameras ``[G]``, or None.
        own: Row in the gallery of each query's own image ``[Q]``, which is left out; -1 where there is none.
        metric: ``cosine`` or ``euclidean``, as in ``rank``.
        budget_mb: Memory on top of the descriptors and the histograms (30 MB), in MB.

    Raises:
        ValueError: If shapes do not match, no descriptor of queries or gallery is finite, or there are no pairs of one
            identity or none of two.
    """
    pairs = Similarities(query, gallery, metric)
    protocol = Protocol(pairs.finite, query_pids, gallery_pids, query_camids, gallery_camids, own)
    num_queries, num_gallery = pairs.shape
    low, high = _range(pairs)
    total, positive = (np.zeros(BINS + 1, dtype=np.int64) for _ in range(2))  # the last bin is of left-out pairs
    for start, stop in chunks(num_queries, 20 * num_gallery + 64 * protocol.max_same_pid, budget_mb, pairs.device):
        matches, left_out = protocol.matches(start, stop)
        rows = pairs.rows(start, stop)
        protocol.hide(rows, left_out)
        junk = np.flatnonzero(protocol.query_pids[start:stop] == JUNK)
        rows[torch.from_numpy(junk).to(rows.device)] = -torch.inf
        hidden = rows == -torch.inf
        bins = rows.sub_(low).mul_(BINS / (high - low)).clamp_(0, BINS - 1).int()
        bins[hidden] = BINS
        total += torch.bincount(bins.flatten(), minlength=BINS + 1).cpu().numpy()
        positive += torch.bincount(bins[indices(matches, bins)], minlength=BINS + 1).cpu().numpy()
    edges = np.linspace(low, high, BINS + 1)
    return _curve(positive[:BINS], (total - positive)[:BINS], edges, protocol.num_not_finite)


def _range(pairs: Similarities) -> tuple[float, float]:
    """Least and greatest similarity that descriptors of these norms can have."""
    if pairs.metric == "cosine":
        return -1.0, 1.0 + 2**-18  # above 1, so that a threshold can leave out even copies
    squares = torch.cat([pairs.query_norms, pairs.gallery_norms])
    squares = squares[squares.isfinite()]
    return -max(4 * float(squares.max()) if len(squares) else 0.0, 1e-12), 0.0


def _curve(positive: np.ndarray, negative: np.ndarray, edges: np.ndarray, num_not_finite: int) -> ROC:
    num_positives, num_negatives = int(positive.sum()), int(negative.sum())
    if not num_positives or not num_negatives:
        kind = "one identity" if not num_positives else "two identities"
        raise ValueError(
            f"an ROC needs pairs of one identity and of two identities; there are none of {kind} once pairs under "
            "the same camera, own images and junk are left out (for data of one camera or none, leave the cameras out)"
        )
    at_or_above = [np.append(np.cumsum(counts[::-1])[::-1], 0) for counts in (positive, negative)]  # [BINS + 1]
    tpr, fpr = at_or_above[0] / num_positives, at_or_above[1] / num_negatives
    eer, eer_threshold = _equal_error(fpr, (num_positives - at_or_above[0]) / num_positives, edges)
    points = _thinned(fpr, tpr)
    plot = [counts.reshape(PLOT_BINS, -1).sum(axis=1) for counts in (positive, negative)]
    return ROC(
        eer, eer_threshold, num_positives, num_negatives,
        np.append(0.0, fpr[points]), np.append(0.0, tpr[points]), np.append(np.inf, edges[points]),
        edges[:: BINS // PLOT_BINS], plot[0], plot[1], edges, at_or_above[0], at_or_above[1], num_not_finite,
    )  # fmt: skip


def _equal_error(fpr: np.ndarray, fnr: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """Equal error rate and its threshold: the falling ``fpr`` and the rising ``fnr`` meet there."""
    difference = fpr - fnr  # from 1 down to -1
    above = int(np.searchsorted(-difference, 0.0, "left"))  # number of edges with a positive difference
    not_below = int(np.searchsorted(-difference, 0.0, "right"))
    if above < not_below:
        return float(fpr[above]), float(edges[above] + edges[not_below - 1]) / 2
    left, right = above - 1, above
    share = difference[left] / (difference[left] - difference[right])
    return (
        float(fpr[left] + share * (fpr[right] - fpr[left])),
        float(edges[left] + share * (edges[right] - edges[left])),
    )


def _thinned(fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
    """Indices of edges for a plot, from last to first: evenly spaced by rate, and by the logarithm of the fpr."""
    levels = np.linspace(0, 1, CURVE_POINTS // 3)
    log_levels = np.geomspace(max(fpr[fpr > 0].min(), 1e-12), 1, CURVE_POINTS // 3)
    curves = ((fpr, levels), (tpr, levels), (fpr, log_levels))
    points = [len(x) - np.searchsorted(x[::-1], y, "right") for x, y in curves]
    edges = np.unique(np.concatenate([*points, [0, len(fpr) - 1]]))
    return edges[edges < len(fpr)][::-1]
