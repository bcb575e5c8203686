"""Synthetic pedestrians: a deterministic person re-identification dataset drawn with numpy and PIL.

A person is a 3-D skeleton of tapered capsules, turned to the camera's viewpoint, projected orthographically and painted
back to front with analytic anti-aliasing. A surface point knows its angle `theta` around its part (0 is the front of
the body) and its distance `v` from the part's start, so a chest print, an open jacket or a hairline lands where the
viewpoint puts it, without a rule for each view. Lengths are fractions of the body height; y points down.

    identity(seed, pid)      body, hair, garments, bag        never depends on the camera
    camera(seed, camid)      viewpoints, light, colour, lens, background
    draw(seed, pid, camid, k, size)   pose, jitter, occlusion of one image, keyed by these numbers alone
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.floating]  # pixels are float32
Point = tuple[float, float, float]  # x to the person's left, y down, z forwards
Material = Callable[[Array, Array, float], Array]  # (theta, v, pixels per unit length) -> RGB in 0..255

_MARKER = "synthetic_persons.json"
_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
_IDENTITY, _CAMERA, _SCENE, _IMAGE = range(4)  # random streams, so that pid 3 and camid 3 share nothing

# Few colours, mostly dark or grey, as in the street: many identities must share them.
_CLOTH = {
    "black": (34, 34, 38, 9), "charcoal": (70, 72, 78, 6), "grey": (130, 132, 136, 6), "white": (222, 221, 216, 7),
    "navy": (38, 48, 86, 7), "denim": (74, 98, 140, 6), "sky": (140, 172, 208, 3), "red": (168, 42, 46, 4),
    "beige": (190, 168, 132, 4), "olive": (92, 96, 62, 3), "brown": (104, 72, 50, 3), "green": (50, 112, 76, 2),
    "pink": (206, 138, 152, 2), "mustard": (204, 158, 56, 2), "purple": (104, 66, 116, 1),
}  # fmt: skip
_COLOURS = np.array([c[:3] for c in _CLOTH.values()], np.float32)
_COMMON = np.array([c[3] for c in _CLOTH.values()]) / sum(c[3] for c in _CLOTH.values())
_SKIN = np.array([(236, 198, 172), (218, 174, 142), (190, 142, 108), (144, 100, 72), (96, 66, 50)], np.float32)
_HAIR = np.array([(28, 24, 24), (54, 38, 30), (96, 66, 42), (176, 138, 84), (150, 148, 146), (132, 60, 36)], np.float32)


@dataclass(frozen=True)
class Cloth:
    """A fabric: two colours and the pattern that mixes them; `size` is the pattern's period."""

    colour: Array
    second: Array
    pattern: str
    size: float
    print: str = "none"


@dataclass(frozen=True)
class Identity:
    """What stays the same in all images of a person."""

    width: float
    legs: float
    shoulders: float
    stride: float
    skin: Array
    hair: str
    hair_colour: Array
    hat: str
    hat_colour: Array
    upper: str
    cloth: Cloth
    inner: Cloth
    lower: str
    lower_cloth: Cloth
    hem: float
    shoes: Array
    bag: str
    bag_colour: Array
    bag_side: int


@dataclass(frozen=True)
class Camera:
    """What all images of a camera have in common."""

    yaws: tuple[float, float]
    pitch: float
    light: float
    ambient: float
    matrix: Array
    gamma: float
    contrast: float
    blur: float
    resolution: float
    noise: float


class Part(NamedTuple):
    """A tapered capsule from `a` to `b`; of two parts that overlap the one of greater `key` is in front."""

    key: float
    a: Point
    b: Point
    radii: tuple[float, float, float]  # at a, half-way and at b
    material: Material
    cap: float = 1.0  # how round the ends are: 1 a half-circle, towards 0 flat


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _pick(rng: np.random.Generator, **weights: float) -> str:
    return list(weights)[np.searchsorted(np.cumsum(list(weights.values())), rng.random() * sum(weights.values()))]


def _shade_of(rng: np.random.Generator, palette: Array, p: Array | None = None, spread: float = 7.0) -> Array:
    colour = palette[rng.choice(len(palette), p=p)]
    return np.clip(colour + rng.normal(0, spread) + rng.normal(0, spread / 2, 3), 8, 246).astype(np.float32)


def _cloth(rng: np.random.Generator, plain: float, **weights: float) -> Cloth:
    colour, second = (_shade_of(rng, _COLOURS, _COMMON) for _ in range(2))
    if np.abs(colour - second).sum() < 120:  # a pattern has to be seen
        second = colour + (90 if colour.sum() < 380 else -90)
    pattern = "plain" if rng.random() < plain else _pick(rng, **weights)
    if pattern == "quilt":
        second = colour * 0.62
    return Cloth(colour, second.astype(np.float32), pattern, rng.uniform(0.032, 0.06))


