"""Batches of labelled images for the trainers of re-ID.

The random augmentation of an image is a function of seed, step and place in the batch.

Shapes: B batch.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T
from torchvision.transforms.functional import resized_crop

from passreid_models.architectures import HALF
from passreid_models.data import loader
from passreid_models.data.image_cache import CachedSource
from passreid_models.data.listing import Names
from passreid_models.data.loader import load_readable
from passreid_models.data.sources import FileSource, Source
from passreid_models.reid.config import ReIDConfig
from passreid_models.runtime import derive_seed

Key = tuple[int, int, int]  # step, place in the batch, image


class ImageBatch(NamedTuple):
    """Images of one process, and messages about unreadable ones, each replaced by the next readable image."""

    images: Tensor  # [B, 3, H, W], normalised
    labels: Tensor  # int64 [B]
    unreadable: list[str]

    @property
    def num_images(self) -> int:
        return len(self.images)


def train_transform(
    config: ReIDConfig,
    erase_area: tuple[float, float] = (0.02, 1 / 3),
    erase_value: tuple[float, float, float] | None = None,
    erase_uniform: bool = False,
) -> Any:
    """Return the transform of a PIL image to a ``TrainImage``; it draws from torch's generator.

    Resize, flip, pad, crop, normalise by 0.5 and erase, as TransReID and the published models do; the last two are done
    by ``normalise``, on the training device. Variation that is switched on comes after the flip, as in a camera: light
    and colour, blur, then JPEG at a smaller size. What is switched off draws no random number.

    Args:
        config: Configuration with its ``size``.
        erase_area: Smallest and largest erased share of the image.
        erase_value: Fill of the erased area, after normalisation: three numbers, or None for standard normal noise.
        erase_uniform: Draw the aspect ratio of the erased area uniformly, as Cluster Contrast does, not log-uniformly.
    """
    from torchvision.transforms import v2

    c, size = config, cast(tuple[int, int], config.size)
    steps: list[Any] = [resize_to(size), T.RandomHorizontalFlip(c.flip_prob)]
    if c.crop_scale[0] < 1:
        steps[0] = _ResizedCrop(size, c.crop_scale)
    if c.jitter_prob:
        jitter = v2.ColorJitter(c.brightness, c.contrast, c.saturation, c.hue)
        steps.append(v2.RandomApply([jitter], c.jitter_prob))
    if c.gray_prob:
        steps.append(v2.RandomGrayscale(c.gray_prob))
    if c.blur_prob:
        radius = min(math.ceil(3 * c.blur_radius[1]), min(size) - 1)
        steps.append(v2.RandomApply([v2.GaussianBlur(2 * radius + 1, c.blur_radius)], c.blur_prob))
    jpeg = [v2.RandomApply([v2.JPEG(c.jpeg_quality)], c.jpeg_prob)] if c.jpeg_prob else []
    steps += [_Downscale(c.downscale_prob, c.downscale, jpeg)] if c.downscale_prob else jpeg
    erasing = _UniformErasing if erase_uniform else _Erasing
    return T.Compose([*steps, T.RandomCrop(size, c.pad), erasing(c.erase_prob, erase_area, erase_value)])


def resize_to(size: tuple[int, int]) -> Any:
    """Return the bicubic resizing of a PIL image to a height and width."""
    return T.Resize(size, T.InterpolationMode.BICUBIC)


class _ResizedCrop:
    """Random resized crop whose aspect ratio is relative to that of the image, which need not be a square."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        self.size, self.scale = size, scale

    def __call__(self, image: Image.Image) -> Image.Image:
        aspect = image.width / image.height
        box = T.RandomResizedCrop.get_params(image, self.scale, [aspect * 3 / 4, aspect * 4 / 3])
        return resized_crop(image, *box, self.size, T.InterpolationMode.BICUBIC)


