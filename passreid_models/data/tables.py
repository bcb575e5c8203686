"""CSV files of labels, as scripts and spreadsheets write them.

path,pid,camid,split            in any order and case; camid may be left out, other columns are ignored
crops/0001.jpg,anna,lobby,train
"""

import codecs
import csv
import os
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from passreid_models.data.layouts import MAX_LIST_BYTES, SPLITS, Layout, Row
from passreid_models.runtime import read_bytes

__all__ = ["read_csv"]

SEPARATORS = ",;\t"
REQUIRED = ("path", "pid", "split")
NO_VALUE = {"", "nan", "NaN", "NA", "N/A", "#N/A", "<NA>", "null", "NULL", "None"}
"""Blank cells, and how programs write them."""
ROUNDED = re.compile(r"-?[0-9]([.,][0-9]+)?[eE]\+?[0-9]{2,}")
CAMERA_COLUMN = re.compile(r"cam(era)?s?[ _.-]*(ids?|no|nr|num(ber)?|index|name)?")
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
"""Encodings by their first bytes; UTF-32's begin as UTF-16's do."""
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def read_csv(file: Path) -> Layout:
    """Read a CSV file with the columns path, pid, split, and camid if cameras are known.

    Identities and cameras are any text; ``-1`` is junk, or an unknown camera. ``test`` stands for ``gallery`` too.
    Commas, semicolons or tabs separate the values; the text is UTF-8, or UTF-16 or UTF-32 with its mark.

    Raises:
        ValueError: If columns are missing, cameras have another name than camid, or a line has a blank or rounded value
            or an unknown split.
    """
    layout = Layout("CSV", file.parent, parts=dict.fromkeys(SPLITS, file.name))
    rows = _rows(file)
    columns = next(rows)[1]
    for number, cells in rows:
        place = f"{file}:{number}"
        if len(cells) > len(columns):
            raise ValueError(
                f"{place}: {len(cells)} values for {len(columns)} columns; expected quotes around one with a separator"
            )
        values = dict(zip(columns, cells, strict=False))
        names = [*REQUIRED, *(["camid"] if "camid" in columns else [])]
        if blank := [name for name in names if values.get(name, "") in NO_VALUE]:
            raise ValueError(f"{place}: no {' and no '.join(blank)}; expected a value")
        for name in ("pid", "camid"):
            if ROUNDED.fullmatch(values.get(name, "")):
                raise ValueError(
                    f"{place}: {name} is {values[name]!r}, a number that a spreadsheet has rounded; expected all "
                    "of its digits: format the column as text"
                )
        split = values["split"].lower()
        split = "gallery" if split == "test" else split
        if split not in SPLITS:
            raise ValueError(f"{place}: split is {values['split']!r}; expected train, query or gallery")
        path = os.path.normpath(os.path.join(file.parent, _path(file.parent, values["path"], place)))
        layout.rows[split].append(Row(path, values["pid"], values.get("camid", ""), f"{file.name}:{number}"))
    if not any(layout.rows.values()):
        raise ValueError(f"{file}: no line after the first; expected one line per image: path,pid,camid,split")
    return layout


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of each line that is not blank; first the names of the columns, in lower case."""
    lines = list(StringIO(_text(file), newline=""))
    start = next((i for i, line in enumerate(lines) if line.strip(f"{SEPARATORS} \r\n")), 0)
    separators, head = SEPARATORS, "".join(lines[start : start + 1])
    if given := re.match(r"\"?sep=(.)", head, re.IGNORECASE):  # a line for Excel
        separators, start = given[1], start + 1
        head = "".join(lines[start : start + 1])
    heads = {separator: _columns(head, separator) for separator in separators}
    separator = next((sep for sep, columns in heads.items() if {*REQUIRED} <= {*columns}), separators[0])
    columns = heads[separator]
    if missing := [name for name in REQUIRED if name not in columns]:
        raise ValueError(
            f"{file}: the first line names no column {' and '.join(missing)} but {', '.join(columns) or 'none'}"
            "; expected path,pid,camid,split (camid may be left out)"
        )
    if twice := [name for name in (*REQUIRED, "camid") if columns.count(name) > 1]:
        raise ValueError(f"{file}:{start + 1}: the column {twice[0]} is named twice; expected it once")
    if camera := next((name for name in columns if CAMERA_COLUMN.fullmatch(name) and "camid" not in columns), None):
        raise ValueError(f"{file}:{start + 1}: the column {camera} is not read; expected the name camid for cameras")
    yield start + 1, columns
    table = csv.reader(lines[start + 1 :], delimiter=separator, skipinitialspace=separator != "\t", strict=True)
    try:
        for line in table:
            cells = [cell.strip() for cell in line]
            while len(cells) > len(columns) and not cells[-1]:
                cells.pop()
            if any(cells):
                yield start + 1 + table.line_num, cells
    except csv.Error as e:
        raise ValueError(f"{file}:{start + 1 + table.line_num}: no line of a CSV file: {e}") from None


def _columns(head: str, separator: str) -> list[str]:
    try:
        names = next(csv.reader([head], delimiter=separator, skipinitialspace=True))
    except csv.Error:  # longer than a cell may be
        return []
    names = [name.strip().lower() for name in names]
    while names and not names[-1]:
        names.pop()
    return names


def _text(file: Path) -> str:
    content = read_bytes(file, MAX_LIST_BYTES)
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    if b"\0" in content and encoding.startswith("utf-8"):
        raise ValueError(f"{file}: UTF-16 without its mark, or no text; expected a CSV file in UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{file}:{line}: no CSV file in UTF-8: {e}; expected 'CSV UTF-8' of a spreadsheet") from None


def _path(folder: Path, path: str, place: str) -> str:
    """Path with the separators of this system; a backslash stays where it is part of a file's name."""
    if os.sep == "\\" or not ("\\" in path or WINDOWS.match(path)) or os.path.lexists(folder / path):
        return path
    if WINDOWS.match(path):
        raise ValueError(f"{place}: {path!r} is a path on Windows; expected one relative to the CSV file's folder")
    return path.replace("\\", "/")
