"""A loader whose workers leave signals to the training process, and go when it goes."""

import signal
from collections.abc import Generator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from passreid_models.data.images import ImageError

# that stop a run; Slurm warns of pre-emption by a signal of one's choice, often USR1
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
MAX_TRIES = 1000  # unreadable images in a row


def make_loader(dataset: Dataset, sampler: Any, workers: int, pin_memory: bool, collate: Any) -> DataLoader:
    """A loader of batches.

    Args:
        dataset: Map-style.
        sampler: Gives the keys of each batch.
        workers: Processes that load; 0 loads in this one.
        pin_memory: For a GPU.
        collate: Makes a batch of samples.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
    )


def load_readable(source: Any, index: int) -> tuple[Any, int, list[str]]:
    """``source.load(index)``, or the next image that can be read, its index, and why those before could not.

    Args:
        source: Has a length and ``load``.
        index: Of the image.

    Raises:
        ImageError: If so many images in a row cannot be read that something else must be wrong.
    """
    unreadable: list[str] = []
    count = len(source)
    for tried in range(min(MAX_TRIES, count)):
        try:
            at = (index + tried) % count
            return source.load(at), at, unreadable
        except ImageError as e:
            unreadable.append(str(e))
    raise ImageError(f"{len(unreadable)} images in a row cannot be read; the first: {unreadable[0]}")


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and pre-emption, which reach the whole process group, to the training process."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def loaded(loader: DataLoader) -> Generator[Any, None, None]:
    """The batches of a loader.

    Close it: then the workers leave, and a process that ends before them waits forever.

    Raises:
        ImageError: As the dataset.
    """
    batches = iter(loader)
    try:
        yield from batches
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
