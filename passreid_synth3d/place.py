"""Places: the surroundings, light, imaging and viewpoint of a surveillance camera, as functions of seed and `camid`.

World coordinates are metres, z up, the ground at z = 0; a person with heading 0 walks towards -y, with pi/2 towards +x.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from passreid_models.synthetic.attributes import pick, stream
from passreid_synth3d.light import Imaging, Sunlight, imaging_of, light_of, studio_light
from passreid_synth3d.mesh import Array, Mesh, merge
from passreid_synth3d.scene import Scene
from passreid_synth3d.surroundings import KINDS, surroundings

__all__ = ["PLACES", "Place", "clearance", "place"]

PLACES = ("street", "studio")

PLACE = 41  # random streams of this module are (seed, PLACE, camid, n) with n of:
LAYOUT, LIGHT, IMAGING, AIM = range(1, 5)

HEIGHTS = (40.0, 300.0)  # of a person in the image, pixels
BODY = 1.8  # height of a person with shoes and hair, metres
LEAN = 0.2  # largest tilt of an upright person in the image, as a share of the height: wide lenses tilt at the margins
ROOM = 0.42  # free radius around a person's axis, metres
HIDDEN = 0.2  # share of images with a partly hidden person, if a camera has ENOUGH such spots
ENOUGH = 8
CANDIDATES = 600  # spots sampled for each camera


@dataclass(frozen=True, eq=False)
class Place:
    """A camera and its surroundings.

    `focal` is in pixels, and `frame` the image's width and height; `clear` and `hidden` [N, 3] are spots
    (x, y, heading) where a person is fully visible, and where a part is hidden.
    """

    kind: str
    mesh: Mesh
    eye: Array  # [3]
    right: Array
    down: Array
    forward: Array
    focal: float
    frame: tuple[float, float]
    light: Sunlight
    imaging: Imaging
    solids: Array  # [S, 7]: x, y, half length, half width, yaw, bottom, top of each solid
    clear: Array
    hidden: Array

    def project(self, points: Array) -> tuple[Array, Array]:
        """Pixels [..., 2], right and down from the middle of the image, and depths [...] of world points [..., 3]."""
        return _project(self.eye, self.right, self.down, self.forward, self.focal, points)

    def stand(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Draw a person's position and direction of walking: x, y and heading."""
        is_hidden = rng.random() < HIDDEN * min(1, len(self.hidden) / ENOUGH)
        spots = self.hidden if is_hidden else self.clear
        x, y, heading = spots[rng.integers(len(spots))] + rng.normal(0, 1, 3).clip(-2, 2) * (0.02, 0.02, 0.08)
        return float(x), float(y), float(math.remainder(heading, 2 * math.pi))


@lru_cache(256)
def place(seed: int, camid: int, kind: str = "street") -> Place:
    """Build the place of a camera, from the arguments alone.

    Args:
        seed: Seed of the world.
        camid: The camera.
        kind: `street` (streets, squares, parks, halls and garages in their light) or `studio` (gray surroundings and
            one exposure for all cameras, whose viewpoints differ).

    Raises:
        ValueError: If `seed` or `camid` is negative, the kind is unknown, or the camera has no spot where a person is
            fully visible (not met so far).
    """
    if seed < 0 or camid < 0:
        raise ValueError(f"the seed and camid of a place must not be negative, got seed {seed} and camid {camid}")
    if kind not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {kind!r}")
    rng, studio = stream(seed, PLACE, camid, LAYOUT), kind == "studio"
    kind = kind if studio else pick(rng, **KINDS)
    scene = surroundings(rng, kind)
    solids = np.array(scene.solids)
    view, clear, hidden = _viewpoint(stream(seed, PLACE, camid, AIM), scene, solids, camid * 2.4)
    if not len(clear):
        raise ValueError(f"seed {seed}, camid {camid}: nobody can be seen in this {kind}; give another seed")
    rng = stream(seed, PLACE, camid, LIGHT)
    if studio:
        light, imaging = studio_light(rng)
    else:
        light = light_of(rng, indoor=kind in ("hall", "garage"))
        imaging = imaging_of(stream(seed, PLACE, camid, IMAGING), light, _lit(light, clear, solids))
    return Place(kind, merge(scene.meshes), *view, light, imaging, solids, clear, hidden)


