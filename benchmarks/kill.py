"""kill -9 at random moments of a run, resume, and compare the end with an uninterrupted run's, bit for bit, on a CPU.

kills           how often the run was killed
identical       1 if student, teacher, optimiser, centres and the exported weights end as they do uninterrupted, else 0
max_difference  the largest between any of their values
lost_steps      the most steps that one kill cost, which are made again

A small model that saves a checkpoint every second, with a loader process. The exit status is 1 unless identical.
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
    """A run in processes of its own, one after another."""

    def __init__(self, data: Path, out: Path, epochs: int) -> None:
        self.command = [sys.executable, __file__, "--train", str(data), str(out), str(epochs)]
        self.folder = RunFolder(out)
        self.errors = out.with_suffix(".err")  # no pipe: a loader process may keep it open after its parent is killed

    def start(self) -> None:
        """Start or resume, and return when its imports are done."""
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=errors)
        self.process.stdout.readline()

    def finish(self, seconds: float = 1200) -> None:
        """Wait for its end, which must be a good one."""
        if self.process.wait(seconds):
            raise SystemExit(f"the run failed:\n{self.errors.read_text()[-2000:]}")

    def kill(self, step: int, seconds: float) -> bool:
        """Kill it so long after that step; False if it has ended before."""
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
        lines = self.folder.metrics_file.read_text().splitlines() if self.folder.metrics_file.is_file() else []
        return sum(1 for line in lines if line.endswith("}"))

    def saved_step(self) -> int:
        last = self.folder.latest()
        return int(last.stem.removeprefix("step_")) if last else 0

    def result(self) -> dict[str, Tensor]:
        """All that the run ends with."""
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


def write_images(folder: Path) -> None:
    folder.mkdir()
    persons = SyntheticPersons(IMAGES, images_per_id=1, size=SIZE)
    for i in range(IMAGES):
        persons[i][0].save(folder / f"{i:03d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 kills instead of 20, of a shorter run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", help="to write the runs to; default: the system's temporary one")
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
        write_images(data)
        whole, killed = (Run(data, Path(folder) / name, epochs) for name in ("whole", "killed"))
        start = time.perf_counter()
        whole.start()
        ready = time.perf_counter()
        whole.finish()
        seconds = time.perf_counter() - ready

        rng, made, lost = random.Random(args.seed), 0, 0
        for i in range(kills):
            killed.start()
            at_start = rng.random() < 0.25  # while it reads its state, or before it has one
            step = 0 if at_start else round(total * (i + rng.random()) / (kills + 1))
            if not killed.kill(step, rng.uniform(0, 2 if at_start else 0.5)):
                break
            made += 1
            lost = max(lost, killed.last_step() - killed.saved_step())
        killed.start()
        killed.finish()

        expected, found = whole.result(), killed.result()
        identical = expected.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in expected.items())
        difference = max(float((v.double() - found[k].double()).abs().max()) for k, v in expected.items())
        left = [p.name for p in killed.folder.path.rglob(".*") if p.is_dir()]
    figures = {
        "kills": made, "identical": float(identical), "max_difference": difference, "lost_steps": lost
    }  # fmt: skip
    rows = [(name, f"{value:g}") for name, value in figures.items()]
    rows += [("steps", str(total)), ("uninterrupted", f"{seconds:.1f} s, {ready - start:.1f} s to import")]
    rows += [("temporary folders left", str(len(left)))]
    if made < kills:
        rows.append(("the run ended before the kills did", f"{made} of {kills}"))
    common.report(f"kill -9 and resume; {common.machine(torch.device('cpu'))}", rows, figures)
    sys.exit(not identical)


if __name__ == "__main__":
    main()
