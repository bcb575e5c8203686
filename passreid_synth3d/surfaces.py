# mypy: ignore-errors
"""Reflectance and cut-outs of surfaces, as warp functions: warp compiles them, so they are restricted Python."""

from enum import IntEnum
from typing import Any

import numpy as np
import warp as wp

from passreid_synth3d.mesh import PATTERNS, REGIONS, Material

__all__ = ["Pattern", "Region", "Surface", "is_present", "noise", "table_of", "tint"]

wp.config.log_level = wp.LOG_ERROR  # else warp logs each kernel that it loads
Pattern = IntEnum("Pattern", [name.upper() for name in PATTERNS], start=0)
Region = IntEnum("Region", [name.upper() for name in REGIONS], start=0)


@wp.struct
class Surface:
    """The warp struct of a `Material`, with the pattern as a number."""

    pattern: int
    logo: int
    colour: wp.vec3
    second: wp.vec3
    third: wp.vec3
    logo_colour: wp.vec3
    period: float
    duty: float
    bump: float
    grain: float
    shine: float
    seed: float
    hem: float
    top: float
    dip: float
    opening: float
    sleeve: float
    logo_side: float
    logo_x: float
    logo_z: float
    logo_size: float


def table_of(materials: list[Material]) -> Any:
    """Materials as a structured array in the layout of `Surface`."""
    table = np.zeros(len(materials), Surface.numpy_dtype())
    for i, m in enumerate(materials):
        for name in table.dtype.names or ():
            table[name][i] = PATTERNS.index(m.pattern) if name == "pattern" else getattr(m, name)
    return table


@wp.func
def fraction(x: float) -> float:
    return x - wp.floor(x)


@wp.func
def lattice(x: int, y: int, seed: int) -> float:
    """Pseudo-random number between -0.62 and 0.62, a hash of the arguments."""
    h = wp.uint32(x) * wp.uint32(374761393) + wp.uint32(y) * wp.uint32(668265263) + wp.uint32(seed) * wp.uint32(69069)
    h = (h ^ (h >> wp.uint32(13))) * wp.uint32(1274126177)
    h = (h ^ (h >> wp.uint32(16))) & wp.uint32(65535)
    return float(h) * (1.24 / 65535.0) - 0.62


@wp.func
def noise(u: float, v: float, seed: float) -> float:
    """Smooth value noise with features of size 1, three times as fast as warp's own noise."""
    x = wp.floor(u)
    y = wp.floor(v)
    i = int(x)
    j = int(y)
    k = int(seed * 16.0)
    a = u - x
    b = v - y
    a = a * a * (3.0 - 2.0 * a)
    b = b * b * (3.0 - 2.0 * b)
    top = lattice(i, j, k) * (1.0 - a) + lattice(i + 1, j, k) * a
    low = lattice(i, j + 1, k) * (1.0 - a) + lattice(i + 1, j + 1, k) * a
    return top * (1.0 - b) + low * b


@wp.func
def is_present(m: Surface, region: int, uv: wp.vec2, at: wp.vec3) -> bool:
    """Whether the surface exists at a point, rather than being cut away."""
    if m.pattern == Pattern.FOLIAGE:
        return noise(uv[0] / m.period, uv[1] / m.period, m.seed) > m.duty - 0.6
    if m.pattern == Pattern.STRAP:
        if m.seed == 0.0:
            return region == Region.TORSO and at[2] > 0.22 and wp.abs(wp.abs(at[0]) - 0.085) < 0.02
        return region == Region.TORSO and at[2] > 0.07 and wp.abs(at[0] * m.seed - 0.42 * (at[2] - 0.33)) < 0.017
    if region == Region.ARM:
        return uv[1] < m.sleeve
    if region == Region.TORSO or region == Region.LEG or region == Region.FOOT:
        if at[2] < m.hem:
            return False
        if m.top < 0.4 and at[2] > m.top:  # a waist
            return False
        if at[2] > 0.4 and m.top < 1.0:  # a neckline: a circle around the neck, and a V in front
            y = at[1] + 0.03
            around = 0.055 + 0.8 * (0.62 - m.top)
            if at[2] > 0.5 and at[0] * at[0] + y * y < around * around:
                return False
            if m.dip > 0.0 and at[1] < 0.0 and at[2] > m.top - m.dip + 1.3 * wp.abs(at[0]):
                return False
        if (
            region == Region.TORSO
            and at[1] < 0.0
            and wp.abs(at[0]) < m.opening * (1.0 + 0.6 * wp.max(0.0, at[2] - 0.3))
        ):
            return False
    if region == Region.HEAD:
        if at[2] < m.hem + m.dip * at[1]:
            return False
        # an ellipse in front leaves the face open
        if at[1] < -0.05:
            x = at[0] / 0.072
            z = (at[2] - m.top) / 0.105
            if x * x + z * z < 1.0:
                return False
    return True


