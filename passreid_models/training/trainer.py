"""What the trainers of all tasks have in common: counting steps, precision, processes, and the state of a run.

A trainer holds the networks and moves them in ``training_step``; ``training.loop.Run`` is what goes on around it.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from passreid_models.device import pick_dtype
from passreid_models.runtime import world
from passreid_models.training.config import RunConfig

_logger = logging.getLogger(__name__)


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite; the message names step, term and the last good checkpoint."""


class BaseTrainer:
    """Base of the trainers.

    A subclass makes its networks and optimiser in ``__init__``, ends it with ``wrap``, and gives ``training_step``,
    ``tensors`` and ``load_tensors``.
    """

    state_keys: tuple[str, ...] = ()
    """What a checkpoint of this task holds beside the bookkeeping, for ``RunFolder``."""

    def __init__(
        self,
        config: RunConfig,
        num_images: int,
        epoch_steps: int | Sequence[int],
        epochs: int,
        device: torch.device,
        fingerprint: str = "",
    ) -> None:
        """
        Args:
            config: The run.
            num_images: Images of the data.
            epoch_steps: Steps of an epoch, or of each.
            epochs: Number of epochs.
            device: Of this process.
            fingerprint: Of the list of images, for the check of a resumed run.
        """
        self.config: Any = config
        self.device, self.fingerprint, self.num_images = device, fingerprint, num_images
        self.rank, self.world_size = world()
        steps = [epoch_steps] * epochs if isinstance(epoch_steps, int) else epoch_steps
        self.epoch_starts = [0]
        for count in steps:
            self.epoch_starts.append(self.epoch_starts[-1] + count)
        self.total_steps = self.epoch_starts[-1]
        self.step, self.skipped = 0, 0
        self.dtype = pick_dtype(config.dtype, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.indicators: dict[str, float] = {}
        """What is logged at the end of an epoch besides the means."""

    @property
    def epoch(self) -> int:
        """Epochs that are done; the number of the one that the next step belongs to."""
        return self.epoch_at(self.step)

    def epoch_at(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return bisect_right(self.epoch_starts, step) - 1

    @property
    def epochs_done(self) -> float:
        """Epochs that are done, with the part of the current one."""
        epoch = self.epoch
        if epoch == len(self.epoch_starts) - 1:
            return float(epoch)
        start, end = self.epoch_starts[epoch : epoch + 2]
        return epoch + (self.step - start) / (end - start)

    @property
    def begins_epoch(self) -> bool:
        return self.epoch_starts[self.epoch] == self.step

    @property
    def ends_epoch(self) -> bool:
        """Whether the next step is the last of its epoch."""
        return self.epoch_at(self.step + 1) > self.epoch

    def training_step(self, batches: Sequence[Any]) -> dict[str, float]:
        """One step on the micro-batches of this process; ``step`` counts it.

        Returns:
            What is logged: losses, the schedules' values, the gradient norm.

        Raises:
            NonFiniteLossError: After more than ``skip_nonfinite`` steps with a loss that is NaN or infinite.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Any]:
        """Networks, optimiser and whatever else of the task a resumed run needs, by ``state_keys``."""
        raise NotImplementedError

    def load_tensors(self, state: dict[str, Any]) -> None:
        """Take ``tensors`` back."""
        raise NotImplementedError

    def synchronized(self, network: Any) -> Any:
        """The network with BatchNorms of all processes; as it is on CPUs, for which torch has none."""
        if self.config.sync_bn and self.world_size > 1 and self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network for the forward pass: itself, or DDP around it where there are several processes."""
        if self.world_size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def move(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's step, on gradients that are not scaled any more."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    def is_finite(self, loss: float, norm: float) -> bool:
        """Whether a step may count; with float16 an infinite gradient is for the scaler to see to."""
        return math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())

    def leave_out(self, optimizer: torch.optim.Optimizer, what: str, where: str = "") -> None:
        """Make nothing of a step whose loss or gradient is not finite, or stop.

        Args:
            optimizer: Whose gradients are dropped.
            what: ``loss`` or ``gradient``.
            where: In which term, in brackets.

        Raises:
            NonFiniteLossError: After more than ``skip_nonfinite`` of them.
        """
        optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.indicators = {}
        self.skipped += 1
        message = f"the {what} of step {self.step + 1} is not finite{where}"
        if self.skipped > self.config.skip_nonfinite:
            raise NonFiniteLossError(message)
        _logger.warning(f"{message}: left out, {self.skipped} of {self.config.skip_nonfinite} allowed")
        self.step += 1

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
            **self.tensors(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: If it is of a run with other settings or data, naming them.
        """
        config = self.config
        if changed := config.changed(state["config"]):
            what = "; ".join(f"{k}: {here!r}, in the run {there!r}" for k, (here, there) in changed.items())
            raise ValueError(f"the run to resume has other settings ({what}): give those, or another --out")
        if (state["num_images"], state["fingerprint"]) != (self.num_images, self.fingerprint):
            raise ValueError(
                f"the run to resume has {state['num_images']} images, and {config.data} now holds "
                f"{self.num_images}, or others: begin a new run with --init"
            )
        # dtype as it was picked, which auto does not tell
        mine = {**config.numerics(), "processes": self.world_size, "dtype": str(self.dtype)}
        saved = type(config).known(state["config"]).numerics()
        saved |= {"processes": state["world_size"], "dtype": state["dtype"]}
        if differing := [f"{mine[k]} {k} instead of {saved[k]}" for k in mine if mine[k] != saved[k]]:
            _logger.warning(
                f"resumed with {', '.join(differing)}: the same images a step, but the last digits and the stochastic "
                "depth differ"
            )
        self.step, self.skipped = state["step"], state["skipped"]
        self.load_tensors(state)
        if state["scaler"]:  # else of a run in another dtype
            self.scaler.load_state_dict(state["scaler"])


def sync_gradients(network: nn.Module, last: bool) -> AbstractContextManager:
    """Only the last micro-batch of a step reduces the gradients over the processes."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    return network.no_sync()
