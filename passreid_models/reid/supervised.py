"""Fine-tuning with identity labels, by the recipe of the published models.

finetune(FinetuneConfig(data="Market-1501/", init="lup", out="run"))
"""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passreid_models.reid.config import FinetuneConfig
from passreid_models.reid.data import Batch
from passreid_models.reid.run import ReIDRun
from passreid_models.reid.samplers import count_identity_batches, identity_batches, shuffled_batches
from passreid_models.reid.trainers import SupervisedTrainer
from passreid_models.training.loop import run_in_folder

__all__ = ["finetune"]


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune, from the first step or from the last checkpoint on, to ``out/export``; also under ``torchrun``.

    Returns:
        The exported folder, for ``timm.create_model("local-dir:...", pretrained=True)``: the descriptor before the
        neck, with neck and classifier in ``extras.safetensors``. ``out/best`` is that of the highest mAP.

    Raises:
        ValueError: If a setting does not fit the data, the machine, or the run to resume.
        OSError: If the data cannot be read, the run not be written, or a process that loads images died.
        NonFiniteLossError: If the loss is NaN or infinite.
        Stopped: On SIGINT, SIGTERM or SIGUSR1, or after ``max_minutes``, with the state saved.
    """
    return run_in_folder(SupervisedRun, config)


class SupervisedRun(ReIDRun):
    """Identities as classes."""

    program = "passreid finetune"
    trainer_class = SupervisedTrainer
    shown = ("loss", "loss_id", "loss_triplet", "accuracy", "lr", "images_per_s", "wait_share", "mAP", "rank1")

    def make_trainer(self, device: torch.device, checkpoint: dict[str, Any] | None) -> SupervisedTrainer:
        c, pids = self.config, self.train_split.pids
        names, self.images.labels = np.unique(pids, return_inverse=True)  # pids as classes 0 .. K - 1
        images_of_id = np.bincount(self.images.labels)
        if c.triplet_weight and images_of_id.max() < 2:
            raise ValueError(
                f"triplet_weight: every identity of {c.data} has one image, and the triplet loss needs two: "
                "--triplet-weight 0 trains by the identities' cross-entropy alone"
            )
        labels = self.images.labels
        if c.triplet_weight:
            steps = count_identity_batches(labels, c.ids_per_batch, c.images_per_id, c.seed, c.epochs)
        else:
            steps = [len(shuffled_batches(len(labels), c.batch_size, c.seed, 0))] * c.epochs
        fingerprint = self.dataset.train_fingerprint
        return SupervisedTrainer(c, len(labels), len(names), steps, device, fingerprint, checkpoint)

    def batches(self) -> Generator[Batch, None, None]:
        c, t, labels = self.config, self.trainer, self.images.labels
        while t.step < t.total_steps:
            if c.triplet_weight:
                batches = identity_batches(labels, c.ids_per_batch, c.images_per_id, c.seed, t.epoch)
            else:
                batches = shuffled_batches(len(labels), c.batch_size, c.seed, t.epoch)
            yield from self.load(batches)

    def announcement(self) -> list[str]:
        c, t = self.config, self.trainer
        identities = f"{c.ids_per_batch} identities x {c.images_per_id} images"
        batch = identities if c.triplet_weight else f"{c.batch_size} images in random order"
        return [
            *self.describe(),
            f"{c.epochs} epochs of about {t.epoch_starts[1]} steps of {batch}, {t.model.num_ids} identities; "
            f"{t.world_size} processes",
            f"learning rate: {c.lr:g} after {c.num_warmup_epochs} epochs of warm-up",
        ]

    def exported(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        return self.trainer.model.descriptor_model()

    def about(self) -> dict[str, Any]:
        return {"method": "supervised re-ID", **super().about()}
