"""Parameter updates of PASS: groups of AdamW, gradient clipping, the teacher's moving average."""

from collections.abc import Iterable

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
def clip_gradients(student: PASSNetwork, max_norm: float, by: str = "parameter") -> Tensor:
    """Clip gradients to ``max_norm``, and return the norm of all gradients together before clipping.

    Args:
        student: Network after the backward pass.
        max_norm: Largest norm; 0: no clipping.
        by: ``parameter`` clips each parameter on its own, as the official code does (each part token is a parameter of
            its own there, and a row here); ``norm`` clips all gradients together.
    """
    grads: list[Tensor] = []
    for p in student.parameters():
        if p.grad is not None:
            grads += p.grad[0].unbind() if p is student.backbone.reg_token else [p.grad]
    norms = torch.stack(torch._foreach_norm(grads))
    total = norms.norm()
    if max_norm:
        scales = (max_norm / ((norms if by == "parameter" else total.expand_as(norms)) + 1e-6)).clamp(max=1)
        factors = scales.unbind()
        if scales.device.type == "cpu":  # leave out factors of 1; reading them would wait for a GPU
            clipped = [i for i, scale in enumerate(scales.tolist()) if scale != 1]
            grads, factors = [grads[i] for i in clipped], tuple(factors[i] for i in clipped)
        if grads:
            torch._foreach_mul_(grads, factors)
    return total


def update_teacher(teacher: Iterable[nn.Parameter], student: Iterable[nn.Parameter], momentum: float) -> None:
    """Move the teacher's parameters, in place, to the exponential moving average of the student's; buffers stay."""
    get_ema_multi_avg_fn(momentum)(list(teacher), [p.detach() for p in student], None)