@lru_cache(4096)
def identity(seed: int, pid: int) -> Identity:
    """The attributes of a person, from `(seed, pid)` alone."""
    rng = _rng(seed, _IDENTITY, pid)
    upper = _pick(rng, tshirt=4, longsleeve=3, jacket=4, hoodie=3, coat=2)
    patterns = dict(stripes=4, pinstripes=1, checks=3, dots=1, yoke=2, band=2, gradient=1, camouflage=1)
    if upper in ("jacket", "hoodie", "coat"):
        patterns = dict(checks=2, yoke=3, band=2, camouflage=1, quilt=4 if upper != "hoodie" else 0, stripes=1)
    cloth = _cloth(rng, 0.45 if upper in ("tshirt", "longsleeve") else 0.55, **patterns)
    if upper in ("tshirt", "longsleeve", "hoodie") and cloth.pattern == "plain" and rng.random() < 0.65:
        cloth = Cloth(cloth.colour, cloth.second, "plain", cloth.size, str(rng.choice(list(_PRINTS))))
    lower = _pick(rng, trousers=9, leggings=2, shorts=3, skirt=2, dress=2 if upper in ("tshirt", "longsleeve") else 0)
    legs = _cloth(rng, 0.66, side=3, checks=1, camouflage=1, pinstripes=1, fade=3)
    return Identity(
        width=rng.uniform(0.88, 1.2),
        legs=rng.uniform(0.455, 0.495),
        shoulders=rng.uniform(0.092, 0.112),
        stride=rng.uniform(0.3, 0.5),
        skin=_shade_of(rng, _SKIN),
        hair=_pick(rng, short=6, bald=1, bob=2, long=3, ponytail=2, bun=1, afro=1),
        hair_colour=_shade_of(rng, _HAIR, np.array([0.34, 0.26, 0.16, 0.12, 0.07, 0.05])),
        hat=_pick(rng, none=8, cap=1.5, beanie=1.2),
        hat_colour=_shade_of(rng, _COLOURS, _COMMON),
        upper=upper,
        cloth=cloth,
        inner=_cloth(rng, 0.6, stripes=2, checks=1, gradient=1),
        lower=lower,
        lower_cloth=cloth if lower == "dress" else legs,
        hem=rng.uniform(0.35, 0.8),
        shoes=_shade_of(rng, _COLOURS, _COMMON),
        bag=_pick(rng, none=4, backpack=3, crossbody=2, handbag=2),
        bag_colour=_shade_of(rng, _COLOURS, _COMMON),
        bag_side=int(rng.choice((-1, 1))),
    )


@lru_cache(256)
def camera(seed: int, camid: int) -> Camera:
    """The viewpoints and the imaging of a camera, from `(seed, camid)` alone."""
    rng = _rng(seed, _CAMERA, camid)
    # Mild casts: with twice as much, colour histograms see the camera and nothing else.
    # Consecutive cameras start from different sides, or a few cameras would often all see fronts.
    yaw = camid * 1.9 + rng.uniform(-0.5, 0.5)
    gains = np.exp(rng.normal(0, 0.028, 3) + rng.normal(0, 0.025))
    saturation, luma = rng.uniform(0.78, 1.05), np.array([0.299, 0.587, 0.114])
    return Camera(
        yaws=(yaw, yaw + rng.choice((math.pi, math.pi / 2, -math.pi / 2))),
        pitch=rng.uniform(0.05, 0.3),
        light=rng.uniform(-0.55, 0.55),
        ambient=rng.uniform(0.5, 0.65),
        matrix=((saturation * np.eye(3) + (1 - saturation) * luma) * gains[:, None]).astype(np.float32),
        gamma=math.exp(rng.normal(0, 0.05)),
        contrast=rng.uniform(0.9, 1.08),
        blur=rng.uniform(0, 0.9),
        resolution=rng.uniform(0.45, 1.0),
        noise=rng.uniform(1.5, 6.0),
    )


# ---- Materials: what colour a surface point has


def _soft(distance: Array, px: float) -> Array:
    return np.clip(distance * px + 0.5, 0, 1)


def _mix(a: Array, b: Array, mask: Array) -> Array:
    return a + mask[..., None] * (b - a)


def _wave(x: Array, period: float) -> Array:
    """The distance of x to the nearest multiple of the period."""
    return np.abs((x + period / 2) % period - period / 2)


# Where a pattern shows its second colour: s and v are lengths around and along the part, z the pattern's size.
_MASKS: dict[str, Callable[[Array, Array, float, float], Array]] = {
    "stripes": lambda s, v, z, px: _soft(_wave(v, z) - z * 0.27, px),
    "pinstripes": lambda s, v, z, px: _soft(0.004 - _wave(s, z * 0.7), px),
    "checks": lambda s, v, z, px: 0.5 * (_soft(_wave(v, z) - z / 4, px) + _soft(_wave(s, z) - z / 4, px)),
    "dots": lambda s, v, z, px: _soft(z * 0.26 - np.hypot(_wave(v, z), _wave(s, z)), px),
    "yoke": lambda s, v, z, px: _soft(z * 2.2 - v, px),
    "band": lambda s, v, z, px: _soft(z * 0.7 - np.abs(v - 0.13), px),
    "gradient": lambda s, v, z, px: np.clip(v * 3.5 - 0.1, 0, 1),
    "camouflage": lambda s, v, z, px: _soft(
        (np.sin(v * 2.6 / z + 3 * np.sin(s * 1.7 / z)) + np.sin(s * 2.9 / z + 2 * np.sin(v / z))) * z * 0.4, px
    ),
    "quilt": lambda s, v, z, px: np.clip(1 - _wave(v, z) / 0.012, 0, 1),
    "side": lambda s, v, z, px: _soft(0.011 - np.abs(np.abs(s) - 0.078), px),  # a quarter turn from a leg's front
    "fade": lambda s, v, z, px: 0.5 * np.clip(1 - np.hypot(s * 17, v * 9 - 1), 0, 1),
}
_PRINTS: dict[str, Callable[[Array, Array], Array]] = {  # distance to the edge of a chest print, positive inside
    "disc": lambda x, y: 0.045 - np.hypot(x, y),
    "box": lambda x, y: 0.036 - np.maximum(np.abs(x) * 0.62, np.abs(y)),
    "bars": lambda x, y: np.minimum(0.055 - np.maximum(np.abs(x), np.abs(y)), 0.009 - _wave(y, 0.034)),
    "triangle": lambda x, y: 0.03 - np.maximum(y, np.abs(x) * 1.1 - y * 0.6),
}


