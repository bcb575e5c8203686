"""Datasets of labelled person images: published layouts, own folders and lists, and generated persons."""

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from passreid_models.data.images import count, list_folder
from passreid_models.data.labels import number_cameras, number_ids, settle
from passreid_models.data.layouts import EXPECTED, SPLITS, Layout, read_flat, read_folder, read_tree, read_unlabelled
from passreid_models.data.tables import read_csv
from passreid_models.runtime import cache_dir, lock, not_found, num_cores
from passreid_models.synthetic.recipe import PREFIX, read_recipe

__all__ = ["ReIDDataset", "Split", "open_dataset", "open_images"]

LISTED = ("CSV", "MSMT17 V1", "MSMT17 V2")
FEW_IDS, MANY_IMAGES = 20, 50  # cameras rather than persons: so few folders of so many images


@dataclass(frozen=True, eq=False)
class Split:
    """N images with their labels."""

    paths: list[Path]
    pids: np.ndarray
    """Identities, int64 ``[N]``: -1 for junk or no label; 0, in a gallery only, for a distractor."""
    camids: np.ndarray
    """Cameras, int64 ``[N]``, from 0; -1 is unknown."""

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: np.ndarray) -> "Split":
        """Split of the given rows, int64 ``[N]``."""
        return Split([self.paths[i] for i in rows], self.pids[rows], self.camids[rows])

    @property
    def num_ids(self) -> int:
        """Number of identities, without junk and distractors."""
        return len(np.unique(self.pids[self.pids > 0]))

    @property
    def num_cameras(self) -> int:
        """Number of known cameras."""
        return len(np.unique(self.camids[self.camids >= 0]))

    @property
    def has_cameras(self) -> bool:
        """Whether all images have a camera, and there are two or more."""
        return self.num_cameras > 1 and bool((self.camids >= 0).all())


