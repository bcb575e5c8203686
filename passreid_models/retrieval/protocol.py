"""Market-1501 protocol: which gallery images are matches of a query, and which are left out.

Shapes: Q queries, G gallery images, R rows of a chunk, M pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

JUNK = -1  # identity of images that show no person


class Pairs(NamedTuple):
    """Rows of a chunk and columns of the gallery, ``[M]`` each, by row and then by column."""

    rows: np.ndarray
    columns: np.ndarray


class Protocol:
    """Matches and left-out images by identities, cameras and the queries' own rows in the gallery.

    Pairs are looked up per chunk of queries, in the gallery sorted by identity, and never held all at once.
    """

    def __init__(
        self,
        finite: tuple[np.ndarray, np.ndarray],
        query_pids: ArrayLike,
        gallery_pids: ArrayLike,
        query_camids: ArrayLike | None,
        gallery_camids: ArrayLike | None,
        own: ArrayLike | None,
    ) -> None:
        """
        Args:
            finite: Whether each query and each gallery image has a finite descriptor, bool ``[Q]`` and ``[G]``; others
                are left out, as junk is.
            query_pids: Identities ``[Q]``.
            gallery_pids: Identities ``[G]``.
            query_camids: Cameras ``[Q]``, or None.
            gallery_camids: Cameras ``[G]``, or None.
            own: Row in the gallery of each query's own image ``[Q]``, or -1; None: no query is in the gallery.
        """
        shape = len(finite[0]), len(finite[1])
        if (query_camids is None) != (gallery_camids is None):
            missing = "query_camids" if query_camids is None else "gallery_camids"
            raise ValueError(f"{missing} is missing: give the cameras of both queries and gallery, or of neither")
        self.query_pids = np.where(finite[0], _ids("query_pids", query_pids, shape[0]), JUNK)
        gallery = _ids("gallery_pids", gallery_pids, shape[1])
        self.in_gallery = np.isin(self.query_pids, gallery)
        """Whether the gallery shows each query's identity ``[Q]``, by images without a finite descriptor too."""
        gallery = np.where(finite[1], gallery, JUNK)
        self.num_not_finite = sum(int((~mask).sum()) for mask in finite)
        self.gallery_pids = gallery
        self.order = np.argsort(gallery, kind="stable")
        self.sorted_pids = gallery[self.order]
        self.junk = np.flatnonzero(gallery == JUNK)
        self.cameras: tuple[np.ndarray, np.ndarray] | None = None
        if query_camids is not None and gallery_camids is not None:
            self.cameras = (
                _cameras("query_camids", query_camids, np.where(self.in_gallery, self.query_pids, JUNK)),
                _cameras("gallery_camids", gallery_camids, np.where(np.isin(gallery, self.query_pids), gallery, JUNK)),
            )
        self.own = own_rows(own, shape)
        first = np.searchsorted(self.sorted_pids, self.query_pids, "left")
        end = np.searchsorted(self.sorted_pids, self.query_pids, "right")
        self.first, self.count = first, np.where(self.query_pids == JUNK, 0, end - first)

    @property
    def max_same_pid(self) -> int:
        """Largest number of gallery images that share a query's identity."""
        return int(self.count.max(initial=0))

    def matches(self, start: int, stop: int) -> tuple[Pairs, Pairs]:
        """Return the matches of queries ``start`` to ``stop``, and their left-out pairs besides junk."""
        rows = np.repeat(np.arange(stop - start), self.count[start:stop])
        columns = self.order[integer_ranges(self.first[start:stop], self.count[start:stop])]
        own = self.own[start:stop]
        left_out = columns == own[rows]
        if self.cameras:
            left_out |= self.cameras[1][columns] == self.cameras[0][start:stop][rows]
        has_own = np.flatnonzero(own >= 0)  # left out even if its identity is another
        left_out_rows = np.concatenate([rows[left_out], has_own])
        left_out_columns = np.concatenate([columns[left_out], own[has_own]])
        return Pairs(rows[~left_out], columns[~left_out]), Pairs(left_out_rows, left_out_columns)

    def hide(self, similarities: Tensor, left_out: Pairs) -> None:
        """Set the similarities of left-out pairs and of junk to -inf, below all numbers."""
        similarities[indices(left_out, similarities)] = -torch.inf
        if len(self.junk):
            similarities[:, torch.from_numpy(self.junk).to(similarities.device)] = -torch.inf

    def explain_no_match(self) -> str:
        """Error message for the case that no query has a match: likely causes, and what to do."""
        if not len(self.query_pids):
            return "there are no queries"
        return no_match(self.cameras is not None, self.num_not_finite)


def no_match(has_cameras: bool, num_not_finite: int = 0) -> str:
    """Error message for the case that no query has a match: likely causes, and what to do."""
    left_out = f"; {num_not_finite} descriptors that are not finite are left out" if num_not_finite else ""
    if has_cameras:
        return (
            "no query has a match in the gallery under another camera: is this data of a single camera, or are "
            "identities of query and gallery disjoint? For data of one camera or none leave the cameras out and give "
            f"`own`, the row of each query's own image in the gallery{left_out}"
        )
    return f"no query has a match in the gallery besides its own image: are their identities disjoint?{left_out}"


def own_rows(own: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    """Row in the gallery of each query's own image, int64 ``[Q]``, or -1; None: no query is in the gallery.

    Raises:
        ValueError: If a query has no entry, or one that is no row of the gallery of ``shape`` ``[Q, G]``.
    """
    rows = np.full(shape[0], -1) if own is None else _ids("own", own, shape[0])
    if len(rows) and not (rows.min() >= -1 and rows.max() < shape[1]):
        raise ValueError(
            f"own must hold rows of the gallery, 0 to {shape[1] - 1}, or -1 for a query that is not in it; "
            f"got {rows.min()} to {rows.max()}"
        )
    return rows


def integer_ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Concatenate, for all r, the ``count[r]`` integers from ``first[r]`` on."""
    integers = np.repeat(first - (np.cumsum(count) - count), count)
    integers += np.arange(len(integers))
    return integers


def indices(pairs: Pairs, like: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the pairs into a tensor, on its device."""
    return torch.from_numpy(pairs.rows).to(like.device), torch.from_numpy(pairs.columns).to(like.device)


def _cameras(name: str, camids: ArrayLike, pids: np.ndarray) -> np.ndarray:
    """Cameras of the images, known where these are of persons and not junk."""
    cameras = _ids(name, camids, len(pids))
    if unknown := int((cameras[pids != JUNK] < 0).sum()):
        raise ValueError(
            f"{name} holds {unknown} cameras below 0: unknown cameras cannot be compared. Leave the cameras out and "
            "give `own`, the row of each query's own image in the gallery"
        )
    return cameras


def _ids(name: str, ids: ArrayLike, length: int) -> np.ndarray:
    array = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    if array.shape != (length,):
        raise ValueError(f"{name} must hold one entry per image, {length} in all; got the shape {array.shape}")
    if not length:
        return array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} must hold whole numbers, got {array.dtype}")
    return array.astype(np.int64)
