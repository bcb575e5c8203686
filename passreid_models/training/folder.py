"""Folder of a training run: checkpoints, log and export.

RUN/config.yaml                    all settings; --config RUN/config.yaml replaces all flags
RUN/log.txt, metrics.jsonl         log for people, metrics for programs
RUN/checkpoints/step_000001000.pt  config, step, networks, optimizer, scaler; weights_only
RUN/export/                        current model, for timm's local-dir:
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from passreid_models.checkpoints.convert import check_held
from passreid_models.checkpoints.fields import check_run
from passreid_models.checkpoints.local_dir import check_free
from passreid_models.checkpoints.names import run_checkpoints
from passreid_models.checkpoints.read import AGAIN, CheckpointError, read_checkpoint
from passreid_models.runtime import atomic_file, check_regular, lock

_logger = logging.getLogger(__name__)
MAX_METRICS_BYTES, MAX_LINE = 2**33, 2**20  # more than a run writes
NETWORKS = {"student", "teacher", "model"}  # entries of checkpoints


class RunFolder:
    """A run on the disk; nothing is written before ``open``."""

    def __init__(
        self,
        path: str | Path,
        program: str = "passreid-train",
        state_keys: Sequence[str] = ("student", "teacher", "optimizer", "centers"),
    ) -> None:
        """
        Args:
            path: Folder of the run.
            program: Name of the program that trains, for messages.
            state_keys: Entries of its checkpoints besides config and step.
        """
        self.program, self.state_keys = program, state_keys
        self.path = Path(path)
        self.log_file, self.metrics_file = self.path / "log.txt", self.path / "metrics.jsonl"
        self.checkpoint_folder, self.export_folder = self.path / "checkpoints", self.path / "export"
        self._lock: FileLock | None = None
        self._opened: os.stat_result | None = None  # of the lock file, which this process holds open

    def open(self) -> None:
        """Make the folder, lock it until ``close``, and remove files that a killed run left half written.

        Raises:
            ValueError: If another process trains in the folder.
            OSError: If the folder cannot be written to.
        """
        try:
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / "run")
            self._lock.acquire(timeout=0)
            self._opened = os.stat(self._lock.lock_file)
            for path in [*self.path.iterdir(), *self.checkpoint_folder.iterdir()]:
                if re.fullmatch(r"\.(step_\d+\.pt|export|best|config\.yaml|metrics\.jsonl)\.(?!old$).+", path.name):
                    shutil.rmtree(path, ignore_errors=True)
        except Timeout:
            raise ValueError(
                f"{self.path}: another process trains in it; if none does, on any machine, delete .run.lock there "
                "(file systems without flock keep it after a kill)"
            ) from None
        except OSError as e:
            raise OSError(f"{self.path} cannot be written to ({e.strerror}): name another folder with --out") from None

    def close(self) -> None:
        """Release the lock of ``open``, so that another process may train in the folder."""
        if self._lock is not None:
            self._lock.release()

    def check_present(self) -> None:
        """Check that the folder is the one that was opened; writing would make it again, without what was in it.

        Raises:
            OSError: If it was deleted, moved or replaced.
        """
        if self._lock is None or self._opened is None:
            return
        try:
            present = os.path.samestat(os.stat(self._lock.lock_file), self._opened)
        except FileNotFoundError:  # hidden files alone may be cleared away
            present = (self.path / "config.yaml").is_file()
        if not present:
            raise OSError(
                f"{self.path} was deleted, moved or replaced while the run wrote to it: --resume auto continues from "
                "its last checkpoint, if that was kept"
            )

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first; half-written ones have other names."""
        return run_checkpoints(self.path)

    def latest(self) -> Path | None:
        """Newest checkpoint, if any."""
        return next(reversed(self.checkpoints()), None)

    def save(self, state: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint, then delete all but the newest ``keep`` up to its step.

        Checkpoints of later steps do not count and stay: a run may have gone back because they are damaged.

        Raises:
            OSError: If the checkpoint cannot be written; earlier ones stay as they are.
        """
        self.check_present()
        path = self.checkpoint_folder / f"step_{state['step']:09d}.pt"
        last = self.latest()
        try:
            with atomic_file(path) as temporary:
                torch.save(state, temporary)
                self.check_present()  # it takes seconds
        except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError when the disk is full
            if is_dead_worker(e):
                raise
            reason = str(e).partition("\n")[0]
            reason = reason if isinstance(e, OSError) else f"is the disk full? {reason}"
            last_whole = f"the last whole checkpoint: {last or 'none'}"
            raise OSError(f"{path} could not be written ({reason}); {last_whole}") from None
        for old in [p for p in self.checkpoints() if p <= path][:-keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint of a run.

        Raises:
            CheckpointError: If the file is damaged, or no checkpoint of this program.
        """
        try:
            state = read_checkpoint(path)
        except CheckpointError as e:  # of one's own run: there is no other copy
            raise CheckpointError(str(e).removesuffix(AGAIN)) from None
        if not isinstance(state, dict) or not {"config", "step", *self.state_keys} <= state.keys():
            raise CheckpointError(f"{path} is no checkpoint of {self.program}: give it to --init instead of --resume")
        check_run(state, path)
        try:
            for name in NETWORKS & state.keys():
                check_held(state[name])
        except CheckpointError as e:
            raise CheckpointError(f"{path}: {e}") from None
        return state

    def load_latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return path and content of the newest readable checkpoint; log damaged ones.

        Raises:
            CheckpointError: If there are checkpoints and none can be read.
        """
        paths = self.checkpoints()
        for path in reversed(paths):
            try:
                return path, self.load(path)
            except CheckpointError as e:
                _logger.warning(f"passed over: {e}")
        if paths:
            export = f", and with --init {self.export_folder} from its last weights"
            begin = f"another --out begins anew{export if (self.export_folder / 'config.json').is_file() else ''}"
            raise CheckpointError(f"{self.path} holds no checkpoint that can be read, of {len(paths)}: {begin}")
        return None

    def find(self, resume: str) -> dict[str, Any] | None:
        """Return the checkpoint to continue from; None for a new run.

        Args:
            resume: ``auto`` for the newest, if any; a checkpoint file; or empty, for a new run.

        Raises:
            ValueError: If a new run would overwrite the one in the folder, or the file belongs to another run; if the
                folder has models of a run, but none of its checkpoints.
            FileExistsError: If a new run would overwrite files that are of no run.
            CheckpointError: If the checkpoint cannot be read.
        """
        last = self.latest()
        for model in (self.export_folder, self.path / "best") if last is None else ():
            if (model / "config.json").is_file():
                raise ValueError(
                    f"{self.path} holds a run without its checkpoints: put them back into checkpoints/ to continue it; "
                    f"another --out begins anew, and with --init {model} from its weights"
                )
            check_free(model)
        if resume == "auto":
            newest = self.load_latest()
            return newest[1] if newest else None
        if resume:
            file = Path(resume)
            if last and file.resolve() not in [p.resolve() for p in self.checkpoints()]:
                raise ValueError(f"{self.path} holds another run than {file}: name another --out")
            return self.load(file)
        if last:
            raise ValueError(
                f"{self.path} holds a run ({last.name}): --resume auto continues it, another --out begins anew"
            )
        return None

    def forget_after(self, step: int) -> None:
        """Drop the metrics of later steps and rename their checkpoints (``.later``): a resumed run repeats them."""
        for path in self.checkpoints():
            if int(path.stem.partition("_")[2]) > step:
                path.rename(path.with_suffix(".pt.later"))
        if self.metrics_file.exists():
            with atomic_file(self.metrics_file) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line, record in self._records() if record["step"] <= step)

    def metrics(self) -> list[dict[str, float]]:
        """Records of ``metrics.jsonl``: numbers by name, NaN for null, each with a ``step``.

        Lines that are no records, such as one that a kill cut short, are left out.
        """
        return [record for _, record in self._records()]

    def _records(self) -> Iterator[tuple[str, dict[str, float]]]:
        if not self.metrics_file.exists():
            return
        check_regular(self.metrics_file, MAX_METRICS_BYTES)
        with self.metrics_file.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(MAX_LINE):
                if record := _record(line):
                    yield line.rstrip("\n"), record

    def metric(self, step: int, name: str) -> float | None:
        """Last value of a metric of this step in ``metrics.jsonl``; NaN if it is null, None if there is none."""
        values = [record[name] for _, record in self._records() if record["step"] == step and name in record]
        return values[-1] if values else None

    def add_metrics(self, record: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``; values that are not finite become null, since JSON has none."""
        self.check_present()
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n")


def _record(line: str) -> dict[str, float]:
    """Numbers in a line of ``metrics.jsonl``, with NaN for null; empty if it is no record."""
    try:
        record = json.loads(line, parse_int=float)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    values = {k: math.nan if v is None else v for k, v in record.items() if v is None or isinstance(v, float)}
    return values if math.isfinite(values.get("step", math.nan)) else {}


def is_dead_worker(error: Exception) -> bool:
    """Whether an error reports a dead loader process: torch's signal handler raises it wherever the main thread is."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
