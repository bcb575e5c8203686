"""Watching a run: signs of collapse, and the ranking of a labelled folder."""

import logging
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_models.embed import Embedder, find_images
from passreid_models.layers import fuse_tokens
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.retrieval import evaluate
from passreid_models.ssl.loss import PASSLoss
from passreid_models.ssl.network import Projections

_logger = logging.getLogger(__name__)


@torch.no_grad()
def collapse_indicators(
    criterion: PASSLoss, student: Projections, teacher: Projections, teacher_temp: float, tokens: Tensor
) -> dict[str, float]:
    """Signs of collapse on one batch.

    Args:
        criterion: For its centres and temperature.
        student: Projections of the views.
        teacher: Projections of the global views.
        teacher_temp: Temperature of the teacher.
        tokens: Prefix tokens of the teacher's backbone ``[B, T, D]``.

    Returns:
        ``teacher_entropy`` of the CLS targets, in nats: ln K when all prototypes are alike; ``marginal_entropy`` of
        their mean: near 0 when all images get the same prototype; ``kl`` from target to student, of the first pair of
        global views; ``center_norm`` of CLS; ``feature_std`` of the descriptor, times the root of its width: 0 in a
        collapse, 1 when spread over the sphere; ``part_cosine``, the mean cosine between the parts of an image.
    """
    z, target = (_cls_logits(x, v) for x, v in ((student, 1), (teacher, 0)))
    q = F.softmax((target - criterion.centers[0]) / teacher_temp, dim=-1)  # [B, K]
    log_p = F.log_softmax(z / criterion.student_temp, dim=-1)
    entropy = _entropy(q).mean()
    descriptor = F.normalize(fuse_tokens(tokens, "cat" if tokens.shape[1] > 1 else "token").float(), dim=-1)
    found = {
        "teacher_entropy": entropy,
        "marginal_entropy": _entropy(q.mean(0)),
        "kl": -(q * log_p).sum(-1).mean() - entropy,
        "center_norm": criterion.centers[0].norm(),
        "feature_std": descriptor.std(0, correction=0).square().sum().sqrt(),
    }
    parts = F.normalize(tokens[:, 1:].float(), dim=-1)  # [B, P, D]
    if (num_parts := parts.shape[1]) > 1:
        cosines = (parts @ parts.transpose(1, 2)).mean(0)  # [P, P]
        found["part_cosine"] = (cosines.sum() - cosines.trace()) / (num_parts * (num_parts - 1))
    return {k: float(v) for k, v in found.items()}


def _cls_logits(outputs: Projections, view: int) -> Tensor:
    prototypes, scales = outputs.scaled()[0]
    return outputs.features[0][view].float() @ prototypes.float().T * scales  # [B, K]


def _entropy(q: Tensor) -> Tensor:
    return -torch.xlogy(q, q).sum(-1)


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