@wp.func
def tint(m: Surface, region: int, uv: wp.vec2, at: wp.vec3, logos: wp.array3d(dtype=float)) -> wp.vec3:
    """Reflectance of a surface at a point."""
    u = uv[0]
    v = uv[1]
    c = m.colour
    k = m.pattern
    if k == Pattern.STRIPES:
        if fraction(v / m.period + m.seed) < m.duty:
            c = m.second
    elif k == Pattern.BARS:
        if fraction(u / m.period + m.seed) < m.duty:
            c = m.second
    elif k == Pattern.CHECKS:
        a = 0.0
        if fraction(u / m.period + m.seed) < m.duty:
            a += 0.5
        if fraction(v / m.period + 0.3) < m.duty:
            a += 0.5
        c = m.colour * (1.0 - a) + m.second * a
        if fraction(u / m.period + m.seed + 0.5) < 0.07 or fraction(v / m.period + 0.8) < 0.07:
            c = m.third
    elif k == Pattern.GRADIENT:
        a = wp.clamp((v - m.seed) / m.period, 0.0, 1.0)
        c = m.colour * (1.0 - a) + m.second * a
    elif k == Pattern.BLOCKS:
        if region == Region.ARM:
            c = m.second
            if m.duty > 0.66:
                c = m.third
        elif v > m.seed:
            c = m.second
        elif v > m.seed - m.period:
            c = m.third
    elif k == Pattern.DOTS:
        row = wp.floor(v / m.period)
        x = fraction(u / m.period + 0.5 * (row - 2.0 * wp.floor(row * 0.5))) - 0.5
        y = fraction(v / m.period) - 0.5
        if x * x + y * y < m.duty * m.duty * 0.25:
            c = m.second
    elif k == Pattern.ZIGZAG:
        if fraction(v / m.period + wp.abs(fraction(u / m.period) - 0.5) + m.seed) < m.duty:
            c = m.second
    elif k == Pattern.ARGYLE:
        x = fraction(u / m.period + m.seed) - 0.5
        y = fraction(v / (1.5 * m.period)) - 0.5
        if wp.abs(x) + wp.abs(y) < 0.5 * m.duty + 0.15:
            c = m.second
        if wp.abs(wp.abs(x) - wp.abs(y)) < 0.05:
            c = m.third
    elif k == Pattern.CAMOUFLAGE:
        n = noise(u / m.period, v / m.period, m.seed) + 0.5 * noise(
            2.3 * u / m.period, 2.3 * v / m.period, m.seed + 7.0
        )
        if n > 0.18:
            c = m.second
        elif n < -0.2:
            c = m.third
    elif k == Pattern.DENIM:
        a = wp.clamp(0.5 + 0.9 * noise(u / 0.11, v / 0.22, m.seed) - m.duty, 0.0, 1.0)
        c = m.colour * (1.0 - a) + m.second * a
    elif k == Pattern.SIDE:
        if wp.abs(u) < 0.5 * m.period:
            c = m.second
    elif k == Pattern.SKIN:
        if region == Region.HEAD:
            # lips, brows and beard, by coordinates of the standard head
            x = wp.abs(at[0])
            if at[1] < -0.11:
                if x < 0.024 and wp.abs(at[2] - 0.664) < 0.009:
                    c = m.second
                elif wp.abs(at[2] - 0.752 - 0.08 * (x - 0.03)) < 0.0045 and x > 0.012 and x < 0.05:
                    c = m.third * 0.6 + c * 0.4
            if m.duty > 0.0 and at[1] < -0.04 and at[2] < 0.69 - 0.25 * wp.max(0.0, 0.055 - x) * (1.0 - m.duty):
                c = m.third * m.duty + c * (1.0 - m.duty)
    elif k == Pattern.HAIR:
        c = m.colour * (
            0.8 + 0.45 * wp.abs(noise(u / 0.012, v / 0.15, m.seed)) + 0.25 * noise(u / 0.05, v / 0.3, m.seed)
        )
    elif k == Pattern.SOLE:
        if at[2] < m.period:
            c = m.second
        elif at[2] < m.duty and at[1] < -0.02:
            c = m.third
    elif k == Pattern.BRICKS:
        row = wp.floor(v / 0.075)
        x = fraction(u / 0.25 + 0.5 * fraction(row * 0.5) * 2.0)
        y = fraction(v / 0.075)
        c = m.colour * (1.0 + 0.35 * noise(wp.floor(u / 0.25 + fraction(row * 0.5)) * 1.7, row * 1.3, m.seed))
        if x < 0.05 or y < 0.14:
            c = m.second
    elif k == Pattern.TILES:
        x = fraction(u / m.period)
        y = fraction(v / m.period)
        c = m.colour * (1.0 + 0.15 * noise(wp.floor(u / m.period) * 1.7, wp.floor(v / m.period) * 1.3, m.seed))
        if x < m.duty or y < m.duty:
            c = m.second
    elif k == Pattern.PLANKS:
        x = fraction(u / m.period)
        c = m.colour * (1.0 + 0.3 * noise(wp.floor(u / m.period) * 1.7, v * 0.3, m.seed))
        if x < 0.06:
            c = m.second
    elif k == Pattern.WINDOWS:
        x = fraction(u / m.period)
        y = fraction(v / (1.3 * m.period))
        n = noise(wp.floor(u / m.period) * 1.7, wp.floor(v / (1.3 * m.period)) * 2.1, m.seed)
        if x > 0.5 * (1.0 - m.duty) and x < 0.5 * (1.0 + m.duty) and y > 0.25 and y < 0.8:
            c = m.second * (1.0 + 0.6 * n) + m.third * wp.max(0.0, n)
    elif k == Pattern.GRASS:
        c = m.colour * (1.0 + 0.5 * noise(u / 0.03, v / 0.03, m.seed) + 0.5 * noise(u / 0.9, v / 0.9, m.seed))
    elif k == Pattern.FOLIAGE:
        c = m.colour * (0.8 + 0.9 * wp.abs(noise(u / (0.4 * m.period), v / (0.4 * m.period), m.seed + 3.0)))
    elif k == Pattern.PLASTER:
        c = m.colour * (1.0 + 0.2 * noise(u / 0.8, v / 1.7, m.seed) + 0.1 * noise(u / 0.06, v / 0.06, m.seed))
    elif k == Pattern.ASPHALT:
        c = m.colour * (1.0 + 0.25 * noise(u / 0.02, v / 0.02, m.seed) + 0.2 * noise(u / 1.3, v / 1.3, m.seed))
    elif k == Pattern.CROSSING:
        c = m.colour * (1.0 + 0.2 * noise(u / 0.7, v / 0.7, m.seed))
        if fraction(u / m.period) < m.duty:
            c = m.second
    elif k == Pattern.SLABS:  # stones twice as long as wide, laid in bond
        row = wp.floor(v / m.period)
        x = fraction(0.5 * (u / m.period + row))
        y = fraction(v / m.period)
        c = m.colour * (1.0 + 0.3 * noise(wp.floor(0.5 * (u / m.period + row)) * 1.7, row * 1.3, m.seed))
        c = c * (1.0 + 0.2 * noise(u / 0.7, v / 0.7, m.seed))
        if x < 0.5 * m.duty or y < m.duty:
            c = m.second
    elif k == Pattern.SHOP:  # goods on shelves behind panes
        row = wp.floor(v / (0.8 * m.period))
        x = u / (0.4 * m.period) + 2.0 * noise(row * 1.3, 0.5, m.seed)
        n = noise(wp.floor(x) * 1.7, row * 1.3, m.seed)
        y = fraction(v / (0.8 * m.period))
        c = m.colour * (1.0 + 0.5 * noise(u / 1.1, v / 1.1, m.seed + 5.0))
        if y < 0.55 + 0.8 * n and fraction(x) < 0.85:
            c = m.third * (0.7 + n)
            if n > 0.12:
                c = m.second * (0.6 + n)
        if fraction(u / (2.0 * m.period)) < m.duty or y > 0.95:
            c = wp.vec3(0.2, 0.2, 0.2)
    elif k == Pattern.POSTER:  # a picture of blocks over lines of text
        n = noise(wp.floor(u / m.period) * 1.7, wp.floor(v / m.period) * 1.3, m.seed)
        if n > 0.1:
            c = m.second
        elif n < -0.12:
            c = m.third
            if fraction(v / 0.06) < 0.4 and noise(u / 0.03, wp.floor(v / 0.06) * 1.7, m.seed) > -0.1:
                c = m.colour * 0.5
        c = c * (1.0 + 0.4 * noise(u / 0.13, v / 0.13, m.seed))
    if m.logo >= 0 and region == Region.TORSO and at[1] * m.logo_side > 0.0:
        side = float(logos.shape[1])
        x = (0.5 - m.logo_side * (at[0] - m.logo_x) / m.logo_size) * side
        y = (0.5 - (at[2] - m.logo_z) / m.logo_size) * side
        if x >= 0.0 and y >= 0.0 and x < side and y < side:
            a = logos[m.logo, int(y), int(x)]
            c = m.logo_colour * a + c * (1.0 - a)
    if m.grain > 0.0:
        c = c * (1.0 + m.grain * noise(u / 0.05, v / 0.05, m.seed + 11.0))
    return c
