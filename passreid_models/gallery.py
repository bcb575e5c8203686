"""Gallery: named images of persons as descriptors, searched for who is on another image, kept in one file.

FILE    safetensors
    descriptors  float32 [G, C]
    json         uint8 [..], UTF-8: {"metric": .., "model": name and fingerprint, or null, "names": [..], "pids": [..]}
    metadata     "format", and "sha256" of the bytes of both

Shapes: Q queries, G images of the gallery, C descriptor width, K hits.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from passreid_models.device import pick_device
from passreid_models.embed import Embedder, has_direction
from passreid_models.retrieval.protocol import JUNK
from passreid_models.retrieval.ranking import rank_pairs
from passreid_models.retrieval.similarity import METRICS, Similarities, as_tensor, chunks, require_count
from passreid_models.runtime import atomic_file, few, require

__all__ = ["UNKNOWN", "Gallery", "Hits"]

UNKNOWN = "unknown"
FORMAT = "passreid gallery 1"
MAX_PID = 2**63 - 1
SHOWN = 5  # labels in an error
BUDGET_MB = 256.0  # of a search, on top of the gallery
NO_DIRECTION = "the descriptor is zero or not finite"


class Hits(NamedTuple):
    """Most similar names of each query in descending order.

    ``names`` is a list of K names for each query, ``unknown`` where nobody is accepted; ``similarities`` is float32
    ``[Q, K]`` on the CPU, of the most similar image of each name.
    """

    names: list[list[str]]
    similarities: Tensor


class Gallery:
    """Descriptors of named images, in memory, and the search for the most similar names.

    A name stands for a person (or a track, an article, a file): it has one image or more, and adding to a name that is
    there gives it further images. A search finds each name once, by its most similar image.

    Any number of threads may search, add and remove at once: a search sees the gallery as it was when it began.

    Examples:
        >>> gallery = Gallery(Embedder("pass_vit_tiny_patch16"))
        >>> gallery.add(["anna", "anna", "ben"], ["a1.jpg", "a2.jpg", "b.jpg"])
        >>> names, similarities = gallery.search("query.jpg", topk=1, threshold=threshold)
        >>> names[0][0]  # anna, ben or unknown
    """

    def __init__(
        self, embed: Embedder | None = None, *, metric: str | None = None, faiss: str = "", device: str = "cpu"
    ) -> None:
        """
        Args:
            embed: Embedder of all images that are added and searched; None for a gallery of descriptors.
            metric: ``cosine`` or ``euclidean``, as in ``rank``; by default ``euclidean`` for the descriptors of a multi
                neck, which are not L2-normalised, and else ``cosine``.
            faiss: Search with faiss, by an index of this description for its ``index_factory``: ``Flat`` is exact,
                ``HNSW32`` and others are not. By default the package's own exact search.
            device: Device of the search, as ``pick_device`` takes it; a copy of the descriptors stays on the CPU.

        Raises:
            ValueError: If the metric is unknown, the device is not available, or faiss is not installed or is to search
                elsewhere than on the CPU.
        """
        if metric is None:
            metric = "cosine" if embed is None else embed.metric
        if metric not in METRICS:
            raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
        if faiss and require("faiss", "faiss", "faiss") and device != "cpu":
            raise ValueError(f"faiss searches on the CPU, got device={device!r}")
        self.embed, self.metric, self.faiss, self.device = embed, metric, faiss, pick_device(device)
        self._model: dict[str, Any] | None = None  # of a file that was loaded without its model
        self._names: list[str] = []  # [G]
        self._pids: list[int] = []  # [G]
        self._pid_of: dict[str, int] = {}
        self._blocks = [] if embed is None else [torch.empty(0, embed.dim)]  # descriptors, [G, C] together
        self._index: _Index | None = None
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._pid_of

    def __repr__(self) -> str:
        model = self.embed.name if self.embed else (self._model or {}).get("name", "descriptors")
        return f"Gallery({len(self)} images of {len(self._pid_of)} names, {model}, {self.metric})"

    @property
    def names(self) -> list[str]:
        """Name of each image ``[G]``, in the order in which they were added."""
        return list(self._names)

    @property
    def pids(self) -> np.ndarray:
        """Identity of each image, int64 ``[G]``; -1 where none was given, which evaluation leaves out."""
        return np.array(self._pids, dtype=np.int64)

    @property
    def descriptors(self) -> Tensor:
        """Descriptors of the images, float32 ``[G, C]`` on the CPU, as they were added; not to be written to."""
        with self._lock:
            return self._joined()

    def add(
        self,
        names: str | Sequence[str],
        images: Any,
        pids: ArrayLike | Tensor | None = None,
        *,
        errors: dict[int, str] | None = None,
    ) -> None:
        """Add images, or their descriptors, under names: all of them, or none if it raises.

        Args:
            names: Name of each image ``[N]``; one text is the name of all. A name may occur many times.
            images: Images as the Embedder takes them; or descriptors by the same model, floating point ``[N, C]``, or
                one ``[C]``, of any dtype and device: they are kept as float32.
            pids: Identities, whole numbers ``[N]`` or one for all, for ``evaluate`` and ``open_set``. All images of a
                name have the same: that of the earlier ones if None.
            errors: If given, an image that is unreadable, or whose descriptor is zero or not finite, is left out, with
                an entry ``{row: reason}`` here; otherwise it raises.

        Raises:
            ValueError: If there are not as many names as images, a name is no text, empty or ``unknown``, a name gets a
                second identity, the width differs from the gallery's, or an image has no descriptor and ``errors`` is
                None.
            FileNotFoundError: If a folder holds no image.
        """
        images = self._single(images)
        names = [names] * len(images) if isinstance(names, str) else list(names)
        if len(names) != len(images):
            raise ValueError(f"{len(names)} names for {len(images)} images")
        for name in names:
            _check_name(name)
        pid_list = None if pids is None else _as_pids(pids, len(images))
        self._with_pids(names, pid_list)  # before the work
        x, good = self._embed(images, names, errors)
        rows = good.nonzero()[:, 0].tolist()
        x = x if len(rows) == len(x) else x[rows]
        self._insert([names[i] for i in rows], x, pid_list and [pid_list[i] for i in rows])

    def search(
        self, images: Any, topk: int = 5, threshold: float | None = None, *, errors: dict[int, str] | None = None
    ) -> Hits:
        """Search for the ``topk`` most similar names of each image.

        A hit is accepted if its similarity reaches the threshold, as in open-set identification
        (``retrieval.open_set``); the name of another is ``unknown``, and its similarity is given all the same.

        Args:
            images: Images, or descriptors by the same model, as ``add`` takes them.
            topk: Number of hits K; all names where the gallery has fewer, and one ``unknown`` at -inf if it is empty.
            threshold: Least similarity of an accepted hit: a cosine, or a negative squared distance; None accepts all.
            errors: If given, an image without a descriptor gets an entry ``{row: reason}`` here, and hits that are
                ``unknown``, at NaN; otherwise it raises.

        Returns:
            Names and similarities. Equal similarities are ordered by when the names were added.

        Raises:
            ValueError: If ``topk`` is not a whole number of 1 or more, the threshold is no number or NaN, the width
                differs from the gallery's, an image has no descriptor and ``errors`` is None, or faiss does not know
                the index or cannot train it with so few descriptors.
        """
        require_count("topk", topk)
        if threshold is not None and (not isinstance(threshold, Real) or math.isnan(threshold)):
            raise ValueError(f"threshold must be a number or None, got {threshold!r}")
        with self._lock:
            if self._index is None and self._names:
                self._index = _Index(self._names, self._joined(), self.metric, self.faiss, self.device)
            index = self._index
        images = self._single(images)
        x, good = self._embed(images, None, errors)
        topk = min(topk, len(index.names) if index else 1)
        similarities = torch.full((len(images), topk), -torch.inf)
        similarities[~good] = torch.nan
        names = [[UNKNOWN] * topk for _ in images]
        if index and good.any():
            found, similarities[good] = index.search(x[good], topk)
            accepted = similarities.double().numpy() >= (-np.inf if threshold is None else threshold)
            for row, hits in zip(good.nonzero()[:, 0].tolist(), found, strict=True):
                names[row] = [hit if accepted[row, i] else UNKNOWN for i, hit in enumerate(hits)]
        return Hits(names, similarities)

    def remove(self, names: str | Sequence[str]) -> None:
        """Remove all images of these names: of all of them, or of none if it raises.

        Raises:
            ValueError: If a name is not in the gallery.
        """
        removed = {names} if isinstance(names, str) else set(names)
        with self._lock:
            if missing := removed - self._pid_of.keys():
                raise ValueError(f"not in the gallery: {few(sorted(map(str, missing)), SHOWN)}")
            kept = [i for i, name in enumerate(self._names) if name not in removed]
            self._blocks = [self._joined()[kept]] if self._blocks else []
            self._names, self._pids = [self._names[i] for i in kept], [self._pids[i] for i in kept]
            self._pid_of = dict(zip(self._names, self._pids, strict=True))
            self._index = None

    def save(self, path: str | Path) -> None:
        """Write the gallery to one file, whole or not at all; an older file is replaced.

        Raises:
            OSError: If it cannot be written.
        """
        path = Path(path)
        model = {"name": self.embed.name, **self.embed.fingerprint} if self.embed else self._model
        with self._lock:
            descriptors, names, pids = self._joined(), list(self._names), list(self._pids)
        content = json.dumps({"metric": self.metric, "model": model, "names": names, "pids": pids}).encode()
        tensors = {"descriptors": descriptors, "json": torch.frombuffer(bytearray(content), dtype=torch.uint8)}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "sha256": _checksum(content, descriptors)})

    @classmethod
    def load(
        cls, path: str | Path, embed: Embedder | None = None, *, faiss: str = "", device: str = "cpu"
    ) -> "Gallery":
        """Read a gallery.

        Args:
            path: File that ``save`` wrote.
            embed: Embedder with the weights that its descriptors are of, whatever their name: fusion, neck and
                preprocessing must be the same too, dtype, device and ``flip`` need not. None for a gallery that is
                searched by descriptors.
            faiss: As in ``Gallery``.
            device: As in ``Gallery``.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If the file is damaged, is no gallery, or has descriptors of another model or of none.
        """
        path = Path(path)
        content, descriptors = _read(path)
        if embed is not None:
            _check_model(content["model"], embed, path)
        gallery = cls(embed, metric=content["metric"], faiss=faiss, device=device)
        gallery._model = content["model"]
        try:
            names = content["names"]
            for name in names:
                _check_name(name)
            if len(descriptors) != len(names) or not has_direction(descriptors).all():
                raise ValueError(f"{len(descriptors)} descriptors, not all finite, for {len(names)} names")
            gallery._insert(names, descriptors, _as_pids(content["pids"], len(names)))
        except ValueError as e:
            raise ValueError(f"{path} is no gallery of this package: {e}") from None
        return gallery

    def _single(self, images: Any) -> Any:
        """Descriptors ``[N, C]``, or a list of single images."""
        x = _as_descriptors(images)
        if x is not None:
            return x
        if self.embed is not None:
            return self.embed.items(images)
        if isinstance(images, list | tuple) and not images:
            return []
        raise ValueError("this gallery has no model: make it with an Embedder, or give descriptors, floats [N, C]")

    def _embed(self, images: Any, names: list[str] | None, errors: dict[int, str] | None) -> tuple[Tensor, Tensor]:
        """Descriptors ``[N, C]``, and which of them are usable, bool ``[N]``; the others are in ``errors``."""
        if isinstance(images, Tensor):
            x = images.to("cpu", torch.float32, copy=True).contiguous()
        else:
            x = self.embed(images, errors=errors) if self.embed else torch.empty(0, 0)
        self._check_width(x)
        good = has_direction(x)
        if not good.all():
            bad = [(i, f"row {i}" if names is None else names[i]) for i in (~good).nonzero()[:, 0].tolist()]
            if errors is None:
                raise ValueError(f"{NO_DIRECTION}: {few([label for _, label in bad], SHOWN)}")
            for i, label in bad:
                errors.setdefault(i, f"{label}: {NO_DIRECTION}")
        return x, good

    def _check_width(self, x: Tensor) -> None:
        if self._blocks and len(x) and x.shape[1] != (width := self._blocks[0].shape[1]):
            raise ValueError(f"the descriptors are {x.shape[1]} wide, those of the gallery {width}: of another model?")

    def _joined(self) -> Tensor:
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks)]
        return self._blocks[0] if self._blocks else torch.empty(0, 0)

    def _with_pids(self, names: list[str], pids: list[int] | None) -> list[int]:
        """Identity of each image; those of their names if none are given."""
        if pids is None:
            return [self._pid_of.get(name, JUNK) for name in names]
        pid_of: dict[str, int] = {}
        for name, pid in zip(names, pids, strict=True):
            if (known := pid_of.setdefault(name, self._pid_of.get(name, pid))) != pid:
                raise ValueError(f"a name has one identity, and {name} has {known} and {pid}")
        return pids

    def _insert(self, names: list[str], x: Tensor, pids: list[int] | None) -> None:
        with self._lock:
            self._check_width(x)
            pids = self._with_pids(names, pids)
            self._pid_of.update(zip(names, pids, strict=True))
            self._names += names
            self._pids += pids
            self._blocks += [x] if len(x) else []
            self._index = None


class _Index:
    """An unchanging gallery of one image or more, prepared for the search."""

    def __init__(self, names: list[str], descriptors: Tensor, metric: str, faiss: str, device: torch.device) -> None:
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        self.names, self.name_of = list(numbers), np.array([numbers[name] for name in names])  # [M], [G]
        self.pairs = Similarities(descriptors[:0], descriptors.to(device), metric)
        self.faiss, self.total = None, len(names)
        if faiss:  # holds each descriptor once, since equal ones would come in any order: number -> rows that have it
            original = np.arange(len(names))
            original[self.pairs.copies] = self.pairs.originals
            self.rows = original.argsort(kind="stable")
            distinct, self.begins, self.counts = np.unique(original[self.rows], return_index=True, return_counts=True)
            self.faiss, self.total = _faiss_index(self.pairs, distinct, faiss), len(distinct)

    def search(self, query: Tensor, topk: int) -> tuple[list[list[str]], Tensor]:
        """Names and similarities of the hits, ``unknown`` and -inf where there are too few."""
        numbers = np.full((len(query), topk), -1)
        best = np.full((len(query), topk), -np.inf, dtype=np.float32)
        wanted = min(topk, len(self.names))
        k = min(self.total, wanted * math.ceil(len(self.name_of) / len(self.names)) + (self.faiss is not None))
        pending = np.arange(len(query))
        while len(pending):
            missing = []
            for row, values, hits, is_all in self.images(query, pending, k):
                first = np.sort(np.unique(self.name_of[hits], return_index=True)[1])[:topk]
                numbers[row, : len(first)], best[row, : len(first)] = self.name_of[hits[first]], values[first]
                # many images of few names, or faiss may have left out images as similar as the last hit
                if not is_all and (len(first) < wanted or (self.faiss is not None and values[first[-1]] == values[-1])):
                    missing.append(row)
            pending, k = np.array(missing, dtype=np.int64), min(self.total, 4 * k)
        names = [*self.names, UNKNOWN]  # the last one is at -1
        return [[names[i] for i in row] for row in numbers.tolist()], torch.from_numpy(best)

    def images(self, query: Tensor, rows: np.ndarray, k: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, bool]]:
        """Yield each row of the queries, with similarities and rows of its most similar images, and if these are all.

        ``k`` is the number of images; with faiss that of distinct descriptors, of which some indexes find fewer.
        """
        for start, stop in chunks(len(rows), 12 * k, BUDGET_MB, self.pairs.device):
            pairs = self.pairs.with_query(query[rows[start:stop]])
            if self.faiss is None:
                ranking = rank_pairs(pairs, k, BUDGET_MB)
                values, images = ranking.similarities.cpu().numpy(), ranking.indices.cpu().numpy()
                for i, row in enumerate(rows[start:stop].tolist()):
                    yield row, values[i], images[i], k == self.total
            else:
                is_euclidean = pairs.metric == "euclidean"
                x = pairs.query if is_euclidean else pairs.query / pairs.query_norms[:, None]
                values, found = self.faiss.search(x.numpy(), k)
                values = -values if is_euclidean else values
                for i, row in enumerate(rows[start:stop].tolist()):
                    is_hit = found[i] >= 0
                    hits = self._with_copies(values[i][is_hit], found[i][is_hit])
                    yield row, *hits, k == self.total or not is_hit.all()

    def _with_copies(self, values: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and rows of all images of distinct descriptors, equal similarities by row."""
        counts = self.counts[numbers]
        offsets = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        values, images = values.repeat(counts), self.rows[self.begins[numbers].repeat(counts) + offsets]
        order = np.lexsort((images, -values))
        return values[order], images[order]


