"""Base of the trainers of all tasks: step counter, precision, processes, and the state of a run.

A trainer holds the networks and updates them in ``training_step``; ``training.run.Run`` is the loop around it.
"""

import itertools
import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from passreid_models.checkpoints.read import CheckpointError
from passreid_models.device import pick_dtype
from passreid_models.runtime import world
from passreid_models.training.config import RunConfig

_logger = logging.getLogger(__name__)


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite; the message names step, term and the last good checkpoint."""


class BaseTrainer:
    """Base of the trainers.

    A subclass makes its networks and optimiser in ``__init__``, passes the trained network through ``wrap``, and
    implements ``training_step``, ``tensors`` and ``load_tensors``.
    """

    state_keys: tuple[str, ...] = ()
    """Entries of this task's checkpoints besides those of ``state``, for ``RunFolder``."""

    def __init__(
        self,
        config: RunConfig,
        num_images: int,
        epoch_steps: int | Sequence[int],
        device: torch.device,
        fingerprint: str = "",
    ) -> None:
        """
        Args:
            config: Configuration of the run.
            num_images: Number of training images.
            epoch_steps: Steps of every epoch, or a list with those of each.
            device: Device of this process.
            fingerprint: Hash of the list of images, which a resumed run must share.
        """
        self.config: Any = config
        self.device, self.fingerprint, self.num_images = device, fingerprint, num_images
        self.rank, self.world_size = world()
        steps = [epoch_steps] * config.epochs if isinstance(epoch_steps, int) else epoch_steps
        self.epoch_starts = [0, *itertools.accumulate(steps)]
        self.total_steps = self.epoch_starts[-1]
        self.step, self.skipped = 0, 0
        self.images_seen = 0
        """Images of all steps so far, over all processes; counted by ``Run``."""
        self.dtype = pick_dtype(config.dtype, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.indicators: dict[str, float] = {}
        """Metrics logged at the end of an epoch besides the means."""
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers, and what they held before the step

    @property
    def epoch(self) -> int:
        """Number of finished epochs: the epoch of the next step, counted from 0."""
        return self.epoch_at(self.step)

    def epoch_at(self, step: int) -> int:
        """Epoch of a step, counted from 0."""
        return bisect_right(self.epoch_starts, step) - 1

    @property
    def epochs_done(self) -> float:
        """Finished epochs, including the finished fraction of the current one."""
        epoch = self.epoch
        if epoch == len(self.epoch_starts) - 1:
            return float(epoch)
        start, end = self.epoch_starts[epoch : epoch + 2]
        return epoch + (self.step - start) / (end - start)

    @property
    def begins_epoch(self) -> bool:
        """Whether the next step is the first of its epoch."""
        return self.epoch_starts[self.epoch] == self.step

    @property
    def ends_epoch(self) -> bool:
        """Whether the next step is the last of its epoch."""
        return self.epoch_at(self.step + 1) > self.epoch

    @property
    def ends_window(self) -> bool:
        """Whether a log line follows the next step: every ``log_steps`` steps of an epoch, and at its end.

        The last window of an epoch is between half of ``log_steps`` and 1.5 times as long: the mean of one step would
        be noise.
        """
        start, end = self.epoch_starts[self.epoch : self.epoch + 2]
        every, left = self.config.log_steps, end - self.step - 1
        return left == 0 or ((self.step + 1 - start) % every == 0 and 2 * left > every)

    def training_step(self, batches: Sequence[Any]) -> dict[str, float]:
        """Train one step on the micro-batches of this process, and add 1 to ``step``.

        Returns:
            Values for the log: losses, scheduled values, gradient norm.

        Raises:
            NonFiniteLossError: After more than ``skip_nonfinite`` steps with a loss that is NaN or infinite.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Any]:
        """State of networks, optimiser and anything else that a resumed run needs, by ``state_keys``."""
        raise NotImplementedError

    def load_tensors(self, state: dict[str, Any]) -> None:
        """Restore what ``tensors`` returned."""
        raise NotImplementedError

    @property
    def is_synchronized(self) -> bool:
        """Whether BatchNorms average over all processes: not in a single one, nor on a CPU, where torch has no such."""
        return self.config.sync_bn and self.world_size > 1 and self.device.type == "cuda"

    def synchronized(self, network: Any) -> Any:
        """Convert BatchNorms to SyncBatchNorm, if they are to average over all processes."""
        if self.is_synchronized:
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return the network for the forward pass: itself, or DDP around it if there are several processes."""
        if self.world_size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        parallel = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
        parallel.broadcast_buffers = False  # before each step; ``share_first`` shares statistics where they are used
        return parallel

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass: computes in the run's dtype, and changes nothing in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimiser on gradients that are already unscaled, and clear them."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    def is_finite(self, loss: float, norm: float) -> bool:
        """Whether loss and gradient norm are finite; with float16 the scaler handles an infinite norm."""
        return math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())

    def keep_buffers(self, *networks: nn.Module) -> None:
        """Keep the BatchNorm statistics of networks before a step, which may be skipped."""
        if self.config.skip_nonfinite:
            self._kept = [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]

    def skip_step(self, optimizer: torch.optim.Optimizer, what: str, where: str = "") -> None:
        """Skip a step whose loss or gradient is not finite, of which nothing stays; raise after too many.

        Args:
            optimizer: Optimiser whose gradients are cleared.
            what: ``loss`` or ``gradient``, for the message.
            where: Term that is not finite, in brackets, for the message.

        Raises:
            NonFiniteLossError: After more than ``skip_nonfinite`` skipped steps.
        """
        optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        for buffer, before in self._kept:
            buffer.copy_(before)
        self.indicators = {}
        self.skipped += 1
        advice = ": float16 overflows; compute in bfloat16 or float32 (--dtype)" if self.dtype == torch.float16 else ""
        message = f"the {what} of step {self.step + 1} is not finite{where}{advice}"
        if self.skipped > self.config.skip_nonfinite:
            raise NonFiniteLossError(message)
        _logger.warning(f"{message}: left out, {self.skipped} of {self.config.skip_nonfinite} allowed")
        self.step += 1

    def state(self) -> dict[str, Any]:
        """State that a resumed run needs, readable by ``torch.load(weights_only=True)``."""
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "images_seen": self.images_seen,
            "num_images": self.num_images,
            "fingerprint": self.fingerprint,
            "world_size": self.world_size,
            "dtype": str(self.dtype),
            **self.tensors(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: If ``state`` is of a run with other settings or data; the message names them.
            CheckpointError: If its tensors are not those of such a run.
        """
        config = self.config
        if changed := config.changed(state["config"]):
            settings = "; ".join(f"{k}: {value!r}, in the run {saved!r}" for k, (value, saved) in changed.items())
            raise ValueError(f"the run to resume has other settings ({settings}): give those, or another --out")
        if (state["num_images"], state["fingerprint"]) != (self.num_images, self.fingerprint):
            raise ValueError(
                f"the run to resume has {state['num_images']} images, and {config.data} now holds "
                f"{self.num_images}, not the same ones: begin a new run with --init"
            )
        # the dtype that auto picked, not "auto"
        numerics = {**config.numerics(), "processes": self.world_size, "dtype": str(self.dtype)}
        saved = type(config).known(state["config"]).numerics()
        saved |= {"processes": state["world_size"], "dtype": state["dtype"]}
        if differing := [f"{v} {k} instead of {saved[k]}" for k, v in numerics.items() if v != saved[k]]:
            _logger.warning(
                f"resumed with {', '.join(differing)}: batches are the same, but results agree up to rounding only, "
                "and drop-path masks and the shares of BatchNorms may differ"
            )
        self.step, self.skipped = state["step"], state["skipped"]
        self.images_seen = state.get("images_seen", self.step * config.batch_size)  # older versions did not count
        try:
            self.load_tensors(state)
            if state["scaler"]:  # empty unless the saved run was in float16
                self.scaler.load_state_dict(state["scaler"])
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:  # torch's loaders
            reason = " ".join(str(e).split())[:300]
            raise CheckpointError(
                f"the checkpoint of the run to resume does not fit its settings ({type(e).__name__}: {reason}): begin "
                "with another one, or another --out"
            ) from None


def sync_gradients(network: nn.Module, last: bool) -> AbstractContextManager:
    """Reduce gradients over the processes after the last micro-batch of a step only."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()
