"""Layouts of re-ID datasets: readers of image paths, identities and cameras. No image is opened.

market/bounding_box_train|query|bounding_box_test/0002_c1s1_000451_03.jpg     Market-1501; -1_ junk, 0000_ distractor
duke/bounding_box_train|query|bounding_box_test/0001_c2_f0046182.jpg          DukeMTMC-reID
veri/image_train|image_query|image_test/0001_c001_00016450_0.jpg              VeRi-776
ltcc/train|query|test/001_1_c1_015833.png                                     LTCC: identity, clothes, camera
randperson/00003_s01_c02_f000123.jpg                                          RandPerson: cameras count in each scene
mars/bbox_train|bbox_test/0006/0006C1T0001F001.jpg                            MARS; 00-1 junk, 0000 distractor
duke-video/train|query|gallery/0001/0001/0001_C6_F0044_X2.jpg                 DukeMTMC-VideoReID
msmt/list_train|val|query|gallery.txt with train/ and test/                   MSMT17 V1
                                      with mask_train_v2/ and mask_test_v2/   MSMT17 V2
own/train|query|gallery/ID/*.jpg      also train_all and test                 folder per identity
own/ID/*.jpg                          every image is train, query and gallery
own/0002_c1s1_000451_03.jpg           the same without folders, by names as above; also in train|query|gallery/
own.csv                               path,pid,camid,split
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from passreid_models.data.folder_names import is_split, refuse_other_folders, refuse_other_sets
from passreid_models.data.images import image_names, is_image_name, list_folder
from passreid_models.runtime import read_bytes
from passreid_models.synthetic.dataset import MARKER

__all__ = ["EXPECTED", "SPLITS", "Layout", "Row", "read_flat", "read_folder", "read_tree", "read_unlabelled"]

EXPECTED = (
    "Market-1501 or DukeMTMC-reID (bounding_box_train/, query/ and bounding_box_test/ with names such as "
    "0002_c1s1_000451_03.jpg), VeRi-776 (the same in image_train/, image_query/ and image_test/), MSMT17 "
    "(list_train.txt, list_val.txt, list_query.txt and list_gallery.txt beside train/ and test/ or mask_train_v2/ and "
    "mask_test_v2/), a folder per identity (DIR/ID/*.jpg, or ID folders in DIR/train, DIR/query and DIR/gallery), a "
    "flat folder (DIR/0002_c1s1_000451_03.jpg), a CSV file with the columns path,pid,camid,split, or synthetic:ids=200"
)
MARKER_3D = "synthetic3d.json"
"""File in a folder of ``passreid_synth3d`` that records how its persons were drawn."""
MAX_LIST_BYTES = 2**28  # of a table or list: four million lines
SPLITS = ("train", "query", "gallery")
MARKET = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
VERI = {"train": "image_train", "query": "image_query", "gallery": "image_test"}
FOLDERS = {"train": ("train_all", "train", MARKET["train"], "bbox_train"), "query": ("query",),
           "gallery": ("gallery", "test", MARKET["gallery"], "bbox_test")}  # fmt: skip
PARTS_OF_TRAIN_ALL = {"train", "val", "multi-query"}
"""Folders beside ``train_all/`` that scripts for Market-1501 write and evaluation does not use."""
LISTS = {"train": ("list_train.txt", "list_val.txt"), "query": ("list_query.txt",), "gallery": ("list_gallery.txt",)}
VERSIONS = {"MSMT17 V1": ("train", "test"), "MSMT17 V2": ("mask_train_v2", "mask_test_v2")}
MARKET_NAME = re.compile(r"(?P<pid>-1|\d+)_(?:\d+_|s(?P<scene>\d+)_)?c(?P<camera>\d+)(?!\d)")
DUKE_NAME = re.compile(r"\d+_c\d+_f\d+")
LTCC_NAME = re.compile(r"\d{3}_\d+_c\d+_\d+")
RANDPERSON_NAME = re.compile(r"\d+_s\d+_c\d+_f\d+")
MSMT_NAME = re.compile(r"\d+_\d+_\d+_\d{4}\D+_\d+_\d+")
PID_NAME = re.compile(
    r"(-1|\d+)_(c\d+s\d+_\d+_\d|c\d+_f\d|c\d{3}_\d{8}_\d|s\d+_c\d+_f\d|\d+_c\d+_\d{4}|\d+_\d+_\d{4}\D+_\d+_\d)"
)
"""Names of images in public sets, which begin with the identity; frame and camera, as in 000451_c1.jpg, are none."""
VIDEOS = {
    "MARS": re.compile(r"(\d{4}|00-1)C(\d)T\d{4}F\d{3,}\."),
    "DukeMTMC-VideoReID": re.compile(r"(\d{4})_C(\d+)_F\d+_X\d+\."),
}
"""Names of frames, with identity and camera."""
CAMERAS = (
    *VIDEOS.values(),
    re.compile(r"(.*?[_-])?[cC](\d+)(?=[sS]\d|[_.-])"),  # 0002_c1s1_000451_03.jpg
    re.compile(r"(\d+)_\d+_(\d+)_\d{4}\D+_\d+_\d+"),  # MSMT17
)


class Row(NamedTuple):
    """An image with its labels as text."""

    path: str
    pid: str
    """Identity: -1 is junk."""
    camid: str = ""
    """Camera: blank is unknown."""
    line: str = ""
    """Line of a list, such as ``own.csv:9``."""


@dataclass
class Layout:
    """Rows of a dataset on the disk; paths are absolute."""

    name: str
    root: Path
    rows: dict[str, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    parts: dict[str, str] = field(default_factory=dict)
    """Source of each split, such as ``query/``."""


def read_folder(root: Path) -> Layout | None:
    """Read the layout of a folder of several splits; None if it is no such folder.

    Raises:
        ValueError: If a file does not fit the layout that the folder has.
        FileNotFoundError: If list files of MSMT17 are missing.
    """
    names, folders = list_folder(str(root))
    files = set(names) - folders
    named = (root / name for name in sorted(files) if is_split(name) and not os.path.splitext(name)[1])
    if lost := [path for path in named if path.is_symlink() and not path.exists()]:
        raise ValueError(f"{lost[0]}: a link to no folder that can be read; mount it, or remove the link")
    lists = [name for names in LISTS.values() for name in names]
    if files & set(lists) or folders & set(VERSIONS["MSMT17 V2"]) or _is_msmt17(root, folders):
        return _read_msmt17(root, folders, [name for name in lists if name not in files])
    spelled = {name.lower(): name for name in sorted(folders)}  # Train/ is train/
    own = {split: spelled.get(split, split) for split in SPLITS}
    if "train_all" in spelled and _images_in(root / spelled["train_all"]):
        own["train"] = spelled["train_all"]
    if "gallery" not in spelled:
        own["gallery"] = spelled.get("test", "test")
    is_own = folders & {own["train"], own["gallery"]} and not spelled.keys() & {MARKET["train"], MARKET["gallery"]}
    in_own = (name for folder in own.values() if folder in folders for name in _images_in(root / folder))
    if is_own and any(map(MARKET_NAME.match, in_own)):
        _refuse_unread_splits(root, folders, set(own.values()))
        return _read_market("flat folder", root, folders, own)
    for layout, public in (("Market-1501", MARKET), ("VeRi-776", VERI)):
        parts = {split: spelled.get(name, name) for split, name in public.items()}
        if any(_images_in(root / name) for name in folders & set(parts.values())):
            return _read_market(layout, root, folders, parts)
    own_folders = (spelled[name] for names in FOLDERS.values() for name in names if name in spelled)
    if any(list_folder(str(root / name))[1] for name in own_folders):
        return _read_split_folders(root, folders, spelled)
    return None


def read_tree(root: Path) -> Layout | None:
    """Read a folder that holds a folder of images for each identity; None if it has no image in them.

    Raises:
        ValueError: If images lie beside the folders of identities, or deeper, or are named as those of other
            identities, or folders are named as those of splits, sets, cameras, days or places, or of a public set with
            other folders.
    """
    expected = f"expected {root.name}/ID/*.jpg, with an ID of any text"
    names = list(image_names(str(root)))
    folders = {name.partition("/")[0]: name for name in reversed(names) if "/" in name}
    refuse_other_sets(root, reversed(folders.values()))
    refuse_other_folders(root, list(reversed(folders)))
    rows: list[Row] = []
    stray = ""
    for name in names:
        identity, _, image = name.rpartition("/")
        video = next((frame for pattern in VIDEOS.values() if (frame := pattern.match(image))), None)
        if "/" in identity and video and identity.partition("/")[0] == video[1]:  # ID/TRACKLET/FRAME
            identity = video[1]
        if "/" in identity:
            raise ValueError(f"{root / name}: an image below the folder of an identity; {expected}")
        if identity:
            pid = "-1" if video and identity == "00-1" else identity
            rows.append(Row(os.path.join(root, name), pid, _camera(image)))
        else:
            stray = stray or name
    if rows and stray:
        raise ValueError(f"{root / stray}: an image beside the folders of identities; {expected}")
    _refuse_other_identities(root, rows)
    return _one_set("folder per identity", root, rows) if rows else None


def _refuse_other_identities(root: Path, rows: list[Row]) -> None:
    """Refuse images whose names, as those of public sets, tell other identities than their folders.

    A folder of a number has images of that number; one of another name has images of one number, which no other has.
    Junk and distractors may have any.

    Raises:
        ValueError: If there is one.
    """
    firsts: dict[str | int, tuple[Row, int]] = {}  # by folder, and by the identity in the name
    for row in rows:
        image = os.path.basename(row.path)
        match = next((m for pattern in (PID_NAME, *VIDEOS.values()) if (m := pattern.match(image))), None)
        if match is None or row.pid.strip("0") in ("", "-1"):
            continue
        pid = int(match[1]) if match[1] != "00-1" else -1
        other = ""
        if row.pid.isdecimal():
            is_other = pid != int(row.pid)
        else:
            known = [firsts.setdefault(key, (row, pid)) for key in (row.pid, pid)]
            first = next((first for first in known if (first[0].pid, first[1]) != (row.pid, pid)), None)
            is_other = first is not None
            other = f", and that of {Path(first[0].path).relative_to(root)} identity {first[1]}" if first else ""
        if is_other:
            raise ValueError(
                f"{row.path}: the name tells identity {pid}{other}, but the folder is {row.pid}/; expected a folder "
                f"for each identity, {root.name}/ID/*.jpg, or all images in one folder, which takes their identities "
                "from the names"
            )


def read_flat(root: Path) -> Layout | None:
    """Read a folder of images with identity and camera in their names; None if no name has them.

    If there is junk, as in Market-1501's ``bounding_box_test``, images of 0000 are distractors: in the gallery alone.

    Raises:
        ValueError: If only some names have them.
    """
    if not any(map(MARKET_NAME.match, _images_in(root))):
        return None
    rows = _market_rows(root)
    is_randperson = all(RANDPERSON_NAME.match(os.path.basename(row.path)) for row in rows)
    return _one_set("RandPerson" if is_randperson else "flat folder", root, rows)


def read_unlabelled(root: Path) -> Layout:
    """Read all images below a folder for training, without identities; with cameras where their names have them."""
    rows = [Row(os.path.join(root, name), "-1", _camera(os.path.basename(name))) for name in image_names(str(root))]
    return Layout("unlabelled folder", root, {"train": rows, "query": [], "gallery": []})


def _one_set(name: str, root: Path, rows: list[Row]) -> Layout:
    """Layout whose images are all training images, queries and gallery; without junk and distractors as queries."""
    has_junk = any(row.pid == "-1" for row in rows)
    train = [row for row in rows if row.pid.strip("0") or not has_junk]  # 0000 are distractors beside junk
    query = [row for row in train if row.pid != "-1"]
    return Layout(name, root, {"train": train, "query": query, "gallery": rows})


def _read_market(name: str, root: Path, folders: set[str], parts: dict[str, str]) -> Layout:
    _refuse_mixture(root, folders & set(parts.values()))
    layout = Layout(name, root, parts={split: f"{folder}/" for split, folder in parts.items()})
    for split, folder in parts.items():
        if folder in folders:
            layout.rows[split] = _market_rows(root / folder)
    names = [os.path.basename(row.path) for rows in layout.rows.values() for row in rows]
    if name == "Market-1501" and all(map(DUKE_NAME.match, names)):
        layout.name = "DukeMTMC-reID"
    elif all(map(LTCC_NAME.match, names)):
        layout.name = "LTCC"
    if (root / MARKER).is_file():
        layout.name = "synthetic"
    elif (root / MARKER_3D).is_file():
        layout.name = _name_3d(root / MARKER_3D)
    return layout


def _name_3d(marker: Path) -> str:
    """Name of a set of 3-D persons, with what tells its images from those of another drawing."""
    try:
        recipe = json.loads(read_bytes(marker, MAX_LIST_BYTES))
        return f"synthetic 3-D (generator {int(recipe.get('generator', 1))}, seed {int(recipe['seed'])})"
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return "synthetic 3-D"


def _market_rows(folder: Path) -> list[Row]:
    """Rows of the images in a folder, whose names begin with identity and camera."""
    rows = []
    for name in _images_in(folder):
        labels = MARKET_NAME.match(name)
        if labels is None:
            refuse_other_sets(folder.parent, [f"{folder.name}/{name}"])
            raise ValueError(
                f"{folder / name}: the name shows no identity and camera; expected PPPP_cC in front, such as "
                "0002_c1s1_000451_03.jpg (Market-1501) or 0001_c2_f0046182.jpg (DukeMTMC-reID)"
            )
        rows.append(Row(os.path.join(folder, name), str(int(labels["pid"])), _market_camera(labels)))
    return rows


def _is_msmt17(root: Path, folders: set[str]) -> bool:
    """Whether train/ or test/ has names of MSMT17; for a folder without its lists."""
    for folder in sorted(folders & set(VERSIONS["MSMT17 V1"])):
        first = next(image_names(str(root / folder)), "")
        if MSMT_NAME.match(os.path.basename(first)):
            return True
    return False


def _read_msmt17(root: Path, folders: set[str], missing: list[str]) -> Layout:
    version = _msmt17_version(root, folders)
    if len(missing) == 4 or ("list_train.txt" in missing) != ("list_val.txt" in missing):
        raise FileNotFoundError(
            f"{root / missing[0]} is not there; expected the lists of {version}: list_train.txt and list_val.txt (both "
            "are its training set), list_query.txt and list_gallery.txt"
        )
    layout = Layout(version, root)
    train, test = VERSIONS[version]
    for split, names in LISTS.items():
        folder = root / (train if split == "train" else test)
        layout.parts[split] = " + ".join(names)
        for name in names:
            if name not in missing:
                layout.rows[split] += _read_list(root / name, folder)
    return layout


def _msmt17_version(root: Path, folders: set[str]) -> str:
    """``MSMT17 V1`` or ``MSMT17 V2``, by the folders of images.

    Raises:
        ValueError: If there are folders of both, or of none.
    """
    present = {name: [f"{f}/" for f in pair if f in folders] for name, pair in VERSIONS.items() if folders & set(pair)}
    if len(present) == 1:
        return next(iter(present))
    pairs = " or ".join(f"{a}/ and {b}/ ({name[-2:]})" for name, (a, b) in VERSIONS.items())
    if not present:
        raise ValueError(f"{root}: lists of MSMT17, and no images; expected {pairs}")
    held = " and ".join(f"{', '.join(f)} of {name[-2:]}" for name, f in present.items())
    raise ValueError(
        f"{root} mixes MSMT17 V1 and V2, which give different numbers: it holds {held}; expected {pairs}: keep one"
    )


def _read_list(file: Path, folder: Path) -> Iterator[Row]:
    """Rows of a list of MSMT17, whose identities count from 0; here from 1, since 0 would be a distractor."""
    text = read_bytes(file, MAX_LIST_BYTES).decode("utf-8-sig", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        path, _, pid = line.strip().rpartition(" ")
        camera = path.rpartition("/")[2].split("_")[2:3]
        if not pid.isdecimal() or not path or not camera or not camera[0].isdecimal():
            raise ValueError(
                f"{file}:{number}: {line.strip()!r}; expected a path, whose name has the camera as the third _ field, "
                "and an identity, such as 0000/0000_000_01_0303morning_0008_0.jpg 0"
            )
        line_name = f"{file.name}:{number}"
        yield Row(os.path.join(folder, path.strip()), str(int(pid) + 1), str(int(camera[0])), line_name)


def _refuse_unread_splits(root: Path, folders: set[str], read: set[str]) -> None:
    """Refuse folders of images that are named as splits and would be left out.

    Raises:
        ValueError: If there is one.
    """
    known = read | (PARTS_OF_TRAIN_ALL if any(name.lower() == "train_all" for name in read) else set())
    unread = [name for name in sorted(folders - known) if is_split(name) and next(image_names(str(root / name)), "")]
    if unread:
        shown = ", ".join(f"{name}/" for name in unread)
        beside = " and ".join(f"{name}/" for name in sorted(read & folders))
        raise ValueError(
            f"{root}: {shown} beside {beside} would be left out; expected one folder for each split: train/ (or "
            "train_all/) for training, query/, and gallery/ (or test/): rename, merge or move the others"
        )


def _refuse_mixture(root: Path, splits: set[str]) -> None:
    """Refuse folders of splits with images directly in them and images in folders below: one of the two would be lost.

    Raises:
        ValueError: If there are both, in one split or in two.
    """
    names = (f"{split}/{name}" for split in sorted(splits) for name in image_names(str(root / split)))
    examples = {name.count("/") > 1: name for name in names}
    if len(examples) == 2:
        raise ValueError(
            f"{root}: {examples[True]} lies in a folder of its split, and {examples[False]} in none; expected one of "
            "the two: train/ID/*.jpg, or train/0002_c1s1_000451_03.jpg without folders: arrange all alike, or move "
            "those that are not of this dataset out of the folder"
        )


def _read_split_folders(root: Path, folders: set[str], spelled: dict[str, str]) -> Layout:
    layout = Layout("folder per identity", root)
    read = {split: next((spelled[n] for n in names if n in spelled), None) for split, names in FOLDERS.items()}
    names = {name for name in read.values() if name}
    _refuse_unread_splits(root, folders, names)
    _refuse_mixture(root, names)
    for split, name in read.items():
        layout.parts[split] = f"{name or split}/"
        tree = read_tree(root / name) if name else None
        if tree:
            layout.rows[split] = tree.rows["gallery"]
    if not read["query"] and tree:  # every image of the gallery is a query
        layout.rows["query"] = tree.rows["query"]
    for video, frame in VIDEOS.items():
        if all(frame.match(os.path.basename(row.path)) for rows in layout.rows.values() for row in rows):
            layout.name = video
    return layout


def _market_camera(name: re.Match[str]) -> str:
    scene = f"s{int(name['scene'])}c" if name["scene"] else ""
    return f"{scene}{int(name['camera'])}"


def _camera(name: str) -> str:
    if market := MARKET_NAME.match(name):
        return _market_camera(market)
    camera = next((match for pattern in CAMERAS if (match := pattern.match(name))), None)
    return str(int(camera[2])) if camera else ""


def _images_in(folder: Path) -> list[str]:
    """Names of the images directly in a folder, sorted."""
    names, folders = list_folder(str(folder))
    return [name for name in names if name not in folders and is_image_name(name)]
