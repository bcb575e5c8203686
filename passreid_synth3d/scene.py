"""A scene under construction: its meshes, the space they occupy, where people walk; and common colours."""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from passreid_synth3d.mesh import Array, Colour, Material, Mesh, box, cylinder, quad

Triple = tuple[float, float, float]
ACCENTS = np.array([  # signs, posters, doors: a few bright among dull ones
    (0.3, 0.1, 0.08), (0.09, 0.14, 0.26), (0.4, 0.32, 0.15), (0.1, 0.2, 0.14), (0.6, 0.6, 0.58), (0.05, 0.05, 0.06),
    (0.3, 0.19, 0.1), (0.14, 0.24, 0.27), (0.25, 0.24, 0.22), (0.55, 0.52, 0.44), (0.2, 0.13, 0.09), (0.13, 0.16, 0.14),
])  # fmt: skip
METALS = np.array([(0.12, 0.12, 0.13), (0.3, 0.31, 0.32), (0.07, 0.1, 0.09), (0.2, 0.16, 0.12), (0.4, 0.4, 0.4)])
STONES = np.array([(0.36, 0.35, 0.33), (0.26, 0.25, 0.24), (0.42, 0.37, 0.3), (0.3, 0.22, 0.18)])
LEAVES = np.array([(0.07, 0.14, 0.035), (0.05, 0.1, 0.04), (0.11, 0.15, 0.04), (0.15, 0.12, 0.04)])
WOODS = np.array([(0.26, 0.16, 0.09), (0.18, 0.12, 0.08), (0.34, 0.25, 0.16), (0.2, 0.19, 0.17)])
GLASS = (0.05, 0.06, 0.07)
TONE = 0.14  # standard deviation of `shade`'s log brightness


@lru_cache
def _tube(sides: int) -> Mesh:
    return cylinder((0, 0, 0), (0, 0, 1), (1, 1), Material(), sides)


@dataclass
class Scene:
    """Surroundings under construction: meshes, and solid boxes, which people cannot stand in but can be hidden by."""

    meshes: list[Mesh] = field(default_factory=list)
    solids: list[tuple[float, ...]] = field(default_factory=list)  # x, y, half length, half width, yaw, bottom, top
    paths: list[Array] = field(default_factory=list)  # [2, 2]: start and end
    area: tuple[float, float, float, float] = (-10, -10, 10, 10)  # where people walk: x0, y0, x1, y1
    bounds: tuple[float, float, float, float] = (-20, -20, 20, 20)  # where a camera may hang
    ceiling: float = 99.0
    layers: int = 0  # patches so far

    def add(self, *meshes: Mesh) -> None:
        self.meshes += meshes

    def occupy(self, x: float, y: float, length: float, width: float, yaw: float, bottom: float, top: float) -> None:
        """Add a solid box around (x, y)."""
        self.solids.append((x, y, length / 2, width / 2, yaw, bottom, top))

    def block(
        self, x: float, y: float, size: Triple, material: Material, yaw: float = 0.0, bottom: float = 0.0
    ) -> None:
        """Add the mesh and the solid of a box around (x, y)."""
        self.add(box((x, y, bottom + size[2] / 2), size, material, yaw))
        self.occupy(x, y, size[0], size[1], yaw, bottom, bottom + size[2])

    def post(self, x: float, y: float, height: float, radius: float, material: Material, sides: int = 7) -> None:
        """Add the mesh and the solid of an upright tube around (x, y)."""
        tube = _tube(sides)
        uv = tube.uv * (radius, height)
        self.add(replace(tube, points=tube.points * (radius, radius, height) + (x, y, 0), uv=uv, materials=[material]))
        self.occupy(x, y, 2 * radius, 2 * radius, 0, 0, height)

    def floor(self, x: float, y: float, material: Material, height: float = 0.0) -> None:
        """Add the ground, or a ceiling, from (-x, -y) to (x, y)."""
        self.add(quad((-x, -y, height), (2 * x, 0, 0), (0, 2 * y, 0), material))

    def patch(self, x: float, y: float, length: float, width: float, material: Material, yaw: float = 0.0) -> None:
        """Add a flat rectangle around (x, y) on the ground, on top of all earlier ones."""
        self.layers += 1
        c, s = math.cos(yaw), math.sin(yaw)
        corner = (x - (length * c - width * s) / 2, y - (length * s + width * c) / 2, 0.0003 * self.layers)
        self.add(quad(corner, (length * c, length * s, 0), (-width * s, width * c, 0), material))


def shade(rng: np.random.Generator, palette: Array) -> Colour:
    """A colour of the palette with a random change of brightness, and a third as much of each channel."""
    base, tone = palette[rng.integers(len(palette))], rng.normal(0, TONE)
    r, g, b = (min(max(float(v) * math.exp(tone + rng.normal(0, TONE / 3)), 0.02), 0.8) for v in base)
    return r, g, b


def darker(colour: Colour, by: float = 0.6) -> Colour:
    return colour[0] * by, colour[1] * by, colour[2] * by


def seed_of(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, 90))