def _faiss_index(pairs: Similarities, rows: np.ndarray, description: str) -> Any:
    library = require("faiss", "faiss", "faiss")
    is_euclidean = pairs.metric == "euclidean"
    x = (pairs.gallery if is_euclidean else pairs.gallery / pairs.gallery_norms[:, None]).numpy()
    x = x if len(rows) == len(x) else x[rows]
    try:
        index = library.index_factory(
            x.shape[1], description, library.METRIC_L2 if is_euclidean else library.METRIC_INNER_PRODUCT
        )
        index.train(x)
        index.add(x)
    except RuntimeError as e:  # an unknown description, or too few descriptors to train with
        raise ValueError(f"faiss: {description!r}: {str(e).strip().splitlines()[-1]}") from None
    return index


def _as_descriptors(images: Any) -> Tensor | None:
    """Descriptors ``[N, C]`` in a tensor, an array or a list; None if they are images."""
    if isinstance(images, list | tuple) and images:
        if all(isinstance(x, Tensor | np.ndarray) and x.ndim == 1 for x in images):
            images = np.stack([as_tensor(x).float().cpu().numpy() for x in images])
        elif isinstance(images[0], Real | list | tuple):
            images = as_tensor(images)
    if isinstance(images, Tensor):
        is_float = images.is_floating_point()
    else:
        is_float = isinstance(images, np.ndarray) and images.dtype.kind == "f"
    return as_tensor(images)[(None,) * (2 - images.ndim)] if is_float and images.ndim in (1, 2) else None


