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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm

from passreid_models.local_dir import save_pretrained
from passreid_models.runtime import all_reduce_mean, num_cores, world
from passreid_models.ssl.config import FREE, TrainConfig
from passreid_models.ssl.data import SIGNALS, Batch, StepSampler, ViewDataset, batches_on, make_loader
from passreid_models.ssl.log import Window, log_to
from passreid_models.ssl.monitor import probe, read_labelled
from passreid_models.ssl.run import RunFolder, tells_of_dead_worker
from passreid_models.ssl.sources import open_source
from passreid_models.ssl.trainer import NonFiniteLossError, Trainer, pick_device

_logger = logging.getLogger(__name__)
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
        OSError: If the data cannot be read, the run not be written, or a process that loads images died.
        NonFiniteLossError: If the loss is NaN or infinite.
        Stopped: On SIGINT, SIGTERM or SIGUSR1, or after ``max_minutes``, with the state saved.
    """
    try:
        log = log_to(Path(config.out) / "log.txt")
        with _process_group(config) as device, log, closing(_Run(config, device)) as run:
            try:
                return run.train()
            except Exception as e:  # for who reads the log; the caller tells the terminal
                _logger.error(f"{type(e).__name__}: {e}", extra={"file_only": True, "every_process": True})
                raise
    except OSError as e:
        if e.filename or e.errno not in FULL:
            raise
        raise OSError(f"{config.out} cannot be written to ({e.strerror})") from None
    except RuntimeError as e:
        if not tells_of_dead_worker(e):
            raise
        raise ChildProcessError(
            f"a process that loads images died ({e}): if memory ran out, fewer --workers need less; in a container "
            "they need some GB of /dev/shm"
        ) from None


class _Run:
    """The loop around the step: data, checkpoints, logs, signals."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.folder = RunFolder(config.out)
        self.is_main = world()[0] == 0
        checkpoint = self._find_checkpoint(config)
        if checkpoint is not None:  # it holds all weights, and init may be gone
            config = replace(config, init=checkpoint["config"]["init"])
        self.config = config
        self.labelled = read_labelled(config.probe) if config.probe else None
        self.source = open_source(config.data)
        self.trainer = Trainer(config, len(self.source), device, self.source.fingerprint, checkpoint)
        self._check_same_step()
        if self.is_main:
            self.folder.open()
            self.folder.forget_after(self.trainer.step)
            config.save(self.folder.path / "config.yaml")
        all_reduce_mean(torch.zeros(1, device=device))  # the others have a folder for their log from here on
        self.unreadable: set[str] = set()
        self.unreadable_now, self.counted_epoch = 0, -1
        self.saved_epoch = self.trainer.epoch
        self.started = self.saved_at = time.monotonic()
        self.board = _tensorboard(self.folder) if config.tensorboard and self.is_main else None

    def _find_checkpoint(self, config: TrainConfig) -> dict[str, Any] | None:
        last = self.folder.latest()
        if config.resume == "auto":
            found = self.folder.load_latest()
            return found[1] if found else None
        if config.resume:
            given = Path(config.resume)
            if last and given.resolve() not in [p.resolve() for p in self.folder.checkpoints()]:
                raise ValueError(f"{self.folder.path} holds another run than {given}: name another --out")
            return self.folder.load(given)
        if last:
            raise ValueError(
                f"{self.folder.path} holds a run ({last.name}): --resume auto continues it, --out begins anew"
            )
        return None

    def _check_same_step(self) -> None:
        if self.trainer.world_size == 1:
            return
        step = float(self.trainer.step)
        moments = torch.tensor([step, step**2], dtype=torch.float64, device=self.trainer.device)
        mean, mean_of_squares = all_reduce_mean(moments).tolist()
        if mean**2 != mean_of_squares:  # the variance: all processes see it alike, and stop together
            raise ValueError(
                f"out: the processes found different steps (this one {self.trainer.step}, their mean is {mean:g}): "
                f"{self.folder.path.absolute()} must be one folder for all processes"
            )

    def close(self) -> None:
        """Let other processes train in the folder, though a traceback may keep this object alive."""
        self.folder.close()

    def train(self) -> Path:
        config, trainer = self.config, self.trainer
        self._announce()
        if trainer.step == trainer.total_steps:  # killed between the last checkpoint and its export
            self._export()
        batches = closing(batches_on(trainer.device, self._loader()))
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
                if stop or is_last or (is_good and self._due()):
                    self._save()
                if ends_epoch and trainer.epoch % config.probe_epochs == 0:
                    self._probe()  # after saving: it may fail
                if stop and trainer.step < trainer.total_steps:
                    raise Stopped(
                        f"stopped at step {trainer.step} of {trainer.total_steps}; --resume auto continues",
                        received[0] if received else None,
                    )
        self._say(f"done: {self.folder.export_folder}")
        return self.folder.export_folder

    def _loader(self) -> DataLoader:
        config, trainer = self.config, self.trainer
        fine, coarse = config.crop(config.epochs), config.crop(0)
        dataset = ViewDataset(self.source, fine, coarse, config.coarse_epochs, config.seed)
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
        if self.trainer.epoch != self.counted_epoch:
            self.unreadable_now, self.counted_epoch = 0, self.trainer.epoch
        for message in (m for batch in batches for m in batch.unreadable):
            self.unreadable_now += 1
            if message not in self.unreadable:
                self.unreadable.add(message)
                _logger.warning(f"left out: {message}", extra={"every_process": True})
        share = self.trainer.num_images / self.trainer.world_size  # of an epoch, that this process reads
        if self.unreadable_now > self.config.max_unreadable * share:
            raise ValueError(
                f"max_unreadable: {self.unreadable_now} of {share:.0f} images cannot be read, more than "
                f"{self.config.max_unreadable:.2%}; {self.folder.log_file} names them"
            )

    def _agree_to_stop(self, received: list[int]) -> bool:
        """Whether any process was asked to stop, or the time is up."""
        late = self.config.max_minutes and time.monotonic() - self.started > 60 * self.config.max_minutes
        wanted = bool(received or late)
        if self.trainer.world_size == 1:  # a tensor would make every step wait for the GPU once more
            return wanted
        return bool(all_reduce_mean(torch.tensor(float(wanted), device=self.trainer.device)))

    def _due(self) -> bool:
        t, c = self.trainer, self.config
        if t.epoch // c.save_epochs > self.saved_epoch // c.save_epochs:
            return True
        return time.monotonic() - self.saved_at > 60 * c.save_minutes

    def _save(self) -> None:
        """Checkpoint and export, by the first process."""
        if self.is_main:
            self.folder.save(self.trainer.state(), self.config.keep)
        self._export()
        self.saved_at, self.saved_epoch = time.monotonic(), self.trainer.epoch

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

        config = {k: v for k, v in self.config.to_dict().items() if k not in FREE}  # no names of folders
        return {
            "method": "PASS" if self.config.num_parts else "DINO",
            "data": self.source.description,
            "data_fingerprint": self.source.fingerprint,
            "init": Path(self.config.init).name,
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
        self._write(record)

    def _probe(self) -> None:
        t = self.trainer
        if self.is_main and self.labelled is not None:
            try:
                scores = probe(t.teacher.backbone, self.labelled, t.device)
            except (ValueError, OSError) as e:
                _logger.warning(f"probe: {e}")
            else:
                self._write({"step": t.step, "epoch": t.step / t.epoch_steps, **scores})

    def _write(self, record: dict[str, float]) -> None:
        t = self.trainer
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
        again = "; Ctrl-C again stops without" if signum == signal.SIGINT else ""
        os.write(2, f"\nsaving after this step{again}\n".encode())  # print may be in the middle of a line

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
    return max(1, min(16, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError('tensorboard: pip install "passreid-models[train]"') from None
    return SummaryWriter(str(folder.path / "tensorboard"))
