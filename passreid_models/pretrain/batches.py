"""Batches of views in an order that is a function of the seed: sample i in epoch e has the same views in every run."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from passreid_models.data import loader
from passreid_models.data.loader import load_readable, stopping
from passreid_models.data.sources import Source
from passreid_models.pretrain.views import MultiCrop, Views

VIEWS, ORDER = 1, 2  # last entry of a seed, its purpose; not 0, since (5,) and (5, 0) are one seed to numpy


class ViewBatch(NamedTuple):
    """Views of a micro-batch, and its unreadable images, for each of which the next image was taken."""

    views: Views  # each field with a leading B
    unreadable: list[str]

    @property
    def num_images(self) -> int:
        return len(self.views.global_views)


class ViewDataset(Dataset):
    """Views of sample i in epoch e, at the key e * N + i: a function of (seed, e, i) and nothing else."""

    def __init__(self, source: Source, crop: MultiCrop, coarse_crop: MultiCrop, coarse_epochs: int, seed: int) -> None:
        """
        Args:
            source: Source of N images.
            crop: Multi-crop of the later epochs.
            coarse_crop: Multi-crop of the first ``coarse_epochs``.
            coarse_epochs: Number of epochs with ``coarse_crop``.
            seed: Seed of the views.
        """
        self.source, self.crop, self.coarse_crop = source, crop, coarse_crop
        self.coarse_epochs, self.seed = coarse_epochs, seed

    def __getitem__(self, key: int) -> tuple[Views, list[str]]:
        """
        Raises:
            ImageError: If none of the next ``MAX_TRIES`` images can be read.
        """
        epoch, index = divmod(key, len(self.source))
        image, _, unreadable = load_readable(self.source, index)
        crop = self.coarse_crop if epoch < self.coarse_epochs else self.crop
        return crop(image, np.random.default_rng((self.seed, epoch, index, VIEWS))), unreadable


@dataclass(frozen=True)
class StepSampler(Sampler[list[int]]):
    """Keys of the micro-batches of one process, from ``start`` to the last step.

    Each epoch has its own permutation, and leaves out the images that do not fill its last batch. A step takes the same
    images whatever the number of processes.
    """

    num_images: int
    batch_size: int  # of a step, over all processes
    num_steps: int
    seed: int
    start: int = 0
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    @property
    def epoch_steps(self) -> int:
        return self.num_images // self.batch_size

    def __len__(self) -> int:
        return (self.num_steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        order, current = torch.empty(0), -1
        for step in range(self.start, self.num_steps):
            epoch, batch = divmod(step, self.epoch_steps)
            if epoch != current:
                rng = np.random.default_rng((self.seed, epoch, 0, ORDER))
                order, current = torch.from_numpy(rng.permutation(self.num_images)), epoch
            keys = order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]
            for micro_batch in keys.chunk(self.accumulate):
                yield (micro_batch + epoch * self.num_images).tolist()


def _collate(samples: list[tuple[Views, list[str]]]) -> ViewBatch:
    """Stack the views of samples."""
    views = Views(*(torch.stack(tensors) for tensors in zip(*(v for v, _ in samples), strict=True)))
    return ViewBatch(views, [name for _, names in samples for name in names])


make_loader = partial(loader.make_loader, collate=_collate)  # one for all remaining steps: it prefetches across epochs


def batches_on(device: torch.device, batches: DataLoader) -> Generator[ViewBatch, None, None]:
    """Yield a loader's batches with their views on ``device``; params stay on the CPU.

    Raises:
        ImageError: If the dataset raises it.
    """
    with stopping(batches):
        for views, unreadable in batches:
            global_views, local_views = (x.to(device, non_blocking=True) for x in views[:2])
            yield ViewBatch(Views(global_views, local_views, views.params), unreadable)
