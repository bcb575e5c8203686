"""Images decoded once and kept at one size, in memory that the workers of a loader share."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from passreid_models.data.sources import Source
from passreid_models.runtime import local_world_size

SHARED_MEMORY = Path("/dev/shm")  # of Linux


class CachedSource:
    """Images of another source, resized, each decoded when it is first loaded by any worker, forked or spawned.

    A file that changes afterwards is not read again. An unreadable image is tried again each time.
    """

    def __init__(self, source: Source, size: tuple[int, int], resize: Callable[[Image.Image], Image.Image]) -> None:
        """
        Args:
            source: Source of N images.
            size: Height and width of the resized images.
            resize: Resizes an RGB image to ``size``; not random.
        """
        self.source, self.resize = source, resize
        self.description, self.fingerprint = source.description, source.fingerprint
        storage = torch.UntypedStorage._new_shared(cache_bytes(len(source), size))  # zeros that take no memory yet
        self.pixels = torch.empty(0, dtype=torch.uint8).set_(storage).view(len(source), *size, 3)
        self.sums = torch.zeros(len(source), dtype=torch.int64).share_memory_()  # 0: not loaded yet

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def load(self, index: int) -> Image.Image:
        pixels = self.pixels[index]
        if self.sums[index] == _sum(pixels):  # else not loaded, or half written by another worker
            return Image.fromarray(pixels.numpy())
        image = self.resize(self.source.load(index))
        pixels.copy_(torch.from_numpy(np.array(image)))
        self.sums[index] = _sum(pixels)
        return image


def cache_bytes(count: int, size: tuple[int, int]) -> int:
    """Bytes of ``count`` images of a height and width."""
    return count * size[0] * size[1] * 3


def cache_limit() -> int:
    """Bytes that a process may cache: a quarter of the free memory, shared with the others of ``torchrun`` here.

    Returns:
        0 on systems other than Linux, which do not say what is free.
    """
    try:
        free = _number(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo")) * 1024
        free = min(free, shutil.disk_usage(SHARED_MEMORY).free, _container_memory())
    except (OSError, ValueError):
        return 0
    return max(0, free) // 4 // local_world_size()


def _container_memory(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that the container or job of this process may still take; a large number if it has no limit."""
    free, lines = 1 << 62, groups.read_text(encoding="utf-8") if groups.is_file() else ""
    for top, line, limit, names in (
        (root, r"^0::/(.*)$", "memory.max", ("anon", "shmem")),
        (root / "memory", r"^\d+:(?:.*,)?memory(?:,.*)?:/(.*)$", "memory.limit_in_bytes", ("total_rss", "total_shmem")),
    ):
        below = re.search(line, lines, re.MULTILINE)
        group = top / (below[1] if below else "")
        for folder in (top, *(f for f in (group, *group.parents) if top in f.parents)):  # the limits above hold, too
            text = (folder / limit).read_text(encoding="utf-8").strip() if (folder / limit).is_file() else "max"
            if text != "max":
                free = min(free, int(text) - sum(_number(rf"^{name} (\d+)", folder / "memory.stat") for name in names))
    return free


def _number(pattern: str, file: Path) -> int:
    """Number in a file; 0 if it is not there."""
    match = re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)
    return int(match[1]) if match else 0


def _sum(pixels: Tensor) -> int:
    """Sum of the pixels, eight at a time; never 0."""
    return int(pixels.reshape(-1).view(torch.int64).sum()) | 1
