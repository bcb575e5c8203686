"""The training step of PASS, and the state it updates.

The loader cuts the views, and the device changes their colours. The teacher sees the global views, the student all of
them; the loss compares their outputs; student, teacher and centres are updated. All random numbers are functions of the
seed and the step or sample, so that a resumed run continues like one that was never interrupted.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from passreid_models.pretrain.batches import ViewBatch
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.heads import ProjectionHead
from passreid_models.pretrain.loss import PASSLoss, mean_logits, mean_of_pairs
from passreid_models.pretrain.monitor import collapse_indicators
from passreid_models.pretrain.network import Projections, make_networks
from passreid_models.pretrain.optim import clip_to_norm, gradient_norms, make_optimizer, update_teacher
from passreid_models.pretrain.photometric import Photometric
from passreid_models.runtime import all_reduce_mean, seed_step
from passreid_models.schedules import cosine, linear_epochs, warmup_cosine
from passreid_models.training.optim import load_optimizer, set_hyperparameters
from passreid_models.training.trainer import BaseTrainer, sync_gradients


class ScheduleValues(NamedTuple):
    """Values of all schedules at one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


def schedule_values(config: PretrainConfig, step: int, epoch_steps: int) -> ScheduleValues:
    """Evaluate the schedules of a run at a step, as a pure function (schedules of DINO, arXiv 2104.14294)."""
    c, total = config, config.epochs * epoch_steps
    warmup = round((c.epochs / 10 if c.warmup_epochs is None else c.warmup_epochs) * epoch_steps)
    return ScheduleValues(
        lr=warmup_cosine(step, total, min(warmup, total), c.peak_lr, c.min_lr),
        weight_decay=cosine(step, total, c.weight_decay, c.weight_decay_end),
        momentum=cosine(step, total, c.momentum, 1.0),
        teacher_temp=linear_epochs(
            step // epoch_steps, c.warmup_teacher_temp_epochs, c.warmup_teacher_temp, c.teacher_temp
        ),
    )


