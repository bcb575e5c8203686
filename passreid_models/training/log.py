"""Logging: console and file handlers, and means between two log lines."""

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from passreid_models.data.loader import SIGHUP
from passreid_models.runtime import world

SCHEDULED = ("lr", "weight_decay", "momentum", "teacher_temp")
_logger = logging.getLogger("passreid_models")  # parent of the loggers of all modules


class Window:
    """Means over the steps between two log lines."""

    def __init__(self) -> None:
        self.start, self.waited = time.perf_counter(), 0.0
        self.records: list[dict[str, float]] = []
        self.images = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time spent inside to the time that training waits for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def add(self, record: dict[str, float], images: int) -> None:
        """Add the record of a step, and its number of images over all processes."""
        self.records.append(record)
        self.images += images

    def summary(self) -> dict[str, float]:
        """Mean losses and gradient norm over finite values, last scheduled values, and speed."""
        seconds = time.perf_counter() - self.start
        keys = {k: None for r in self.records for k in r}  # a skipped step has fewer
        finite = {k: [r[k] for r in self.records if math.isfinite(r.get(k, math.nan))] for k in keys}
        means = {k: sum(v) / len(v) for k, v in finite.items() if v}
        return {
            **means,
            **{k: v for k, v in self.records[-1].items() if k in SCHEDULED},
            "images_per_s": self.images / seconds,
            "wait_share": self.waited / seconds,
        }


class TimeLeft:
    """Time that a run still takes: steps as long as the mean so far, and what is done once an epoch beside them."""

    def __init__(self, step: int, total_steps: int, epochs: int) -> None:
        self.first, self.total, self.epoch_steps = step, total_steps, total_steps / epochs
        self.start, self.in_steps = time.perf_counter(), 0.0

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Add the time spent inside to that of the steps."""
        before = time.perf_counter()
        yield
        self.in_steps += time.perf_counter() - before

    def after(self, step: int) -> str:
        """Hours, minutes and seconds from this step to the end; the run has done one step or more."""
        done, beside = step - self.first, time.perf_counter() - self.start - self.in_steps
        seconds = (self.total - step) * (self.in_steps / done + beside / max(done, self.epoch_steps))
        return tqdm.format_interval(seconds)


@contextmanager
def log_to(path: Path, quiet: bool = False) -> Iterator[None]:
    """Log to the terminal, above the progress bar, and to a file; all but the first process log marked records only.

    Args:
        path: Log file.
        quiet: Only warnings to the terminal.
    """
    handlers: list[logging.Handler] = [
        _Terminal(logging.WARNING if quiet else logging.INFO),
        _LateFile(path, encoding="utf-8", delay=True),
    ]
    if world()[0]:
        for handler in handlers:
            handler.addFilter(lambda record: getattr(record, "every_process", False))
    formatter = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    level, propagate = _logger.level, _logger.propagate
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    for handler in handlers:
        handler.setFormatter(formatter)
        _logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _logger.removeHandler(handler)
            handler.close()
        _logger.setLevel(level)
        _logger.propagate = propagate


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except BrokenPipeError:  # its reader has gone, such as head: a run saves and stops, as at a lost terminal
            handler = signal.getsignal(SIGHUP) if SIGHUP else None
            if handler == signal.SIG_IGN:  # of a run under nohup, which goes on
                return
            if SIGHUP is None or not callable(handler):
                raise
            signal.raise_signal(SIGHUP)


class _LateFile(logging.FileHandler):
    """Log file that is written once the run folder exists: a refused run leaves no trace."""

    def emit(self, record: logging.LogRecord) -> None:
        if Path(self.baseFilename).parent.is_dir():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a full disk: writing the next checkpoint reports it."""
