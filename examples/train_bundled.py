"""Make the bundled synth weights from nothing: generate persons, train to a time budget, evaluate, pack.

    python examples/train_bundled.py tiny --minutes 120 --work ~/bundled       # killed: run it again, it continues

WORK/train/         generated persons under 32 cameras, drawn once, on all cores
WORK/tiny.json      the plan: epochs of each phase that fit into the minutes, by a trial of one minute
WORK/tiny-coarse/   the run of passreid-train at 128x64, for most of the time
WORK/tiny-fine/     its continuation at 256x128
WORK/pass_vit_tiny_patch16.synth/   float16 weights, config.json, figures.json; with --split in pieces below 16 MiB, to
                                    be joined by: cat model.safetensors.* > model.safetensors
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
import yaml

import passreid_models  # noqa: F401  registers the models
from passreid_models.demo import held_out_scores
from passreid_models.local_dir import save_pretrained
from passreid_models.runtime import atomic_file, num_cores
from passreid_models.synthetic import draw

SEED, CAMERAS, IMAGES_PER_ID = 1, 32, 5  # held-out persons and cameras are of another seed
SIZES = {"coarse": "128x64", "fine": "256x128"}
CORES = num_cores()
PIECE = 15 * 2**20
SETTINGS = Path(__file__).parent / "bundled.yaml"
BATCH = yaml.safe_load(SETTINGS.read_text())["batch_size"]


def draw_one(folder, job):
    pid, camid = job
    path = folder / f"{pid + 1:06d}_c{camid + 1}s1_000000_00.jpg"
    if not path.exists():
        with atomic_file(path) as temporary:
            draw(SEED, pid, camid, 0, (256, 128)).save(temporary, quality=92)


def make_data(folder, num_ids):
    rng = random.Random(SEED)
    jobs = [(pid, camid) for pid in range(num_ids) for camid in rng.sample(range(CAMERAS), IMAGES_PER_ID)]
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(partial(draw_one, folder), jobs, chunksize=64))
    return len(jobs)


def train(args, out, *options):
    """Run passreid-train; on a CPU as a process a core, which a busy machine slows down less than threads."""
    command = [sys.executable, "-m", "passreid_models.cli", "train"]
    env = dict(os.environ)
    if not torch.cuda.is_available():
        processes = max(n for n in range(1, min(CORES, BATCH) + 1) if BATCH % n == 0)
        command[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        env["OMP_NUM_THREADS"] = "1"
    settings = ["--config", SETTINGS, "--model", f"pass_vit_{args.size}_patch16"]
    options = [args.work / "train", *settings, *args.options, "--out", out, *options]
    done = subprocess.run([str(word) for word in [*command, *options]], env=env)
    if done.returncode:
        raise SystemExit(done.returncode)


def make_plan(args, num_images):
    """Epochs of each phase, kept for when the script runs again."""
    path, shares = args.work / f"{args.size}.json", {"coarse": 1 - args.fine_share, "fine": args.fine_share}
    if not path.exists():
        plan = {}
        for phase, share in shares.items():
            trial = args.work / f"{args.size}-{phase}-trial"
            shutil.rmtree(trial, ignore_errors=True)
            train(args, trial, "--size", SIZES[phase], "--max-minutes", 1, "--log-steps", 1, "--epochs", 1000)
            speeds = [json.loads(x)["images_per_s"] for x in (trial / "metrics.jsonl").read_text().splitlines()]
            plan[phase] = max(1, round(60 * args.minutes * share * median(speeds) / num_images)) if share else 0
        path.write_text(json.dumps(plan))
    return json.loads(path.read_text())


def main(args):
    num_images = make_data(args.work / "train", args.ids)
    plan, last = make_plan(args, num_images), None
    for phase, epochs in plan.items():
        if epochs:
            run = args.work / f"{args.size}-{phase}"
            start = ["--init", last, "--lr", 1e-3] if last else []
            train(args, run, "--size", SIZES[phase], "--epochs", epochs, "--resume", "auto", *start)
            last = run
    pack(args, last, num_images * sum(plan.values()))


def pack(args, run, images_seen):
    model = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True, img_size=(256, 128))
    scores = held_out_scores(model)
    provenance = json.loads((run / "export" / "config.json").read_text())["provenance"]
    folder = args.work / f"pass_vit_{args.size}_patch16.synth"
    save_pretrained(model, folder, info={"provenance": provenance}, half=True, overwrite=True)
    (folder / "figures.json").write_text(json.dumps({"images_seen": images_seen, "held_out": scores}, indent=2) + "\n")
    for name, metrics in scores.items():
        print(f"{name:<24}mAP {metrics['mAP']:5.1f}  Rank-1 {metrics['rank1']:5.1f}")
    if args.split:
        data = (folder / "model.safetensors").read_bytes()
        for i in range(0, len(data), PIECE):
            (folder / f"model.safetensors.{i // PIECE:02d}").write_bytes(data[i : i + PIECE])
        (folder / "model.safetensors").unlink()
    print(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("size", choices=("tiny", "small", "base"))
    parser.add_argument("--minutes", type=float, default=120, help="of training")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs, outside the repository")
    parser.add_argument("--ids", type=int, default=3000, help="generated persons")
    parser.add_argument("--fine-share", type=float, default=0.15, help="of the time, at 256x128")
    parser.add_argument("--split", action="store_true", help="weights in pieces below 16 MiB")
    parser.add_argument("options", nargs="*", help="further options of passreid-train, after --")
    main(parser.parse_args())
