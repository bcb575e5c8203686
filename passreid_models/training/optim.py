"""Parameter groups, with factors of the learning rate and the weight decay."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from passreid_models.pass_vit import PassVisionTransformer


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of each group, multiplied by the group's factors."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["wd_scale"]


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: Callable[[float], float]) -> None:
    """Set the learning rate of each group of ``make_grouped_optimizer``.

    Args:
        optimizer: Optimiser made by ``make_grouped_optimizer``.
        lr: Learning rate as a function of the factor of biases, 1 for weights; it need not be proportional.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * lr(group["bias_scale"])


def make_grouped_optimizer(
    network: nn.Module,
    backbone: PassVisionTransformer,
    optimizer: str,
    momentum: float,
    weight_decay: float,
    bias_lr: float = 1.0,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD or AdamW for a fine-tuned backbone, with factors for ``set_learning_rates``.

    SGD decays all parameters, as published; AdamW those of two and more dimensions, as in pre-training.
    A folded token (token + position) gets twice the learning rate and half the weight decay: it then moves as far as
    token and position together in the official optimisation.

    Args:
        network: Network that holds the backbone; all its trainable parameters are optimised.
        backbone: PASS model in ``network``.
        optimizer: ``sgd`` or ``adamw``.
        momentum: Momentum of SGD; AdamW's first beta.
        weight_decay: Weight decay.
        bias_lr: Factor of the learning rate of biases.
        layer_decay: Factor of the learning rate from each block to the one before it; neck and classifier have 1, the
            last block and ``norm`` have ``layer_decay``.
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
        decay = weight_decay if optimizer == "sgd" or p.ndim > 1 else 0.0
        key = (2 * scale, bias, decay / 2) if id(p) in folded else (scale, bias, decay)
        groups.setdefault(key, []).append(p)
    param_groups = [
        {"params": ps, "lr_scale": s, "bias_scale": b, "weight_decay": d} for (s, b, d), ps in groups.items()
    ]
    if optimizer == "sgd":
        return torch.optim.SGD(param_groups, lr=0.0, momentum=momentum)
    fused = backbone.cls_token.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(param_groups, lr=0.0, betas=(momentum, 0.999), fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore the moments of a saved optimiser; the settings of the groups stay those of the configuration.

    Raises:
        ValueError: If they are not those of its parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in state["param_groups"]] != [len(group["params"]) for group in groups]:
        raise ValueError("the optimiser has other groups of parameters")
    optimizer.load_state_dict({**state, "param_groups": groups})
    for p, moments in optimizer.state.items():
        for name, x in moments.items():
            if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_meta or x.shape not in (p.shape, ())):
                shapes = f"{tuple(x.shape)}, and its parameter {tuple(p.shape)}"
                raise ValueError(f"{name} of the optimiser is {x.layout} {shapes}")


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
