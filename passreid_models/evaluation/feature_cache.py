"""Cache of descriptors on the disk, by the content of the weights and of each image.

$PASSREID_CACHE/features/0123456789abcdef-fedcba9876543210.safetensors
    hash of weights and settings - hash of the dataset's name
    hashes       uint8 [N, 32], SHA-256 of each image file
    descriptors  float32 [N, C]
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from passreid_models.data.images import read_file
from passreid_models.embed import Embedder, has_direction
from passreid_models.layers import is_hooked
from passreid_models.runtime import atomic_file, cache_dir, hash_tensors, map_threads

__all__ = ["FeatureCache", "has_own_code", "hash_files", "weights_key"]

VERSION = 1  # to be raised when the same image and weights give another descriptor, beyond rounding
PACKAGES = ("passreid_models", "timm", "torch", "torchvision")
_logger = logging.getLogger(__name__)


class FeatureCache:
    """Cached descriptors of one dataset by one model, in one file."""

    def __init__(self, embed: Embedder, dataset: str, folder: str | Path | None = None) -> None:
        """
        Args:
            embed: Model and settings of the descriptors.
            dataset: Name of the dataset, such as its folder; every dataset has its own file.
            folder: Folder of the files; by default ``features`` in the package's cache.
        """
        self.key, self.dim = weights_key(embed), embed.dim
        scope = hashlib.sha256(dataset.encode(errors="surrogateescape")).hexdigest()
        folder = cache_dir() / "features" if folder is None else Path(folder)
        self.file = folder / f"{self.key[:16]}-{scope[:16]}.safetensors"

    def load(self) -> dict[str, np.ndarray]:
        """Read the descriptors ``[C]`` by SHA-256 of the image; a damaged file is logged, and counts as empty.

        Rows that are zero or not finite are left out.
        """
        if not self.file.is_file():
            return {}
        try:
            with safe_open(self.file, "numpy") as file:
                metadata, hashes, descriptors = (
                    file.metadata(),
                    file.get_tensor("hashes"),
                    file.get_tensor("descriptors"),
                )
            if hashes.shape[1:] != (32,) or descriptors.shape != (len(hashes), self.dim):
                raise ValueError("unexpected shapes")
            if metadata["weights"] != self.key or metadata["checksum"] != _checksum(hashes, descriptors):
                raise ValueError("the checksum does not match")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
            _logger.warning(f"{self.file} is damaged ({e}): its descriptors are computed again")
            return {}
        finite = has_direction(torch.from_numpy(descriptors)).numpy()
        return {digest.tobytes().hex(): row for digest, row in zip(hashes[finite], descriptors[finite], strict=True)}

    def store(self, hashes: Sequence[str], descriptors: Tensor) -> None:
        """Write the descriptors ``[N, C]`` of the images with these hashes, and drop all earlier ones.

        A failed write is only logged: the descriptors are computed either way.
        """
        rows = {digest: row for row, digest in enumerate(hashes)}  # one row for equal files
        hash_bytes = np.frombuffer(bytes.fromhex("".join(rows)), dtype=np.uint8).reshape(-1, 32)
        unique = descriptors[torch.tensor(list(rows.values()), dtype=torch.long)].numpy()
        metadata = {"weights": self.key, "checksum": _checksum(hash_bytes, unique)}
        try:
            with atomic_file(self.file) as temporary:
                save_file({"hashes": hash_bytes, "descriptors": unique}, temporary, metadata)
        except OSError as e:  # a full disk, or a folder of another user
            _logger.warning(f"{self.file} cannot be written ({e}): the descriptors are not cached")


def weights_key(embed: Embedder) -> str:
    """SHA-256 of all that a descriptor depends on besides image and code: weights, fusion, neck, flip, transform."""
    model = embed.model
    settings: dict[str, Any] = {
        "version": VERSION,
        "transform": repr(embed.transform),  # size, interpolation, statistics to 4 digits
        "descriptor": [model.global_pool, model.neck, embed.flip, embed.l2_normalize, str(embed.dtype)],
        "network": [repr(model), [getattr(module, "num_heads", 0) for module in model.modules()]],
    }
    statistics = [*embed.data_config["mean"], *embed.data_config["std"]]
    if any(round(value, 4) != value for value in statistics):
        settings["statistics"] = statistics
    digest = hashlib.sha256(json.dumps(settings).encode())
    hash_tensors(digest, model.state_dict())
    return digest.hexdigest()


def has_own_code(embed: Embedder) -> bool:
    """Whether descriptors depend on code of the user's, which no key holds: a class, a hook, a method of an object."""
    modules = list(embed.model.modules())
    objects = [*modules, *getattr(embed.transform, "transforms", [embed.transform])]
    if any(map(is_hooked, modules)) or any(any(map(callable, vars(x).values())) for x in objects):
        return True
    return any(type(x).__module__.partition(".")[0] not in PACKAGES for x in (embed, *objects))


def hash_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of the bytes of each file; ``""`` where it cannot be read."""
    return list(map_threads(_hash, paths))


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, ValueError):  # a pipe, or too large for an image
        return ""


def _checksum(hashes: np.ndarray, descriptors: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(hashes).data)
    digest.update(np.ascontiguousarray(descriptors).data)
    return digest.hexdigest()