View = tuple[Array, Array, Array, Array, float, tuple[float, float]]  # as in `Place`, from eye to frame


def _viewpoint(rng: np.random.Generator, scene: Scene, solids: Array, azimuth: float) -> tuple[View, Array, Array]:
    """Choose a view, and its clear and hidden spots: the first of 16 with enough clear spots, else the best.

    The search starts at `azimuth`, which differs between successive cameras: a few cameras could otherwise all see
    fronts.
    """
    views = []
    for turn in range(16):
        view = _aim(rng, scene, azimuth + rng.uniform(-0.4, 0.4) + turn * 1.1)
        views.append((view, *_spots(rng, scene, solids, view)))
        if len(views[-1][1]) >= 0.15 * CANDIDATES:
            break
    return max(views, key=lambda v: len(v[1]))


def _aim(rng: np.random.Generator, scene: Scene, azimuth: float) -> View:
    """View of a camera that looks along `azimuth` at a point near the middle of a path."""
    path = scene.paths[rng.integers(len(scene.paths))]
    target = path.mean(0) + rng.uniform(-0.15, 0.15) * (path[1] - path[0])
    distance = rng.uniform(5, 11)
    x0, y0, x1, y1 = scene.bounds
    eye = (target - distance * np.array((math.cos(azimuth), math.sin(azimuth)))).clip((x0, y0), (x1, y1))
    distance = max(float(np.linalg.norm(target - eye)), 2.5)
    height = min(rng.uniform(2.2, 5.0), scene.ceiling - 0.25, 1.7 + 0.45 * distance)
    azimuth = math.atan2(target[1] - eye[1], target[0] - eye[0])
    pitch = math.atan2(height - 0.9, distance) + rng.normal(0, 0.04)
    forward = np.array((math.cos(pitch) * math.cos(azimuth), math.cos(pitch) * math.sin(azimuth), -math.sin(pitch)))
    right = np.array((math.sin(azimuth), -math.cos(azimuth), 0))
    down = np.cross(forward, right)
    roll = rng.normal(0, 0.02)
    right, down = math.cos(roll) * right + math.sin(roll) * down, math.cos(roll) * down - math.sin(roll) * right
    pixels = float(np.clip(165 * math.exp(rng.normal(0, 0.3)), 80, 250))  # height of a person at the target
    focal = pixels * math.hypot(distance, height - 0.9) / (1.75 * math.cos(pitch))
    high = 2 * focal * math.tan(math.radians(rng.uniform(42, 56)) / 2)
    return np.array((*eye, height)), right, down, forward, focal, (high * float(rng.choice((4 / 3, 16 / 9))), high)


def _project(eye: Array, right: Array, down: Array, forward: Array, focal: float, points: Array) -> tuple[Array, Array]:
    ray = points - eye
    depth = ray @ forward
    safe = np.where(depth > 0.1, depth, 0.1)
    return focal * np.stack([ray @ right, ray @ down], -1) / safe[..., None], depth


