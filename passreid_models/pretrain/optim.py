"""What PASS does to parameters in a step: groups of AdamW, clipping, the teacher's average."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from passreid_models.pretrain.network import PASSNetwork


def make_optimizer(student: PASSNetwork) -> torch.optim.AdamW:
    """AdamW in three groups, with factors ``lr_scale`` and ``wd_scale`` for ``set_hyperparameters``.

    Biases and other 1-D parameters do not decay; tokens and positions do. A folded token (token + position) moves as
    far as the two did in the official optimisation: twice the learning rate, half the weight decay.
    """
    backbone = student.backbone
    folded = [p for p in (backbone.cls_token, backbone.reg_token) if p is not None]
    ids = {id(p) for p in folded}
    others = [p for p in student.parameters() if p.requires_grad and id(p) not in ids]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr_scale": 1.0, "wd_scale": 1.0},
        {"params": [p for p in others if p.ndim == 1], "lr_scale": 1.0, "wd_scale": 0.0},
        {"params": folded, "lr_scale": 2.0, "wd_scale": 0.5},
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=folded[0].device.type in ("cpu", "cuda"))


@torch.no_grad()
def clip_gradients(student: PASSNetwork, max_norm: float, by: str = "parameter") -> Tensor:
    """Scale gradients down to a norm of ``max_norm``, and return the norm of all of them together before that.

    Args:
        student: After the backward pass.
        max_norm: Largest norm; 0 clips nothing.
        by: ``parameter``, each on its own, as the official code does (its part tokens are parameters of their own:
            here, rows), or ``norm``, that of all together.
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
        if scales.device.type == "cpu":  # a GPU would be waited for to know which change nothing
            large = [i for i, scale in enumerate(scales.tolist()) if scale != 1]
            grads, factors = [grads[i] for i in large], tuple(factors[i] for i in large)
        if grads:
            torch._foreach_mul_(grads, factors)
    return total


def update_teacher(teacher: Iterable[nn.Parameter], student: Iterable[nn.Parameter], momentum: float) -> None:
    """Exponential moving average of the student's parameters, in place; buffers are not averaged."""
    get_ema_multi_avg_fn(momentum)(list(teacher), [p.detach() for p in student], None)
