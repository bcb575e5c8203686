"""Pre-training run: data, log lines, export, and the probe between epochs.

train(PretrainConfig(data="my_crops/", out="run"))
"""

import logging
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.data.images import count
from passreid_models.data.sources import FileSource, open_source
from passreid_models.evaluation.evaluate import score
from passreid_models.pretrain.batches import StepSampler, ViewBatch, ViewDataset, batches_on, make_loader
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.runtime import share_first
from passreid_models.training.run import Run, pick_workers, run_in_folder

_logger = logging.getLogger(__name__)


def train(config: PretrainConfig) -> Path:
    """Pre-train, from the first step or from the last checkpoint on, to ``out/export``; also under ``torchrun``.

    Returns:
        The exported folder, for ``timm.create_model("local-dir:...", pretrained=True)``.

    Raises:
        ValueError: If a setting does not fit the data, the machine, or the run to resume.
        OSError: If the data cannot be read, the run cannot be written, or a process that loads images died.
        NonFiniteLossError: If the loss is NaN or infinite.
        Stopped: On SIGINT, SIGTERM, SIGUSR1 or SIGHUP, or after ``max_minutes``, with the state saved.
    """
    return run_in_folder(PretrainRun, config)


class PretrainRun(Run):
    """Part-wise self-distillation on a source of images."""

    trainer_class = PretrainTrainer
    epoch_figure = "probe_mAP"
    shown = ("loss", "lr", "images_per_s", "wait_share", "teacher_entropy", "feature_std", "part_cosine", "probe_mAP",
             "probe_rank1")  # fmt: skip

    def prepare(self, device: torch.device, checkpoint: dict[str, Any] | None) -> PretrainTrainer:
        config = self.config
        self.eval_dataset = open_probe(config.probe) if config.probe else None
        self.source = open_source(config.data)
        return PretrainTrainer(config, len(self.source), device, self.source.fingerprint, checkpoint)

    def batches(self) -> Generator[ViewBatch, None, None]:
        config, trainer = self.config, self.trainer
        fine, coarse = config.crop(config.epochs), config.crop(0)
        dataset = ViewDataset(self.source, fine, coarse, config.num_coarse_epochs, config.seed)
        sampler = StepSampler(
            trainer.num_images, config.batch_size, trainer.total_steps, config.seed,
            trainer.step, trainer.rank, trainer.world_size, config.accumulate,
        )  # fmt: skip
        loader = make_loader(dataset, sampler, pick_workers(config), trainer.device.type == "cuda")
        return batches_on(trainer.device, loader)

    def announcement(self) -> list[str]:
        c, t = self.config, self.trainer
        coarse = f", {c.num_coarse_epochs} of them at half the resolution," if c.coarse_epochs else ""
        return [
            f"data: {self.source.description}",
            *self._describe_probe(),
            f"{c.epochs} epochs{coarse} of {t.epoch_steps} steps of {c.batch_size} images: {t.world_size} processes x "
            f"{c.accumulate} micro-batches x {c.batch_size // t.world_size // c.accumulate}",
            f"model: {c.model}, {c.num_parts} parts, K = {c.num_prototypes}; {t.device}, {t.dtype}".replace(
                "torch.", ""
            ),
            f"learning rate: {c.lr:g} x {c.batch_size} / 256 = {c.peak_lr:g} after the warm-up",
        ]

    def _describe_probe(self) -> list[str]:
        if not self.eval_dataset:
            return []
        paths = [*self.eval_dataset.query.paths, *self.eval_dataset.gallery.paths]
        lines = [f"probe: {self.eval_dataset.description}"]
        if isinstance(self.source, FileSource) and (shared := self.source.shared(paths)):
            images = count(shared, "image is", "images are")
            lines.append(f"probe: {images} trained on too; scores are not those of images that the model has not seen")
        return lines

    def exported(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        return self.trainer.teacher.backbone, {}

    def about(self) -> dict[str, Any]:
        return {"method": "PASS" if self.config.num_parts else "DINO", "data": self.source.description}

    def after_epoch(self) -> None:
        t = self.trainer
        if self.eval_dataset is None or t.epoch % self.config.probe_epochs:
            return
        share_first(t.teacher.backbone.buffers())  # the BatchNorms of a conv stem have statistics of each process
        try:
            scores = score(t.teacher.backbone, self.eval_dataset, t.device)  # the processes share the images
        except (ValueError, OSError) as e:
            _logger.warning(f"probe: {e}")
        else:
            self.write({f"probe_{name}": value for name, value in scores.items()})


def open_probe(data: str) -> ReIDDataset:
    """Open the dataset that is evaluated between epochs, by the protocol of ``passreid eval``.

    Raises:
        ValueError: If ``data`` is not a dataset, no query has a match, or the gallery has a single identity.
    """
    try:
        dataset = open_dataset(data).require("query", "gallery")
    except (ValueError, OSError) as e:
        raise ValueError(f"probe: {e}") from None
    if not dataset.matches.any():
        camera = " under another camera" if dataset.has_cameras else ""
        raise ValueError(f"probe: no query of {data} has a match in the gallery{camera}; passreid data check says more")
    if len(np.unique(dataset.gallery.pids[dataset.gallery.pids >= 0])) < 2:
        raise ValueError(f"probe: the gallery of {data} has one identity, which every query finds")
    return dataset
