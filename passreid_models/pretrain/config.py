"""The configuration of a pre-training run: one dataclass for Python, the command line and YAML files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from passreid_models.architectures import ARCHITECTURES, DEFAULT_MODEL
from passreid_models.pretrain.views import MultiCrop
from passreid_models.training.config import RunConfig, wrong
from passreid_models.training.folder import RunFolder
from passreid_models.training.warm_start import settings_of

Area = tuple[float, float]

PRESETS: dict[str, dict[str, Any]] = {
    # the published ViT-S run: 8 processes of 128 images
    "pass-vit-s-lup": {"model": "pass_vit_small_patch16", "batch_size": 1024, "epochs": 100},
    "pass-vit-b-lup": {"model": "pass_vit_base_patch16", "batch_size": 512, "epochs": 100},
    # 2 to 8 cores or one small GPU, thousands of images: many small steps, half the resolution in the first epochs, and
    # a teacher that follows sooner (0.996 averages over 250 steps). Fewer prototypes in fewer dimensions and a lower
    # temperature, because else the targets begin nearly uniform, and in a short run stay so
    "laptop": {
        "model": "pass_vit_tiny_patch16",
        "batch_size": 32,
        "epochs": 50,
        "coarse_epochs": 0.8,
        "num_prototypes": 1024,
        "hidden_dim": 1024,
        "bottleneck_dim": 64,
        "lr": 4e-3,
        "momentum": 0.99,
        "teacher_temp": 0.03,
    },
}
CLIPS, RESAMPLINGS = ("parameter", "norm"), ("antialiased", "official")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Settings of ``passreid-train``; the defaults are the published ones but for batch size and positions.

    Args:
        data: Folder of person crops, text list, tar file, or ``synthetic:ids=1000,seed=1``.
        model: Registered architecture; by default that of ``init``, else ViT-S (``pass_vit_small_patch16``).
        init: Weights to continue from: ``architecture.tag`` or ``tag``, an exported folder, a run, or a checkpoint
            file; empty for random ones.
        size: Height and width of global views in pixels.
        lr: Peak learning rate for a batch of 256; scaled linearly.
        weight_decay: Weight decay at the start.
        parts: Number of part tokens and of areas; by default the architecture's; 0 is plain DINO.
        pos_resampling: Resampling of position embeddings to the grid of a view: ``antialiased`` by size, none at the
            native size; or ``official``, the rule that the published weights were pre-trained with (bicubic without
            antialiasing, at every forward pass by a scale of (n + 0.1) / N): to continue from them as they began.
        areas: Rows of each area, (top, bottom) as fractions of the height; by default overlapping windows of equal
            height, for 3 parts the published halves.
        local_size: Height and width of local views; half of ``size`` by default.
        local_views: Local views of an image, over all areas; by default 9, or the next multiple of ``parts``.
        global_scale: Area of a global crop, as a fraction of the image.
        local_scale: Area of a local crop, as a fraction of its area.
        brightness: Strength of the brightness jitter: factors are uniform in 1 ± this. Colour tells persons apart: on
            your own crops weaker saturation and hue jitter, and no grayscale, may help.
        contrast: Strength of the contrast jitter: factors are uniform in 1 ± this.
        saturation: Strength of the saturation jitter: factors are uniform in 1 ± this.
        hue: Strength of the hue jitter: shifts are uniform in ± this, in turns.
        gray_prob: Probability of grayscale.
        solarize_prob: Probability of solarisation, of the second global view only.
        blur_radius: Range of the standard deviation of the blur, in pixels of the view.
        coarse_epochs: Number of first epochs at half the resolution, or less than 1: their share, without the last
            epoch; not in the paper.
        batch_size: Images per step, over all processes and micro-batches.
        accumulate: Micro-batches per process and step, for gradient accumulation. A step is that of the joint batch,
            except for the masks of drop path and the BatchNorms of a conv stem: the loss is averaged, and the centres
            move once.
        min_lr: Learning rate at the end.
        warmup_epochs: Epochs of the learning rate's warm-up from 0; by default a tenth of ``epochs``.
        weight_decay_end: Weight decay at the end.
        freeze_last_layer_epochs: Number of first epochs without an update of the prototypes.
        clip: Largest norm of a gradient; 0: no clipping.
        clip_by: ``parameter`` clips each parameter on its own (published), ``norm`` all together but those of
            frozen prototypes.
        momentum: Momentum of the teacher's moving average at the start; it is 1 at the end.
        teacher_temp: Temperature of the teacher.
        warmup_teacher_temp: Temperature of the teacher in the first epoch of its warm-up.
        warmup_teacher_temp_epochs: Epochs of the linear warm-up of the teacher's temperature; 0: no warm-up.
        student_temp: Temperature of the student.
        center_momentum: Momentum of the centres.
        num_prototypes: Outputs of a projection head, K.
        hidden_dim: Hidden width of a projection head.
        bottleneck_dim: Width of the normalised features.
        norm_last_layer: Keep the gains of the prototypes at 1.
        loss_chunk: Samples whose logits are in memory at a time; 0: all; by default 8, on a GPU 64.
        compile: Compile the blocks of the backbones and the heads.
        probe: Labelled dataset to rank after an epoch, any that ``passreid eval`` takes.
        probe_epochs: Epochs between two probes.
    """

    FREE = (*RunConfig.FREE, "probe", "probe_epochs")
    NUMERICS = (*RunConfig.NUMERICS, "accumulate", "loss_chunk", "compile")
    SWITCHES: ClassVar[dict[str, str]] = {"clip_by": "clip", "probe_epochs": "probe"}
    TOPICS: ClassVar[dict[str, str]] = {
        "parts": "model", "local_size": "views", "coarse_epochs": "training", "momentum": "distillation",
        "loss_chunk": "machine", "probe": "evaluation",
    }  # fmt: skip

    size: tuple[int, int] = (256, 128)
    epochs: int = 100
    lr: float = 5e-4
    weight_decay: float = 0.04

    parts: int | None = None
    pos_resampling: str = "antialiased"
    areas: list[Area] | None = None
    local_size: tuple[int, int] | None = None
    local_views: int | None = None
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.1, 0.8)
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_prob: float = 0.2
    solarize_prob: float = 0.2
    blur_radius: tuple[float, float] = (0.1, 2.0)
    coarse_epochs: float = 0
    batch_size: int = 64
    accumulate: int = 1
    min_lr: float = 1e-6
    warmup_epochs: float | None = None
    weight_decay_end: float = 0.4
    freeze_last_layer_epochs: int = 1
    clip: float = 3.0
    clip_by: str = "parameter"
    momentum: float = 0.996
    teacher_temp: float = 0.04
    warmup_teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0
    student_temp: float = 0.1
    center_momentum: float = 0.9
    num_prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    norm_last_layer: bool = True
    loss_chunk: int | None = None
    compile: bool = False
    probe: str = ""
    probe_epochs: int = 1

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: If a value is not allowed; the message begins with the field's name.
        """
        super().__post_init__()
        if not self.model:
            object.__setattr__(self, "model", self._model_of_start() or DEFAULT_MODEL)
        object.__setattr__(self, "local_views", self.num_local_views)
        self.check_choices({"clip_by": CLIPS, "pos_resampling": RESAMPLINGS})
        self.check_ranges(
            (
                ("batch_size accumulate num_prototypes hidden_dim bottleneck_dim probe_epochs", 1, math.inf),
                ("parts local_views freeze_last_layer_epochs warmup_teacher_temp_epochs", 0, math.inf),
                ("coarse_epochs min_lr warmup_epochs weight_decay_end clip loss_chunk", 0, math.inf),
                ("momentum center_momentum gray_prob solarize_prob", 0, 1),
                ("brightness contrast saturation", 0, math.inf),
                ("hue", 0, 0.5),
            )
        )
        for name in ("teacher_temp", "warmup_teacher_temp", "student_temp"):
            if not 0 < getattr(self, name) < math.inf:
                raise wrong(name, getattr(self, name), "more than 0")
        start = self.warmup_teacher_temp
        if not self.warmup_teacher_temp_epochs and start not in (self.teacher_temp, PretrainConfig.warmup_teacher_temp):
            expected = f"teacher_temp = {self.teacher_temp}, since warmup_teacher_temp_epochs is 0"
            raise wrong("warmup_teacher_temp", start, expected)
        self.check_intervals((("global_scale local_scale", 1), ("blur_radius", math.inf)))
        pixels, reason = (32, ", since the coarse epochs halve it") if self.num_coarse_epochs else (16, "")
        for name in ("size", "local_size"):
            self.check_size(name, pixels, reason)
        if self.local_size is None and self.num_local_views and any(v % (2 * pixels) for v in self.size):
            expected = f"(height, width) in multiples of {2 * pixels}, since local views are half as large"
            raise wrong("size", self.size, expected)
        if self.num_local_views % self.num_areas:
            raise wrong("local_views", self.local_views, f"a multiple of parts = {self.num_areas}")
        if self.areas is not None and len(self.areas) != self.num_areas:
            raise wrong("areas", self.areas, f"one (top, bottom) for each of {self.num_areas} parts")
        for area in self.areas or ():
            if not 0 <= area[0] < area[1] <= 1:
                raise wrong("areas", area, "(top, bottom) with 0 <= top < bottom <= 1")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise wrong("warmup_epochs", self.warmup_epochs, f"at most epochs = {self.epochs}")
        if self.coarse_epochs > self.epochs or (self.coarse_epochs > 1 and self.coarse_epochs % 1):
            expected = f"a whole number of at most epochs = {self.epochs}, or less than 1"
            raise wrong("coarse_epochs", self.coarse_epochs, expected)

    def _model_of_start(self) -> str:
        """Model of ``init`` or, if that is gone, of the run to resume, which holds all weights; empty without both."""
        try:
            return settings_of(self.init).get("model", "") if self.init else ""
        except (ValueError, OSError):
            checkpoint = RunFolder(self.out).find(self.resume) if self.resume else None
            if checkpoint is None:
                raise
            model: str = checkpoint["config"].get("model", "")
            return model

    @property
    def num_parts(self) -> int:
        """Number of part tokens, P."""
        return ARCHITECTURES[self.model].num_parts if self.parts is None else self.parts

    @property
    def num_areas(self) -> int:
        """Number of areas: one per part; without parts the whole image."""
        return max(self.num_parts, 1)

    @property
    def num_local_views(self) -> int:
        """Number of local views, over all areas."""
        return -(-9 // self.num_areas) * self.num_areas if self.local_views is None else self.local_views

    @property
    def view_areas(self) -> tuple[Area, ...]:
        """Rows of the areas that local views are cut from."""
        if self.areas is not None:
            return tuple((float(top), float(bottom)) for top, bottom in self.areas)
        count = self.num_areas
        return tuple((k / (count + 1), (k + 2) / (count + 1)) for k in range(count))

    @property
    def num_coarse_epochs(self) -> int:
        """Number of first epochs at half the resolution, also where ``coarse_epochs`` is their share."""
        share = round(self.coarse_epochs * self.epochs)
        return min(share, self.epochs - 1) if self.coarse_epochs < 1 else round(self.coarse_epochs)

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up, for this batch size."""
        return self.lr * self.batch_size / 256

    def crop(self, epoch: int) -> MultiCrop:
        """Multi-crop of an epoch."""
        return MultiCrop(
            *self.view_sizes(epoch),
            self.view_areas,
            self.num_local_views // self.num_areas,
            self.global_scale,
            self.local_scale,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            gray_prob=self.gray_prob,
            solarize_prob=self.solarize_prob,
            blur_radius=self.blur_radius,
        )

    def view_sizes(self, epoch: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sizes of the global and of the local views in an epoch."""
        (h, w), local = self.size, self.local_size or (self.size[0] // 2, self.size[1] // 2)
        return ((h // 2, w // 2), (local[0] // 2, local[1] // 2)) if epoch < self.num_coarse_epochs else ((h, w), local)

    def changed(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields that shape the weights and differ from a saved run's; those that stand for a number count as it."""
        pairs, saved = super().changed(other), self.known(other)
        if self.num_parts == saved.num_parts:  # such as 3 here and None, the architecture's own 3, there
            pairs.pop("parts", None)
        if self.num_coarse_epochs == saved.num_coarse_epochs:  # such as 0.8 of 50 and 40
            pairs.pop("coarse_epochs", None)
        return pairs