class _Downscale:
    """Scale an image down, apply transforms to it, and scale it up again, each by a random filter."""

    FILTERS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)

    def __init__(self, p: float, factors: tuple[float, float], transforms: Sequence[Any]) -> None:
        self.p, self.factors, self.transforms = p, factors, transforms

    def __call__(self, image: Image.Image) -> Image.Image:
        size, up = image.size, None
        if torch.rand(()) < self.p:
            low, high = self.factors
            factor = low + (high - low) * torch.rand(()).item()
            down, up = (self.FILTERS[i] for i in torch.randint(len(self.FILTERS), (2,)))
            image = image.resize((max(1, round(factor * size[0])), max(1, round(factor * size[1]))), down)
        for transform in self.transforms:
            image = transform(image)
        return image if up is None else image.resize(size, up)


class TrainImage(NamedTuple):
    """Image before normalisation, and what is erased after it."""

    pixels: Tensor  # uint8 [H, W, 3]
    box: tuple[int, int, int, int]  # top, left, height, width of the erased rectangle; zeros: none
    fill: Tensor  # float32 [3 * height * width]


class _Erasing:
    """Random erasing, as drawn by torchvision, of an image that is normalised later."""

    ratio = (0.3, 1 / 0.3)  # of height and width, as in timm

    def __init__(self, p: float, scale: tuple[float, float], value: Any) -> None:
        self.p, self.scale = p, scale
        self.value = value and list(value)

    def __call__(self, image: Image.Image) -> TrainImage:
        pixels = torch.from_numpy(np.array(image))
        if torch.rand(()) < self.p and (drawn := self.draw(pixels.permute(2, 0, 1))):
            box, fill = drawn
            return TrainImage(pixels, box, fill.expand(3, *box[2:]).flatten())
        return TrainImage(pixels, (0, 0, 0, 0), torch.empty(0))

    def draw(self, image: Tensor) -> tuple[tuple[int, int, int, int], Tensor] | None:
        """Draw box and fill for an image ``[3, H, W]``; None if no rectangle fits."""
        *box, fill = T.RandomErasing.get_params(image, self.scale, self.ratio, self.value)
        return None if fill is image else (cast(tuple[int, int, int, int], tuple(box)), fill)


class _UniformErasing(_Erasing):
    """Random erasing of Cluster Contrast: torchvision's, but for the uniform aspect ratio and up to 100 tries."""

    def draw(self, image: Tensor) -> tuple[tuple[int, int, int, int], Tensor] | None:
        height, width = image.shape[1:]
        for _ in range(100):
            area, ratio = (low + (high - low) * torch.rand(()).item() for low, high in (self.scale, self.ratio))
            h = round((area * height * width * ratio) ** 0.5)
            w = round((area * height * width / ratio) ** 0.5)
            if h < height and w < width:
                top = int(torch.randint(height - h + 1, ()))
                left = int(torch.randint(width - w + 1, ()))
                return (top, left, h, w), torch.tensor(self.value)[:, None, None]
        return None


class TrainImages(Dataset):
    """Transformed images, indexed by (step, place in the batch, image)."""

    def __init__(self, paths: list[Path], transform: Any, seed: int, cache: tuple[int, int] | None = None) -> None:
        """
        Args:
            paths: N image files.
            transform: Augmentation of a training image, as of ``train_transform``.
            seed: Seed of the augmentation.
            cache: Height and width at which decoded images are kept in memory, the size that ``transform`` resizes to;
                None keeps none.
        """
        files = FileSource(Path("/"), Names(os.fsencode(path.absolute()) for path in paths))
        self.source: Source = CachedSource(files, cache, resize_to(cache)) if cache else files
        self.is_cached = cache is not None
        self.transform, self.seed = transform, seed

    def __getitem__(self, key: Key) -> tuple[TrainImage, int, list[str]]:
        """Load and transform an image or, if it is unreadable, the next one; return its index and the message too.

        Raises:
            ImageError: If so many images in a row cannot be read that something else must be wrong.
        """
        step, place, index = key
        image, index, unreadable = load_readable(self.source, index)
        state = torch.default_generator.get_state()
        try:
            # torch.manual_seed would take a third of the time of an image: it seeds the accelerators too
            torch.default_generator.manual_seed(derive_seed(self.seed, step, place))
            return self.transform(image), index, unreadable
        finally:
            torch.default_generator.set_state(state)


