"""Parameter groups: how each takes learning rate and weight decay."""

from collections.abc import Callable, Iterable

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from passreid_models.pass_vit import PassVisionTransformer


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give each group its share of the learning rate and the weight decay."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["wd_scale"]


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: Callable[[float], float]) -> None:
    """Give each group of ``make_sgd`` its learning rate.

    Args:
        optimizer: Of ``make_sgd``.
        lr: The schedule's value for weights (1) and for biases (their factor), which may do more than scale.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * lr(group["bias_scale"])


def make_sgd(
    network: nn.Module,
    backbone: PassVisionTransformer,
    momentum: float,
    weight_decay: float,
    bias_lr: float = 1.0,
    layer_decay: float = 1.0,
) -> torch.optim.SGD:
    """SGD for a fine-tuned backbone, with factors for ``set_learning_rates``; no parameter is exempt from decay.

    A folded token (token + position) moves as far as the two did in the official optimisation: twice the learning rate,
    half the weight decay.

    Args:
        network: Holds the backbone; its parameters that need gradients are taken.
        backbone: The PASS model in it.
        momentum: Of SGD.
        weight_decay: Of all parameters.
        bias_lr: Factor for biases.
        layer_decay: Factor from each block to the one before it; what is behind the blocks has 1.
    """
    depth = {id(p): 0 for p in network.parameters()}
    layers = group_with_matcher(backbone.named_parameters(), backbone.group_matcher(), reverse=True)
    parameters, deepest = dict(backbone.named_parameters()), max(layers.values())
    depth |= {id(parameters[name]): deepest - layer for name, layer in layers.items()}
    folded = {id(backbone.cls_token), id(backbone.reg_token)}
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        scale, bias = layer_decay ** depth[id(p)], bias_lr if name.endswith("bias") else 1.0
        key = (2 * scale, bias, weight_decay / 2) if id(p) in folded else (scale, bias, weight_decay)
        groups.setdefault(key, []).append(p)
    return torch.optim.SGD(
        [{"params": ps, "lr_scale": s, "bias_scale": b, "weight_decay": d} for (s, b, d), ps in groups.items()],
        lr=0.0,
        momentum=momentum,
    )


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
