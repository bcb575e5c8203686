"""Descriptors of many image files: the processes of ``torchrun`` share the work, and a cache keeps the results."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from passreid_models.data.images import ImageError
from passreid_models.embed import Embedder
from passreid_models.evaluation.feature_cache import FeatureCache, hash_files
from passreid_models.runtime import world

__all__ = ["Features", "extract"]


@dataclass(frozen=True)
class Features:
    """Descriptors in the order of the files, in every process."""

    descriptors: Tensor
    """Float32 ``[N, C]`` on the CPU; the rows of images without a descriptor are NaN."""
    errors: dict[int, str]
    """Messages about images without a descriptor by row, with the name of the file, as of the Embedder."""
    cached: int
    """Number of descriptors from the cache."""

    @property
    def readable(self) -> np.ndarray:
        """Whether each image can be read and has a finite descriptor, bool ``[N]``."""
        mask = np.ones(len(self.descriptors), dtype=bool)
        mask[list(self.errors)] = False
        return mask


def extract(
    embed: Embedder, paths: Sequence[Path], cache: FeatureCache | None = None, progress: bool = True
) -> Features:
    """Compute the descriptors of image files; call it in every process of the group.

    Each process computes every ``world``-th descriptor, and all processes return all of them.

    Args:
        embed: Embedder, the same in every process.
        paths: N image files, the same in every process.
        cache: Cache to read descriptors from, and to write new ones to.
        progress: Show a bar in the first process.
    """
    rank, size = world()
    own_paths = paths[rank::size]
    hashes = hash_files(own_paths) if cache else [""] * len(own_paths)
    cached_rows = cache.load() if cache else {}
    block = torch.empty(len(own_paths), embed.dim)  # [N / world, C]
    missing = []
    for row, digest in enumerate(hashes):
        if digest in cached_rows:
            block[row] = torch.from_numpy(cached_rows[digest])
        else:
            missing.append(row)
    failures: dict[int, str] = {}
    if missing:
        paths_or_errors: list[Any] = [
            ImageError(f"{p}: a folder, no image") if os.path.isdir(p := own_paths[row]) else p for row in missing
        ]
        block[torch.tensor(missing)] = embed(paths_or_errors, errors=failures, progress=progress and rank == 0)
    errors = {missing[i]: reason for i, reason in failures.items()}
    share = (block.numpy(), errors, hashes, len(own_paths) - len(missing))
    shares: list[Any] = [share]
    if size > 1:
        shares = [None] * size
        dist.all_gather_object(shares, share)
    descriptors = torch.empty(len(paths), embed.dim)
    all_errors: dict[int, str] = {}
    all_hashes = [""] * len(paths)
    for r, (rows, reasons, digests, _) in enumerate(shares):
        descriptors[r::size] = torch.from_numpy(rows)
        all_errors |= {r + size * i: reason for i, reason in reasons.items()}
        all_hashes[r::size] = digests
    cached = sum(share[3] for share in shares)
    if cache and rank == 0 and cached + len(all_errors) < len(paths):
        readable = [i for i, digest in enumerate(all_hashes) if digest and i not in all_errors]
        cache.store([all_hashes[i] for i in readable], descriptors[torch.tensor(readable, dtype=torch.long)])
    return Features(descriptors, dict(sorted(all_errors.items())), cached)
