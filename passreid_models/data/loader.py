"""DataLoader whose workers leave signals to the training process, and end with it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from torch.utils.data import DataLoader, Dataset

from passreid_models.data.images import ImageError

# these stop a run; Slurm warns of pre-emption by a signal that the user chooses, often USR1
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
SIGHUP = getattr(signal, "SIGHUP", None)  # a lost terminal
MAX_TRIES = 1000  # unreadable images in a row
PREFETCH = 4  # batches that each worker makes beforehand


def make_loader(dataset: Dataset, sampler: Any, workers: int, pin_memory: bool, collate: Any) -> DataLoader:
    """Make a loader of batches, whose workers live until ``stopping`` ends.

    Args:
        dataset: Map-style dataset.
        sampler: Sampler of the keys of each batch.
        workers: Loader processes; 0 loads in this process.
        pin_memory: Pin the memory of batches, for a GPU.
        collate: Function from samples to a batch.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals,
    )


def load_readable(source: Any, index: int) -> tuple[Any, int, list[str]]:
    """Load an image or, if it cannot be read, the next one that can.

    Args:
        source: Images with a length and ``load``.
        index: Index of the image.

    Returns:
        The image, its index, and the message of the one at ``index``, if it cannot be read. Others that are passed
        over come with their own index.

    Raises:
        ImageError: If all images, or ``MAX_TRIES`` of them in a row, cannot be read.
    """
    unreadable: list[str] = []
    count = len(source)
    for offset in range(min(MAX_TRIES, count)):
        try:
            i = (index + offset) % count
            return source.load(i), i, unreadable[:1]
        except ImageError as e:
            unreadable.append(str(e))
    raise ImageError(f"{len(unreadable)} images in a row cannot be read; the first: {unreadable[0]}")


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and pre-emption, which reach the whole process group, to the training process."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def stopping(loader: DataLoader) -> Iterator[None]:
    """Context in which a loader is iterated, once or again; its end stops the workers.

    A process that ends before its workers do waits forever.

    Raises:
        ImageError: If the dataset raises it.
        RuntimeError: If a worker died.
    """
    try:
        yield
    except ImageError as e:  # the message of a worker includes its stack trace
        raise ImageError(str(e).rpartition("ImageError: ")[2].rstrip()) from None
    except (ConnectionError, EOFError) as e:  # its files close before it counts as dead, for which alone torch looks
        workers = getattr(loader._iterator, "_workers", [])
        if not workers or not wait([worker.sentinel for worker in workers], timeout=5):
            raise
        raise RuntimeError(f"DataLoader worker died while it sent a batch: {e or type(e).__name__}") from None
    finally:
        if loader._iterator is not None:
            _dismiss(loader._iterator)


def _dismiss(batches: Any) -> None:
    """Stop the workers now, not when the iterator is freed: the traceback of an error can keep it alive."""
    try:
        batches._shutdown_workers()
    finally:
        for worker in batches._workers:
            worker.kill()  # it may be stuck in a read, and ignores SIGTERM
