"""Base of all configurations: a frozen dataclass that checks its values and converts to YAML and back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

import yaml

from passreid_models.architectures import ARCHITECTURES
from passreid_models.runtime import atomic_file, check_workers, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_COUNT = 2**31 - 1
Ranges = Iterable[tuple[str, float, float]]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings shared by the runs of all tasks; each task derives its own configuration.

    A new option is a field, a line under "Args" (its line in ``--help``) and, unless its type says all, a check. Its
    place in the class decides the topic under which ``--help`` and the saved YAML file show it.

    Args:
        data: Training images.
        out: Folder of the run: configuration, log, metrics, checkpoints and exported model.
        resume: ``auto`` continues the run in ``out``, or begins one if there is none; a checkpoint file continues from
            it; empty begins a new run, and refuses an ``out`` that holds one.
        seed: Seed of initial weights, image order, augmentation and drop path.
        model: Registered architecture.
        init: Weights to begin with: ``architecture.tag`` or ``tag``, an exported folder, a run, or a checkpoint
            file.
        size: Image height and width in pixels.
        drop_path: Drop-path rate (stochastic depth) of the last block; it grows linearly from 0 at the first block.
        epochs: Passes over the data.
        lr: Peak learning rate.
        weight_decay: Weight decay of the optimiser.
        device: ``auto`` for the accelerator, if there is one, or a torch device.
        dtype: Precision of the forward pass: ``auto``, ``float32``, ``bfloat16`` or ``float16``; ``auto`` is bfloat16
            where the device supports it, else float16 on CUDA and float32 elsewhere.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time.
        sync_bn: Synchronise BatchNorm statistics over the processes of several GPUs.
        workers: Loader processes of each training process; 0 loads in the training process itself; by default its share
            of the CPU cores minus one, at least 1 and at most 16.
        save_minutes: Longest time between two checkpoints, in minutes.
        save_epochs: Epochs between two checkpoints.
        keep: Number of checkpoints to keep; older ones are deleted.
        max_minutes: Save and stop after this many minutes; 0: no limit.
        log_steps: Steps between two log lines of an epoch, the last of which comes at its end.
        max_unreadable: Largest share of unreadable images in an epoch; the run stops above it.
        skip_nonfinite: Number of steps with a non-finite loss or gradient to skip; the run stops at the next one.
        tensorboard: Also write TensorBoard files.
        quiet: Of the log show only warnings on the terminal, and no progress bar (``-q``); ``log.txt`` has all lines.
    """

    FREE: ClassVar[tuple[str, ...]] = (
        "data", "out", "init", "device", "workers", "resume", "save_minutes", "save_epochs", "keep", "log_steps",
        "max_minutes", "max_unreadable", "skip_nonfinite", "tensorboard", "quiet",
    )  # fmt: skip
    """Fields that a resumed run may change: none affects the weights of later steps."""

    NUMERICS: ClassVar[tuple[str, ...]] = ("dtype", "grad_checkpointing", "sync_bn")
    """Fields that a resumed run may change; results then agree up to rounding at best, see ``load_state``."""

    SWITCHES: ClassVar[dict[str, str]] = {}
    """Fields that have no effect where another one is 0 or empty, such as a probability, with its name."""

    TITLES: ClassVar[tuple[str, ...]] = (
        "run", "model", "views", "batches and augmentation", "training", "distillation", "clusters", "evaluation",
        "machine", "checkpoints", "log",
    )  # fmt: skip
    """Topics of all tasks, in the order of the help."""

    TOPICS: ClassVar[dict[str, str]] = {
        "data": "run", "model": "model", "epochs": "training", "device": "machine", "save_minutes": "checkpoints",
        "log_steps": "log",
    }  # fmt: skip
    """First field of each topic, in the order of the fields."""

    data: str = ""
    out: str = "run"
    resume: str = ""
    seed: int = 0
    model: str = ""
    init: str = ""
    size: tuple[int, int] | None = None
    drop_path: float = 0.1
    epochs: int
    lr: float
    weight_decay: float
    device: str = "auto"
    dtype: str = "auto"
    grad_checkpointing: bool = False
    sync_bn: bool = True
    workers: int | None = None
    save_minutes: float = 10
    save_epochs: int = 1
    keep: int = 2
    max_minutes: float = 0
    log_steps: int = 50
    max_unreadable: float = 0.01
    skip_nonfinite: int = 0
    tensorboard: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: If a value is not valid; the message begins with the field's name.
        """
        self.check_types()
        self.check_choices({"model": ("", *ARCHITECTURES), "dtype": DTYPES})
        self.check_ranges(
            (
                ("epochs save_epochs keep log_steps", 1, math.inf),
                ("lr weight_decay save_minutes max_minutes skip_nonfinite", 0, math.inf),
                ("seed", 0, 2**63 - 1),
                ("max_unreadable", 0, 1),
            )
        )
        if self.workers is not None:
            check_workers(self.workers)
        if not 0 <= self.drop_path < 1:
            raise wrong("drop_path", self.drop_path, "at least 0 and less than 1")

    @classmethod
    def topics(cls) -> dict[str, list[str]]:
        """Names of the fields by topic, in the order of the help."""
        topics: dict[str, list[str]] = {title: [] for title in cls.TITLES}
        seen: set[str] = set()
        for parent in reversed([c for c in cls.__mro__ if issubclass(c, RunConfig)]):
            title = ""
            for name in (f.name for f in fields(parent)):
                title = parent.TOPICS.get(name, title)
                if name not in seen:
                    topics[title].append(name)
                    seen.add(name)
        return {title: names for title, names in topics.items() if names}

    def idle(self) -> dict[str, str]:
        """Entries of ``SWITCHES`` whose field is not at its default and has no effect."""
        changed = {k: v for k, v in self.SWITCHES.items() if getattr(self, k) != getattr(type(self), k)}
        return {name: switch for name, switch in changed.items() if not getattr(self, switch)}

    def check_types(self) -> None:
        """Check each value against the annotation of its field.

        Raises:
            ValueError: If a value is not of its field's type; the message begins with the field's name.
        """
        for field in fields(self):
            if not _has_type(getattr(self, field.name), field.type):
                expected = field.type.__name__ if isinstance(field.type, type) else str(field.type)
                raise wrong(field.name, getattr(self, field.name), expected)

    def check_choices(self, choices: Mapping[str, Sequence[str]]) -> None:
        """Check that values are among the choices of their fields.

        Args:
            choices: Allowed values by name of the field; an empty one is not listed in the message.

        Raises:
            ValueError: The message begins with the field's name.
        """
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                error = wrong(name, value, f"one of {', '.join(filter(None, allowed))}")
                raise ValueError(f"{error}{did_you_mean(value, allowed)}")

    def check_ranges(self, ranges: Ranges) -> None:
        """Check that values are in range; None is in every range, and whole numbers end at ``MAX_COUNT``.

        Args:
            ranges: Names of fields with a space between, smallest and largest value.

        Raises:
            ValueError: The message begins with the field's name.
        """
        for names, low, high in ranges:
            for name in names.split():
                value = getattr(self, name)
                top = MAX_COUNT if high == math.inf and isinstance(value, int) else high
                if value is not None and not (low <= value <= top and value < math.inf):
                    is_open = high == math.inf and not value > top
                    raise wrong(name, value, f"{low} or more" if is_open else f"between {low} and {top}")

    def check_intervals(self, intervals: Iterable[tuple[str, float]]) -> None:
        """Check that values are (least, most) with 0 < least <= most.

        Args:
            intervals: Names of fields with a space between, and the largest value of ``most``.

        Raises:
            ValueError: The message begins with the field's name.
        """
        for names, high in intervals:
            for name in names.split():
                least, most = getattr(self, name)
                if not (0 < least <= most <= high and most < math.inf):
                    limit = f" <= {high}" if high < math.inf else ""
                    raise wrong(name, (least, most), f"(least, most) with 0 < least <= most{limit}")

    def check_size(self, name: str, pixels: int = 16, why: str = "") -> None:
        """Check that height and width are multiples of ``pixels``; None passes.

        Args:
            name: Name of the field.
            pixels: Divisor.
            why: Reason, for the end of the message.

        Raises:
            ValueError: The message begins with the field's name.
        """
        value = getattr(self, name)
        if value is not None and (min(value) < pixels or any(v % pixels for v in value)):
            raise wrong(name, value, f"(height, width) in multiples of {pixels}{why}")

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values by name, for YAML and checkpoints."""
        values = asdict(self)
        names = [name for topic in self.topics().values() for name in topic]
        return {k: list(map(_plain, v)) if isinstance(v := values[k], list | tuple) else v for k in names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from the values of ``to_dict``; missing fields take their defaults.

        Raises:
            ValueError: If a name is no field.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{', '.join(unknown)}: no such field; known: {', '.join(sorted(known))}")
        return cls(**{k: _restored(v) for k, v in values.items()})

    def save(self, path: Path) -> None:
        """Write a YAML file that ``--config`` takes."""
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def changed(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the fields that affect the weights and differ from a saved run's, as (value here, saved value).

        A field that the saved run does not have counts as its default, with which that run was trained.
        """
        saved = self.known(other).to_dict()
        checked = {k: v for k, v in self.to_dict().items() if k not in self.FREE + self.NUMERICS}
        return {k: (v, saved[k]) for k, v in checked.items() if v != saved[k]}

    @classmethod
    def known(cls, values: Mapping[str, Any]) -> Self:
        """``from_dict`` that ignores names that are no fields, for runs of another version."""
        return cls.from_dict({f.name: values[f.name] for f in fields(cls) if f.name in values})

    def numerics(self) -> dict[str, Any]:
        """Values of the fields in ``NUMERICS``, by name."""
        return {name: getattr(self, name) for name in self.NUMERICS}


def wrong(name: str, value: Any, expected: str) -> ValueError:
    """Return the error of a field with an invalid value."""
    return ValueError(f"{name}: expected {expected}, got {value!r}")


def _has_type(value: Any, annotation: Any) -> bool:
    """Whether a value matches an annotation; an int passes for a float, a list for a tuple."""
    if isinstance(annotation, UnionType):
        return any(_has_type(value, member) for member in get_args(annotation))
    if origin := get_origin(annotation):
        items = get_args(annotation)
        if not isinstance(value, list | tuple) or (origin is tuple and len(value) != len(items)):
            return False
        return all(map(_has_type, value, items if origin is tuple else items * len(value)))
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, (int, float) if annotation is float else annotation)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _restored(value: Any) -> Any:
    """Turn a list of numbers into a tuple, and a list of lists into a list of tuples."""
    if not isinstance(value, list | tuple):
        return value
    if any(isinstance(item, list) for item in value):
        return [tuple(item) if isinstance(item, list) else item for item in value]
    return tuple(value) if isinstance(value, list) else value
