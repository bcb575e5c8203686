"""The training step of PASS, and the state that it moves.

Cut views come from the loader; the device changes their colours; the teacher sees the global views, the student all;
the loss compares them; student, teacher and centres move. Everything random is a function of (seed, step or sample), so
that a resumed run goes on as if nothing had happened.
"""

import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from passreid_models.runtime import all_reduce_mean, seed_step, world
from passreid_models.schedules import cosine, linear_epochs, warmup_cosine
from passreid_models.ssl.config import TrainConfig
from passreid_models.ssl.data import Batch
from passreid_models.ssl.heads import ProjectionHead
from passreid_models.ssl.init import make_networks
from passreid_models.ssl.loss import PASSLoss, mean_logits, mean_of_pairs
from passreid_models.ssl.monitor import collapse_indicators
from passreid_models.ssl.network import Projections
from passreid_models.ssl.optim import clip_gradients, make_optimizer, set_hyperparameters, update_teacher
from passreid_models.ssl.photometric import Photometric

_logger = logging.getLogger(__name__)


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite; the message names step, term and the last good checkpoint."""


class Values(NamedTuple):
    """What the schedules give for a step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


def scheduled(config: TrainConfig, step: int, epoch_steps: int) -> Values:
    """The schedules of a run as a pure function of the step (those of DINO, arXiv 2104.14294)."""
    c, total = config, config.epochs * epoch_steps
    warmup = round((c.epochs / 10 if c.warmup_epochs is None else c.warmup_epochs) * epoch_steps)
    return Values(
        lr=warmup_cosine(step, total, min(warmup, total), c.peak_lr, c.min_lr),
        weight_decay=cosine(step, total, c.weight_decay, c.weight_decay_end),
        momentum=cosine(step, total, c.momentum, 1.0),
        teacher_temp=linear_epochs(
            step // epoch_steps, c.warmup_teacher_temp_epochs, c.warmup_teacher_temp, c.teacher_temp
        ),
    )