def _fabric(cloth: Cloth, girth: float, chest: bool = False) -> Material:
    """The material of a part of radius about `girth`; `chest` adds the print."""

    def material(theta: Array, v: Array, px: float) -> Array:
        s, colour = theta * girth, cloth.colour
        if cloth.pattern != "plain":
            colour = _mix(colour, cloth.second, _MASKS[cloth.pattern](s, v, cloth.size, px))
        if chest and cloth.print != "none":
            colour = _mix(colour, cloth.second, _soft(_PRINTS[cloth.print](s, v - 0.115), px))
        return colour

    return material


def _plain(colour: Array) -> Material:
    return lambda theta, v, px: colour


def _until(first: Material, then: Material, length: float) -> Material:
    """`first` up to `length` along the part, `then` beyond: a sleeve and the arm that comes out of it."""
    return lambda theta, v, px: _mix(first(theta, v, px), then(theta, v, px), _soft(v - length, px))


def _open_front(outside: Material, inside: Material, opening: float, widening: float) -> Material:
    """A jacket that is open over a shirt, with a seam that shows the edge."""

    def material(theta: Array, v: Array, px: float) -> Array:
        edge = opening + widening * v - np.abs(theta) * 0.1
        coat = outside(theta, v, px) * (1 - 0.35 * _soft(0.006 - np.abs(edge), px))[..., None]
        return _mix(coat, inside(theta, v, px), _soft(edge, px))

    return material


def _strands(colour: Array) -> Material:
    return lambda theta, v, px: colour * (1 + 0.16 * np.sin(theta * 11 + 4 * v) * np.sin(theta * 4.3))[..., None]


def _head(p: Identity) -> Material:
    def material(theta: Array, v: Array, px: float) -> Array:
        side = np.clip(np.abs(theta) - 0.75, 0, 1)
        eyes = _soft(0.006 - np.hypot((np.abs(theta) - 0.42) * 0.04, v - 0.012), px)
        mouth = _soft(0.0035 - np.maximum(np.abs(v - 0.047), np.abs(theta) * 0.04 - 0.012), px)
        face = p.skin * (1 - 0.65 * np.maximum(eyes, 0.5 * mouth))[..., None]
        if p.hair != "bald":  # the hairline sinks from the forehead to the nape
            face = _mix(face, p.hair_colour, _soft(side * 0.075 - 0.02 - v, px))
        return face if p.hat == "none" else _mix(face, p.hat_colour, _soft(-0.012 - v, px))

    return material


# ---- The body


