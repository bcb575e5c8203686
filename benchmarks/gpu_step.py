"""Training step of ViT-S on a CUDA device: ours in bfloat16 against the plain implementation in float16.

    python benchmarks/gpu_step.py

speedup                seconds of a plain step over ours, on prepared views, the median of the rounds
images_per_s           images per second in those steps
peak_gib               peak memory of a step, including parameters and optimiser
loaded_images_per_s    images per second with a loader
wait_share             share of the time with a loader in which the step waits for views
plain_...              the same figures of the plain implementation (``plain.py``)
finetune_images_per_s  images per second of fine-tuning with its loader, over several epochs
finetune_wait_share    share of that time in which the step waits for images

Batch 128, K = 65,536. The loader reads JPEG files of 256x128 with all cores but one; ours runs the photometric part on
the device, the plain implementation in the loader. Figures are printed as they are measured. Without CUDA all are null.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import common
import numpy as np
import plain
import torch
from PIL import Image
from step import Ours, Plain, random_views
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from passreid_models.data.loader import stopping
from passreid_models.data.sources import open_source
from passreid_models.pretrain.batches import StepSampler, ViewDataset, batches_on, make_loader
from passreid_models.pretrain.views import MultiCrop
from passreid_models.reid.batches import KeySampler, TrainImages, load, train_transform
from passreid_models.reid.batches import make_loader as make_reid_loader
from passreid_models.reid.config import FinetuneConfig
from passreid_models.reid.run import complete
from passreid_models.reid.samplers import identity_batches
from passreid_models.reid.supervised import SupervisedTrainer
from passreid_models.synthetic import SyntheticPersons

BATCH, IMAGES = 128, 1024
FIGURES = ("images_per_s", "peak_gib", "loaded_images_per_s", "wait_share")


def null_figures() -> dict[str, float | None]:
    figures = {"speedup": None} | {prefix + name: None for prefix in ("", "plain_") for name in FIGURES}
    return figures | dict.fromkeys(("finetune_images_per_s", "finetune_wait_share"))


class PlainDataset(Dataset):
    def __init__(self, folder: Path, length: int) -> None:
        self.files, self.length, self.views = sorted(folder.glob("*.jpg")), length, plain.PlainViews()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        return self.views(Image.open(self.files[i % len(self.files)]).convert("RGB"))


def save_image(folder: Path, i: int) -> None:
    SyntheticPersons(IMAGES, images_per_id=1)[i][0].save(folder / f"{i:05d}.jpg", quality=common.QUALITY)


def write_images(folder: Path, processes: int) -> None:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(save_image, folder), range(IMAGES), chunksize=16))


def run_ours(ours: Ours, folder: Path, steps: int, workers: int) -> Iterator[Callable[[], object]]:
    """Yield steps as their views arrive."""
    del ours.trainer.photometric.batch  # undoes the replacement in `Ours`
    crop = MultiCrop()
    dataset = ViewDataset(open_source(str(folder)), crop, crop, 0, 0)
    sampler = StepSampler(len(dataset.source), BATCH, steps, 0)
    loader = make_loader(dataset, sampler, workers, pin_memory=True)
    for batch in batches_on(ours.trainer.device, loader):
        yield partial(ours.trainer.training_step, [batch])


def run_plain(run: Plain, folder: Path, steps: int, workers: int) -> Iterator[Callable[[], object]]:
    loader = DataLoader(PlainDataset(folder, steps * BATCH), BATCH, num_workers=workers, pin_memory=True)
    for views in loader:
        yield partial(run.step, *([x.to(run.step.device, non_blocking=True) for x in kind] for kind in views))


def run_finetune(device: torch.device, folder: Path, steps: int, workers: int) -> Iterator[Callable[[], object]]:
    """Yield steps of fine-tuning at 256x128, of 32 identities x 4 images, as their images arrive."""
    config = complete(FinetuneConfig(data=str(folder), init="random", ids_per_batch=BATCH // 4, images_per_id=4))
    labels = np.arange(IMAGES) // 4
    trainer = SupervisedTrainer(config, IMAGES, [str(i) for i in range(IMAGES // 4)], [steps], device)
    images = TrainImages(sorted(folder.glob("*.jpg")), train_transform(config), 0, config.size)
    sampler = KeySampler(
        lambda epoch: identity_batches(labels, BATCH // 4, 4, 0, epoch), range(0, steps, IMAGES // BATCH)
    )
    sampler.steps = range(steps)
    loader = make_reid_loader(images, sampler, workers, device.type == "cuda")
    with stopping(loader):
        for batch in load(loader, torch.from_numpy(labels).to(device)):
            yield partial(trainer.training_step, [batch])


def with_loader(steps: Iterator[Callable[[], object]], warm_ups: int, device: torch.device) -> tuple[float, float]:
    """Images per second and share of the time spent waiting for views, after the warm-ups."""
    waited, count, start = 0.0, -warm_ups, time.perf_counter()
    while True:
        if count == 0:
            common.synchronize(device)
            waited, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        step = next(steps, None)
        waited += time.perf_counter() - before
        if step is None:
            break
        step()
        common.synchronize(device)
        count += 1
    seconds = time.perf_counter() - start
    return count * BATCH / seconds, waited / seconds


def with_peak(build: Callable[[], Callable[[], None]], device: torch.device) -> tuple[Callable[[], None], float]:
    """Build a step; return it and the peak GiB of its first calls above the memory allocated before."""
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    run = build()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):  # the first allocates the moments of the optimiser
        run()
    common.synchronize(device)
    return run, (torch.cuda.max_memory_allocated(device) - before) / 2**30


def measure(device: torch.device, quick: bool, compiled: bool) -> dict[str, float | None]:
    rounds, steps, workers = 2 if quick else 7, 3 if quick else 10, max(1, (os.cpu_count() or 1) - 1)
    figures, views = null_figures(), random_views(BATCH, device)

    def show(*names: str) -> None:
        print(*(f"{name} {figures[name]:.2f}" for name in names), sep="  ", flush=True)

    ours, figures["peak_gib"] = with_peak(lambda: Ours("bfloat16", *views, compile=compiled), device)
    plain_run, figures["plain_peak_gib"] = with_peak(lambda: Plain(torch.float16, *views), device)
    show("peak_gib", "plain_peak_gib")

    def several(run: Callable[[], None]) -> None:
        for _ in range(steps):
            run()
        common.synchronize(device)

    seconds = common.in_turn({"plain_": partial(several, plain_run), "": partial(several, ours)}, rounds)
    figures["speedup"] = common.median_ratio(*seconds.values())
    for prefix, times in seconds.items():
        figures[f"{prefix}images_per_s"] = steps * BATCH / statistics.median(times)
    show("speedup", "images_per_s", "plain_images_per_s")

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), workers + 1)
        measured = workers * (1 if quick else 4)  # each worker makes whole batches, so batches come in bursts
        for prefix, run, start in (("", ours, run_ours), ("plain_", plain_run, run_plain)):
            loaded_steps = start(run, Path(folder), workers + measured, workers)
            images_per_s, wait_share = with_loader(loaded_steps, workers, device)
            figures[f"{prefix}loaded_images_per_s"], figures[f"{prefix}wait_share"] = images_per_s, wait_share
            show(f"{prefix}loaded_images_per_s", f"{prefix}wait_share")
        warm_ups = max(workers, IMAGES // BATCH)  # an epoch: images are then in memory
        finetune_steps = run_finetune(device, Path(folder), warm_ups + 2 * measured, workers)
        names = "finetune_images_per_s", "finetune_wait_share"
        figures |= zip(names, with_loader(finetune_steps, warm_ups, device), strict=True)
        show(*names)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 rounds instead of 7, and fewer steps")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        common.report("There is no CUDA device here: nothing was measured.", [("speedup", "-")], null_figures())
        return
    device = torch.device("cuda")
    figures = measure(device, args.quick, args.compile)
    rows = [(name, f"{value:.2f}") for name, value in figures.items()]
    title = f"pre-training step, ViT-S, batch {BATCH}, {os.cpu_count()} cores; {common.machine(device)}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
