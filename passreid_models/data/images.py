"""Image files: suffixes, walk of folders, opener, and reasons why one cannot be read; every reader uses these."""

import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, AnyStr

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

_logger = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".pgm", ".jp2", ".dng")
"""Suffixes of images that are left out: ``passreid data check`` counts them."""
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_SUFFIXES_BYTES = tuple(suffix.encode() for suffix in SUFFIXES)
_OF_SYSTEMS = ("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "__MACOSX", "$RECYCLE.BIN",
               "System Volume Information", "lost+found")  # fmt: skip
"""Folders that storage devices and systems add: thumbnails, deleted files, older versions."""
_NOT_THE_USERS = {*_OF_SYSTEMS, *(name.encode() for name in _OF_SYSTEMS)}
MAX_PIXELS = 50_000_000
"""Pixels of the largest image that is opened, unless ``PASSREID_MAX_PIXELS`` is set; a small file can hold billions."""
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))
"""Transposition that makes an image upright, by the orientation in its EXIF."""
_LOCKS = [Lock() for _ in range(64)]  # a PIL image reads its file and EXIF late, and can be given more than once

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor
"""One image: a path, the content of a file, a PIL image, an array or a tensor."""


class ImageError(ValueError):
    """An image that cannot be read or used; the message is ``NAME: REASON``."""


# ---------------------------------------------------------------------------------------------------------- folders


def is_image_name(name: AnyStr) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(SUFFIXES if isinstance(name, str) else _SUFFIXES_BYTES)


def is_hidden(name: AnyStr) -> bool:
    """Whether a file or folder of this name is left out: a dot file, or a folder that a system adds by itself."""
    return name[:1] in (".", b".") or name in _NOT_THE_USERS


def list_folder(folder: AnyStr) -> tuple[list[AnyStr], set[AnyStr]]:
    """Sorted names of the files and folders in a folder, and the names of the folders.

    Hidden ones (``is_hidden``) are left out, and so are pipes, sockets and devices, whose reader would wait. A link
    counts as its target; a broken link counts as a file, so that it is reported as an unreadable image, or in a warning
    if it may lead to a folder.

    Raises:
        OSError: If the folder cannot be read.
    """
    names: list[AnyStr] = []
    folders: set[AnyStr] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            try:
                if entry.is_dir():
                    folders.add(entry.name)
                elif not entry.is_file() and entry.stat():  # neither, and no broken link
                    continue
            except OSError:  # a broken link, a link to itself
                if not is_image_name(entry.name):
                    _warn_of_link(os.fsdecode(entry.path))
            names.append(entry.name)
    names.sort()
    return names, folders


@cache
def _warn_of_link(path: str) -> None:
    """Warn, once, of a link that leads nowhere: a folder may be missing."""
    _logger.warning(f"{path}: a link that leads nowhere, left out")


def walk(folder: AnyStr) -> Iterator[tuple[AnyStr, os.stat_result | None]]:
    """Walk the files and folders below a folder; every reader of folders uses this.

    Names are relative to the folder, with ``/``, in the order of sorted paths. A folder, including the first (``""``),
    comes before its content, with ``/`` at its end and its status; a file comes with None. ``list_folder`` says what
    is left out. Links are followed; a folder that is reached twice, as by a link to a parent, is listed once: in its
    own place if that is below the first folder, else by the link that comes first.

    Raises:
        OSError: If a folder cannot be read.
    """
    return _walk(folder, folder[:0], set(), os.path.realpath(folder))


def _walk(
    folder: AnyStr, below: AnyStr, seen: set[tuple[int, int]], root: AnyStr
) -> Iterator[tuple[AnyStr, os.stat_result | None]]:
    status = os.stat(folder)  # before the content, so that a later change is seen
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    yield below, status
    names, folders = list_folder(folder)
    for name in names:
        if name in folders:
            slash, path = "/" if isinstance(name, str) else b"/", os.path.join(folder, name)
            if not (os.path.islink(path) and _is_listed(os.path.realpath(path), root)):
                yield from _walk(path, below + name + slash, seen, root)
        else:
            yield below + name, None


def _is_listed(path: AnyStr, root: AnyStr) -> bool:
    """Whether a folder, by its real path, has a place of its own below ``root``, and none of its parents is hidden."""
    parts = os.fsencode(path)[len(os.fsencode(root)) :].split(b"/") if path.startswith(root) else []
    return len(parts) > 1 and not parts[0] and not any(map(is_hidden, parts))


