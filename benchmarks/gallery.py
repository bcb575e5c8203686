"""Seconds of a gallery of 100,000 descriptors: filled, prepared, searched, saved and loaded; beside faiss if installed.

    python benchmarks/gallery.py

add_s       100,000 descriptors of width 768 under 20,000 names, in groups of 1,000
prepare_s   the first search after a change, less a later one
one_ms      a search for one query, topk 10
many_ms     a search for 100 queries
limit       speed of many_ms over that of the matrix product alone: no exact search can be above 1
faiss       many_ms with faiss="Flat" over our own: above 1, ours is quicker
save_s      to a file, with its checksum
load_s      from it

Descriptors are generated unit vectors, see ``descriptors.py``; medians of the rounds.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import common
import descriptors
import numpy as np
import torch

from passreid_models import Gallery

GROUP = 1000


def fill(gallery: Gallery, names: list[str], x: torch.Tensor) -> None:
    for start in range(0, len(x), GROUP):
        gallery.add(names[start : start + GROUP], x[start : start + GROUP])


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5,000 descriptors, 3 rounds instead of 9")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    count, rounds = (5_000, 3) if args.quick else (100_000, 9)
    pids = np.random.default_rng(1).integers(1, count // 5 + 1, count)
    x = descriptors.persons(pids, pids % 6, 768, 3, noise=2.4)
    query = descriptors.persons(pids[:100], pids[:100] % 6, 768, 2, noise=2.4)
    names = [f"person {pid}" for pid in pids]

    gallery = Gallery()
    add = seconds(lambda: fill(gallery, names, x))
    first = seconds(lambda: gallery.search(query[0], 10))
    similarities = np.empty((len(query), count), np.float32)
    runs = {
        "one": lambda: gallery.search(query[0], 10),
        "many": lambda: gallery.search(query, 10),
        "product": lambda: np.matmul(query.numpy(), x.numpy().T, out=similarities),
    }
    has_faiss = importlib.util.find_spec("faiss") is not None
    if has_faiss:
        import faiss

        faiss.omp_set_num_threads(args.threads)
        other = Gallery(faiss="Flat")
        fill(other, names, x)
        if other.search(query, 10).names != gallery.search(query, 10).names:
            raise SystemExit("faiss finds other names")
        runs["faiss"] = lambda: other.search(query, 10)
    measured = common.in_turn(runs, rounds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gallery.safetensors"
        save, load = seconds(lambda: gallery.save(file)), seconds(lambda: Gallery.load(file))
    one = statistics.median(measured["one"])
    figures = {
        "add_s": add,
        "prepare_s": first - one,
        "one_ms": 1000 * one,
        "many_ms": 1000 * statistics.median(measured["many"]),
        "limit": common.median_ratio(measured["product"], measured["many"]),
        "faiss": common.median_ratio(measured["faiss"], measured["many"]) if has_faiss else None,
        "save_s": save,
        "load_s": load,
    }
    rows = [(name, "-" if value is None else f"{value:.3f}") for name, value in figures.items()]
    common.report(f"{gallery!r}; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
