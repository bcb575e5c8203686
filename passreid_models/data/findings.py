"""Errors and remarks on the labels of a dataset, and on its files."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from passreid_models.data.datasets import ReIDDataset, Split
from passreid_models.data.images import UNREAD_SUFFIXES, count, open_image, read_file, reason, walk
from passreid_models.data.layouts import VIDEOS
from passreid_models.runtime import few, map_threads, printable

__all__ = ["PUBLISHED", "PUBLISHED_JUNK", "Finding", "file_findings", "label_findings"]

_MSMT17 = {"train": (32_621, 1_041, 15), "query": (11_659, 3_060, 15), "gallery": (82_161, 3_060, 15)}
PUBLISHED = {  # images, identities without junk and distractors, cameras
    "Market-1501": {"train": (12_936, 751, 6), "query": (3_368, 750, 6), "gallery": (19_732, 750, 6)},
    "DukeMTMC-reID": {"train": (16_522, 702, 8), "query": (2_228, 702, 8), "gallery": (17_661, 1_110, 8)},
    "MSMT17 V1": _MSMT17,
    "MSMT17 V2": _MSMT17,
}
PUBLISHED_JUNK = {"Market-1501": (3_819, 2_798)}  # junk (-1) and distractors (0000) of the gallery
SHOWN = 3  # names in a finding's line


@dataclass(frozen=True)
class Finding:
    """Result of a rule: an ``error`` or a ``remark``."""

    level: str
    kind: str
    message: str
    files: list[str] = field(default_factory=list)
    """All files that it is about, relative to the dataset's folder."""

    def __str__(self) -> str:
        names = few(self.files, SHOWN)
        return printable(f"{self.level}: {self.message}{f': {names}' if names else ''}")


def label_findings(dataset: ReIDDataset) -> Iterator[Finding]:
    """Findings on identities, cameras and numbers of images."""
    for rule in (_missing, _unread, _rows, _identities, _cameras, _matches, _counts):
        yield from rule(dataset)


def _missing(dataset: ReIDDataset) -> Iterator[Finding]:
    """Splits without images."""
    for (name, split), part in zip(dataset.splits.items(), dataset.parts, strict=True):
        if not len(split):
            use = "training" if name == "train" else "evaluation"
            level = "error" if dataset.name in PUBLISHED else "remark"
            where = f"{part} is missing or has no images" if part else "there are none"
            yield Finding(level, "missing split", f"no {name} images, so no {use}: {where}")


def _unread(dataset: ReIDDataset) -> Iterator[Finding]:
    """Images of other suffixes in the folder."""
    if dataset.root.is_dir() and dataset.name != "CSV":
        parts = [part for part in dict.fromkeys(dataset.parts) if part.endswith("/") and (dataset.root / part).is_dir()]
        names: list[str] = []
        for folder in parts or [""]:  # what lies beside them is not of the dataset
            with suppress(OSError):
                names += [folder + name for name, status in walk(str(dataset.root / folder)) if status is None]
        if files := [name for name in names if name.lower().endswith(UNREAD_SUFFIXES)]:
            suffixes = " ".join(sorted({Path(name).suffix.lower() for name in files}))
            message = f"{count(len(files), 'file')} left out, since images of {suffixes} are not read: convert them"
            yield Finding("remark", "other suffixes", message, files)


def _rows(dataset: ReIDDataset) -> Iterator[Finding]:
    """Labels in doubt, and repeated rows."""
    for kind, message in dataset.remarks.items():
        yield Finding("remark", kind, message)
    if lines := list(dataset.repeated):
        message = f"{count(len(lines), 'repeated row')} of an image in a split, left out"
        yield Finding("remark", "repeated rows", message, lines)


