"""Base of the re-ID runs: dataset, evaluation before the first step and between epochs, and the best model so far.

RUN/export/   current model
RUN/best/     model of the highest mAP after an epoch, if the run is evaluated
"""

import logging
import os
from collections.abc import Generator
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from passreid_models.architectures import ARCHITECTURES, DEFAULT_MODEL
from passreid_models.checkpoints.local_dir import read_config
from passreid_models.data.datasets import ReIDDataset, Split, open_dataset
from passreid_models.data.image_cache import cache_bytes, cache_limit
from passreid_models.data.loader import stopping
from passreid_models.evaluation.evaluate import score
from passreid_models.reid.batches import ImageBatch, KeySampler, TrainImages, load, make_loader, train_transform
from passreid_models.training.config import wrong
from passreid_models.training.run import Run, pick_workers
from passreid_models.training.warm_start import settings_of

_logger = logging.getLogger(__name__)


class ReIDRun(Run):
    """Run on a re-ID dataset, evaluated before the first step and between epochs."""

    method: ClassVar[str]
    """Name in the provenance."""
    labelled = True
    epoch_figure = "mAP"
    erasing: ClassVar[dict[str, Any]] = {}
    """Settings of random erasing where they are not those of ``train_transform``."""

    def prepare(self, device: torch.device, checkpoint: dict[str, Any] | None) -> Any:
        self.config = complete(self.config, checkpoint)
        config = self.config
        self.dataset = open_dataset(config.data, self.labelled).require("train")
        self.eval_dataset = evaluation_data(config, self.dataset, self.labelled)
        self.train_split = self.dataset.train
        if self.labelled:  # junk has no identity
            self.train_split = self.train_split.take(np.flatnonzero(self.train_split.pids >= 0))
            if not len(self.train_split):
                raise ValueError(f"data: all training images of {config.data} are junk (identity -1)")
        self.evaluated, self.seen = self._evaluated_images()
        transform = train_transform(config, **self.erasing)
        self.images = TrainImages(self.train_split.paths, transform, config.seed, self._cache_size())
        trainer = self.make_trainer(device, checkpoint)
        self.best = self._read_best(trainer.step)
        return trainer

    def _evaluated_images(self) -> tuple[int, int]:
        """Number of images that the run is evaluated on, and of those of them that are training images, links too."""
        dataset, real = self.eval_dataset, cache(os.path.realpath)  # a split may be a link to the other

        def places(split: Split) -> set[str]:
            return {
                os.path.realpath(path) if path.is_symlink() else os.path.join(real(path.parent), path.name)
                for path in split.paths
            }

        images = set() if dataset is None else places(dataset.query) | places(dataset.gallery)
        return len(images), len(images & places(self.train_split))

    def _cache_size(self) -> tuple[int, int] | None:
        """Size at which the training images are kept in memory; None if they are not."""
        c = self.config
        if c.cache_images == "none" or c.crop_scale[0] < 1:  # a random crop is resized anew each time
            return None
        return c.size if cache_bytes(len(self.train_split), c.size) <= cache_limit() else None

    def make_trainer(self, device: torch.device, checkpoint: dict[str, Any] | None) -> Any:
        """Make the trainer of the task."""
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray:
        """Class of each training image, int64 ``[N]``."""
        raise NotImplementedError

    def draw(self, epoch: int) -> list[np.ndarray]:
        """Draw the batches of an epoch, each int64 ``[groups, images]``; without labels, of the current epoch only."""
        raise NotImplementedError

    def _read_best(self, step: int) -> float:
        """mAP of the best model so far; -1 if there is none up to this step on the same evaluation data."""
        file = self.folder.path / "best" / "config.json"
        provenance = read_config(file.parent).get("provenance", {}) if file.is_file() else {}
        if self.eval_dataset is None or provenance.get("evaluated_on") != self.eval_dataset.fingerprint:
            return -1.0
        score, at = provenance.get("mAP"), provenance.get("step")
        return score if isinstance(score, int | float) and isinstance(at, int) and at <= step else -1.0

    def batches(self) -> Generator[ImageBatch, None, None]:
        t = self.trainer
        sampler = KeySampler(self.draw, t.epoch_starts, t.rank, t.world_size)
        loader = make_loader(self.images, sampler, pick_workers(self.config), t.device.type == "cuda")
        with stopping(loader):
            while t.step < t.total_steps:
                end = t.total_steps if self.labelled else t.epoch_starts[t.epoch + 1]  # later clusters are unknown
                sampler.steps = range(t.step, end)
                yield from load(loader, torch.from_numpy(self.labels).to(t.device))

    def describe(self) -> list[str]:
        """Log lines that describe data, model and evaluation."""
        c, t = self.config, self.trainer
        size = "x".join(map(str, c.size))
        lines = [
            f"data: {self.dataset.description}",
            f"model: {c.model} at {size}, fusion {c.fusion}, neck {c.neck}; {t.device}, {str(t.dtype)[6:]}",
        ]
        datasets = [self.dataset] if self.labelled else []
        if self.eval_dataset is not None and c.eval_data:
            datasets.append(self.eval_dataset)
        lines += [f"remark: {remark}" for dataset in datasets for remark in dataset.remarks.values()]
        gib = cache_bytes(len(self.train_split), c.size) / 2**30
        if self.images.is_cached:
            lines.append(f"images: for the training steps decoded once and kept in memory, {gib:.2f} GiB")
        elif c.cache_images == "auto":
            too_many = f"{gib:.1f} GiB are more than may be kept in memory (a quarter of what is free, on Linux)"
            why = "random crops differ each time" if c.crop_scale[0] < 1 else too_many
            lines.append(f"images: read in each epoch, since {why}")
        if junk := len(self.dataset.train) - len(self.train_split):
            lines.append(f"junk: {junk} training images with identity -1 are left out")
        if self.eval_dataset is None and c.eval_epochs:
            lines.append("evaluation: none, there are no queries and gallery; name a dataset with both by --eval-data")
        elif self.seen:
            images = f"the training images ({self.seen:,} of {self.evaluated:,})"
            lines.append(f"evaluation: on {images}, so its scores mislead; name other data by --eval-data")
        return lines

    def about(self) -> dict[str, Any]:
        return {"method": self.method, "data": self.dataset.description}

    def before_training(self) -> None:
        dataset = self.eval_dataset
        if dataset is None:
            return
        queries, gallery = len(dataset.query), len(dataset.gallery)
        self.log(f"evaluation before the first step: {queries} queries, {gallery} gallery images")
        if scores := self._score(dataset):
            self.before = {**scores, "evaluated_on": dataset.fingerprint}
            self.write(scores)

    def after_epoch(self) -> None:
        t, c, dataset = self.trainer, self.config, self.eval_dataset
        if dataset is None or (t.epoch % c.eval_epochs and t.step < t.total_steps):
            return
        scores = self._score(dataset)
        if not scores:
            return
        if scores["mAP"] > self.best:
            self.best = scores["mAP"]
            if self.is_main and self.folder.latest() is None:  # a killed run is not continued from its best model alone
                self._save()
            self.export_to(
                self.folder.path / "best",
                **scores,
                evaluated_on=dataset.fingerprint,
                evaluation_data=dataset.description,
                evaluated_training_images=self.seen,
            )
        self.write(scores)  # last: for a resumed run it marks the end of the evaluation

    def after_training(self) -> None:
        """Log the mAP before, at best and at the end; the best model is chosen on the test set, the last is not."""
        dataset, last = self.eval_dataset, self.folder.metric(self.trainer.step, "mAP") if self.is_main else None
        if dataset is None or last is None or self.best < 0:  # not evaluated, or on other data
            return
        folder, init = self.folder.path / "best", self.config.init
        figures = f"{self.best:.1f} at best ({folder}), {last:.1f} at the end"
        if self.before.get("evaluated_on") != dataset.fingerprint:  # of an older version, or of other data
            self.log(f"mAP {figures}")
            return
        before = self.before["mAP"]
        self.log(f"mAP {before:.1f} before, {figures}")
        if last < before:
            better = f"{folder} ranks better" if self.best > before else f"{init}, with which it began, ranks better"
            self.log(f"this run ends below where it began: {better}")

    def _score(self, dataset: ReIDDataset) -> dict[str, float]:
        """mAP and Rank-1 of the model as it is exported now; empty, with a warning, if it cannot be evaluated."""
        t = self.trainer
        t.share_statistics()
        model, _ = self.exported()
        try:
            return score(model, dataset, t.device)  # the processes share the images
        except (ValueError, OSError) as e:
            _logger.warning(f"evaluation: {e}")
            return {}


