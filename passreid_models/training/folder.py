"""The folder of a training run: its checkpoints, log and export.

RUN/config.yaml                    takes the place of all flags: --config RUN/config.yaml
RUN/log.txt, metrics.jsonl         for people, for programs
RUN/checkpoints/step_000001000.pt  config, step, networks, optimizer, scaler; weights_only
RUN/export/                        the model as it is now, for timm's local-dir:
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from passreid_models.checkpoints.names import run_checkpoints
from passreid_models.checkpoints.read import CheckpointError, read_checkpoint
from passreid_models.runtime import atomic_file, lock

_logger = logging.getLogger(__name__)


class RunFolder:
    """A run on the disk; nothing is written before ``open``."""

    def __init__(
        self,
        path: str | Path,
        program: str = "passreid-train",
        holds: Sequence[str] = ("student", "teacher", "optimizer", "centers"),
    ) -> None:
        """
        Args:
            path: The folder.
            program: Whose runs it takes.
            holds: What their checkpoints hold, besides config and step.
        """
        self.program, self.holds = program, holds
        self.path = Path(path)
        self.log_file, self.metrics_file = self.path / "log.txt", self.path / "metrics.jsonl"
        self.checkpoint_folder, self.export_folder = self.path / "checkpoints", self.path / "export"
        self._lock: FileLock | None = None

    def open(self) -> None:
        """Make the folder, keep other processes out of it until ``close``, and remove what a kill left half written.

        Raises:
            ValueError: If another process trains in it.
            OSError: If it cannot be written to.
        """
        try:
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / "run")
            self._lock.acquire(timeout=0)
            for left in [*self.path.iterdir(), *self.checkpoint_folder.iterdir()]:
                if re.fullmatch(r"\.(step_\d+\.pt|export|best|config\.yaml|metrics\.jsonl)\..+", left.name):
                    shutil.rmtree(left, ignore_errors=True)
        except Timeout:
            raise ValueError(f"{self.path}: another process trains in it") from None
        except OSError as e:
            raise OSError(f"{self.path} cannot be written to ({e.strerror}): name another folder with --out") from None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return run_checkpoints(self.path)

    def latest(self) -> Path | None:
        """The newest checkpoint, if any."""
        return next(reversed(self.checkpoints()), None)

    def save(self, state: dict[str, Any], keep: int) -> Path:
        """Write a checkpoint, then delete all but the newest ``keep`` up to it.

        Later ones, of a run that went back, stay: the newest on the disk may be damaged.

        Raises:
            OSError: If it cannot be written; those before stay as they are.
        """
        path = self.checkpoint_folder / f"step_{state['step']:09d}.pt"
        last = self.latest()
        try:
            with atomic_file(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as e:  # torch's writer raises RuntimeError when the disk is full
            if tells_of_dead_worker(e):
                raise
            why = str(e).partition("\n")[0]
            why = why if isinstance(e, OSError) else f"is the disk full? {why}"
            raise OSError(f"{path} could not be written ({why}); the last whole checkpoint: {last or 'none'}") from None
        for old in [p for p in self.checkpoints() if p <= path][:-keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint of a run.

        Raises:
            CheckpointError: If it is of another make, or damaged.
        """
        state = read_checkpoint(path)
        if not isinstance(state, dict) or not {"config", "step", *self.holds} <= state.keys():
            raise CheckpointError(f"{path} is no checkpoint of {self.program}: give it to --init instead of --resume")
        return state

    def load_latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its path; a damaged one is passed over and named.

        Raises:
            CheckpointError: If there are checkpoints and none can be read.
        """
        error = None
        for path in reversed(self.checkpoints()):
            try:
                return path, self.load(path)
            except CheckpointError as e:
                error = e
                _logger.warning(f"passed over: {e}")
        if error is not None:
            raise error
        return None

    def find(self, resume: str) -> dict[str, Any] | None:
        """The checkpoint to continue from.

        Args:
            resume: ``auto`` for the newest, if any; a checkpoint file; or empty, for a new run.

        Raises:
            ValueError: If a new run would have to overwrite one, or the folder holds another run than the file's.
            CheckpointError: If the checkpoint cannot be read.
        """
        if resume == "auto":
            found = self.load_latest()
            return found[1] if found else None
        last = self.latest()
        if resume:
            given = Path(resume)
            if last and given.resolve() not in [p.resolve() for p in self.checkpoints()]:
                raise ValueError(f"{self.path} holds another run than {given}: name another --out")
            return self.load(given)
        if last:
            raise ValueError(f"{self.path} holds a run ({last.name}): --resume auto continues it, --out begins anew")
        return None

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run makes again, and set later checkpoints aside (``.later``)."""
        for path in self.checkpoints():
            if int(path.stem.partition("_")[2]) > step:
                path.rename(path.with_suffix(".pt.later"))
        if self.metrics_file.is_file():
            lines = [x for x in self.metrics_file.read_text().splitlines() if _step_of(x) <= step]
            with atomic_file(self.metrics_file) as temporary:
                temporary.write_text("".join(f"{x}\n" for x in lines))

    def has_metric(self, step: int, name: str) -> bool:
        """Whether ``metrics.jsonl`` holds a figure of a step."""
        lines = self.metrics_file.read_text().splitlines() if self.metrics_file.is_file() else []
        return any(record["step"] == step and name in record for record in map(json.loads, lines))

    def add_metrics(self, record: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl``; what is not finite is null, since JSON has no word for it."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # cut short by a kill
        return float("inf")


def tells_of_dead_worker(error: Exception) -> bool:
    """Whether torch says that a loader process died: its signal handler raises that wherever the main thread is."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
