"""Seconds and peak memory of Jaccard distances and DBSCAN, against a dense implementation.

    python benchmarks/clustering.py

s_N, gb_N      our seconds and peak memory for N images, including Python, torch and the descriptors; null if not run
time_ratio     our seconds over those of the dense one, for 12,936 images, as Market-1501 has (--quick: 2,000)
memory_ratio   the same of the peak memory above Python, torch and the descriptors

The descriptors are generated unit vectors of width 256, see ``descriptors.py``. Each measurement has a process of its
own. The dense implementation (``plain.plain_jaccard``) holds N x N matrices and loops in Python, as common code does.
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
        METHODS[args.measure](descriptors.training_set(100))  # loads code and starts threads before the measurement

        def count_clusters() -> dict[str, float]:
            labels = METHODS[args.measure](x)
            return {"clusters": int(labels.max()) + 1, "outliers": int((labels < 0).sum())}

        peak.report_peak(count_clusters)
        return

    sizes, dense_size = (QUICK_SIZES, QUICK_DENSE) if args.quick else (SIZES, DENSE)
    jobs = [("dense", dense_size), *(("ours", n) for n in sizes)]
    results = {
        (name, n): peak.in_process(__file__, "--threads", args.threads, "--measure", name, "--images", n)
        for name, n in jobs
    }
    rows = []
    for (name, n), result in results.items():
        memory = f"{result['total'] / 1e9:.2f} GB, of which {result['extra'] / 1e9:.2f} for the work"
        labels = f"{result['clusters']} clusters, {result['outliers']} outliers"
        rows.append((f"{name}, {n:,}", f"{result['seconds']:.1f} s, {memory}; {labels}"))
    figures: dict[str, float | None] = {f"{key}_{n}": None for n in (2000, *SIZES) for key in ("s", "gb")}
    for n in sizes:
        figures |= {f"s_{n}": results["ours", n]["seconds"], f"gb_{n}": results["ours", n]["total"] / 1e9}
    figures["time_ratio"] = results["ours", dense_size]["seconds"] / results["dense", dense_size]["seconds"]
    figures["memory_ratio"] = results["ours", dense_size]["extra"] / results["dense", dense_size]["extra"]
    rows += [(name, f"{figures[name]:.3f}") for name in ("time_ratio", "memory_ratio")]
    common.report(f"Jaccard distances and DBSCAN, width 256; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
