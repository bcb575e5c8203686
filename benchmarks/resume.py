"""Seconds to save a pre-training checkpoint and to resume from it: ViT-S, K = 65,536, on a CPU.

    python benchmarks/resume.py

save_s              seconds to write a checkpoint, until it is on the disk
size_mib            its size
resume_s            seconds from the start of a new process to the end of its first step, the sum of
  start_s             imports, building the networks and loading the checkpoint
  step_s              the first views and the first step
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import common
import torch

from passreid_models.data.sources import open_source
from passreid_models.pretrain.batches import StepSampler, ViewBatch, ViewDataset, batches_on, make_loader
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.training.folder import RunFolder

SMALL = dict(model="test_pass_vit", size=(64, 32), num_prototypes=1024, hidden_dim=128, bottleneck_dim=32)


def make_config(folder: str, quick: bool) -> PretrainConfig:
    settings = SMALL if quick else {}
    return PretrainConfig(  # prototypes are trained from the start, so that the first checkpoint has their moments, too
        data="synthetic:ids=8,images=4",
        out=folder,
        batch_size=4,
        epochs=100,
        workers=0,
        device="cpu",
        freeze_last_layer_epochs=0,
        **settings,
    )


def first_batch(trainer: PretrainTrainer) -> ViewBatch:
    """Views of the trainer's next step, from a loader like the trainer's own."""
    config = trainer.config
    crop = config.crop(config.epochs)
    dataset = ViewDataset(open_source(config.data), crop, crop, 0, config.seed)
    sampler = StepSampler(trainer.num_images, config.batch_size, trainer.step + 1, config.seed, trainer.step)
    return next(batches_on(trainer.device, make_loader(dataset, sampler, 0, False)))


def make_trainer(config: PretrainConfig) -> PretrainTrainer:
    return PretrainTrainer(config, len(open_source(config.data)), torch.device("cpu"))


def resume(config: PretrainConfig) -> tuple[float, float]:
    """Load the newest checkpoint and run one step, in a new process; return the times before and after the step."""
    trainer = make_trainer(config)
    _, state = RunFolder(config.out).load_latest()
    trainer.load_state(state)
    ready = time.time()
    trainer.training_step([first_batch(trainer)])
    return ready, time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="test_pass_vit with K = 1,024")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where to write the run; default: the system's temporary folder")
    parser.add_argument("--resume", metavar="RUN", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.resume:
        print(json.dumps(resume(make_config(args.resume, args.quick))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows, figures = measure(make_config(folder, args.quick), args)
    model = "test_pass_vit, K = 1,024" if args.quick else "ViT-S, K = 65,536"
    common.report(f"save and resume, {model}; {common.machine(torch.device('cpu'))}", rows, figures)


def measure(config: PretrainConfig, args: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, float | None]]:
    trainer = make_trainer(config)
    trainer.training_step([first_batch(trainer)])  # allocates the moments of the optimiser
    run = RunFolder(config.out)
    run.open()
    start = time.perf_counter()
    checkpoint = run.save(trainer.state(), config.keep)
    save_s = time.perf_counter() - start
    run.close()
    size_mib = Path(checkpoint).stat().st_size / 2**20
    del trainer

    command = [sys.executable, __file__, "--resume", config.out, "--threads", str(args.threads)]
    start_at = time.time()
    ready_at, end_at = common.last_json(command + ["--quick"] * args.quick)
    figures = {
        "save_s": save_s, "size_mib": size_mib, "resume_s": end_at - start_at,
        "start_s": ready_at - start_at, "step_s": end_at - ready_at,
    }  # fmt: skip
    rows = [(name, f"{value:.2f} {'MiB' if name == 'size_mib' else 's'}") for name, value in figures.items()]
    return rows, figures


if __name__ == "__main__":
    main()
