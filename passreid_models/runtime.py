"""What every part shares with the operating system and other processes: atomic writes, locks, seeds, all-reduce."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

T = TypeVar("T")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to, renamed to ``path`` at the end; nothing stays after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, since some writers choose the format by it
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        new = Path(work) / "new"
        new.mkdir()
        yield new / path.name
        _settle(new)
        (new / path.name).replace(path)


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill, renamed to ``path`` at the end; nothing stays after an error.

    With ``overwrite`` an older folder gives way whole; a kill between the two renames leaves it beside, as
    ``.NAME.old``.

    Raises:
        OSError: If ``path`` is a folder with content and ``overwrite`` is off.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        new = Path(work) / "new"
        new.mkdir()
        yield new
        _settle(new)
        old = path.parent / f".{path.name}.old"
        if overwrite and path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        new.replace(path)
        shutil.rmtree(old, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Bring new files to the disk, with the permissions that the umask gives: safetensors makes them private."""
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def lock(path: str | Path) -> FileLock:
    """A lock between processes on what is, or will be, at ``path``; use it in a ``with`` statement."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.parent / f".{path.name}.lock")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch for one step of one process, so that no generator's state need be saved."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little") >> 1)


def world() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of ``x`` over all processes; ``x`` itself in a single one. The only all-reduce of the package."""
    if world()[1] == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world()[1]


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all processes, first to last, each with as many; those of this one keep their gradient.

    A loss of all rows, computed alike in every process, then has this process's share of the gradient: DDP's mean wants
    it times the number of processes.
    """
    rank, size = world()
    if size == 1:
        return x
    shares = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(shares, x.detach().contiguous())
    shares[rank] = x
    return torch.cat(shares)


def on_first(function: Callable[[], T]) -> T:
    """What ``function()`` returns in the first process, in every process; what it raises too."""
    rank, size = world()
    if size == 1:
        return function()
    result: list[Any] = [None]
    if rank == 0:
        try:
            result = [function()]
        except Exception as e:  # the others would wait for it
            result = [e]
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def share_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that the first one has, in place."""
    if world()[1] > 1:
        for x in tensors:
            dist.broadcast(x, 0)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_dir() -> Path:
    """``PASSREID_CACHE``, or ``passreid`` beside the Hub's cache."""
    if path := os.environ.get("PASSREID_CACHE"):
        return Path(path).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "passreid"
