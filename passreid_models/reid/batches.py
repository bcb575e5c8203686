"""Batches of labelled images for the trainers of re-ID.

The random augmentation of an image is a function of seed, step and place in the batch.

Shapes: B batch.
"""

import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from passreid_models.architectures import HALF
from passreid_models.data.listing import Names
from passreid_models.data.loader import batches_of, load_readable, make_loader
from passreid_models.data.sources import FileSource
from passreid_models.reid.config import ReIDConfig
from passreid_models.runtime import seed_step

RANDOM = "random"
"""Fill of random erasing: standard normal noise for each pixel."""

Key = tuple[int, int, int]  # step, place in the batch, image


class ImageBatch(NamedTuple):
    """Images of one process, and messages about unreadable ones, each replaced by the next readable image."""

    images: Tensor  # [B, 3, H, W], normalised
    labels: Tensor  # int64 [B]
    unreadable: list[str]


def train_transform(
    config: ReIDConfig,
    erase_area: tuple[float, float] = (0.02, 1 / 3),
    erase_value: tuple[float, float, float] | str = RANDOM,
    erase_uniform: bool = False,
) -> Any:
    """Return the torchvision transform of a PIL image to ``[3, H, W]``; it draws from torch's generator.

    Resize, flip, pad, crop, normalise by 0.5 and erase, as TransReID and the published models do. Variation that is
    switched on comes after the flip, as in a camera: light and colour, blur, then JPEG at a smaller size. What is
    switched off draws no random number.

    Args:
        config: Configuration with its ``size``.
        erase_area: Smallest and largest erased share of the image.
        erase_value: Fill of the erased area, after normalisation: three numbers, or ``random`` for noise.
        erase_uniform: Draw the aspect ratio of the erased area uniformly, as Cluster Contrast does, not log-uniformly.
    """
    from torchvision import transforms as T
    from torchvision.transforms import v2

    c, size = config, cast(tuple[int, int], config.size)
    steps: list[Any] = [T.Resize(size, T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(c.flip_prob)]
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
    erasing = _UniformErasing if erase_uniform else T.RandomErasing
    return T.Compose(
        [
            *steps,
            T.RandomCrop(size, c.pad),
            T.ToTensor(),
            T.Normalize(*HALF),
            erasing(c.erase_prob, erase_area, value=erase_value),
        ]
    )


class _ResizedCrop:
    """Random resized crop whose aspect ratio is relative to that of the image, which need not be a square."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]) -> None:
        self.size, self.scale = size, scale

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms import InterpolationMode, RandomResizedCrop
        from torchvision.transforms.functional import resized_crop

        aspect = image.width / image.height
        box = RandomResizedCrop.get_params(image, self.scale, [aspect * 3 / 4, aspect * 4 / 3])
        return resized_crop(image, *box, self.size, InterpolationMode.BICUBIC)


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


class _UniformErasing:
    """Random erasing of Cluster Contrast: torchvision's, but for the uniform aspect ratio and up to 100 tries."""

    def __init__(self, p: float, scale: tuple[float, float], value: Any, ratio: float = 0.3) -> None:
        self.p, self.scale, self.ratio = p, scale, (ratio, 1 / ratio)
        self.value = torch.tensor(value)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        """Erase a rectangle of an image ``[3, H, W]``, in place."""
        if torch.rand(()) >= self.p:
            return image
        height, width = image.shape[1:]
        for _ in range(100):
            area, ratio = (low + (high - low) * torch.rand(()).item() for low, high in (self.scale, self.ratio))
            h = round((area * height * width * ratio) ** 0.5)
            w = round((area * height * width / ratio) ** 0.5)
            if h < height and w < width:
                top = int(torch.randint(height - h + 1, ()))
                left = int(torch.randint(width - w + 1, ()))
                image[:, top : top + h, left : left + w] = self.value
                break
        return image


class TrainImages(Dataset):
    """Transformed images with their labels, indexed by (step, place in the batch, image)."""

    def __init__(self, paths: list[Path], labels: np.ndarray, transform: Any, seed: int) -> None:
        """
        Args:
            paths: N image files.
            labels: Classes, int64 ``[N]``.
            transform: Augmentation of a training image, as of ``train_transform``.
            seed: Seed of the augmentation.
        """
        self.source = FileSource(Path("/"), Names(os.fsencode(path.absolute()) for path in paths))
        self.labels, self.transform, self.seed = labels, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int, list[str]]:
        """
        Raises:
            ImageError: If so many images in a row cannot be read that something else must be wrong.
        """
        step, place, index = key
        image, index, unreadable = load_readable(self.source, index)
        with torch.random.fork_rng(devices=()):
            seed_step(self.seed, step, place)
            return self.transform(image), int(self.labels[index]), unreadable


@dataclass(frozen=True)
class KeySampler(Sampler[list[Key]]):
    """Keys of the batches of one process.

    The images of a step and their augmentation do not depend on the number of processes.

    Args:
        batches: Batches of an epoch, each int64 ``[groups, images]``; a group (the images of one identity) goes to one
            process.
        first_step: Step of the first batch.
        skip: Number of finished batches.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    batches: list[np.ndarray]
    first_step: int
    skip: int = 0
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return len(self.batches) - self.skip

    def __iter__(self) -> Iterator[list[Key]]:
        for nth in range(self.skip, len(self.batches)):
            batch = self.batches[nth]
            places = np.arange(batch.size).reshape(batch.shape)[self.rank :: self.world_size]
            images = batch[self.rank :: self.world_size]
            pairs = zip(places.ravel().tolist(), images.ravel().tolist(), strict=True)
            yield [(self.first_step + nth, place, image) for place, image in pairs]


def load_epoch(
    images: TrainImages, sampler: KeySampler, device: torch.device, workers: int
) -> Generator[ImageBatch, None, None]:
    """Load the batches of an epoch to ``device``.

    Raises:
        ImageError: If so many images in a row cannot be read that something else must be wrong.
    """
    loader: DataLoader = make_loader(images, sampler, workers, device.type == "cuda", _collate)
    with closing(batches_of(loader)) as batches:
        for batch in batches:
            yield ImageBatch(
                batch.images.to(device, non_blocking=True),
                batch.labels.to(device, non_blocking=True),
                batch.unreadable,
            )


def _collate(samples: list[tuple[Tensor, int, list[str]]]) -> ImageBatch:
    images, labels, unreadable = zip(*samples, strict=True)
    return ImageBatch(torch.stack(images), torch.tensor(labels), [name for names in unreadable for name in names])
