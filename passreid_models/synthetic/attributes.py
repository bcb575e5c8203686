"""Who is drawn and through which camera: attributes as functions of the seed and a number."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]  # pixels are float32

PRINTS = ("disc", "box", "bars", "triangle")  # on the chest
IDENTITY, CAMERA, SCENE, IMAGE = range(4)  # random streams, so that pid 3 and camid 3 share nothing

# Few colours, mostly dark or grey, as in the street: many identities must share them.
_CLOTH = {
    "black": (34, 34, 38, 9), "charcoal": (70, 72, 78, 6), "grey": (130, 132, 136, 6), "white": (222, 221, 216, 7),
    "navy": (38, 48, 86, 7), "denim": (74, 98, 140, 6), "sky": (140, 172, 208, 3), "red": (168, 42, 46, 4),
    "beige": (190, 168, 132, 4), "olive": (92, 96, 62, 3), "brown": (104, 72, 50, 3), "green": (50, 112, 76, 2),
    "pink": (206, 138, 152, 2), "mustard": (204, 158, 56, 2), "purple": (104, 66, 116, 1),
}  # fmt: skip
_COLOURS = np.array([c[:3] for c in _CLOTH.values()], np.float32)
_COMMON = np.array([c[3] for c in _CLOTH.values()]) / sum(c[3] for c in _CLOTH.values())
_RARE = (1 / _COMMON) / (1 / _COMMON).sum()  # in summer
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


def stream(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def pick(rng: np.random.Generator, **weights: float) -> str:
    return list(weights)[np.searchsorted(np.cumsum(list(weights.values())), rng.random() * sum(weights.values()))]


def _shade_of(rng: np.random.Generator, palette: Array, p: Array | None = None, spread: float = 7.0) -> Array:
    colour = palette[rng.choice(len(palette), p=p)]
    return np.clip(colour + rng.normal(0, spread) + rng.normal(0, spread / 2, 3), 8, 246).astype(np.float32)


def _cloth(rng: np.random.Generator, common: Array, plain: float, **weights: float) -> Cloth:
    colour, second = (_shade_of(rng, _COLOURS, common) for _ in range(2))
    if np.abs(colour - second).sum() < 120:  # a pattern has to be seen
        second = colour + (90 if colour.sum() < 380 else -90)
    pattern = "plain" if rng.random() < plain else pick(rng, **weights)
    if pattern == "quilt":
        second = colour * 0.62
    return Cloth(colour, second.astype(np.float32), pattern, rng.uniform(0.032, 0.06))


@lru_cache(4096)
def identity(seed: int, pid: int, summer: bool = False) -> Identity:
    """The attributes of a person, from the arguments alone; in `summer` bright colours are the common ones."""
    rng, common = stream(seed, IDENTITY, pid), _RARE if summer else _COMMON
    upper = pick(rng, tshirt=4, longsleeve=3, jacket=4, hoodie=3, coat=2)
    patterns = dict(stripes=4, pinstripes=1, checks=3, dots=1, yoke=2, band=2, gradient=1, camouflage=1)
    if upper in ("jacket", "hoodie", "coat"):
        patterns = dict(checks=2, yoke=3, band=2, camouflage=1, quilt=4 if upper != "hoodie" else 0, stripes=1)
    cloth = _cloth(rng, common, 0.45 if upper in ("tshirt", "longsleeve") else 0.55, **patterns)
    if upper in ("tshirt", "longsleeve", "hoodie") and cloth.pattern == "plain" and rng.random() < 0.65:
        cloth = Cloth(cloth.colour, cloth.second, "plain", cloth.size, str(rng.choice(PRINTS)))
    lower = pick(rng, trousers=9, leggings=2, shorts=3, skirt=2, dress=2 if upper in ("tshirt", "longsleeve") else 0)
    legs = _cloth(rng, common, 0.66, side=3, checks=1, camouflage=1, pinstripes=1, fade=3)
    return Identity(
        width=rng.uniform(0.88, 1.2),
        legs=rng.uniform(0.455, 0.495),
        shoulders=rng.uniform(0.092, 0.112),
        stride=rng.uniform(0.3, 0.5),
        skin=_shade_of(rng, _SKIN),
        hair=pick(rng, short=6, bald=1, bob=2, long=3, ponytail=2, bun=1, afro=1),
        hair_colour=_shade_of(rng, _HAIR, np.array([0.34, 0.26, 0.16, 0.12, 0.07, 0.05])),
        hat=pick(rng, none=8, cap=1.5, beanie=1.2),
        hat_colour=_shade_of(rng, _COLOURS, common),
        upper=upper,
        cloth=cloth,
        inner=_cloth(rng, common, 0.6, stripes=2, checks=1, gradient=1),
        lower=lower,
        lower_cloth=cloth if lower == "dress" else legs,
        hem=rng.uniform(0.35, 0.8),
        shoes=_shade_of(rng, _COLOURS, common),
        bag=pick(rng, none=4, backpack=3, crossbody=2, handbag=2),
        bag_colour=_shade_of(rng, _COLOURS, common),
        bag_side=int(rng.choice((-1, 1))),
    )


@lru_cache(256)
def camera(seed: int, camid: int) -> Camera:
    """The viewpoints and the imaging of a camera, from `(seed, camid)` alone."""
    rng = stream(seed, CAMERA, camid)
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
