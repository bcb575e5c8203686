"""The sensor: from radiance to the stored JPEG crop."""

import io

import numpy as np
from PIL import Image, ImageFilter

from passreid_synth3d.light import Imaging
from passreid_synth3d.mesh import Array

__all__ = ["develop"]


def develop(rng: np.random.Generator, radiance: Array, camera: Imaging, size: tuple[int, int]) -> Image.Image:
    """Turn radiance [rows, columns, 3], at the sensor's resolution, into the stored crop of `size` (height, width).

    In this order: exposure, colours, tone, haze, motion blur, noise, lens blur, sharpening, JPEG compression, resize.
    """
    gains = np.asarray(camera.gains) * camera.exposure * np.exp(rng.normal(0, 0.08) + rng.normal(0, 0.012, 3))
    light = radiance * gains
    gray = light @ (0.2126, 0.7152, 0.0722)
    light = gray[..., None] + camera.saturation * (light - gray[..., None])
    level: Array = np.clip(light, 0, None) ** (camera.gamma / 2.2)
    level = (level - 0.45) * camera.contrast + 0.45
    level = np.where(level > 0.8, 0.8 + 0.2 * np.tanh((level - 0.8) / 0.2), level)  # soft instead of hard clipping
    level = level * (1 - camera.haze) + 0.75 * camera.haze
    if rng.random() < 0.25:
        level = _motion_blur(level, 2 + int(camera.motion * rng.uniform(0, 1) * len(level)))
    noisy = 255 * level + camera.noise * rng.uniform(0.6, 1.3) * rng.standard_normal(level.shape, np.float32)
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    if camera.blur > 0.25:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.6, 1.4)))
    if camera.sharpen > 0:
        image = image.filter(ImageFilter.UnsharpMask(1.5, round(100 * camera.sharpen), 0))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(camera.jpeg[0], camera.jpeg[1] + 1)))
    image = Image.open(file)
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _motion_blur(level: Array, length: int) -> Array:
    """Average each pixel with its `length` - 1 neighbours along the row."""
    padded = np.pad(level, ((0, 0), (length, 0), (0, 0)), mode="edge").cumsum(1)
    return np.asarray((padded[:, length:] - padded[:, :-length]) / length)
