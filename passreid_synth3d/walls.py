"""Walls of varied stretches, with doors, windows, shops and posters at the height of persons."""

import math
from collections.abc import Mapping

import numpy as np

from passreid_models.synthetic.attributes import pick
from passreid_synth3d.mesh import Material, quad
from passreid_synth3d.scene import ACCENTS, GLASS, METALS, STONES, WOODS, Scene, darker, seed_of, shade

__all__ = ["BARE", "INDOORS", "INSIDE", "OUTSIDE", "PAINT", "SHOPS", "wall"]

WALLS = np.array([
    (0.5, 0.46, 0.38), (0.42, 0.42, 0.4), (0.45, 0.36, 0.25), (0.26, 0.29, 0.32), (0.54, 0.53, 0.5), (0.32, 0.34, 0.29),
    (0.4, 0.3, 0.25), (0.17, 0.17, 0.18), (0.34, 0.3, 0.27), (0.28, 0.24, 0.2),
])  # fmt: skip
BRICKS = np.array([(0.33, 0.16, 0.11), (0.4, 0.24, 0.16), (0.24, 0.15, 0.12), (0.42, 0.35, 0.25), (0.2, 0.18, 0.17)])
INDOORS = np.array([
    (0.55, 0.54, 0.5), (0.42, 0.41, 0.38), (0.3, 0.33, 0.36), (0.46, 0.4, 0.3), (0.25, 0.26, 0.25), (0.38, 0.3, 0.24),
    (0.33, 0.38, 0.36), (0.5, 0.47, 0.42),
])  # fmt: skip
PAINT = (0.55, 0.55, 0.52)
OUTSIDE = dict(door=3, window=4, poster=2, graffiti=1, shutter=1, pipe=1, vent=1, none=2)
SHOPS = dict(shop=6, door=3, poster=1, shutter=1, window=1, none=0.6)
INSIDE = dict(door=3, poster=4, window=1.5, shop=2, vent=0.8, pipe=0.6, none=2.5)
BARE = dict(pipe=2, vent=1.5, door=1.5, poster=1, graffiti=1, shutter=1, none=3)


def facing(rng: np.random.Generator, indoor: bool) -> Material:
    """Random material of a stretch of wall."""
    kind = pick(rng, plaster=4, bricks=0.7 if indoor else 3, tiles=2, planks=1, bars=1)
    colour, seed = shade(rng, BRICKS if kind == "bricks" else INDOORS if indoor else WALLS), seed_of(rng)
    if kind == "planks":
        colour = shade(rng, WOODS)
    joint = (0.42, 0.4, 0.37) if kind == "bricks" and rng.random() < 0.6 else darker(colour)
    period = {"tiles": rng.choice((0.2, 0.6, 1.2)), "planks": 0.14, "bars": rng.uniform(0.2, 1.2)}.get(kind, 0.1)
    return Material(kind, colour, joint, period=float(period), duty=0.05, seed=seed)


def _detail(rng: np.random.Generator, name: str) -> tuple[Material, float, float, float, Material | None]:
    """Random detail on a wall: its material, width, height, height above the ground, and the frame's material."""
    colour, other, seed = shade(rng, ACCENTS), shade(rng, ACCENTS), seed_of(rng)
    frame = Material("plain", shade(rng, METALS if rng.random() < 0.7 else ACCENTS))
    u = float(rng.uniform())
    if name == "door":
        return Material("bars", colour, darker(colour), period=0.3, duty=0.08), 0.9 + u, 2.1, 0.0, frame
    if name == "window":
        glass = Material("shop", GLASS, (0.12, 0.13, 0.14), other, 0.7, 0.05, shine=0.4, seed=seed)
        return glass, 0.9 + u, 1.3, 1.0, frame
    if name == "shop":
        lit = shade(rng, np.array([(0.2, 0.18, 0.14), (0.1, 0.1, 0.11), (0.35, 0.3, 0.22)]))
        return Material("shop", lit, colour, other, 0.55, 0.04, shine=0.3, seed=seed), 1.8 + 1.4 * u, 2.1, 0.35, frame
    if name == "shutter":
        return Material("stripes", colour, darker(colour, 0.7), period=0.1, duty=0.3), 1.8 + u, 2.4, 0.0, frame
    if name == "poster":
        return Material("poster", colour, other, (0.58, 0.57, 0.54), 0.25, seed=seed), 0.6 + 0.6 * u, 0.8 + u, 0.8, None
    if name == "graffiti":
        base = shade(rng, WALLS)
        spray = Material("poster", base, colour, darker(base, 1.15), period=0.2 + 0.3 * u, seed=seed)
        return spray, 0.8 + 1.6 * u, 0.7 + 0.7 * u, 0.3, None
    if name == "pipe":
        return Material("plain", shade(rng, METALS)), 0.12, 3.0, 0.0, None
    vent = Material("stripes", shade(rng, METALS), (0.05, 0.05, 0.05), period=0.08)
    return vent, 0.5 + 0.4 * u, 0.5, 0.4 + 1.2 * u, None


def wall(scene: Scene, rng: np.random.Generator, start: tuple[float, float], end: tuple[float, float], height: float,
         details: Mapping[str, float], indoor: bool = False) -> None:  # fmt: skip
    """Add a wall of varied stretches, with details on its left-hand side (looking from start to end)."""
    a, b = np.array(start), np.array(end)
    length = float(np.linalg.norm(b - a))
    along = (b - a) / length
    normal = np.array((-along[1], along[0]))
    middle = (a + b) / 2 - 0.1 * normal
    scene.occupy(float(middle[0]), float(middle[1]), length, 0.3, math.atan2(along[1], along[0]), 0, height)

    def panel(at: float, wide: float, low: float, high: float, material: Material, off: float) -> None:
        corner = (*(a + at * along + off * normal), low)
        scene.add(quad(corner, (*(wide * along), 0), (0, 0, high), material))

    at = 0.0
    while at < length:
        wide = float(min(rng.uniform(3.5, 8), length - at))
        if length - at - wide < 1.5:
            wide = length - at
        material = facing(rng, indoor)
        storey = min(height, 3.1)
        panel(at, wide, 0, storey, material, 0)
        if height > storey:
            colour = material.colour if rng.random() < 0.6 else shade(rng, WALLS)
            period = float(rng.uniform(1.6, 2.6))
            panes = Material("windows", colour, GLASS, (0.25, 0.27, 0.3), period, 0.55, seed=seed_of(rng))
            panel(at, wide, storey, height - storey, panes, 0)
        if rng.random() < 0.6:
            foot = darker(material.colour, rng.uniform(0.4, 0.8)) if rng.random() < 0.7 else shade(rng, STONES)
            panel(at, wide, 0, float(rng.uniform(0.25, 1.25)), Material("plaster", foot, seed=seed_of(rng)), 0.01)
        t = at + float(rng.uniform(0.2, 0.8))
        while t < at + wide - 1.0:
            name = pick(rng, **details)
            if name == "none":
                t += 1.0
                continue
            surface, w, h, low, frame = _detail(rng, name)
            w = min(w, at + wide - t - 0.1)
            if frame is not None:
                panel(t - 0.07, w + 0.14, max(low - 0.07, 0), h + (0.14 if low else 0.07), frame, 0.02)
            panel(t, w, low, min(h, height - low - 0.1), surface, 0.03)
            if name == "shop":
                above = Material("poster", surface.second, PAINT, surface.third, 0.3, seed=surface.seed)
                panel(t - 0.1, w + 0.2, 2.5, 0.5, above, 0.05)
            t += w + float(rng.uniform(0.25, 1.2))
        at += wide
