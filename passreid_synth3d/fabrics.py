"""Dyes and fabrics, drawn from a random stream."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np

from passreid_models.synthetic.attributes import pick, stream
from passreid_synth3d.mesh import Colour, Material

__all__ = ["PATTERN_FAMILIES", "Dice", "dye", "fabric", "near", "pale"]

# The families of woven and printed patterns. Those of "held-out" are never trained on.
PATTERN_FAMILIES = {
    "train": dict(stripes=4, bars=1, checks=3, gradient=1, blocks=3),
    "held-out": dict(dots=2, zigzag=2, argyle=2, camouflage=2),
}
# Linear reflectances of common dyes, and their frequency; `dye` varies the colour for each garment.
_DYES = np.array([
    (0.018, 0.018, 0.021, 20), (0.06, 0.062, 0.068, 12), (0.2, 0.2, 0.21, 9), (0.42, 0.42, 0.43, 4),  # black to silver
    (0.72, 0.71, 0.69, 12),  # white
    (0.022, 0.03, 0.085, 10), (0.07, 0.12, 0.24, 7), (0.03, 0.09, 0.4, 3), (0.26, 0.42, 0.62, 4),  # navy, denim ... sky
    (0.42, 0.03, 0.035, 6), (0.14, 0.018, 0.03, 3), (0.6, 0.26, 0.32, 3),  # red, wine, pink
    (0.5, 0.41, 0.28, 5), (0.36, 0.2, 0.085, 2), (0.12, 0.062, 0.032, 4),  # beige, camel, brown
    (0.1, 0.11, 0.042, 4), (0.03, 0.15, 0.065, 3), (0.36, 0.6, 0.48, 1), (0.02, 0.16, 0.19, 1),  # olive ... teal
    (0.56, 0.32, 0.04, 2), (0.62, 0.2, 0.03, 2), (0.72, 0.58, 0.1, 2),  # mustard, orange, yellow
    (0.12, 0.04, 0.18, 1.5), (0.42, 0.34, 0.55, 1),  # purple, lilac
])  # fmt: skip


class Dice:
    """Random choices from the stream of a key."""

    def __init__(self, *key: int) -> None:
        self.rng = stream(*key)

    def between(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)

    def around(self, mean: float, spread: float, low: float, high: float) -> float:
        """A normally distributed number, clipped to bounds."""
        return float(np.clip(self.rng.normal(mean, spread), low, high))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def kind(self, **weights: float) -> str:
        return pick(self.rng, **weights)


def dye(dice: Dice, unlike: Colour | None = None, dark: float = 1.0) -> Colour:
    """A colour of cloth, visibly different from `unlike`; dark colours are `dark` times as common as usual."""
    weights = _DYES[:, 3] * np.where(_DYES[:, :3].mean(1) < 0.15, dark, 1.0)
    for _ in range(8):
        base = _DYES[dice.rng.choice(len(_DYES), p=weights / weights.sum()), :3]
        hue, light, vivid = colorsys.rgb_to_hls(*base)
        hue += dice.rng.normal(0, 0.012)
        light, vivid = light * np.exp(dice.rng.normal(0, 0.22)), vivid * np.exp(dice.rng.normal(0, 0.2))
        rgb = colorsys.hls_to_rgb(hue % 1, min(light, 0.8), min(vivid, 1.0))
        if unlike is None or abs(np.cbrt(rgb) - np.cbrt(unlike)).sum() > 0.35:
            break
    return float(rgb[0]), float(rgb[1]), float(rgb[2])


def pale(colour: Colour) -> Colour:
    """The colour of a cloth where it is washed out."""
    r, g, b = (min(0.7, 1.8 * c + 0.02) for c in colour)
    return r, g, b


def near(dice: Dice, colours: Sequence[Colour], spread: float = 0.12) -> Colour:
    """One of the colours, slightly varied."""
    base = np.asarray(colours[int(dice.rng.integers(len(colours)))])
    r, g, b = base * np.exp(dice.rng.normal(0, spread) + dice.rng.normal(0, spread / 3, 3))
    return float(r), float(g), float(b)


def fabric(dice: Dice, patterns: str, plain: float, dark: float = 1.0, **cut: Any) -> Material:
    """A cloth of one dye, some of it washed out in places, or with a pattern of two or three dyes; with small folds.

    Args:
        dice: The random stream.
        patterns: The family of patterns, a key of `PATTERN_FAMILIES`.
        plain: Probability of a cloth of one dye.
        dark: Factor on the frequency of dark dyes.
        **cut: The outline of the cloth, and other fields of `Material`.
    """
    colour = dye(dice, dark=dark)
    second = dye(dice, unlike=colour)
    third = dye(dice, unlike=second)
    pattern = "plain" if dice.chance(plain) else dice.kind(**PATTERN_FAMILIES[patterns])
    period, duty, seed = dice.between(0.035, 0.13), dice.between(0.3, 0.65), dice.between(0, 50)
    if pattern == "plain" and dice.chance(0.2):
        pattern, second = "denim", pale(colour)
    elif pattern == "stripes":
        period, duty = float(np.exp(dice.between(-4.2, -1.8))), dice.between(0.12, 0.65)
    elif pattern == "bars":
        period, duty = dice.between(0.02, 0.06), dice.between(0.12, 0.4)
    elif pattern == "gradient":
        period, seed = dice.between(0.2, 0.5), dice.between(0.05, 0.3)
    elif pattern == "blocks":
        period, seed, duty = (0.0, 0.05, 0.12)[int(dice.rng.integers(3))], dice.between(0.28, 0.5), dice.between(0.2, 1)
    elif pattern == "camouflage":
        period = dice.between(0.04, 0.09)
    bump, grain = dice.between(0.12, 0.45), dice.between(0, 0.35)
    return Material(pattern, colour, second, third, period, duty, bump=bump, grain=grain, seed=seed, **cut)
