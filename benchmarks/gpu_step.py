"""Training and descriptors of ViT-S on a GPU: the step of pre-training against the plain implementation in float16.

    python benchmarks/gpu_step.py

speedup                seconds of a plain step over ours, the median of the rounds: ours in bfloat16 with the colours of
                       its views inside, the plain one in float16 on prepared views (its loader makes the colours)
memory_ratio           peak memory of our step over that of the plain one, with parameters and optimiser
kernels                kernels, copies and fills that our step launches
compile_s              seconds to the end of the first step with ``--compile``
compiled_...           speedup and kernels with ``--compile``
wait_share             share of the time with a loader in which pre-training waits for views
finetune_wait_share    the same in ``passreid finetune``, later epochs
..._images_per_s       images a second: ``loaded`` pre-training with a loader, ``finetune``, ``embed`` (files to
                       descriptors)

Batch 128, K = 65,536; JPEG files of 256x128, generated; the loader has all cores but one. Figures are printed as they
are measured, with a table of the stages of a step: time of the device between its first and last kernel, and of the
host. ``--device cpu --quick`` runs the script on a small model without compilation, to test it; without a CUDA device
all figures are null.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy as np
import timm
import torch
from step import Plain
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from passreid_models import Embedder
from passreid_models.data.loader import PREFETCH
from passreid_models.data.sources import open_source
from passreid_models.pretrain import trainer as trainer_module
from passreid_models.pretrain.batches import StepSampler, ViewBatch, ViewDataset, batches_on, make_loader
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.pretrain.views import MultiCrop, Views
from passreid_models.synthetic import SyntheticPersons

NAMES = (
    "speedup", "memory_ratio", "kernels", "compile_s", "compiled_speedup", "compiled_kernels", "wait_share",
    "loaded_images_per_s", "finetune_wait_share", "finetune_images_per_s", "embed_images_per_s",
)  # fmt: skip
SMALL = {  # for a CPU
    "model": "test_pass_vit", "size": (64, 32), "local_size": (32, 16), "num_prototypes": 64, "hidden_dim": 32,
    "bottleneck_dim": 16,
}  # fmt: skip
PLAIN_SMALL = {"dim": 64, "depth": 3, "heads": 2, "size": (64, 32), "hidden": 32, "bottleneck": 16, "prototypes": 64}
STAGES = {  # of the trainer, or of its module
    "colours": ("photometric", "batch"), "teacher": ("teacher", "forward"), "student": ("student", "forward"),
    "loss": ("", "_compare"), "optimiser": ("", "step_optimizer"),
}  # fmt: skip
FUNCTIONS = {"norms, clipping": ("gradient_norms", "clip_to_norm"), "EMA": ("update_teacher",)}


class Benchmark:
    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device, self.small = device, device.type == "cpu"
        self.quick, self.workers = quick, max(1, (os.cpu_count() or 1) - 1)
        self.batch, self.images = (8, 64) if self.small else (128, 2048)
        self.settings: dict[str, Any] = SMALL if self.small else {}
        self.figures: dict[str, float | None] = dict.fromkeys(NAMES)
        self.start = time.perf_counter()

    def show(self, **figures: float | None) -> None:
        self.figures |= figures
        values = (f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in figures.items())
        print(f"{time.perf_counter() - self.start:5.0f} s ", "  ".join(values), flush=True)

    def trainer(self, **more: Any) -> PretrainTrainer:
        config = PretrainConfig(
            batch_size=self.batch, dtype="float32" if self.small else "bfloat16", device=self.device.type,
            freeze_last_layer_epochs=0, workers=0, **self.settings, **more,
        )  # fmt: skip
        return PretrainTrainer(config, 1000 * self.batch, self.device)

    def crop(self) -> MultiCrop:
        return MultiCrop(**{k: v for k, v in self.settings.items() if k in ("size", "local_size")})

    def view_batch(self) -> ViewBatch:
        crop, rng = self.crop(), np.random.default_rng(0)
        params = torch.from_numpy(np.stack([crop.draw_params(rng) for _ in range(self.batch)]))
        sizes = (2, crop.size), (crop.num_views - 2, crop.local_size)
        pixels = (torch.randint(256, (self.batch, v, 3, *s), dtype=torch.uint8, device=self.device) for v, s in sizes)
        return ViewBatch(Views(*pixels, params), [])

    def peak(self, run: Callable[[], object], before: int) -> float:
        """Peak bytes of the first calls, above those allocated ``before`` the run was built; 1 on a CPU."""
        if self.small:
            run()
            return 1.0
        torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(3):  # the first allocates the moments of the optimiser
            run()
        common.synchronize(self.device)
        return float(torch.cuda.max_memory_allocated(self.device) - before)

    def allocated(self) -> int:
        gc.collect()
        return 0 if self.small else torch.cuda.memory_allocated(self.device)

    def several(self, run: Callable[[], object], steps: int) -> None:
        for _ in range(steps):
            run()
        common.synchronize(self.device)

    def pretrain(self) -> None:
        """Steps on prepared batches: time, memory, kernels and stages; then with ``--compile``."""
        rounds, steps = (2, 2) if self.quick else (5, 8)
        before = self.allocated()
        trainer, batch = self.trainer(), self.view_batch()
        ours = partial(trainer.training_step, [batch])
        our_peak, before = self.peak(ours, before), self.allocated()
        views: tuple[Tensor, ...] = tuple(x.clone() for x in trainer.photometric.batch(batch.views))
        plain_run = Plain(None if self.small else torch.float16, *views, **(PLAIN_SMALL if self.small else {}))
        self.show(
            memory_ratio=None if self.small else our_peak / self.peak(plain_run, before), peak_gib=our_peak / 2**30
        )
        runs = {name: partial(self.several, run, steps) for name, run in (("plain", plain_run), ("ours", ours))}
        seconds = common.in_turn(runs, rounds)
        milliseconds = {f"{name}_ms": 1000 * statistics.median(times) / steps for name, times in seconds.items()}
        self.show(speedup=common.median_ratio(seconds["plain"], seconds["ours"]), **milliseconds)
        self.show(kernels=self.kernels(ours))
        self.stages(trainer, batch)
        if not self.small:  # minutes of C++ on a CPU
            self.compiled(batch, runs["plain"], rounds, steps)

    def compiled(self, batch: ViewBatch, plain_run: Callable[[], object], rounds: int, steps: int) -> None:
        trainer, start = self.trainer(compile=True), time.perf_counter()
        compiled = partial(trainer.training_step, [batch])
        self.several(compiled, 1)
        self.show(compile_s=time.perf_counter() - start)
        seconds = common.in_turn({"plain": plain_run, "ours": partial(self.several, compiled, steps)}, rounds)
        self.show(compiled_speedup=common.median_ratio(seconds["plain"], seconds["ours"]))
        self.show(compiled_kernels=self.kernels(compiled))

    def kernels(self, run: Callable[[], object]) -> float | None:
        if self.small:
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            self.several(run, 1)
        return float(sum(e.device_type == torch.autograd.DeviceType.CUDA for e in recorded.events()))

    def stages(self, trainer: PretrainTrainer, batch: ViewBatch) -> None:
        """Print the device's and the host's milliseconds in each stage of a step."""
        host: dict[str, list[float]] = {}
        marks: dict[str, list[tuple[Any, Any]]] = {}

        def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                first, last = self.event(), self.event()
                first.record()
                start = time.perf_counter()
                result = function(*args, **kwargs)
                host.setdefault(stage, []).append(time.perf_counter() - start)
                last.record()
                marks.setdefault(stage, []).append((first, last))
                return result

            return call

        rounds = 2 if self.quick else 10
        with ExitStack() as stack:
            for stage, (owner, name) in STAGES.items():
                target = getattr(trainer, owner) if owner else trainer
                stack.enter_context(patch.object(target, name, timed(stage, getattr(target, name))))
            for stage, names in FUNCTIONS.items():
                for name in names:
                    function = timed(stage, getattr(trainer_module, name))
                    stack.enter_context(patch.object(trainer_module, name, function))
            stack.enter_context(patch.object(Tensor, "backward", timed("backward", Tensor.backward)))
            step = timed("whole step", trainer.training_step)
            for _ in range(rounds):
                step([batch])
        common.synchronize(self.device)
        print("stage             device ms   host ms")
        for stage, pairs in marks.items():
            device_ms = sum(first.elapsed_time(last) for first, last in pairs) / rounds
            print(f"{stage:<16}  {device_ms:9.2f}  {1000 * sum(host[stage]) / rounds:8.2f}", flush=True)

    def event(self) -> Any:
        return Clock() if self.small else torch.cuda.Event(enable_timing=True)

    def loaded(self, folder: Path) -> None:
        """Pre-training with a loader."""
        trainer, crop = self.trainer(), self.crop()
        steps = self.workers * (2 if self.quick else 4)  # each worker makes whole batches: they come in bursts
        dataset = ViewDataset(open_source(str(folder)), crop, crop, 0, 0)
        started, queued = self.workers, PREFETCH * self.workers  # batches before the clock starts, and made beforehand
        sampler = StepSampler(len(dataset.source), self.batch, started + steps + 2 * queued, 0)
        loader = make_loader(dataset, sampler, self.workers, pin_memory=not self.small)
        batches, waited, begin = batches_on(self.device, loader), 0.0, 0.0
        for i in range(started + queued + steps):
            if i == started + queued:
                common.synchronize(self.device)
                waited, begin = 0.0, time.perf_counter()
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            trainer.training_step([batch])
        common.synchronize(self.device)
        seconds = time.perf_counter() - begin
        batches.close()
        self.show(wait_share=waited / seconds, loaded_images_per_s=steps * self.batch / seconds)

    def finetune(self, folder: Path, out: Path) -> None:
        """``passreid finetune`` for some epochs; the first, in which workers and kernels start, does not count."""
        size = self.settings.get("size", (256, 128))
        options = {
            "model": self.settings.get("model", "pass_vit_small_patch16"), "init": "random", "eval-epochs": 0,
            "size": "x".join(map(str, size)), "device": self.device.type, "workers": self.workers, "epochs": 4,
            "log-steps": 1, "out": out, "ids-per-batch": 4 if self.small else 16,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([*common.PASSREID, "finetune", str(folder), *words], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if "images_per_s" in line]
        lines = lines[len(lines) // 4 :]
        seconds = [1 / line["images_per_s"] for line in lines]  # of an image
        waited = sum(line["wait_share"] * s for line, s in zip(lines, seconds, strict=True))
        self.show(finetune_wait_share=waited / sum(seconds), finetune_images_per_s=len(lines) / sum(seconds))

    def embed(self, folder: Path) -> None:
        model = timm.create_model(self.settings.get("model", "pass_vit_small_patch16"))
        embed, paths = Embedder(model, device=self.device), sorted(folder.rglob("*.jpg"))
        embed(paths[: self.batch])
        start = time.perf_counter()
        embed(paths)
        self.show(embed_images_per_s=len(paths) / (time.perf_counter() - start))


class Clock:
    """Event of a CPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "Clock") -> float:
        return 1000 * (later.at - self.at)


