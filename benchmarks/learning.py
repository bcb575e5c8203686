"""mAP and Rank-1 of PASS against DINO and random weights after the same number of images, without and with fine-tuning.

    python benchmarks/learning.py --out RUNS --jobs 2       one run per core; a second call continues
    python benchmarks/learning.py --out RUNS --seeds 0      one seed of the three, to its tables

Prints tables as in docs/experiments.md. The keys of the JSON on the last line are METHOD_mAP and METHOD_rank1, the
means over the seeds in percent, and METHOD_mAP_std, their standard deviation; studio_METHOD_... are the same in
studios. All methods are pre-trained in studios on the same generated persons, fine-tuned on streets, and evaluated on
200 other persons before other cameras, in patterns and prints that no training garment has (passreid synth draws them
all).

    random, dino, pass          no training; one token and no parts; PASS with three parts
    dino_small                  DINO whose local views are as small as those of PASS
    pass_1, pass_5              PASS with one part and with five
    random_reid, dino_reid, pass_reid       fine-tuned with labels from random weights, DINO and PASS
    dino_parts_reid             fine-tuned from DINO's weights with random part tokens
    pixels, colours, chance     without weights, see baselines.py

DINO is the same trainer with --parts 0 and the same number of local views; these are of the whole image, to which their
scale then refers, instead of its areas. Five parts have five local views instead of three. The settings, learning.yaml,
were chosen for PASS. The standard deviation is over the seeds of training; the persons are the same.
"""

import argparse
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import timm
import torch
import torch.nn.functional as F
from baselines import MODEL, SIZE, random_model, read_images, score, untrained_scores
from torch import Tensor

import passreid_models  # noqa: F401  registers the models
from passreid_models import Embedder
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.device import pick_device
from passreid_synth3d.dataset import write_market1501
from passreid_synth3d.place import PLACES

SETTINGS, REID_SETTINGS = (Path(__file__).parent / name for name in ("learning.yaml", "learning_reid.yaml"))
METHODS = {
    "dino": ["--parts", "0"],
    "dino_small": [
        "--parts",
        "0",
        "--local-scale",
        "0.15",
        "0.4",
    ],  # relative to the image: an area of PASS is half of it
    "pass": [],
    "pass_1": ["--parts", "1"],
    "pass_5": ["--parts", "5", "--local-views", "5"],
}
STARTS = {
    "random": "",
    "dino": "dino",
    "dino_parts": "dino",
    "pass": "pass",
}  # initial weights of fine-tuning, and the method that makes them
FUSIONS = ("CLS", "mean of parts", "cat", "mean")
Scores = dict[str, dict[str, list[tuple[float, float]]]]  # (mAP, Rank-1) of each seed, by method and descriptor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to test the script; the scores mean nothing"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="pre-training methods"
    )
    parser.add_argument(
        "--starts", nargs="+", choices=list(STARTS), default=list(STARTS), help="weights that fine-tuning begins with"
    )
    parser.add_argument("--ids", type=int, default=700, help="persons for training, 10 images each")
    parser.add_argument("--epochs", type=int, default=2, help="of pre-training")
    parser.add_argument("--reid-epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs of each method, one after another"
    )
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, with one thread each if there are several")
    parser.add_argument(
        "--out", type=Path, help="folder for data and runs, which a second call continues; default: a temporary one"
    )
    args = parser.parse_args()
    if args.quick:
        args.ids, args.epochs, args.reid_epochs, args.seeds = 12, 1, 1, [0]
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        seeds, methods = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.methods))
        starts = [start for start in dict.fromkeys(args.starts) if STARTS[start] in ("", *methods)]
        try:
            draw_persons(out, args.ids, 10 if args.quick else 200)
        except (ValueError, OSError) as e:  # such as a folder begun with another --ids
            raise SystemExit(str(e)) from None
        for seed in seeds:
            run_all([pretraining(out, method, seed, args.epochs) for method in methods], args.jobs)
            if "dino_parts" in starts:
                add_parts(out, seed)
            run_all([finetuning(out, start, seed, args.reid_epochs) for start in starts], args.jobs)
        over = f"± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else f"of seed {seeds[0]}"
        title = f"{MODEL} at {SIZE[0]}x{SIZE[1]}, mAP {over} / Rank-1"
        print(f"\n{title}; {common.machine(pick_device(None))}")
        figures: dict[str, float] = {}
        for place in PLACES:
            trained = [*methods, *(f"{start}_reid" for start in starts)]
            scores = measure(out, open_dataset(out / f"held-out-{place}"), trained, seeds)
            figures |= table(scores, place, "" if place == "street" else f"{place}_")
        curve(out, methods, seeds, 10 * args.ids)
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def draw_persons(out: Path, ids: int, test_ids: int) -> None:
    """Draw what is missing of the persons: in each place, training images of 96 cameras and held-out ones of 4."""
    for place in PLACES:
        unseen: dict[str, Any] = dict(cameras=4, train_ids=0, seed=0, patterns="held-out", place=place, size=SIZE)
        write_market1501(out / f"held-out-{place}", test_ids, 8, **unseen)
    for place in PLACES:
        write_market1501(out / place, ids, 10, train_ids=ids, sites=12, seed=1, place=place, size=SIZE)


