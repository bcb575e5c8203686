"""A whole pre-training run: data, checkpoints, logs and signals around the training step.

train(TrainConfig(data="my_crops/", out="run"))
"""

import errno
import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm

from passreid_models.local_dir import save_pretrained
from passreid_models.runtime import all_reduce_mean, world
from passreid_models.ssl.config import TrainConfig
from passreid_models.ssl.data import Batch, StepSampler, ViewDataset, make_loader, prefetch
from passreid_models.ssl.log import Window, log_to
from passreid_models.ssl.monitor import probe, read_labelled
from passreid_models.ssl.run import RunFolder
from passreid_models.ssl.sources import open_source
from passreid_models.ssl.trainer import NonFiniteLossError, Trainer, pick_device
from passreid_models.ssl.views import MultiCrop

_logger = logging.getLogger(__name__)
# Slurm warns of pre-emption by a signal of one's choice, often USR1
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # said by a write, without the file's name
SHOWN = ("loss", "lr", "images_per_s", "wait_share", "teacher_entropy", "feature_std", "part_cosine", "probe_mAP",
         "probe_rank1")  # fmt: skip


class Stopped(Exception):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, message: str, signum: int | None = None) -> None:
        super().__init__(message)
        self.signum = signum


def train(config: TrainConfig) -> Path:
    """Pre-train, from the first step or from the last checkpoint on, to ``out/export``; also under ``torchrun``.

    Returns:
        The exported folder, for ``timm.create_model("local-dir:...", pretrained=True)``.

    Raises:
        ValueError: If a setting does not fit the data, the machine, or the run to resume.
        OSError: If the data cannot be read, or the run not be written.
        NonFiniteLossError: If the loss is NaN or infinite.
        Stopped: On SIGINT, SIGTERM or SIGUSR1, or after ``max_minutes``, with the state saved.
    """
    try:
        log = log_to(Path(config.out) / "log.txt")
        with _process_group(config) as device, log, closing(_Run(config, device)) as run:
            return run.train()
    except OSError as e:
        if e.filename or e.errno not in FULL:
            raise
        raise OSError(f"{config.out} cannot be written to ({e.strerror})") from None