def _parts(p: Identity, rng: np.random.Generator, yaw: float) -> Iterator[Part]:
    """All parts of a person in a random pose of the walk cycle, in body coordinates, keyed by depth."""
    cos, sin, w = math.cos(yaw), math.sin(yaw), p.width

    def depth(point: Point) -> float:
        return point[2] * cos - point[0] * sin

    def across(x: float, z: float) -> float:
        return w * math.hypot(x * cos, z * sin)  # the half-width of an elliptic section as seen

    phase, stride = rng.uniform(0, 2 * math.pi), p.stride * rng.uniform(0.25, 1.1)
    carries = rng.random(2) < 0.14  # an arm bent to hold a phone
    hip_y, shoulder_y = 1 - p.legs - 0.035, 0.185
    skin, shoe = _plain(p.skin), _plain(p.shoes)
    upper, lower = _fabric(p.cloth, 0.04), _fabric(p.lower_cloth, 0.05)
    wide = {"trousers": 1.0, "leggings": 0.84, "shorts": 1.05}.get(p.lower, 0.82)
    thick = 1.25 if p.upper in ("jacket", "hoodie", "coat") else 1.05

    for side in (-1, 1):
        swing = math.sin(phase + (side > 0) * math.pi)
        bend = max(0.0, math.cos(phase + (side > 0) * math.pi)) * stride * 1.7 + 0.06
        angle, hip = swing * stride + 0.04, (side * 0.046 * w, hip_y, 0.0)
        thigh, shank = p.legs * 0.5, p.legs * 0.46
        knee = (hip[0], hip[1] + thigh * math.cos(angle), thigh * math.sin(angle))
        ankle = (hip[0], knee[1] + shank * math.cos(angle - bend), knee[2] + shank * math.sin(angle - bend))
        lift = angle - bend * 0.8
        toe = (hip[0] * 1.15, ankle[1] + 0.024 - 0.05 * math.sin(lift), ankle[2] + 0.085 * math.cos(lift))
        heel = (hip[0], ankle[1] + 0.018, ankle[2] - 0.012)
        legs = {
            "shorts": (_until(lower, skin, thigh * (0.6 + 0.35 * p.hem)), skin),
            "skirt": (skin, skin),
            "dress": (skin, skin),
        }.get(p.lower, (lower, _fabric(p.lower_cloth, 0.05)))
        key = 0.1 * depth(ankle) + 0.1 * depth(hip) - 0.08
        yield Part(key, heel, toe, (0.026, 0.026, 0.019), shoe, 0.8)
        calf, cuff = (0.036 * w**0.5, 0.021) if legs[1] is skin else (0.043 * wide * w**0.5, 0.034 * wide)
        yield Part(key + 1e-4, knee, ankle, (calf, calf, cuff), legs[1], 0.8)
        yield Part(key + 2e-4, hip, knee, (0.066 * wide * w, 0.06 * wide * w, 0.045 * wide * w**0.5), legs[0], 0.8)

        shoulder = (side * p.shoulders * w, shoulder_y + 0.03, -0.005)
        reach, fold = -swing * stride * 0.9, 0.2 + max(0.0, -swing) * stride
        if carries[int(side > 0)]:
            reach, fold = 0.35, 1.75
        elbow = (shoulder[0] + side * 0.018, shoulder[1] + 0.165 * math.cos(reach), 0.165 * math.sin(reach))
        wrist = (elbow[0] - side * 0.008 * (1 + 5 * carries[int(side > 0)]), elbow[1] + 0.135 * math.cos(reach + fold),
                 elbow[2] + 0.135 * math.sin(reach + fold))  # fmt: skip
        fist = (wrist[0], wrist[1] + 0.03 * math.cos(reach + fold), wrist[2] + 0.03 * math.sin(reach + fold))
        key = depth(elbow) + 0.012
        bare = p.upper == "tshirt"
        sleeve = _until(upper, skin, 0.12) if bare else upper
        fore = skin if bare else _fabric(p.cloth, 0.035)
        near = 2e-4 if depth(wrist) > depth(elbow) else -2e-4
        r = 0.025 if bare else 0.026 * thick
        yield Part(key + near * 1.5, wrist, fist, (0.017, 0.019, 0.014), skin)
        yield Part(key + near, elbow, wrist, (r * 1.08, r, r * (0.72 if bare else 0.95)), fore)
        yield Part(key, shoulder, elbow, (0.035 * w**0.5 * thick**0.5, 0.032 * thick**0.5, r * 1.08), sleeve)
        if p.bag == "handbag" and side == p.bag_side and not carries[int(side > 0)]:
            bag = (fist[0] + side * 0.01, fist[1] + 0.06, fist[2])
            bottom = (bag[0], bag[1] + 0.075, bag[2])
            bag_width = math.hypot(0.025 * cos, 0.07 * sin)
            yield Part(key + 0.03, fist, bag, (0.01, 0.012, bag_width * 0.8), _plain(p.bag_colour * 0.7), 0.2)
            yield Part(
                key + 0.031, bag, bottom, (bag_width, bag_width * 1.1, bag_width * 1.15), _plain(p.bag_colour), 0.2
            )

    # Torso and what hangs from it
    top, bottom = (0.0, shoulder_y, 0.0), (0.0, hip_y - 0.005, 0.0)
    if p.upper in ("jacket", "coat"):
        front = _open_front(_fabric(p.cloth, 0.12), _fabric(p.inner, 0.12, True), 0.03, 0.08)
    else:
        front = _fabric(p.cloth, 0.12, True)
    yoke = across(p.shoulders, 0.062)
    waist, hips = across(0.084, 0.066) * thick**0.4, across(0.088, 0.07) * thick**0.4
    yield Part(0.004, top, bottom, (yoke, 2 * waist - (yoke + hips) / 2 * 0.9, hips), front, 0.3)
    yield Part(0.0, (0.0, 0.12, 0.0), (0.0, 0.19, 0.0), (0.03, 0.032, 0.04), skin)
    if p.upper == "coat":
        tail = (0.0, hip_y + 0.1 + 0.12 * p.hem, 0.0)
        long = _open_front(_fabric(p.cloth, 0.12), lower, 0.055, 0.15)
        yield Part(0.003, bottom, tail, (hips, hips * 1.05, hips * 1.12), long, 0.12)
    if p.lower in ("skirt", "dress"):
        hem = (0.0, hip_y + 0.08 + 0.22 * p.hem, 0.0)
        start = (0.0, hip_y - 0.06, 0.0)
        flare = 1.1 + 0.35 * p.hem
        yield Part(0.002, start, hem, (hips * 0.96, hips * 1.08, hips * flare), _fabric(p.lower_cloth, 0.12), 0.12)
    if p.upper == "hoodie":
        hood = across(0.058, 0.04)
        a = (0.0, 0.15, -0.04)
        yield Part(
            depth(a) * 0.6 + 0.006, a, (0.0, 0.185, -0.05), (hood, hood * 1.1, hood), _plain(p.cloth.colour * 0.86), 0.6
        )

    yield from _head_parts(p, depth)
    yield from _bag_parts(p, depth, across)


