"""Loader of fine-tuning on a CPU, against the published transform of torchvision in a new DataLoader for each epoch.

    python benchmarks/loader.py

worker_speedup          CPU time of a worker for an image, plain over ours: decode, transform, batch in shared memory
worker_speedup_cached   the same, with decoded images kept in memory (``--cache-images auto``), after the first epoch
worker_ms...            those times of ours, in milliseconds
normalise_ms            CPU time of the training process for an image, where it has no GPU to normalise it
folder_ms, tar_ms       CPU time to read and decode an image, of a folder and of a tar file, in random order
start_speedup           wait for the first batch of an epoch, plain over ours in clustering; fine-tuning has none

JPEG files of 128x64, as in Market-1501, trained at 256x128; batch 64; one thread, and 2 workers for the epochs.
"""

import argparse
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from passreid_models.architectures import HALF
from passreid_models.data.images import open_image
from passreid_models.data.loader import stopping
from passreid_models.data.sources import open_source
from passreid_models.reid.batches import KeySampler, TrainImages, collate, load, make_loader, normalise, train_transform
from passreid_models.reid.config import FinetuneConfig
from passreid_models.synthetic import SyntheticPersons

BATCH, SIZE, WORKERS = 64, (256, 128), 2


class PlainImages(Dataset):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.transform = T.Compose(
            [
                T.Resize(SIZE, T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.RandomCrop(SIZE, 10),
                T.ToTensor(),
                T.Normalize(*HALF),
                T.RandomErasing(0.5, (0.02, 1 / 3), (0.3, 1 / 0.3), value="random"),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(open_image(self.paths[i]))


def cpu_ms(run: Callable[[int], object], batches: int) -> float:
    """CPU milliseconds for an image; ``run`` makes the batch of a number."""
    seconds = []
    for nth in range(batches):
        start = time.process_time()
        run(nth)
        seconds.append(time.process_time() - start)
    return 1000 * statistics.median(seconds) / BATCH


def share(tensors: Iterable[Any]) -> None:
    """Move tensors to shared memory, as a worker does."""
    for x in tensors:
        if isinstance(x, torch.Tensor):
            x.share_memory_()


def seconds_to_first(batches: Iterable[Any]) -> float:
    """Seconds until the first batch; the others are drawn and dropped."""
    start, first = time.perf_counter(), 0.0
    for _ in batches:
        first = first or time.perf_counter() - start
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 batches and 2 epochs instead of 16 and 6")
    args = parser.parse_args()
    count, epochs = (2, 2) if args.quick else (16, 6)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        persons = SyntheticPersons(count * BATCH, images_per_id=1)
        paths = common.write_images(Path(folder), (persons[i][0].resize((64, 128)) for i in range(count * BATCH)))
        plain = PlainImages(paths)
        transform = train_transform(FinetuneConfig(size=SIZE))
        read, cached = (TrainImages(paths, transform, 0, size) for size in (None, SIZE))

        def ours(images: TrainImages, nth: int) -> None:
            share(collate([images[nth, i, nth * BATCH + i] for i in range(BATCH)]))

        for nth in range(count):
            ours(cached, nth)  # the first epoch decodes
        ms = {
            "plain": cpu_ms(lambda nth: share([torch.stack([plain[nth * BATCH + i] for i in range(BATCH)])]), count),
            "worker_ms": cpu_ms(lambda nth: ours(read, nth), count),
            "worker_ms_cached": cpu_ms(lambda nth: ours(cached, nth), count),
        }
        with tarfile.open(Path(folder) / "images.tar", "w:") as shard:
            for path in paths:
                shard.add(path, path.name)
        order = np.random.default_rng(0).permutation(count * BATCH).reshape(count, BATCH)
        for name, data in (("folder_ms", folder), ("tar_ms", shard.name)):
            source = open_source(data, Path(folder) / "cache")
            ms[name] = cpu_ms(lambda nth, source=source: [source.load(i) for i in order[nth]], count)
        raw = collate([read[0, i, i] for i in range(BATCH)])
        ms["normalise_ms"] = cpu_ms(lambda nth: normalise(*raw[:3]), count)

        sampler = KeySampler(lambda epoch: list(np.arange(count * BATCH).reshape(count, BATCH, 1)), [0])
        sampler.steps = range(count)
        loader, starts = make_loader(read, sampler, WORKERS, False), dict[str, list[float]](plain=[], ours=[])
        with stopping(loader):
            seconds_to_first(loader)  # starts the workers
            for _ in range(epochs):
                starts["plain"].append(seconds_to_first(DataLoader(plain, BATCH, num_workers=WORKERS)))
                starts["ours"].append(seconds_to_first(load(loader, torch.zeros(count * BATCH, dtype=torch.int64))))
    figures: dict[str, float | None] = {
        "worker_speedup": ms["plain"] / ms["worker_ms"],
        "worker_speedup_cached": ms["plain"] / ms["worker_ms_cached"],
        "start_speedup": common.median_ratio(starts["plain"], starts["ours"]),
        **{name: value for name, value in ms.items() if name != "plain"},
    }
    rows = [(name, f"{value:.2f}") for name, value in figures.items()]
    rows += [(f"epoch start, {name}", f"{1000 * statistics.median(s):.0f} ms") for name, s in starts.items()]
    common.report(f"loader of fine-tuning, {SIZE[0]}x{SIZE[1]}; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