def save_image(folder: Path, ids: int, i: int) -> None:
    """Write image i in the layout of Market-1501, 8 images a person."""
    image, pid, camid = SyntheticPersons(ids, images_per_id=8, cameras=4)[i]
    image.save(folder / f"{pid + 1:04d}_c{camid + 1}s1_{i:06d}_00.jpg", quality=common.QUALITY)


def write_images(folder: Path, images: int) -> None:
    folder.mkdir()
    if images < 100:  # not worth the start of processes
        for i in range(images):
            save_image(folder, images // 8, i)
        return
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(save_image, folder, images // 8), range(images), chunksize=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a small model, as a test")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        figures: dict[str, float | None] = dict.fromkeys(NAMES)
        common.report("There is no CUDA device here: nothing was measured.", [("speedup", "-")], figures)
        return
    device = torch.device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(1)
    benchmark = Benchmark(device, args.quick)
    benchmark.pretrain()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "bounding_box_train"
        write_images(images, benchmark.images)
        benchmark.loaded(images)
        benchmark.finetune(Path(folder), Path(folder) / "run")
        benchmark.embed(images)
    rows = [(name, "-" if value is None else f"{value:.2f}") for name, value in benchmark.figures.items()]
    title = f"batch {benchmark.batch}, {os.cpu_count()} cores; {common.machine(device)}"
    common.report(title, rows, benchmark.figures)


if __name__ == "__main__":
    main()
