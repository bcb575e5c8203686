"""Descriptors of many files: shared among the processes of ``torchrun``, taken from the cache where they are known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from passreid_models.embed import Embedder
from passreid_models.evaluation.feature_cache import FeatureCache, hash_files
from passreid_models.runtime import world

__all__ = ["Features", "extract"]


@dataclass(frozen=True)
class Features:
    """Descriptors in the order of the files, in every process."""

    descriptors: Tensor
    """Float32 ``[N, C]`` on the CPU; rows of NaN where an image cannot be read."""
    errors: dict[int, str]
    """Why, by row, with the name of the file."""
    cached: int
    """How many came from the cache."""

    @property
    def readable(self) -> np.ndarray:
        """Whether each image can be read, bool ``[N]``."""
        found = np.ones(len(self.descriptors), dtype=bool)
        found[list(self.errors)] = False
        return found


def extract(
    embed: Embedder, paths: Sequence[Path], cache: FeatureCache | None = None, progress: bool = True
) -> Features:
    """Descriptors of image files; each process computes every ``world``-th, and all get all of them.

    Call it in every process of the group.

    Args:
        embed: The same in every process.
        paths: ``[N]``, the same in every process.
        cache: Takes known descriptors from it, and leaves these in it.
        progress: Show a bar in the first process.
    """
    rank, size = world()
    mine = paths[rank::size]
    hashes = hash_files(mine) if cache else [""] * len(mine)
    known = cache.load() if cache else {}
    block = torch.empty(len(mine), embed.dim)  # [N / world, C]
    missing = []
    for row, digest in enumerate(hashes):
        if digest in known:
            block[row] = torch.from_numpy(known[digest])
        else:
            missing.append(row)
    failed: dict[int, str] = {}
    if missing:
        found = embed([mine[row] for row in missing], errors=failed, progress=progress and rank == 0)
        block[torch.tensor(missing)] = found
    errors = {missing[i]: reason for i, reason in failed.items()}
    shares: list[Any] = [(block.numpy(), errors, hashes, len(mine) - len(missing))]
    if size > 1:
        shares = [None] * size
        dist.all_gather_object(shares, (block.numpy(), errors, hashes, len(mine) - len(missing)))
    descriptors = torch.empty(len(paths), embed.dim)
    all_errors: dict[int, str] = {}
    all_hashes = [""] * len(paths)
    for r, (rows, reasons, digests, _) in enumerate(shares):
        descriptors[r::size] = torch.from_numpy(rows)
        all_errors |= {r + size * i: reason for i, reason in reasons.items()}
        all_hashes[r::size] = digests
    cached = sum(share[3] for share in shares)
    if cache and rank == 0 and cached + len(all_errors) < len(paths):
        good = [i for i, digest in enumerate(all_hashes) if digest and i not in all_errors]
        cache.store([all_hashes[i] for i in good], descriptors[torch.tensor(good, dtype=torch.long)])
    return Features(descriptors, dict(sorted(all_errors.items())), cached)
