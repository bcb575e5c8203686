"""Configurations of re-ID with and without labels: one dataclass each for Python, command line and YAML."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from passreid_models.training.config import RunConfig, wrong

FUSIONS, NECKS, MEMORIES = ("cat", "mean", "parts", "token"), ("single", "multi"), ("hard", "mean")
OPTIMIZERS, CACHES = ("sgd", "adamw"), ("auto", "none")


@dataclass(frozen=True, kw_only=True)
class ReIDConfig(RunConfig):
    """Settings shared by re-ID with and without labels.

    Args:
        model: Registered architecture; by default that of ``init``, else ViT-S (``pass_vit_small_patch16``).
        init: Weights to begin with: ``architecture.tag`` or ``tag``, an exported folder, a run, a checkpoint file, or
            ``random``.
        size: Image height and width in pixels; by default those of ``init`` if it is a tag, an exported folder or a
            run, else 256x128.
        lr: Peak learning rate; it is not scaled with the batch size.
        fusion: Fusion of CLS token g and mean part token m into the descriptor: ``cat`` for [g, m], ``mean`` for
            (g + m) / 2, ``parts`` for all tokens, ``token`` for g; by default that of ``init`` if it is a tag, an
            exported folder or a run, else ``cat``.
        neck: BatchNorm neck: ``multi`` normalises each token, ``single`` the fused vector.
        flip_prob: Probability of a horizontal flip.
        pad: Black pixels added on each side before the random crop.
        erase_prob: Probability of random erasing.
        crop_scale: Range of the area of a random crop, as a fraction of the image; 1 1: the whole image.
        jitter_prob: Probability of the colour jitter.
        brightness: Strength of the brightness jitter: factors are uniform in 1 ± this.
        contrast: Strength of the contrast jitter: factors are uniform in 1 ± this.
        saturation: Strength of the saturation jitter: factors are uniform in 1 ± this.
        hue: Strength of the hue jitter: shifts are uniform in ± this, in turns.
        gray_prob: Probability of grayscale.
        blur_prob: Probability of the blur.
        blur_radius: Range of the standard deviation of the blur, in pixels of the training image.
        downscale_prob: Probability of scaling down and up again, as small persons in a large picture are.
        downscale: Range of the factor of height and width.
        jpeg_prob: Probability of JPEG compression, of the scaled-down image.
        jpeg_quality: Range of the JPEG quality, 1 to 100.
        optimizer: ``sgd`` (published), or ``adamw``, which decays no biases and other 1-D parameters.
        momentum: Momentum of SGD; AdamW's first beta.
        eval_data: Dataset with queries and gallery to evaluate on; by default ``data``, if it has both.
        eval_epochs: Epochs between two evaluations; the model is also evaluated before the first step and after the
            last epoch; 0: no evaluation.
        cache_images: ``auto`` keeps the decoded training images in memory if they fit in a quarter of what is free (on
            Linux; not with random crops by ``crop_scale``); ``none`` reads them in each epoch.
    """

    FREE = (*RunConfig.FREE, "eval_data", "eval_epochs", "cache_images")
    SWITCHES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue"), "jitter_prob"), "blur_radius": "blur_prob",
        "downscale": "downscale_prob", "jpeg_quality": "jpeg_prob", "eval_data": "eval_epochs",
    }  # fmt: skip
    TOPICS: ClassVar[dict[str, str]] = {
        "fusion": "model", "flip_prob": "batches and augmentation", "optimizer": "training", "eval_data": "evaluation",
        "cache_images": "machine",
    }  # fmt: skip
    accumulate: ClassVar[int] = 1  # triplet loss and cluster memory need the whole batch at once

    fusion: str = ""
    neck: str
    flip_prob: float = 0.5
    pad: int = 10
    erase_prob: float = 0.5
    crop_scale: tuple[float, float] = (1.0, 1.0)
    jitter_prob: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.3
    hue: float = 0.05
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    downscale_prob: float = 0.0
    downscale: tuple[float, float] = (0.3, 0.8)
    jpeg_prob: float = 0.0
    jpeg_quality: tuple[int, int] = (30, 90)
    optimizer: str = "sgd"
    momentum: float = 0.9
    eval_data: str = ""
    eval_epochs: int = 10
    cache_images: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(
            {"fusion": ("", *FUSIONS), "neck": ("", *NECKS), "optimizer": OPTIMIZERS, "cache_images": CACHES}
        )
        self.check_ranges(
            (
                ("pad eval_epochs brightness contrast saturation", 0, math.inf),
                ("flip_prob erase_prob jitter_prob gray_prob blur_prob downscale_prob jpeg_prob", 0, 1),
                ("hue", 0, 0.5),
            )
        )
        if not 0 <= self.momentum < 1:
            raise wrong("momentum", self.momentum, "at least 0 and less than 1")
        self.check_intervals((("crop_scale downscale", 1), ("blur_radius", math.inf), ("jpeg_quality", 100)))
        self.check_size("size")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ReIDConfig):
    """Settings of ``passreid finetune``; the defaults are the published ones.

    Args:
        data: A labelled dataset: Market-1501, MSMT17, DukeMTMC-reID, a folder for each identity, a CSV file, or
            ``synthetic:ids=200``.
        init: Weights to begin with: ``architecture.tag`` or ``tag``, an exported folder, a checkpoint file, ``random``,
            or a run; of a run of ``passreid finetune`` neck and classifier too, if its identities have the same names.
        ids_per_batch: Identities in a batch, over all processes.
        images_per_id: Images of each identity in a batch, which holds ``ids_per_batch`` x ``images_per_id`` images.
        bias_lr: Factor of the learning rate of biases.
        warmup_epochs: Epochs of linear warm-up, from a hundredth of the learning rate; by default a sixth of
            ``epochs``, at most 20.
        layer_decay: Factor of the learning rate from each block to the one before it; 1 (published): none.
        freeze_blocks: Number of first blocks to freeze, along with patch embedding, tokens and positions; 0 trains
            everything.
        id_weight: Weight of the cross-entropy loss over identities.
        triplet_weight: Weight of the batch-hard triplet loss; 0 leaves it out and draws images regardless of identity,
            for data with one image of each identity.
        margin: Margin of the triplet loss; by default the soft margin.
        label_smoothing: Label smoothing of the cross-entropy.
    """

    SWITCHES: ClassVar[dict[str, str]] = {
        **ReIDConfig.SWITCHES,
        "margin": "triplet_weight",
        "label_smoothing": "id_weight",
    }
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
            ValueError: If a value is not valid; the message begins with the field's name.
        """
        super().__post_init__()
        self.check_choices({"neck": NECKS})
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
            raise wrong("id_weight", self.id_weight, "more than 0 where triplet_weight is 0: there is no other loss")
        if self.triplet_weight and self.ids_per_batch < 2:
            raise wrong("ids_per_batch", self.ids_per_batch, "2 or more for the triplet loss")
        if self.triplet_weight and self.images_per_id < 2:
            raise wrong("images_per_id", self.images_per_id, "2 or more for the triplet loss, or triplet_weight 0")

    @property
    def batch_size(self) -> int:
        """Images of a step, over all processes."""
        return self.ids_per_batch * self.images_per_id

    def resolved(self, **values: Any) -> Self:
        """Return a copy in which these values replace those that were left to their defaults."""
        return replace(self, warmup_epochs=self.num_warmup_epochs, **values)

    @property
    def num_warmup_epochs(self) -> int:
        """``warmup_epochs``, or its default, which depends on ``epochs``."""
        return min(20, self.epochs // 6) if self.warmup_epochs is None else self.warmup_epochs


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(ReIDConfig):
    """Settings of ``passreid cluster``; the defaults are the published ones for Market-1501.

    Args:
        data: Training images: any folder, or a dataset as for ``passreid finetune``, whose labels serve reports only.
        init: Weights to begin with: a tag (``architecture.tag`` or ``tag``), an exported folder, a run, a checkpoint
            file, or ``random``; for domain adaptation without ``source``, a model fine-tuned on the source.
        epochs: Rounds of clustering and training.
        neck: BatchNorm neck: ``single`` normalises the fused vector, ``multi`` each token; by default single, and multi
            with a ``source``.
        source: Labelled dataset to fine-tune ``init`` on first, in ``out/source``: domain adaptation in one command.
        source_config: Settings of that fine-tuning: presets of ``passreid finetune``, or a YAML file as for its
            ``--config``. What both trainings share (``size``, ``device`` and others; ``init`` is set here) is set here
            or there; settings that shape the weights must agree, of the others those here win.
        steps: Training steps of an epoch.
        clusters_per_batch: Clusters in a batch, over all processes.
        images_per_cluster: Images of each cluster in a batch, which holds ``clusters_per_batch`` x
            ``images_per_cluster`` images.
        lr_step: Epochs between two reductions of the learning rate; by default two fifths of ``epochs``.
        lr_gamma: Factor of the learning rate at each reduction.
        eps: Largest Jaccard distance between neighbours in DBSCAN; published: 0.6, and 0.7 for MSMT17.
        min_samples: Neighbours, itself included, that make an image the core of a cluster.
        k1: Nearest neighbours of an image, itself included, for the Jaccard distance.
        k2: Nearest images, itself included, whose encodings are averaged (query expansion of the Jaccard distance).
        temp: Temperature of the contrastive loss.
        memory: Update of a cluster's centroid: by the least similar sample of the batch (``hard``), or by every sample
            in turn (``mean``).
        memory_momentum: Weight of the old centroid in an update.
    """

    FREE = (*ReIDConfig.FREE, "source", "source_config")
    TOPICS: ClassVar[dict[str, str]] = {
        "source": "run", "steps": "batches and augmentation", "lr_step": "training", "eps": "clusters",
    }  # fmt: skip

    neck: str = ""
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
    lr_step: int | None = None
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
            ValueError: If a value is not valid; the message begins with the field's name.
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

    def resolved(self, **values: Any) -> Self:
        """Return a copy in which these values replace those that were left to their defaults."""
        neck = self.neck or ("multi" if self.source else "single")
        return replace(self, neck=neck, lr_step=self.num_lr_step, **values)

    @property
    def num_lr_step(self) -> int:
        """``lr_step``, or its default, which depends on ``epochs``."""
        return max(1, 2 * self.epochs // 5) if self.lr_step is None else self.lr_step


# variation as between cameras; what is switched on has the default strengths
DOMAIN = {
    "crop_scale": (0.7, 1.0),
    "jitter_prob": 0.8,
    "gray_prob": 0.1,
    "blur_prob": 0.3,
    "downscale_prob": 0.3,
    "jpeg_prob": 0.3,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "finetune": {
        "pass-vit-s-384": {"size": (384, 128)},
        # 2 to 8 cores or one small GPU, thousands of images: fewer epochs
        "laptop": {"model": "pass_vit_tiny_patch16", "epochs": 24, "lr": 3e-3, "eval_epochs": 6},
        "domain": DOMAIN,
    },
    "cluster": {
        # the published settings, named after the target
        "usl-market1501": {"neck": "single", "fusion": "cat", "eps": 0.6},
        "usl-msmt17": {"neck": "single", "fusion": "mean", "eps": 0.7},
        "uda-market1501": {"neck": "multi", "fusion": "cat", "eps": 0.6},  # from MSMT17
        "uda-msmt17": {"neck": "multi", "fusion": "mean", "eps": 0.7},  # from Market-1501
        "laptop": {
            "model": "pass_vit_tiny_patch16",
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
        "domain": DOMAIN,
    },
}
