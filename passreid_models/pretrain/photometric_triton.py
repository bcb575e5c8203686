"""Photometric augmentation on a GPU: three Triton kernels for all views of one size, with params on the device.

    views uint8 --change_colours--> x --blur rows--> y --blur columns, solarise, normalise--> x

Each program reads the params of its view: nothing is gathered, and the host does not look at them.
``TRITON_INTERPRET=1`` runs the kernels on a CPU.

Shapes: N views of H x W pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from passreid_models.pretrain import views as v

PIXELS = 1024  # of a program's loop or tile
BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(c) for c in (v.BRIGHTNESS, v.CONTRAST, v.SATURATION, v.HUE))
FIRST_STEP, GRAY, BLUR = tl.constexpr(v.STEPS.start), tl.constexpr(v.GRAY), tl.constexpr(v.BLUR)
SOLARIZE, NUM_PARAMS = tl.constexpr(v.SOLARIZE), tl.constexpr(v.NUM_PARAMS)


def photometric(views: Tensor, params: Tensor, mean: Tensor, std: Tensor, solarize_threshold: float) -> Tensor:
    """Change the colours of uint8 views ``[N, 3, H, W]`` by params ``[N, NUM_PARAMS]`` and normalise them: float32."""
    views, params = views.contiguous(), params.contiguous()
    count, _, height, width = views.shape
    x, y = (torch.empty(views.shape, device=views.device) for _ in range(2))
    if x.numel():
        tiles = count, 3, triton.cdiv(height * width, PIXELS)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _change_colours[(count,)](views, params, x, height * width, PIXELS)
            _blur_rows[tiles](x, params, y, height, width, PIXELS)
            _blur_columns_and_normalize[tiles](y, params, x, mean, std, solarize_threshold, height, width, PIXELS)
    return x


@triton.jit
def _gray(r, g, b):  # type: ignore[no-untyped-def]
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _clip(x):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _channel(low, chroma, hue):  # type: ignore[no-untyped-def]
    """Value of a channel whose own hue is 0, at ``hue`` in turns."""
    distance = tl.abs(hue - tl.floor(hue + 0.5))
    return low + chroma * _clip(2 - 6 * distance)


@triton.jit
def _jitter(r, g, b, row, num_steps, gray_mean):  # type: ignore[no-untyped-def]
    """Apply the first ``num_steps`` jitter operations of a view; ``photometric.py`` has the formulas."""
    for step in range(num_steps):
        operation = tl.load(row + FIRST_STEP + step).to(tl.int32)
        if operation == HUE:
            turns = tl.load(row + HUE)
            low, high = tl.minimum(tl.minimum(r, g), b), tl.maximum(tl.maximum(r, g), b)
            chroma = high - low
            hue = (g + b - r + high - 2 * low) / tl.maximum(chroma, 1e-12)
            hue = tl.where(g < b, -hue, hue) / 6 + turns
            r, g, b = _channel(low, chroma, hue), _channel(low, chroma, hue - 1 / 3), _channel(low, chroma, hue - 2 / 3)
        elif operation >= 0:  # a blend with black, the mean of the gray view, or the gray view
            factor = tl.load(row + operation)
            other = tl.where(operation == SATURATION, _gray(r, g, b), tl.where(operation == CONTRAST, gray_mean, 0.0))
            other = other * (1 - factor)
            r, g, b = _clip(r * factor + other), _clip(g * factor + other), _clip(b * factor + other)
    return r, g, b


@triton.jit
def _load_pixels(view, i, numel):  # type: ignore[no-untyped-def]
    inside = i < numel
    r = tl.load(view + i, inside, 0).to(tl.float32) * (1 / 255)
    g = tl.load(view + numel + i, inside, 0).to(tl.float32) * (1 / 255)
    b = tl.load(view + 2 * numel + i, inside, 0).to(tl.float32) * (1 / 255)
    return r, g, b


@triton.jit
def _change_colours(views, params, out, numel, PIXELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Jitter and grayscale, one program a view; the contrast's mean takes a first pass over its pixels."""
    n = tl.program_id(0).to(tl.int64)
    view, row, target = views + n * 3 * numel, params + n * NUM_PARAMS, out + n * 3 * numel
    before_contrast = -1
    for step in range(4):
        if tl.load(row + FIRST_STEP + step).to(tl.int32) == CONTRAST:
            before_contrast = step
    gray_mean = 0.0
    if before_contrast >= 0:
        total = tl.zeros((PIXELS,), tl.float32)
        for start in range(0, numel, PIXELS):
            i = start + tl.arange(0, PIXELS)
            r, g, b = _load_pixels(view, i, numel)
            r, g, b = _jitter(r, g, b, row, before_contrast, 0.0)
            total += tl.where(i < numel, _gray(r, g, b), 0.0)
        gray_mean = tl.sum(total) / numel
    is_gray = tl.load(row + GRAY) > 0
    for start in range(0, numel, PIXELS):
        i = start + tl.arange(0, PIXELS)
        r, g, b = _load_pixels(view, i, numel)
        r, g, b = _jitter(r, g, b, row, 4, gray_mean)
        gray = _gray(r, g, b)
        tl.store(target + i, tl.where(is_gray, gray, r), i < numel)
        tl.store(target + numel + i, tl.where(is_gray, gray, g), i < numel)
        tl.store(target + 2 * numel + i, tl.where(is_gray, gray, b), i < numel)


@triton.jit
def _blur(plane, at, i, size, stride, radius, inside):  # type: ignore[no-untyped-def]
    """Blur along one dimension: pixels ``i`` of ``plane``, which are at ``at`` of ``size`` along it."""
    total, weights = tl.load(plane + i, inside, 0.0), 1.0
    for k in range(1, tl.ceil(3 * radius).to(tl.int32) + 1):
        weight = tl.exp(-0.5 * k * k / (radius * radius))
        before, after = tl.maximum(at - k, 0), tl.minimum(at + k, size - 1)
        pair = tl.load(plane + i + (before - at) * stride, inside, 0.0)
        pair += tl.load(plane + i + (after - at) * stride, inside, 0.0)
        total += weight * pair
        weights += 2 * weight
    return total / weights


@triton.jit
def _blur_rows(x, params, out, height, width, PIXELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blur from row to row; a view without blur is copied."""
    n, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = (n * 3 + channel) * height * width
    i = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    inside = i < height * width
    radius = tl.load(params + n * NUM_PARAMS + BLUR)
    tl.store(out + offset + i, _blur(x + offset, i // width, i, height, width, radius, inside), inside)


@triton.jit
def _blur_columns_and_normalize(x, params, out, mean, std, threshold, height, width, PIXELS: tl.constexpr):  # type: ignore[no-untyped-def]
    n, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offset = (n * 3 + channel) * height * width
    i = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    inside = i < height * width
    row = params + n * NUM_PARAMS
    values = _blur(x + offset, i % width, i, width, 1, tl.load(row + BLUR), inside)
    threshold = tl.where(tl.load(row + SOLARIZE) > 0, threshold, 2.0)
    values = tl.where(values >= threshold, 1 - values, values)
    tl.store(out + offset + i, (values - tl.load(mean + channel)) / tl.load(std + channel), inside)
