"""Growth of time and memory with the input: every command that takes a folder, and search among descriptors.

    python benchmarks/scale.py

COMMAND_time, COMMAND_memory    exponents of growth: 1 is linear, 2 quadratic, 0 no growth that could be measured
COMMAND_s, COMMAND_mb           processor seconds in one thread (of search and rank: time, in all threads), and MiB of
                                the process, at the largest size, less those at the smallest one
worst_time, worst_memory        largest exponents, ``cluster`` left out of the time: it compares all images with all

Commands get 256, 1,000, 10,000 and 100,000 images in the layout of Market-1501, half of them for training, 64 queries,
the others in the gallery; of 64x32 pixels, for ``test_pass_vit``. ``tar`` is ``passreid-train`` on the same images in
tar files of 10,000. Trainings stop at their first step, which in ``finetune`` follows the evaluation of the initial
weights, and in ``cluster`` also the descriptors of all images and their clusters. ``gallery`` shows 4,000 at most.
``search`` fills a gallery with 1,000 to 1,000,000 descriptors of width 16, searches for 100, saves and loads it;
``rank`` ranks it for 100 queries. Exponents are fitted by least squares to the logarithms of what a size takes on top
of the smallest one, where that is more than 0.3 s or 8 MiB; two sizes, as of ``--quick``, have none.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import descriptors
import numpy as np
import peak
import timm
import torch

from passreid_models import Gallery, SyntheticPersons, rank
from passreid_models.checkpoints.local_dir import save_pretrained

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
QUERIES, WIDTH, SHARD = 64, 16, 10_000
NOISE = 0.3, 8.0  # seconds, MiB
TRAIN = ["--model", "test_pass_vit", "--size", "64x32", "--workers", "0", "--device", "cpu", "--max-minutes", "1e-6"]
SMALL_HEAD = ["--num-prototypes", "64", "--hidden-dim", "32", "--bottleneck-dim", "16", "--batch-size", "16"]
REID = ["--init", "random", "--pad", "2"]


def images(count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of images in the layout of Market-1501; each file differs from the others behind its end."""
    persons = SyntheticPersons(16, images_per_id=4, cameras=2, size=(64, 32))
    jpegs = []
    for i in range(len(persons)):
        file = io.BytesIO()
        persons[i][0].save(file, "JPEG")
        jpegs.append(file.getvalue())
    for i in range(count):
        folder = (
            "bounding_box_train" if i < count // 2 else "query" if i < count // 2 + QUERIES else "bounding_box_test"
        )
        pid = 1 + (i + QUERIES * (folder == "query")) // 8  # queries are of the gallery's first persons
        yield f"{folder}/{pid:07d}_c{1 + i % 2}s1_{i:07d}_00.jpg", jpegs[i % len(jpegs)] + b"%d" % i


def write_folder(folder: Path, count: int) -> None:
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    for name, content in images(count):
        (folder / name).write_bytes(content)


def write_shards(folder: Path, count: int) -> None:
    folder.mkdir()
    for i, (name, content) in enumerate(images(count)):
        if i % SHARD == 0:
            shard = tarfile.open(folder / f"{i // SHARD:04d}.tar", "w:")  # noqa: SIM115
        member = tarfile.TarInfo(name)
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))
        if i % SHARD == SHARD - 1 or i == count - 1:
            shard.close()


MEASURE = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
sys.exit(code)
"""
"""A small parent: Linux counts the memory of the process that starts a command as the command's."""


def run(command: list[str], cache: Path) -> tuple[float, float]:
    """Processor seconds, in one thread, and peak MiB of a command of this package."""
    env = os.environ | {"PASSREID_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", MEASURE, *common.PASSREID, *command]
    process = subprocess.run(words, capture_output=True, text=True, errors="replace", env=env)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr[-2000:]}")
    seconds, mib = json.loads(process.stdout)
    return seconds, mib


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """Arguments of each command, for ``folder/images`` and ``folder/shards``."""
    data, model = str(folder / "images"), ["--model", str(out / "model"), "--device", "cpu"]
    return {
        "embed": ["embed", data, "-o", str(out / "features.npz"), *model, "-q"],
        "eval": ["eval", data, *model, "-q"],
        "check": ["data", "check", data, "-q"],
        "gallery": ["gallery", data, "-o", str(out / "page.html"), *model],
        "train": ["train", data, *TRAIN, *SMALL_HEAD, "--out", str(folder / "train"), "--quiet"],
        "tar": ["train", str(folder / "shards"), *TRAIN, *SMALL_HEAD, "--out", str(folder / "tar"), "--quiet"],
        "finetune": ["finetune", data, *TRAIN, *REID, "--out", str(folder / "finetune"), "--quiet"],
        "cluster": ["cluster", data, *TRAIN, *REID, "--out", str(folder / "cluster"), "--quiet"],
    }


