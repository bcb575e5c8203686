"""The pedestrian: materials, the parts of the body, and the canvas that paints them."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from passreid_models.synthetic.attributes import Array, Cloth, Identity

Point = tuple[float, float, float]  # x to the person's left, y down, z forwards
Material = Callable[[Array, Array, float], Array]  # (theta, v, pixels per unit length) -> RGB in 0..255


class Part(NamedTuple):
    """A tapered capsule from `a` to `b`; of two parts that overlap the one of greater `key` is in front."""

    key: float
    a: Point
    b: Point
    radii: tuple[float, float, float]  # at a, half-way and at b
    material: Material
    cap: float = 1.0  # how round the ends are: 1 a half-circle, towards 0 flat


# ---- Materials: what colour a surface point has


def _soft(distance: Array, px: float) -> Array:
    return np.clip(distance * px + 0.5, 0, 1)


def _mix(a: Array, b: Array, mask: Array) -> Array:
    return a + mask[..., None] * (b - a)


def wave(x: Array, period: float) -> Array:
    """The distance of x to the nearest multiple of the period."""
    return np.abs((x + period / 2) % period - period / 2)


# Where a pattern shows its second colour: s and v are lengths around and along the part, z the pattern's size.
_MASKS: dict[str, Callable[[Array, Array, float, float], Array]] = {
    "stripes": lambda s, v, z, px: _soft(wave(v, z) - z * 0.27, px),
    "pinstripes": lambda s, v, z, px: _soft(0.004 - wave(s, z * 0.7), px),
    "checks": lambda s, v, z, px: 0.5 * (_soft(wave(v, z) - z / 4, px) + _soft(wave(s, z) - z / 4, px)),
    "dots": lambda s, v, z, px: _soft(z * 0.26 - np.hypot(wave(v, z), wave(s, z)), px),
    "yoke": lambda s, v, z, px: _soft(z * 2.2 - v, px),
    "band": lambda s, v, z, px: _soft(z * 0.7 - np.abs(v - 0.13), px),
    "gradient": lambda s, v, z, px: np.clip(v * 3.5 - 0.1, 0, 1),
    "camouflage": lambda s, v, z, px: _soft(
        (np.sin(v * 2.6 / z + 3 * np.sin(s * 1.7 / z)) + np.sin(s * 2.9 / z + 2 * np.sin(v / z))) * z * 0.4, px
    ),
    "quilt": lambda s, v, z, px: np.clip(1 - wave(v, z) / 0.012, 0, 1),
    "side": lambda s, v, z, px: _soft(0.011 - np.abs(np.abs(s) - 0.078), px),  # a quarter turn from a leg's front
    "fade": lambda s, v, z, px: 0.5 * np.clip(1 - np.hypot(s * 17, v * 9 - 1), 0, 1),
}
_PRINTS: dict[str, Callable[[Array, Array], Array]] = {  # distance to the edge of a chest print, positive inside
    "disc": lambda x, y: 0.045 - np.hypot(x, y),
    "box": lambda x, y: 0.036 - np.maximum(np.abs(x) * 0.62, np.abs(y)),
    "bars": lambda x, y: np.minimum(0.055 - np.maximum(np.abs(x), np.abs(y)), 0.009 - wave(y, 0.034)),
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


def plain(colour: Array) -> Material:
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
    skin, shoe = plain(p.skin), plain(p.shoes)
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
            yield Part(key + 0.03, fist, bag, (0.01, 0.012, bag_width * 0.8), plain(p.bag_colour * 0.7), 0.2)
            yield Part(
                key + 0.031, bag, bottom, (bag_width, bag_width * 1.1, bag_width * 1.15), plain(p.bag_colour), 0.2
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
            depth(a) * 0.6 + 0.006, a, (0.0, 0.185, -0.05), (hood, hood * 1.1, hood), plain(p.cloth.colour * 0.86), 0.6
        )

    yield from _head_parts(p, depth)
    yield from _bag_parts(p, depth, across)


def _head_parts(p: Identity, depth: Callable[[Point], float]) -> Iterator[Part]:
    hair = _strands(p.hair_colour)
    yield Part(0.01, (0.0, 0.056, 0.005), (0.0, 0.095, 0.012), (0.049, 0.05, 0.037), _head(p))
    nose = (0.0, 0.08, 0.053)
    yield Part(0.01 + depth(nose) * 0.1, (0.0, 0.074, 0.047), nose, (0.006, 0.008, 0.008), plain(p.skin))
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
        yield Part(0.0095, (0.0, 0.028, 0.0), (0.0, 0.03, 0.0), (0.05, 0.051, 0.051), plain(p.hat_colour))
    if p.hat == "cap":
        base, peak = (0.0, 0.04, 0.03), (0.0, 0.046, 0.1)
        yield Part(depth(peak) * 0.5 + 0.011, base, peak, (0.03, 0.03, 0.02), plain(p.hat_colour * 0.8), 0.5)


def _bag_parts(p: Identity, depth: Callable[[Point], float], across: Callable[[float, float], float]) -> Iterator[Part]:
    bag, strap = plain(p.bag_colour), plain(p.bag_colour * 0.75)
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


class Canvas:
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


def paint_person(canvas: Canvas, p: Identity, rng: np.random.Generator, yaw: float, pitch: float, x: float, y: float,
            px: float) -> None:  # fmt: skip
    """Paint a person of height `px` whose head's top is at (x, y)."""
    cos, sin = math.cos(yaw), math.sin(yaw)

    def project(point: Point) -> tuple[float, float]:
        d = point[2] * cos - point[0] * sin
        return x + px * (point[0] * cos + point[2] * sin), y + px * (point[1] + d * pitch)

    canvas.paint((x - 0.1 * px, y + 0.985 * px), (x + 0.1 * px, y + 0.985 * px), (0.03 * px, 0.06 * px, 0.03 * px),
                 plain(np.full(3, 22, np.float32)), px, cap=0.6, opacity=0.4)  # fmt: skip
    for part in sorted(_parts(p, rng, yaw), key=lambda part: part.key):
        radii = [r * px for r in part.radii]
        canvas.paint(project(part.a), project(part.b), radii, part.material, px, yaw, part.cap)
