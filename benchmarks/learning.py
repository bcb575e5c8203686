"""Does it learn? Retrieval of random weights, DINO and PASS after equal numbers of images, and what fine-tuning adds.

Prints the tables of MODEL_CARD.md; the last line is JSON: METHOD_mAP, METHOD_rank1 and the spread METHOD_mAP_std, in
percent, the mean over the seeds; studio_METHOD_mAP and so on for studios. All are pre-trained in studios on the same
drawn persons for the same number of images, fine-tuned on streets, and evaluated on 200 other persons before other
cameras, in patterns and prints that no training garment has (passreid synth draws them all).

    random, dino, pass          no training; one token and no parts; PASS with three parts
    pass_1, pass_5              PASS with one part and with five
    random_reid, pass_reid      fine-tuned with labels from random weights and from PASS
    pixels, colours, chance     pixels pooled to 16x8; colour histograms of 8 bands; noise

DINO is the same trainer with --parts 0 and as many local views, of the whole image instead of its areas: their scale is
relative to that. Five parts have five local views instead of three. The settings, examples/bundled.yaml, were chosen by
looking at PASS. The spread is over seeds of training alone: the persons are the same.

    python benchmarks/learning.py --out RUNS --jobs 2       a run a core; a second call continues
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import passreid_models  # noqa: F401  registers the models
from passreid_models import Embedder, evaluate
from passreid_models.reid.datasets import ReIDDataset, open_dataset
from passreid_models.synthetic3d.dataset import write_market1501
from passreid_models.synthetic3d.place import PLACES

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL, SIZE = "pass_vit_tiny_patch16", (128, 64)
METHODS = {"dino": "--parts 0", "pass": "", "pass_1": "--parts 1", "pass_5": "--parts 5 --local-views 5"}
FUSIONS = ("CLS", "mean of parts", "cat", "mean")
Found = dict[str, dict[str, list[tuple[float, float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, not that it learns")
    parser.add_argument("--ids", type=int, default=700, help="persons to train on, 10 images each")
    parser.add_argument("--epochs", type=int, default=2, help="of pre-training")
    parser.add_argument("--reid-epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, with a thread each if there are several")
    parser.add_argument("--out", type=Path, help="keep data and runs here, and continue; default: a temporary folder")
    args = parser.parse_args()
    if args.quick:
        args.ids, args.epochs, args.reid_epochs, args.seeds = 12, 1, 1, 1
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        seeds = range(args.seeds)
        for place in PLACES:
            train = dict(train_ids=args.ids, sites=12, seed=1, place=place, size=SIZE)
            write_market1501(out / place, args.ids, 10, **train)
            test = dict(cameras=4, train_ids=0, seed=0, patterns="held-out", place=place, size=SIZE)
            write_market1501(out / f"held-out-{place}", 10 if args.quick else 200, 8, **test)
        run_all([pretraining(out, m, s, args.epochs) for s in seeds for m in METHODS], args.jobs)
        run_all([finetuning(out, m, s, args.reid_epochs) for s in seeds for m in ("pass", "random")], args.jobs)
        print(f"\n{MODEL} at {SIZE[0]}x{SIZE[1]}, {args.seeds} seeds, mAP ± standard deviation; {common.machine()}")
        figures: dict[str, float | None] = {}
        for place in PLACES:
            found = measure(out, open_dataset(out / f"held-out-{place}"), seeds)
            figures |= table(found, place, "" if place == "street" else f"{place}_")
        curve(out, seeds, 10 * args.ids)
    print(json.dumps({name: round(value, 2) for name, value in figures.items() if value is not None}))


def pretraining(out: Path, method: str, seed: int, epochs: int) -> list[str]:
    words = f"train {out}/studio --config {EXAMPLES}/bundled.yaml --model {MODEL} --size {SIZE[0]} {SIZE[1]} "
    words += f"--epochs {epochs} --seed {seed} --probe {out}/held-out-studio --out {out}/{method}-{seed} "
    return f"{words} --resume auto --workers 0 {METHODS[method]}".split()


def finetuning(out: Path, method: str, seed: int, epochs: int) -> list[str]:
    init = "random" if method == "random" else f"{out}/{method}-{seed}/export"
    words = f"finetune {out}/street --config {EXAMPLES}/bundled_reid.yaml --model {MODEL} --size {SIZE[0]}x{SIZE[1]} "
    words += f"--init {init} --epochs {epochs} --seed {seed} --out {out}/{method}_reid-{seed}"
    return f"{words} --resume auto --workers 0".split()


def run_all(commands: list[list[str]], jobs: int) -> None:
    """Run commands of passreid, several at a time on a core each; what they print goes to a file beside their run."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})}

    def run(words: list[str]) -> None:
        print(f"passreid {' '.join(words)}\n", end="", flush=True)
        log = Path(words[words.index("--out") + 1] + ".log")
        with log.open("a") as file:
            command = [sys.executable, "-m", "passreid_models.cli", *words]
            if subprocess.run(command, stdout=file, stderr=file, env=environment).returncode:
                raise SystemExit(f"{log}: {log.read_text().splitlines()[-1]}")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))


