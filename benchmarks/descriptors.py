"""Generated descriptors that resemble those of a re-ID model: persons under cameras, noise, distractors."""

import numpy as np
import torch
from torch import Tensor

CHUNK = 4096  # images generated at a time, so that the generation adds little to the peak memory


def persons(pids: np.ndarray, camids: np.ndarray, width: int, seed: int, noise: float) -> Tensor:
    """Unit vectors ``[N, width]``: the sum of a person's vector, a camera's, and noise whose strength differs by image.

    A distractor (identity 0) has a random vector of its own. ``noise`` is the mean strength relative to the person.
    """
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(0)  # the same persons and cameras in query and gallery
    identities = world.standard_normal((pids.max() + 1, width), dtype=np.float32)
    cameras = world.standard_normal((camids.max() + 1, width), dtype=np.float32)
    features = torch.empty(len(pids), width)
    for start in range(0, len(pids), CHUNK):
        part = slice(start, start + CHUNK)
        x = identities[pids[part]] + 0.6 * cameras[camids[part]]
        x[pids[part] == 0] = rng.standard_normal((int((pids[part] == 0).sum()), width), dtype=np.float32)
        x += rng.gamma(4, noise / 4, (len(x), 1)).astype(np.float32) * rng.standard_normal(x.shape, dtype=np.float32)
        features[part] = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))
    return features


def market(queries: int, gallery: int, ids: int, cameras: int) -> tuple:
    """Arguments of ``evaluate`` as of Market-1501: a sixth of the gallery are distractors."""
    rng = np.random.default_rng(1)
    q_pids, g_pids = rng.integers(1, ids + 1, queries), rng.integers(1, ids + 1, gallery)
    g_pids[rng.random(gallery) < 1 / 6] = 0
    q_cams, g_cams = rng.integers(0, cameras, queries), rng.integers(0, cameras, gallery)
    query, gallery_features = persons(q_pids, q_cams, 768, 2, noise=2.4), persons(g_pids, g_cams, 768, 3, noise=2.4)
    return query, gallery_features, q_pids, g_pids, q_cams, g_cams


def training_set(images: int) -> Tensor:
    """Unlabelled images of persons with 17 images each; a tenth of the images are distractors."""
    rng = np.random.default_rng(1)
    pids = rng.integers(1, max(1, images // 17) + 1, images)
    pids[rng.random(images) < 0.1] = 0
    return persons(pids, rng.integers(0, 6, images), 256, 2, noise=1.2)
