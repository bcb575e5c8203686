"""The base of all configurations: a frozen dataclass that checks its values, and goes to YAML and back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

import yaml

from passreid_models.architectures import ARCHITECTURES
from passreid_models.runtime import atomic_file

DTYPES = ("auto", "float32", "bfloat16", "float16")
Ranges = Iterable[tuple[str, float, float]]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that the runs of all tasks share; each task derives its own from it.

    A new option is a field, a line under "Args" and, where its type does not say all, a check. Its place in the class
    says its topic, under which ``--help`` and the saved YAML file show it.

    Args:
        data: Training images.
        out: Folder of the run.
        resume: ``auto`` continues the run in ``out`` if there is one; or a checkpoint file; empty refuses to overwrite.
        seed: Of weights, order, augmentation and stochastic depth.
        model: Registered architecture.
        init: Weights to begin with: ``architecture.tag`` or ``tag``, an exported folder, a run, or a checkpoint
            file.
        size: Height and width of the images in pixels.
        drop_path: Stochastic depth of the last block, growing linearly over the blocks.
        epochs: Passes over the data.
        lr: Peak learning rate.
        weight_decay: Of the optimiser.
        device: ``auto``, or a torch device.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; auto is bfloat16 where the device has it.
        grad_checkpointing: Recompute activations, for less memory.
        sync_bn: Synchronise BatchNorms over the processes of several GPUs.
        workers: Loader processes of each training process; by default by the number of cores.
        save_minutes: Longest time between two checkpoints.
        save_epochs: Epochs between two checkpoints.
        keep: Checkpoints to keep.
        max_minutes: Save and stop after this many minutes; 0: no limit.
        log_steps: Steps between two lines of the log.
        max_unreadable: Largest share of unreadable images.
        skip_nonfinite: Steps with a non-finite loss to leave out before the run stops.
        tensorboard: Write TensorBoard files too.
    """

    FREE: ClassVar[tuple[str, ...]] = (
        "data", "out", "init", "device", "workers", "resume", "save_minutes", "save_epochs", "keep", "log_steps",
        "max_minutes", "max_unreadable", "skip_nonfinite", "tensorboard",
    )  # fmt: skip
    """Fields that a resumed run may change: none affects the weights of later steps."""

    NUMERICS: ClassVar[tuple[str, ...]] = ("dtype", "grad_checkpointing", "sync_bn")
    """Fields that a resumed run may change; results then agree up to rounding only, and drop-path masks differ."""

    TITLES: ClassVar[tuple[str, ...]] = (
        "run", "model", "views", "batches and augmentation", "training", "distillation", "clusters", "evaluation",
        "machine", "checkpoints", "log",
    )  # fmt: skip
    """Topics of all tasks, in the order of the help."""

    TOPICS: ClassVar[dict[str, str]] = {
        "data": "run", "model": "model", "epochs": "training", "device": "machine", "save_minutes": "checkpoints",
        "log_steps": "log",
    }  # fmt: skip
    """The fields at which a topic begins, in the order of the fields."""

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

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: If a value cannot be; the message begins with the field's name.
        """
        self.check_kinds()
        self.check_choices({"model": ("", *ARCHITECTURES), "dtype": DTYPES})
        self.check_ranges(
            (
                ("epochs save_epochs keep log_steps", 1, math.inf),
                ("lr weight_decay workers seed save_minutes max_minutes skip_nonfinite", 0, math.inf),
                ("max_unreadable", 0, 1),
            )
        )
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

    def check_kinds(self) -> None:
        """
        Raises:
            ValueError: If a value is not of its field's type; the message begins with the field's name.
        """
        for field in fields(self):
            if not _is_kind(getattr(self, field.name), field.type):
                kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
                raise wrong(field.name, getattr(self, field.name), kind)

    def check_choices(self, choices: Mapping[str, Sequence[str]]) -> None:
        """Refuse a value that is none of its field's.

        Args:
            choices: Values by the name of the field; an empty one is not named in the message.

        Raises:
            ValueError: The message begins with the field's name.
        """
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise wrong(name, getattr(self, name), f"one of {', '.join(filter(None, allowed))}")

    def check_ranges(self, ranges: Ranges) -> None:
        """Refuse what is out of range; None is in every range.

        Args:
            ranges: Names of fields with a space between, the least and the most they may be.

        Raises:
            ValueError: The message begins with the field's name.
        """
        for names, low, high in ranges:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (low <= value <= high and value < math.inf):
                    upto = f"between {low} and {high}" if high < math.inf else f"{low} or more"
                    raise wrong(name, value, upto)

    def check_size(self, name: str, pixels: int = 16, why: str = "") -> None:
        """
        Raises:
            ValueError: If a size is no multiple of so many pixels.
        """
        value = getattr(self, name)
        if value is not None and (min(value) < pixels or any(v % pixels for v in value)):
            raise wrong(name, value, f"(height, width) in multiples of {pixels}{why}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and checkpoints."""
        values = asdict(self)
        names = [name for topic in self.topics().values() for name in topic]
        return {k: list(map(_plain, v)) if isinstance(v := values[k], list | tuple) else v for k in names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; fields that are not given have their defaults.

        Raises:
            ValueError: If there is no such field.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{', '.join(unknown)}: no such field; known: {', '.join(sorted(known))}")
        return cls(**{k: _restored(v) for k, v in values.items()})

    def save(self, path: Path) -> None:
        """Write a YAML file that ``--config`` takes."""
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def changed(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields that shape the weights and differ from those of a saved run: (here, there).

        A field that the saved run does not know has its default there, which is how it was trained.
        """
        there = self.known(other).to_dict()
        pairs = {k: (v, there[k]) for k, v in self.to_dict().items() if k not in self.FREE + self.NUMERICS}
        return {k: (mine, theirs) for k, (mine, theirs) in pairs.items() if mine != theirs}

    @classmethod
    def known(cls, values: Mapping[str, Any]) -> Self:
        """``from_dict`` of the fields that there are, for runs of another version."""
        return cls.from_dict({f.name: values[f.name] for f in fields(cls) if f.name in values})

    def numerics(self) -> dict[str, Any]:
        """Fields that a resumed run may change at the price of the last digits."""
        return {name: getattr(self, name) for name in self.NUMERICS}


def wrong(name: str, value: Any, expected: str) -> ValueError:
    """The error of a field that has a value it cannot have."""
    return ValueError(f"{name}: expected {expected}, got {value!r}")


def _is_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of the annotated kind; an int does for a float, a list for a tuple."""
    if isinstance(kind, UnionType):
        return any(_is_kind(value, k) for k in get_args(kind))
    if origin := get_origin(kind):
        kinds = get_args(kind)
        if not isinstance(value, list | tuple) or (origin is tuple and len(value) != len(kinds)):
            return False
        return all(map(_is_kind, value, kinds if origin is tuple else kinds * len(value)))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _restored(value: Any) -> Any:
    """Of lists: a pair of numbers as a tuple, several pairs as a list of tuples."""
    if not isinstance(value, list | tuple):
        return value
    if any(isinstance(item, list) for item in value):
        return [tuple(item) if isinstance(item, list) else item for item in value]
    return tuple(value) if isinstance(value, list) else value
