"""Batches of views in an order that is a function of the seed: sample i in epoch e has the same views in every run."""

import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from passreid_models.embed import ImageError
from passreid_models.ssl.sources import Source
from passreid_models.ssl.views import MultiCrop, Views

# that stop a run; Slurm warns of pre-emption by a signal of one's choice, often USR1
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
VIEWS, ORDER = 1, 2  # what a seed is for; at the end, since numpy takes (5,) and (5, 0) for the same
MAX_TRIES = 1000  # unreadable images in a row


class Batch(NamedTuple):
    """The views of a micro-batch, and the images that could not be read and were replaced by the next one."""

    views: Views  # with a leading B
    unreadable: list[str]


class ViewDataset(Dataset):
    """Views of sample i in epoch e, at the key e * N + i: a function of (seed, e, i) and nothing else."""

    def __init__(self, source: Source, crop: MultiCrop, coarse_crop: MultiCrop, coarse_epochs: int, seed: int) -> None:
        """
        Args:
            source: N images.
            crop: Cuts the views.
            coarse_crop: Cuts them in the first ``coarse_epochs``.
            coarse_epochs: Number of epochs with ``coarse_crop``.
            seed: Of the views.
        """
        self.source, self.crop, self.coarse_crop = source, crop, coarse_crop
        self.coarse_epochs, self.seed = coarse_epochs, seed

    def __getitem__(self, key: int) -> tuple[Views, list[str]]:
        """
        Raises:
            ImageError: If so many images in a row cannot be read that something else must be wrong.
        """
        epoch, index = divmod(key, len(self.source))
        unreadable: list[str] = []
        for tried in range(min(MAX_TRIES, len(self.source))):
            try:
                image = self.source.load((index + tried) % len(self.source))
                break
            except ImageError as e:
                unreadable.append(str(e))
        else:
            raise ImageError(f"{len(unreadable)} images in a row cannot be read; the first: {unreadable[0]}")
        crop = self.coarse_crop if epoch < self.coarse_epochs else self.crop
        return crop(image, np.random.default_rng((self.seed, epoch, index, VIEWS))), unreadable


@dataclass(frozen=True)
class StepSampler(Sampler[list[int]]):
    """Keys of the micro-batches of one process, from ``start`` to the last step.

    Each epoch is a permutation of its own; images that do not fill a batch are left out, others each time. A step takes
    the same images whatever the number of processes.
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
            epoch, nth = divmod(step, self.epoch_steps)
            if epoch != current:
                rng = np.random.default_rng((self.seed, epoch, 0, ORDER))
                order, current = torch.from_numpy(rng.permutation(self.num_images)), epoch
            keys = order[nth * self.batch_size : (nth + 1) * self.batch_size][self.rank :: self.world_size]
            for micro in keys.chunk(self.accumulate):
                yield (micro + epoch * self.num_images).tolist()


def make_loader(dataset: ViewDataset, sampler: StepSampler, workers: int, pin_memory: bool) -> DataLoader:
    """A loader of ``Batch``, one over all remaining steps, so that it prefetches across epochs."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
    )


def _collate(samples: list[tuple[Views, list[str]]]) -> Batch:
    views = Views(*(torch.stack(tensors) for tensors in zip(*(v for v, _ in samples), strict=True)))
    return Batch(views, [name for _, names in samples for name in names])


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and pre-emption, which reach the whole process group, to the training process."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def batches_on(device: torch.device, loader: DataLoader) -> Generator[Batch, None, None]:
    """Batches of a loader with their views on ``device``; the parameters stay on the CPU.

    Close it: then the workers leave, and a process that ends before them waits forever.

    Raises:
        ImageError: As the dataset.
    """
    batches = iter(loader)
    try:
        for views, unreadable in batches:
            global_views, local_views = (x.to(device, non_blocking=True) for x in views[:2])
            yield Batch(Views(global_views, local_views, views.params), unreadable)
    except ImageError as e:  # that of a worker comes with its stack trace
        raise ImageError(str(e).rpartition("ImageError: ")[2].rstrip()) from None
    finally:
        if loader.num_workers:
            _dismiss(batches)


def _dismiss(batches: Any) -> None:
    """Stop the workers now: the end of the iterator would, but the traceback of an error can keep it alive."""
    try:
        batches._shutdown_workers()
    finally:
        for worker in batches._workers:
            worker.kill()  # stuck in a read, and deaf to SIGTERM
