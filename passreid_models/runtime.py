"""Operating system and processes: atomic writes, locks, hashes, seeds, collective operations, the cache folder."""

import ctypes
import difflib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn

S = TypeVar("S")
T = TypeVar("T")


def check_file(path: str | Path) -> None:
    """Check that a file can be written there, before the work whose result it is to hold.

    Raises:
        OSError: If it is a folder, a device or a pipe, or a folder above it is none or cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if path.exists() and not path.is_file():  # a device, which the new file would replace
        raise OSError(f"{path} is no regular file: name another")
    folder = next((parent for parent in Path(os.path.realpath(path)).parents if parent.exists()), None)
    if folder is None:
        raise FileNotFoundError(f"{path}: there is no {path.anchor or 'such folder'}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: {folder} is no folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: {folder} cannot be written to")


def check_regular(path: Path, most: int) -> None:
    """Check that a file is a regular one of at most ``most`` bytes; a pipe or a device would make the reader wait.

    Raises:
        OSError: If there is none.
        ValueError: If it is no regular file, or larger.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    if path.stat().st_size > most:
        raise ValueError(f"{path} is larger than {most:,} bytes")


def read_bytes(path: Path, most: int) -> bytes:
    """Content of a file, after ``check_regular``.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no regular file, or larger.
    """
    check_regular(path, most)
    return path.read_bytes()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, renamed to ``path`` at the end; an error leaves nothing behind.

    A symbolic link is followed.

    Raises:
        OSError: If it cannot be written.
    """
    check_file(path)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name keeps its suffix, since some writers choose the format by it
    with _named(path), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        new = Path(work) / "new"
        new.mkdir()
        yield new / path.name
        _flush(new)
        (new / path.name).replace(path)


@contextmanager
def buffered(path: Path) -> Iterator[BytesIO]:
    """Yield a buffer that is written to ``path`` at the end.

    For writers that do not report a full disk: Pillow takes a short write for a whole one, and TorchScript aborts.

    Raises:
        OSError: If it cannot be written.
    """
    buffer = BytesIO()
    buffer.name = str(path)  # by which Pillow chooses the format
    yield buffer
    path.write_bytes(buffer.getvalue())  # no copy; a view in a traceback crashes Python 3.12.1


@contextmanager
def atomic_buffer(path: str | Path) -> Iterator[BytesIO]:
    """Yield a buffer that is written to ``path`` at the end, as ``buffered`` does, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    with atomic_file(path) as temporary, buffered(temporary) as buffer:
        yield buffer


def write_json(path: str | Path, content: Any, allow_nan: bool = True) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: If it cannot be written.
        ValueError: If a number is not finite, and ``allow_nan`` is False.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=allow_nan) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False, own: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, renamed to ``path`` at the end; an error leaves nothing behind.

    A kill between the two renames leaves the old folder beside ``path`` as ``.NAME.old``; the next write cleans up. A
    symbolic link is followed.

    Args:
        path: Folder to write.
        overwrite: Replace an existing folder.
        own: Names that the caller writes; what else is in the old folder stays. None replaces it as a whole.

    Raises:
        OSError: If ``path`` is a file, or a folder with content and ``overwrite`` is off.
    """
    path = Path(os.path.realpath(path))
    if overwrite and path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        new = Path(work) / "new"
        new.mkdir()
        yield new
        _flush(new)
        old = path.parent / f".{path.name}.old"
        if overwrite and path.exists():
            _remove_old(old, path, own)
            path.replace(old)
        elif path.is_dir():
            path.rmdir()  # if it is empty: on Windows a rename replaces no folder
        new.replace(path)
        _remove_old(old, path, own)


def _remove_old(old: Path, new: Path, own: Sequence[str] | None) -> None:
    """Remove an old folder, if there is one; what is not the writer's ``own`` moves to the new one."""
    if own is not None and old.is_dir():
        for entry in list(old.iterdir()):
            if entry.name not in own and not os.path.lexists(new / entry.name):
                entry.replace(new / entry.name)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the output in the error of a full disk; safetensors' own error becomes an OSError."""
    try:
        yield
    except SafetensorError as e:
        raise OSError(f"{path} could not be written: {e}") from None
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"{path} could not be written: {e.strerror}") from None


def _flush(folder: Path) -> None:
    """Flush new files to disk, with the permissions of the umask, since safetensors makes its files private."""
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def lock(path: str | Path) -> FileLock:
    """Lock between processes on ``path``, which need not exist yet; use it in a ``with`` statement."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.parent / f".{path.name}.lock")


def printable(text: str) -> str:
    """Text in one line for a terminal: control characters, as a file's name can hold them, are escaped."""
    is_shown = {c: c.isprintable() or unicodedata.category(c) == "Zs" for c in set(text)}
    return "".join(c if is_shown[c] else c.encode("unicode_escape").decode() for c in text)


