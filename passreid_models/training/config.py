"""What the configurations of all trainers share: a frozen dataclass that checks itself and goes to YAML and back."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

import yaml

from passreid_models.runtime import atomic_file

DTYPES = ("auto", "float32", "bfloat16", "float16")
Ranges = Iterable[tuple[str, float, float]]


class RunConfig:
    """Base of the configuration dataclasses; it has no fields of its own, so that each task's are read in one place.

    Example:
        >>> @dataclass(frozen=True)
        ... class MyConfig(RunConfig):
        ...     FREE = ("out",)
        ...     out: str = "run"
    """

    FREE: ClassVar[tuple[str, ...]] = ()
    """Fields that a resumed run may change: nothing here touches the weights of later steps."""

    NUMERICS: ClassVar[tuple[str, ...]] = ()
    """Fields that it may change at the price of the last digits, and of what is drawn for the stochastic depth."""

    # what the loop reads of every configuration
    data: str
    out: str
    init: str
    model: str
    resume: str
    device: str
    workers: int | None
    accumulate: int
    save_minutes: float
    save_epochs: int
    keep: int
    log_steps: int
    max_minutes: float
    max_unreadable: float
    skip_nonfinite: int
    tensorboard: bool

    def check_kinds(self) -> None:
        """
        Raises:
            ValueError: If a value is not of its field's type; the message begins with the field's name.
        """
        for field in fields(self):  # type: ignore[arg-type]
            if not _is_kind(getattr(self, field.name), field.type):
                kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
                raise wrong(field.name, getattr(self, field.name), kind)

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
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(map(_plain, v)) if isinstance(v, list | tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; fields that are not given have their defaults.

        Raises:
            ValueError: If there is no such field.
        """
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
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
        return cls.from_dict({f.name: values[f.name] for f in fields(cls) if f.name in values})  # type: ignore[arg-type]

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