def _identities(dataset: ReIDDataset) -> Iterator[Finding]:
    train = dataset.train
    pids, counts = np.unique(train.pids[train.pids > 0], return_counts=True)
    if len(single := pids[counts == 1]):
        files = _names(dataset, train, np.isin(train.pids, single))
        message = f"{count(len(single), 'training identity', 'training identities')} with one image, too few for the "
        yield Finding("remark", "single images", message + "triplet loss, which takes two", files)
    for name, split in (("training", train), ("query", dataset.query)):
        if (junk := split.pids == -1).any():
            message = f"{count(int(junk.sum()), f'{name} image')} marked as junk (-1), of no use there"
            yield Finding("remark", "junk", message, _names(dataset, split, junk))
    test_pids = np.unique(np.concatenate([dataset.query.pids, dataset.gallery.pids]))
    shared_pids = np.intersect1d(pids, test_pids[test_pids > 0])
    shared_paths = set(train.paths) & {*dataset.query.paths, *dataset.gallery.paths}
    if dataset.is_one_set:
        message = f"{count(len(shared_paths), 'image')} both in training and test: scores of a model that was trained"
        yield Finding("remark", "one set", f"{message} on them are not valid")
        return
    disjoint = "both in training and test, which should be disjoint"
    if shared_paths:
        files = [dataset.relative(path) for path in train.paths if path in shared_paths]
        yield Finding("error", "shared images", f"{count(len(files), 'image')} {disjoint}", files)
    if len(shared_pids) and not dataset.name.startswith("MSMT17"):  # both of its sets count from 0
        message = f"{count(len(shared_pids), 'identity', 'identities')} {disjoint}"
        yield Finding("error", "shared identities", message, _names(dataset, train, np.isin(train.pids, shared_pids)))


def _cameras(dataset: ReIDDataset) -> Iterator[Finding]:
    splits = [split.take(np.flatnonzero(split.pids != -1)) for split in dataset.splits.values()]
    known = np.concatenate([split.camids for split in splits]) >= 0
    train, training = dataset.train, "training does not use cameras"
    mode = "evaluation leaves out only the query itself" + ("" if train.has_cameras else f", and {training}")
    if dataset.has_cameras:
        if files := _names(dataset, train, train.camids < 0):
            message = f"{count(len(files), 'training image')} without a camera: {training}"
            yield Finding("remark", "some cameras", message, files)
    elif not known.any():
        yield Finding("remark", "no cameras", f"no cameras are known: {mode}")
    elif not known.all():
        files = [name for split in splits for name in _names(dataset, split, split.camids < 0)]
        message = f"{count(len(set(files)), 'image')} without a camera: {mode}"
        yield Finding("remark", "some cameras", message, list(dict.fromkeys(files)))
    else:
        yield Finding("remark", "one camera", f"one camera only: {mode}")


def _matches(dataset: ReIDDataset) -> Iterator[Finding]:
    """Queries that no gallery image can match."""
    query, unmatched = dataset.query, (dataset.matches < 1) & (dataset.query.pids > 0)
    if len(dataset.gallery) and unmatched.any():
        is_every_query = not dataset.matches.any()
        where = "in the gallery under another camera" if dataset.has_cameras else "in the gallery"
        message = f"{count(int(unmatched.sum()), 'query', 'queries')} of {len(query):,} without a match {where}"
        message += ", so there is nothing to evaluate" if is_every_query else ", which do not count"
        level = "error" if is_every_query else "remark"
        yield Finding(level, "no match", message, _names(dataset, query, unmatched))


def _counts(dataset: ReIDDataset) -> Iterator[Finding]:
    if dataset.name in VIDEOS:
        message = f"{dataset.name} is read frame by frame; its published scores are of tracklets, so compare with none"
        yield Finding("remark", "frames", message)
    if dataset.name == "LTCC":
        message = (
            "LTCC's scores are of its standard setting; the cloth-changing one leaves out matches in equal clothes"
        )
        yield Finding("remark", "clothes", message)
    for name, published in PUBLISHED.get(dataset.name, {}).items():
        split = dataset.splits[name]
        images, ids = len(split), split.num_ids
        if images and (images, ids) != published[:2]:
            message = f"{name} has {images:,} images of {ids:,} identities, the published {dataset.name} has "
            message += f"{published[0]:,} of {published[1]:,}: expected only if this is another dataset"
            yield Finding("remark", "counts", message)


