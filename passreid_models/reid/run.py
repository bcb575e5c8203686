"""What the runs of re-ID have in common: the dataset, evaluation between epochs, and the best model so far.

RUN/export/   the model as it is now
RUN/best/     the one of the highest mAP, where the run is evaluated
"""

import json
import logging
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from passreid_models.reid.data import RANDOM, Batch, KeySampler, TrainImages, TrainTransform, load_epoch
from passreid_models.reid.datasets import ReIDDataset, open_dataset
from passreid_models.reid.evaluate import score
from passreid_models.reid.extract import on_first
from passreid_models.training.init import architecture_of
from passreid_models.training.loop import Run, pick_workers

_logger = logging.getLogger(__name__)


class ReIDRun(Run):
    """A run on a dataset of persons."""

    labelled = True
    erase: tuple[tuple[float, float], Any] = ((0.02, 1 / 3), RANDOM)
    """Area of random erasing, and what is put there."""

    def prepare(self, device: torch.device, checkpoint: dict[str, Any] | None) -> Any:
        config = self.config
        if not config.data:
            raise ValueError("data: expected a dataset, such as Market-1501/ or a folder for each identity")
        if not config.init:
            raise ValueError(
                "init: expected weights to begin with: a tag such as lup (the published ones) or synth (bundled), an "
                "exported folder, a run, or a checkpoint file; random for none"
            )
        if checkpoint is not None:
            config = replace(config, model=config.model or checkpoint["config"]["model"])
        self.config = config = replace(config, model=config.model or architecture_of(config.init))
        self.dataset = open_dataset(config.data, self.labelled).require("train")
        self.evaluated = self._evaluation_data()
        self.images = TrainImages(
            self.dataset.train.paths,
            np.zeros(len(self.dataset.train), dtype=np.int64),
            TrainTransform(config.size, config.flip_prob, config.pad, config.erase_prob, *self.erase),
            config.seed,
        )
        trainer = self.make_trainer(device, checkpoint)
        self.best = self._read_best(trainer.step)
        return trainer

    def make_trainer(self, device: torch.device, checkpoint: dict[str, Any] | None) -> Any:
        """The trainer of the task."""
        raise NotImplementedError

    def _evaluation_data(self) -> ReIDDataset | None:
        """What is evaluated on; None where there is nothing, or nothing is wanted."""
        config = self.config
        if not config.eval_epochs:
            return None
        if config.eval_data:
            return open_dataset(config.eval_data).require("query", "gallery")
        return self.dataset if len(self.dataset.query) and len(self.dataset.gallery) else None

    def _read_best(self, step: int) -> float:
        """mAP of the best model so far; what a resumed run makes again does not count."""
        file = self.folder.path / "best" / "config.json"
        found = json.loads(file.read_text())["provenance"] if file.is_file() else {}
        return found["mAP"] if found.get("step", step + 1) <= step else -1.0

    def load(self, batches: list[np.ndarray]) -> Generator[Batch, None, None]:
        """What is left of an epoch of these batches."""
        t = self.trainer
        start = t.epoch_starts[t.epoch]
        sampler = KeySampler(batches, start, t.step - start, t.rank, t.world_size)
        return load_epoch(self.images, sampler, t.device, pick_workers(self.config))

    def describe(self) -> list[str]:
        """Lines that say what is trained on what."""
        c, t = self.config, self.trainer
        size = "x".join(map(str, c.size))
        lines = [
            f"data: {self.dataset.description}",
            f"model: {c.model} at {size}, fusion {c.fusion}, neck {c.neck}; {t.device}, {str(t.dtype)[6:]}",
        ]
        if self.evaluated is None and c.eval_epochs:
            lines.append("evaluation: none, there are no queries and gallery; --eval-data names a dataset that has")
        return lines

    def about(self) -> dict[str, Any]:
        return {"data": self.dataset.description}

    def after_epoch(self) -> None:
        t, c = self.trainer, self.config
        if self.evaluated is None or (t.epoch % c.eval_epochs and t.step < t.total_steps):
            return
        model, _ = self.exported()
        try:
            scores = score(model, self.evaluated, t.device)  # shared by the processes
        except (ValueError, OSError) as e:
            _logger.warning(f"evaluation: {e}")
            return
        self.write(scores)
        if scores["mAP"] > self.best:
            self.best = scores["mAP"]
            self.export_to(self.folder.path / "best", **scores)
        if t.step == t.total_steps:  # the best was chosen on the test set, the last was not
            self.say(f"mAP {scores['mAP']:.1f} at the end, {self.best:.1f} at best ({self.folder.path / 'best'})")

    def train(self) -> Path:
        t = self.trainer
        if t.step and t.begins_epoch and not on_first(self._was_evaluated):  # a kill came between
            self.after_epoch()
        return super().train()

    def _was_evaluated(self) -> bool:
        lines = self.folder.metrics_file.read_text().splitlines() if self.folder.metrics_file.is_file() else []
        return any(record["step"] == self.trainer.step and "mAP" in record for record in map(json.loads, lines))
