"""One image: surroundings, occluders, a pedestrian among them, and the camera's exposure."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from passreid_models.synthetic.attributes import IMAGE, SCENE, Array, Camera, camera, identity, pick, stream
from passreid_models.synthetic.body import Canvas, paint_person, plain, wave

PLACES = ("street", "studio", "summer")
WARM = np.array((1.14, 1.02, 0.84))[:, None]  # the light of summer


def _value_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    small = rng.normal(0, 1, (max(2, round(height / cell)), max(2, round(width / cell)))).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@lru_cache(32)
def _scene(seed: int, camid: int, height: int, width: int) -> NDArray[np.uint8]:
    """The wide view of a camera without people, from which images take their backgrounds."""
    rng = stream(seed, SCENE, camid)
    tall, wide = round(height * 1.15), width * 5
    horizon = round(tall * rng.uniform(0.3, 0.6))
    ground = pick(rng, asphalt=3, tiles=3, grass=1, floor=2)
    y, x = np.arange(tall, dtype=np.float32)[:, None], np.arange(wide, dtype=np.float32)
    unit = height / 256
    grain = _value_noise(rng, tall, wide, 3 * unit) * 4 + _value_noise(rng, tall, wide, 40 * unit) * 8
    upper, start = np.empty((tall, wide, 3), np.float32), 0
    while start < wide:  # stretches of different walls, so that a camera does not give itself away by one colour
        stretch = slice(start, start := start + round(width * rng.uniform(0.5, 1.6)))
        wall, tone = pick(rng, bricks=2, plain=3, hedge=1, boards=1), rng.uniform(70, 205) + rng.normal(0, 9, 3)
        there = x[stretch]
        joint: Array = np.zeros((1, 1), np.float32)
        if wall == "bricks":
            row = np.floor(y / (9 * unit))
            joint = np.maximum(
                wave(y, 9 * unit) < 0.8 * unit, wave(there + row % 2 * 12 * unit, 24 * unit) < 0.8 * unit
            )
            tone = tone * (1.04, 0.88, 0.78)
        elif wall == "boards":
            joint = (wave(there, 13 * unit) < unit) * 1.0
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
        joint = np.maximum(wave(away * 5, 1) < 0.06, wave((x - wide / 2) * away / (26 * unit), 1) < 0.05 * away)
        lower = lower * (1 - 0.2 * joint)[..., None]
    elif ground == "floor":
        lower = lower * (1 + 0.25 * np.exp(-((wave(x, 130 * unit) / (25 * unit)) ** 2)) * (1 - below))[..., None]
    sun = 1 + 0.22 * np.sin(2.2 * _value_noise(rng, 2, wide, width / 2)[0])  # patches of sunlight and of shadow
    lower = lower * sun[:, None] + grain[..., None]
    mixed = np.where((y < horizon)[..., None], np.asarray(picture, np.float32), lower)
    mixed[max(0, horizon - round(2 * unit)) : horizon] *= 0.7
    blurred = Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.1 * unit))
    return np.asarray(blurred)


@lru_cache(4)
def _grain(height: int, width: int) -> Array:
    """Noise of standard deviation 1, shared by all images: each takes a window at random, which is far cheaper."""
    return stream(7).normal(0, 1, (2 * height, 2 * width, 3)).astype(np.float32)


def _occlude(canvas: Canvas, rng: np.random.Generator, height: int, width: int) -> None:
    """Put a pole, a car or a plant in front of the person."""
    kind, dark = pick(rng, pole=3, car=2, plant=3), rng.uniform(30, 150)
    tint = np.clip(dark + rng.normal(0, 9, 3), 10, 230).astype(np.float32)
    if kind == "pole":
        x, r = rng.uniform(0.05, 0.95) * width, rng.uniform(0.02, 0.07) * width
        canvas.paint((x, -5), (x, height + 5), (r, r, r), plain(tint), height)
    elif kind == "car":
        y, side = height * rng.uniform(0.8, 0.93), rng.choice((-1, 1))
        start = width * (0.5 + side * rng.uniform(-0.1, 0.4))
        r = height - y + 4
        canvas.paint(
            (start, y + r), (start + side * 2 * width, y + r), (r, r * 1.2, r * 1.2), plain(tint), height, cap=0.8
        )
    else:
        x, green = rng.uniform(-0.05, 1.05) * width, np.array((52, 88, 40), np.float32) + rng.normal(0, 10, 3)
        for _ in range(14):
            angle, reach = rng.normal(0, 0.55), rng.uniform(0.15, 0.42) * height
            tip = (x + math.sin(angle) * reach, height - math.cos(angle) * reach)
            leaf = plain((green * rng.uniform(0.6, 1.3)).astype(np.float32))
            canvas.paint((x, height + 2.0), tip, (0.004 * height, 0.02 * height, 0.003 * height), leaf, height)


@lru_cache(32)
def _backdrop(seed: int, camid: int, height: int, width: int) -> NDArray[np.uint8]:
    """The wide view of a studio: gray, with a faint structure."""
    tall, wide = round(height * 1.15), width * 5
    gray = 122 + 5 * _value_noise(stream(seed, SCENE, camid), tall, wide, 12 * height / 256)
    return np.repeat(np.clip(gray, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def draw(
    seed: int, pid: int, camid: int, k: int, size: tuple[int, int] = (256, 128), place: str = "street"
) -> Image.Image:
    """The k-th image of a person in a camera, `size` is (height, width); the arguments alone determine the pixels.

    In a `studio` all cameras have a gray backdrop and an exposure that changes nothing. The person, viewpoint, pose and
    light still differ between images, and who or what stands beside and before. `summer` is a street in warm light
    where bright clothes are common: another domain.
    """
    (height, width), summer = size, place == "summer"
    rng, cam = stream(seed, IMAGE, pid, camid, k), camera(seed, camid)
    scene = (_backdrop if place == "studio" else _scene)(seed, camid, height, width)
    top, left = rng.integers(scene.shape[0] - height), rng.integers(scene.shape[1] - width)
    canvas = Canvas(scene[top : top + height, left : left + width].astype(np.float32), cam.light, cam.ambient)

    px = height * rng.uniform(0.84, 0.95) if rng.random() < 0.85 else height * rng.uniform(0.95, 1.12)
    x, y = width * rng.normal(0.5, 0.05), (height - px) * rng.uniform(0.2, 0.8)
    if rng.random() < 0.16:
        other = identity(seed, int(rng.integers(1 << 40, 1 << 41)), summer)  # nobody of the dataset
        aside = x + rng.choice((-1, 1)) * width * rng.uniform(0.3, 0.55)
        where, scale = (aside, y + px * rng.uniform(-0.05, 0.02)), rng.uniform(0.8, 0.98)
    else:
        other = None
    yaw = cam.yaws[int(rng.random() < 0.3)] + rng.normal(0, 0.3)
    behind = rng.random() < 0.7
    if other and behind:
        paint_person(canvas, other, rng, yaw + rng.normal(0, 1), cam.pitch, *where, px * scale)
    paint_person(canvas, identity(seed, pid, summer), rng, yaw, cam.pitch, x, y, px)
    if other and not behind:
        paint_person(canvas, other, rng, yaw + rng.normal(0, 1), cam.pitch, aside, y + 0.1 * px, px)
    if rng.random() < 0.18:
        _occlude(canvas, rng, height, width)
    if place == "studio":
        return Image.fromarray(np.clip(canvas.pixels, 0, 255).astype(np.uint8))
    return _expose(canvas.pixels, cam, rng, WARM if summer else 1.0)


def _expose(pixels: Array, cam: Camera, rng: np.random.Generator, tint: Array | float) -> Image.Image:
    """What the camera makes of the light: colour, tone curve, resolution, blur, noise."""
    height, width = pixels.shape[:2]
    left, right = rng.uniform(0.86, 1.14, 2)
    pixels *= np.linspace(left, right, width, dtype=np.float32)[:, None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    gains = tint * cam.matrix * np.exp(rng.normal(0, 0.025, 3) + rng.normal(0, 0.11))[:, None]
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
