"""Street furniture, cars and plants; each function adds a mesh and the space that it occupies to a `Scene`."""

import math
from collections.abc import Callable

import numpy as np

from passreid_models.synthetic.attributes import pick
from passreid_synth3d.mesh import Array, Material, Mesh, box, cylinder, ellipsoid, merge, quad, triangulate
from passreid_synth3d.scene import (
    ACCENTS,
    GLASS,
    LEAVES,
    METALS,
    STONES,
    WOODS,
    Scene,
    darker,
    seed_of,
    shade,
)

PAINTS = np.array([
    (0.55, 0.55, 0.56), (0.28, 0.29, 0.3), (0.04, 0.04, 0.05), (0.12, 0.12, 0.13), (0.05, 0.09, 0.22),
    (0.35, 0.05, 0.05), (0.62, 0.61, 0.58), (0.16, 0.2, 0.18), (0.3, 0.26, 0.2),
])  # fmt: skip


def _prism(outline: list[tuple[float, float]], width: float, material: Material) -> Mesh:
    """Solid below a line of points (x, z) with increasing x, `width` thick in y."""
    n = len(outline)
    x, z = np.array(outline).T
    low = np.full(n, z.min())
    points = np.concatenate([np.stack([x, np.full(n, y), h], 1) for y in (-width / 2, width / 2) for h in (low, z)])
    i = np.arange(n - 1)
    quads = [np.stack([a + i, a + i + 1, b + i + 1, b + i], 1) for a, b in ((0, n), (2 * n, 3 * n), (n, 3 * n))]
    faces = triangulate(np.concatenate(quads)).astype(np.int32)
    count = np.zeros(len(faces), np.int32)
    return Mesh(points, faces, points[faces][:, :, [0, 2]], count, count.copy(), [material])


