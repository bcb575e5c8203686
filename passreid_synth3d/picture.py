"""One image: who, where, in which light, in what box, and what the camera makes of it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from passreid_models.synthetic.attributes import stream
from passreid_synth3d.fabrics import PATTERN_FAMILIES
from passreid_synth3d.figure import Figure
from passreid_synth3d.mesh import Array
from passreid_synth3d.place import Place, clearance, place
from passreid_synth3d.prints import printed
from passreid_synth3d.render import LOGO, Solid, Window, render
from passreid_synth3d.sensor import developed
from passreid_synth3d.wardrobe import person

__all__ = ["draw"]

PICTURE = 23  # the random stream
NOBODY = 1 << 40  # pids from here on belong to no identity of a dataset
PASSERS = 24  # who may walk into the image


def draw(
    seed: int,
    pid: int,
    camid: int,
    k: int,
    size: tuple[int, int] = (256, 128),
    patterns: str = "train",
    where: str = "street",
) -> Image.Image:
    """The k-th image of a person in a camera; the arguments alone determine the pixels.

    Args:
        seed: Of the world.
        pid: The identity.
        camid: The camera.
        k: Which of the images.
        size: (height, width) in pixels.
        patterns: The families of garment textures and prints, "train" or "held-out".
        where: The kind of the place, "street" or "studio".

    Raises:
        ValueError: If a number is negative, or there are no such patterns or places.
    """
    if min(seed, pid, camid, k) < 0 or patterns not in PATTERN_FAMILIES:
        raise ValueError(
            f"expected numbers from 0 on and patterns of {', '.join(PATTERN_FAMILIES)}, got seed {seed}, pid {pid}, "
            f"camid {camid}, k {k} and patterns {patterns!r}"
        )
    rng, scene = stream(seed, PICTURE, pid, camid, k), place(seed, camid, where)
    shown = [_stand(rng, seed, pid, patterns, *scene.stand(rng))]
    if rng.random() < 0.16:
        x, y, heading = shown[0].spot
        away = rng.uniform(-1, 1.2)
        side = rng.choice((-1, 1)) * rng.uniform(0.35 if abs(away) > 0.5 else 0.6, 0.85)
        aside = side * _flat(scene.right) + away * _flat(scene.forward)
        x, y, heading = x + aside[0], y + aside[1], heading + rng.choice((0, np.pi)) + rng.normal(0, 0.3)
        passer = NOBODY + int(rng.integers(PASSERS))
        if clearance(np.array([(x, y)]), scene.solids)[0] > 0.3:
            shown.append(_stand(rng, seed, passer, patterns, x, y, heading))
    window = _box(rng, scene, shown[0].points, size[0])
    feet = np.concatenate([s.feet for s in shown])
    radiance = render([s.solid for s in shown], _surroundings(seed, camid, where), window, scene.light, feet)
    return developed(rng, radiance, scene.imaging, size)


@dataclass(frozen=True)
class _Standing:
    solid: Solid
    points: Array
    feet: Array
    spot: tuple[float, float, float]


def _figure(seed: int, pid: int, patterns: str) -> tuple[Figure, Solid]:
    figure = Figure(person(seed, pid, patterns))
    return figure, Solid(figure.mesh, figure.at, printed(figure.who.logo, patterns, LOGO))


_person, _passer = lru_cache(2)(_figure), lru_cache(PASSERS)(_figure)  # identities come one after the other


@lru_cache(256)
def _surroundings(seed: int, camid: int, where: str) -> Solid:
    return Solid(place(seed, camid, where).mesh)


def _stand(
    rng: np.random.Generator, seed: int, pid: int, patterns: str, x: float, y: float, heading: float
) -> _Standing:
    figure, solid = (_person if pid < NOBODY else _passer)(seed, pid, patterns)
    points, normals, feet = figure.stand(rng, (x, y), heading)
    solid.move(points, normals)
    return _Standing(solid, points, feet, (x, y, heading))


def _flat(direction: Array) -> Array:
    return np.asarray(direction[:2] / np.linalg.norm(direction[:2]))


def _box(rng: np.random.Generator, scene: Place, points: Array, most: int) -> Window:
    """The window of a detector's box around a person: loose, shifted, now and then without feet or head.

    It has as many rows as the sensor sees there, at least 40 and at `most` so many.
    """
    ray = points - scene.eye
    depth = np.maximum(ray @ scene.forward, 0.3)
    x, y = ray @ scene.right / depth, ray @ scene.down / depth
    left, right, top, bottom = (float(v) for v in (*np.quantile(x, (0.002, 0.998)), y.min(), y.max()))
    tall = bottom - top
    top -= tall * rng.normal(0.035, 0.03)
    bottom += tall * rng.normal(0.03, 0.03)
    cut = rng.random()
    if cut < 0.07:
        bottom -= tall * rng.uniform(0.08, 0.3)
    elif cut < 0.1:
        top += tall * rng.uniform(0.04, 0.1)
    wide = max((right - left) * rng.uniform(1.02, 1.25), (bottom - top) * rng.uniform(0.36, 0.46))
    centre = (left + right) / 2 + wide * rng.normal(0, 0.04)
    rows = int(np.clip(round((bottom - top) * scene.focal), 40, most))
    step = (bottom - top) / rows
    columns = max(12, round(wide / step))
    return Window(
        scene.eye, scene.right, scene.down, scene.forward, centre - columns * step / 2, top, step, rows, columns
    )
