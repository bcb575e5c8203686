"""Training loop of all tasks: data, checkpoints, log, signals, processes.

A task derives a class from ``Run`` that makes its trainer, batches and export, and passes it to ``run_in_folder``.
"""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.data.datasets import ReIDDataset
from passreid_models.data.loader import SIGHUP, SIGNALS
from passreid_models.device import process_group
from passreid_models.runtime import all_reduce_mean, num_cores, on_first, require, world
from passreid_models.training.config import RunConfig
from passreid_models.training.folder import RunFolder, is_dead_worker
from passreid_models.training.log import TimeLeft, Window, log_to
from passreid_models.training.trainer import BaseTrainer, NonFiniteLossError
from passreid_models.training.warm_start import provenance_of

_logger = logging.getLogger(__name__)
GUARD = 'in a script, training stands below if __name__ == "__main__":'
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # raised by a write without the file's name


class Stopped(Exception):
    """Raised when a run stops before its end, after its state is saved; ``signum`` is the signal, if there was one."""

    def __init__(self, message: str, signum: int | None = None) -> None:
        super().__init__(message)
        self.signum = signum


class Run:
    """Training loop around the step of a trainer: data, checkpoints, log, signals.

    A task implements ``prepare``, ``batches``, ``announcement``, ``exported`` and ``about``, and may override
    ``before_training``, ``before_step`` and ``after_epoch``.
    """

    program: ClassVar[str] = "passreid-train"
    trainer_class: ClassVar[type[BaseTrainer]]
    shown: ClassVar[tuple[str, ...]] = ("loss", "lr", "images_per_s", "wait_share")
    """Metrics in a log line."""
    epoch_figure: ClassVar[str]
    """Metric that ``after_epoch`` writes last: a resumed run whose last epoch lacks it calls ``after_epoch`` again."""

    config: Any
    trainer: Any
    eval_dataset: ReIDDataset | None = None
    """Dataset that is evaluated in training, set by ``prepare``."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.folder = RunFolder(config.out, self.program, self.trainer_class.state_keys)
        self.is_main = world()[0] == 0
        newest = self.folder.latest()
        checkpoint = self.folder.find(config.resume)
        if checkpoint is not None:  # it holds all weights, and init may be gone
            began = checkpoint["config"].get("init", "")
            if config.init not in ("", began):
                _logger.warning(f"init: {config.init} is not used: the run to resume began with {began or 'random'}")
            config = replace(config, init=began)
        self.config = config
        self.trainer = self.prepare(device, checkpoint)
        self.origin = checkpoint.get("origin", {}) if checkpoint else provenance_of(config.init, self.config.model)
        self.before: dict[str, Any] = checkpoint.get("before", {}) if checkpoint else {}
        """Scores of ``before_training``, kept in the checkpoints."""
        self._check_same()
        try:
            self._begin(newest, checkpoint is not None)
        except BaseException:  # nobody has the run yet, to close it
            self.folder.close()
            raise

    def _begin(self, newest: Path | None, is_resumed: bool) -> None:
        """Open the folder, and prepare what is written to it."""
        kept = self.trainer.step if is_resumed else -1  # the folder may be of a run that was killed at once
        on_first(partial(self._open_folder, newest, kept))  # from here on all processes find it, for their log
        self.unreadable: set[str] = set()
        self.unreadable_now: set[str] = set()
        self.counted_epoch = -1
        self.saved_epoch = self.trainer.epoch
        self.started = self.saved_at = time.monotonic()
        self.board = _tensorboard(self.folder, kept + 1) if self.config.tensorboard and self.is_main else None

    def _open_folder(self, newest: Path | None, kept: int) -> None:
        self.folder.open()
        if self.folder.latest() != newest:  # it was looked at before it was locked
            raise ValueError(f"{self.folder.path}: another process has trained in it just now: start again")
        self.folder.forget_after(kept)
        self.config.save(self.folder.path / "config.yaml")

    # ---- Implemented by a task

    def prepare(self, device: torch.device, checkpoint: dict[str, Any] | None) -> BaseTrainer:
        """Open the data and make the trainer."""
        raise NotImplementedError

    def batches(self) -> Generator[Any, None, None]:
        """Micro-batches from ``self.trainer.step`` on, with ``num_images`` and a list ``unreadable`` of messages."""
        raise NotImplementedError

    def announcement(self) -> list[str]:
        """Log lines that describe data, model and training."""
        raise NotImplementedError

    def exported(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Model for ``out/export``, and tensors to store beside it."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """Entries of the provenance that only the task can give."""
        raise NotImplementedError

    def before_training(self) -> None:
        """Evaluate the networks before the first step of a new run."""

    def before_step(self) -> None:
        """Prepare what the next batches depend on, such as clusters."""

    def after_epoch(self) -> None:
        """Evaluate the networks after an epoch; the state is already saved."""

    def after_training(self) -> None:
        """Log the outcome of a run that has ended, now or before it was resumed."""

    # ---- Common to all tasks

    def _check_same(self) -> None:
        """Check that all processes are at the same step, and found the same images to train and to evaluate on."""
        t = self.trainer
        if t.world_size == 1:
            return
        evaluated = self.eval_dataset.fingerprint if self.eval_dataset else ""
        hashes = [int(fingerprint[:5] or "0", 16) for fingerprint in (t.fingerprint, evaluated)]
        x = torch.tensor([t.step, *hashes], dtype=torch.float64, device=t.device)  # squares and sums are exact
        means, means_of_squares = all_reduce_mean(torch.stack([x, x**2])).tolist()
        # by the variance, which all processes see alike, so that they stop together
        steps, images, evaluation = (a**2 != b for a, b in zip(means, means_of_squares, strict=True))
        if steps:
            raise ValueError(
                f"out: the processes found different steps (this one {t.step}, their mean is {means[0]:g}): "
                f"{self.folder.path.absolute()} must be one folder for all processes"
            )
        if images:
            raise ValueError(
                f"data: the processes found different images in {self.config.data} (this one {t.num_images:,}), and "
                "all need the same"
            )
        if evaluation:
            raise ValueError("the processes found different images to evaluate on, and all need the same")

    def close(self) -> None:
        """Unlock the folder, without waiting for this object to be freed: a traceback may keep it alive."""
        self.folder.close()

    def train(self) -> Path:
        """Train to the end.

        Returns:
            The exported folder.
        """
        config, trainer = self.config, self.trainer
        evaluated = partial(self.folder.metric, trainer.step, self.epoch_figure)
        for line in self.announcement():
            self.log(line)
        if idle := config.idle():
            named = ", ".join(f"{name} (needs {switch})" for name, switch in idle.items())
            _logger.warning(f"without effect: {named}")
        if config.init:
            self.log(f"weights: {config.init}")
        if trainer.step:
            self.log(f"resumed at step {trainer.step} of {trainer.total_steps}")
            if trainer.begins_epoch and on_first(evaluated) is None:  # killed before the evaluation ended
                self.after_epoch()
        else:
            self.before_training()
        if trainer.step == trainer.total_steps:  # killed between the last checkpoint and its export
            on_first(self._export)
        batches = closing(self.batches())
        hide = config.quiet or not self.is_main
        bar = tqdm(total=trainer.total_steps, initial=trainer.step, unit="step", disable=True if hide else None)
        window, first = None, trainer.step + 1
        left = TimeLeft(trainer.step, trainer.total_steps, config.epochs)
        with _signals() as received, batches as loaded, bar:
            while trainer.step < trainer.total_steps:
                self.before_step()
                window = window or Window()
                with left.stepping():
                    with window.waiting():
                        micro_batches = [next(loaded) for _ in range(config.accumulate)]
                    self._count_unreadable(micro_batches)
                    ends_epoch, ends_window = trainer.ends_epoch, trainer.ends_window
                    try:
                        record = trainer.training_step(micro_batches)
                    except NonFiniteLossError as e:
                        last = self.folder.latest() or "none yet"
                        raise NonFiniteLossError(f"{e}; the last good checkpoint: {last}") from None
                images = trainer.world_size * sum(batch.num_images for batch in micro_batches)
                trainer.images_seen += images
                window.add(record, images)
                bar.update()
                if ends_window or trainer.step == first:
                    figures, eta = window.summary(), f"  eta {left.after(trainer.step)}"
                    if ends_window:
                        self.write({**figures, **(trainer.indicators if ends_epoch else {})}, eta)
                        window = None  # the next one begins with a step: neither saving nor evaluating counts
                    else:  # a sign of life, long before the means over many steps
                        self.log(self._line(figures) + eta)
                stop, is_due = self._agree(received)
                is_last, is_good = trainer.step == trainer.total_steps, record["loss"] == record["loss"]  # not NaN
                if stop or is_last or (is_good and is_due):
                    before = time.perf_counter()
                    on_first(self._save)  # what fails there, such as a full disk, ends all processes
                    if window:
                        window.start += time.perf_counter() - before
                if ends_epoch:
                    self.after_epoch()  # after saving, since it may fail
                if stop and trainer.step < trainer.total_steps:
                    raise Stopped(
                        f"stopped at step {trainer.step} of {trainer.total_steps}; --resume auto continues",
                        received[0] if received else None,
                    )
        on_first(lambda: None)  # from here on all processes find the export
        self.after_training()
        self.log(f"done: {self.folder.export_folder}")
        return self.folder.export_folder

    def log(self, line: str) -> None:
        """Write a log line, in the first process."""
        if self.is_main:
            _logger.info(line)

    def write(self, figures: Mapping[str, float], eta: str = "") -> None:
        """Write metrics to ``metrics.jsonl``, the log and TensorBoard, in the first process.

        Args:
            figures: Metrics by name.
            eta: Time left, for the end of the log line.
        """
        if not self.is_main:
            return
        t = self.trainer
        record = {"step": t.step, "epoch": t.epochs_done, **figures}
        self.folder.add_metrics(record)
        self.log(self._line(figures) + eta)
        if self.board is not None:
            for key, value in record.items():
                self.board.add_scalar(key, value, t.step)
            self.board.flush()

    def _line(self, figures: Mapping[str, float]) -> str:
        t = self.trainer
        values = "  ".join(f"{k} {figures[k]:.4g}" for k in self.shown if k in figures)
        return f"epoch {t.epochs_done:.2f}  step {t.step}/{t.total_steps}  {values}"

    def _count_unreadable(self, batches: Sequence[Any]) -> None:
        """Log unreadable images, and count each once in an epoch, for ``_agree``."""
        if self.trainer.epoch != self.counted_epoch:
            self.unreadable_now, self.counted_epoch = set(), self.trainer.epoch
        messages = [message for batch in batches for message in batch.unreadable]
        self.unreadable_now.update(messages)
        self.name_unreadable(messages)

    def name_unreadable(self, messages: Iterable[str]) -> None:
        """Log each unreadable image once."""
        for message in messages:
            if message not in self.unreadable:
                self.unreadable.add(message)
                _logger.warning(f"left out: {message}", extra={"every_process": True})

    def check_unreadable(self, count: int, total: int) -> None:
        """Stop the run when too many images are unreadable.

        Raises:
            ValueError: If ``count`` is more than the share ``max_unreadable`` of ``total``.
        """
        if count > self.config.max_unreadable * total:
            raise ValueError(
                f"max_unreadable: {count} of {total} images cannot be read, more than "
                f"{self.config.max_unreadable:.2%}; {self.folder.log_file} names them"
            )

    def _agree(self, received: list[int]) -> tuple[bool, bool]:
        """Whether any process received a signal or exceeded ``max_minutes``; whether a checkpoint is due.

        Raises:
            ValueError: In every process, if too many images of the epoch are unreadable in all of them together.
        """
        t = self.trainer
        late = self.config.max_minutes and time.monotonic() - self.started > 60 * self.config.max_minutes
        is_due = self.is_main and self._checkpoint_is_due()
        counts = [int(bool(received or late)), int(is_due), len(self.unreadable_now)]
        if t.world_size > 1:  # in a single process a tensor would make every step wait for the GPU once more
            means = all_reduce_mean(torch.tensor(counts, dtype=torch.float64, device=t.device)).tolist()
            counts = [round(t.world_size * mean) for mean in means]
        self.check_unreadable(counts[2], t.num_images)
        return bool(counts[0]), bool(counts[1])

    def _checkpoint_is_due(self) -> bool:
        t, c = self.trainer, self.config
        if t.epoch // c.save_epochs > self.saved_epoch // c.save_epochs:
            return True
        return time.monotonic() - self.saved_at > 60 * c.save_minutes

    def _save(self) -> None:
        """Write checkpoint and export; only in the first process."""
        self.folder.save({**self.trainer.state(), "origin": self.origin, "before": self.before}, self.config.keep)
        self._export()
        self.saved_at, self.saved_epoch = time.monotonic(), self.trainer.epoch

    def _export(self) -> None:
        self.export_to(self.folder.export_folder)

    def export_to(self, folder: Path, **more: Any) -> None:
        """Write the model to a folder, in the first process, whole or not at all.

        Args:
            folder: Folder to write; the files of an older one are replaced, those of others stay.
            **more: Further entries of the provenance.

        Raises:
            OSError: If the folder cannot be written.
        """
        if not self.is_main:
            return
        self.folder.check_present()
        model, extras = self.exported()
        info = {"provenance": {**self._provenance(), **more}}
        try:
            save_pretrained(model, folder, extras, info, overwrite=True)
        except OSError as e:
            raise OSError(f"{folder} could not be written ({e}); the last checkpoint: {self.folder.latest()}") from None

    def _provenance(self) -> dict[str, Any]:
        from passreid_models import __version__

        config = {k: v for k, v in self.config.to_dict().items() if k not in self.config.FREE}  # no paths
        return {
            **self.about(),
            "data_fingerprint": self.trainer.fingerprint,
            "init": Path(self.config.init).name,
            **({"init_provenance": self.origin} if self.origin else {}),
            "images_seen": self.trainer.images_seen,
            "step": self.trainer.step,
            "config": config,
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "package": f"passreid-models {__version__}",
        }


def run_in_folder(task: type[Run], config: RunConfig) -> Path:
    """Train, from the first step or from the last checkpoint, to ``out/export``; also under ``torchrun``.

    Args:
        task: Class of the run.
        config: Configuration of the run.

    Returns:
        The exported folder, for ``timm.create_model("local-dir:...", pretrained=True)``.

    Raises:
        ValueError: If a setting does not fit the data, the machine, or the run to resume.
        OSError: If the data cannot be read, the run cannot be written, or a process that loads images died.
        NonFiniteLossError: If the loss is NaN or infinite.
        RuntimeError: If a loader process imports the script that trains, which lacks its ``__main__`` guard.
        Stopped: On SIGINT, SIGTERM, SIGUSR1 or SIGHUP, or after ``max_minutes``, with the state saved.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # imports the script of the process above it
        raise RuntimeError(f"a process that loads images has begun to train itself: {GUARD}")
    try:
        log = log_to(Path(config.out) / "log.txt", config.quiet)
        with process_group(config.device) as device, log, closing(task(config, device)) as run:
            try:
                return run.train()
            except Exception as e:  # to the log file; on the terminal the caller reports it
                _logger.error(f"{type(e).__name__}: {e}", extra={"file_only": True, "every_process": True})
                raise
    except OSError as e:
        if e.filename or e.errno not in DISK_FULL:
            raise
        raise OSError(f"{config.out} cannot be written to ({e.strerror})") from None
    except RuntimeError as e:
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):  # such as without a C compiler
            reason = str(e).strip().partition("raised:\n")[2] or str(e).strip()
            raise ValueError(f"compile: torch.compile fails here: {reason.splitlines()[0]}") from None
        if not is_dead_worker(e):
            raise
        spawned = multiprocessing.get_start_method(allow_none=True) not in (None, "fork")
        raise ChildProcessError(
            f"a process that loads images died ({e}): if memory ran out, fewer --workers need less; in a container "
            f"they need some GB of /dev/shm{f'; {GUARD}' if spawned else ''}"
        ) from None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """List of the signals received, in order; a second SIGINT interrupts at once."""
    received: list[int] = []

    def receive(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signum)
        advice = "; Ctrl-C again stops without saving" if signum == signal.SIGINT else ""
        with suppress(OSError):  # the terminal may be lost
            os.write(2, f"\nsaving after this step{advice}\n".encode())  # print may be in the middle of a line

    in_main = threading.current_thread() is threading.main_thread()  # only this one may set handlers
    # a run under nohup ignores the end of its terminal
    caught = [s for s in SIGNALS if s != SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, receive) for s in caught if in_main}
    try:
        yield received
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def pick_workers(config: RunConfig) -> int:
    """Loader processes of a training process: by default its share of the cores minus one, at least 1, at most 16."""
    if config.workers is not None:
        return config.workers
    return max(1, min(16, num_cores() - 1))


def _tensorboard(folder: RunFolder, step: int) -> Any:
    """Writer that takes back what was written from ``step`` on: a resumed run repeats it."""
    tensorboard = require("torch.utils.tensorboard", "train", "tensorboard")
    return tensorboard.SummaryWriter(str(folder.path / "tensorboard"), purge_step=step)
