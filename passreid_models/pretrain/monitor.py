"""Indicators of collapse during pre-training."""

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
    """Compute indicators of collapse on one batch.

    Args:
        criterion: Loss with the centres and the student's temperature.
        student: Student projections of all views.
        teacher: Teacher projections of the global views.
        teacher_temp: Temperature of the teacher's softmax.
        tokens: Prefix tokens of the teacher's backbone ``[B, T, D]``.

    Returns:
        ``teacher_entropy``: mean entropy of the CLS targets in nats, ln K if all prototypes are equally likely;
        ``marginal_entropy``: entropy of the mean target, near 0 if all images get the same prototype; ``kl``: KL
        divergence from target to student for the first pair of global views; ``center_norm``: norm of the CLS centre;
        ``feature_std``: standard deviation of the descriptor times the square root of its width, 0 in a collapse, 1 if
        spread over the sphere; ``part_cosine``: mean cosine between the part tokens of an image.
    """
    z, target = (_cls_logits(x, v) for x, v in ((student, 1), (teacher, 0)))
    q = F.softmax((target - criterion.centers[0]) / teacher_temp, dim=-1)  # [B, K]
    log_p = F.log_softmax(z / criterion.student_temp, dim=-1)
    entropy = _entropy(q).mean()
    descriptor = F.normalize(fuse_tokens(tokens, "cat" if tokens.shape[1] > 1 else "token").float(), dim=-1)
    indicators = {
        "teacher_entropy": entropy,
        "marginal_entropy": _entropy(q.mean(0)),
        "kl": -(q * log_p).sum(-1).mean() - entropy,
        "center_norm": criterion.centers[0].norm(),
        "feature_std": descriptor.std(0, correction=0).square().sum().sqrt(),
    }
    parts = F.normalize(tokens[:, 1:].float(), dim=-1)  # [B, P, D]
    if (num_parts := parts.shape[1]) > 1:
        cosines = (parts @ parts.transpose(1, 2)).mean(0)  # [P, P]
        indicators["part_cosine"] = (cosines.sum() - cosines.trace()) / (num_parts * (num_parts - 1))
    return {k: float(v) for k, v in indicators.items()}


def _cls_logits(outputs: Projections, view: int) -> Tensor:
    prototypes, scales = outputs.scaled()[0]
    return outputs.features[0][view].float() @ prototypes.float().T * scales  # [B, K]


def _entropy(q: Tensor) -> Tensor:
    return -torch.xlogy(q, q).sum(-1)
