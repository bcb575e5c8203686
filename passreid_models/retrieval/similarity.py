"""Similarities of descriptors, a chunk of rows at a time, and the largest of each row.

Shapes: Q queries, G gallery images, C descriptor width, R rows of a chunk, K hits.
"""

from collections.abc import Iterator
from copy import copy
from numbers import Integral

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

LEAST = torch.finfo(torch.float32).min  # similarity where a descriptor is not finite; left-out pairs are at -inf
METRICS = ("cosine", "euclidean")
CPU_CHUNK = 64 * 2**20  # bytes; larger chunks are hardly faster
TINY = torch.finfo(torch.float32).tiny


class Similarities:
    """Similarities of queries and gallery, ``shape`` ``[Q, G]``, computed on demand.

    Cosines, or negative squared distances if ``metric`` is ``euclidean``. Descriptors are compared in float32; a copy
    is made of other types, and for ``euclidean`` of descriptors whose mean is far longer than their differences: it is
    subtracted first, since rounding would hide these. ``finite`` tells which descriptors, and their lengths, are
    finite, bool ``[Q]`` and ``[G]``; the similarity of others is ``LEAST``. Equal descriptors of the gallery have
    exactly the same similarity to a query.
    """

    def __init__(self, query: Tensor | ArrayLike, gallery: Tensor | ArrayLike, metric: str) -> None:
        same = query is gallery
        gallery = as_tensor(gallery)
        query = gallery if same else as_tensor(query)
        if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1] or not len(gallery):
            raise ValueError(
                f"expected descriptors [Q, C] and [G, C], G > 0; got {tuple(query.shape)} and {tuple(gallery.shape)}"
            )
        if metric not in METRICS:
            raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
        self.metric = metric
        self.device = gallery.device
        self.offset = _offset(gallery) if metric == "euclidean" else None  # [C]
        self.gallery = (gallery if self.offset is None else gallery - self.offset).float()
        self.gallery_norms, self.gallery_finite, self.gallery_scaled = self._lengths(self.gallery)
        self.copies, self.originals = _copies(self.gallery)
        self._set_query(None if same else query)

    row_bytes = 0  # all chunks share one buffer

    def with_query(self, query: Tensor) -> "Similarities":
        """Similarities of other queries ``[Q, C]`` to the same gallery, which is not prepared again.

        The buffer of ``rows`` is another one: threads can share a gallery in this way.
        """
        pairs = copy(self)
        pairs._set_query(query)
        return pairs

    def _set_query(self, query: Tensor | None) -> None:
        """Prepare queries; None for the gallery itself."""
        if query is None:
            self.query, self.query_norms, query_finite, scaled = (
                self.gallery, self.gallery_norms, self.gallery_finite, self.gallery_scaled
            )  # fmt: skip
        else:
            query = query.to(self.device)
            self.query = (query if self.offset is None else query - self.offset).float()
            self.query_norms, query_finite, scaled = self._lengths(self.query)
        self.not_finite = ~query_finite, (~self.gallery_finite).nonzero()[:, 0]  # mask [Q], rows
        self.finite = query_finite.cpu().numpy(), self.gallery_finite.cpu().numpy()
        require_finite(self.finite)
        self.scaled = scaled, self.gallery_scaled
        self.buffer = self.gallery.new_empty(0)
        self.shape = torch.Size((len(self.query), len(self.gallery)))

    def _lengths(self, x: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Norms of the descriptors, whether each is finite, and whether any is not of unit length."""
        norms = self._norms(x)
        # a squared distance is at most 4 times the largest squared length; unit vectors need no division
        return norms, (4 * norms).isfinite(), bool(((norms - 1).abs() > 1e-6).any())

    def _norms(self, x: Tensor) -> Tensor:
        """Lengths of the descriptors, squared for the Euclidean distance; without a copy of ``x``."""
        if self.metric == "euclidean":
            return torch.einsum("nc,nc->n", x, x)
        norms = torch.linalg.vector_norm(x, dim=1)
        short = (norms < 1e-15).nonzero()[:, 0]  # their squares vanish in float32
        if len(short):
            largest = x[short].abs().amax(dim=1, keepdim=True).clamp_min_(TINY)
            norms[short] = torch.linalg.vector_norm(x[short] / largest, dim=1) * largest[:, 0]
        return norms.clamp_min_(TINY)

    def rows(self, start: int, stop: int) -> Tensor:
        """Similarities ``[R, G]`` of queries ``start`` to ``stop``, in a buffer that the next call overwrites."""
        query, norms = self.query[start:stop], self.query_norms[start:stop, None]
        if self.metric == "euclidean":
            similarities = self._product(2 * query).sub_(norms).sub_(self.gallery_norms)
        else:
            similarities = self._product(query / norms if self.scaled[0] else query)
            if self.scaled[1]:  # after the product: dividing the gallery before it would take a copy
                similarities.div_(self.gallery_norms)
        if len(self.copies):  # a library may round equal columns in different ways
            similarities[:, self.copies] = similarities[:, self.originals]
        if not self.finite[1].all():
            similarities[:, self.not_finite[1]] = LEAST
        if not self.finite[0][start:stop].all():
            similarities[self.not_finite[0][start:stop]] = LEAST
        return similarities

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Similarities ``[M]`` of M pairs."""
        if self.metric == "euclidean":
            products = (self.query[rows] * self.gallery[columns]).sum(dim=1)
            return 2 * products - self.query_norms[rows] - self.gallery_norms[columns]
        return self.products(rows, columns)

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Inner products ``[M]`` of M pairs, for ``cosine`` those of unit vectors."""
        query, gallery = self.query[rows], self.gallery[columns]
        if self.offset is not None:
            query, gallery = query + self.offset, gallery + self.offset
        if self.metric == "euclidean":
            return (query * gallery).sum(dim=1)
        return (query / self.query_norms[rows, None] * gallery).sum(dim=1) / self.gallery_norms[columns]

    def distances(self, similarities: Tensor) -> Tensor:
        """Squared Euclidean distances of similarities, for cosines those of unit vectors."""
        return (-similarities if self.metric == "euclidean" else 2 - 2 * similarities).clamp_min_(0)

    def _product(self, query: Tensor) -> Tensor:
        size = len(query) * len(self.gallery)
        if len(self.buffer) < size:  # new memory for every chunk would cost more than the scaling
            on_cpu = self.device.type == "cpu"  # where numpy, unlike torch, asks for large pages
            self.buffer = torch.from_numpy(np.empty(size, np.float32)) if on_cpu else self.gallery.new_empty(size)
        product = self.buffer[:size].view(len(query), len(self.gallery))
        if self.device.type == "cpu":  # on AMD processors 1.5 times as fast as torch's library
            with np.errstate(over="ignore", invalid="ignore"):  # of descriptors that are not finite
                np.matmul(query.numpy(), self.gallery.numpy().T, out=product.numpy())
            return product
        return torch.mm(query, self.gallery.T, out=product)


def as_tensor(x: Tensor | ArrayLike) -> Tensor:
    """Detach a tensor, or make one of an array or nested lists, in any byte order; float16 stays float16.

    Raises:
        ValueError: If it does not hold real numbers, or not one for each entry.
    """
    if isinstance(x, Tensor):
        if x.is_complex() or x.is_quantized or x.is_meta or x.layout != torch.strided:
            kind = "meta" if x.is_meta else f"{x.layout}, {x.dtype}".replace("torch.", "")
            raise ValueError(f"expected a dense tensor of real numbers, got one of the kind {kind}")
        return x.detach()
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError("expected an array without a mask: fill rows without a descriptor with NaN")
    try:
        array = np.asarray(x)
    except ValueError as e:  # rows of unequal lengths
        raise ValueError(f"expected a tensor or an array of numbers: {e}") from None
    if array.dtype.kind not in "fiub":
        raise ValueError(f"expected a tensor or an array of numbers, got an array of {array.dtype}")
    dtype = array.dtype.newbyteorder("=") if array.dtype in (np.float16, np.float32, np.float64) else np.float32
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))  # torch warns of arrays that are read-only


def require_count(name: str, value: int) -> None:
    """Refuse a value that is not a whole number of 1 or more.

    Raises:
        ValueError: The message begins with ``name``.
    """
    if not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def require_finite(finite: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuse queries, or a gallery, of which nothing is finite.

    Args:
        finite: Whether each query and each gallery image has a finite descriptor, bool ``[Q]`` and ``[G]``.

    Raises:
        ValueError: If there are images of a kind, and none has one.
    """
    for name, mask in zip(("query", "gallery"), finite, strict=True):
        if len(mask) and not mask.any():
            raise ValueError(f"none of the {len(mask)} {name} descriptors is finite: there is nothing to compare")


def _offset(x: Tensor) -> Tensor | None:
    """Mean ``[C]`` of the finite rows if their differences are small beside it, as after adding a constant; else None.

    Up to a ratio of 100 of the squares, float32 keeps 5 digits of the differences.
    """
    total, squares, count = x.new_zeros(x.shape[1], dtype=torch.float32), x.new_zeros((), dtype=torch.float32), 0
    for part in x.split(4096):
        rows = part if part.dtype == torch.float64 else part.float()
        rows = rows[rows.isfinite().all(dim=1)]
        total, squares = total + rows.sum(dim=0), squares + torch.einsum("nc,nc->", rows, rows)
        count += len(rows)
    mean = total / max(1, count)
    square = mean @ mean
    return mean if square > 100 * (squares / max(1, count) - square) else None


def _copies(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that equal an earlier row, and for each the first row that it equals."""
    bits = (x[:, :16] + 0.0).view(torch.int32).long()  # + 0.0 makes 0 of -0
    weights = torch.arange(1, bits.shape[1] + 1, device=x.device) * 0x9E3779B1
    _, number, count = (bits * weights).sum(dim=1).unique(return_inverse=True, return_counts=True)
    rows = (count[number] > 1).nonzero()[:, 0]  # few, as a rule
    if not len(rows):
        return rows, rows
    _, number = x[rows].unique(dim=0, return_inverse=True)
    first = rows.new_full((len(rows),), len(x)).scatter_reduce(0, number, rows, "amin")[number]
    return rows[rows > first], first[rows > first]


def chunks(total: int, row_bytes: int, budget_mb: float, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield start and stop of chunks of rows within the budget, each of one row at least.

    Raises:
        ValueError: If the budget is not a positive number.
    """
    if not budget_mb > 0:
        raise ValueError(f"budget_mb must be more than 0 MB, got {budget_mb}")
    limit = budget_mb * 2**20
    if device.type == "cpu":
        limit = min(limit, CPU_CHUNK)
    step = max(1, int(min(limit, 2**40) // max(1, row_bytes)))
    for start in range(0, total, step):
        yield start, min(start + step, total)


def top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest entries of each row, values and columns ``[R, K]``, in descending order, ties by column.

    ``similarities`` must hold no NaN. ``torch.topk`` alone may select any of tied entries.
    """
    k = min(k, similarities.shape[1])
    values, columns = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    if values.shape[1] > k:  # rows with a tie for the last place
        tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0]
        values, columns = values[:, :k], columns[:, :k]
        if len(tied):
            rows, last = similarities[tied], values[tied, k - 1 :]
            equal = rows == last
            room = k - (rows > last).sum(dim=1, keepdim=True)
            selected = (rows > last) | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
            columns[tied] = selected.nonzero()[:, 1].view(-1, k)
    columns = columns.sort(dim=1).values
    values, order = similarities.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