def complete(config: Any, checkpoint: dict[str, Any] | None = None) -> Any:
    """Fill in model, size and fusion where they are not set: from the checkpoint of a resumed run, else from ``init``.

    Raises:
        ValueError: If data or weights are not named, or the fusion needs parts and the model has none.
    """
    if not config.data:
        raise ValueError("data: expected a dataset, such as Market-1501/ or a folder for each identity")
    if not config.init:
        raise ValueError(
            "init: expected weights to begin with: a name such as pass_vit_small_patch16.lup (published) or "
            "pass_vit_small_patch16.synth_reid (bundled), an exported folder, a run, or a checkpoint file; random for "
            "none"
        )
    defaults = checkpoint["config"] if checkpoint else settings_of(config.init, config.model)
    model = config.model or defaults.get("model") or DEFAULT_MODEL
    num_parts = ARCHITECTURES[model].num_parts
    fusion = config.fusion or defaults.get("fusion") or ("cat" if num_parts else "token")
    size = config.size or tuple(defaults.get("size") or ARCHITECTURES[model].img_size)
    if not num_parts and fusion != "token":
        raise wrong("fusion", fusion, f"token, since {model} has no parts")
    return config.resolved(model=model, size=size, fusion=fusion)


def evaluation_data(config: Any, dataset: ReIDDataset, labelled: bool) -> ReIDDataset | None:
    """Return the dataset to evaluate on; None if ``eval_epochs`` is 0 or there are no queries and gallery.

    Folders of an unlabelled training set are not taken for identities here: they may be days or cameras.

    Raises:
        ValueError: If ``eval_data`` has no queries or no gallery.
        OSError: If ``eval_data`` does not exist.
    """
    if not config.eval_epochs:
        return None
    if config.eval_data:
        return open_dataset(config.eval_data).require("query", "gallery")
    if not labelled and dataset.is_one_set:
        return None
    return dataset if len(dataset.query) and len(dataset.gallery) else None
