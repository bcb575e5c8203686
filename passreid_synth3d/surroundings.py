"""Surroundings of a camera: streets, squares, parks, halls, garages and studios, with the paths that people walk on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from passreid_models.synthetic.attributes import pick
from passreid_synth3d.mesh import Array, Material
from passreid_synth3d.scene import ACCENTS, STONES, Scene, darker, seed_of, shade
from passreid_synth3d.things import car, distance_to, hedge, pillar, scatter, tree
from passreid_synth3d.walls import BARE, INDOORS, INSIDE, OUTSIDE, PAINT, SHOPS, wall

__all__ = ["KINDS", "surroundings"]

KINDS: dict[str, float] = {"street": 33, "square": 25, "park": 12, "hall": 22, "garage": 8}  # and their frequency
FLOORS = np.array([(0.25, 0.25, 0.25), (0.32, 0.3, 0.28), (0.19, 0.19, 0.2), (0.33, 0.28, 0.23), (0.4, 0.39, 0.37)])
ASPHALTS = np.array([(0.12, 0.12, 0.125), (0.17, 0.165, 0.16), (0.22, 0.215, 0.21)])


def paving(rng: np.random.Generator) -> Material:
    colour = shade(rng, FLOORS)
    joint = darker(colour, float(rng.choice((0.55, 0.75, 1.3))))
    kind = pick(rng, slabs=3, tiles=3, asphalt=1)
    return Material(kind, colour, joint, period=float(rng.choice((0.25, 0.4, 0.6, 0.9))), duty=0.05, seed=seed_of(rng))


def litter(rng: np.random.Generator) -> Material:
    """Leaves, papers or stains on the ground, made by the cut-outs of foliage."""
    small = rng.random() < 0.5
    colours = [(0.26, 0.18, 0.08), (0.12, 0.1, 0.07), (0.15, 0.15, 0.15), (0.4, 0.39, 0.37)]
    colour = shade(rng, np.array(colours if small else colours[1:3]))
    period, duty = float(rng.uniform(0.08, 0.16) if small else rng.uniform(0.5, 1.2)), 0.9 if small else 0.75
    return Material("foliage", colour, period=period, duty=duty, seed=seed_of(rng))


def patches(scene: Scene, rng: np.random.Generator, count: int) -> None:
    """Add repairs, manholes, litter and patches of other paving to the ground of the area."""
    x0, y0, x1, y1 = scene.area
    for _ in range(count):
        x, y = rng.uniform((x0, y0), (x1, y1))
        name = pick(rng, repair=2, paving=2, manhole=2, litter=4)
        long, wide = (float(v) for v in rng.uniform(0.8, 4, 2))
        turn = float(rng.choice((0, math.pi / 2)))
        if name == "repair":
            scene.patch(x, y, long, 0.6 * wide, Material("asphalt", shade(rng, ASPHALTS), seed=seed_of(rng)), turn)
        elif name == "paving":
            scene.patch(x, y, long + 1, wide, paving(rng), turn)
        elif name == "manhole":
            metal = Material("checks", (0.16, 0.16, 0.16), (0.08, 0.08, 0.08), (0.2, 0.2, 0.2), 0.12)
            scene.patch(x, y, 0.7, 0.7, metal, turn)
        else:
            scene.patch(x, y, long + 1, wide + 1, litter(rng), turn)


def _street(scene: Scene, rng: np.random.Generator) -> None:
    wide, zebra = float(rng.uniform(3, 5)), float(rng.uniform(-3, 3))
    scene.area, scene.bounds = (-14, -9.8, 14, wide - 0.5), (-28, -10.3, 28, wide - 0.4)
    lane = float(rng.uniform(0.45, 0.65)) * wide
    scene.paths = [np.array([(-16, lane), (16, lane)]), np.array([(zebra, -9.5), (zebra, wide - 0.8)])]
    scene.floor(45, 45, paving(rng))
    scene.patch(0, -3.5, 90, 7, Material("asphalt", shade(rng, ASPHALTS), seed=seed_of(rng)))
    for y in (0.08, -7.08):
        scene.patch(0, y, 90, 0.18, Material("bars", shade(rng, STONES), (0.1, 0.1, 0.1), period=1.0, duty=0.02))
    for x in np.arange(-25, 26, 5.0):
        scene.patch(x, -3.5, 2, 0.12, Material("asphalt", PAINT))
    stripes = Material("crossing", shade(rng, ASPHALTS), PAINT, period=1.0, duty=0.5, seed=seed_of(rng))
    scene.patch(zebra, -3.5, 6.6, 3.2, stripes, math.pi / 2)
    patches(scene, rng, 12)
    wall(scene, rng, (35, wide), (-35, wide), float(rng.uniform(6, 11)), SHOPS if rng.random() < 0.6 else OUTSIDE)
    if rng.random() < 0.6:
        wall(scene, rng, (-35, -10.8), (35, -10.8), float(rng.uniform(3, 9)), OUTSIDE)
    else:
        for x in np.arange(-26, 27, 4.0):
            hedge(scene, rng, float(x), -11.5, 0, 4.0, 1.6)
        for x in (-10.0, 8.0):
            tree(scene, rng, x + float(rng.normal(0, 3)), -13.5)
    for x in (-35.0, 35.0):
        wall(scene, rng, (x, -12 * np.sign(x)), (x, 12 * np.sign(x)), 8, OUTSIDE)
    for x in np.arange(-14.5, 15, 5.2) + rng.uniform(-1, 1):
        if abs(x - zebra) > 4 and rng.random() < 0.7:
            car(scene, rng, float(x), -1.05, float(rng.choice((0, math.pi))))
        if abs(x - zebra) > 4 and rng.random() < 0.35:
            car(scene, rng, float(x) + 1, -6, 0)
    scene.area = (-11, 0.2, 11, wide - 0.4)
    things = dict(bollard=2, lamp=1, tree=0.6, bin=1.5, sign=1.5, planter=1, railing=1, board=1.5, bench=0.6)
    scatter(scene, rng, 14, 0.7, **things)
    scene.area = (-12, -9.8, 12, wide - 0.5)


def _cross(rng: np.random.Generator, reach: float) -> list[Array]:
    """Two paths that cross near the middle."""
    first = rng.uniform(0, math.pi)
    paths: list[Array] = []
    for angle in (first, first + rng.uniform(0.9, 2.2)):
        middle, step = rng.uniform(-2, 2, 2), reach * np.array((math.cos(angle), math.sin(angle)))
        paths.append(np.array((middle - step, middle + step)))
    return paths


def _square(scene: Scene, rng: np.random.Generator) -> None:
    half = float(rng.uniform(11, 17))
    scene.area, scene.bounds = (-10, -10, 10, 10), (-half + 0.5, -half + 0.5, half - 0.5, half - 0.5)
    scene.paths = _cross(rng, half - 1)
    scene.floor(45, 45, paving(rng))
    patches(scene, rng, 16)
    for _ in range(3):
        x, y = rng.uniform(-8, 8, 2)
        scene.patch(x, y, 24, float(rng.uniform(0.3, 2)), paving(rng), float(rng.choice((0, math.pi / 2))))
    corners = [(half, half), (-half, half), (-half, -half), (half, -half)]
    for k in range(4):
        if rng.random() < 0.75:
            start, end = corners[k], corners[(k + 1) % 4]
            wall(scene, rng, start, end, float(rng.uniform(4, 12)), SHOPS if rng.random() < 0.3 else OUTSIDE)
    for k in range(4):
        far = [(38, 38), (-38, 38), (-38, -38), (38, -38)]
        wall(scene, rng, far[k], far[(k + 1) % 4], float(rng.uniform(7, 14)), dict(none=1))
    for _ in range(3):  # steps
        x, y = (rng.uniform(-0.7, 0.7) * half, (half - 0.6) * rng.choice((-1, 1)))
        stone = Material("plaster", shade(rng, STONES), seed=seed_of(rng))
        for k in range(3):
            scene.block(float(x), float(y), (3.0 - 0.3 * k, 1.4 - 0.35 * k, 0.16), stone, bottom=0.16 * k)
    things = dict(bench=2.5, planter=2.5, tree=1.5, lamp=1.5, bollard=2.5, bin=1.5, railing=1.5, board=1.5, sign=1)
    scatter(scene, rng, 24, 0.75, car=0.3, **things)


def _park(scene: Scene, rng: np.random.Generator) -> None:
    scene.area, scene.bounds = (-10, -10, 10, 10), (-15, -15, 15, 15)
    scene.paths = _cross(rng, 14)
    green = shade(rng, np.array([(0.13, 0.2, 0.05), (0.16, 0.18, 0.07), (0.1, 0.14, 0.05)]))
    scene.floor(45, 45, Material("grass", green, seed=seed_of(rng)))
    for _ in range(14):
        x, y, long, wide = (float(v) for v in rng.uniform((-11, -11, 1, 1), (11, 11, 6, 4)))
        colour = shade(rng, np.array([(0.2, 0.15, 0.09), (0.13, 0.2, 0.05), (0.25, 0.2, 0.1)]))
        spot = Material("foliage", colour, period=float(rng.uniform(0.4, 1.2)), duty=0.6, seed=seed_of(rng))
        scene.patch(x, y, long, wide, spot, float(rng.uniform(0, 3)))
    for path in scene.paths:
        along = path[1] - path[0]
        gravel = paving(rng) if rng.random() < 0.4 else Material("asphalt", shade(rng, FLOORS), seed=seed_of(rng))
        turn, long, wide = math.atan2(along[1], along[0]), float(np.linalg.norm(along)), float(rng.uniform(2, 3.2))
        for k in range(4):  # stretches
            x, y = path[0] + along * (k + 0.5) / 4
            tone = replace(gravel, colour=darker(gravel.colour, rng.uniform(0.75, 1.15)), seed=seed_of(rng))
            scene.patch(x, y, long / 4, wide, tone, turn)
    for k in range(4):
        corners = [(19, 19), (-19, 19), (-19, -19), (19, -19)]
        (x0, y0), (x1, y1) = corners[k], corners[(k + 1) % 4]
        kind = pick(rng, hedge=2, wall=1.5)
        if kind == "wall":
            wall(scene, rng, (x0, y0), (x1, y1), float(rng.uniform(1.8, 9)), BARE)
            continue
        for t in np.linspace(0.08, 0.92, 7):
            x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
            hedge(scene, rng, x, y, 0 if y0 == y1 else math.pi / 2, 5.2, float(rng.uniform(1.6, 2.6)))
            if rng.random() < 0.12:
                tree(scene, rng, 0.9 * x, 0.9 * y)
    scatter(scene, rng, 20, 1.3, tree=2, bush=3, hedge=2.5, bench=2, bin=1, lamp=1, sign=0.7, railing=1, bollard=0.7)


def _room(scene: Scene, rng: np.random.Generator, height: float, floor: Material, details: Mapping[str, float]) -> None:
    x, y = float(rng.uniform(8, 13)), float(rng.uniform(6, 11))
    scene.area, scene.bounds = ((-x + gap, -y + gap, x - gap, y - gap) for gap in (0.6, 0.3))
    scene.ceiling = height
    scene.paths = _cross(rng, min(x, y) - 0.5)
    if rng.random() < 0.5:
        lane = float(rng.uniform(-0.5, 0.5)) * y
        scene.paths[0] = np.array([(-x + 1, lane), (x - 1, lane)])
    scene.floor(x, y, floor)
    roof = Material("tiles", (0.5, 0.5, 0.48), (0.3, 0.3, 0.3), period=0.6, duty=0.04)
    scene.floor(x, y, roof, height)
    corners = [(x, y), (-x, y), (-x, -y), (x, -y)]
    for k in range(4):
        wall(scene, rng, corners[k], corners[(k + 1) % 4], height, details, indoor=True)
    for _ in range(int(rng.integers(3, 7))):
        at = rng.uniform((-x + 2, -y + 2), (x - 2, y - 2))
        if min(distance_to(path, at) for path in scene.paths) > 1:
            pillar(scene, rng, float(at[0]), float(at[1]), height)


def _hall(scene: Scene, rng: np.random.Generator) -> None:
    colour = darker(shade(rng, INDOORS), 0.75)  # light floors would be overexposed
    kind, joint = pick(rng, tiles=4, slabs=1, plaster=2), darker(colour, float(rng.choice((0.6, 0.85))))
    period = float(rng.choice((0.3, 0.6, 1.2)))
    floor = Material(kind, colour, joint, period=period, duty=0.03, shine=0.25, seed=seed_of(rng))
    _room(scene, rng, float(rng.uniform(3.1, 5.0)), floor, INSIDE if rng.random() < 0.6 else SHOPS)
    for _ in range(10):
        x, y = rng.uniform(scene.area[:2], scene.area[2:])
        long, wide = (float(v) for v in rng.uniform((1, 0.2), (7, 2.5)))
        kind = pick(rng, tiles=2, plain=2, poster=0.4, slabs=1)
        mat = Material(kind, shade(rng, INDOORS), joint, period=0.6, duty=0.04, shine=0.2)
        scene.patch(x, y, long, wide, mat, float(rng.choice((0, math.pi / 2))))
    for _ in range(2):  # counters
        at = rng.uniform(scene.area[:2], scene.area[2:])
        front = Material("bars", shade(rng, ACCENTS), shade(rng, INDOORS), period=0.8, duty=0.5)
        if min(distance_to(path, at) for path in scene.paths) > 2:
            scene.block(float(at[0]), float(at[1]), (2.6, 0.7, 1.05), front, float(rng.choice((0, math.pi / 2))))
    things = dict(planter=2, bench=2.5, bin=1.5, board=2.5, machine=1.5, railing=2, crates=0.8, bollard=0.8)
    scatter(scene, rng, 16, 0.75, **things)


def _garage(scene: Scene, rng: np.random.Generator) -> None:
    floor = Material("asphalt", shade(rng, FLOORS), seed=seed_of(rng))
    _room(scene, rng, float(rng.uniform(2.9, 3.4)), floor, BARE)
    x0, y0, x1, y1 = scene.area
    for x in np.arange(x0, x1, 2.6):
        for y in (y0 + 2, y1 - 2):
            scene.patch(float(x), y, 0.1, 4.2, Material("asphalt", PAINT))
            near = min(distance_to(path, np.array((x + 1.3, y))) for path in scene.paths)
            if near > 2 and x + 2.4 < x1 and rng.random() < 0.45:
                car(scene, rng, float(x) + 1.3, y, math.pi / 2 * float(rng.choice((-1, 1))))
    for _ in range(8):
        x, y = rng.uniform(scene.area[:2], scene.area[2:])
        scene.patch(float(x), float(y), 3, 2, litter(rng))
    scatter(scene, rng, 9, 0.75, bollard=2, bin=1.5, crates=2, board=1, machine=0.7, railing=1.5)


def _studio(scene: Scene, rng: np.random.Generator) -> None:
    """Gray ground and nothing else."""
    scene.area = scene.bounds = (-8, -8, 8, 8)
    scene.paths = _cross(rng, 5)
    scene.floor(60, 60, Material(colour=(0.3, 0.3, 0.3)))
    scene.occupy(0, 99, 1, 1, 0, 0, 1)  # one solid, far away: the list must not be empty


LAYOUTS: dict[str, Callable[[Scene, np.random.Generator], None]] = {
    "street": _street, "square": _square, "park": _park, "hall": _hall, "garage": _garage, "studio": _studio,
}  # fmt: skip


def surroundings(rng: np.random.Generator, kind: str) -> Scene:
    """Build a random scene of a kind in `KINDS`, or a `studio`, in metres, with the ground at z = 0."""
    scene = Scene()
    LAYOUTS[kind](scene, rng)
    return scene
