"""Training step of re-ID, with identities or clusters as labels.

Shapes: B batch, C descriptor width, K identities or clusters.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.reid.batches import ImageBatch
from passreid_models.runtime import all_reduce_mean, seed_step, share_first
from passreid_models.training.optim import grad_norm, make_grouped_optimizer, set_learning_rates
from passreid_models.training.trainer import BaseTrainer
from passreid_models.training.warm_start import prepare_to_train


class ReIDTrainer(BaseTrainer):
    """Base of the re-ID trainers: one network, its optimiser, and a step around ``compute_loss``."""

    network: nn.Module
    backbone: PassVisionTransformer
    optimizer: torch.optim.Optimizer

    def prepare(self, network: nn.Module, backbone: PassVisionTransformer, **factors: float) -> None:
        """Move the network, which is in training mode but for what is frozen, to the device and make its optimiser."""
        config = self.config
        prepare_to_train(backbone, self.device, config.grad_checkpointing)
        self.network, self.backbone = self.synchronized(network).to(self.device), backbone
        self.optimizer = make_grouped_optimizer(
            self.network, backbone, config.optimizer, config.momentum, config.weight_decay, **factors
        )
        self.parallel = self.wrap(self.network)

    def share_statistics(self) -> None:
        """Give all processes the BatchNorm statistics of the first; without SyncBN each has those of its own images."""
        share_first(self.network.buffers())

    def lr(self, epoch: int, scale: float) -> float:
        """Learning rate of an epoch; ``scale`` is 1 for weights, ``bias_lr`` for biases."""
        raise NotImplementedError

    def compute_loss(self, output: Any, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss for the backward pass, and metrics to log as means over processes, ``loss`` among them."""
        raise NotImplementedError

    def after_step(self, output: Any, labels: Tensor) -> None:
        """Update the cluster memory, or whatever state has no gradient."""

    def training_step(self, batches: Sequence[ImageBatch]) -> dict[str, float]:
        (batch,) = batches
        seed_step(self.config.seed, self.step, self.rank)
        set_learning_rates(self.optimizer, lambda scale: self.lr(self.epoch, scale))
        self.keep_buffers(self.network)
        with self.autocast():
            output = self.parallel(batch.images)
        loss, figures = self.compute_loss(output, batch.labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        names = [*figures, "grad_norm"]
        values = torch.stack([*(v.detach().float() for v in figures.values()), grad_norm(self.network.parameters())])
        means = dict(zip(names, all_reduce_mean(values).tolist(), strict=True))  # the one wait for the GPU in a step
        scheduled = {"lr": self.lr(self.epoch, 1.0)}
        if not self.is_finite(means["loss"], means["grad_norm"]):
            self.skip_step(self.optimizer, "gradient" if math.isfinite(means["loss"]) else "loss")
            return {"loss": float("nan"), **scheduled}
        self.step_optimizer(self.optimizer)
        self.after_step(output, batch.labels)
        self.step += 1
        return {**means, **scheduled}


def statistics_of(backbone: PassVisionTransformer) -> dict[str, Any]:
    """Mean, standard deviation and interpolation of the backbone's images, for runs that begin with a checkpoint."""
    cfg: dict[str, Any] = backbone.pretrained_cfg
    return {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"]), "interpolation": cfg["interpolation"]}
