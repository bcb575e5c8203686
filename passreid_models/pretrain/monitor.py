"""Watching a run: signs of collapse, and the ranking of a labelled folder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_models.layers import fuse_tokens
from passreid_models.pretrain.loss import PASSLoss
from passreid_models.pretrain.network import Projections


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
