"""Triangle meshes with materials, for garments, bags, walls and cars."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PATTERNS", "REGIONS", "Array", "Colour", "Material", "Mesh",
    "box", "cylinder", "ellipsoid", "merge", "quad", "triangulate",
]  # fmt: skip

Array = NDArray[np.floating]
Colour = tuple[float, float, float]  # linear reflectance, 0 to 1

# The kernel numbers patterns and regions by their index in these lists. Some patterns give fields of `Material` a
# meaning of their own:
#   gradient, blocks   seed: height of the lower end; period: extent
#   skin               second: lips; third: hair; duty: density of the beard
#   sole               period, duty: heights of the sole and of the toe cap, whose colours are second and third
#   strap              seed: 0 for the two straps of a backpack, 1 or -1 for one across the body from that side
PATTERNS = (
    "plain", "stripes", "bars", "checks", "gradient", "blocks", "dots", "zigzag", "argyle", "camouflage", "denim",
    "side", "skin", "hair", "sole", "bricks", "tiles", "planks", "windows", "grass", "foliage", "plaster", "asphalt",
    "crossing", "strap", "slabs", "shop", "poster",
)  # fmt: skip
REGIONS = ("thing", "torso", "arm", "leg", "head", "foot", "hand")


@dataclass(frozen=True)
class Material:
    """Appearance and outline of a surface; outlines are in coordinates of the unposed standard body, metres.

    On the torso, cloth reaches from `hem` up to a waist at `top` (if below 0.4) or to a neckline, which is wider the
    lower `top` is (0.62 is the neck itself) and `dip` deep in front; an open front leaves a gap of `opening` on either
    side of the middle. A sleeve ends at `sleeve` from the shoulder; on a leg, cloth begins at `hem`.
    """

    pattern: str = "plain"
    colour: Colour = (0.5, 0.5, 0.5)
    second: Colour = (0.5, 0.5, 0.5)
    third: Colour = (0.5, 0.5, 0.5)
    period: float = 0.1
    duty: float = 0.5
    bump: float = 0.0
    grain: float = 0.0
    shine: float = 0.0
    seed: float = 0.0
    hem: float = -9.0
    top: float = 9.0
    dip: float = 0.0
    opening: float = -1.0
    sleeve: float = 9.0
    logo: int = -1
    logo_side: float = -1.0
    logo_x: float = 0.0
    logo_z: float = 0.33
    logo_size: float = 0.2
    logo_colour: Colour = (0.5, 0.5, 0.5)


@dataclass
class Mesh:
    """Triangles: points [V, 3] and uv [F, 3, 2] in metres, z up; faces [F, 3]; material and region of each face."""

    points: Array
    faces: NDArray[np.int32]
    uv: Array
    material: NDArray[np.int32]
    region: NDArray[np.int32]
    materials: list[Material] = field(default_factory=list)

    def placed(self, x: float, y: float, yaw: float) -> "Mesh":
        """Copy of the mesh, rotated by `yaw` radians about the vertical and moved along the ground."""
        c, s = np.cos(yaw), np.sin(yaw)
        return replace(self, points=self.points @ np.array([(c, s, 0), (-s, c, 0), (0, 0, 1)]) + (x, y, 0))


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """Concatenate meshes; equal materials are kept once."""
    materials: dict[Material, int] = {}
    columns, start = [], 0
    for mesh in meshes:
        indices = np.array([materials.setdefault(m, len(materials)) for m in mesh.materials], np.int32)
        material = indices[mesh.material] if len(mesh.material) else mesh.material
        columns.append((mesh.points, mesh.faces + start, mesh.uv, material, mesh.region))
        start += len(mesh.points)
    points, faces, uv, material, region = (np.concatenate(c) for c in zip(*columns, strict=True))
    return Mesh(points, faces.astype(np.int32), uv, material, region, list(materials))


def triangulate(quads: NDArray[np.integer]) -> NDArray[np.integer]:
    """Split quads [N, 4], corners in order, into triangles [2 N, 3]."""
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def _mesh(points: Array, faces: NDArray[np.integer], uv: Array, material: Material) -> Mesh:
    zeros = np.zeros(len(faces), np.int32)
    return Mesh(np.asarray(points, float), faces.astype(np.int32), uv[faces], zeros, zeros.copy(), [material])


def quad(corner: Sequence[float], along: Sequence[float], up: Sequence[float], material: Material) -> Mesh:
    """A parallelogram; its uv are metres along the two edges."""
    c, a, b = (np.asarray(v, float) for v in (corner, along, up))
    u, v = np.linalg.norm(a), np.linalg.norm(b)
    uv = np.array([(0, 0), (u, 0), (u, v), (0, v)])
    return _mesh(np.array([c, c + a, c + a + b, c + b]), np.array([(0, 1, 2), (0, 2, 3)]), uv, material)


@lru_cache
def _cube() -> Mesh:
    """The unit cube: two opposite sides along (y, z), then two along (x, z) and two along (x, y)."""
    edges, sides = np.eye(3), []
    for n in range(3):
        a, b = (edges[i] for i in range(3) if i != n)  # b is vertical on the upright sides
        sides += [quad((sign * edges[n] - a - b) / 2, a, b, Material()) for sign in (-1, 1)]
    return merge(sides)


def box(centre: Sequence[float], size: Sequence[float], material: Material, yaw: float = 0.0) -> Mesh:
    """A box around `centre` with edges of `size`, rotated by `yaw` radians about the vertical."""
    cube, (c, s) = _cube(), (np.cos(yaw), np.sin(yaw))
    points = cube.points * size @ np.array([(c, s, 0), (-s, c, 0), (0, 0, 1)]) + centre
    along = np.repeat([(1, 2), (0, 2), (0, 1)], 4, axis=0)  # the axes of u and v on each of the 12 faces
    return replace(cube, points=points, uv=cube.uv * np.asarray(size, float)[along][:, None], materials=[material])


def cylinder(foot: Sequence[float], top: Sequence[float], radii: tuple[float, float], material: Material,
             sides: int = 10) -> Mesh:  # fmt: skip
    """A tapered tube from `foot` to `top`, closed at the top."""
    a, b = np.asarray(foot, float), np.asarray(top, float)
    axis = (b - a) / np.linalg.norm(b - a)
    x = np.cross(axis, (0, 1, 0) if abs(axis[1]) < 0.9 else (1, 0, 0))
    x /= np.linalg.norm(x)
    y = np.cross(axis, x)
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    ring = np.cos(angle)[:, None] * x + np.sin(angle)[:, None] * y
    points = np.concatenate([a + radii[0] * ring, b + radii[1] * ring, b[None]])
    length, around = np.linalg.norm(b - a), angle * max(radii)
    uv = np.concatenate([np.stack([around, 0 * angle], 1), np.stack([around, 0 * angle + length], 1), [(0, length)]])
    i = np.arange(sides)
    n = sides + 1
    wall = triangulate(np.stack([i, i + 1, n + i + 1, n + i], 1))
    cap = np.stack([n + i, n + i + 1, np.full(sides, 2 * n)], 1)
    return _mesh(points, np.concatenate([wall, cap]), uv, material)


def ellipsoid(centre: Sequence[float], radii: Sequence[float], material: Material, rings: int = 8, sides: int = 12,
              power: float = 1.0) -> Mesh:  # fmt: skip
    """An ellipsoid; a `power` below 1 makes it boxy."""
    theta, phi = np.meshgrid(np.linspace(0, np.pi, rings + 1), np.linspace(0, 2 * np.pi, sides + 1), indexing="ij")
    unit = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1).reshape(-1, 3)
    unit = np.sign(unit) * np.abs(unit) ** power
    points = unit * radii + np.asarray(centre, float)
    uv = np.stack([phi.ravel() * radii[0], -theta.ravel() * radii[2]], 1)
    r, s = np.meshgrid(np.arange(rings), np.arange(sides), indexing="ij")
    first, n = (r * (sides + 1) + s).ravel(), sides + 1
    return _mesh(points, triangulate(np.stack([first, first + 1, first + n + 1, first + n], 1)), uv, material)
