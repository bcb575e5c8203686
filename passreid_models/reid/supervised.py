"""Fine-tuning with identity labels, by the recipe of the published models.

finetune(FinetuneConfig(data="Market-1501/", init="pass_vit_small_patch16.lup", out="run"))
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passreid_models.checkpoints.names import NamedModel
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.pass_vit import PassVisionTransformer
from passreid_models.reid.config import FinetuneConfig
from passreid_models.reid.losses import batch_hard_triplet
from passreid_models.reid.model import ReIDModel, make_backbone
from passreid_models.reid.run import ReIDRun
from passreid_models.reid.samplers import count_identity_batches, identity_batches, shuffled_batches
from passreid_models.reid.trainer import ReIDTrainer, statistics_of
from passreid_models.runtime import gather_rows
from passreid_models.schedules import warmup_cosine_epochs
from passreid_models.training.optim import load_optimizer
from passreid_models.training.run import run_in_folder
from passreid_models.training.warm_start import find_weights

__all__ = ["finetune"]


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune, from the first step or from the last checkpoint, to ``out/export``; also under ``torchrun``.

    Returns:
        The exported folder, for ``timm.create_model("local-dir:...", pretrained=True)``: the descriptor before the
        neck, with neck and classifier in ``extras.safetensors``. ``out/best`` is the export of the highest mAP.

    Raises:
        ValueError: If a setting does not fit the data, the machine, or the run to resume.
        OSError: If the data cannot be read, the run cannot be written, or a process that loads images died.
        NonFiniteLossError: If the loss is NaN or infinite.
        Stopped: On SIGINT, SIGTERM, SIGUSR1 or SIGHUP, or after ``max_minutes``, with the state saved.
    """
    return run_in_folder(SupervisedRun, config)


