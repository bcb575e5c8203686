"""Listings of the images in a folder or a tar file, cached until the tree changes.

    $PASSREID_CACHE/listings/
        0123456789abcdef.npz        one listing; its name is the hash of FORMAT and the folder's absolute path

Adding or removing a file changes the time of its folder, so a listing is valid while the times of all folders are the
same. For a million images in a thousand folders this takes a thousand calls of ``stat`` instead of a million. Where a
file system keeps no times of folders, as some mounts of object stores, delete the listings to have new files seen.
"""

import hashlib
import os
import posixpath
import stat
import tarfile
import time
from array import array
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from passreid_models.data.images import SUFFIXES, is_hidden, is_image_name, walk
from passreid_models.runtime import atomic_file, lock

__all__ = ["Listing", "Names", "list_images"]

FORMAT = 4  # to be raised when an unchanged folder or tar gives another listing, or a listing is written otherwise
MAX_LINKS = 40  # that Linux follows
MAX_WAIT = 7200  # seconds, for a process that lists the same
SETTLED = 2.0  # seconds, the coarsest clock of a file system: a younger folder can change without a new time


class Names:
    """Many names in two buffers.

    Forked workers would copy a list of str page by page: reading a Python object writes its reference count, and so
    its page of memory is no longer shared.
    """

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        self.blob, self.ends = bytearray(), array("q")  # all names without a gap, and where each ends
        for name in names:
            self.append(name)

    def append(self, name: bytes) -> None:
        self.blob += name
        self.ends.append(len(self.blob))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"index {index} is out of range for {len(self.ends)} names")
        return os.fsdecode(bytes(self.blob[self.ends[index - 1] if index else 0 : self.ends[index]]))

    def count(self, wanted: Set[bytes]) -> int:
        """Number of the names that are wanted, of 4 million in some 3 seconds."""
        blob, begins = memoryview(self.blob), chain([0], self.ends)
        return sum(bytes(blob[start:end]) in wanted for start, end in zip(begins, self.ends, strict=False))

    def fingerprint(self) -> str:
        """SHA-256 of the count and the names, in hexadecimal."""
        digest = hashlib.sha256(b"%d\n" % len(self))
        digest.update(np.frombuffer(self.ends, dtype=np.int64).astype("<i8").tobytes())
        digest.update(self.blob)
        return digest.hexdigest()


@dataclass
class Listing:
    """Images below a folder, or in tar files, in the order of sorted paths."""

    names: Names = field(default_factory=Names)  # relative to the folder or tar, with /
    tars: Names = field(default_factory=Names)  # paths of the tar files; none where the images are files
    members: "array[int]" = field(default_factory=lambda: array("q"))  # three per image: tar, first byte, bytes or -1
    watched: Names = field(default_factory=Names)  # paths of the folders and tar files that were read
    stamps: "array[int]" = field(default_factory=lambda: array("q"))  # two per path: time in ns, bytes of a tar or 0
    is_whole: bool = True  # False with a link that leads nowhere yet; no time tells when it does

    def watch(self, path: bytes, status: os.stat_result) -> None:
        self.watched.append(path)
        self.stamps.extend(_stamp(status))

    def is_current(self) -> bool:
        """Whether all watched folders and tar files are unchanged."""
        for i in range(len(self.watched)):
            try:
                if _stamp(os.stat(self.watched[i])) != tuple(self.stamps[2 * i : 2 * i + 2]):
                    return False
            except OSError:
                return False
        return True


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size


def list_images(root: Path, cache: Path) -> Listing:
    """List the images below a folder, in its tar files if it has no images, or in one tar file.

    ``images.walk`` says which files of a folder count.

    Args:
        root: The folder or the tar file.
        cache: Folder to keep the listing in; if it cannot be written to, the next call lists again.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If a folder cannot be read, or a tar file is damaged or compressed.
    """
    path = Path(os.path.abspath(root))
    key = hashlib.sha256(b"%d\n" % FORMAT + os.fsencode(path)).hexdigest()[:16]
    file = cache / "listings" / f"{key}.npz"
    with _one_process(file):  # the others wait for its listing
        cached = _read(file)
        if cached and cached.watched[0] == str(path) and cached.is_current():
            return cached
        started = time.time()
        try:
            listing = _list_folder(path) if path.is_dir() else _list_tars([os.fsencode(path)])
        except OSError as e:
            if not e.strerror:
                raise  # an error of this package
            raise ValueError(f"{os.fsdecode(e.filename or path)} cannot be read: {e.strerror}") from None
        times, sizes = listing.stamps[::2], listing.stamps[1::2]
        has_times = all(map(max, times, sizes))  # the folder at the root of a FAT file system has none
        if listing.is_whole and has_times and max(times) < (started - SETTLED) * 1e9:
            with suppress(OSError):
                _write(file, listing)
        return listing


