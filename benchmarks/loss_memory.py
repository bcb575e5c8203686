"""Peak memory and time of projection heads and loss, forward and backward, against the plain implementation.

    python benchmarks/loss_memory.py

peak_ratio      our peak memory above inputs and parameters over that of the plain one, each in a process of its own
time_ratio      our seconds over those of the plain one, in turn in one process, the median of the rounds

Ours is the chunked path of PASSLoss, which keeps no logits. The inputs are the 26 token outputs of the student (CLS of
11 views, each PART of 5) and the 8 of the teacher, of width 384. ``peak.py`` tells how the memory is measured; the
times are with glibc's own settings.
"""

import argparse
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import peak
import plain
import torch
from torch import Tensor, nn

from passreid_models.device import pick_device
from passreid_models.pretrain.heads import ProjectionHead
from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.network import Projections

DIM, PROTOTYPES, BATCH, TEACHER_TEMP = 384, 65536, 64, 0.04
VIEWS = (11, 5, 5, 5)  # of the student, for CLS and each PART; the teacher has 2 of each


def tokens(views: tuple[int, ...], batch: int, device: torch.device, requires_grad: bool) -> list[Tensor]:
    return [torch.randn(v, batch, DIM, device=device, requires_grad=requires_grad) for v in views]


class Ours:
    def __init__(self, prototypes: int, device: torch.device) -> None:
        heads = [nn.ModuleList(ProjectionHead(DIM, prototypes) for _ in VIEWS).to(device) for _ in range(2)]
        self.student, self.teacher = heads[0], heads[1].requires_grad_(False)
        self.criterion = PASSLoss(prototypes, len(VIEWS) - 1).to(device)

    def __call__(self, student: list[Tensor], teacher: list[Tensor]) -> float:
        targets, outputs = self.project(self.teacher, teacher), self.project(self.student, student)
        loss, _ = self.criterion.chunked(outputs, targets, TEACHER_TEMP)
        loss.backward()
        return loss.item()

    @staticmethod
    def project(heads: nn.ModuleList, x: list[Tensor]) -> Projections:
        features = [head.features(t) for head, t in zip(heads, x, strict=True)]
        prototypes, gains = zip(*(head.factors() for head in heads), strict=True)
        return Projections(features, list(prototypes), list(gains))


class Plain:
    def __init__(self, prototypes: int, device: torch.device) -> None:
        heads = [nn.ModuleList(plain.Head(DIM, 2048, 256, prototypes) for _ in VIEWS).to(device) for _ in range(2)]
        self.student, self.teacher = heads[0], heads[1].requires_grad_(False)
        self.centers = [torch.zeros(prototypes, device=device) for _ in VIEWS]

    def __call__(self, student: list[Tensor], teacher: list[Tensor]) -> float:
        with torch.no_grad():
            targets = self.project(self.teacher, teacher)
        loss = plain.plain_loss(self.project(self.student, student), targets, self.centers, TEACHER_TEMP)
        loss.backward()
        return loss.item()

    @staticmethod
    def project(heads: nn.ModuleList, x: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return [head(t.flatten(0, 1)).split(t.shape[1]) for head, t in zip(heads, x, strict=True)]


IMPLEMENTATIONS: dict[str, type[Ours] | type[Plain]] = {"ours": Ours, "plain": Plain}


def prepare(name: str, batch: int, prototypes: int, device: torch.device) -> Callable[[], float]:
    """Make parameters and inputs and run one small pass, so that code and scratch space exist before measuring."""
    torch.manual_seed(0)
    heads = IMPLEMENTATIONS[name](prototypes, device)
    for key, p in (*heads.student.named_parameters(), *heads.teacher.named_parameters()):
        if not key.endswith("original0"):  # all but the gains, so that both implementations have the same weights
            nn.init.normal_(p, std=0.02)
    small = (tokens(VIEWS, 1, device, True), tokens((2,) * len(VIEWS), 1, device, False))
    student, teacher = tokens(VIEWS, batch, device, True), tokens((2,) * len(VIEWS), batch, device, False)

    def run(inputs: tuple[list[Tensor], list[Tensor]] = (student, teacher)) -> float:
        loss = heads(*inputs)
        heads.student.zero_grad()
        for x in inputs[0]:
            x.grad = None
        return loss

    run(small)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round instead of 5")
    parser.add_argument("--device", help="default: CUDA if there is one, else the CPU")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--prototypes", type=int, default=PROTOTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, rounds = pick_device(args.device), 1 if args.quick else 5
    torch.set_num_threads(args.threads)
    if args.measure:
        run = prepare(args.measure, args.batch, args.prototypes, device)
        peak.report_peak(lambda: {"loss": run()}, device)
        return

    available = (
        int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))[1]) / peak.MIB
    )
    sizes = ["--device", device.type, "--threads", args.threads, "--batch", args.batch, "--prototypes", args.prototypes]
    results = {name: peak.in_process(__file__, "--measure", name, *sizes) for name in IMPLEMENTATIONS}
    rows = [("memory available before, host", f"{available:.1f} GiB")]
    rows += [(f"{name}, peak", f"{result['extra'] / peak.MIB:.0f} MiB") for name, result in results.items()]
    rows += [(f"{name}, loss", f"{result['loss']:.4f}") for name, result in results.items()]

    runs = {name: prepare(name, args.batch, args.prototypes, device) for name in IMPLEMENTATIONS}

    def timed(run: Callable[[], float]) -> None:
        run()
        common.synchronize(device)

    seconds = common.in_turn({name: partial(timed, run) for name, run in runs.items()}, rounds)
    rows += [(f"{name}, time", f"{statistics.median(times):.2f} s") for name, times in seconds.items()]
    figures = {
        "peak_ratio": results["ours"]["extra"] / results["plain"]["extra"],
        "time_ratio": common.median_ratio(seconds["ours"], seconds["plain"]),
    }
    rows += [(name, f"{value:.3f}") for name, value in figures.items()]
    title = f"heads and loss, forward and backward, batch {args.batch}, {args.prototypes:,} prototypes"
    title = f"{title}, medians of {rounds} rounds; {common.machine(device)}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
