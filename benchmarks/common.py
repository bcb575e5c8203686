"""What the benchmarks share: runs in turn, medians, a table, and the figures as JSON on the last line."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable

import torch


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, ``rounds`` times: A B, B A, A B, so that what the machine does besides meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-1, rounds):
        for name in list(runs) if i % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: Iterable[float], denominator: Iterable[float]) -> float:
    """Median of the ratios of one round each."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def pick_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; a CPU that does not takes 100 times as long in it."""
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


def report(title: str, rows: list[tuple[str, str]], figures: dict[str, float | None]) -> None:
    """Print a table, and ``figures`` as JSON on the last line."""
    print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>14}")
    print(json.dumps({k: v if v is None else round(v, 4) for k, v in figures.items()}))
