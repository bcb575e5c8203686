"""Jaccard distances and DBSCAN of 256 wide unit vectors, against the dense reading of the method.

s_N, gb_N      seconds and peak memory of ours for N images, with Python, torch and the descriptors
time_ratio     seconds, ours over dense, at 12,936 images, the training set of Market-1501 (--quick: 2,000)
memory_ratio   peak memory there above Python, torch and the descriptors, ours over dense

Each measured in a process of its own. The dense reading (``plain.plain_jaccard``) holds N x N matrices and loops in
Python, as the usual code does.
"""

import argparse

import common
import descriptors
import numpy as np
import peak
import plain
import torch

from passreid_models.reid.pseudo_labels import cluster_features

SIZES, DENSE = (6000, 12936, 32621, 100000), 12936
QUICK_SIZES, QUICK_DENSE = (2000, 6000), 2000


def ours(x: torch.Tensor) -> np.ndarray:
    return cluster_features(x, eps=0.6)


def dense(x: torch.Tensor) -> np.ndarray:
    from sklearn.cluster import DBSCAN

    distances = plain.plain_jaccard(x.numpy(), 30, 6)
    return DBSCAN(eps=0.6, min_samples=4, metric="precomputed").fit_predict(distances)


METHODS = {"ours": ours, "dense": dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 and 6,000 images only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=list(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        x = descriptors.training_set(args.images)
        METHODS[args.measure](descriptors.training_set(100))  # code and threads are there before

        def labelled() -> dict[str, float]:
            labels = METHODS[args.measure](x)
            return {"clusters": int(labels.max()) + 1, "outliers": int((labels < 0).sum())}

        peak.report_peak(labelled)
        return

    sizes, at = (QUICK_SIZES, QUICK_DENSE) if args.quick else (SIZES, DENSE)
    jobs = [("dense", at), *(("ours", n) for n in sizes)]
    found = {
        (name, n): peak.in_process(__file__, "--threads", args.threads, "--measure", name, "--images", n)
        for name, n in jobs
    }
    rows = []
    for (name, n), one in found.items():
        measured = f"{one['seconds']:.1f} s, {one['total'] / 1e9:.2f} GB, of which {one['extra'] / 1e9:.2f} in work"
        rows.append((f"{name}, {n:,}", f"{measured}; {one['clusters']} clusters, {one['outliers']} outliers"))
    figures: dict[str, float | None] = {f"{key}_{n}": None for n in (2000, *SIZES) for key in ("s", "gb")}
    for n in sizes:
        figures |= {f"s_{n}": found["ours", n]["seconds"], f"gb_{n}": found["ours", n]["total"] / 1e9}
    figures["time_ratio"] = found["ours", at]["seconds"] / found["dense", at]["seconds"]
    figures["memory_ratio"] = found["ours", at]["extra"] / found["dense", at]["extra"]
    rows += [(name, f"{figures[name]:.3f}") for name in ("time_ratio", "memory_ratio")]
    common.report(f"Jaccard distances and DBSCAN, 256 wide; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