class Trainer:
    """Student, teacher, loss and optimiser of one process, and the step that moves them."""

    def __init__(
        self,
        config: TrainConfig,
        num_images: int,
        device: torch.device,
        fingerprint: str = "",
        state: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            config: The run.
            num_images: Images of the data.
            device: Of this process.
            fingerprint: Of the list of images, for the check of a resumed run.
            state: To continue from; ``config.init`` is not looked for then.

        Raises:
            ValueError: If the data are fewer than a batch, the batch cannot be shared by the processes, or ``state`` is
                of a run with other settings or data.
        """
        self.config, self.device = config, device
        self.rank, self.world_size = world()
        if num_images < config.batch_size:
            raise ValueError(f"batch_size: {config.batch_size} is more than the {num_images} images of {config.data}")
        if config.batch_size % (share := self.world_size * config.accumulate):
            raise ValueError(
                f"batch_size: {config.batch_size} is not divided by {self.world_size} processes x {config.accumulate} "
                f"micro-batches = {share}"
            )
        self.fingerprint = fingerprint
        self.num_images, self.epoch_steps = num_images, num_images // config.batch_size
        self.total_steps = config.epochs * self.epoch_steps
        self.step, self.skipped = 0, 0
        self.dtype = pick_dtype(config.dtype, device)
        self.student, self.teacher = make_networks(config if state is None else replace(config, init=""), device)
        if config.sync_bn and self.world_size > 1 and device.type == "cuda":  # torch has none for CPUs
            self.student, self.teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm, (self.student, self.teacher))
        self.criterion = PASSLoss(
            config.num_prototypes, config.num_parts, config.student_temp, config.center_momentum
        ).to(device)
        self.chunk = (64 if device.type == "cuda" else 8) if config.loss_chunk is None else config.loss_chunk
        cfg = self.student.backbone.pretrained_cfg
        self.photometric = Photometric(cfg["mean"], cfg["std"]).to(device)
        self.optimizer = make_optimizer(self.student)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.parallel: nn.Module = self.student
        if self.world_size > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.student, device_ids=ids, gradient_as_bucket_view=True)
        if config.compile:
            self.student.compile_backbone()
            self.teacher.compile_backbone()
        self.indicators: dict[str, float] = {}
        if state is not None:
            self.load_state(state)

    @property
    def epoch(self) -> int:
        return self.step // self.epoch_steps

    @property
    def ends_epoch(self) -> bool:
        return (self.step + 1) % self.epoch_steps == 0

    def training_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One step on the micro-batches of this process; ``step`` counts it.

        Returns:
            Loss, its mean for each kind of token, the schedules' values and the gradient norm.

        Raises:
            NonFiniteLossError: After more than ``skip_nonfinite`` steps with a loss that is NaN or infinite.
        """
        config, values = self.config, scheduled(self.config, self.step, self.epoch_steps)
        seed_step(config.seed, self.step, self.rank)
        set_hyperparameters(self.optimizer, values.lr, values.weight_decay)
        means, losses, terms = torch.zeros_like(self.criterion.centers), [], []
        for i, batch in enumerate(batches):
            global_views, local_views = self.photometric.batch(batch.views)
            with self._sync_gradients(i == len(batches) - 1):
                with self._autocast():
                    with torch.no_grad():
                        targets = self.teacher(global_views)
                    outputs = self.parallel(global_views, local_views)
                    loss, pairs = self._compare(outputs, targets, values.teacher_temp)
                self.scaler.scale(loss / len(batches)).backward()
            losses.append(torch.stack([loss.detach(), *(mean_of_pairs([t]) for t in pairs)]))
            means += mean_logits(targets) / len(batches)
            terms.append(pairs)

        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.student, config.clip, config.clip_by)
        figures = torch.cat([torch.stack(losses).mean(0), grad_norm[None]])
        *found, norm = all_reduce_mean(figures).tolist()  # a GPU is waited for here, once a step
        if not math.isfinite(found[0]) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            self._leave_out(terms, "gradient" if math.isfinite(found[0]) else "loss")
            return {"loss": float("nan"), **values._asdict()}

        if self.epoch < config.freeze_last_layer_epochs:
            for head in self.student.heads:
                cast(ProjectionHead, head).last_layer.zero_grad()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        update_teacher(self.teacher.parameters(), self.student.parameters(), values.momentum)
        self.criterion.move_centers(means)

        if self.ends_epoch:
            self._inspect(outputs, targets, values.teacher_temp, global_views)
        self.step += 1
        kinds = [f"loss_{kind.lower()}" for kind in token_kinds(config.num_parts)]
        return {"loss": found[0], **dict(zip(kinds, found[1:], strict=True)), **values._asdict(), "grad_norm": norm}

    def _compare(self, outputs: Projections, targets: Projections, temp: float) -> tuple[Tensor, list[Tensor]]:
        if self.chunk:
            return self.criterion.lean(outputs, targets, temp, self.chunk)
        terms = self.criterion.pairs(outputs.logits(), targets.logits(), temp)
        return mean_of_pairs(terms), [t.detach() for t in terms]

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _sync_gradients(self, last: bool) -> AbstractContextManager:
        """Only the last micro-batch of a step reduces the gradients over the processes."""
        if last or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def _leave_out(self, terms: Sequence[Sequence[Tensor]], what: str) -> None:
        """Make nothing of a step whose loss or gradient is not finite, or stop."""
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.indicators = {}
        self.skipped += 1
        where = f" ({_name_nonfinite(terms)})" if what == "loss" else ""
        message = f"the {what} of step {self.step + 1} is not finite{where}"
        if self.skipped > self.config.skip_nonfinite:
            raise NonFiniteLossError(message)
        _logger.warning(f"{message}: left out, {self.skipped} of {self.config.skip_nonfinite} allowed")
        self.step += 1

    @torch.no_grad()
    def _inspect(self, outputs: Projections, targets: Projections, temp: float, global_views: Tensor) -> None:
        tokens = self.teacher.backbone.forward_views(global_views[0])
        self.indicators = collapse_indicators(self.criterion, outputs, targets, temp, tokens)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, for ``torch.load(weights_only=True)``."""
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "num_images": self.num_images,
            "fingerprint": self.fingerprint,
            "world_size": self.world_size,
            "dtype": str(self.dtype),
            "statistics": {k: tuple(self.teacher.backbone.pretrained_cfg[k]) for k in ("mean", "std")},
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "centers": self.criterion.centers,
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: If it is of a run with other settings or data, naming them.
        """
        if changed := self.config.changed(state["config"]):
            what = "; ".join(f"{k}: {here!r}, in the run {there!r}" for k, (here, there) in changed.items())
            raise ValueError(f"the run to resume has other settings ({what}): give those, or another --out")
        if (state["num_images"], state["fingerprint"]) != (self.num_images, self.fingerprint):
            raise ValueError(
                f"the run to resume has {state['num_images']} images, and {self.config.data} now holds "
                f"{self.num_images}, or others: begin a new run with --init"
            )
        # dtype as it was picked, which auto does not tell
        mine = {**self.config.numerics(), "processes": self.world_size, "dtype": str(self.dtype)}
        saved = TrainConfig.from_dict(state["config"]).numerics()
        saved |= {"processes": state["world_size"], "dtype": state["dtype"]}
        if differing := [f"{mine[k]} {k} instead of {saved[k]}" for k in mine if mine[k] != saved[k]]:
            _logger.warning(
                f"resumed with {', '.join(differing)}: the same images a step, but the last digits and the stochastic "
                "depth differ"
            )
        self.step, self.skipped = state["step"], state["skipped"]
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.criterion.centers.copy_(state["centers"])
        if state["scaler"]:  # else of a run in another dtype
            self.scaler.load_state_dict(state["scaler"])
        for backbone in (self.student.backbone, self.teacher.backbone):
            backbone.pretrained_cfg = {**backbone.pretrained_cfg, **state["statistics"]}
        self.photometric = Photometric(**state["statistics"]).to(self.device)


def token_kinds(num_parts: int) -> list[str]:
    """Names of the kinds of token, as logs show them."""
    return ["CLS", *(f"PART{k + 1}" for k in range(num_parts))]


def _name_nonfinite(terms: Sequence[Sequence[Tensor]]) -> str:
    for of_kinds in terms:
        for kind, pairs in zip(token_kinds(len(of_kinds) - 1), of_kinds, strict=True):
            if (bad := (~pairs.isfinite()).nonzero()).numel():
                i, v = bad[0].tolist()
                return f"{kind}: teacher's global view {i + 1}, student's view {v + 1}"
    return "in another process"


def pick_device(name: str) -> torch.device:
    """The device of this process.

    Raises:
        ValueError: If it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device: {name!r} is not there ({str(e).partition(chr(10))[0]})") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast; ``auto`` is bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.9 on
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
