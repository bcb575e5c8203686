"""Seconds and peak memory of a piece of work, in a process of its own.

On a CPU the peak is that of the resident pages: ``total`` includes Python, torch and the inputs, ``extra`` is the part
above the memory in use before the work. Every block of 1 MiB or more gets a mapping of its own, because glibc otherwise
keeps freed blocks for later. On CUDA both are of the memory that torch allocates.
"""

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch

MIB = 2**20
OWN_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
CPU = torch.device("cpu")


def in_process(file: str, *arguments: object) -> dict[str, float]:
    """Run a benchmark with these arguments and return what ``report_peak`` printed there."""
    return common.last_json([sys.executable, file, *map(str, arguments)], env=os.environ | OWN_MAPPINGS)


def report_peak(run: Callable[[], dict[str, float]], device: torch.device = CPU) -> None:
    """Run and print seconds, ``total`` and ``extra`` bytes and the figures that ``run`` returns, as a line of JSON."""
    before, start = _reset_peak(device), time.perf_counter()
    figures = run()
    common.synchronize(device)
    seconds, total = time.perf_counter() - start, _peak(device)
    print(json.dumps({"seconds": seconds, "total": total, "extra": total - before} | figures))


def _reset_peak(device: torch.device) -> int:
    """Restart the measurement of the peak; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of a field in this process's /proc status."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