def _head_parts(p: Identity, depth: Callable[[Point], float]) -> Iterator[Part]:
    hair = _strands(p.hair_colour)
    yield Part(0.01, (0.0, 0.056, 0.005), (0.0, 0.095, 0.012), (0.049, 0.05, 0.037), _head(p))
    nose = (0.0, 0.08, 0.053)
    yield Part(0.01 + depth(nose) * 0.1, (0.0, 0.074, 0.047), nose, (0.006, 0.008, 0.008), _plain(p.skin))
    if p.hair in ("long", "bob"):
        end = (0.0, 0.25 if p.hair == "long" else 0.135, -0.05 if p.hair == "long" else -0.025)
        yield Part(depth(end) * 0.8 + 0.008, (0.0, 0.06, -0.016), end, (0.052, 0.056, 0.045), hair, 0.5)
    elif p.hair == "ponytail":
        tie, end = (0.0, 0.06, -0.05), (0.0, 0.19, -0.075)
        yield Part(depth(end) * 0.8 + 0.008, tie, end, (0.02, 0.024, 0.012), hair)
    elif p.hair == "bun":
        yield Part(depth((0, 0, -0.05)) + 0.012, (0.0, 0.012, -0.03), (0.0, 0.016, -0.035), (0.026, 0.027, 0.026), hair)
    elif p.hair == "afro":
        yield Part(
            depth((0, 0, -0.02)) + 0.009, (0.0, 0.045, -0.012), (0.0, 0.062, -0.014), (0.066, 0.068, 0.062), hair
        )
    if p.hat != "none":
        # The head is painted over the hat's lower half, and wears its colour above the brow.
        yield Part(0.0095, (0.0, 0.028, 0.0), (0.0, 0.03, 0.0), (0.05, 0.051, 0.051), _plain(p.hat_colour))
    if p.hat == "cap":
        base, peak = (0.0, 0.04, 0.03), (0.0, 0.046, 0.1)
        yield Part(depth(peak) * 0.5 + 0.011, base, peak, (0.03, 0.03, 0.02), _plain(p.hat_colour * 0.8), 0.5)


def _bag_parts(p: Identity, depth: Callable[[Point], float], across: Callable[[float, float], float]) -> Iterator[Part]:
    bag, strap = _plain(p.bag_colour), _plain(p.bag_colour * 0.75)
    if p.bag == "backpack":
        a, b = (0.0, 0.23, -0.115), (0.0, 0.4, -0.125)
        width = across(0.085, 0.055) / p.width
        yield Part(depth(a) * 0.8 + 0.01, a, b, (width * 0.85, width, width), bag, 0.35)
        yield Part(depth(a) * 0.8 + 0.02, (0.0, 0.36, -0.15), (0.0, 0.4, -0.15), (width * 0.7,) * 3, strap, 0.3)
        for x in (-0.066, 0.066):
            mid = (x * p.width, 0.2, 0.055)
            yield Part(depth(mid) * 0.8, mid, (x * p.width * 1.1, 0.36, 0.07), (0.012, 0.012, 0.01), strap, 0.5)
    elif p.bag == "crossbody":
        side = p.bag_side * p.width
        hang = (side * 0.115, 0.5, 0.0)
        for z in (-0.062, 0.062):
            a, b = (-side * 0.06, 0.175, z), (side * 0.1, 0.47, z)
            yield Part(depth(a) * 0.5 + depth(b) * 0.5 + 0.001, a, b, (0.009,) * 3, strap)
        width = across(0.03, 0.075)
        yield Part(depth(hang) + 0.04, hang, (hang[0], 0.56, 0.0), (width, width, width * 1.05), bag, 0.25)


class _Canvas:
    """An RGB image in floats on which parts are painted, lit from the left or the right and from above."""

    def __init__(self, pixels: Array, light: float, ambient: float) -> None:
        self.pixels, self.light, self.ambient = pixels, light, ambient

    def paint(self, a: tuple[float, float], b: tuple[float, float], radii: Sequence[float], material: Material,
              px: float, yaw: float = 0.0, cap: float = 1.0, opacity: float = 1.0) -> None:  # fmt: skip
        """Paint a capsule; points and radii in pixels, `px` pixels per unit length."""
        height, width = self.pixels.shape[:2]
        (ax, ay), (bx, by), reach = a, b, max(radii) + 1.5
        left, right = max(0, int(min(ax, bx) - reach)), min(width, int(max(ax, bx) + reach) + 1)
        upper, lower = max(0, int(min(ay, by) - reach)), min(height, int(max(ay, by) + reach) + 1)
        if left >= right or upper >= lower:
            return
        length = max(math.hypot(bx - ax, by - ay), 1e-3)
        ux, uy = (bx - ax) / length, (by - ay) / length
        x = np.arange(left, right, dtype=np.float32) + (0.5 - ax)
        y = np.arange(upper, lower, dtype=np.float32)[:, None] + (0.5 - ay)
        along, off = x * ux + y * uy, x * uy - y * ux
        t = np.clip(along / length, 0, 1)
        r0, bulge = radii[0], 4 * radii[1] - 3 * radii[0] - radii[2]
        radius = np.maximum(r0 + t * (bulge + t * (radii[2] - r0 - bulge)), 0.3)
        over = (along - t * length) / cap
        alpha = np.clip(radius - np.hypot(off, over) + 0.5, 0, 1)
        u, end = np.clip(off / radius, -1, 1), np.clip(over / radius, -1, 1)
        if length > max(radii):  # only balls turn away at their ends, or joints would show dark rings
            end = end * 0.3
        facing = np.sqrt(np.maximum(1 - u * u - end * end, 0))
        if uy < 0:  # drawn upwards: theta still counts from the person's front
            u = -u
        lit = self.ambient + (1.06 - self.ambient) * (facing * 0.9 + u * self.light - 0.35 * end * uy)
        theta = (np.arcsin(u) + (math.pi - yaw)) % (2 * math.pi) - math.pi
        v = along / px
        folds = 1 + 0.05 * np.sin(v * 70 + 2.5 * theta + radii[0])
        colour = material(theta, v, px) * (lit * folds)[..., None]
        region = self.pixels[upper:lower, left:right]
        region += (alpha * opacity)[..., None] * (colour - region)


