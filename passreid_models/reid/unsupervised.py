"""Re-ID without labels: cluster the descriptors, train on the clusters, repeat (USL and UDA).

cluster(ClusterConfig(data="my_crops/", init="pass_vit_small_patch16.lup", out="run"))
cluster(ClusterConfig(data="my_crops/", init="...", source="Market-1501/", out="run"))     # domain adaptation
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passreid_models.data.datasets import open_dataset
from passreid_models.device import process_group
from passreid_models.embed import Embedder, is_not_finite
from passreid_models.evaluation.extract import extract
from passreid_models.evaluation.report import NonFiniteError
from passreid_models.reid.config import PRESETS, ClusterConfig, FinetuneConfig
from passreid_models.reid.losses import ClusterMemory
from passreid_models.reid.model import make_backbone, without_drop_path
from passreid_models.reid.pseudo_labels import cluster_features, find_dbscan
from passreid_models.reid.run import ReIDRun, complete, evaluation_data
from passreid_models.reid.samplers import camera_batches
from passreid_models.reid.supervised import finetune
from passreid_models.reid.trainer import ReIDTrainer, statistics_of
from passreid_models.runtime import gather_rows, on_first, world
from passreid_models.training.command import read_config
from passreid_models.training.config import wrong
from passreid_models.training.folder import RunFolder
from passreid_models.training.optim import load_optimizer
from passreid_models.training.run import run_in_folder

__all__ = ["cluster", "compare_with_labels"]

_logger = logging.getLogger(__name__)
SHARED = ("init", "model", "fusion", "size", "device", "grad_checkpointing", "sync_bn", "workers", "seed",
          "save_minutes", "keep", "log_steps", "max_minutes", "max_unreadable", "skip_nonfinite",
          "tensorboard", "quiet", "cache_images")  # fmt: skip


def cluster(config: ClusterConfig) -> Path:
    """Train without labels, from the first step or from the last checkpoint, to ``out/export``; also in torchrun.

    With a ``source``, ``init`` is first fine-tuned on it, in ``out/source``, and training goes on with that backbone;
    an adaptation that is resumed reads no source.

    Returns:
        The exported folder, for ``timm.create_model("local-dir:...", pretrained=True)``: the descriptor after the neck.
        ``out/best`` is the export of the highest mAP, if there are labels to evaluate with.

    Raises:
        ValueError: If a setting does not fit the data, the machine, or the run to resume; if there are no clusters.
        OSError: If the data cannot be read, the run cannot be written, or a process that loads images died.
        NonFiniteLossError: If the loss is NaN or infinite.
        Stopped: On SIGINT, SIGTERM, SIGUSR1 or SIGHUP, or after ``max_minutes``, with the state saved.
    """
    with process_group(config.device):  # one for both runs
        if config.source:
            config = _fine_tune_on_source(config)
        return run_in_folder(ClusterRun, config)


def _fine_tune_on_source(config: ClusterConfig) -> ClusterConfig:
    """Fine-tune on the source, and return the configuration of the adaptation that follows."""
    source, started = _source_config(config), time.monotonic()
    checkpoint = RunFolder(config.out, ClusterRun.program, ClusterTrainer.state_keys).find(config.resume)
    resumed = replace(config, init=checkpoint["config"]["init"]) if checkpoint else config
    completed = complete(resumed, checkpoint)  # errors in the target are reported now, not after hours on the source
    dataset = open_dataset(config.data, labelled=False).require("train")
    evaluation_data(completed, dataset, labelled=False)
    _check(config, len(dataset.train))
    first = RunFolder(source.out, state_keys=())
    if not config.resume and (newest := first.load_latest()):  # an adaptation found no clusters, or was killed before
        began = newest[1]["config"].get("init", "")
        if began != source.init:
            raise ValueError(f"init: {first.path} began with {began} and not with {source.init}: name another --out")
    if checkpoint is None:  # else the adaptation has begun, and its checkpoint holds all weights
        try:
            finetune(source)
        except ValueError as e:
            raise ValueError(f"source {config.source}: {e} (--source-config is for its settings)") from None
    minutes_left = config.max_minutes and max(config.max_minutes - (time.monotonic() - started) / 60, 1e-3)
    init = checkpoint["config"]["init"] if checkpoint else str(first.export_folder)  # the folder may have been moved
    adaptation = {"init": init, "source": "", "source_config": "", "neck": completed.neck}
    return replace(config, **adaptation, max_minutes=minutes_left)


def _source_config(config: ClusterConfig) -> FinetuneConfig:
    """Configuration of the fine-tuning on the source: ``source_config``, and the shared settings.

    Raises:
        ValueError: If ``source_config`` is not valid, or sets a shared setting that shapes the weights otherwise than
            ``config`` does; a value that is the default counts as not set.
    """
    presets = PRESETS["finetune"]
    words = [config.source, *([f"--init={config.init}"] if config.init else [])]
    if {name.strip() for name in config.source_config.split(",")} <= {"", *presets}:
        words += [f"--preset={config.source_config}", *([f"--model={config.model}"] if config.model else [])]
    elif Path(config.source_config).exists():
        words.append(f"--config={config.source_config}")
    else:
        raise wrong("source_config", config.source_config, f"a YAML file or one or more of {', '.join(presets)}")
    try:
        source, default = read_config(words, FinetuneConfig, presets, "passreid finetune", "", ""), FinetuneConfig()
    except ValueError as e:
        raise ValueError(f"source_config: {config.source_config}: {e}") from None
    given = {k: v for k in SHARED if (v := getattr(config, k)) != getattr(default, k)}
    shaping = given.keys() - {*FinetuneConfig.FREE}
    there = {k: v for k in given if k in shaping and (v := getattr(source, k)) not in (given[k], getattr(default, k))}
    if there:
        both = "; ".join(f"{k}: {v!r} there, {given[k]!r} here" for k, v in there.items())
        raise ValueError(
            f"source_config: both trainings share some settings, and {config.source_config} differs: {both}"
        )
    return replace(source, data=config.source, out=str(Path(config.out) / "source"), resume="auto", **given)


def _check(config: ClusterConfig, num_images: int) -> None:
    """Check that scikit-learn, the number of images and the number of processes allow the run.

    Raises:
        ValueError: If they do not.
    """
    find_dbscan()
    if num_images < 2:
        raise ValueError(f"data: {config.data} holds one image, and clusters need more")
    if config.clusters_per_batch % world()[1]:
        raise ValueError(f"clusters_per_batch: {config.clusters_per_batch} is not divisible by {world()[1]} processes")


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
            config: Configuration of the run, with its ``model``.
            num_images: Number of training images.
            device: Device of this process.
            fingerprint: Hash of the list of images, which a resumed run must share.
            state: State to continue from; ``config.init`` is then not read.

        Raises:
            ValueError: If ``state`` is of a run with other settings or data.
        """
        super().__init__(config, num_images, config.steps, device, fingerprint)
        torch.manual_seed(config.seed)
        backbone = make_backbone(config, "bicubic", state and state["model"])
        self.prepare(backbone, backbone)
        self.labels: Tensor | None = None
        """Cluster of each training image, int64 ``[N]``; -1 is an outlier."""
        self.memory = self._new_memory(torch.zeros(0, backbone.head_hidden_size))
        if state is not None:
            self.load_state(state)

    def _new_memory(self, centroids: Tensor) -> ClusterMemory:
        c = self.config
        return ClusterMemory(centroids, c.temp, c.memory_momentum, c.memory).to(self.device)

    def begin_epoch(self, labels: Tensor, features: Tensor) -> None:
        """Set the clusters of an epoch, with the normalised mean descriptor of each as centroid.

        Args:
            labels: Cluster of each training image, int64 ``[N]``; -1 is an outlier.
            features: Descriptors ``[N, C]`` as they were clustered; a centroid is their L2-normalised mean.
        """
        self.labels = labels
        count = int(labels.max()) + 1
        sums = torch.zeros(count, features.shape[1]).index_add_(0, labels[labels >= 0], features[labels >= 0])
        self.memory = self._new_memory(F.normalize(sums, dim=1))

    def lr(self, epoch: int, scale: float) -> float:
        return scale * self.config.lr * self.config.lr_gamma ** (epoch // self.config.num_lr_step)

    def compute_loss(self, output: Any, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        in_cluster = labels >= 0  # an image that became unreadable is replaced by the next, maybe an outlier
        loss = self.memory(output.float()[in_cluster], labels[in_cluster])
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
        load_optimizer(self.optimizer, state["optimizer"])
        self.labels = state["labels"].cpu()
        self.memory = self._new_memory(state["centroids"])


class ClusterRun(ReIDRun):
    """Clustering run: the classes are clusters, computed again in each epoch."""

    program = "passreid cluster"
    method = "cluster contrast"
    trainer_class = ClusterTrainer
    shown = ("loss", "lr", "clusters", "outliers", "purity", "ari", "images_per_s", "wait_share", "mAP", "rank1")
    labelled = False
    erasing: ClassVar[dict[str, Any]] = dict(
        erase_area=(0.02, 0.4), erase_value=(0.485, 0.456, 0.406), erase_uniform=True
    )

    def make_trainer(self, device: torch.device, checkpoint: dict[str, Any] | None) -> ClusterTrainer:
        count = len(self.train_split)
        _check(self.config, count)
        return ClusterTrainer(self.config, count, device, self.dataset.train_fingerprint, checkpoint)

    def before_step(self) -> None:
        if self.trainer.begins_epoch or self.trainer.labels is None:
            self._find_clusters()

    @property
    def labels(self) -> np.ndarray:
        return self.trainer.labels.numpy()

    def draw(self, epoch: int) -> list[np.ndarray]:
        c, train = self.config, self.train_split
        camids = train.camids if train.has_cameras else np.zeros_like(train.camids)  # an unknown one is none of its own
        batches = camera_batches(
            self.labels, camids, c.clusters_per_batch, c.images_per_cluster, c.steps, c.seed, epoch
        )
        if len(batches[0]) < self.trainer.world_size:
            raise ValueError(
                f"{len(batches[0])} clusters are too few for {self.trainer.world_size} processes: resume with as many "
                "as the run had"
            )
        if uneven := len(batches[0]) % self.trainer.world_size:  # fewer clusters than a batch takes
            batches = [b[:-uneven] for b in batches]
        return batches

    def _find_clusters(self) -> None:
        """Cluster the descriptors of all training images, for the epoch that begins."""
        c, t = self.config, self.trainer
        t.share_statistics()
        if t.labels is None:  # the first time, since it may take minutes
            self.log(f"clusters: descriptors of {len(self.train_split)} images for the first of {c.epochs} times")
        embed = Embedder(without_drop_path(t.backbone), t.device)
        extracted = extract(embed, self.train_split.paths, progress=not c.quiet)
        if self.is_main:  # every process has the errors of all
            self.name_unreadable(extracted.errors.values())
        broken, total = sum(map(is_not_finite, extracted.errors.values())), len(self.train_split)
        self.check_unreadable(len(extracted.errors) - broken, total)
        if broken > c.max_unreadable * total:
            raise NonFiniteError(
                f"{broken} of {total} descriptors are not finite and cannot be clustered: the weights overflow; begin "
                f"with other weights, or with a smaller --lr (it is {c.lr:g})"
            )
        features, readable = extracted.descriptors, extracted.readable
        x = features[torch.from_numpy(readable)].to(t.device)
        labels = np.full(len(features), -1, dtype=np.int64)
        labels[readable] = on_first(lambda: cluster_features(x, c.eps, c.min_samples, c.k1, c.k2, embed.metric))
        count = int(labels.max(initial=-1)) + 1
        if count < max(2, t.world_size):
            self._keep_clusters(count, labels[readable])
        else:
            t.begin_epoch(torch.from_numpy(labels), features)
        figures = {"clusters": float(count), "outliers": float((labels[readable] < 0).mean())}
        is_logged = self.is_main and self.folder.metric(t.step, "clusters") is not None  # killed before a checkpoint
        if not is_logged:
            self.write({**figures, **compare_with_labels(labels, self.train_split.pids)})

    def _keep_clusters(self, count: int, labels: np.ndarray) -> None:
        """Keep the clusters of the epoch before, since too few were found; without any, end the run."""
        c, t = self.config, self.trainer
        outliers, plural = (labels < 0).mean(), "" if count == 1 else "s"
        clusters = f"{count} cluster{plural} of {len(labels)} images, {outliers:.0%} of them outliers"
        if outliers > 0.5:
            change = f"a larger --eps (it is {c.eps:g}) or a smaller --min-samples ({c.min_samples})"
            advice = f"{change} gives fewer outliers"
        else:
            change = f"a smaller --eps (it is {c.eps:g}) or --k1 ({c.k1}), near the number of images of a person,"
            advice = f"{change} gives more clusters"
        if t.labels is None:
            raise ValueError(f"eps: {clusters}: too few clusters to train on; {advice}")
        _logger.warning(f"epoch {t.epoch}: {clusters}: too few clusters, those of the epoch before are kept ({advice})")

    def announcement(self) -> list[str]:
        c, t = self.config, self.trainer
        lines = self.describe()
        if self.dataset.is_one_set:
            lines.append("labels: folders are taken for identities in purity and ARI, and in nothing else")
        return [
            *lines,
            f"{c.epochs} epochs of {c.steps} steps of {c.clusters_per_batch} clusters x {c.images_per_cluster} images; "
            f"{t.world_size} processes",
            f"clusters: DBSCAN, eps {c.eps:g}, min_samples {c.min_samples}; Jaccard, k1 {c.k1}, k2 {c.k2}",
        ]

    def exported(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        return without_drop_path(self.trainer.backbone), {}


def compare_with_labels(clusters: np.ndarray, pids: np.ndarray) -> dict[str, float]:
    """Agreement of clusters with identities, over the images that have both; empty if none has.

    Args:
        clusters: Clusters, int64 ``[N]``; -1 is an outlier.
        pids: Identities, int64 ``[N]``; -1 is unknown.

    Returns:
        ``purity``, the share of images with the most common identity of their cluster, and ``ari``, the adjusted Rand
        index.
    """
    from sklearn.metrics import adjusted_rand_score
    from sklearn.metrics.cluster import contingency_matrix

    both = (clusters >= 0) & (pids >= 0)
    if not both.any():
        return {}
    table = contingency_matrix(pids[both], clusters[both], sparse=True)
    return {
        "purity": float(table.max(axis=0).sum() / both.sum()),
        "ari": float(adjusted_rand_score(pids[both], clusters[both])),
    }
