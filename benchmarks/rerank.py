"""Seconds and peak memory of k-reciprocal re-ranking and its evaluation at the size of Market-1501.

    python benchmarks/rerank.py

gb   peak memory, including Python, torch and the descriptors
s    seconds from descriptors to mAP and CMC of the re-ranked distances

The descriptors are generated unit vectors of width 768, see ``descriptors.py``. The measurement has a process of its
own. For comparison: the dense distance matrix of all images takes 2.1 GB, and common code holds four of them.
"""

import argparse

import common
import descriptors
import peak
import torch

from passreid_models.retrieval import evaluate, evaluate_distances, rerank

MARKET, QUICK = (3368, 19732, 750, 6), (600, 3000, 150, 6)  # queries, gallery, identities, cameras


def evaluate_reranked(data: tuple) -> dict[str, float]:
    return {"mAP": evaluate_distances(rerank(*data[:2]), *data[2:]).mAP}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixth of the sizes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else MARKET
    if args.measure:
        data = descriptors.market(*size)
        evaluate_reranked(descriptors.market(8, 32, 4, 2))  # loads code and starts threads before the measurement
        peak.report_peak(lambda: evaluate_reranked(data))
        return

    result = peak.in_process(__file__, "--measure", "--threads", args.threads, *(["--quick"] if args.quick else []))
    rows = [
        ("mAP before", f"{evaluate(*descriptors.market(*size)).mAP:.4f}"),
        ("mAP re-ranked", f"{result['mAP']:.4f}"),
        ("peak above descriptors", f"{result['extra'] / 1e9:.2f} GB"),
    ]
    figures = {"gb": result["total"] / 1e9, "s": result["seconds"]}
    rows += [(name, f"{value:.2f}") for name, value in figures.items()]
    common.report(f"re-ranking, {size[0]:,} x {size[1]:,} x 768; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
