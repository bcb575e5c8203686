"""One image: the person posed in a place, the detector's box, the rendering and the sensor."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from passreid_models.synthetic.attributes import stream
from passreid_synth3d.fabrics import PATTERN_FAMILIES
from passreid_synth3d.figure import Figure
from passreid_synth3d.mesh import Array
from passreid_synth3d.place import Place, clearance, place
from passreid_synth3d.prints import print_mask
from passreid_synth3d.render import LOGO, Solid, Window, render
from passreid_synth3d.sensor import develop
from passreid_synth3d.wardrobe import person

__all__ = ["draw"]

PICTURE = 23  # the random stream
NOBODY = 1 << 40  # pids from here on are passers-by, in no dataset
PASSERS = 24  # number of passers-by who may walk into an image


def draw(
    seed: int,
    pid: int,
    camid: int,
    k: int,
    size: tuple[int, int] = (256, 128),
    patterns: str = "train",
    where: str = "street",
) -> Image.Image:
    """Draw the k-th image of a person in a camera; the arguments alone determine the pixels.

    Args:
        seed: Seed of the world.
        pid: The identity.
        camid: The camera.
        k: Index of the image.
        size: (height, width) in pixels.
        patterns: The family of garment patterns and prints, "train" or "held-out".
        where: The kind of place, "street" or "studio".

    Raises:
        ValueError: If a number is negative, or `patterns` or `where` is unknown.
    """
    if min(seed, pid, camid, k) < 0 or patterns not in PATTERN_FAMILIES:
        raise ValueError(
            f"expected numbers from 0 on and patterns of {', '.join(PATTERN_FAMILIES)}, got seed {seed}, pid {pid}, "
            f"camid {camid}, k {k} and patterns {patterns!r}"
        )
    rng, scene = stream(seed, PICTURE, pid, camid, k), place(seed, camid, where)
    persons = [_stand(rng, seed, pid, patterns, *scene.stand(rng))]
    if rng.random() < 0.2:
        x, y, heading = persons[0].spot
        behind = rng.uniform(-1, 1.2)
        beside = rng.choice((-1, 1)) * rng.uniform(0.35 if abs(behind) > 0.5 else 0.6, 0.85)
        offset = beside * _horizontal(scene.right) + behind * _horizontal(scene.forward)
        x, y, heading = x + offset[0], y + offset[1], heading + rng.choice((0, np.pi)) + rng.normal(0, 0.3)
        passer = NOBODY + int(rng.integers(PASSERS))
        if clearance(np.array([(x, y)]), scene.solids)[0] > 0.3:
            persons.append(_stand(rng, seed, passer, patterns, x, y, heading))
    window = _box(rng, scene, persons[0].points, size[0])
    feet = np.concatenate([s.feet for s in persons])
    radiance = render([s.solid for s in persons], _surroundings(seed, camid, where), window, scene.light, feet)
    return develop(rng, radiance, scene.imaging, size)


@dataclass(frozen=True)
class _Standing:
    solid: Solid
    points: Array
    feet: Array
    spot: tuple[float, float, float]


def _figure(seed: int, pid: int, patterns: str) -> tuple[Figure, Solid]:
    figure = Figure(person(seed, pid, patterns))
    return figure, Solid(figure.mesh, figure.at, print_mask(figure.who.logo, patterns, LOGO))


_person, _passer = lru_cache(2)(_figure), lru_cache(PASSERS)(_figure)  # images are drawn identity by identity


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


def _horizontal(direction: Array) -> Array:
    return np.asarray(direction[:2] / np.linalg.norm(direction[:2]))


def _box(rng: np.random.Generator, scene: Place, points: Array, max_rows: int) -> Window:
    """Window of a detector's box around a person: loose and shifted, in 20 % of the images without feet, legs or head.

    It has as many rows as the box has pixels in the camera, at least 40 and at most `max_rows`.
    """
    ray = points - scene.eye
    depth = np.maximum(ray @ scene.forward, 0.3)
    x, y = ray @ scene.right / depth, ray @ scene.down / depth
    left, right, top, bottom = (float(v) for v in (*np.quantile(x, (0.002, 0.998)), y.min(), y.max()))
    tall = bottom - top
    loose = 1.0 if rng.random() < 0.8 else 3.0
    top -= tall * loose * rng.normal(0.03, 0.03)
    bottom += tall * loose * rng.normal(0.025, 0.03)
    cut = rng.random()
    if cut < 0.14:
        bottom -= tall * rng.uniform(0.06, 0.35)
    elif cut < 0.2:
        top += tall * rng.uniform(0.03, 0.12)
    wide = max((right - left) * rng.uniform(0.9, 1.25), (bottom - top) * rng.uniform(0.34, 0.5))
    centre = (left + right) / 2 + wide * rng.normal(0, 0.07)
    rows = int(np.clip(round((bottom - top) * scene.focal), 40, max_rows))
    step = (bottom - top) / rows
    columns = max(12, round(wide / step))
    return Window(
        scene.eye, scene.right, scene.down, scene.forward, centre - columns * step / 2, top, step, rows, columns
    )
