"""Throughput of the 11 views of PASS on one core, from JPEG bytes to a batch, against the plain implementation.

    python benchmarks/views.py

worker_speedup_128x64, worker_speedup_256x128    our images per second over the plain ones, of a loader's worker when
                                                 the photometric part runs on the device: decoding, cropping and
                                                 resizing to uint8, drawing the parameters, collating
cpu_speedup_128x64, cpu_speedup_256x128          the same with every stage on the CPU, up to normalised float32 views
worker_images_per_s_128x64, .._256x128           images per second of that worker

The size of the JPEG images is in the name; one thread, batches of 16, the median of the rounds. The plain
implementation runs every stage in the worker, with torchvision on PIL images.
"""

import argparse
import io
import statistics
from collections.abc import Callable

import common
import numpy as np
import plain
import torch
from PIL import Image
from torch.utils.data import default_collate

from passreid_models.pretrain.photometric import Photometric
from passreid_models.pretrain.views import MultiCrop, Views
from passreid_models.synthetic import SyntheticPersons

BATCH, IMAGES = 16, 64
SOURCES = ((128, 64), (256, 128))


def jpegs(size: tuple[int, int], count: int) -> list[bytes]:
    persons, files = SyntheticPersons(count, images_per_id=1, size=size), []
    for i in range(count):
        file = io.BytesIO()
        persons[i][0].save(file, "JPEG", quality=common.QUALITY)
        files.append(file.getvalue())
    return files


def decode(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def plain_run(files: list[bytes]) -> None:
    views = plain.PlainViews()
    for start in range(0, len(files), BATCH):
        default_collate([views(decode(file)) for file in files[start : start + BATCH]])


def worker_run(files: list[bytes], then: Callable[[Views], object] = lambda views: None) -> None:
    crop = MultiCrop()
    for start in range(0, len(files), BATCH):
        indices = range(start, min(start + BATCH, len(files)))
        then(default_collate([crop(decode(files[i]), np.random.default_rng((0, 0, i, 1))) for i in indices]))


def cpu_run(files: list[bytes]) -> None:
    photometric = Photometric()

    def finish(views: Views) -> None:
        params = views.params.split((2, views.local_views.shape[1]), dim=1)
        for images, rows in zip(views[:2], params, strict=True):
            photometric(images.flatten(0, 1), rows.flatten(0, 1))

    worker_run(files, finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round over 16 images instead of 9 over 64")
    args = parser.parse_args()
    rounds, count = (1, BATCH) if args.quick else (9, IMAGES)
    torch.set_num_threads(1)

    rows, seconds = [], {}
    for size in SOURCES:
        label, files = "x".join(map(str, size)), jpegs(size, count)
        runs = {
            "plain": lambda files=files: plain_run(files),
            "worker": lambda files=files: worker_run(files),
            "cpu": lambda files=files: cpu_run(files),
        }
        seconds[label] = common.in_turn(runs, rounds)
        for name, times in seconds[label].items():
            rows.append((f"{name} {label}", f"{count / statistics.median(times):.0f} images/s"))
    figures = {
        f"{name}_speedup_{label}": common.median_ratio(times["plain"], times[name])
        for name in ("worker", "cpu")
        for label, times in seconds.items()
    }
    rows += [(name, f"{value:.2f}") for name, value in figures.items()]
    figures |= {f"worker_images_per_s_{label}": count / statistics.median(t["worker"]) for label, t in seconds.items()}
    common.report(f"11 views of an image, medians of {rounds} rounds; {common.machine()}", rows, figures)


if __name__ == "__main__":
    main()
