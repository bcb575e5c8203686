"""Pictures: file formats, text, and matplotlib, imported when a figure is made."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from passreid_models.runtime import check_file, require


def check_picture(path: str | Path) -> None:
    """Check that a picture can be written there, before the work whose result is drawn.

    Raises:
        ValueError: If Pillow writes no pictures of this suffix.
        OSError: As ``check_file``.
    """
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: name a picture file such as {Path(path).stem or 'picture'}.png")
    check_file(path)


def shorten(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """Text, such as the name of a file, in one line of ``width`` pixels at most: without its middle if it is wider."""
    text = " ".join(text.encode(errors="replace").decode().split())
    kept, short = len(text), text
    while draw.textlength(short) > width:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}..{text[len(text) - kept // 2 :]}"
    return short


def new_figure(width: float, height: float, option: str = "plot") -> Any:
    """Make a figure of ``width`` x ``height`` inches.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    return require("matplotlib.figure", "viz", option).Figure(figsize=(width, height), layout="constrained")