def _as_pids(pids: ArrayLike | Tensor, count: int) -> list[int]:
    """Identities of ``count`` images."""
    array = np.asarray(pids.cpu() if isinstance(pids, Tensor) else pids)
    array = np.full(count, array) if array.ndim == 0 else array
    if array.shape != (count,) or (count and (array.dtype.kind not in "iu" or (array > MAX_PID).any())):
        raise ValueError(f"pids must be {count} whole numbers, got {array.dtype} {array.shape}")
    return [int(pid) for pid in array]


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a name must be a text that is not empty, got {name!r}")
    if name == UNKNOWN:
        raise ValueError(f"{UNKNOWN!r} stands for hits that are not accepted: choose another name")


def _checksum(content: bytes, descriptors: Tensor) -> str:
    digest = hashlib.sha256(content)
    digest.update(descriptors.numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Content of a file and descriptors ``[G, C]``, as they were written."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata, keys = file.metadata() or {}, set(file.keys())
            if not metadata.get("format", "").startswith(FORMAT.rstrip("1")):
                raise ValueError("it does not begin as one")
            if metadata["format"] != FORMAT:
                raise ValueError(f"it is of the format {metadata['format']!r}, and this version reads {FORMAT!r}")
            if keys != {"descriptors", "json"}:
                raise ValueError(f"it holds {few(sorted(keys), SHOWN)}")
            content = file.get_tensor("json").numpy().tobytes()
            descriptors = file.get_tensor("descriptors").clone()  # else it follows what becomes of the file
        if descriptors.dtype != torch.float32 or descriptors.ndim != 2:
            raise ValueError(f"its descriptors are {descriptors.dtype} {tuple(descriptors.shape)}")
        if metadata.get("sha256") != _checksum(content, descriptors):
            raise ValueError("its checksum does not match")
        values = json.loads(content)
        is_valid = (
            isinstance(values, dict)
            and values.get("metric") in METRICS
            and isinstance(values.get("model", ""), dict | None)
            and all(isinstance(values.get(key), list) for key in ("names", "pids"))
        )
        if not is_valid:
            raise ValueError("its JSON is not that of a gallery")
    except (SafetensorError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged, or no gallery: {' '.join(str(e).split())}") from None
    return values, descriptors


def _check_model(model: dict[str, Any] | None, embed: Embedder, path: Path) -> None:
    """Raise ValueError if the descriptors of a file cannot be compared with those of an Embedder."""
    if model is None:
        raise ValueError(
            f"{path} was saved without a model: load it without one, and add its descriptors to a gallery that has one"
        )
    differing = [key for key, value in embed.fingerprint.items() if model.get(key) != value]
    if differing:
        raise ValueError(
            f"{path} holds descriptors of {model.get('name')}, which cannot be compared with those of {embed.name}: "
            f"they differ in {', '.join(differing)}"
        )
