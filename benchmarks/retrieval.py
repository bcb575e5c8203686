"""Seconds and peak memory of mAP and CMC from descriptors, against a plain full-matrix evaluation in numpy.

    python benchmarks/retrieval.py

speedup     seconds of the plain evaluation over ours, at the size of Market-1501, the median of the rounds
limit       the same of the matrix product alone: what no way of ranking can exceed
extra_mb    our peak memory there above the descriptors, in MiB
msmt17_s    our seconds at the size of MSMT17
msmt17_gb   our peak memory there, including Python, torch and the descriptors

The plain evaluation (``plain.plain_evaluate``) sorts every row of the distance matrix and loops over the queries in
Python. Both get the same generated unit vectors of width 768, see ``descriptors.py``.
"""

import argparse
import statistics

import common
import descriptors
import numpy as np
import peak
import plain
import torch

from passreid_models.retrieval import evaluate

MARKET, MSMT17 = (3368, 15913, 750, 6), (11659, 82161, 3060, 15)  # queries, gallery, identities, cameras
QUICK_MARKET, QUICK_MSMT17 = (800, 4000, 200, 6), (1200, 8000, 300, 15)


def as_arrays(data: tuple) -> list[np.ndarray]:
    return [*(x.numpy() for x in data[:2]), *data[2:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, 3 rounds instead of 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        data = descriptors.market(*args.size)
        evaluate(*descriptors.market(8, 16, 4, 2))  # loads code and starts threads before the measurement
        arrays = as_arrays(data)
        runs = {"ours": lambda: evaluate(*data).mAP, "plain": lambda: plain.plain_evaluate(*arrays)[0]}
        peak.report_peak(lambda: {"mAP": runs[args.measure]()})
        return

    market, msmt17 = (QUICK_MARKET, QUICK_MSMT17) if args.quick else (MARKET, MSMT17)
    rounds = 3 if args.quick else 5
    peaks = {
        name: peak.in_process(__file__, "--threads", args.threads, "--measure", name, "--size", *market)
        for name in ("ours", "plain")
    }
    large = peak.in_process(__file__, "--threads", args.threads, "--measure", "ours", "--size", *msmt17)
    data = descriptors.market(*market)
    arrays = as_arrays(data)
    similarities = np.empty((market[0], market[1]), np.float32)
    runs = {
        "ours": lambda: evaluate(*data),
        "matrix product": lambda: np.matmul(arrays[0], arrays[1].T, out=similarities),
        "plain": lambda: plain.plain_evaluate(*arrays),
    }
    seconds = common.in_turn(runs, rounds)

    rows = [(f"{name}, time", f"{statistics.median(times):.2f} s") for name, times in seconds.items()]
    rows += [
        (f"{name}, peak above descriptors", f"{result['extra'] / peak.MIB:.0f} MiB") for name, result in peaks.items()
    ]
    rows += [(f"{name}, mAP", f"{result['mAP']:.6f}") for name, result in peaks.items()]
    rows += [("ours, MSMT17, mAP", f"{large['mAP']:.6f}")]
    figures = {
        "speedup": common.median_ratio(seconds["plain"], seconds["ours"]),
        "limit": common.median_ratio(seconds["plain"], seconds["matrix product"]),
        "extra_mb": peaks["ours"]["extra"] / peak.MIB,
        "msmt17_s": large["seconds"],
        "msmt17_gb": large["total"] / 1e9,
    }
    rows += [(name, f"{value:.2f}") for name, value in figures.items()]
    sizes = " and ".join(f"{queries:,} x {gallery:,}" for queries, gallery, *_ in (market, msmt17))
    common.report(f"mAP and CMC, {sizes} x 768, medians of {rounds} rounds; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
