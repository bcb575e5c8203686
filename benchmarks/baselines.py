"""mAP and Rank-1 of untrained descriptors on a labelled dataset: the scores that trained weights must beat.

pixels     the image, resized to 16x8 pixels
colours    histograms of 512 colours in 8 horizontal bands of the image's middle, where the person is
random     pass_vit_tiny_patch16 with random weights, the mean of 3 seeds
chance     random descriptors

    python benchmarks/baselines.py DATA --size 256 128

DATA is a dataset as in passreid eval. The keys of the JSON on the last line are NAME_mAP and NAME_rank1, in percent.
"""

import argparse

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from passreid_models import Embedder, evaluate
from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.data.images import open_image
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.network import random_backbone

MODEL, SIZE, METRICS = "pass_vit_tiny_patch16", (128, 64), ("mAP", "rank1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="?", default="synthetic:ids=20", help="default: 20 of the 2-D generator's persons"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=SIZE, help="height and width of the images for random weights, in pixels"
    )
    parser.add_argument("--quick", action="store_true", help="1 seed of random weights instead of 3")
    args = parser.parse_args()
    try:
        data = open_dataset(args.data).require("query", "gallery")
        means = baseline_scores(data, tuple(args.size), seeds=1 if args.quick else 3)
    except (ValueError, OSError) as e:
        raise SystemExit(str(e)) from None
    rows = [(name, f"{m:.1f} / {r:.1f}") for name, (m, r) in means.items()]
    figures = {f"{name}_{key}": value for name, pair in means.items() for key, value in zip(METRICS, pair, strict=True)}
    common.report(f"mAP / Rank-1, {data.name}: {args.data}", rows, figures)


def read_images(data: ReIDDataset) -> tuple[list[Image.Image], list[Image.Image]]:
    """Read the images of queries and gallery, as ``passreid eval`` does."""
    query, gallery = ([open_image(path) for path in split.paths] for split in (data.query, data.gallery))
    return query, gallery


def score(data: ReIDDataset, query: Tensor, gallery: Tensor) -> tuple[float, float]:
    """mAP and Rank-1 in percent, by the protocol of ``passreid eval``."""
    q, g = data.query, data.gallery
    cameras = (q.camids, g.camids) if data.has_cameras else ()
    metrics = evaluate(query, gallery, q.pids, g.pids, *cameras, own=data.own)
    return 100 * metrics.mAP, 100 * metrics.rank1


def baseline_scores(data: ReIDDataset, size: tuple[int, int], seeds: int) -> dict[str, tuple[float, float]]:
    """mAP and Rank-1 of descriptors without weights, and the means over the seeds of random weights."""
    images = read_images(data)
    pairs = [score(data, *map(Embedder(random_model(seed, size)), images)) for seed in range(seeds)]
    m, r = np.mean(pairs, axis=0).tolist()
    return {**untrained_scores(data, images), "random": (m, r)}


def untrained_scores(
    data: ReIDDataset, images: tuple[list[Image.Image], list[Image.Image]]
) -> dict[str, tuple[float, float]]:
    """mAP and Rank-1 of descriptors without weights."""
    generator = torch.Generator().manual_seed(0)
    descriptors = {
        "pixels": pooled,
        "colours": colours,
        "chance": lambda x: torch.randn(len(x), 64, generator=generator),
    }
    return {name: score(data, *map(f, images)) for name, f in descriptors.items()}


def random_model(seed: int, size: tuple[int, int]) -> torch.nn.Module:
    """The backbone as pre-training initialises it."""
    torch.manual_seed(seed)
    return random_backbone(PretrainConfig(model=MODEL, size=size))


def pooled(images: list[Image.Image]) -> Tensor:
    return F.normalize(torch.tensor(np.stack([np.asarray(im.resize((8, 16))).ravel() for im in images])).float())


def colours(images: list[Image.Image]) -> Tensor:
    x = np.stack([np.asarray(im.resize(SIZE[::-1]))[:, 12:52] for im in images]).reshape(len(images), 8, -1, 3)
    x = x.astype(int) // 32
    codes = (x[..., 0] * 8 + x[..., 1]) * 8 + x[..., 2]
    counts = [[np.bincount(band, minlength=512) for band in image] for image in codes]
    return F.normalize(torch.tensor(np.stack(counts).reshape(len(images), -1)).float().sqrt())


if __name__ == "__main__":
    main()
