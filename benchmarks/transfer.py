"""mAP and Rank-1 of models on three sets of generated persons that differ from the training data, to choose weights by.

held-out   3-D persons on streets, in patterns and before cameras that no training set has (passreid synth, seed 7)
2-D        persons of the 2-D generator before six cameras
foreign    the held-out set through one filter per camera: tone curve, white balance, blur, low resolution, noise and
           JPEG compression, all of them strong and at once on every image, as in no training

    python benchmarks/transfer.py pass_vit_small_patch16 runs/mine --size 256 128

Beside the models, which are named as for passreid eval, stand the descriptors of baselines.py; random weights are those
of one seed at 128x64. The commands that draw the sets and the generator's version are printed; figures of two versions
do not compare. The keys of the JSON on the last line are NAME_SET_mAP and NAME_SET_rank1, in percent.

    DIR/held-out-300/, DIR/foreign-300/    Market-1501 layout; the foreign set is written anew by each call
"""

import argparse
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import common
import numpy as np
from baselines import METRICS, SIZE, baseline_scores
from PIL import Image, ImageFilter

from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.data.layouts import MARKER_3D
from passreid_models.embed import Embedder
from passreid_models.evaluation import evaluate_dataset
from passreid_models.runtime import cache_dir
from passreid_models.synthetic.attributes import stream
from passreid_synth3d.dataset import GENERATOR, write_market1501

IDS, IMAGES, SEED = 300, 8, 7
HELD_OUT = {"cameras": 4, "train_ids": 0, "seed": SEED, "patterns": "held-out"}
FLAT = "synthetic:ids={ids},images=12,cameras=6,seed=7,train_ids=0"
NAMES = {"pixels", "colours", "chance", "random"}  # of baselines.py
CAMERA, IMAGE = 900, 901  # random streams


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="tag, folder, file or run, as for passreid eval")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 128), help="height and width of the images, in pixels"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder of the drawn sets; default: transfer/ in passreid's cache"
    )
    parser.add_argument("--quick", action="store_true", help="6 persons; the scores mean nothing")
    args = parser.parse_args(argv)
    models = list(dict.fromkeys(args.models))
    work = args.work or cache_dir() / "transfer" / f"generator-{GENERATOR}"
    try:
        if taken := NAMES.intersection(models):
            raise ValueError(f"{min(taken)} names a baseline in the table; give ./{min(taken)}")
        embedders = {name: Embedder(name, size=tuple(args.size)) for name in models}
        data = open_sets(work, args.quick)
        scores = {name: measure(dataset, embedders) for name, dataset in data.items()}
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
    rows = [("", columns(list(data)))]
    for name in scores["held-out"]:
        rows.append((name, columns([f"{scores[s][name][0]:.1f} / {scores[s][name][1]:.1f}" for s in data])))
    figures = {
        f"{name}_{s}_{key}": value
        for s, pairs in scores.items()
        for name, pair in pairs.items()
        for key, value in zip(METRICS, pair, strict=True)
    }
    common.report(f"mAP / Rank-1, models at {args.size[0]}x{args.size[1]}; {common.machine()}", rows, figures)


def columns(cells: list[str]) -> str:
    return "  ".join(f"{cell:>13}" for cell in cells)


def open_sets(work: Path, quick: bool) -> dict[str, ReIDDataset]:
    """Draw what is missing of the three sets, and print their commands and the generator's version."""
    ids = 6 if quick else IDS
    root = write_market1501(work / f"held-out-{ids}", ids, IMAGES, **HELD_OUT, workers=0 if quick else None)
    marker = json.loads((root / MARKER_3D).read_text(encoding="utf-8"))
    options = {"ids": ids, "images": IMAGES, **HELD_OUT}
    command = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    versions = ", ".join(f"{name} {version}" for name, version in marker["libraries"].items())
    flat = FLAT.format(ids=6 if quick else 200)
    print(f"held-out: passreid synth {command}; generator {marker['generator']}, {versions}")
    print(f"2-D: {flat}")
    print(
        "foreign: held-out before", *(foreign_camera(c) for c in range(HELD_OUT["cameras"])), sep="\n    ", flush=True
    )
    held_out = open_dataset(root).require("query", "gallery")
    foreign = write_foreign(held_out, work / f"foreign-{ids}")
    return {"held-out": held_out, "2-D": open_dataset(flat).require("query", "gallery"), "foreign": foreign}


