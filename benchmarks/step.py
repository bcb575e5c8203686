"""Pre-training step of ViT-S at the published sizes on a CPU, against the plain implementation.

    python benchmarks/step.py

speedup_fp32    seconds of the plain step in float32 over ours in float32, the median of the rounds
speedup_bf16    seconds of the plain step in float32 over ours in bfloat16; null if the CPU does not compute in it

K = 65,536. The step is forward, loss, backward, clipping, optimiser, teacher and centres, on prepared views.
"""

import argparse
import statistics
from typing import Any

import common
import plain
import torch
from torch import Tensor

from passreid_models.pretrain.batches import ViewBatch
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.trainer import PretrainTrainer

BATCH, SIZE, LOCAL_SIZE, PER_AREA = 4, (256, 128), (128, 64), 3


class Ours:
    """The trainer's own step on prepared views, without the photometric part."""

    def __init__(self, dtype: str, global_views: Tensor, local_views: Tensor, **settings: Any) -> None:
        batch, device = global_views.shape[1], global_views.device
        config = PretrainConfig(
            batch_size=batch, dtype=dtype, device=device.type, freeze_last_layer_epochs=0, workers=0, **settings
        )
        self.trainer = PretrainTrainer(config, 1000 * batch, device)
        self.trainer.photometric.batch = lambda views: (global_views, local_views)  # type: ignore[method-assign]
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.losses.append(self.trainer.training_step([ViewBatch(None, [])])["loss"])  # type: ignore[arg-type]


class Plain:
    def __init__(self, dtype: torch.dtype | None, global_views: Tensor, local_views: Tensor, **shape: Any) -> None:
        torch.manual_seed(0)
        networks = [plain.PlainNetwork(**shape).to(global_views.device) for _ in range(2)]
        self.step = plain.PlainStep(*networks, dtype=dtype)
        self.views = list(global_views), list(local_views)
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.losses.append(self.step(*self.views))


def random_views(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = ((2, *SIZE), (3 * PER_AREA, *LOCAL_SIZE))
    return tuple(torch.randn(views, batch, 3, h, w, device=device) for views, h, w in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round instead of 5")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rounds, device = 1 if args.quick else 5, torch.device("cpu")
    torch.set_num_threads(args.threads)

    views = random_views(BATCH, device)
    runs = {
        "plain, float32": Plain(None, *views),
        "ours, float32": Ours("float32", *views),
    }
    if common.has_bfloat16(device):
        runs["ours, bfloat16"] = Ours("bfloat16", *views)
    seconds = common.in_turn(runs, rounds)
    rows = [(f"{name}, step", f"{statistics.median(times):.2f} s") for name, times in seconds.items()]
    rows += [(f"{name}, first loss", f"{run.losses[0]:.3f}") for name, run in runs.items()]
    baseline, fp32, *bf16 = seconds.values()
    figures = {
        "speedup_fp32": common.median_ratio(baseline, fp32),
        "speedup_bf16": common.median_ratio(baseline, bf16[0]) if bf16 else None,
    }
    rows += [(name, "-" if value is None else f"{value:.2f}") for name, value in figures.items()]
    title = f"training step, ViT-S, batch {BATCH}, medians of {rounds} rounds; {common.machine(device)}"
    common.report(title, rows, figures)


if __name__ == "__main__":
    main()
