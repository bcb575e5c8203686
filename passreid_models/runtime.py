"""What every part of the package shares with the operating system: atomic writes, locks, checksums."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


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