class SupervisedTrainer(ReIDTrainer):
    """Cross-entropy of the identities and batch-hard triplet loss (PASS, section 3.3; the recipe of TransReID)."""

    state_keys = ("model", "optimizer")

    def __init__(
        self,
        config: FinetuneConfig,
        num_images: int,
        identities: Sequence[str],
        epoch_steps: Sequence[int],
        device: torch.device,
        fingerprint: str = "",
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: Configuration of the run, with its ``model``.
            num_images: Number of training images.
            identities: Names of the K identities of the training set, in the order of the classes.
            epoch_steps: Steps of each epoch.
            device: Device of this process.
            fingerprint: Hash of the list of images, which a resumed run must share.
            state: State to continue from; ``config.init`` is then not read.

        Raises:
            ValueError: If the identities of a batch cannot be shared by the processes, or ``state`` is of a run with
                other settings or data.
        """
        super().__init__(config, num_images, epoch_steps, device, fingerprint)
        if config.ids_per_batch % self.world_size:
            raise ValueError(f"ids_per_batch: {config.ids_per_batch} is not divisible by {self.world_size} processes")
        if config.batch_size < 2 * (1 if self.is_synchronized else self.world_size):
            raise ValueError(
                f"ids_per_batch: with {config.batch_size} images in a batch of {self.world_size} processes, BatchNorms "
                "have one image each, and need two"
            )
        torch.manual_seed(config.seed)
        self.identities = list(identities)
        start = None if state is not None or config.init == "random" else find_start(config)
        backbone = make_backbone(config, "bilinear", state and state["model"], start)
        if config.freeze_blocks > len(backbone.blocks):
            raise ValueError(f"freeze_blocks: {config.freeze_blocks} is more than the {len(backbone.blocks)} blocks")
        self.model = ReIDModel(backbone, len(identities))
        self.classifier_start = "" if start is None else self._start_classifier(start.run)
        """Log line that says whether the classifier is kept or new."""
        if config.freeze_blocks:
            freeze(backbone, config.freeze_blocks)
        self.prepare(self.model, backbone, bias_lr=config.bias_lr, layer_decay=config.layer_decay)
        if state is not None:
            self.load_state(state)

    def _start_classifier(self, run: dict[str, Any]) -> str:
        """Load neck and classifier of a run's checkpoint if the identities have the same names; return the log line."""
        c, ids, init = self.config, self.identities, self.config.init
        names = run.get("identities")  # older checkpoints have none, but a fingerprint of the labelled images
        if not has_classifier(run):
            reason = f"{init} gives no checkpoint of passreid finetune"
        elif names is None and run.get("fingerprint") != self.fingerprint:
            reason = f"{init} does not name its identities, and its images are others"
        elif names is not None and names != ids:
            same = len(set(names) & set(ids))
            reason = f"of the {len(names)} identities of {init} and the {len(ids)} here, {same} are the same"
        elif differing := [k for k in ("neck", "fusion") if run["config"].get(k) != getattr(c, k)]:
            reason = "; ".join(f"{k} is {getattr(c, k)}, and {run['config'].get(k)} in {init}" for k in differing)
        else:
            kept = {k: v for k, v in run["model"].items() if k.startswith(("backbone.fc_norm.", "classifier."))}
            try:
                self.model.load_state_dict(kept, strict=False)
            except RuntimeError as e:  # of other shapes
                raise CheckpointError(f"init: {init}: {' '.join(str(e).split())}") from None
            line = f"classifier: kept, with the neck, since the {len(ids)} identities have the names of {init}"
            if run.get("fingerprint") != self.fingerprint:
                line += "; its images are others: if its persons are, too, begin with its export"
            return line
        return f"classifier: new, since {reason}"

    def lr(self, epoch: int, scale: float) -> float:
        c = self.config
        start, end = 0.01 * c.lr, 0.002 * c.lr
        return warmup_cosine_epochs(epoch, c.epochs, c.num_warmup_epochs, scale * c.lr, start, end)

    def compute_loss(self, output: Any, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        before, _, logits = (x.float() for x in output)
        loss_id = F.cross_entropy(logits, labels, label_smoothing=c.label_smoothing)
        figures = {"loss_id": loss_id, "accuracy": (logits.argmax(1) == labels).float().mean()}
        loss, logged_loss = c.id_weight * loss_id, c.id_weight * loss_id
        if c.triplet_weight:  # over the images of all processes, as in a single one
            triplet = batch_hard_triplet(gather_rows(before), gather_rows(labels), c.margin)
            figures["loss_triplet"] = triplet
            loss = loss + self.world_size * c.triplet_weight * triplet  # DDP averages the gradients
            logged_loss = logged_loss + c.triplet_weight * triplet
        return loss, {"loss": logged_loss, **figures}

    def tensors(self) -> dict[str, Any]:
        return {
            "statistics": statistics_of(self.backbone),
            "identities": self.identities,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_tensors(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])


def find_start(config: FinetuneConfig) -> NamedModel:
    """Find the weights that ``init`` names: of a fine-tuning run the newest checkpoint, which holds its classifier."""
    weights = find_weights(config.init, config.model, heads=True)
    if weights.run and not has_classifier(weights.run):  # of another task: its export
        return find_weights(config.init, config.model)
    return weights


def has_classifier(run: Mapping[str, Any]) -> bool:
    """Whether a run's checkpoint holds neck and classifier; that of another task, or none (empty), does not."""
    return "classifier.weight" in run.get("model", ())


def freeze(backbone: PassVisionTransformer, num_blocks: int) -> None:
    """Freeze patch embedding, tokens, positions and the first ``num_blocks`` blocks.

    Their BatchNorms (of a conv stem) keep their statistics, too, and they drop no path.
    """
    for module in (backbone.patch_embed, backbone.blocks[:num_blocks]):
        module.requires_grad_(False).eval()
    for name in ("cls_token", "reg_token", "pos_embed"):
        if (token := getattr(backbone, name)) is not None:
            token.requires_grad_(False)


class SupervisedRun(ReIDRun):
    """Fine-tuning run: the classes are the identities."""

    program = "passreid finetune"
    method = "supervised re-ID"
    trainer_class = SupervisedTrainer
    shown = ("loss", "loss_id", "loss_triplet", "accuracy", "lr", "images_per_s", "wait_share", "mAP", "rank1")

    def make_trainer(self, device: torch.device, checkpoint: dict[str, Any] | None) -> SupervisedTrainer:
        c, labels = self.config, self.labels
        if c.triplet_weight and np.bincount(labels).max() < 2:
            raise ValueError(
                f"triplet_weight: every identity of {c.data} has one image, and the triplet loss needs two: "
                "--triplet-weight 0 trains by the identities' cross-entropy alone"
            )
        if c.triplet_weight:
            steps = count_identity_batches(labels, c.ids_per_batch, c.images_per_id, c.seed, c.epochs)
        else:
            steps = [len(shuffled_batches(len(labels), c.batch_size, c.seed, 0))] * c.epochs
        dataset = self.dataset
        fingerprint = dataset.train_fingerprint
        return SupervisedTrainer(c, len(labels), dataset.identities, steps, device, fingerprint, checkpoint)

    @cached_property
    def labels(self) -> np.ndarray:
        return np.unique(self.train_split.pids, return_inverse=True)[1]  # classes 0 .. K - 1

    def draw(self, epoch: int) -> list[np.ndarray]:
        c = self.config
        if c.triplet_weight:
            return identity_batches(self.labels, c.ids_per_batch, c.images_per_id, c.seed, epoch)
        return shuffled_batches(len(self.labels), c.batch_size, c.seed, epoch)

    def announcement(self) -> list[str]:
        c, t = self.config, self.trainer
        identities = f"{c.ids_per_batch} identities x {c.images_per_id} images"
        batch = identities if c.triplet_weight else f"{c.batch_size} images in random order"
        return [
            *self.describe(),
            f"{c.epochs} epochs of about {t.epoch_starts[1]} steps of {batch}, {t.model.num_ids} identities; "
            f"{t.world_size} processes",
            f"learning rate: cosine from {c.lr:g}, {c.num_warmup_epochs} epochs of warm-up",
            *filter(None, [t.classifier_start]),
        ]

    def exported(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        return self.trainer.model.descriptor_model()
