"""Valid files from which hostile ones are made, and helpers of the cases.

A case is a function of a random generator: it writes its input into an empty folder, and returns the words of a
``passreid`` command, or a function. A function ends with an AssertionError where a result is wrong, such as a damaged
gallery that loads with other descriptors. Cases name nothing outside of their folder that could be written to.
"""

import os
import shutil
import socket
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import jsonargparse  # noqa: F401  # with the next two once, not in the process of every case
import matplotlib.backends.backend_agg  # noqa: F401
import safetensors.torch
import sklearn.cluster  # noqa: F401
import timm
import torch

from passreid_models import Embedder, Gallery
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.evaluation.feature_cache import FeatureCache
from passreid_models.pretrain.run import train
from passreid_models.reid.supervised import finetune
from tests.tiny_reid import finetune_config, write_persons
from tests.tiny_runs import tiny, write_images

Call = list[str] | Callable[[], Any]
TINY = ["--model", "test_pass_vit", "--size", "64x32", "--device", "cpu", "--dtype", "float32", "--workers", "0"]
STOP = ["--max-minutes", "0.001"]  # a run that begins has shown enough
PRETRAIN = [*TINY, "--num-prototypes", "32", "--hidden-dim", "16", "--bottleneck-dim", "8", "--batch-size", "4", "-q"]
REID = [*TINY, "-q"]
FINETUNE = [*REID, "--ids-per-batch", "3", "--images-per-id", "2"]
CLUSTER = [*REID, "--k1", "6", "--k2", "3", "--clusters-per-batch", "2", "--images-per-cluster", "2", "--steps", "1"]


@dataclass(frozen=True)
class Base:
    """Valid files that the cases start from, in a folder that they do not write to."""

    root: Path

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """State dict of the model in ``export``."""
        return safetensors.torch.load_file(self.export / "model.safetensors")

    @property
    def model(self) -> list[str]:
        return ["--model", str(self.export), "--device", "cpu"]

    @property
    def image(self) -> str:
        return str(self.root / "images" / "00.png")

    @property
    def persons(self) -> str:
        return str(self.root / "persons")

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


def make_base(root: Path) -> Base:
    """Write a model, two runs, images, a dataset, a gallery and caches."""
    torch.manual_seed(0)
    model = timm.create_model("test_pass_vit", num_classes=0)
    save_pretrained(model, root / "export")
    write_images(root / "images", 6)
    write_persons(root / "persons")
    options = dict(epochs=1, batch_size=4, quiet=True)
    train(tiny(root / "images", root / "run", **options))
    finetune(finetune_config(root / "persons", root / "reid", epochs=1, warmup_epochs=0, eval_epochs=0, quiet=True))
    state = safetensors.torch.load_file(root / "export" / "model.safetensors")
    torch.save(state, root / "new.pth")
    torch.save(state, root / "old.pth", _use_new_zipfile_serialization=False)
    embed = Embedder(str(root / "export"), "cpu", workers=1)
    x = embed([str(path) for path in sorted((root / "images").iterdir())])
    gallery = Gallery(embed)
    gallery.add([f"person {i}" for i in range(len(x))], x, pids=range(len(x)))
    gallery.save(root / "gallery.safetensors")
    cache = FeatureCache(embed, "images", root)
    cache.store([f"{i:064x}" for i in range(len(x))], x)
    cache.file.rename(root / "features.safetensors")
    with tarfile.open(root / "images.tar", mode="w") as tar:
        tar.add(root / "images", "images")
    return Base(root)


def put(file: Path, content: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def copy(base: Base, name: str, to: Path, changed: dict[str, bytes | None]) -> Path:
    """Copy of a folder with other content of some files; those of None are left out."""
    for file in (base.root / name).rglob("*"):
        key = str(file.relative_to(base.root / name))
        if file.is_file() and not file.name.startswith("."):
            content = changed.get(key, b"")
            if key not in changed:
                (to / key).parent.mkdir(parents=True, exist_ok=True)
                (to / key).hardlink_to(file)
            elif content is not None:
                put(to / key, content)
    return to


def device(rng: Random, path: Path) -> None:
    """Copy of /dev/zero, /dev/full or /dev/random; a pipe where only root may make one."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, rng.choice((5, 7, 8))))
    except PermissionError:
        os.mkfifo(path)


def odd_file(rng: Random, path: Path) -> None:
    """Something other than a regular file that can be read, or an odd one."""
    kind = rng.randrange(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        with socket.socket(socket.AF_UNIX) as s:
            here = os.open(path.parent, os.O_PATH)
            s.bind(f"/proc/self/fd/{here}/{path.name}")  # an address is short
            os.close(here)
    elif kind < 4:
        device(rng, path)
    elif kind == 4:
        path.symlink_to(rng.choice((path.name, "missing", ".", "..")))
    elif kind == 5:
        path.mkdir()
    elif kind == 6:
        path.touch()
    elif kind == 7:
        with path.open("wb") as file:
            file.truncate(2**34)  # without blocks on the disk
    else:
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
