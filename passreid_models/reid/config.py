"""The configurations of fine-tuning with labels and without: one dataclass each for Python, command line and YAML."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from passreid_models.architectures import ARCHITECTURES
from passreid_models.training.config import DTYPES, RunConfig, wrong

FUSIONS, NECKS, MEMORIES = ("cat", "mean", "parts", "token"), ("single", "multi"), ("hard", "mean")
RUN_FREE = ("data", "out", "init", "device", "workers", "resume", "save_minutes", "save_epochs", "keep", "log_steps",
            "max_minutes", "max_unreadable", "skip_nonfinite", "eval_data", "eval_epochs", "tensorboard")  # fmt: skip


class _ReIDConfig(RunConfig):
    """What both check."""

    FREE: ClassVar[tuple[str, ...]] = RUN_FREE
    NUMERICS = ("dtype", "grad_checkpointing", "sync_bn")
    accumulate = 1  # a triplet or a memory wants the whole batch at once

    epochs: int
    model: str
    fusion: str
    neck: str
    dtype: str
    drop_path: float
    size: tuple[int, int] | None

    def resolved(self, **values: Any) -> Self:
        """With these values in place of what was left to the defaults."""
        return replace(self, **values)  # type: ignore[type-var]

    def _check_common(self) -> None:
        self.check_kinds()
        if self.model and self.model not in ARCHITECTURES:
            raise wrong("model", self.model, f"one of {', '.join(ARCHITECTURES)}")
        for name, allowed in (("fusion", ("", *FUSIONS)), ("neck", NECKS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise wrong(name, getattr(self, name), f"one of {', '.join(filter(None, allowed))}")
        self.check_ranges(
            (
                ("epochs keep log_steps save_epochs", 1, math.inf),
                ("lr weight_decay workers seed save_minutes max_minutes skip_nonfinite pad eval_epochs", 0, math.inf),
                ("momentum max_unreadable flip_prob erase_prob", 0, 1),
            )
        )
        if not 0 <= self.drop_path < 1:
            raise wrong("drop_path", self.drop_path, "at least 0 and less than 1")
        self.check_size("size")


@dataclass(frozen=True)
class FinetuneConfig(_ReIDConfig):
    """Settings of ``passreid finetune``; the defaults are the published ones.

    Args:
        data: A labelled dataset: Market-1501, MSMT17, DukeMTMC-reID, a folder for each identity, a CSV file, or
            ``synthetic:ids=200``.
        out: Folder of the run.
        init: Weights to begin with: ``architecture.tag`` or ``tag``, an exported folder, a run, or a checkpoint file;
            ``random`` for none.
        model: Registered architecture; by default that of ``init``, else ViT-S.
        resume: ``auto`` continues the run in ``out`` if there is one; or a checkpoint file; empty refuses to overwrite.
        fusion: How CLS and parts become a descriptor: ``cat`` (published), ``mean``, ``parts`` or ``token``; by default
            that of ``init``, where it is a tag or an exported folder, else ``cat``.
        neck: BatchNorm of each token (``multi``, published) or of the fused vector (``single``).
        size: Height and width of the images in pixels; by default that of ``init``, where it is a tag or an exported
            folder, else 256x128.
        epochs: Passes over the identities.
        ids_per_batch: Identities of a step, over all processes.
        images_per_id: Images of each. A batch is ``ids_per_batch`` times as large.
        lr: Peak learning rate; for this batch, it is not scaled.
        bias_lr: Factor for biases.
        warmup_epochs: Of the learning rate, from a hundredth of it; by default a sixth of ``epochs``, 20 at most.
        weight_decay: Of all parameters.
        momentum: Of SGD.
        layer_decay: Factor of the learning rate from each block to the one before it; 1 is the published.
        freeze_blocks: First blocks that stay as they are, with tokens and patch embedding; 0 trains all.
        drop_path: Stochastic depth of the last block, growing linearly over the blocks.
        id_weight: Weight of the cross-entropy of the identities.
        triplet_weight: Weight of the batch-hard triplet loss; 0 draws images without regard to identities, for data
            with one image of each.
        margin: Of the triplet loss; by default the soft margin.
        label_smoothing: Of the cross-entropy.
        flip_prob: Probability of a horizontal flip.
        pad: Pixels around the image before the random crop.
        erase_prob: Probability of random erasing.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; auto is bfloat16 where the device has it.
        device: ``auto``, or a torch device.
        grad_checkpointing: Recompute activations, for less memory.
        sync_bn: Synchronise the BatchNorms over the processes of several GPUs.
        workers: Loader processes, of each training process; by default by the number of cores.
        seed: Of classifier, order, transforms and stochastic depth.
        eval_data: Dataset to evaluate on; by default queries and gallery of ``data``.
        eval_epochs: Epochs between two evaluations; the last epoch has one in any case, and 0 evaluates never.
        save_minutes: Longest time between two checkpoints.
        save_epochs: Epochs between two checkpoints.
        keep: Checkpoints to keep.
        log_steps: Steps between two lines of the log.
        max_minutes: Save and stop after so many minutes; 0 does not.
        max_unreadable: Largest share of unreadable images.
        skip_nonfinite: Steps with a non-finite loss to leave out before the run stops.
        tensorboard: Write TensorBoard files too.
    """

    data: str = ""
    out: str = "run"
    init: str = ""
    model: str = ""
    resume: str = ""
    fusion: str = ""
    neck: str = "multi"
    size: tuple[int, int] | None = None
    epochs: int = 120
    ids_per_batch: int = 16
    images_per_id: int = 4
    lr: float = 4e-4
    bias_lr: float = 2.0
    warmup_epochs: int | None = None
    weight_decay: float = 1e-4
    momentum: float = 0.9
    layer_decay: float = 1.0
    freeze_blocks: int = 0
    drop_path: float = 0.1
    id_weight: float = 1.0
    triplet_weight: float = 1.0
    margin: float | None = None
    label_smoothing: float = 0.0
    flip_prob: float = 0.5
    pad: int = 10
    erase_prob: float = 0.5
    dtype: str = "auto"
    device: str = "auto"
    grad_checkpointing: bool = False
    sync_bn: bool = True
    workers: int | None = None
    seed: int = 0
    eval_data: str = ""
    eval_epochs: int = 10
    save_minutes: float = 10
    save_epochs: int = 1
    keep: int = 2
    log_steps: int = 50
    max_minutes: float = 0
    max_unreadable: float = 0.01
    skip_nonfinite: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: If a value cannot be; the message begins with the field's name.
        """
        self._check_common()
        self.check_ranges(
            (
                ("ids_per_batch images_per_id", 1, math.inf),
                ("bias_lr warmup_epochs freeze_blocks id_weight triplet_weight margin", 0, math.inf),
                ("layer_decay", 0, 1),
            )
        )
        if not 0 <= self.label_smoothing < 1:
            raise wrong("label_smoothing", self.label_smoothing, "at least 0 and less than 1")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise wrong("warmup_epochs", self.warmup_epochs, f"at most epochs = {self.epochs}")
        if not self.id_weight and not self.triplet_weight:
            raise wrong("id_weight", self.id_weight, "more than 0 where triplet_weight is 0: there is no loss else")
        if self.triplet_weight and self.ids_per_batch < 2:
            raise wrong("ids_per_batch", self.ids_per_batch, "2 or more for the triplet loss")
        if self.triplet_weight and self.images_per_id < 2:
            raise wrong("images_per_id", self.images_per_id, "2 or more for the triplet loss, or triplet_weight 0")

    @property
    def batch_size(self) -> int:
        """Images of a step, over all processes."""
        return self.ids_per_batch * self.images_per_id

    def resolved(self, **values: Any) -> Self:
        return super().resolved(warmup_epochs=self.num_warmup_epochs, **values)

    @property
    def num_warmup_epochs(self) -> int:
        """``warmup_epochs``, also where it follows from ``epochs``."""
        return min(20, self.epochs // 6) if self.warmup_epochs is None else self.warmup_epochs


@dataclass(frozen=True)
class ClusterConfig(_ReIDConfig):
    """Settings of ``passreid cluster``; the defaults are the published ones for Market-1501.

    Args:
        data: Images: a dataset as for ``passreid finetune``, whose labels are used for reports alone, or any folder.
        out: Folder of the run.
        init: Weights to begin with: ``architecture.tag`` or ``tag``, an exported folder, a run, or a checkpoint file;
            ``random`` for none. For domain adaptation, the export of a model fine-tuned on the source.
        source: A labelled dataset to fine-tune ``init`` on first, in ``out/source``: domain adaptation in one command.
        source_config: Settings of that fine-tuning: a preset of ``passreid finetune``, or a YAML file as for its
            ``--config``.
        model: Registered architecture; by default that of ``init``, else ViT-S.
        resume: ``auto`` continues the run in ``out`` if there is one; or a checkpoint file; empty refuses to overwrite.
        fusion: How CLS and parts become a descriptor: ``cat``, ``mean`` (published for MSMT17), ``parts`` or ``token``;
            by default that of ``init``, where it is a tag or an exported folder, else ``cat``.
        neck: BatchNorm of the fused vector (``single``, published for USL) or of each token (``multi``).
        size: Height and width of the images in pixels; by default that of ``init``, where it is a tag or an exported
            folder, else 256x128.
        epochs: Rounds of clustering and training.
        steps: Training steps of an epoch.
        clusters_per_batch: Clusters of a step, over all processes.
        images_per_cluster: Images of each. A batch is ``clusters_per_batch`` times as large.
        lr: Learning rate; for this batch, it is not scaled.
        lr_step: Epochs after which the learning rate falls.
        lr_gamma: Factor that it falls by.
        weight_decay: Of all parameters.
        momentum: Of SGD.
        drop_path: Stochastic depth of the last block, growing linearly over the blocks.
        temp: Temperature of the contrast.
        memory: How the centroid of a cluster follows: to the sample it is least like (``hard``), or to each (``mean``).
        memory_momentum: Weight of the old centroid.
        eps: Jaccard distance up to which two images are neighbours in DBSCAN; published 0.6, for MSMT17 0.7.
        min_samples: Neighbours, with itself, that make an image the core of a cluster.
        k1: Nearest neighbours, with the image itself, of the Jaccard distance.
        k2: Of its query expansion.
        flip_prob: Probability of a horizontal flip.
        pad: Pixels around the image before the random crop.
        erase_prob: Probability of random erasing.
        dtype: ``auto``, ``float32`` (published), ``bfloat16`` or ``float16``.
        device: ``auto``, or a torch device.
        grad_checkpointing: Recompute activations, for less memory.
        sync_bn: Synchronise the BatchNorms over the processes of several GPUs.
        workers: Loader processes, of each training process; by default by the number of cores.
        seed: Of order, transforms and stochastic depth.
        eval_data: Dataset to evaluate on; by default queries and gallery of ``data``, where it has some.
        eval_epochs: Epochs between two evaluations; the last epoch has one in any case, and 0 evaluates never.
        save_minutes: Longest time between two checkpoints.
        save_epochs: Epochs between two checkpoints.
        keep: Checkpoints to keep.
        log_steps: Steps between two lines of the log.
        max_minutes: Save and stop after so many minutes; 0 does not.
        max_unreadable: Largest share of unreadable images.
        skip_nonfinite: Steps with a non-finite loss to leave out before the run stops.
        tensorboard: Write TensorBoard files too.
    """

    data: str = ""
    out: str = "run"
    init: str = ""
    source: str = ""
    source_config: str = ""
    model: str = ""
    resume: str = ""
    fusion: str = ""
    neck: str = "single"
    size: tuple[int, int] | None = None
    epochs: int = 50
    steps: int = 200
    clusters_per_batch: int = 32
    images_per_cluster: int = 8
    lr: float = 3.5e-4
    lr_step: int = 20
    lr_gamma: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    drop_path: float = 0.3
    temp: float = 0.05
    memory: str = "hard"
    memory_momentum: float = 0.2
    eps: float = 0.6
    min_samples: int = 4
    k1: int = 30
    k2: int = 6
    flip_prob: float = 0.5
    pad: int = 10
    erase_prob: float = 0.5
    dtype: str = "float32"
    device: str = "auto"
    grad_checkpointing: bool = False
    sync_bn: bool = True
    workers: int | None = None
    seed: int = 0
    eval_data: str = ""
    eval_epochs: int = 10
    save_minutes: float = 10
    save_epochs: int = 1
    keep: int = 2
    log_steps: int = 50
    max_minutes: float = 0
    max_unreadable: float = 0.01
    skip_nonfinite: int = 0
    tensorboard: bool = False

    FREE = (*RUN_FREE, "source", "source_config")

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: If a value cannot be; the message begins with the field's name.
        """
        self._check_common()
        if self.memory not in MEMORIES:
            raise wrong("memory", self.memory, f"one of {', '.join(MEMORIES)}")
        self.check_ranges(
            (
                ("steps lr_step min_samples k1 k2", 1, math.inf),
                ("clusters_per_batch images_per_cluster", 2, math.inf),
                ("lr_gamma memory_momentum", 0, 1),
            )
        )
        if not 0 < self.temp < math.inf:
            raise wrong("temp", self.temp, "more than 0")
        if not 0 < self.eps < 1:
            raise wrong("eps", self.eps, "more than 0 and less than 1")
        if self.source_config and not self.source:
            raise wrong("source_config", self.source_config, "a source to go with it")

    @property
    def batch_size(self) -> int:
        """Images of a step, over all processes."""
        return self.clusters_per_batch * self.images_per_cluster


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "finetune": {
        "pass-vit-s-384": {"size": (384, 128)},
        # 2 to 8 cores or one small GPU, thousands of images: fewer epochs
        "laptop": {"epochs": 24, "lr": 3e-3, "eval_epochs": 6},
    },
    "cluster": {
        "msmt17": {"eps": 0.7, "fusion": "mean"},
        "laptop": {
            "epochs": 10,
            "steps": 40,
            "clusters_per_batch": 8,
            "lr": 3e-3,
            "lr_step": 8,
            "drop_path": 0.1,
            "k1": 10,
            "k2": 4,
            "eps": 0.5,
            "eval_epochs": 2,
        },
    },
}
