"""Labels as text become numbers: one for each identity and camera in all splits."""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Context, Decimal

import numpy as np

from passreid_models.data.folder_names import VIEWS
from passreid_models.data.layouts import SPLITS, Layout, Row

__all__ = ["number_cameras", "number_ids", "settle"]

NUMBER = re.compile(r"[+-]?([0-9]+([.,][0-9]*)?|[.,][0-9]+|[0-9]([.,][0-9]*)?[eE][+-]?[0-9]{1,2})")
GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?P<mark>[.,' ])[0-9]{3}((?P=mark)[0-9]{3})*((?!(?P=mark))[.,][0-9]*)?")
"""Number with a mark before each three digits, such as 1,234 and 1.234,0."""
SIGNS = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d\uff0b\uff0e\uff0c\u066b\u066c\u2019", "--------+.,,,'"
)
CAMERA = re.compile(rf"(?:ch?|{VIEWS})[ _-]*(?![^\W\d_])(.+)", re.IGNORECASE)


def settle(layout: Layout) -> tuple[list[str], list[str], list[str]]:
    """Bring the rows of a layout into one form: a spelling for each number, and a row for each image of a split.

    ``01``, ``1.0`` and ``1,0``, as spreadsheets write them, become ``1``. Where one dataset has two spellings of a
    number, such as ``1`` and ``+1``, or cameras ``1`` and ``view 01``, or two labels that look the same, they may be
    one person or two, so they are refused.

    Args:
        layout: Layout; its rows are replaced.

    Returns:
        Places of the rows that repeat an image of their split, which are left out: files with lines; identities that
        differ only in case, separators or zeros in front, such as ``Anna1 = anna01``; and such cameras.

    Raises:
        ValueError: If two labels are equal as numbers or look the same, but differ as text, or an image has two
            identities or cameras.
    """
    rows = [row for split in SPLITS for row in layout.rows[split]]
    pids = _spellings(layout, "identity", rows, [row.pid for row in rows])
    camids = _spellings(layout, "camera", rows, [row.camid for row in rows])
    camids = {text: "" if camid == "-1" else camid for text, camid in camids.items()}
    first: dict[str, Row] = {}
    repeated = []
    for split in SPLITS:
        kept: dict[str, Row] = {}
        for given in layout.rows[split]:
            row = Row(given.path, pids[given.pid], camids[given.camid], given.line)
            known = first.setdefault(row.path, row)
            if (row.pid, row.camid) != (known.pid, known.camid):
                label, one, other = "identity", row.pid, known.pid
                if one == other:
                    label, one, other = "camera", row.camid or "unknown", known.camid or "unknown"
                raise ValueError(
                    f"{_place(layout, row)}: {row.path} has {label} {one}, and {other} in {_place(layout, known)}; "
                    "expected one identity and one camera for an image"
                )
            if kept.setdefault(row.path, row) is not row:
                repeated.append(row.line or row.path)
        layout.rows[split] = list(kept.values())
    return repeated, _alike(sorted(set(pids.values()))), _alike(sorted(set(camids.values())))


def _spellings(layout: Layout, label: str, rows: list[Row], texts: list[str]) -> dict[str, str]:
    """Numbers among the labels of the rows in their shortest spelling; other labels as they are."""
    short: dict[str, str] = {}
    first: dict[str, str] = {}
    for text in dict.fromkeys(texts):
        visible = _visible(text)
        numbers = _numbers(visible)
        short[text] = numbers[0] if numbers else text
        if label == "camera" and (camera := CAMERA.fullmatch(visible)):
            numbers = _numbers(camera[1])
        for key in (visible, *numbers):
            known = first.setdefault(key, text)
            if known != text:
                one, other = (_place(layout, rows[texts.index(spelling)]) for spelling in (text, known))
                same = "is the same number" if numbers else "looks the same"
                raise ValueError(
                    f"{one}: {label} {text!r}, and {known!r} in {other}, which {same}; expected one spelling for one "
                    f"{label}"
                )
    return short


def _visible(text: str) -> str:
    """Text in one form of Unicode, without invisible characters and the spaces around it."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf")).strip()


def _numbers(text: str) -> list[str]:
    """Numbers that a text may stand for in their shortest spelling, the likeliest first; none if it is no number.

    Decimals may follow a comma, as in German spreadsheets, so that ``1,234`` is 1.234 or 1234.
    """
    plain = "".join(str(unicodedata.decimal(c, c)) for c in text).translate(SIGNS).removeprefix("'")
    readings = [plain.replace(",", ".")] if NUMBER.fullmatch(plain) else []
    if grouped := GROUPED.fullmatch(plain):
        readings.append(plain.replace(grouped["mark"], "").replace(",", "."))
    values = [Decimal(reading).normalize(Context(prec=len(plain))) for reading in readings]
    return [f"{value:f}" if value else "0" for value in values]  # not -0


def _alike(names: list[str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in names:
        if _numbers(name):  # their spellings are one already
            continue
        text = unicodedata.normalize("NFKC", name).casefold()
        words = re.findall(r"[^\W\d_]+|\d+|[^\w\s-]", text)  # letters, numbers, and each other sign
        groups.setdefault(" ".join(word.lstrip("0") or "0" for word in words) or text, []).append(name)
    return [" = ".join(group) for group in groups.values() if len(group) > 1]


def _place(layout: Layout, row: Row) -> str:
    return str(layout.root / (row.line or row.path))


def number_ids(labels: Sequence[list[str]]) -> list[np.ndarray]:
    """Number the identities of the three splits, given as text; int64 ``[N]`` each."""
    train, query, gallery = map(set, labels)
    names = train | query | gallery
    junk, zeros = {"-1"} & names, {name for name in names if not name.strip("0")}
    distractors = set() if zeros & (train | query) else zeros
    persons = _natural(names - junk - distractors)
    numbers = {int(name) for name in persons if name.isdecimal() and name.isascii()}
    if len(numbers) == len(persons) and max(numbers, default=0) < 1 << 62:
        pids = {name: int(name) or max(numbers) + 1 for name in persons}
    else:
        pids = {name: number for number, name in enumerate(persons, 1)}
    pids |= dict.fromkeys(junk, -1) | dict.fromkeys(distractors, 0)
    return [np.array([pids[name] for name in split], dtype=np.int64) for split in labels]


def number_cameras(labels: Sequence[list[str]]) -> list[np.ndarray]:
    """Number the cameras of the three splits, given as text, from 0; camera 1 is the first, unless there is a 0."""
    names = _natural({name for split in labels for name in split} - {""})
    numbers = {int(name) for name in names if name.isdecimal() and name.isascii()}
    if len(numbers) == len(names) and max(numbers, default=0) < 1 << 62:
        first = min(1, *numbers) if numbers else 1
        camids = {name: int(name) - first for name in names}
    else:
        camids = {name: number for number, name in enumerate(names)}
    camids[""] = -1
    return [np.array([camids[name] for name in split], dtype=np.int64) for split in labels]


def _natural(names: set[str]) -> list[str]:
    """Sort names, with the numbers in them by value."""
    return sorted(names, key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", name))])
