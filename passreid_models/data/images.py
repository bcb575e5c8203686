"""Image files: which files count as images, and how one becomes an upright RGB picture."""

import os
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
_LOCKS = [Lock() for _ in range(64)]  # a PIL image reads its file and EXIF late, and can be given more than once


class ImageError(ValueError):
    """An image that cannot be read or used; the message names it."""


def is_image(images: Any) -> bool:
    return isinstance(images, Image.Image | np.ndarray | Tensor)


def open_image(item: Any, bgr: bool) -> Image.Image:
    """Any supported image as PIL RGB, upright."""
    if isinstance(item, str | os.PathLike):
        with Image.open(item) as file:
            return to_rgb(file)
    if isinstance(item, Image.Image):
        with _LOCKS[id(item) // 16 % len(_LOCKS)]:
            return to_rgb(item)
    if isinstance(item, Tensor):
        if item.dtype != torch.uint8 or item.ndim != 3 or item.shape[0] not in (1, 3):
            raise ValueError(f"expected a uint8 tensor [3, H, W], got {item.dtype} {tuple(item.shape)}")
        return Image.fromarray(item.permute(1, 2, 0).squeeze(2).cpu().numpy()).convert("RGB")
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (2, 3) or (item.ndim == 3 and item.shape[2] != 3):
            raise ValueError(f"expected a uint8 array [H, W, 3] or [H, W], got {item.dtype} {item.shape}")
        return Image.fromarray(item[..., ::-1] if bgr and item.ndim == 3 else item).convert("RGB")
    raise ValueError("expected a path, a PIL image, an array or a tensor")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it: turned by EXIF, 16 bits scaled to 8, transparency dropped."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies the upright ones too
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("a floating-point image has no known range: convert it to 8 bits first")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files below a folder, sorted by path; hidden files and folders are left out.

    Raises:
        FileNotFoundError: If there are none.
    """
    root = Path(folder)
    found = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.relative_to(root).parts)
    )
    if not found:
        raise FileNotFoundError(f"no images ({' '.join(SUFFIXES)}) in {root}")
    return found