def image_names(folder: str) -> Iterator[str]:
    """Names of the images below a folder, in the order of ``walk``."""
    return (name for name, status in walk(folder) if status is None and is_image_name(name))


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files below a folder, sorted by path; hidden files and folders are left out, links are followed.

    A folder that is reached twice is listed once. A broken link counts as an unreadable image.

    Raises:
        FileNotFoundError: If there is no image.
    """
    root = Path(folder)
    paths = [root / name for name in image_names(str(root))]
    if not paths:
        others = [name for name, status in walk(str(root)) if status is None]
        is_video = any(name.lower().endswith(VIDEO_SUFFIXES) for name in others)
        advice = "; videos are not read: cut the persons out of their frames first" if is_video else ""
        raise FileNotFoundError(
            f"no images ({' '.join(SUFFIXES)}) in {root}, {count(len(others), 'other file')}{advice}"
        )
    return paths


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun, such as ``1 image`` or ``1,041 identities``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


# ----------------------------------------------------------------------------------------------------------- images


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Content of an image file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is a pipe or a device, whose reader would wait, or too large.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError("not a regular file")
    check_bytes(os.path.getsize(path))
    return Path(path).read_bytes()


def check_bytes(size: int) -> int:
    """Return the size of an image file in bytes.

    Raises:
        ValueError: If it is more than 8 bytes for each pixel of the largest image.
    """
    if size > 8 * max_pixels():
        raise ValueError(f"a file of {size:,} bytes; {_limit()}, of 8 bytes at most")
    return size


def max_pixels() -> int:
    """Pixels of the largest image that is opened.

    Raises:
        ValueError: If ``PASSREID_MAX_PIXELS`` is set and not a number.
    """
    text = os.environ.get("PASSREID_MAX_PIXELS") or str(MAX_PIXELS)
    if not re.fullmatch("[0-9]{1,15}", text):
        raise ValueError(f"PASSREID_MAX_PIXELS must be a number of pixels, got {text!r}")
    return int(text)


def _limit() -> str:
    return f"the limit is {max_pixels():,} pixels (PASSREID_MAX_PIXELS)"


def open_image(item: Any, bgr: bool = False) -> Image.Image:
    """Open an image in RGB as a viewer shows it: turned by EXIF, 16 bits scaled to 8, transparency dropped.

    Args:
        item: A path; the content of a file; a PIL image; a uint8 array ``[H, W, 3]`` or ``[H, W]``; or a uint8 tensor
            ``[3, H, W]`` or ``[1, H, W]``.
        bgr: An array has the channel order of OpenCV.

    Raises:
        Exception: Any exception of the system and of Pillow's decoders (OSError, SyntaxError, struct.error ...), and
            ValueError if ``item`` is not an image, or has no pixels or more than ``MAX_PIXELS``; ``reason`` puts it
            into words.
    """
    if isinstance(item, str | os.PathLike):
        item = read_file(item)
    if isinstance(item, bytes):
        if not item:
            raise ValueError("the file is empty")
        with Image.open(BytesIO(item)) as file:
            image = _to_rgb(file)
    elif isinstance(item, Image.Image):
        with _LOCKS[id(item) // 16 % len(_LOCKS)]:
            image = _to_rgb(item)
    elif isinstance(item, Tensor):
        if item.dtype != torch.uint8 or item.ndim != 3 or item.shape[0] not in (1, 3):
            raise ValueError(f"expected a uint8 tensor [3, H, W], got {item.dtype} {tuple(item.shape)}")
        image = Image.fromarray(item.permute(1, 2, 0).squeeze(2).cpu().numpy()).convert("RGB")
    elif isinstance(item, np.ndarray):
        if 0 in item.shape:  # Pillow 10 has another error
            raise ValueError("it has no pixels")
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] != 3):
            raise ValueError(f"expected a uint8 array [H, W, 3] or [H, W], got {item.dtype} {item.shape}")
        image = Image.fromarray(item[..., ::-1] if bgr and item.ndim == 3 else item).convert("RGB")
    else:
        raise ValueError("expected a path, a PIL image, an array or a tensor")
    if 0 in image.size:
        raise ValueError("it has no pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > max_pixels():  # known before it is decoded
        raise ValueError(f"an image of {image.width}x{image.height} pixels (width x height); {_limit()}")
    is_wide = image.mode == "I" and image.format not in ("PNG", "PPM")  # of these it is how Pillow opens 16 bits
    if image.mode == "F" or is_wide:
        kind = "32-bit integer" if is_wide else "floating-point"
        raise ValueError(f"a {kind} image has no known range: convert it to 8 bits first")
    image.load()  # before its EXIF, for which a PNG is read to its end
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of damaged EXIF, Pillow raises many kinds; viewers show the image as it is
        orientation = 1
    if orientation in TURNS:  # exif_transpose also writes EXIF anew, which fails where parts of it are damaged
        image = image.transpose(TURNS[orientation])
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    rgb = image.convert("RGB")
    rgb.info.clear()  # or the copy would be turned again, where it is opened as an image in its turn
    return rgb


def reason(error: Exception) -> str:
    """Reason why an image cannot be read, without the names and counts that Pillow and the system add."""
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow can identify"
    if isinstance(error, Image.DecompressionBombError):
        return f"an image of more pixels than Pillow opens; {_limit()}"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return re.sub(r" \(\d+ bytes not processed\)", "", text)