class _Run:
    """The loop around the step: data, checkpoints, logs, signals."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.folder = RunFolder(config.out)
        self.is_main = world()[0] == 0
        checkpoint = self._find_checkpoint()
        labelled = read_labelled(config.probe) if config.probe else None
        self.source = open_source(config.data)
        self.trainer = Trainer(config, len(self.source), device)
        if checkpoint is not None:
            self.trainer.load_state(checkpoint)
        if self.is_main:
            self.folder.open()
            self.folder.forget_metrics_after(self.trainer.step)
            config.save(self.folder.path / "config.yaml")
        self.labelled = labelled
        self.unreadable: set[str] = set()
        self.started = self.saved_at = time.monotonic()
        self.board = _tensorboard(self.folder) if config.tensorboard and self.is_main else None

    def _find_checkpoint(self) -> dict[str, Any] | None:
        resume = self.config.resume
        if resume == "auto":
            found = self.folder.load_latest()
            return found[1] if found else None
        if resume:
            return self.folder.load(Path(resume))
        if last := self.folder.latest():
            raise ValueError(
                f"{self.folder.path} holds a run ({last.name}): --resume auto continues it, --out begins anew"
            )
        return None

    def close(self) -> None:
        """Let other processes train in the folder, though a traceback may keep this object alive."""
        self.folder.close()

    def train(self) -> Path:
        config, trainer = self.config, self.trainer
        self._announce()
        if trainer.step == trainer.total_steps:  # killed between the last checkpoint and its export
            self._export()
        batches = closing(prefetch(self._loader(), trainer.device))
        bar = tqdm(total=trainer.total_steps, initial=trainer.step, unit="step", disable=None if self.is_main else True)
        window = Window()
        with _signals() as received, batches as views, bar:
            while trainer.step < trainer.total_steps:
                with window.waiting():
                    micro_batches = [next(views) for _ in range(config.accumulate)]
                self._count_unreadable(micro_batches)
                ends_epoch = trainer.ends_epoch
                try:
                    record = trainer.training_step(micro_batches)
                except NonFiniteLossError as e:
                    last = self.folder.latest() or "none yet"
                    raise NonFiniteLossError(f"{e}; the last good checkpoint: {last}") from None
                window.add(record)
                bar.update()
                if trainer.step % config.log_steps == 0 or ends_epoch:
                    self._log(window.summary(config.batch_size), ends_epoch)
                    window = Window()
                stop = self._agree_to_stop(received)
                is_last, is_good = trainer.step == trainer.total_steps, record["loss"] == record["loss"]  # not NaN
                if stop or is_last or (is_good and self._due(ends_epoch)):
                    self._save()
                if stop and trainer.step < trainer.total_steps:
                    raise Stopped(
                        f"stopped at step {trainer.step} of {trainer.total_steps}; --resume auto continues",
                        received[0] if received else None,
                    )
        self._say(f"done: {self.folder.export_folder}")
        return self.folder.export_folder

    def _loader(self) -> DataLoader:
        config, trainer = self.config, self.trainer
        crops = [
            MultiCrop(
                *config.view_sizes(epoch), config.view_areas, config.local_views // config.num_areas,
                config.global_scale, config.local_scale,
            )
            for epoch in (config.epochs, 0)
        ]  # fmt: skip
        dataset = ViewDataset(self.source, crops[0], crops[1], config.coarse_epochs, config.seed)
        sampler = StepSampler(
            trainer.num_images, config.batch_size, trainer.total_steps, config.seed,
            trainer.step, trainer.rank, trainer.world_size, config.accumulate,
        )  # fmt: skip
        return make_loader(dataset, sampler, pick_workers(config), trainer.device.type == "cuda")

    def _announce(self) -> None:
        c, t = self.config, self.trainer
        lines = [
            f"data: {self.source.description}",
            f"{c.epochs} epochs of {t.epoch_steps} steps of {c.batch_size} images: {t.world_size} processes x "
            f"{c.accumulate} micro-batches x {c.batch_size // t.world_size // c.accumulate}",
            f"model: {c.model}, {c.num_parts} parts, K = {c.num_prototypes}; {t.device}, {t.dtype}".replace(
                "torch.", ""
            ),
            f"learning rate: {c.lr:g} x {c.batch_size} / 256 = {c.peak_lr:g} after the warm-up",
        ]
        if c.init:
            lines.append(f"weights: {c.init}")
        if t.step:
            lines.append(f"resumed at step {t.step} of {t.total_steps}")
        for line in lines:
            self._say(line)

    def _say(self, line: str) -> None:
        if self.is_main:
            _logger.info(line)

    def _count_unreadable(self, batches: Sequence[Batch]) -> None:
        """Name each unreadable image once, and stop when they are too many."""
        for message in {m for batch in batches for m in batch.unreadable} - self.unreadable:
            self.unreadable.add(message)
            _logger.warning(f"left out: {message}")
        limit = self.config.max_unreadable * self.trainer.num_images
        if len(self.unreadable) > limit:
            raise ValueError(
                f"max_unreadable: {len(self.unreadable)} of {self.trainer.num_images} images cannot be read, more than "
                f"{self.config.max_unreadable:.2%}; {self.folder.log_file} names them"
            )

    def _agree_to_stop(self, received: list[int]) -> bool:
        """Whether any process was asked to stop, or the time is up."""
        late = self.config.max_minutes and time.monotonic() - self.started > 60 * self.config.max_minutes
        wanted = torch.tensor(float(bool(received or late)), device=self.trainer.device)
        return bool(all_reduce_mean(wanted)) if self.trainer.world_size > 1 else bool(wanted)

    def _due(self, ends_epoch: bool) -> bool:
        t, c = self.trainer, self.config
        if ends_epoch and t.epoch % c.save_epochs == 0:
            return True
        return time.monotonic() - self.saved_at > 60 * c.save_minutes

    def _save(self) -> None:
        """Checkpoint and export, by the first process."""
        if self.is_main:
            self.folder.save(self.trainer.state(), self.config.keep)
        self._export()
        self.saved_at = time.monotonic()

    def _export(self) -> None:
        if not self.is_main:
            return
        folder, info = self.folder.export_folder, {"provenance": self._provenance()}
        try:
            save_pretrained(self.trainer.teacher.backbone, folder, info=info, overwrite=True)
        except (OSError, SafetensorError) as e:
            raise OSError(f"{folder} could not be written ({e}); the last checkpoint: {self.folder.latest()}") from None

    def _provenance(self) -> dict[str, Any]:
        from passreid_models import __version__

        config = self.config.to_dict()
        return {
            "method": "PASS" if self.config.num_parts else "DINO",
            "data": self.source.description,
            "data_fingerprint": self.source.fingerprint,
            "images_seen": self.trainer.step * self.config.batch_size,
            "step": self.trainer.step,
            "config": config,
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "package": f"passreid-models {__version__}",
        }

    def _log(self, summary: dict[str, float], ends_epoch: bool) -> None:
        if not self.is_main:
            return
        t = self.trainer
        record = {"step": t.step, "epoch": t.step / t.epoch_steps, **summary}
        if ends_epoch:
            record.update(t.indicators)
            if self.labelled is not None and t.epoch % self.config.probe_epochs == 0:
                record.update(probe(t.teacher.backbone, self.labelled, t.device))
        self.folder.add_metrics(record)
        values = "  ".join(f"{k} {record[k]:.4g}" for k in SHOWN if k in record)
        _logger.info(f"epoch {record['epoch']:.2f}  step {t.step}/{t.total_steps}  {values}")
        if self.board is not None:
            for key, value in record.items():
                self.board.add_scalar(key, value, t.step)
            self.board.flush()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals received, in order; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signum)

    in_main = threading.current_thread() is threading.main_thread()  # Python leaves signals to that one
    old = {s: signal.signal(s, note) for s in SIGNALS if in_main}
    try:
        yield received
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


@contextmanager
def _process_group(config: TrainConfig) -> Iterator[torch.device]:
    """The device of this process; under torchrun, in a process group."""
    device = pick_device(config.device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def pick_workers(config: TrainConfig) -> int:
    """Loader processes of a training process: all cores but one, shared by those of this machine, 16 at most."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError('tensorboard: pip install "passreid-models[train]"') from None
    return SummaryWriter(str(folder.path / "tensorboard"))