@dataclass(frozen=True, eq=False)
class ReIDDataset:
    """Training images, queries and gallery; a split may be empty."""

    name: str
    """``Market-1501``, ``DukeMTMC-reID``, ``VeRi-776``, ``LTCC``, ``RandPerson``, ``MARS``, ``DukeMTMC-VideoReID``,
    ``MSMT17 V1``, ``MSMT17 V2``, ``folder per identity``, ``flat folder``, ``CSV``, ``synthetic`` or
    ``unlabelled folder``."""
    root: Path
    train: Split
    query: Split
    gallery: Split
    has_cameras: bool
    """Whether all queries and gallery images but junk have a camera, and there are two or more. If not, every image but
    the query itself may match."""
    recipe: str = ""
    """Recipe of generated persons; else empty."""
    pid_names: Mapping[int, str] = field(default_factory=dict)
    """Name of each identity by its number, as the data have it."""
    camera_names: Mapping[int, str] = field(default_factory=dict)
    """Name of each camera by its number; empty for the unknown one."""
    parts: tuple[str, str, str] = ("", "", "")
    """Source of each split, such as ``query/``, for messages."""
    repeated: tuple[str, ...] = ()
    """Rows of a list that repeat an image of their split and are left out, such as ``own.csv:9``."""
    alike: tuple[str, ...] = ()
    """Identities that differ only in case, separators or zeros in front, such as ``Anna1 = anna01``."""
    alike_cameras: tuple[str, ...] = ()
    """Cameras that do so."""

    @property
    def splits(self) -> dict[str, Split]:
        """``train``, ``query`` and ``gallery`` by name."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    @property
    def identities(self) -> tuple[str, ...]:
        """Names of the training identities in the order of their numbers, without junk."""
        return tuple(self.pid_names[pid] for pid in np.unique(self.train.pids).tolist() if pid >= 0)

    @cached_property
    def own(self) -> np.ndarray:
        """Row of each query's own file in the gallery, int64 ``[Q]``; -1 if the gallery does not have it.

        Without cameras, which would leave it out, a link counts as the file that it leads to.
        """
        rows = {path: row for row, path in enumerate(self.gallery.paths)}
        own = np.array([rows.get(path, -1) for path in self.query.paths], dtype=np.int64)
        if not self.has_cameras and (own < 0).any():
            files = {_file(path): row for row, path in enumerate(self.gallery.paths)}
            for i in np.flatnonzero(own < 0):
                own[i] = files.get(_file(self.query.paths[i]), -1)
        return own

    @cached_property
    def matches(self) -> np.ndarray:
        """Number of gallery images that match each query, int64 ``[Q]``; 0 for junk."""
        of_pid = Counter(self.gallery.pids.tolist())
        of_camera = Counter(zip(self.gallery.pids.tolist(), self.gallery.camids.tolist(), strict=True))
        own_pids = np.where(self.own >= 0, np.append(self.gallery.pids, -1)[self.own], -1)
        labels = zip(self.query.pids.tolist(), self.query.camids.tolist(), own_pids.tolist(), strict=True)
        excluded = ((pid, of_camera[pid, camid] if self.has_cameras else own == pid) for pid, camid, own in labels)
        return np.array([of_pid[pid] - number if pid > 0 else 0 for pid, number in excluded], dtype=np.int64)

    @cached_property
    def remarks(self) -> dict[str, str]:
        """Doubts about the labels by kind, a sentence each: scores may be of something else than they seem to be."""
        remarks = {}
        for kind, label, names in [
            ("alike", "identities", self.alike),
            ("alike cameras", "cameras", self.alike_cameras),
        ]:
            if names:
                shown = ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
                remarks[kind] = f"two {label} each, though their names are nearly equal: {shown}"
        splits = (("training", self.train), ("gallery", self.gallery)) if self.name == "folder per identity" else ()
        for name, split in splits:
            ids, images = split.num_ids, int((split.pids > 0).sum())
            if 0 < ids <= FEW_IDS and images >= MANY_IMAGES * ids:
                remarks["few identities"] = (
                    f"{ids} identities in {images:,} {name} images: are the folders persons? Scores of folders of "
                    "cameras, days or scenes mean nothing"
                )
        is_listed = self.name in LISTED and not self.is_one_set  # in folders, it is as the layout has it
        if is_listed and (shared := int((self.own >= 0).sum())):
            remarks["queries in the gallery"] = (
                f"{count(shared, 'query is', 'queries are')} in the gallery too; each is left out of its own ranking"
            )
        return remarks

    @property
    def description(self) -> str:
        """One line for the provenance, without the folders above."""
        source = self.recipe or f"{self.name}, {self.parts[0] if self.name == 'CSV' else f'{self.root.name}/'}"
        counts = [
            count(len(self.train), "training image"),
            count(self.train.num_ids, "identity", "identities"),
            count(len(self.query), "query", "queries"),
            count(len(self.gallery), "gallery image"),
            count(len(np.unique(np.concatenate([s.camids[s.camids >= 0] for s in self.splits.values()]))), "camera"),
        ]
        return f"{source}: {counts[0]} of {counts[1]}, {counts[2]}, {', '.join(counts[3:])}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names and labels, or of the recipe, in hexadecimal; the same on every machine."""
        return self._fingerprint(self.train, self.query, self.gallery)

    @cached_property
    def train_fingerprint(self) -> str:
        """Fingerprint of the training images alone."""
        return self._fingerprint(self.train)

    @property
    def is_one_set(self) -> bool:
        """Whether all images of persons in query and gallery are training images too: scores of a model trained on
        them mislead."""
        test = (path for s in (self.query, self.gallery) for path, pid in zip(s.paths, s.pids, strict=True) if pid > 0)
        return bool(len(self.query)) and set(self.train.paths).issuperset(test)

    def _fingerprint(self, *splits: Split) -> str:
        digest = hashlib.sha256((self.recipe or self.name).encode())
        for split in () if self.recipe else splits:
            digest.update(b"\0split\0")
            for path, pid, camid in zip(split.paths, split.pids.tolist(), split.camids.tolist(), strict=True):
                name = self.relative(path)
                digest.update(f"{name}\0{pid}\0{camid}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def relative(self, path: Path) -> str:
        """Path relative to the root, with slashes."""
        root, name = f"{self.root}{os.sep}", str(path)
        return (name.removeprefix(root) if name.startswith(root) else os.path.relpath(name, root)).replace(os.sep, "/")

    def require(self, *splits: str) -> "ReIDDataset":
        """Return the dataset itself if these splits have images.

        Args:
            splits: Any of ``train``, ``query`` and ``gallery``.

        Raises:
            ValueError: If one of them is empty; the message names it and its source.
        """
        for split in splits:
            if not len(self.splits[split]):
                part = self.parts[SPLITS.index(split)]
                where = f"in {part} of {self.root}" if part else f"in {self.root}"
                raise ValueError(f"no {split} images {where} ({self.name}); expected {EXPECTED}")
        return self


def _file(path: Path) -> Any:
    """What tells a file from others, whatever its name."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return path
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def open_dataset(data: str | Path, labelled: bool = True) -> ReIDDataset:
    """List the images of a dataset with their labels; no image is opened.

        open_dataset("Market-1501-v15.09.15")            Market-1501, DukeMTMC-reID
        open_dataset("MSMT17_V1")                        MSMT17, V1 or V2
        open_dataset("VeRi-776"), open_dataset("LTCC")   VeRi-776, LTCC, RandPerson
        open_dataset("MARS")                             MARS and DukeMTMC-VideoReID, frame by frame
        open_dataset("crops/")                           a folder per identity, or names such as 0002_c1s1_000451_03.jpg
        open_dataset("crops.csv")                        columns path,pid,camid,split
        open_dataset("synthetic:ids=200,train_ids=100")  drawn once, into the package's cache

    Numeric identities keep their numbers. -1 is junk. 0 (0000) is a distractor if only the gallery has it; if training
    images or queries have it too, it is an identity like others, and gets the next free number. Labels that are equal
    as numbers, such as 1 and 01, or that look the same are refused in one dataset.

    Args:
        data: A folder in one of these layouts, or one that holds such a folder; a CSV file; or ``synthetic:`` with
            ``ids=``, ``images=``, ``cameras=``, ``seed=``, ``size=``, ``place=``, ``train_ids=``.
        labelled: If False, the identities of a flat folder are ignored, and a folder of images in no known layout is
            accepted too; all of its images are for training, with the cameras that their names have.

    Raises:
        FileNotFoundError: If ``data`` does not exist, or a list of MSMT17 is missing.
        ValueError: If the layout is unknown, or a file does not fit it; the message names the file and the expected
            layout.
    """
    if str(data).startswith(PREFIX):
        return _open_synthetic(str(data))
    path = Path(os.path.abspath(data))
    if not str(data) or not path.exists():
        raise not_found(data, EXPECTED, str(data) or "data")
    if not path.is_dir():
        if path.suffix.lower() != ".csv":
            is_list = path.suffix.lower() in (".tsv", ".tab", ".txt")
            rename = " (a list with commas, semicolons or tabs is read once it is named .csv)" if is_list else ""
            raise ValueError(f"{data}: a dataset cannot come from this kind of file{rename}; expected {EXPECTED}")
        return _dataset(read_csv(path))
    layout = read_folder(path) or _read_child(path)
    if layout is None:
        try:
            layout = _read_persons(path)
        except ValueError:  # images beside folders, or folders of no identities
            if labelled:
                raise
    if layout is None:
        layout = read_flat(path) if labelled else read_unlabelled(path)
    if layout is None or not any(layout.rows.values()):
        table = next((f"; if {p} lists it, name that file" for p in sorted(path.glob("*.csv"))), "")
        raise ValueError(f"{data} holds {_contents(path)}, which is no known layout{table}; expected {EXPECTED}")
    return _dataset(layout)


def open_images(folder: str | Path) -> ReIDDataset:
    """List all images below a folder, whatever its layout: for training, without identities."""
    return _dataset(read_unlabelled(Path(os.path.abspath(folder))))


def _read_persons(root: Path) -> Layout | None:
    """Read a folder per identity, of two identities or more."""
    layout = read_tree(root)
    if layout and len({row.pid for row in layout.rows["gallery"]}) == 1:
        folder = os.path.relpath(layout.rows["gallery"][0].path, root).split(os.sep)[0]
        raise ValueError(
            f"{root}: all images are in one folder, {folder}/, so that all would have one identity; expected a folder "
            "for each identity"
        )
    return layout


def _read_child(root: Path) -> Layout | None:
    """Read the layout one level below, as of an archive that was unpacked into a folder of its own."""
    children = [root / name for name in sorted(list_folder(str(root))[1]) if name[0] != "_"]  # as _old
    for child in children:
        if root.resolve().is_relative_to(child.resolve()):  # a link to a parent
            continue
        if layout := read_folder(child):
            if len(children) > 1:
                raise ValueError(f"{root} holds {layout.name} in {layout.root.name}/ beside other folders: name one")
            return layout
    return None


def _contents(path: Path) -> str:
    names, inside = list_folder(str(path))
    folders, files = [f"{name}/" for name in names if name in inside], [name for name in names if name not in inside]
    first = [*folders[:3], *files[:3]]
    shown = f" ({', '.join(first)}{', ..' if len(first) < len(names) else ''})" if first else ""
    return f"{count(len(folders), 'folder')} and {count(len(files), 'file')}{shown}"


def _dataset(layout: Layout) -> ReIDDataset:
    repeated, alike, alike_cameras = settle(layout)
    rows = [layout.rows[split] for split in SPLITS]
    pids = number_ids([[row.pid for row in split] for split in rows])
    camids = number_cameras([[row.camid for row in split] for split in rows])
    train, query, gallery = (
        Split([Path(row.path) for row in split], p, c) for split, p, c in zip(rows, pids, camids, strict=True)
    )
    every = [row for split in rows for row in split]
    ranked = (query, gallery) if len(query) and len(gallery) else (train, query, gallery)
    test_camids = np.concatenate([split.camids[split.pids != -1] for split in ranked])
    return ReIDDataset(
        name=layout.name,
        root=layout.root,
        train=train,
        query=query,
        gallery=gallery,
        has_cameras=bool((test_camids >= 0).all() and len(np.unique(test_camids)) > 1),
        pid_names=dict(zip(np.concatenate(pids).tolist(), (row.pid for row in every), strict=True)),
        camera_names=dict(zip(np.concatenate(camids).tolist(), (row.camid for row in every), strict=True)),
        parts=(layout.parts.get("train", ""), layout.parts.get("query", ""), layout.parts.get("gallery", "")),
        repeated=tuple(repeated),
        alike=tuple(alike),
        alike_cameras=tuple(alike_cameras),
    )


def _open_synthetic(text: str) -> ReIDDataset:
    """Open persons of the generator; draw them into the cache if they are not there."""
    recipe = read_recipe(text, splits=True)
    sources = [path.read_bytes() for path in sorted(Path(__file__).parents[1].joinpath("synthetic").glob("*.py"))]
    key = hashlib.sha256(recipe.text.encode() + b"".join(sources)).hexdigest()[:16]
    root = cache_dir() / "synthetic" / key
    start_method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    workers = num_cores() if start_method == "fork" else 0  # others run the script again, which waits for the lock
    with lock(root):
        layout = read_folder(root) if root.is_dir() else None
        if layout is None or sum(map(len, layout.rows.values())) < len(recipe.persons):
            try:
                recipe.persons.write_market1501(root, recipe.train_ids, workers=workers)
            except ValueError as e:
                raise ValueError(f"{text}: {e}") from None
            layout = read_folder(root)
    assert layout is not None  # it was just written
    return replace(_dataset(layout), name="synthetic", recipe=recipe.text)