@dataclass
class KeySampler(Sampler[list[Key]]):
    """Keys of the batches of one process.

    The images of a step and their augmentation do not depend on the number of processes.

    Args:
        draw: Function from an epoch to its batches, each int64 ``[groups, images]``; a group (the images of one
            identity) goes to one process.
        epoch_starts: First step of each epoch.
        rank: Rank of this process.
        world_size: Number of processes.
        steps: Steps of the next pass of the loader.
    """

    draw: Callable[[int], list[np.ndarray]]
    epoch_starts: Sequence[int]
    rank: int = 0
    world_size: int = 1
    steps: range = range(0)

    def __iter__(self) -> Iterator[list[Key]]:
        batches: list[np.ndarray] = []
        current = -1
        for step in self.steps:
            epoch = bisect_right(self.epoch_starts, step) - 1
            if epoch != current:
                batches, current = self.draw(epoch), epoch
            batch = batches[step - self.epoch_starts[epoch]]
            places = np.arange(batch.size).reshape(batch.shape)[self.rank :: self.world_size]
            images = batch[self.rank :: self.world_size]
            pairs = zip(places.ravel().tolist(), images.ravel().tolist(), strict=True)
            yield [(step, place, image) for place, image in pairs]


class RawBatch(NamedTuple):
    """Images as workers send them: a pixel takes a byte, and only the erased rectangles are in float32."""

    pixels: Tensor  # uint8 [B, H, W, 3]
    boxes: Tensor  # int64 [B, 4]: top, left, height, width
    fills: Tensor  # float32, the fills of all rectangles in turn
    indices: Tensor  # int64 [B]
    unreadable: list[str]


def collate(samples: list[tuple[TrainImage, int, list[str]]]) -> RawBatch:
    """Stack the samples of ``TrainImages``."""
    images, indices, unreadable = zip(*samples, strict=True)
    pixels, boxes, fills = zip(*images, strict=True)
    names = [name for names in unreadable for name in names]
    return RawBatch(torch.stack(pixels), torch.tensor(boxes), torch.cat(fills), torch.tensor(indices), names)


make_loader = partial(loader.make_loader, collate=collate)


def load(batches: DataLoader, labels: Tensor) -> Iterator[ImageBatch]:
    """Yield the batches of a loader normalised, labelled, and on the device of ``labels``.

    Args:
        batches: Loader of ``TrainImages``, in a context that stops its workers.
        labels: Class of each image, int64 ``[N]``.

    Raises:
        ImageError: If so many images in a row cannot be read that something else must be wrong.
    """
    for batch in batches:
        pixels, boxes, fills, indices = (x.to(labels.device, non_blocking=True) for x in batch[:4])
        yield ImageBatch(normalise(pixels, boxes, fills), labels[indices], batch.unreadable)


def normalise(pixels: Tensor, boxes: Tensor, fills: Tensor) -> Tensor:
    """Normalise images and fill their erased rectangles, on any device to the bit as torchvision does on a CPU.

    Args:
        pixels: uint8 ``[B, H, W, 3]``.
        boxes: Top, left, height and width of the rectangles, int64 ``[B, 4]``; zeros: none.
        fills: Fills of all rectangles in turn, each ``[3, height, width]``, as one float32 vector.

    Returns:
        Float32 ``[B, 3, H, W]``.
    """
    (mean, *_), (std, *_) = HALF  # one for all channels
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    x.div_(torch.full((), 255.0, device=x.device))  # a tensor: by a number, CUDA multiplies with its reciprocal
    x.sub_(mean).div_(std)
    inside = []
    for start, length, size in zip(boxes[:, :2].T, boxes[:, 2:].T, x.shape[2:], strict=True):
        place = torch.arange(size, device=x.device)
        inside.append((place >= start[:, None]) & (place < (start + length)[:, None]))
    return x.masked_scatter_(inside[0][:, None, :, None] & inside[1][:, None, None, :], fills)
