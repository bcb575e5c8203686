"""Ranking a labelled folder between the epochs of a run."""

import logging
import re
from pathlib import Path

import numpy as np
import torch

from passreid_models.data.images import find_images
from passreid_models.embed import Embedder
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.retrieval import evaluate

_logger = logging.getLogger(__name__)


def read_labelled(folder: str | Path) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Images, identities and cameras of a folder for the probe.

    Identity and camera are read from names such as ``0002_c1s1_000451_03.jpg``; else a subfolder is an identity and
    each image counts as a camera of its own. Junk and distractors (-1, 0000) are left out.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If no identity has two images under different cameras.
    """
    try:
        paths = find_images(folder)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"probe: {e}") from None
    names = [re.match(r"(-?\d+)_c(\d+)", Path(p).name) for p in paths]
    if all(names):
        rows = [(Path(p), int(m[1]), int(m[2])) for p, m in zip(paths, names, strict=True) if m and int(m[1]) > 0]
    else:
        folders = {name: i for i, name in enumerate(sorted({str(Path(p).parent) for p in paths}))}
        rows = [(Path(p), folders[str(Path(p).parent)], i) for i, p in enumerate(paths)]
    pids, camids = np.array([r[1] for r in rows]), np.array([r[2] for r in rows])
    cameras: dict[int, set[int]] = {}
    for pid, camid in zip(pids.tolist(), camids.tolist(), strict=True):
        cameras.setdefault(pid, set()).add(camid)
    if len(cameras) < 2 or all(len(c) < 2 for c in cameras.values()):
        raise ValueError(
            f"probe: {folder} has no two identities with images under two cameras: expected names such as "
            "0002_c1s1_000451_03.jpg, or a folder for each identity"
        )
    return [r[0] for r in rows], pids, camids


def probe(
    backbone: PassVisionTransformer, labelled: tuple[list[Path], np.ndarray, np.ndarray], device: torch.device
) -> dict[str, float]:
    """mAP and Rank-1 of every image as a query against all others under other cameras (Rank-1 is 1-NN accuracy)."""
    paths, pids, camids = labelled
    errors: dict[int, str] = {}
    descriptors = Embedder(backbone, device)(paths, errors=errors)
    if errors:
        _logger.warning(f"probe: {len(errors)} images cannot be read, the first: {next(iter(errors.values()))}")
        kept = np.array([i for i in range(len(paths)) if i not in errors], dtype=int)
        descriptors, pids, camids = descriptors[kept], pids[kept], camids[kept]
    metrics = evaluate(descriptors, descriptors, pids, pids, camids, camids)
    return {"probe_mAP": 100 * metrics.mAP, "probe_rank1": 100 * metrics.rank1}
