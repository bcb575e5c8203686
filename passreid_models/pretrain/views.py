"""Views of one image: their crops, and the params of their colour changes (arXiv 2203.03931, section 3.1).

A worker of the data loader draws all random numbers and cuts the views, in uint8. The colours are changed by
`passreid_models.pretrain.photometric`, a batch at a time, on the training device. The default collate of a DataLoader
stacks `Views` field by field.

    image [h, w]  ->  global views   2 boxes of the whole image              [2, 3, H, W]
                      local views    L boxes of each of A areas              [A * L, 3, h, w]
                      params         one row a view, global views first      [2 + A * L, NUM_PARAMS]

Shapes: V = 2 + A * L views of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

HALVES = ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))  # the areas of PASS: rows, as fractions of the height; full width

# The columns of `Views.params`.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # jitter factors, 1: no change; hue in turns, 0: no change
STEPS = slice(4, 8)  # jitter operations (columns 0 to 3) in order of application; -1: no jitter
GRAY = 8  # 1: grayscale
BLUR = 9  # radius of the Gaussian in pixels of the view, 0: none
SOLARIZE = 10  # 1: solarise
NUM_PARAMS = 11

_TRIES = 10  # attempts per box before it falls back to the centre, as in RandomResizedCrop
_PROBABILITIES = ("flip_prob", "jitter_prob", "gray_prob", "solarize_prob")


class Views(NamedTuple):
    """Views of one image; a batch of them has a leading B."""

    global_views: Tensor  # uint8 [2, 3, H, W]
    local_views: Tensor  # uint8 [A * L, 3, h, w], area by area
    params: Tensor  # float32 [2 + A * L, NUM_PARAMS], colour changes of each view


@dataclass(frozen=True)
class MultiCrop:
    """Cut the global and local views of one image, and draw the params of their colour changes.

    Args:
        size: (height, width) of a global view.
        local_size: (height, width) of a local view.
        areas: Row ranges the local views are cut from, as fractions of the height. ``((0, 1),)`` is DINO's whole image.
        locals_per_area: Local views of each area; may be 0.
        global_scale: Area of a global crop, as a fraction of the image.
        local_scale: Area of a local crop, as a fraction of its area.
        ratio: Width / height of a crop.
        flip_prob: Probability of a horizontal flip.
        jitter_prob: Probability of the colour jitter; its four operations come in random order.
        brightness: Brightness factors are uniform in 1 ± this, and at least 0.
        contrast: Contrast factors are uniform in 1 ± this, and at least 0.
        saturation: Saturation factors are uniform in 1 ± this, and at least 0.
        hue: Hue shifts are uniform in ± this, in turns.
        gray_prob: Probability of grayscale.
        blur_probs: Probability of the blur of the first global, the second global, and a local view.
        blur_radius: Range of the standard deviation of the blur, in pixels of the view.
        solarize_prob: Probability of solarisation, of the second global view only.

    Raises:
        ValueError: If a field is out of range; the message names it.
    """

    size: tuple[int, int] = (256, 128)
    local_size: tuple[int, int] = (128, 64)
    areas: tuple[tuple[float, float], ...] = HALVES
    locals_per_area: int = 3
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.1, 0.8)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: float = 0.2
    blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.2

    def __post_init__(self) -> None:
        for name in ("size", "local_size"):
            self._expect(
                name, _is_range(getattr(self, name), 1, whole=True, ordered=False), "(height, width), 1 or more"
            )
        areas_ok = isinstance(self.areas, Sequence) and len(self.areas) > 0
        areas_ok = areas_ok and all(_is_range(area, 0, 1) and area[0] < area[1] for area in self.areas)
        self._expect("areas", areas_ok, "at least one (first, last) with 0 <= first < last <= 1")
        self._expect("locals_per_area", _is_number(self.locals_per_area, 0, whole=True), "an integer, 0 or more")
        for name in ("global_scale", "local_scale"):
            value = getattr(self, name)
            self._expect(name, _is_range(value, 0, 1) and value[0] > 0, "(low, high) with 0 < low <= high <= 1")
        for name in ("ratio", "blur_radius"):
            value = getattr(self, name)
            self._expect(name, _is_range(value, 0) and value[0] > 0, "(low, high) with 0 < low <= high")
        for name in _PROBABILITIES:
            self._expect(name, _is_number(getattr(self, name), 0, 1), "a probability")
        probs = self.blur_probs
        probs_ok = isinstance(probs, Sequence) and len(probs) == 3 and all(_is_number(p, 0, 1) for p in probs)
        self._expect("blur_probs", probs_ok, "three probabilities: first global, second global, local views")
        for name in ("brightness", "contrast", "saturation"):
            self._expect(name, _is_number(getattr(self, name), 0), "0 or more")
        self._expect("hue", _is_number(self.hue, 0, 0.5), "0 to 0.5")

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def num_views(self) -> int:
        """Number of views, V: two global and all local ones."""
        return 2 + len(self.areas) * self.locals_per_area

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        """Cut the views of an image; all random numbers come from ``rng``."""
        pixels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))  # [h, w, 3]
        height, width = pixels.shape[:2]
        boxes = self.draw_boxes(height, width, rng).tolist()
        flips = (rng.random(self.num_views) < self.flip_prob).tolist()
        params = torch.from_numpy(self.draw_params(rng))
        # A view is flipped by cutting the mirrored box of the mirrored image: the same pixels, and one flip an image.
        sources = pixels.permute(2, 0, 1)[None], pixels.flip(1).permute(2, 0, 1)[None]  # [1, 3, h, w]
        cut = []
        for v, (top, left, h, w) in enumerate(boxes):
            left = width - left - w if flips[v] else left
            crop = sources[flips[v]][..., top : top + h, left : left + w]
            # On uint8 this is PIL's crop and resize, one level off in 1 pixel of 100, two in 1 of 100,000, and 3 times
            # as fast. PIL's resize(box=...) differs: its filter reads beyond the box, and so beyond the area.
            cut.append(F.interpolate(crop, self.size if v < 2 else self.local_size, mode="bicubic", antialias=True))
        global_views = torch.cat(cut[:2])
        local_views = torch.cat(cut[2:]) if len(cut) > 2 else global_views.new_empty(0, 3, *self.local_size)
        return Views(global_views.contiguous(), local_views.contiguous(), params)

    def draw_boxes(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the boxes ``(top, left, height, width)`` of an image's views, int64 ``[V, 4]``, in pixels.

        They are distributed as those of torchvision's ``RandomResizedCrop`` within the area of each view.
        """
        u = rng.random((4, self.num_views, _TRIES))
        first, last = np.floor(self._rows * height)  # [V]
        first = np.minimum(first, height - 1)  # an area has at least one row
        rows = np.maximum(last - first, 1)
        low, high = self._scales
        target = (rows * width)[:, None] * (low + (high - low) * u[0])  # [V, tries]
        low, high = np.log(self.ratio)
        ratio = np.exp(low + (high - low) * u[1])
        w, h = np.rint(np.sqrt(target * ratio)), np.rint(np.sqrt(target / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= rows[:, None])
        views, attempt = np.arange(self.num_views), fits.argmax(axis=1)  # the first that fits
        w, h = w[views, attempt], h[views, attempt]
        top, left = (np.floor(u[2:, views, attempt] * (np.stack([rows - h, width - w]) + 1))).clip(0)
        for v in np.flatnonzero(~fits[views, attempt]):
            h[v], w[v] = _nearest_ratio(rows[v], width, self.ratio)
            top[v], left[v] = (rows[v] - h[v]) // 2, (width - w[v]) // 2
        return np.stack([first + top, left, h, w], axis=1).astype(np.int64)

    def draw_params(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the params of each view's colour changes, float32 ``[V, NUM_PARAMS]``."""
        u = rng.random((13, self.num_views))
        low, high = self._factors
        params = np.empty((self.num_views, NUM_PARAMS), np.float32)
        params[:, :4] = low + (high - low) * u[:4].T
        params[:, STEPS] = np.where((u[4] < self.jitter_prob)[:, None], u[5:9].argsort(axis=0).T, -1)
        params[:, GRAY] = u[9] < self.gray_prob
        radius = self.blur_radius[0] + (self.blur_radius[1] - self.blur_radius[0]) * u[10]
        params[:, BLUR] = radius * (u[11] < self._blur_probs)
        params[:, SOLARIZE] = 0
        params[1, SOLARIZE] = u[12, 1] < self.solarize_prob
        return params

    # Values that do not depend on the image, computed once.

    @cached_property
    def _rows(self) -> np.ndarray:  # [2, V], fractions of the height
        areas = [area for area in self.areas for _ in range(self.locals_per_area)]
        return np.array([(0, 1), (0, 1), *areas], np.float64).T

    @cached_property
    def _scales(self) -> np.ndarray:  # [2, V, 1]
        scales = [self.global_scale] * 2 + [self.local_scale] * (self.num_views - 2)
        return np.array(scales, np.float64).T[..., None]

    @cached_property
    def _factors(self) -> np.ndarray:  # [2, 4]
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        return np.stack([np.append((1 - strengths).clip(0), -self.hue), np.append(1 + strengths, self.hue)])

    @cached_property
    def _blur_probs(self) -> np.ndarray:  # [V]
        first, second, local = self.blur_probs
        return np.array([first, second] + [local] * (self.num_views - 2))


def _nearest_ratio(height: float, width: float, ratio: tuple[float, float]) -> tuple[float, float]:
    """Height and width of the largest box of an allowed ratio, which RandomResizedCrop falls back to in the centre."""
    if width / height < ratio[0]:
        return max(1.0, min(height, np.rint(width / ratio[0]))), width
    if width / height > ratio[1]:
        return height, max(1.0, min(width, np.rint(height * ratio[1])))
    return height, width


def _is_number(value: Any, low: float, high: float = np.inf, whole: bool = False) -> bool:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(low <= value <= high and value < np.inf)


def _is_range(value: Any, low: float, high: float = np.inf, whole: bool = False, ordered: bool = True) -> bool:
    pair = isinstance(value, Sequence) and len(value) == 2 and all(_is_number(x, low, high, whole) for x in value)
    return pair and bool(not ordered or value[0] <= value[1])