def file_findings(dataset: ReIDDataset, progress: bool) -> Iterator[Finding]:
    """Findings on images that cannot be read, and on duplicates; every image is opened."""
    paths = list(dict.fromkeys(path for split in dataset.splits.values() for path in split.paths))
    disable = None if progress else True
    bar = tqdm(map_threads(_hash, paths), total=len(paths), unit="img", delay=3, disable=disable)
    hashes = dict(zip(paths, bar, strict=True))
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, (_, failure) in hashes.items():
        if failure:
            reasons[failure].append(dataset.relative(path))
    for failure, files in reasons.items():
        yield Finding("error", "unreadable", f"{count(len(files), 'image')} cannot be read, {failure}", files)
    yield from _duplicates(dataset, {path: digest for path, (digest, _) in hashes.items() if digest})


def _duplicates(dataset: ReIDDataset, digests: dict[Path, str]) -> Iterator[Finding]:
    """Findings on files of equal content, by their effect on the scores."""
    labels: dict[Path, tuple[int, int, str]] = {}  # identity, camera, the splits as letters
    groups: dict[str, list[Path]] = defaultdict(list)
    query, gallery, own = dataset.query, dataset.gallery, dataset.own
    left_out = [i for i in np.flatnonzero(own >= 0) if query.pids[i] == gallery.pids[own[i]]]
    linked = {query.paths[i]: gallery.paths[own[i]] for i in left_out}  # of one file, which is no copy of itself
    for name, split in dataset.splits.items():
        paths = [linked.get(path, path) for path in split.paths] if name == "query" else split.paths
        for path, pid, camid in zip(paths, split.pids.tolist(), split.camids.tolist(), strict=True):
            labels[path] = (pid, camid, labels[path][2] + name[0] if path in labels else name[0])
    for path, digest in digests.items():
        if path in labels:
            groups[digest].append(path)
    kinds: dict[str, list[str]] = defaultdict(list)
    for group in groups.values():
        if len(group) > 1:
            names = " = ".join(dataset.relative(path) for path in group)
            kinds[_kind([labels[path] for path in group], dataset.has_cameras)].append(names)
    meanings = {
        "leak": ("error", "copies of training images are in the test set, which should be disjoint"),
        "copy": ("error", "copies of queries are in the gallery and count as matches"),
        "labels": ("error", "copies have different identities"),
        "counted": ("remark", "copies in the test set may count as further queries, hits or distractors"),
        "repeated": ("remark", "this does not change the scores"),
    }
    for kind, (level, meaning) in meanings.items():
        if files := kinds.get(kind):
            yield Finding(
                level, f"duplicates: {kind}", f"{count(len(files), 'image')} more than once: {meaning}", files
            )


def _kind(labels: list[tuple[int, int, str]], has_cameras: bool) -> str:
    copies = [set(splits) for _, _, splits in labels]
    in_train, in_test = any("t" in splits for splits in copies), any(splits & {"q", "g"} for splits in copies)
    if in_train and in_test and not any("t" in splits and splits & {"q", "g"} for splits in copies):
        return "leak"
    if len({pid for pid, _, _ in labels if pid >= 0}) > 1:
        return "labels"
    queries = {camid for pid, camid, splits in labels if "q" in splits and pid > 0}
    gallery = [camid for pid, camid, splits in labels if "g" in splits and pid > 0]
    if queries and gallery and (not has_cameras or any(camid not in queries or len(queries) > 1 for camid in gallery)):
        return "copy"
    return "counted" if sum(pid >= 0 and splits != "t" for pid, _, splits in labels) > 1 else "repeated"


def _hash(path: Path) -> tuple[str, str]:
    """SHA-256 of an image file, and the reason why it cannot be read; one of the two is empty."""
    try:
        content = read_file(path)
        open_image(content)
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, struct.error ...
        return "", reason(e)
    return hashlib.sha256(content).hexdigest(), ""


def _names(dataset: ReIDDataset, split: Split, mask: np.ndarray) -> list[str]:
    return [dataset.relative(split.paths[i]) for i in np.flatnonzero(mask)]