@contextmanager
def _one_process(file: Path) -> Iterator[None]:
    """Hold the lock of a file, unless its folder cannot be written to, or the lock is kept for long.

    File systems without flock keep that of a process killed on another machine.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # filelock's Timeout is one
            stack.enter_context(lock(file).acquire(timeout=MAX_WAIT))
        yield


# ---------------------------------------------------------------------------------------------------------- folders


def _list_folder(root: Path) -> Listing:
    listing, tars, num_others = Listing(), [], 0
    for name, status in walk(os.fsencode(root)):
        if status:
            listing.watch(os.path.join(os.fsencode(root), name).rstrip(b"/"), status)
        elif is_image_name(name):
            listing.names.append(name)
        elif name.lower().endswith(b".tar"):
            tars.append(name)
        else:
            num_others += 1
            path = os.path.join(os.fsencode(root), name)
            listing.is_whole &= not os.path.islink(path) or os.path.exists(path)
    if tars and not listing.names:
        return _list_tars([os.path.join(os.fsencode(root), tar) for tar in tars], root, listing)
    if not listing.names:
        raise FileNotFoundError(
            f"no images ({' '.join(SUFFIXES)}) and no .tar file in {root}, {num_others} other files"
        )
    return listing


# -------------------------------------------------------------------------------------------------------- tar files


def _list_tars(tars: list[bytes], root: Path | None = None, listing: Listing | None = None) -> Listing:
    """List the images in tar files; with ``root``, their names begin with the path of their tar.

    As in a folder, a link counts as its target, and a broken one as an unreadable image; one that leads out of its tar
    is broken.
    """
    listing, num_others = listing or Listing(), 0
    for number, tar in enumerate(tars):
        status = os.stat(tar)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait
            raise ValueError(f"{os.fsdecode(tar)} is no regular file")
        listing.watch(tar, status)
        listing.tars.append(tar)
        entries: Entries = {}  # the last one of a name counts, as in tar
        try:
            with open(tar, "rb") as file:
                _read_tar(file, entries)
        except tarfile.TarError as e:
            path = os.fsdecode(tar)
            raise ValueError(f"{path} cannot be read as an uncompressed tar file: {e}") from None
        prefix = os.path.relpath(tar, os.fsencode(root)) + b"/" if root else b""
        folders = {posixpath.dirname(name) for name in entries}
        above = posixpath.commonpath(folders) if folders else b""  # which may be hidden, as what a folder lies in
        depth = above.count(b"/") + 1 if above else 0
        visible = [name for name in entries if not _is_hidden(name, depth)]
        images = sorted(filter(is_image_name, visible), key=lambda name: name.replace(b"/", b"\0"))
        num_others += len(visible) - len(images)
        for name in images:
            listing.names.append(prefix + name)
            listing.members.extend((number, *_follow(entries, name)))
    if not listing.names:
        where = f"the {len(tars)} tar files of {root}" if root else os.fsdecode(tars[0])
        raise FileNotFoundError(f"no images ({' '.join(SUFFIXES)}) in {where}, {num_others} other files")
    return listing


Entries = dict[bytes, tuple[int, int] | bytes]
"""Files in a tar by name: first byte and number of bytes, or the name that a link leads to."""


def _read_tar(file: IO[bytes], entries: Entries, below: bytes = b"", base: int = 0) -> None:
    """Add the files in a tar, and in the tars in it, to ``entries``.

    timm's ``ReaderImageInTar`` reads every byte for this, keeps 0.7 KB per image, knows three suffixes only, and holds
    an open file, which cannot be pickled and whose position forked workers would share.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
            name, link = (posixpath.normpath(os.fsencode(text)) for text in (member.name, member.linkname))
            name = name.lstrip(b"/")
            if member.islnk():  # to a file before it
                target = below + link.lstrip(b"/")
                entries[below + name] = entries.get(target, target)
            elif member.issym():
                entries[below + name] = below + posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
            elif member.isfile():
                is_tar = name.lower().endswith(b".tar") and not _is_hidden(name)
                if is_tar and (inner := tar.extractfile(member)):
                    _read_tar(inner, entries, below + name + b"/", base + member.offset_data)
                else:
                    entries[below + name] = base + member.offset_data, member.size
        file.seek(tar.offset)
        while block := file.read(2**16):  # tarfile treats a damaged header as the end, and so the end of a joined tar
            if block.strip(b"\0"):
                raise tarfile.ReadError(
                    f"no header at byte {base + tar.offset}, and data after it: it is damaged, or several tars were "
                    "joined, which have to be separate files"
                )


def _is_hidden(name: bytes, depth: int = 0) -> bool:
    return any(is_hidden(part) for part in name.split(b"/")[depth:] if part != b"..")


def _follow(entries: Entries, name: bytes) -> tuple[int, int]:
    """First byte and number of bytes of the file that a name stands for; 0 and -1 if its link leads to none."""
    entry = entries.get(name)
    for _ in range(MAX_LINKS):
        if not isinstance(entry, bytes):
            break
        entry = entries.get(entry)
    return entry if isinstance(entry, tuple) else (0, -1)


# ------------------------------------------------------------------------------------------------------------ cache


def _read(file: Path) -> Listing | None:
    """Read a listing from the cache; None if it is missing or damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            listing = Listing()
            for names in ("names", "tars", "watched"):
                getattr(listing, names).blob += arrays[names].tobytes()
                getattr(listing, names).ends.frombytes(arrays[f"{names}_ends"].tobytes())
            listing.members.frombytes(arrays["members"].tobytes())
            listing.stamps.frombytes(arrays["stamps"].tobytes())
    except Exception:  # a damaged file raises many kinds of errors; it is only a cache
        return None
    return listing if listing.names and listing.watched else None


def _write(file: Path, listing: Listing) -> None:
    arrays = {"members": np.array(listing.members), "stamps": np.array(listing.stamps)}
    for names in ("names", "tars", "watched"):
        arrays[names] = np.frombuffer(getattr(listing, names).blob, dtype=np.uint8)
        arrays[f"{names}_ends"] = np.array(getattr(listing, names).ends)
    with atomic_file(file) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)
