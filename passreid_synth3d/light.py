"""Light and imaging parameters of a camera."""

import math
from dataclasses import dataclass

import numpy as np

from passreid_models.synthetic.attributes import pick
from passreid_synth3d.mesh import Array

__all__ = ["Imaging", "Sunlight", "imaging_of", "light_of", "studio_light"]

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Sunlight:
    """Direction to the sun, radiances and shadow strength, field by field those of the kernel's `Light`."""

    sun: Triple
    sunlight: Triple
    sky: Triple
    ground: Triple
    horizon: Triple
    zenith: Triple
    shadow: float


@dataclass(frozen=True)
class Imaging:
    """Parameters of a camera that turns radiance into a JPEG file.

    `exposure` and `gains` scale radiance (1 becomes white); `gamma` and `contrast` (around mid-gray) act on display
    values, of which the share `haze` is light gray; `noise` is in grey levels of 255, `blur` (a Gaussian's sigma) in
    pixels, `motion` (the longest motion blur) a share of the crop's height, `jpeg` a range of qualities.
    """

    exposure: float
    gains: Triple
    gamma: float
    contrast: float
    saturation: float
    haze: float
    noise: float
    blur: float
    sharpen: float
    motion: float
    jpeg: tuple[int, int]


def light_of(rng: np.random.Generator, indoor: bool) -> Sunlight:
    """Random sun, clouds, evening or lamps; the radiance of ground of reflectance 0.4 is then 0.3 to 0.9."""
    kind = "lamps" if indoor else pick(rng, sunny=5, overcast=4, evening=1.5)
    degrees = {"sunny": (20, 65), "overcast": (40, 80), "evening": (9, 20), "lamps": (35, 75)}[kind]
    elevation, azimuth = math.radians(rng.uniform(*degrees)), rng.uniform(0, 2 * math.pi)
    sun = (math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation))
    tone = np.exp(rng.normal(0, 0.03, 3))
    beam, sky, ground, low, high, shadow = {
        "sunny": ((1.6, 1.5, 1.34), (0.46, 0.52, 0.62), (0.25, 0.23, 0.2), (0.9, 0.95, 1.0), (0.4, 0.55, 0.85), 0.92),
        "overcast": ((0.35, 0.35, 0.34), (1.02, 1.04, 1.07), (0.3, 0.3, 0.29), (1.2, 1.2, 1.2), (0.9, 1.0, 1.1), 0.25),
        "evening": ((1.0, 0.78, 0.55), (0.55, 0.55, 0.62), (0.26, 0.24, 0.22), (0.9, 0.8, 0.6), (0.4, 0.45, 0.6), 0.8),
        "lamps": ((0.6, 0.59, 0.56), (0.85, 0.84, 0.8), (0.36, 0.35, 0.33), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.0),
    }[kind]
    strength = rng.uniform(0.8, 1.15)
    return Sunlight(
        sun=sun,
        sunlight=_triple(np.array(beam) * tone * strength),
        sky=_triple(np.array(sky) * tone),
        ground=_triple(np.array(ground) * tone),
        horizon=_triple(np.array(low) * tone),
        zenith=_triple(np.array(high) * tone),
        shadow=float(np.clip(shadow + rng.normal(0, 0.03), 0, 0.95)) if shadow else 0.0,
    )


def studio_light(rng: np.random.Generator) -> tuple[Sunlight, Imaging]:
    """Soft light from a random side and gray surroundings, and a neutral camera; only the side differs by camera."""
    azimuth = rng.uniform(0, 2 * math.pi)
    sun = (0.6 * math.cos(azimuth), 0.6 * math.sin(azimuth), 0.8)
    gray = (0.3, 0.3, 0.3)
    light = Sunlight(sun, (0.5, 0.5, 0.5), (0.8, 0.8, 0.8), gray, gray, gray, shadow=0.25)
    return light, Imaging(
        1.3, (1.0, 1.0, 1.0), 1.0, 1.0, 1.0, haze=0.0, noise=1.0, blur=0.2, sharpen=0.0, motion=0.025, jpeg=(85, 95)
    )


def imaging_of(rng: np.random.Generator, light: Sunlight, lit: float) -> Imaging:
    """Random imaging of a camera, exposed for people who receive the share `lit` of the sunlight.

    Cameras in haze are pale, those against the light and at dusk are dark.
    """
    kind = pick(rng, clear=8, haze=1, backlight=1, dusk=1)
    dim, veil = dict(haze=(1.0, 0.2), backlight=(0.7, 0.1), dusk=(0.65, 0.0)).get(kind, (1.0, 0.03))
    warm, tint = rng.normal(0, (0.05, 0.02))  # warm to cold, magenta to green
    on_people = 0.6 * np.mean(light.sky) + 0.4 * np.mean(light.ground) + 0.5 * lit * np.mean(light.sunlight)
    return Imaging(
        exposure=float(1.08 * dim / on_people * math.exp(rng.normal(0, 0.11))),
        gains=_triple(np.exp((warm + tint, -tint, tint - warm))),
        gamma=math.exp(rng.normal(0, 0.06)),
        contrast=float(rng.uniform(0.92, 1.25)),
        saturation=float(rng.uniform(0.65, 1.1)),
        haze=float(veil * rng.uniform(0.4, 1.2)),
        noise=float(rng.uniform(1.0, 5.0) * (2 if kind == "dusk" else 1)),
        blur=float(rng.uniform(0.2, 0.9)),
        sharpen=float(rng.choice((0, 0.4, 0.8, 1.5))),
        motion=float(rng.uniform(0.01, 0.05)),
        jpeg=(int(rng.integers(30, 75)), int(rng.integers(75, 95))),
    )


def _triple(values: Array) -> Triple:
    r, g, b = (float(v) for v in values)
    return r, g, b