def few(labels: Sequence[str], most: int) -> str:
    """The first ``most`` labels with commas between, and the number of those left out."""
    return ", ".join(labels[:most]) + (f" and {len(labels) - most:,} more" if len(labels) > most else "")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """End of an error message: the nearest of ``choices``, or nothing if none is near."""
    close = difflib.get_close_matches(word, list(choices), 1)
    return f"; did you mean {close[0]}?" if close else ""


def not_found(path: str | Path, expected: str = "", name: str = "") -> FileNotFoundError:
    """Error of a path that does not exist, with a name beside it that is near, or else what is expected.

    Args:
        path: The path.
        expected: What it should have been.
        name: Name of the path in the message, where it is not the path itself.
    """
    folder, word = os.path.split(os.path.abspath(path))
    near = ""
    with suppress(OSError):
        near = did_you_mean(word, os.listdir(folder))
    return FileNotFoundError(f"{name or path}: no such file or folder{near or (expected and f'; expected {expected}')}")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Add names, dtypes, shapes and values of tensors, sorted by name, to a digest of ``hashlib``."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch for one step of one process, so that checkpoints need no state of its generator."""
    torch.manual_seed(derive_seed(seed, step, rank))


def derive_seed(*numbers: int) -> int:
    """Hash numbers to a seed of 63 bits."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


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
    """Gather the rows of all processes, equally many each, by rank; this process's own keep their gradient.

    A loss over all rows, the same in every process, then gives this process's share of the gradient. DDP averages the
    shares, so multiply the loss by the number of processes.
    """
    rank, size = world()
    if size == 1:
        return x
    shares = _gather(x.detach().contiguous())
    shares[rank] = x
    return torch.cat(shares)


def _gather(x: Tensor) -> list[Tensor]:
    shares = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(shares, x)
    return shares


def on_first(function: Callable[[], T]) -> T:
    """Call ``function`` in the first process only; return its result, or raise its exception, in every process.

    Gathered, not broadcast: gloo's broadcast waits for ever if a process dies as the first one sends (17 of 3,000
    kills at about that time; none of 3,000 in a gather).
    """
    rank, size = world()
    if size == 1:
        return function()
    result: Any = None
    if rank == 0:
        try:
            result = function()
        except Exception as e:  # raised below, after the collective for which the others wait
            result = e
    results = [None] * size
    try:
        dist.all_gather_object(results, result)
    finally:
        if rank == 0 and isinstance(result, Exception):
            raise result  # itself, with its traceback; the others have a copy
    if isinstance(results[0], Exception):
        raise results[0]
    return cast(T, results[0])


def share_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of all processes with those of the first, in place; gathered, as in ``on_first``."""
    if world()[1] > 1:
        for x in tensors:
            x.copy_(_gather(x)[0])


def require(module: str, extra: str, use: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: Full name of the module.
        extra: Extra of this package that installs it.
        use: What it is for, the beginning of the message.

    Raises:
        ValueError: If it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(f'{use}: pip install ".[{extra}]" in a clone of passreid-models') from None


def unwrap(model: nn.Module) -> nn.Module:
    """Model inside wrappers of torch and timm: ``torch.compile``, data parallel, averages.

    Wrappers of other packages, which may compute something else, are returned as they are.
    """
    while type(model).__module__.startswith(("torch.", "timm.")):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def num_cores() -> int:
    """Number of CPU cores for this process: those it may use, shared with the other processes of ``torchrun`` here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step, rather than give pages back and ask for new ones.

    For commands: the memory of the whole process no longer shrinks. Does nothing with another C library, or where the
    environment has settings of glibc's own.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def map_threads(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Yield the function of each item, in order, computed in threads for reading files: two per core, 16 at most.

    4,096 items are in work at most: a pool's ``map`` makes objects of 2 kB for each of all items.
    """
    with ThreadPoolExecutor(min(16, 2 * num_cores())) as pool:
        for start in range(0, len(items), 4096):
            yield from pool.map(function, items[start : start + 4096])


def check_workers(workers: int) -> int:
    """Return a number of processes or threads to start.

    Raises:
        ValueError: If it is negative, or more than 16 and than four for each core.
    """
    most = max(16, 4 * num_cores())
    if not 0 <= workers <= most:
        raise ValueError(f"workers: expected between 0 and {most} on {num_cores()} CPU cores, got {workers}")
    return workers


def local_world_size() -> int:
    """Number of processes of ``torchrun`` on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cache_dir() -> Path:
    """Cache folder: ``PASSREID_CACHE``, or ``passreid`` beside the Hub's cache."""
    if path := os.environ.get("PASSREID_CACHE"):
        return Path(path).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "passreid"
