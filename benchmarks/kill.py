"""Final state of a pre-training run after kills (kill -9) at random moments, against that of an uninterrupted run.

    python benchmarks/kill.py

kills           number of kills
identical       1 if student, teacher, optimiser, centres and exported weights are bit for bit those of the
                uninterrupted run, else 0
max_difference  largest difference between any of their values
lost_steps      largest number of steps that had to be repeated after a kill

On a CPU, with a small model that saves a checkpoint every second and a loader process. The exit status is 1 unless
identical.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import safetensors.torch
import torch
from torch import Tensor

from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.run import train
from passreid_models.synthetic import SyntheticPersons
from passreid_models.training.folder import RunFolder

IMAGES, SIZE, BATCH = 48, (64, 32), 8


def make_config(data: str, out: str, epochs: int) -> PretrainConfig:
    return PretrainConfig(
        data=data, out=out, epochs=epochs, resume="auto", model="test_pass_vit", size=SIZE, batch_size=BATCH,
        num_prototypes=1024, hidden_dim=128, bottleneck_dim=32, workers=1, device="cpu", log_steps=1,
        save_minutes=1 / 60, save_epochs=10**6,
    )  # fmt: skip


class Run:
    """A run in processes of its own, one for each start."""

    def __init__(self, data: Path, out: Path, epochs: int) -> None:
        self.command = [sys.executable, __file__, "--train", str(data), str(out), str(epochs)]
        self.folder = RunFolder(out)
        self.errors = out.with_suffix(
            ".err"
        )  # a file: a loader process may keep a pipe open after its parent is killed

    def start(self) -> None:
        """Start or resume the run; return when its imports are done."""
        with self.errors.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=errors)
        self.process.stdout.readline()

    def finish(self, seconds: float = 1200) -> None:
        """Wait until the run ends; exit if it failed."""
        if self.process.wait(seconds):
            raise SystemExit(f"the run failed:\n{self.errors.read_text(encoding='utf-8')[-2000:]}")

    def kill(self, step: int, seconds: float) -> bool:
        """Kill the run ``seconds`` after ``step``; return False if it ended before."""
        while self.last_step() < step and self.process.poll() is None:
            time.sleep(0.01)
        try:
            self.finish(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return True
        return False

    def last_step(self) -> int:
        lines = (
            self.folder.metrics_file.read_text(encoding="utf-8").splitlines()
            if self.folder.metrics_file.is_file()
            else []
        )
        return sum(1 for line in lines if line.endswith("}"))

    def saved_step(self) -> int:
        last = self.folder.latest()
        return int(last.stem.removeprefix("step_")) if last else 0

    def result(self) -> dict[str, Tensor]:
        """Tensors of the last checkpoint and of the exported weights."""
        _, state = self.folder.load_latest()
        names = ("step", "student", "teacher", "optimizer", "centers")
        exported = safetensors.torch.load_file(self.folder.export_folder / "model.safetensors")
        return dict(flat("", {**{name: state[name] for name in names}, "export": exported}))


def flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(f"{name}/{key}", inner)
    elif isinstance(value, list | tuple):
        yield from flat(name, dict(enumerate(value)))
    elif isinstance(value, int | float | Tensor):
        yield name, torch.as_tensor(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills of a shorter run instead of 20")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--folder", help="where to write the runs; default: the system's temporary folder")
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        data, out, epochs = args.train
        print("ready", flush=True)
        train(make_config(data, out, int(epochs)))
        return

    kills, epochs = (3, 12) if args.quick else (20, 60)
    total = epochs * (IMAGES // BATCH)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data = Path(folder) / "images"
        data.mkdir()
        persons = SyntheticPersons(IMAGES, images_per_id=1, size=SIZE)
        common.write_images(data, (persons[i][0] for i in range(IMAGES)), ".png")
        uninterrupted, killed = (Run(data, Path(folder) / name, epochs) for name in ("whole", "killed"))
        start = time.perf_counter()
        uninterrupted.start()
        ready = time.perf_counter()
        uninterrupted.finish()
        seconds = time.perf_counter() - ready

        rng, num_kills, lost_steps = random.Random(args.seed), 0, 0
        for i in range(kills):
            killed.start()
            at_start = rng.random() < 0.25  # before the first step, or while it reads a checkpoint
            step = 0 if at_start else round(total * (i + rng.random()) / (kills + 1))
            if not killed.kill(step, rng.uniform(0, 2 if at_start else 0.5)):
                break
            num_kills += 1
            lost_steps = max(lost_steps, killed.last_step() - killed.saved_step())
        killed.start()
        killed.finish()

        expected, actual = uninterrupted.result(), killed.result()
        identical = expected.keys() == actual.keys() and all(torch.equal(v, actual[k]) for k, v in expected.items())
        difference = max(float((v.double() - actual[k].double()).abs().max()) for k, v in expected.items())
        leftovers = [p.name for p in killed.folder.path.rglob(".*") if p.is_dir()]
    figures = {
        "kills": num_kills, "identical": float(identical), "max_difference": difference, "lost_steps": lost_steps
    }  # fmt: skip
    rows = [(name, f"{value:g}") for name, value in figures.items()]
    rows += [("steps", str(total)), ("uninterrupted", f"{seconds:.1f} s, {ready - start:.1f} s to import")]
    rows += [("temporary folders left", str(len(leftovers)))]
    if num_kills < kills:
        rows.append(("kills before the run ended", f"{num_kills} of {kills}"))
    common.report(f"kill -9 and resume; {common.machine(torch.device('cpu'))}", rows, figures)
    sys.exit(not identical)


if __name__ == "__main__":
    main()