def pretraining(out: Path, method: str, seed: int, epochs: int) -> list[str]:
    command = ["train", f"{out}/studio", "--config", str(SETTINGS), *METHODS[method]]
    command += ["--size", *map(str, SIZE), "--epochs", str(epochs), "--probe", f"{out}/held-out-studio"]
    return [*command, *common_options(out, method, seed)]


def add_parts(out: Path, seed: int) -> None:
    """Add random part tokens, as PASS initialises them, to DINO's weights."""
    model = random_model(seed, SIZE)
    state = timm.create_model(f"local-dir:{out}/dino-{seed}/export", pretrained=True).state_dict()
    mismatch = model.load_state_dict(state, strict=False)
    assert not mismatch.unexpected_keys
    assert mismatch.missing_keys == ["reg_token"]
    save_pretrained(model, out / f"dino_parts-{seed}" / "export", overwrite=True)


def finetuning(out: Path, method: str, seed: int, epochs: int) -> list[str]:
    init = "random" if method == "random" else f"{out}/{method}-{seed}/export"
    command = ["finetune", f"{out}/street", "--config", str(REID_SETTINGS), "--init", init]
    command += ["--size", "x".join(map(str, SIZE)), "--epochs", str(epochs)]
    return [*command, *common_options(out, f"{method}_reid", seed)]


def common_options(out: Path, run: str, seed: int) -> list[str]:
    options = ["--model", MODEL, "--seed", str(seed), "--out", f"{out}/{run}-{seed}"]
    return [*options, "--resume", "auto", "--workers", "0"]


def run_all(commands: list[list[str]], jobs: int) -> None:
    """Run passreid commands, ``jobs`` in parallel; their output goes to a log file beside each run."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}

    def run(words: list[str]) -> None:
        print(f"passreid {shlex.join(words)}\n", end="", flush=True)
        log = Path(words[words.index("--out") + 1] + ".log")
        with log.open("a", encoding="utf-8") as file:
            if subprocess.run([*common.PASSREID, *words], stdout=file, stderr=file, env=environment).returncode:
                raise SystemExit(f"{log}: {log.read_text(encoding='utf-8').splitlines()[-1]}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))


def measure(out: Path, data: ReIDDataset, trained: list[str], seeds: list[int]) -> Scores:
    """Evaluate the methods, each seed and each descriptor."""
    scores: Scores = {}
    images = read_images(data)
    for seed in seeds:
        models = {"random": random_model(seed, SIZE)}
        for method in trained:
            models[method] = timm.create_model(f"local-dir:{out}/{method}-{seed}/export", pretrained=True)
        for method, model in models.items():
            embed = Embedder(model, fusion="parts" if model.num_parts else None)
            tokens = [embed(split).unflatten(1, (-1, model.embed_dim)) for split in images]  # [N, T, D]
            for name in FUSIONS if model.num_parts else FUSIONS[:1]:
                pairs = scores.setdefault(method, {}).setdefault(name, [])
                pairs.append(score(data, *(fuse(x, name) for x in tokens)))
    return scores | {name: {"": [pair]} for name, pair in untrained_scores(data, images).items()}


def fuse(tokens: Tensor, name: str) -> Tensor:
    g, m = tokens[:, 0], tokens[:, 1:].mean(1)
    return F.normalize({"CLS": g, "mean of parts": m, "cat": torch.cat([g, m], 1), "mean": g + m}[name], dim=1)


def table(scores: Scores, place: str, prefix: str) -> dict[str, float]:
    """Print mAP and Rank-1 in a place; return those of each method's descriptor: ``cat``, or CLS without parts."""
    columns = (*FUSIONS, "")
    print(f"\n| {place} | {' | '.join(FUSIONS)} | without weights |\n| --- |{' --- |' * len(columns)}")
    figures: dict[str, float] = {}
    for method, row in scores.items():
        print(f"| {method} | {' | '.join(cell(row[name]) if name in row else '-' for name in columns)} |")
        pairs = np.array(next(row[name] for name in ("cat", "CLS", "") if name in row))
        figures[f"{prefix}{method}_mAP"], figures[f"{prefix}{method}_rank1"] = pairs.mean(0).tolist()
        if len(pairs) > 1:
            figures[f"{prefix}{method}_mAP_std"] = float(pairs[:, 0].std(ddof=1))
    return figures


def cell(pairs: list[tuple[float, float]]) -> str:
    m, r = np.array(pairs).T
    return f"{spread(m)} / {r.mean():.1f}"


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def curve(out: Path, methods: list[str], seeds: list[int], images: int) -> None:
    """Print mAP in studios, with every image as a query, after each epoch of pre-training."""
    print(f"\n| images seen | {' | '.join(methods)} |\n| --- |{' --- |' * len(methods)}")
    rows: dict[int, dict[str, list[float]]] = {}
    for method in methods:
        for seed in seeds:
            for line in (out / f"{method}-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                if "probe_mAP" in (record := json.loads(line)):
                    rows.setdefault(round(record["epoch"]), {}).setdefault(method, []).append(record["probe_mAP"])
    for epoch, row in rows.items():
        print(f"| {epoch * images:,} | {' | '.join(spread(row[m]) for m in methods)} |")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted: a second call with the same --out continues") from None
