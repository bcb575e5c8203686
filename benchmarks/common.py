"""Shared parts of the benchmarks: runs in turn, medians, generated images, other processes, and the report.

Every benchmark prints a table for people and, as its last line, its figures as a JSON object.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

QUALITY = 92  # of JPEG files
PASSREID = [sys.executable, "-m", "passreid_models.cli"]


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after a warm-up: A B, B A, A B, so that other load affects all runs alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-1, rounds):
        for name in list(runs) if i % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: Iterable[float], denominator: Iterable[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; a CPU that only emulates it is 100 times slower."""
    from passreid_models.device import pick_dtype

    return pick_dtype("auto", device) == torch.bfloat16


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device | None = None) -> str:
    if device is not None and device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    load = os.getloadavg()[0]
    return f"{platform.machine()}, {torch.get_num_threads()} threads, load {load:.1f}, torch {torch.__version__}"


def write_images(folder: Path, images: Iterable[Image.Image], suffix: str = ".jpg") -> list[Path]:
    """Write images as numbered files and return their paths."""
    paths = []
    for i, image in enumerate(images):
        paths.append(folder / f"{i:04d}{suffix}")
        image.save(paths[-1], quality=QUALITY)  # PNG ignores the quality
    return paths


def last_json(command: list[str], *, check: bool = True, **options: Any) -> Any:
    """Run a command, with options of ``subprocess.run``, and parse the last line of its output as JSON."""
    output = subprocess.run(command, check=check, stdout=subprocess.PIPE, text=True, **options).stdout
    return json.loads(output.splitlines()[-1])


def report(title: str, rows: list[tuple[str, str]], figures: dict[str, float | None]) -> None:
    """Print a table and, as the last line, the figures as JSON."""
    print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>14}")
    print(json.dumps({k: v if v is None else round(v, 4) for k, v in figures.items()}))
