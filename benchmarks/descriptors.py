"""Descriptors such as a re-ID model gives: persons under cameras, good images and bad ones, distractors."""

import numpy as np
import torch
from torch import Tensor

CHUNK = 4096  # images made at a time, so that making them takes no memory to speak of


def persons(pids: np.ndarray, camids: np.ndarray, width: int, seed: int, noise: float) -> Tensor:
    """Unit vectors ``[N, width]``: the person, some of the camera, and noise, whose strength differs by image.

    A distractor (identity 0) resembles nobody. ``noise`` is relative to the person, on average.
    """
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(0)  # the same persons and cameras in query and gallery
    who = world.standard_normal((pids.max() + 1, width), dtype=np.float32)
    where = world.standard_normal((camids.max() + 1, width), dtype=np.float32)
    found = torch.empty(len(pids), width)
    for start in range(0, len(pids), CHUNK):
        part = slice(start, start + CHUNK)
        x = who[pids[part]] + 0.6 * where[camids[part]]
        x[pids[part] == 0] = rng.standard_normal((int((pids[part] == 0).sum()), width), dtype=np.float32)
        x += rng.gamma(4, noise / 4, (len(x), 1)).astype(np.float32) * rng.standard_normal(x.shape, dtype=np.float32)
        found[part] = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))
    return found


def market(queries: int, gallery: int, ids: int, cameras: int) -> tuple:
    """What ``evaluate`` takes, in the manner of Market-1501: a sixth of the gallery are distractors."""
    rng = np.random.default_rng(1)
    q_pids, g_pids = rng.integers(1, ids + 1, queries), rng.integers(1, ids + 1, gallery)
    g_pids[rng.random(gallery) < 1 / 6] = 0
    q_cams, g_cams = rng.integers(0, cameras, queries), rng.integers(0, cameras, gallery)
    query, found = persons(q_pids, q_cams, 768, 2, noise=2.4), persons(g_pids, g_cams, 768, 3, noise=2.4)
    return query, found, q_pids, g_pids, q_cams, g_cams


def training_set(images: int) -> Tensor:
    """Unlabelled images of persons with 17 images each; a tenth of the images resemble nobody."""
    rng = np.random.default_rng(1)
    pids = rng.integers(1, max(1, images // 17) + 1, images)
    pids[rng.random(images) < 0.1] = 0
    return persons(pids, rng.integers(0, 6, images), 256, 2, noise=1.2)
