"""Open-set identification: is the person of a query in the gallery at all, and who is it?

The query's best hit is accepted if its similarity reaches a threshold. Rates are those of ISO/IEC 19795-1 and the NIST
evaluations of identification: FPIR, the share of unknown persons' queries for which somebody is accepted, and FNIR, the
share of known persons' queries for which the right person is not (below the threshold, or not ranked first).

Shapes: Q queries, G gallery images, K queries of known persons, U queries of unknown ones.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from passreid_models.retrieval.protocol import JUNK, Protocol
from passreid_models.retrieval.similarity import LEAST, Similarities, chunks

__all__ = ["OpenSet", "open_set", "unknown_identities"]


@dataclass(frozen=True)
class OpenSet:
    """Rates of open-set identification by threshold; the false positive rate grows with the gallery.

    Args:
        num_gallery: Gallery images that a query is compared with, G without junk.
        known: Similarity of the best hit of each known query, ascending ``[K]``; -inf if it is another person.
        unknown: The same of each unknown query, whoever it is, ascending ``[U]``.
        num_not_finite: Queries and gallery images whose descriptor is not finite; they are left out.
    """

    num_gallery: int
    known: np.ndarray
    unknown: np.ndarray
    num_not_finite: int = 0

    def fpir(self, threshold: float) -> float:
        """Share of unknown queries with an accepted hit."""
        return 1 - float(np.searchsorted(self.unknown, threshold)) / len(self.unknown)

    def fnir(self, threshold: float) -> float:
        """Share of known queries whose right person is not accepted."""
        return float(np.searchsorted(self.known, max(threshold, LEAST))) / len(self.known)  # -inf: never accepted

    def threshold(self, fpir: float) -> float:
        """Least threshold with that share of false positives or fewer; NaN if it is less than one of U queries.

        Raises:
            ValueError: If ``fpir`` is not in 0..1.
        """
        if not 0 <= fpir <= 1:
            raise ValueError(f"fpir must be in 0..1, got {fpir}")
        accepted = math.floor(round(fpir * len(self.unknown), 6))  # rounded: 0.29 * 100 is 28.999999999999996
        if not accepted:
            return math.nan
        if accepted >= len(self.unknown):
            return -math.inf
        return float(np.nextafter(self.unknown[-accepted - 1], np.float32(np.inf)))

    def dir_at(self, fpir: float) -> float:
        """Detection and identification rate, 1 - FNIR, at a share of false positives; NaN as for ``threshold``.

        Raises:
            ValueError: If ``fpir`` is not in 0..1.
        """
        threshold = self.threshold(fpir)
        return math.nan if math.isnan(threshold) else 1 - self.fnir(threshold)


def open_set(
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
) -> OpenSet:
    """Best hits of queries of known persons, and of persons who are not in the gallery.

    A query is known if the gallery holds a match of it by the Market-1501 protocol, and unknown if its identity is not
    in the gallery at all; others, such as those whose only match has no finite descriptor, and junk are not counted.
    ``unknown_identities`` selects persons to take out of a gallery that holds everybody.

    Args:
        query: Descriptors ``[Q, C]``.
        gallery: Descriptors ``[G, C]``.
        query_pids: Identities ``[Q]``.
        gallery_pids: Identities ``[G]``.
        query_camids: Cameras ``[Q]``, or None.
        gallery_camids: Cameras ``[G]``, or None.
        own: Row in the gallery of each query's own image ``[Q]``, which is left out; -1 where there is none.
        metric: ``cosine`` or ``euclidean``, as in ``rank``.
        budget_mb: Memory on top of the descriptors, in MB.

    Raises:
        ValueError: If shapes do not match, a camera is below 0, no descriptor of queries or gallery is finite, or there
            are no queries of known persons or none of unknown ones.
    """
    pairs = Similarities(query, gallery, metric)
    protocol = Protocol(pairs.finite, query_pids, gallery_pids, query_camids, gallery_camids, own)
    num_queries, num_gallery = pairs.shape
    best, is_known, is_right = np.empty(num_queries, np.float32), *np.zeros((2, num_queries), dtype=bool)
    for start, stop in chunks(num_queries, 8 * num_gallery + 64 * protocol.max_same_pid, budget_mb, pairs.device):
        matches, left_out = protocol.matches(start, stop)
        rows = pairs.rows(start, stop)
        protocol.hide(rows, left_out)
        values, first = rows.max(dim=1)  # of equal ones the first, as in a ranking
        best[start:stop] = values.cpu().numpy()
        is_right[start:stop] = protocol.gallery_pids[first.cpu().numpy()] == protocol.query_pids[start:stop]
        is_known[start + matches.rows] = True
    is_unknown = ~protocol.in_gallery & (protocol.query_pids != JUNK)
    if not is_known.any() or not is_unknown.any():
        kind = "known persons, who are in the gallery" if not is_known.any() else "unknown persons, who are not in it"
        raise ValueError(
            f"open-set identification needs queries of known and of unknown persons; there are none of {kind}"
        )
    known = np.where(is_right, best, -np.inf)[is_known]
    counted = num_gallery - len(protocol.junk)
    return OpenSet(counted, np.sort(known), np.sort(best[is_unknown]), protocol.num_not_finite)


def unknown_identities(query_pids: ArrayLike, seed: int = 0) -> np.ndarray:
    """Half of the queries' identities, to be taken out of the gallery: the first of a permutation by ``seed``.

    Args:
        query_pids: Identities ``[Q]``; junk (-1) is left out.
        seed: Seed of numpy's generator.

    Returns:
        Identities, ascending: half of them, rounded down.
    """
    pids = np.unique(np.asarray(query_pids))
    pids = pids[pids != JUNK]
    return np.sort(np.random.default_rng(seed).permutation(pids)[: len(pids) // 2])
