"""The text ``synthetic:ids=1000,images=10`` as a generator of persons."""

from dataclasses import dataclass

from passreid_models.synthetic.dataset import SyntheticPersons

__all__ = ["PREFIX", "Recipe", "read_recipe"]

PREFIX = "synthetic:"
DEFAULTS = {"ids": "1000", "images": "10", "cameras": "8", "seed": "0", "size": "256x128", "place": "street"}


@dataclass(frozen=True)
class Recipe:
    """What a text asks of the generator; ``text`` has every key, in one order."""

    text: str
    persons: SyntheticPersons
    train_ids: int | None = None


def read_recipe(text: str, splits: bool = False) -> Recipe:
    """Read ``synthetic:`` and any of ``ids=``, ``images=`` (of each), ``cameras=``, ``seed=``, ``size=``, ``place=``.

    Args:
        text: Keys and values with commas between; ``size`` is height x width.
        splits: ``train_ids=`` is a key too: identities that train, half of them by default.

    Raises:
        ValueError: If a key is unknown or given twice, or a value is none that it can have.
    """
    examples = DEFAULTS | ({"train_ids": "100"} if splits else {})
    given: dict[str, str] = {}
    for item in filter(None, text.removeprefix(PREFIX).split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in examples:
            raise ValueError(f"{text}: unknown key {key!r}; known: {', '.join(examples)}")
        if key in given:
            raise ValueError(f"{text}: {key} is given twice")
        if key == "place":
            given[key] = value
            continue
        numbers = value.split("x") if key == "size" else [value]
        if len(numbers) != (2 if key == "size" else 1) or not all(n.isdecimal() for n in numbers):
            raise ValueError(f"{text}: {key} is given as {value!r}; expected such as {key}={examples[key]}")
        given[key] = "x".join(str(int(n)) for n in numbers)
    values = DEFAULTS | given
    if splits:
        values.setdefault("train_ids", str(int(values["ids"]) // 2))
    height, width = map(int, values["size"].split("x"))
    ids, images, cameras, seed = (int(values[key]) for key in ("ids", "images", "cameras", "seed"))
    try:
        persons = SyntheticPersons(ids, images, cameras, seed, (height, width), place=values["place"])
    except ValueError as e:
        raise ValueError(f"{text}: {e}") from None
    full = PREFIX + ",".join(f"{key}={value}" for key, value in values.items())
    return Recipe(full, persons, int(values["train_ids"]) if splits else None)