def _person(canvas: _Canvas, p: Identity, rng: np.random.Generator, yaw: float, pitch: float, x: float, y: float,
            px: float) -> None:  # fmt: skip
    """Paint a person of height `px` whose head's top is at (x, y)."""
    cos, sin = math.cos(yaw), math.sin(yaw)

    def project(point: Point) -> tuple[float, float]:
        d = point[2] * cos - point[0] * sin
        return x + px * (point[0] * cos + point[2] * sin), y + px * (point[1] + d * pitch)

    canvas.paint((x - 0.1 * px, y + 0.985 * px), (x + 0.1 * px, y + 0.985 * px), (0.03 * px, 0.06 * px, 0.03 * px),
                 _plain(np.full(3, 22, np.float32)), px, cap=0.6, opacity=0.4)  # fmt: skip
    for part in sorted(_parts(p, rng, yaw), key=lambda part: part.key):
        radii = [r * px for r in part.radii]
        canvas.paint(project(part.a), project(part.b), radii, part.material, px, yaw, part.cap)


# ---- The surroundings


def _value_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    small = rng.normal(0, 1, (max(2, round(height / cell)), max(2, round(width / cell)))).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@lru_cache(32)
def _scene(seed: int, camid: int, height: int, width: int) -> NDArray[np.uint8]:
    """The wide view of a camera without people, from which images take their backgrounds."""
    rng = _rng(seed, _SCENE, camid)
    tall, wide = round(height * 1.15), width * 5
    horizon = round(tall * rng.uniform(0.3, 0.6))
    ground = _pick(rng, asphalt=3, tiles=3, grass=1, floor=2)
    y, x = np.arange(tall, dtype=np.float32)[:, None], np.arange(wide, dtype=np.float32)
    unit = height / 256
    grain = _value_noise(rng, tall, wide, 3 * unit) * 4 + _value_noise(rng, tall, wide, 40 * unit) * 8
    upper, start = np.empty((tall, wide, 3), np.float32), 0
    while start < wide:  # stretches of different walls, so that a camera does not give itself away by one colour
        stretch = slice(start, start := start + round(width * rng.uniform(0.5, 1.6)))
        wall, tone = _pick(rng, bricks=2, plain=3, hedge=1, boards=1), rng.uniform(70, 205) + rng.normal(0, 9, 3)
        there = x[stretch]
        joint: Array = np.zeros((1, 1), np.float32)
        if wall == "bricks":
            row = np.floor(y / (9 * unit))
            joint = np.maximum(
                _wave(y, 9 * unit) < 0.8 * unit, _wave(there + row % 2 * 12 * unit, 24 * unit) < 0.8 * unit
            )
            tone = tone * (1.04, 0.88, 0.78)
        elif wall == "boards":
            joint = (_wave(there, 13 * unit) < unit) * 1.0
        elif wall == "hedge":
            joint, tone = (
                0.9 * _value_noise(rng, tall, len(there), 6 * unit),
                np.array((76, 100, 62)) * rng.uniform(0.8, 1.3),
            )
        upper[:, stretch] = tone * (1 - 0.25 * joint)[..., None]
    picture = Image.fromarray(np.clip(upper + grain[..., None], 0, 255).astype(np.uint8))
    pen, at = ImageDraw.Draw(picture), 0.0
    while at < wide:  # vertical structures: windows, doors, posts
        span, step = rng.uniform(3, 12) if rng.random() < 0.3 else rng.uniform(25, 80), rng.uniform(10, 70) * unit
        fill = np.clip(rng.uniform(25, 220) + rng.normal(0, 9, 3), 0, 255)
        box = (
            at,
            rng.uniform(-0.1, 0.25) * tall,
            at + span * unit,
            horizon - rng.choice((0, rng.uniform(0, 0.15))) * tall,
        )
        if box[3] > box[1]:
            pen.rectangle(box, tuple(int(c) for c in fill), tuple(int(c * 0.6) for c in fill), max(1, round(2 * unit)))
        at += span * unit + step
    below = np.maximum(y - horizon, 1) / (tall - horizon)
    base = rng.uniform(105, 145) + rng.normal(0, 4, 3)
    lower = np.broadcast_to(base.astype(np.float32), (tall, wide, 3)) * (0.85 + 0.25 * below)[..., None]
    if ground == "grass":
        lower = lower * np.array((0.72, 0.95, 0.5)) + 2 * grain[..., None]
    elif ground == "tiles":
        away = 1 / (below + 0.25)
        joint = np.maximum(_wave(away * 5, 1) < 0.06, _wave((x - wide / 2) * away / (26 * unit), 1) < 0.05 * away)
        lower = lower * (1 - 0.2 * joint)[..., None]
    elif ground == "floor":
        lower = lower * (1 + 0.25 * np.exp(-((_wave(x, 130 * unit) / (25 * unit)) ** 2)) * (1 - below))[..., None]
    sun = 1 + 0.22 * np.sin(2.2 * _value_noise(rng, 2, wide, width / 2)[0])  # patches of sunlight and of shadow
    lower = lower * sun[:, None] + grain[..., None]
    mixed = np.where((y < horizon)[..., None], np.asarray(picture, np.float32), lower)
    mixed[max(0, horizon - round(2 * unit)) : horizon] *= 0.7
    blurred = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.1 * unit))
    return np.asarray(blurred)


@lru_cache(4)
def _grain(height: int, width: int) -> Array:
    """Noise of standard deviation 1, shared by all images: each takes a window at random, which is far cheaper."""
    return _rng(7).normal(0, 1, (2 * height, 2 * width, 3)).astype(np.float32)