def measure(out: Path, data: ReIDDataset, seeds: range) -> Found:
    """(mAP, Rank-1) of each seed, by method and descriptor."""
    found: Found = {}

    def score(method: str, descriptor: str, query: Tensor, gallery: Tensor) -> None:
        q, g = data.query, data.gallery
        m = evaluate(query, gallery, q.pids, g.pids, q.camids, g.camids)
        found.setdefault(method, {}).setdefault(descriptor, []).append((100 * m.mAP, 100 * m.rank1))

    images = [[Image.open(path).convert("RGB") for path in split.paths] for split in (data.query, data.gallery)]
    for seed in seeds:
        torch.manual_seed(seed)
        models = {"random": timm.create_model(MODEL, img_size=SIZE)}
        for method in (*METHODS, "random_reid", "pass_reid"):
            models[method] = timm.create_model(f"local-dir:{out}/{method}-{seed}/export", pretrained=True)
        models["random"].pretrained_cfg = models["pass"].pretrained_cfg  # the same mean, std and interpolation
        for method, model in models.items():
            embed = Embedder(model, fusion="parts" if model.num_parts else None)
            tokens = [embed(split).unflatten(1, (-1, model.embed_dim)) for split in images]  # [N, T, D]
            for name in FUSIONS if model.num_parts else FUSIONS[:1]:
                score(method, name, *(fused(x, name) for x in tokens))
    for name, describe in (("pixels", pooled), ("colours", colours)):
        score(name, "", *(describe(split) for split in images))
    generator = torch.Generator().manual_seed(0)
    score("chance", "", *(torch.randn(len(split), 64, generator=generator) for split in images))
    return found


def fused(tokens: Tensor, name: str) -> Tensor:
    g, m = tokens[:, 0], tokens[:, 1:].mean(1)
    return F.normalize({"CLS": g, "mean of parts": m, "cat": torch.cat([g, m], 1), "mean": g + m}[name], dim=1)


def pooled(images: list[Image.Image]) -> Tensor:
    return F.normalize(torch.tensor(np.stack([np.asarray(im.resize((8, 16))).ravel() for im in images])).float())


def colours(images: list[Image.Image]) -> Tensor:
    """Histograms of 512 colours in 8 bands of the middle, where the person is."""
    x = np.stack([np.asarray(im.resize(SIZE[::-1]))[:, 12:52] for im in images]).reshape(len(images), 8, -1, 3) // 32
    codes = (x[..., 0] * 8 + x[..., 1]) * 8 + x[..., 2]
    counts = [[np.bincount(band, minlength=512) for band in image] for image in codes]
    return F.normalize(torch.tensor(np.stack(counts).reshape(len(images), -1)).float().sqrt())


def table(found: Found, place: str, prefix: str) -> dict[str, float | None]:
    """Print mAP and Rank-1 on a place; returns the figures of each method's own descriptor."""
    print(f"\n| {place} | {' | '.join(FUSIONS)} |\n| --- |{' --- |' * len(FUSIONS)}")
    figures: dict[str, float | None] = {}
    for method, of in found.items():
        cells = [cell(of[name]) if name in of else "-" for name in (FUSIONS if "" not in of else ("", "-", "-", "-"))]
        print(f"| {method} | {' | '.join(cells)} |")
        own = np.array(of.get("cat", of.get("CLS", of.get(""))))
        figures[f"{prefix}{method}_mAP"], figures[f"{prefix}{method}_rank1"] = own.mean(0).tolist()
        if len(own) > 1:
            figures[f"{prefix}{method}_mAP_std"] = float(own[:, 0].std(ddof=1))
    return figures


def cell(scores: list[tuple[float, float]]) -> str:
    m, r = np.array(scores).T
    return f"{m.mean():.1f} ± {m.std(ddof=1):.1f} / {r.mean():.1f}" if len(m) > 1 else f"{m[0]:.1f} / {r[0]:.1f}"


def curve(out: Path, seeds: range, images: int) -> None:
    """Print mAP in the studio, every image a query, after each epoch."""
    print(f"\n| images seen | {' | '.join(METHODS)} |\n| --- |{' --- |' * len(METHODS)}")
    rows: dict[int, dict[str, list[float]]] = {}
    for method in METHODS:
        for seed in seeds:
            for line in (out / f"{method}-{seed}" / "metrics.jsonl").read_text().splitlines():
                if "probe_mAP" in (record := json.loads(line)):
                    rows.setdefault(round(record["epoch"]), {}).setdefault(method, []).append(record["probe_mAP"])
    for epoch, of in rows.items():
        print(f"| {epoch * images:,} | {' | '.join(f'{np.mean(of[m]):.1f}' for m in METHODS)} |")


if __name__ == "__main__":
    main()