class PretrainTrainer(BaseTrainer):
    """Student, teacher, loss and optimiser of one process, and their training step."""

    state_keys = ("student", "teacher", "optimizer", "centers")

    def __init__(
        self,
        config: PretrainConfig,
        num_images: int,
        device: torch.device,
        fingerprint: str = "",
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: Configuration of the run.
            num_images: Number of training images.
            device: Device of this process.
            fingerprint: Fingerprint of the list of images, which must be the same on resume.
            state: Checkpoint to resume from; ``config.init`` is then not read.

        Raises:
            ValueError: If there are fewer images than a batch takes, the batch cannot be shared by the processes, or
                ``state`` is of a run with other settings or data.
        """
        super().__init__(config, num_images, num_images // config.batch_size, device, fingerprint)
        if num_images < config.batch_size:
            raise ValueError(f"batch_size: {config.batch_size} is more than the {num_images} images of {config.data}")
        if config.batch_size % (share := self.world_size * config.accumulate):
            raise ValueError(
                f"batch_size: {config.batch_size} is not divisible by {self.world_size} processes x "
                f"{config.accumulate} micro-batches = {share}"
            )
        self.epoch_steps = self.epoch_starts[1]
        networks = make_networks(config if state is None else replace(config, init=""), device)
        self.student, self.teacher = map(self.synchronized, networks)
        self.criterion = PASSLoss(
            config.num_prototypes, config.num_parts, config.student_temp, config.center_momentum
        ).to(device)
        self.chunk = (64 if device.type == "cuda" else 8) if config.loss_chunk is None else config.loss_chunk
        cfg = self.student.backbone.pretrained_cfg
        self.photometric = Photometric(cfg["mean"], cfg["std"]).to(device)
        self.optimizer = make_optimizer(self.student)
        self.parallel = self.wrap(self.student)
        self.teacher.load_state_dict(self.student.state_dict())  # in all processes those of the first, by DDP
        if config.compile:
            self.student.compile_blocks()
            self.teacher.compile_blocks()
        if state is not None:
            self.load_state(state)

    def training_step(self, batches: Sequence[ViewBatch]) -> dict[str, float]:
        """Take one step on the micro-batches of this process, and count it in ``step``.

        Returns:
            Loss, its mean for each kind of token, the schedules' values and the gradient norm.

        Raises:
            NonFiniteLossError: After more than ``skip_nonfinite`` steps with a loss that is NaN or infinite.
        """
        config, values = self.config, schedule_values(self.config, self.step, self.epoch_steps)
        seed_step(config.seed, self.step, self.rank)
        set_hyperparameters(self.optimizer, values.lr, values.weight_decay)
        self.keep_buffers(self.student, self.teacher)
        target_means, micro_losses, terms = torch.zeros_like(self.criterion.centers), [], []
        for i, batch in enumerate(batches):
            global_views, local_views = self.photometric.batch(batch.views)
            with sync_gradients(self.parallel, i == len(batches) - 1):
                with self.autocast():
                    with torch.no_grad():
                        targets = self.teacher(global_views)
                    outputs = self.parallel(global_views, local_views)
                    micro_loss, pairs = self._compare(outputs, targets, values.teacher_temp)
                self.scaler.scale(micro_loss / len(batches)).backward()
            micro_losses.append(torch.stack([micro_loss.detach(), *(mean_of_pairs([t]) for t in pairs)]))
            target_means += mean_logits(targets) / len(batches)
            terms.append(pairs)

        if self.epoch < config.freeze_last_layer_epochs:  # before they are searched for infinity and measured
            for head in self.student.heads:
                cast(ProjectionHead, head).last_layer.zero_grad()
        self.scaler.unscale_(self.optimizer)
        grads, grad_norms = gradient_norms(self.student)  # the norms are the same in every process
        means = all_reduce_mean(torch.cat([torch.stack(micro_losses).mean(0), grad_norms.norm()[None]]))
        values_read = torch.cat([means, grad_norms]).tolist()  # waits for the GPU, once per step
        (loss, *kind_losses, norm), norms = values_read[: len(means)], values_read[len(means) :]
        if not self.is_finite(loss, norm):
            if math.isfinite(loss):
                self.skip_step(self.optimizer, "gradient")
            else:
                self.skip_step(self.optimizer, "loss", f" ({_name_nonfinite(terms)})")
            return {"loss": float("nan"), **values._asdict()}

        clip_to_norm(grads, norms, config.clip, config.clip_by)
        self.step_optimizer(self.optimizer)
        update_teacher(self.teacher.parameters(), self.student.parameters(), values.momentum)
        self.criterion.move_centers(target_means)

        if self.ends_epoch:
            self._inspect(outputs, targets, values.teacher_temp, global_views)
        self.step += 1
        kinds = [f"loss_{kind.lower()}" for kind in token_kinds(config.num_parts)]
        return {"loss": loss, **dict(zip(kinds, kind_losses, strict=True)), **values._asdict(), "grad_norm": norm}

    def _compare(self, outputs: Projections, targets: Projections, temp: float) -> tuple[Tensor, list[Tensor]]:
        if self.chunk:
            return self.criterion.chunked(outputs, targets, temp, self.chunk)
        terms = self.criterion.pairs(outputs.logits(), targets.logits(), temp)
        return mean_of_pairs(terms), [t.detach() for t in terms]

    @torch.no_grad()
    def _inspect(self, outputs: Projections, targets: Projections, temp: float, global_views: Tensor) -> None:
        kept = [x.clone() for x in self.teacher.buffers()]  # BatchNorms of a conv stem count this pass, too
        with torch.compiler.set_stance("force_eager"):  # rather than compile for this shape
            tokens = self.teacher.tokens(global_views[:1])[0]
        for x, before in zip(self.teacher.buffers(), kept, strict=True):
            x.copy_(before)
        self.indicators = collapse_indicators(self.criterion, outputs, targets, temp, tokens)

    def tensors(self) -> dict[str, Any]:
        return {
            "statistics": {k: tuple(self.teacher.backbone.pretrained_cfg[k]) for k in ("mean", "std")},
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "centers": self.criterion.centers,
        }

    def load_tensors(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.criterion.centers.copy_(state["centers"])
        for backbone in (self.student.backbone, self.teacher.backbone):
            backbone.pretrained_cfg = {**backbone.pretrained_cfg, **state["statistics"]}
        self.photometric = Photometric(**state["statistics"]).to(self.device)


def token_kinds(num_parts: int) -> list[str]:
    """Names of the kinds of token, as logs show them."""
    return ["CLS", *(f"PART{k + 1}" for k in range(num_parts))]


def _name_nonfinite(terms: Sequence[Sequence[Tensor]]) -> str:
    for kind_terms in terms:
        for kind, pairs in zip(token_kinds(len(kind_terms) - 1), kind_terms, strict=True):
            if (nonfinite := (~pairs.isfinite()).nonzero()).numel():
                i, v = nonfinite[0].tolist()
                return f"{kind}: teacher's global view {i + 1}, student's view {v + 1}"
    return "in another process"