def _occlude(canvas: _Canvas, rng: np.random.Generator, height: int, width: int) -> None:
    """Put a pole, a car or a plant in front of the person."""
    kind, dark = _pick(rng, pole=3, car=2, plant=3), rng.uniform(30, 150)
    tint = np.clip(dark + rng.normal(0, 9, 3), 10, 230).astype(np.float32)
    if kind == "pole":
        x, r = rng.uniform(0.05, 0.95) * width, rng.uniform(0.02, 0.07) * width
        canvas.paint((x, -5), (x, height + 5), (r, r, r), _plain(tint), height)
    elif kind == "car":
        y, side = height * rng.uniform(0.8, 0.93), rng.choice((-1, 1))
        start = width * (0.5 + side * rng.uniform(-0.1, 0.4))
        r = height - y + 4
        canvas.paint(
            (start, y + r), (start + side * 2 * width, y + r), (r, r * 1.2, r * 1.2), _plain(tint), height, cap=0.8
        )
    else:
        x, green = rng.uniform(-0.05, 1.05) * width, np.array((52, 88, 40), np.float32) + rng.normal(0, 10, 3)
        for _ in range(14):
            angle, reach = rng.normal(0, 0.55), rng.uniform(0.15, 0.42) * height
            tip = (x + math.sin(angle) * reach, height - math.cos(angle) * reach)
            leaf = _plain((green * rng.uniform(0.6, 1.3)).astype(np.float32))
            canvas.paint((x, height + 2.0), tip, (0.004 * height, 0.02 * height, 0.003 * height), leaf, height)


def draw(seed: int, pid: int, camid: int, k: int, size: tuple[int, int] = (256, 128)) -> Image.Image:
    """The k-th image of a person in a camera, `size` is (height, width); the arguments alone determine the pixels."""
    height, width = size
    rng, cam = _rng(seed, _IMAGE, pid, camid, k), camera(seed, camid)
    scene = _scene(seed, camid, height, width)
    top, left = rng.integers(scene.shape[0] - height), rng.integers(scene.shape[1] - width)
    canvas = _Canvas(scene[top : top + height, left : left + width].astype(np.float32), cam.light, cam.ambient)

    px = height * rng.uniform(0.84, 0.95) if rng.random() < 0.85 else height * rng.uniform(0.95, 1.12)
    x, y = width * rng.normal(0.5, 0.05), (height - px) * rng.uniform(0.2, 0.8)
    if rng.random() < 0.16:
        other = identity(seed, int(rng.integers(1 << 40, 1 << 41)))  # nobody of the dataset
        aside = x + rng.choice((-1, 1)) * width * rng.uniform(0.3, 0.55)
        where, scale = (aside, y + px * rng.uniform(-0.05, 0.02)), rng.uniform(0.8, 0.98)
    else:
        other = None
    yaw = cam.yaws[int(rng.random() < 0.3)] + rng.normal(0, 0.3)
    behind = rng.random() < 0.7
    if other and behind:
        _person(canvas, other, rng, yaw + rng.normal(0, 1), cam.pitch, *where, px * scale)
    _person(canvas, identity(seed, pid), rng, yaw, cam.pitch, x, y, px)
    if other and not behind:
        _person(canvas, other, rng, yaw + rng.normal(0, 1), cam.pitch, aside, y + 0.1 * px, px)
    if rng.random() < 0.18:
        _occlude(canvas, rng, height, width)
    return _expose(canvas.pixels, cam, rng)