def car(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    """A parked car or van: a body, a cabin of glass, a roof, wheels, lights and number plates."""
    paint = Material("plain", shade(rng, PAINTS), shine=float(rng.uniform(0.15, 0.5)))
    glass, dark = Material("plain", GLASS, shine=0.5), Material("plain", (0.025, 0.025, 0.027))
    van = rng.random() < 0.22
    long, wide = (4.7, 1.85) if van else (float(rng.uniform(3.7, 4.5)), 1.72)
    h, front = long / 2, long / 2 - (0.75 if van else 1.15)
    belt, roof = (1.15, 2.0) if van else (0.9, 1.45)
    rear = -h + (0.06 if van else rng.choice((0.15, 0.75)))
    line = [(-h, 0.28), (-h, 0.72), (-h + 0.06, belt), (front, belt), (h - 0.15, belt - 0.18), (h, 0.6), (h, 0.28)]
    parts = [_prism([(a + 1e-4 * k, b) for k, (a, b) in enumerate(line)], wide, paint)]
    low = np.array([(rear, -1), (front, -1), (front, 1), (rear, 1)]) * (1, wide / 2 - 0.02)
    top = np.array([(rear + 0.25, -1), (front - 0.6, -1), (front - 0.6, 1), (rear + 0.25, 1)]) * (1, wide / 2 - 0.16)
    cabin = np.concatenate([np.c_[low, np.full(4, belt)], np.c_[top, np.full(4, roof)]])
    sides = np.array([(k, (k + 1) % 4, (k + 1) % 4 + 4, k + 4) for k in range(4)])
    for material, quads in ((paint if van else glass, sides), (paint, np.array([(4, 5, 6, 7)]))):
        faces = triangulate(quads).astype(np.int32)
        count = np.zeros(len(faces), np.int32)
        parts.append(Mesh(cabin, faces, cabin[faces][:, :, :2], count, count.copy(), [material]))
    if van:
        parts.append(quad((front - 0.02, -0.75, belt + 0.02), (0, 1.5, 0), (-0.5, 0, 0.72), glass))
    lamp, plate = Material("plain", (0.6, 0.6, 0.55), shine=0.5), Material("plain", (0.55, 0.55, 0.5))
    for end, light in ((h + 0.01, lamp), (-h - 0.01, Material("plain", (0.35, 0.03, 0.03)))):
        for side in (-0.78, 0.42):
            parts.append(quad((end, side, 0.58), (0, 0.36, 0), (0, 0, 0.14), light))
        parts.append(quad((end, -0.26, 0.38), (0, 0.52, 0), (0, 0, 0.11), plate))
    for at in (-h + 0.75, h - 0.8):
        for side in (-1, 1):
            inner, outer = (at, side * (wide / 2 - 0.2), 0.31), (at, side * (wide / 2 + 0.012), 0.31)
            parts.append(cylinder(inner, outer, (0.31, 0.31), dark, 9))
            hub = (at, side * (wide / 2 + 0.02), 0.31)
            parts.append(cylinder(inner, hub, (0.17, 0.17), Material("plain", (0.3, 0.3, 0.31)), 6))
    scene.add(merge(parts).placed(x, y, yaw))
    scene.occupy(x, y, long, wide, yaw, 0, belt)
    c, s = math.cos(yaw), math.sin(yaw)
    middle = (rear + front) / 2
    scene.occupy(x + middle * c, y + middle * s, front - rear - 0.4, wide - 0.2, yaw, belt, roof)


def tree(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float = 0.0) -> None:
    bark = Material("planks", shade(rng, WOODS), (0.08, 0.06, 0.05), period=0.07, seed=seed_of(rng))
    stem, crown, r = rng.uniform(2.3, 3.2), rng.uniform(1.1, 1.9), float(rng.uniform(0.09, 0.17))
    scene.add(cylinder((x, y, 0), (x, y, stem + crown), (r, 0.6 * r), bark, 7))
    scene.occupy(x, y, 2 * r, 2 * r, 0, 0, stem)
    duty, colour = float(rng.uniform(0.5, 0.62)), shade(rng, LEAVES)
    blobs = []
    for k in range(4):
        leaves = Material("foliage", darker(colour, 0.8 + 0.12 * k), period=0.26, duty=duty, seed=seed_of(rng))
        dx, dy = rng.normal(0, 0.45 * crown, 2)
        centre, r = (x + dx, y + dy, stem + crown * (0.7 + 0.3 * k)), crown * float(rng.uniform(0.6, 1))
        blobs.append(ellipsoid(centre, (r, r, 0.8 * r), leaves, 4, 7))
    scene.add(*blobs)
    points = np.concatenate([blob.points for blob in blobs])
    (x0, y0, z0), (x1, y1, z1) = points.min(0), points.max(0)
    scene.occupy((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, 0, z0, z1)


def bush(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float = 0.0, bottom: float = 0.0,
         width: float | None = None) -> None:  # fmt: skip
    r = (width or float(rng.uniform(0.9, 1.6))) / 2
    leaves = Material(
        "foliage", shade(rng, LEAVES), period=0.16, duty=float(rng.uniform(0.15, 0.45)), seed=seed_of(rng)
    )
    scene.add(ellipsoid((x, y, bottom + 0.6 * r), (r, r, r), leaves, 5, 8))
    scene.occupy(x, y, 1.8 * r, 1.8 * r, 0, bottom, bottom + 1.4 * r)


def hedge(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float, length: float = 2.4,
          height: float | None = None) -> None:  # fmt: skip
    leaves = Material("foliage", shade(rng, LEAVES), period=0.2, duty=-0.5, seed=seed_of(rng))
    scene.block(x, y, (length, 0.7, height or float(rng.uniform(0.7, 1.3))), leaves, yaw)


def planter(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    long, high = float(rng.uniform(0.7, 1.6)), float(rng.uniform(0.4, 0.65))
    scene.block(x, y, (long, 0.7, high), Material("plaster", shade(rng, STONES), seed=seed_of(rng)), yaw)
    bush(scene, rng, x, y, bottom=high, width=0.75 * min(long, 1.0))


def bench(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    wood = Material("stripes", shade(rng, WOODS), (0.06, 0.05, 0.04), period=0.11, duty=0.14)
    metal = Material("plain", shade(rng, METALS))
    parts = [box((0, 0, 0.44), (1.7, 0.45, 0.06), wood), box((0, 0.25, 0.7), (1.7, 0.05, 0.36), wood)]
    parts += [box((end, 0.03, 0.22), (0.07, 0.42, 0.44), metal) for end in (-0.7, 0.7)]
    scene.add(merge(parts).placed(x, y, yaw))
    scene.occupy(x, y, 1.7, 0.55, yaw, 0, 0.8)


def bin_(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    colour, wheeled = shade(rng, METALS if rng.random() < 0.5 else ACCENTS), rng.random() < 0.35
    if wheeled:
        scene.block(x, y, (0.58, 0.7, 1.0), Material("plain", colour), yaw)
        scene.block(x, y, (0.62, 0.74, 0.08), Material("plain", darker(colour)), yaw, 1.0)
    else:
        scene.post(x, y, float(rng.uniform(0.75, 1.0)), 0.25, Material("bars", colour, darker(colour), period=0.1), 9)


def bollard(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    paint = Material("stripes", shade(rng, METALS), (0.5, 0.5, 0.5), period=0.9, duty=0.14, seed=0.2)
    scene.post(x, y, float(rng.uniform(0.8, 1.1)), 0.07, paint)


def lamp(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    metal = Material("plain", shade(rng, METALS))
    scene.post(x, y, float(rng.uniform(4, 6)), 0.07, metal)
    scene.post(x, y, 0.9, 0.12, metal)


def sign(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    scene.post(x, y, 2.9, 0.035, Material("plain", shade(rng, METALS)), 6)
    face = Material("poster", shade(rng, ACCENTS), shade(rng, ACCENTS), (0.6, 0.6, 0.6), period=0.3, seed=seed_of(rng))
    scene.add(box((x, y, 2.45), (0.55, 0.05, 0.7), face, yaw))
    scene.occupy(x, y, 0.55, 0.05, yaw, 2.1, 2.8)


def railing(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    long, metal = float(rng.uniform(1.8, 3.6)), Material("plain", shade(rng, METALS))
    c, s = math.cos(yaw), math.sin(yaw)
    for t in np.linspace(-0.5, 0.5, 4) * long:
        scene.add(box((x + t * c, y + t * s, 0.5), (0.05, 0.05, 1.0), metal, yaw))
    for z, high in ((1.0, 0.06), (0.55, 0.04), (0.15, 0.04)):
        scene.add(box((x, y, z), (long, 0.05, high), metal, yaw))
        scene.occupy(x, y, long, 0.05, yaw, z - high, z)


def board(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    """An upright advertisement, or a low one on the pavement."""
    low = rng.random() < 0.5
    face = Material("poster", shade(rng, ACCENTS), shade(rng, ACCENTS), shade(rng, ACCENTS), 0.4, seed=seed_of(rng))
    scene.block(x, y, (0.6, 0.35, 1.05) if low else (1.25, 0.2, 2.3), face, yaw)


def machine(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    """A machine that sells drinks or tickets."""
    colour = shade(rng, ACCENTS)
    scene.block(x, y, (0.95, 0.75, 1.85), Material("plain", colour), yaw)
    goods = Material("shop", (0.1, 0.1, 0.1), shade(rng, ACCENTS), shade(rng, ACCENTS), 0.35, seed=seed_of(rng))
    c, s = math.cos(yaw), math.sin(yaw)
    for side in (-0.385, 0.385):
        corner = (x - 0.38 * c - side * s, y - 0.38 * s + side * c, 0.6)
        scene.add(quad(corner, (0.6 * c, 0.6 * s, 0), (0, 0, 1.1), goods))


def crates(scene: Scene, rng: np.random.Generator, x: float, y: float, yaw: float) -> None:
    card, z = Material("plaster", (0.32, 0.22, 0.13), seed=seed_of(rng)), 0.0
    for _ in range(int(rng.integers(1, 4))):
        size = (*(float(v) for v in rng.uniform(0.4, 0.75, 2)), float(rng.uniform(0.25, 0.5)))
        scene.block(x, y, (size[0], size[1], size[2]), card, yaw + float(rng.normal(0, 0.2)), z)
        z += size[2]


def pillar(scene: Scene, rng: np.random.Generator, x: float, y: float, height: float) -> None:
    colour, width = shade(rng, STONES), float(rng.uniform(0.35, 0.6))
    scene.block(x, y, (width, width, height), Material("plaster", colour, seed=seed_of(rng)))
    foot = Material("stripes", shade(rng, ACCENTS), darker(colour), period=0.6, duty=float(rng.choice((0, 0.5))))
    scene.add(box((x, y, 0.6), (width + 0.02, width + 0.02, float(rng.uniform(0.4, 1.2))), foot))


THINGS: dict[str, Callable[[Scene, np.random.Generator, float, float, float], None]] = {
    "car": car, "tree": tree, "bush": bush, "hedge": hedge, "planter": planter, "bench": bench, "bin": bin_,
    "sign": sign, "bollard": bollard, "lamp": lamp, "railing": railing, "board": board, "machine": machine,
    "crates": crates,
}  # fmt: skip


def scatter(scene: Scene, rng: np.random.Generator, count: int, clear: float, **weights: float) -> None:
    """Add up to `count` random things in the area, apart from each other and `clear` metres from the paths' middles."""
    x0, y0, x1, y1 = scene.area
    for _ in range(count):
        name, turn = pick(rng, **weights), float(rng.choice((0, 0.5 * math.pi)) + rng.normal(0, 0.06))
        for _attempt in range(4):
            at = rng.uniform((x0, y0), (x1, y1))
            gap = 1.5 if name == "car" else 0.45
            if min(distance_to(path, at) for path in scene.paths) < clear + gap - 0.45:
                continue
            if all(math.hypot(s[0] - at[0], s[1] - at[1]) > gap + min(max(s[2], s[3]), 1.5) for s in scene.solids):
                THINGS[name](scene, rng, float(at[0]), float(at[1]), turn)
                break


def distance_to(path: Array, at: Array) -> float:
    """Distance of a point to the line segment of a path, metres."""
    along = path[1] - path[0]
    t = np.clip((at - path[0]) @ along / (along @ along), 0, 1)
    return float(np.linalg.norm(at - path[0] - t * along))
