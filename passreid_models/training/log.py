"""Logging: console and file handlers, and means between two log lines."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from passreid_models.runtime import world

SCHEDULED = ("lr", "weight_decay", "momentum", "teacher_temp")
_logger = logging.getLogger("passreid_models")  # parent of the loggers of all modules


class Window:
    """Means over the steps between two log lines."""

    def __init__(self) -> None:
        self.start, self.waited = time.perf_counter(), 0.0
        self.records: list[dict[str, float]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time spent inside to the time that training waits for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def add(self, record: dict[str, float]) -> None:
        self.records.append(record)

    def summary(self, batch_size: int) -> dict[str, float]:
        """Mean losses and gradient norm over finite values, last scheduled values, and speed."""
        seconds = time.perf_counter() - self.start
        keys = {k: None for r in self.records for k in r}  # a skipped step has fewer
        finite = {k: [r[k] for r in self.records if math.isfinite(r.get(k, math.nan))] for k in keys}
        means = {k: sum(v) / len(v) for k, v in finite.items() if v}
        return {
            **means,
            **{k: v for k, v in self.records[-1].items() if k in SCHEDULED},
            "images_per_s": batch_size * len(self.records) / seconds,
            "wait_share": self.waited / seconds,
        }


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Log to the terminal, above the progress bar, and to a file; all but the first process log marked records only."""
    handlers: list[logging.Handler] = [_Terminal(), _LateFile(path, encoding="utf-8", delay=True)]
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
        tqdm.write(self.format(record), file=sys.stderr)


class _LateFile(logging.FileHandler):
    """Log file that is written once the run folder exists: a refused run leaves no trace."""

    def emit(self, record: logging.LogRecord) -> None:
        if Path(self.baseFilename).parent.is_dir():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a full disk: writing the next checkpoint reports it."""