def _expose(pixels: Array, cam: Camera, rng: np.random.Generator) -> Image.Image:
    """What the camera makes of the light: colour, tone curve, resolution, blur, noise."""
    height, width = pixels.shape[:2]
    left, right = rng.uniform(0.86, 1.14, 2)
    pixels *= np.linspace(left, right, width, dtype=np.float32)[:, None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    gains = cam.matrix * np.exp(rng.normal(0, 0.025, 3) + rng.normal(0, 0.11))[:, None]
    image = image.convert("RGB", tuple(float(g) for row in gains for g in (*row, 0.0)))
    level = np.linspace(0, 1, 256)
    curve = np.clip((level**cam.gamma - 0.45) * cam.contrast + 0.45, 0.015, 0.99) * 255
    image = image.point([int(c) for c in curve] * 3)
    scale = cam.resolution * rng.uniform(0.8, 1.0)
    if scale < 0.85:
        small = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
        image = small.resize((width, height), Image.Resampling.BILINEAR)
    if cam.blur * height / 256 > 0.3:
        image = image.filter(ImageFilter.BoxBlur(cam.blur * height / 256))
    grain, (dy, dx) = _grain(height, width), rng.integers((height, width))
    noisy = np.asarray(image) + cam.noise * grain[dy : dy + height, dx : dx + width]
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


# ---- The dataset


def _at_least(lowest: int, **given: int) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < lowest:
            raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")


class SyntheticPersons:
    """A map-style dataset of `(image, pid, camid)`: a PIL RGB image and two labels that count from 0.

    Args:
        num_ids: Number of identities; their pids are `first_id` to `first_id + num_ids - 1`.
        images_per_id: Images of each identity, spread over the cameras in turn.
        cameras: Number of cameras.
        seed: Chooses the world: the same pid or camid with another seed is someone or somewhere else.
        size: (height, width) of the images in pixels.
        first_id: The first pid, to get identities that no other part of the world holds.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, num_ids: int, images_per_id: int = 8, cameras: int = 4, seed: int = 0,
                 size: tuple[int, int] = (256, 128), first_id: int = 0) -> None:  # fmt: skip
        _at_least(1, num_ids=num_ids, images_per_id=images_per_id, cameras=cameras)
        _at_least(0, seed=seed, first_id=first_id)
        if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 16:
            raise ValueError(f"size must be (height, width) of at least 16 pixels each, got {size!r}")
        self.num_ids, self.images_per_id, self.cameras = int(num_ids), int(images_per_id), int(cameras)
        self.seed, self.first_id, self.size = int(seed), int(first_id), (int(size[0]), int(size[1]))

    def __len__(self) -> int:
        return self.num_ids * self.images_per_id

    def _key(self, index: int) -> tuple[int, int, int]:
        who, nth = divmod(index, self.images_per_id)
        return self.first_id + who, nth % self.cameras, nth // self.cameras  # pid, camid, k

    @property
    def pids(self) -> list[int]:
        """The identity of every image."""
        return [self._key(i)[0] for i in range(len(self))]

    @property
    def camids(self) -> list[int]:
        """The camera of every image."""
        return [self._key(i)[1] for i in range(len(self))]

    def __getitem__(self, index: int) -> tuple[Image.Image, int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        pid, camid, k = self._key(int(index) % len(self))
        return draw(self.seed, pid, camid, k, self.size), pid, camid

    def write_market1501(self, root: str | os.PathLike[str], train_ids: int | None = None, distractors: int = 0,
                         workers: int = 0, quality: int = 92) -> Path:  # fmt: skip
        """Write the images as JPEG files in the layout of Market-1501, and return the folder.

        Names are `PPPP_cCsS_FFFFFF_NN.jpg`, with PPPP the pid + 1 and C the camid + 1. Each test identity has one query
        image a camera, its other images are the gallery. The folder appears at once, complete.

        Args:
            root: A folder that does not exist, is empty, or was written by this method (it is replaced).
            train_ids: The first so many identities train, the others test; by default half.
            distractors: Gallery images of people who are in no query, with pid 0000.
            workers: Processes that draw; 0 draws in this one.
            quality: Of the JPEG files.

        Raises:
            ValueError: If some queries would have no match in another camera, or an argument is out of range.
            FileExistsError: If the folder holds anything else.
        """
        train_ids = self.num_ids // 2 if train_ids is None else train_ids
        _at_least(0, train_ids=train_ids, distractors=distractors, workers=workers)
        if train_ids > self.num_ids:
            raise ValueError(f"train_ids must be between 0 and num_ids = {self.num_ids}, got {train_ids}")
        if not 2 <= self.cameras <= 9 or self.images_per_id < self.cameras + 2:
            raise ValueError(
                "the Market-1501 layout takes 2 to 9 cameras and images_per_id of at least cameras + 2 (queries and a"
                f" gallery of two cameras), got cameras={self.cameras} and images_per_id={self.images_per_id}"
            )
        root = Path(root)
        self._check_own(root)
        jobs = list(self._jobs(train_ids, distractors))
        root.parent.mkdir(parents=True, exist_ok=True)
        unfinished, old = (root.parent / f".{root.name}.{os.getpid()}.{state}" for state in ("unfinished", "old"))
        try:
            for folder in _FOLDERS:
                (unfinished / folder).mkdir(parents=True)
            save = partial(_save, self.seed, self.size, unfinished, quality)
            if workers > 0:
                with ProcessPoolExecutor(workers) as pool:
                    list(pool.map(save, jobs, chunksize=16))
            else:
                list(map(save, jobs))
            recipe = {**vars(self), "train_ids": train_ids, "distractors": distractors, "images": len(jobs)}
            (unfinished / _MARKER).write_text(json.dumps(recipe, indent=2) + "\n")
            if root.exists():
                root.rename(old)
            unfinished.rename(root)
        finally:
            for leftover in (unfinished, old):
                shutil.rmtree(leftover, ignore_errors=True)
        return root

    def _check_own(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise FileExistsError(f"{root} is a file; give a folder that is new, empty or was written by this method")
        names = {path.name for path in root.iterdir()} if root.exists() else set()
        if names and (_MARKER not in names or names - {*_FOLDERS, _MARKER}):
            raise FileExistsError(
                f"{root} holds files that write_market1501 did not write; give a new or an empty folder"
            )

    def _jobs(self, train_ids: int, distractors: int) -> Iterator[tuple[int, int, int, str]]:
        """(pid, camid, k, file) of every image to write."""
        for i in range(len(self)):
            pid, camid, k = self._key(i)
            folder = (
                "bounding_box_train" if pid - self.first_id < train_ids else ("bounding_box_test" if k else "query")
            )
            yield pid, camid, k, f"{folder}/{pid + 1:04d}_c{camid + 1}s1_{k:06d}_01.jpg"
        for i in range(distractors):
            camid = i % self.cameras
            yield (1 << 42) + i, camid, 0, f"bounding_box_test/0000_c{camid + 1}s1_{i:06d}_01.jpg"


def _save(seed: int, size: tuple[int, int], root: Path, quality: int, job: tuple[int, int, int, str]) -> None:
    pid, camid, k, file = job
    draw(seed, pid, camid, k, size).save(root / file, quality=quality)


def contact_sheet(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Paste images of one size, row by row, into one picture to look at."""
    if not images or columns < 1:
        raise ValueError(f"contact_sheet takes at least one image and one column, got {len(images)} and {columns}")
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + 2), i // columns * (height + 2)))
    return sheet
