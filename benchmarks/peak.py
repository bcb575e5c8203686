"""Seconds and peak memory of a piece of work, in a process of its own.

The peak is that of the resident pages: ``total``, with Python, torch and the inputs, and ``extra``, above what is there
before the work. Every block of 1 MiB or more has a mapping of its own (glibc keeps it for later otherwise).
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

MIB = 2**20
OWN_MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}


def in_process(file: str, *arguments: object) -> dict[str, float]:
    """What ``report_peak`` printed in a run of a benchmark with these arguments."""
    command = [sys.executable, file, *map(str, arguments)]
    output = subprocess.run(
        command, env=os.environ | OWN_MAPPINGS, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def report_peak(run: Callable[[], dict[str, float]]) -> None:
    """Run and print seconds, ``total`` and ``extra`` bytes and the figures that ``run`` returns, as a line of JSON."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew, from here
    before, start = _status("VmRSS"), time.perf_counter()
    figures = run()
    seconds, total = time.perf_counter() - start, _status("VmHWM")
    print(json.dumps({"seconds": seconds, "total": total, "extra": total - before} | figures))


def _status(field: str) -> int:
    """Bytes of a line of this process's /proc status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
