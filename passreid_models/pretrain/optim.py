"""Parameter updates of PASS: groups of AdamW, gradient clipping, the teacher's moving average."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from passreid_models.pretrain.network import PASSNetwork


def make_optimizer(student: PASSNetwork) -> torch.optim.AdamW:
    """Make AdamW with three parameter groups, whose ``lr_scale`` and ``wd_scale`` are for ``set_hyperparameters``.

    Biases and other 1-D parameters have no weight decay; tokens and positions do. A folded token (token + position) has
    twice the learning rate and half the weight decay, to move as far as the two together in the official code.
    """
    backbone = student.backbone
    folded = [p for p in (backbone.cls_token, backbone.reg_token) if p is not None]
    folded_ids = {id(p) for p in folded}
    unfolded = [p for p in student.parameters() if p.requires_grad and id(p) not in folded_ids]
    groups = [
        {"params": [p for p in unfolded if p.ndim > 1], "lr_scale": 1.0, "wd_scale": 1.0},
        {"params": [p for p in unfolded if p.ndim == 1], "lr_scale": 1.0, "wd_scale": 0.0},
        {"params": folded, "lr_scale": 2.0, "wd_scale": 0.5},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=folded[0].device.type in ("cpu", "cuda"))


@torch.no_grad()
def gradient_norms(student: PASSNetwork) -> tuple[list[Tensor], Tensor]:
    """Gradients and their L2 norms ``[n]``.

    Each part token is a parameter of its own in the official code, and a row of the gradient of ``reg_token`` here.
    """
    grads: list[Tensor] = []
    for p in student.parameters():
        if p.grad is not None:
            grads += p.grad[0].unbind() if p is student.backbone.reg_token else [p.grad]
    return grads, torch.stack(torch._foreach_norm(grads))


@torch.no_grad()
def clip_to_norm(grads: list[Tensor], norms: Sequence[float], max_norm: float, by: str = "parameter") -> None:
    """Clip gradients, in place, to ``max_norm`` by their norms; 0: no clipping.

    Args:
        grads: Gradients.
        norms: Norm of each; known to the host, so that only those above ``max_norm`` are scaled, in one call.
        max_norm: Largest norm.
        by: ``parameter`` clips each parameter on its own, as the official code does; ``norm`` all gradients together.
    """
    if by == "norm":
        norms = [math.hypot(*norms)] * len(grads)
    clipped = [(g, max_norm / (n + 1e-6)) for g, n in zip(grads, norms, strict=True) if 0 < max_norm < n + 1e-6]
    if clipped:
        torch._foreach_mul_(*map(list, zip(*clipped, strict=True)))


def clip_gradients(student: PASSNetwork, max_norm: float, by: str = "parameter") -> Tensor:
    """Clip the gradients of a network as ``clip_to_norm``; return the norm of all together before clipping."""
    grads, norms = gradient_norms(student)
    clip_to_norm(grads, norms.tolist(), max_norm, by)  # waits for a GPU
    return norms.norm()


def update_teacher(teacher: Iterable[nn.Parameter], student: Iterable[nn.Parameter], momentum: float) -> None:
    """Move the teacher's parameters, in place, to the exponential moving average of the student's; buffers stay."""
    get_ema_multi_avg_fn(momentum)(list(teacher), [p.detach() for p in student], None)