def measure(data: ReIDDataset, embedders: dict[str, Embedder]) -> dict[str, tuple[float, float]]:
    """mAP and Rank-1 in percent of the baselines and the models.

    Raises:
        ValueError: If descriptors of a model are not finite.
    """
    scores = baseline_scores(data, SIZE, seeds=1)
    for name, embed in embedders.items():
        evaluation = evaluate_dataset(data, embed, name=name)
        assert evaluation  # there is one process
        if evaluation.retrieved.not_finite:
            raise ValueError(f"{name}: {evaluation.retrieved.not_finite_text}")
        scores[name] = 100 * evaluation.metrics.mAP, 100 * evaluation.metrics.rank1
    return scores


# ---- Foreign cameras


@dataclass(frozen=True)
class Foreign:
    """A camera's filter; training has some of these values too, but not all on one image, nor such a JPEG quality."""

    gamma: float
    """Exponent of pixel values between 0 and 1."""
    gains: tuple[float, float, float]
    """Factors of red, green and blue, before the exponent."""
    blur: float
    """Standard deviation of the Gaussian, in pixels of an image 256 high."""
    scale: float
    """Resolution, as a share of the image's."""
    noise: float
    """Standard deviation, in grey levels of 255."""
    quality: int
    """JPEG quality."""


def foreign_camera(camid: int, seed: int = SEED) -> Foreign:
    """Filter of a camera: of each four, two brighten and two darken, one warm and one cold each."""
    rng = stream(seed, CAMERA, camid)
    tone, warmth = (-1) ** camid, (-1) ** (camid // 2)
    cast = warmth * rng.uniform(0.16, 0.22)
    return Foreign(
        gamma=round(math.exp(-tone * rng.uniform(0.35, 0.5)), 3),
        gains=(round(math.exp(cast), 3), round(math.exp(rng.normal(0, 0.06)), 3), round(math.exp(-cast), 3)),
        blur=round(rng.uniform(2.1, 2.5), 2),
        scale=round(rng.uniform(0.23, 0.29), 3),
        noise=round(rng.uniform(7, 11), 1),
        quality=int(rng.integers(18, 28)),
    )


def photograph(image: Image.Image, camera: Foreign, rng: np.random.Generator) -> bytes:
    """JPEG file of an RGB image through a camera."""
    level = np.asarray(image, np.float32) / 255
    level = np.clip(level * np.float32(camera.gains), 0, 1) ** camera.gamma
    blurred = Image.fromarray((255 * level).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(camera.blur * image.height / 256)
    )
    coarse = blurred.resize((max(1, round(image.width * camera.scale)), max(1, round(image.height * camera.scale))))
    pixels = np.asarray(coarse.resize(image.size, Image.Resampling.BILINEAR), np.float32)
    pixels = pixels + camera.noise * rng.standard_normal(pixels.shape, np.float32)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=camera.quality)
    return file.getvalue()


def write_foreign(data: ReIDDataset, root: Path) -> ReIDDataset:
    """Write queries and gallery through the foreign cameras, under the same names."""
    splits, index = [], 0
    for split in (data.query, data.gallery):
        paths = [root / data.relative(path) for path in split.paths]
        for source, target, camid in zip(split.paths, paths, split.camids.tolist(), strict=True):
            with Image.open(source) as image:
                content = photograph(image.convert("RGB"), foreign_camera(camid), stream(SEED, IMAGE, index))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            index += 1
        splits.append(replace(split, paths=paths))
    return replace(data, root=root, query=splits[0], gallery=splits[1])


if __name__ == "__main__":
    main()
