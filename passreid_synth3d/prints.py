"""Prints on chests and backs: masks of shapes, blocks and letters."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from passreid_models.synthetic.attributes import pick, stream
from passreid_synth3d.mesh import Array

__all__ = ["print_mask"]

PRINT = 22  # the random stream
FAMILIES: dict[str, dict[str, float]] = {
    "train": dict(blocks=3, disc=1, ring=1, bars=1.5, number=2, clouds=2),
    "held-out": dict(triangle=1, star=2, letters=3, cross=1, waves=2),
}


def print_mask(seed: int, patterns: str, side: int) -> Array:
    """Print as a mask [side, side], 0 to 1, from the arguments alone; "train" and "held-out" share no kind of print."""
    rng = stream(PRINT, seed)
    kind = pick(rng, **FAMILIES[patterns])
    scale = 4 * side
    picture = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(picture)
    if kind == "blocks":  # symmetric, as emblems are
        half = rng.random((6, 3)) < 0.55
        grid = Image.fromarray((np.concatenate([half, half[:, ::-1]], 1) * 255).astype(np.uint8))
        picture = grid.resize((scale, scale), Image.Resampling.NEAREST)
    elif kind in ("disc", "ring"):
        pen.ellipse((0, 0, scale, scale), 255)
        if kind == "ring":
            inner = scale * rng.uniform(0.1, 0.3)
            pen.ellipse((inner, inner, scale - inner, scale - inner), 0)
    elif kind == "bars":
        for row in range(rng.integers(2, 5)):
            width, y = scale * rng.uniform(0.4, 1.0), scale * (0.1 + 0.22 * row)
            pen.rectangle(((scale - width) / 2, y, (scale + width) / 2, y + 0.12 * scale), 255)
    elif kind == "triangle":
        flip = rng.random() < 0.5
        tip, base = (0.05, 0.95) if flip else (0.95, 0.05)
        pen.polygon([(0, base * scale), (scale, base * scale), (scale / 2, tip * scale)], 255)
    elif kind == "star":
        points = int(rng.integers(5, 8))
        angle = np.arange(2 * points) * np.pi / points
        radius = np.where(np.arange(2 * points) % 2, 0.22, 0.5) * scale
        pen.polygon(
            [(scale / 2 + r * np.sin(a), scale / 2 - r * np.cos(a)) for a, r in zip(angle, radius, strict=True)], 255
        )
    elif kind == "cross":
        a, b = scale * 0.36, scale * 0.64
        pen.rectangle((a, 0, b, scale), 255)
        pen.rectangle((0, a, scale, b), 255)
    elif kind == "clouds":  # of many shades, as photographs are
        shades = Image.fromarray((rng.random((5, 5)) * 255).astype(np.uint8))
        picture = shades.resize((scale, scale), Image.Resampling.BICUBIC)
    elif kind == "waves":
        across, down = np.meshgrid(*2 * [np.linspace(-1, 1, scale)])
        rings = rng.uniform(4, 9) * np.hypot(across, down * rng.uniform(0.5, 2))
        level = np.sin(rings + rng.uniform(0, 3) * across)
        picture = Image.fromarray((127 + 127 * level).astype(np.uint8))
    else:
        letters = "ABCDEFGHKLMNPRSTUVXYZ" if kind == "letters" else "0123456789"
        text = "".join(letters[i] for i in rng.integers(0, len(letters), rng.integers(1, 4)))
        font = ImageFont.load_default(scale / max(1.0, 0.62 * len(text)))
        pen.text((scale / 2, scale / 2), text, 255, font=font, anchor="mm")
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX), np.float32) / 255