def library(what: str, count: int) -> Callable[[], dict[str, float]]:
    """Work on ``count`` descriptors: ``search`` or ``rank``."""
    pids = np.arange(count) // 8 + 1
    x = descriptors.persons(pids, pids % 6, WIDTH, 3, noise=0.5)
    names = [f"person {pid}" for pid in pids]

    def search() -> dict[str, float]:
        gallery = Gallery()
        for start in range(0, count, 1000):
            gallery.add(names[start : start + 1000], x[start : start + 1000])
        gallery.search(x[:100], 10)
        with tempfile.TemporaryDirectory() as folder:
            gallery.save(Path(folder) / "gallery.safetensors")
            return {"images": len(Gallery.load(Path(folder) / "gallery.safetensors"))}

    return search if what == "search" else lambda: {"best": float(rank(x[:100], x, 10).similarities.max())}


def exponent(sizes: list[int], values: list[float], noise: float) -> float:
    """Slope of log(value) over log(size), least squares, of the values above the noise; 0 if there are none.

    A single value above the noise counts from the noise at the size before it.
    """
    above = [i for i, value in enumerate(values) if value > noise]
    points = [(math.log(sizes[i]), math.log(values[i])) for i in above]
    if len(above) == 1 and above[0]:
        points.insert(0, (math.log(sizes[above[0] - 1]), math.log(noise)))
    if len(points) < 2:
        return 0.0
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 and 512 images; 1,000 and 4,000 descriptors")
    parser.add_argument("--images", type=int, nargs="+", help="numbers of images, ascending, instead of the above")
    names = [*commands(Path(), Path()), "search", "rank"]
    parser.add_argument("--only", nargs="+", choices=names, metavar="COMMAND", help=f"these of {', '.join(names)}")
    parser.add_argument("--folder", help="where to write the images; default: the system's temporary folder")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        peak.report_peak(library(args.measure[0], int(args.measure[1])))
        return
    if args.images and (len(args.images) < 2 or args.images != sorted(set(args.images))):
        parser.error("--images takes two numbers or more, ascending")
    sizes = args.images or ([256, 512] if args.quick else [256, 1_000, 10_000, 100_000])
    counts = [1_000, 4_000] if args.quick else [1_000, 10_000, 100_000, 1_000_000]
    measured: dict[str, dict[int, tuple[float, float]]] = {}  # by name and size: seconds and MiB
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        out = Path(temporary)
        torch.manual_seed(0)
        save_pretrained(timm.create_model("test_pass_vit", img_size=(64, 32), num_classes=0), out / "model")
        for size in sizes:
            folder = out / str(size)
            write_folder(folder / "images", size)
            write_shards(folder / "shards", size)
            for name, command in commands(folder, out).items():
                if not args.only or name in args.only:
                    measured.setdefault(name, {})[size] = run(command, folder / "cache")
                    print(f"{name}, {size:,}: {measured[name][size][0]:.1f} s", file=sys.stderr)
    for name in ("search", "rank"):
        for count in counts if not args.only or name in args.only else ():
            result = peak.in_process(__file__, "--measure", name, count)
            measured.setdefault(name, {})[count] = result["seconds"], result["total"] / peak.MIB
    rows, figures = [], dict[str, float | None]()  # no exponents where a line would have one point
    for name, by_size in measured.items():
        start, *above = [np.array(pair) for pair in by_size.values()]
        above = [pair - start for pair in above]
        for i, (kind, noise) in enumerate(zip(("time", "memory"), NOISE, strict=True)):
            if len(above) > 1:
                figures[f"{name}_{kind}"] = exponent(list(by_size)[1:], [float(pair[i]) for pair in above], noise)
            figures[f"{name}_{('s', 'mb')[i]}"] = float(above[-1][i])
        for size, (seconds, mib) in by_size.items():
            rows.append((f"{name}, {size:,}", f"{seconds:.1f} s {mib:.0f} MiB"))
        if len(above) > 1:
            rows.append((f"{name}, exponents", f"{figures[f'{name}_time']:.2f}    {figures[f'{name}_memory']:.2f}"))
    for kind in ("time", "memory"):
        values = [v for k, v in figures.items() if k.endswith(f"_{kind}") and k != "cluster_time" and v is not None]
        figures[f"worst_{kind}"] = max(values, default=None)
    common.report(f"growth of time and memory; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
