"""Learning rate and weight decay of parameter groups."""

import torch


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give each group its share of the learning rate and the weight decay."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["wd_scale"]