def _spots(rng: np.random.Generator, scene: Scene, solids: Array, view: View) -> tuple[Array, Array]:
    """Sample free spots (x, y, heading) in view: clear ones, and those where 10 to 55 % of the person is hidden."""
    n = CANDIDATES
    paths = np.array(scene.paths)[rng.integers(len(scene.paths), size=n)]  # [n, 2, 2]
    along = paths[:, 1] - paths[:, 0]
    at = paths[:, 0] + rng.uniform(0, 1, (n, 1)) * along + rng.normal(0, 0.45, (n, 2))
    way = np.arctan2(along[:, 0], -along[:, 1]) + math.pi * rng.integers(2, size=n) + rng.normal(0, 0.15, n)
    wander = rng.random(n) < 0.2
    at[wander] = rng.uniform(scene.area[:2], scene.area[2:], (wander.sum(), 2))
    way[wander] = rng.uniform(0, 2 * math.pi, wander.sum())
    inside = ((at > scene.area[:2]) & (at < scene.area[2:])).all(1)
    at, way = at[inside], way[inside]

    eye, right, down, forward, focal, frame = view
    x, y, z = np.meshgrid((-0.3, 0.3), (-0.3, 0.3), (0, BODY))
    corners = np.stack([x, y, z], -1).reshape(-1, 3)
    points = np.concatenate([at, 0 * at[:, :1]], 1)[:, None] + corners
    pixels, depth = _project(eye, right, down, forward, focal, points)
    high = np.ptp(pixels[..., 1], axis=1)
    in_view = (np.abs(pixels) < np.array(frame) / 2).all((1, 2)) & (depth > 2).all(1)
    in_view &= (high > HEIGHTS[0] + 2) & (high < HEIGHTS[1] - 10) & (clearance(at, solids) > ROOM)
    in_view &= np.abs(np.diff(pixels[..., 0].reshape(-1, 4, 2).mean(1))[:, 0]) < LEAN * high
    at, way = at[in_view], way[in_view]

    side = right[:2] / np.linalg.norm(right[:2])
    outline = np.array([(s, h) for h in (0.15, 0.6, 1.05, 1.45, 1.7) for s in (-0.2, 0, 0.2)])
    body = np.concatenate([outline[:, :1] * side, outline[:, 1:]], 1)
    points = np.concatenate([at, 0 * at[:, :1]], 1)[:, None] + body
    low, high = (limit(np.append(at, eye[None, :2], axis=0), axis=0) for limit in (np.min, np.max))
    reach = np.hypot(solids[:, 2:3], solids[:, 3:4]) + (high - low) / 2
    between = solids[(np.abs(solids[:, :2] - (low + high) / 2) < reach).all(1)]
    hidden = 1 - visible(eye, points.reshape(-1, 3), between).reshape(-1, len(body)).mean(1)
    spots = np.concatenate([at, way[:, None]], 1)
    return spots[hidden == 0], spots[(hidden > 0.1) & (hidden < 0.55)]


def clearance(at: Array, solids: Array) -> Array:
    """Distance [N] of points [N, 2] to the nearest solid below a person's height, metres; 0 inside one."""
    low = solids[solids[:, 5] < BODY]
    d = at[:, None] - low[:, :2]  # [N, S, 2]
    c, s = np.cos(low[:, 4]), np.sin(low[:, 4])
    along = np.maximum(np.abs(d[..., 0] * c + d[..., 1] * s) - low[:, 2], 0)
    across = np.maximum(np.abs(d[..., 1] * c - d[..., 0] * s) - low[:, 3], 0)
    return np.asarray(np.hypot(along, across).min(1))


def visible(start: Array, end: Array, solids: Array) -> NDArray[np.bool_]:
    """Whether no solid lies between points `start` and `end`, each [N, 3] or [3]; returns [N]."""
    x, y, length, width, yaw, bottom, top = solids.astype(np.float32).T[..., None]  # [S, 1]
    a, b = (np.atleast_2d(v).astype(np.float32).T[:, None] for v in (start, end))  # [3, 1, N]
    c, s = np.cos(yaw), np.sin(yaw)
    enter, leave = np.float32(0), np.float32(1)  # shares of the segment
    for u, v, low, high in (
        ((a[0] - x) * c + (a[1] - y) * s, (b[0] - x) * c + (b[1] - y) * s, -length, length),
        ((a[1] - y) * c - (a[0] - x) * s, (b[1] - y) * c - (b[0] - x) * s, -width, width),
        (a[2], b[2], bottom, top),
    ):
        inverse = 1 / (v - u + np.float32(1e-7))
        t, w = (low - u) * inverse, (high - u) * inverse
        enter, leave = np.maximum(enter, np.minimum(t, w)), np.minimum(leave, np.maximum(t, w))
    return np.asarray(~(enter < leave).any(0))


def _lit(light: Sunlight, spots: Array, solids: Array) -> float:
    """Mean share of the sunlight that reaches the chest of a person at the spots."""
    if not light.shadow or not len(spots):
        return 1.0
    chests = np.concatenate([spots[:40, :2], np.full((len(spots[:40]), 1), 1.2)], 1)
    shaded = 1 - visible(chests, chests + 40 * np.array(light.sun), solids).mean()
    return max(1 - light.shadow * float(shaded), 0.3)  # limits the exposure, so that sunlit surfaces are not all white
