"""The configurations of fine-tuning with labels and without: one dataclass each for Python, command line and YAML."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from passreid_models.training.config import RunConfig, wrong

FUSIONS, NECKS, MEMORIES = ("cat", "mean", "parts", "token"), ("single", "multi"), ("hard", "mean")


@dataclass(frozen=True, kw_only=True)
class ReIDConfig(RunConfig):
    """Settings that fine-tuning with labels and without share.

    Args:
        model: Registered architecture; by default that of ``init``, else ViT-S.
        init: Weights to begin with: ``architecture.tag`` or ``tag``, an exported folder, a run, or a checkpoint
            file; ``random`` for none.
        size: Height and width of the images in pixels; by default that of ``init``, where it is a tag or an exported
            folder, else 256x128.
        lr: Learning rate at its peak; it is for this batch, and not scaled.
        fusion: How CLS and parts become a descriptor: ``cat``, ``mean``, ``parts`` or ``token``; by default that of
            ``init``, where it is a tag or an exported folder, else ``cat``.
        neck: BatchNorm of each token (``multi``) or of the fused vector (``single``).
        flip_prob: Probability of a horizontal flip.
        pad: Pixels around the image before the random crop.
        erase_prob: Probability of random erasing.
        momentum: Of SGD.
        eval_data: Dataset to evaluate on; by default queries and gallery of ``data``, where it has some.
        eval_epochs: Epochs between two evaluations; the last epoch is always evaluated, and 0 evaluates never.
    """

    FREE = (*RunConfig.FREE, "eval_data", "eval_epochs")
    TOPICS: ClassVar[dict[str, str]] = {
        "fusion": "model", "flip_prob": "batches and augmentation", "momentum": "training", "eval_data": "evaluation",
    }  # fmt: skip
    accumulate: ClassVar[int] = 1  # a triplet or a memory wants the whole batch at once

    fusion: str = ""
    neck: str
    flip_prob: float = 0.5
    pad: int = 10
    erase_prob: float = 0.5
    momentum: float = 0.9
    eval_data: str = ""
    eval_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices({"fusion": ("", *FUSIONS), "neck": NECKS})
        self.check_ranges((("pad eval_epochs", 0, math.inf), ("momentum flip_prob erase_prob", 0, 1)))
        self.check_size("size")

    def resolved(self, **values: Any) -> Self:
        """With these values in place of what was left to the defaults."""
        return replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ReIDConfig):
    """Settings of ``passreid finetune``; the defaults are the published ones.

    Args:
        data: A labelled dataset: Market-1501, MSMT17, DukeMTMC-reID, a folder for each identity, a CSV file, or
            ``synthetic:ids=200``.
        ids_per_batch: Identities of a step, over all processes.
        images_per_id: Images of each. A batch is ``ids_per_batch`` times as large.
        bias_lr: Factor for biases.
        warmup_epochs: Of the learning rate, from a hundredth of it; by default a sixth of ``epochs``, 20 at most.
        layer_decay: Factor of the learning rate from each block to the one before it; 1 is the published.
        freeze_blocks: First blocks that stay as they are, with tokens and patch embedding; 0 trains all.
        id_weight: Weight of the cross-entropy of the identities.
        triplet_weight: Weight of the batch-hard triplet loss; 0 draws images without regard to identities, for data
            with one image of each.
        margin: Of the triplet loss; by default the soft margin.
        label_smoothing: Of the cross-entropy.
    """

    TOPICS: ClassVar[dict[str, str]] = {"ids_per_batch": "batches and augmentation", "bias_lr": "training"}

    neck: str = "multi"
    epochs: int = 120
    lr: float = 4e-4
    weight_decay: float = 1e-4

    ids_per_batch: int = 16
    images_per_id: int = 4
    bias_lr: float = 2.0
    warmup_epochs: int | None = None
    layer_decay: float = 1.0
    freeze_blocks: int = 0
    id_weight: float = 1.0
    triplet_weight: float = 1.0
    margin: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: If a value cannot be; the message begins with the field's name.
        """
        super().__post_init__()
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


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(ReIDConfig):
    """Settings of ``passreid cluster``; the defaults are the published ones for Market-1501.

    Args:
        data: Images: a dataset as for ``passreid finetune``, whose labels are used for reports alone, or any folder.
        init: As for ``passreid finetune``; for domain adaptation, the export of a model fine-tuned on the source.
        epochs: Rounds of clustering and training.
        source: A labelled dataset to fine-tune ``init`` on first, in ``out/source``: domain adaptation in one command.
        source_config: Settings of that fine-tuning: a preset of ``passreid finetune``, or a YAML file as for its
            ``--config``.
        steps: Training steps of an epoch.
        clusters_per_batch: Clusters of a step, over all processes.
        images_per_cluster: Images of each. A batch is ``clusters_per_batch`` times as large.
        lr_step: Epochs after which the learning rate falls.
        lr_gamma: Factor that it falls by.
        eps: Jaccard distance up to which two images are neighbours in DBSCAN; published 0.6, for MSMT17 0.7.
        min_samples: Neighbours, with itself, that make an image the core of a cluster.
        k1: Nearest neighbours, with the image itself, of the Jaccard distance.
        k2: Of its query expansion.
        temp: Temperature of the contrast.
        memory: How the centroid of a cluster follows: to the sample it is least like (``hard``), or to each (``mean``).
        memory_momentum: Weight of the old centroid.
    """

    FREE = (*ReIDConfig.FREE, "source", "source_config")
    TOPICS: ClassVar[dict[str, str]] = {
        "source": "run", "steps": "batches and augmentation", "lr_step": "training", "eps": "clusters",
    }  # fmt: skip

    neck: str = "single"
    epochs: int = 50
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    drop_path: float = 0.3
    dtype: str = "float32"

    source: str = ""
    source_config: str = ""
    steps: int = 200
    clusters_per_batch: int = 32
    images_per_cluster: int = 8
    lr_step: int = 20
    lr_gamma: float = 0.1
    eps: float = 0.6
    min_samples: int = 4
    k1: int = 30
    k2: int = 6
    temp: float = 0.05
    memory: str = "hard"
    memory_momentum: float = 0.2

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: If a value cannot be; the message begins with the field's name.
        """
        super().__post_init__()
        self.check_choices({"memory": MEMORIES})
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
