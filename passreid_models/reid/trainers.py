"""The training steps of re-ID: with identity labels, and with those of clusters.

Shapes: B batch, C descriptor width, K identities or clusters.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.reid.config import ClusterConfig, FinetuneConfig
from passreid_models.reid.data import Batch
from passreid_models.reid.losses import ClusterMemory, batch_hard_triplet
from passreid_models.reid.model import ReIDModel, make_backbone
from passreid_models.runtime import all_reduce_mean, gather_rows, seed_step, share_first
from passreid_models.schedules import warmup_cosine_epochs
from passreid_models.training.init import ready_to_train
from passreid_models.training.optim import grad_norm, make_sgd, set_learning_rates
from passreid_models.training.trainer import BaseTrainer


class ReIDTrainer(BaseTrainer):
    """What both share: one network, SGD, and a step around ``compare``."""

    network: nn.Module
    backbone: PassVisionTransformer
    optimizer: torch.optim.SGD

    def prepare(self, network: nn.Module, backbone: PassVisionTransformer, **sgd: float) -> None:
        """Bring the network to the device, and make its optimiser."""
        config = self.config
        ready_to_train(backbone, self.device, config.grad_checkpointing)
        self.network, self.backbone = self.synchronized(network).to(self.device).train(), backbone
        self.optimizer = make_sgd(self.network, backbone, config.momentum, config.weight_decay, **sgd)
        self.parallel = self.wrap(self.network)

    def share_statistics(self) -> None:
        """Give all processes the BatchNorm statistics of the first: without SyncBN each has those of its images."""
        share_first(self.network.buffers())

    def lr(self, epoch: int, scale: float) -> float:
        """Learning rate of an epoch; of biases with their factor."""
        raise NotImplementedError

    def compare(self, output: Any, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for the backward pass, and figures for the log, the first of which is the loss of all processes."""
        raise NotImplementedError

    def after_step(self, output: Any, labels: Tensor) -> None:
        """Move what is not a parameter."""

    def training_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        (batch,) = batches
        seed_step(self.config.seed, self.step, self.rank)
        set_learning_rates(self.optimizer, lambda scale: self.lr(self.epoch, scale))
        with self.autocast():
            output = self.parallel(batch.images)
        loss, figures = self.compare(output, batch.labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        names = [*figures, "grad_norm"]
        values = torch.stack([*(v.detach().float() for v in figures.values()), grad_norm(self.network.parameters())])
        found = dict(zip(names, all_reduce_mean(values).tolist(), strict=True))  # a GPU is waited for here, once a step
        scheduled = {"lr": self.lr(self.epoch, 1.0)}
        if not self.is_finite(found["loss"], found["grad_norm"]):
            self.leave_out(self.optimizer, "gradient" if math.isfinite(found["loss"]) else "loss")
            return {"loss": float("nan"), **scheduled}
        self.move(self.optimizer)
        self.after_step(output, batch.labels)
        self.step += 1
        return {**found, **scheduled}


class SupervisedTrainer(ReIDTrainer):
    """Cross-entropy of the identities and batch-hard triplet loss (PASS, section 3.3; the recipe of TransReID)."""

    state_keys = ("model", "optimizer")

    def __init__(
        self,
        config: FinetuneConfig,
        num_images: int,
        num_ids: int,
        epoch_steps: Sequence[int],
        device: torch.device,
        fingerprint: str = "",
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: The run, with its ``model``.
            num_images: Of the training set.
            num_ids: Identities of the training set, K.
            epoch_steps: Steps of each epoch.
            device: Of this process.
            fingerprint: Of the list of images, for the check of a resumed run.
            state: To continue from; ``config.init`` is not looked for then.

        Raises:
            ValueError: If the identities of a batch cannot be shared by the processes, or ``state`` is of a run with
                other settings or data.
        """
        super().__init__(config, num_images, epoch_steps, config.epochs, device, fingerprint)
        if config.ids_per_batch % self.world_size:
            raise ValueError(f"ids_per_batch: {config.ids_per_batch} is not divided by {self.world_size} processes")
        torch.manual_seed(config.seed)
        backbone = make_backbone(config, "bilinear", state and state["model"])
        if config.freeze_blocks > len(backbone.blocks):
            raise ValueError(f"freeze_blocks: {config.freeze_blocks} is more than the {len(backbone.blocks)} blocks")
        self.model = ReIDModel(backbone, num_ids)
        if config.freeze_blocks:
            freeze(backbone, config.freeze_blocks)
        self.prepare(self.model, backbone, bias_lr=config.bias_lr, layer_decay=config.layer_decay)
        if state is not None:
            self.load_state(state)

    def lr(self, epoch: int, scale: float) -> float:
        c = self.config
        start, end = 0.01 * c.lr, 0.002 * c.lr
        return warmup_cosine_epochs(epoch, c.epochs, c.num_warmup_epochs, scale * c.lr, start, end)

    def compare(self, output: Any, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        before, _, logits = (x.float() for x in output)
        loss_id = F.cross_entropy(logits, labels, label_smoothing=c.label_smoothing)
        figures = {"loss_id": loss_id, "accuracy": (logits.argmax(1) == labels).float().mean()}
        loss, whole = c.id_weight * loss_id, c.id_weight * loss_id
        if c.triplet_weight:  # of the identities of all processes, as if there were one
            triplet = batch_hard_triplet(gather_rows(before), gather_rows(labels), c.margin)
            figures["loss_triplet"] = triplet
            loss = loss + self.world_size * c.triplet_weight * triplet
            whole = whole + c.triplet_weight * triplet
        return loss, {"loss": whole, **figures}

    def tensors(self) -> dict[str, Any]:
        return {
            "statistics": statistics_of(self.backbone),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_tensors(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def statistics_of(backbone: PassVisionTransformer) -> dict[str, Any]:
    """Of the images that the weights expect; who begins with the checkpoint takes them along."""
    cfg: dict[str, Any] = backbone.pretrained_cfg
    return {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"]), "interpolation": cfg["interpolation"]}


def freeze(backbone: PassVisionTransformer, num_blocks: int) -> None:
    """Let patch embedding, tokens, positions and the first blocks stay as they are."""
    stays = ("patch_embed.", "cls_token", "reg_token", "pos_embed", *(f"blocks.{i}." for i in range(num_blocks)))
    for name, p in backbone.named_parameters():
        if name.startswith(stays):
            p.requires_grad_(False)


class DescriptorNetwork(nn.Module):
    """The descriptor of a backbone with its neck, computed for the prefix tokens alone."""

    def __init__(self, backbone: PassVisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone.forward_head(self.backbone.forward_views(x), pre_logits=True)  # [B, C]


class ClusterTrainer(ReIDTrainer):
    """Contrast with the centroids of clusters (Cluster Contrast, arXiv 2103.11568)."""

    state_keys = ("model", "optimizer", "labels", "centroids")

    def __init__(
        self,
        config: ClusterConfig,
        num_images: int,
        device: torch.device,
        fingerprint: str = "",
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: The run, with its ``model``.
            num_images: Of the training set.
            device: Of this process.
            fingerprint: Of the list of images, for the check of a resumed run.
            state: To continue from; ``config.init`` is not looked for then.

        Raises:
            ValueError: If ``state`` is of a run with other settings or data.
        """
        super().__init__(config, num_images, config.steps, config.epochs, device, fingerprint)
        torch.manual_seed(config.seed)
        backbone = make_backbone(config, "bicubic", state and state["model"])
        self.prepare(DescriptorNetwork(backbone), backbone)
        self.labels: Tensor | None = None
        """Cluster of each training image, int64 ``[N]``; -1 is an outlier."""
        self.memory = self._new_memory(torch.zeros(0, backbone.head_hidden_size))
        if state is not None:
            self.load_state(state)

    def _new_memory(self, centroids: Tensor) -> ClusterMemory:
        c = self.config
        return ClusterMemory(centroids, c.temp, c.memory_momentum, c.memory).to(self.device)

    def begin_epoch(self, labels: Tensor, features: Tensor) -> None:
        """Take the clusters of an epoch.

        Args:
            labels: int64 ``[N]``.
            features: L2-normalised descriptors ``[N, C]``.
        """
        self.labels = labels
        count = int(labels.max()) + 1
        sums = torch.zeros(count, features.shape[1]).index_add_(0, labels[labels >= 0], features[labels >= 0])
        self.memory = self._new_memory(F.normalize(sums, dim=1))

    def lr(self, epoch: int, scale: float) -> float:
        return scale * self.config.lr * self.config.lr_gamma ** (epoch // self.config.lr_step)

    def compare(self, output: Any, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        known = labels >= 0  # where an image could not be read any more, the next one may be an outlier
        loss = self.memory(output.float()[known], labels[known])
        return loss, {"loss": loss}

    def after_step(self, output: Any, labels: Tensor) -> None:
        output, labels = gather_rows(output.detach().float()), gather_rows(labels)
        self.memory.update(output[labels >= 0], labels[labels >= 0])

    def tensors(self) -> dict[str, Any]:
        assert self.labels is not None
        return {
            "statistics": statistics_of(self.backbone),
            "model": self.backbone.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "labels": self.labels,
            "centroids": self.memory.centroids,
        }

    def load_tensors(self, state: dict[str, Any]) -> None:
        self.backbone.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.labels = state["labels"].cpu()
        self.memory = self._new_memory(state["centroids"])
