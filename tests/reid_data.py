"""Tiny datasets in every layout, for tests."""

import os
from collections.abc import Iterable
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from passreid_models.data.datasets import ReIDDataset, Split
from passreid_models.synthetic import SyntheticPersons

MARKET = (
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0002_c2s1_000776_01.jpg",
    "bounding_box_train/0007_c3s3_077419_03.jpg",
    "bounding_box_train/0007_c2s3_071002_01.jpg",
    "query/0001_c1s1_001051_00.jpg",
    "query/0003_c6s3_076542_00.jpg",
    "bounding_box_test/-1_c3s2_079637_00.jpg",
    "bounding_box_test/0000_c1s1_000151_01.jpg",
    "bounding_box_test/0000_c2s1_000151_02.jpg",
    "bounding_box_test/0001_c2s1_001976_01.jpg",
    "bounding_box_test/0003_c5s3_074937_01.jpg",
    "bounding_box_test/0003_c6s3_076467_01.jpg",
)
MSMT_TRAIN = ("0000/0000_000_01_0303morning_0008_0{}.jpg", "0000/0000_001_05_0303noon_0015_0{}.jpg")
MSMT_VAL = ("0001/0001_000_14_0113afternoon_0112_1{}.jpg",)
MSMT_QUERY = ("0000/0000_000_01_0113afternoon_1224_0{}.jpg",)
MSMT_GALLERY = ("0000/0000_001_02_0113noon_1224_0{}.jpg", "0001/0001_000_15_0302morning_0112_1{}.jpg")


@cache
def jpeg(pid: int, camid: int = 0, k: int = 0) -> bytes:
    """A person of 64x32 pixels; another one for other numbers."""
    from passreid_models.synthetic import draw

    file = BytesIO()
    draw(0, pid, camid, k, (64, 32)).save(file, "JPEG")
    return file.getvalue()


def write(root: Path, names: Iterable[str], first: int = 0) -> Path:
    """Images of these names, no two alike; the first is that of person ``first``."""
    for i, name in enumerate(names, first):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(i))
    return root


def write_msmt17(root: Path, version: int = 1) -> Path:
    train, test, end = ("train", "test", "") if version == 1 else ("mask_train_v2", "mask_test_v2", "_ex")
    lists = {"train": MSMT_TRAIN, "val": MSMT_VAL, "query": MSMT_QUERY, "gallery": MSMT_GALLERY}
    names = []
    for name, patterns in lists.items():
        files = [pattern.format(end) for pattern in patterns]
        names += [f"{train if name in ('train', 'val') else test}/{file}" for file in files]
        (root / f"list_{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (root / f"list_{name}.txt").write_text("".join(f"{file} {int(file[:4])}\n" for file in files))
    return write(root, names)


def write_csv(file: Path, lines: Iterable[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


def write_persons(root: Path) -> Path:
    """Generated persons of 64x32 pixels under 4 cameras in the Market-1501 layout, half of them for training."""
    persons = SyntheticPersons(8, images_per_id=8, cameras=4, size=(64, 32))
    return persons.write_market1501(root, distractors=3)


def write_flat(root: Path, ids: int = 4, images: int = 3) -> Path:
    """A folder per identity, without cameras."""
    for pid in range(ids):
        for k in range(images):
            (root / f"person {pid}").mkdir(parents=True, exist_ok=True)
            (root / f"person {pid}" / f"{k}.jpg").write_bytes(jpeg(pid, k % 2, k))
    return root


def rows(dataset: ReIDDataset, split: Split) -> list[tuple[str, int, int]]:
    """Path, identity and camera of each image of a split."""
    assert split.pids.dtype == split.camids.dtype == np.int64
    return [
        (dataset.relative(path), pid, camid)
        for path, pid, camid in zip(split.paths, split.pids.tolist(), split.camids.tolist(), strict=True)
    ]


def make_model(seed: int = 0, **kwargs: object) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_pass_vit", **kwargs).eval()


def names(root: Path) -> list[str]:
    """Files below a folder."""
    return sorted(str(p.relative_to(root)).replace(os.sep, "/") for p in root.rglob("*") if p.is_file())
