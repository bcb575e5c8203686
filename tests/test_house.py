"""The house: which room may import which, no name twice, none of the standard library's."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "passreid_models"
GROUND = {"runtime", "architectures", "figure", "layers", "schedules"}
# a room, and those that its files may import besides their own
ROOMS = {
    "runtime": set(),
    "architectures": set(),
    "figure": {"runtime"},
    "layers": set(),
    "schedules": set(),
    "device": {"runtime"},
    "retrieval": {"runtime"},
    "checkpoints": GROUND,
    "pass_vit": GROUND | {"checkpoints"},
    "synthetic": {"runtime"},
    "data": {"runtime", "synthetic"},
    "embed": GROUND | {"device", "checkpoints", "pass_vit", "data"},
    "gallery": {"runtime", "device", "retrieval", "embed"},
    "evaluation": GROUND | {"device", "retrieval", "checkpoints", "pass_vit", "data", "embed"},
    "export": {"runtime", "architectures", "checkpoints", "synthetic", "embed"},
    "training": GROUND | {"device", "checkpoints", "pass_vit", "data"},
    "pretrain": GROUND | {"device", "checkpoints", "pass_vit", "data", "evaluation", "training"},
    "reid": GROUND | {"device", "retrieval", "checkpoints", "pass_vit", "data", "embed", "evaluation", "training"},
    "demo": {"runtime", "figure", "retrieval", "embed", "evaluation", "synthetic"},
    # passreid_models/__init__.py
    "": {"pass_vit", "checkpoints", "embed", "evaluation", "export", "gallery", "retrieval", "synthetic"},
    "cli": {"", "runtime", "architectures", "device", "demo", "checkpoints", "data", "embed", "evaluation", "export",
            "training", "pretrain", "reid", "passreid_synth3d"},
    "__main__": {"cli"},
    "passreid_synth3d": {"runtime", "synthetic", "data"},
}  # fmt: skip
VERSION = {"checkpoints", "export", "training"}  # they write the version of the package, imported when they do
TWICE = {"__init__", "config", "run", "trainer", "batches", "optim"}


def files(room: str) -> list[Path]:
    folder = ROOT / room if room == "passreid_synth3d" else PACKAGE / room
    if room and folder.is_dir():
        return sorted(folder.rglob("*.py"))
    return [PACKAGE / f"{room or '__init__'}.py"]


def imported(file: Path) -> set[str]:
    """Rooms that a file imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "passreid_models":
            names = [f"passreid_models.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "passreid_synth3d":
                found.add(package)
            elif package == "passreid_models":
                room = rest.partition(".")[0]
                found.add(room if room in ROOMS else "")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_above_it(room):
    allowed = ROOMS[room] | {room} | ({""} if room in VERSION else set())
    strays = {file.relative_to(ROOT).as_posix(): imported(file) - allowed for file in files(room)}
    assert {name: rooms for name, rooms in strays.items() if rooms} == {}


def test_every_file_belongs_to_a_room():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} == set(ROOMS) - {"", "passreid_synth3d"}


def test_the_table_has_no_circle():
    order: list[str] = []
    while len(order) < len(ROOMS):
        free = [room for room in ROOMS if room not in order and ROOMS[room] <= set(order)]
        assert free, set(ROOMS) - set(order)
        order += free


def test_no_file_name_occurs_twice_and_none_is_of_the_standard_library():
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "synthetic"]
    names = Counter(path.stem for path in paths)
    assert {name for name, count in names.items() if count > 1} - TWICE == set()
    rooms = {path.parent.name for path in paths}
    assert (set(names) | rooms | {"passreid_synth3d"}) & sys.stdlib_module_names == set()


def test_tests_mirror_the_rooms():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {*ROOMS, "synth3d"}


def test_text_is_read_and_written_as_utf8_whatever_the_locale():
    strays = []
    folders = [PACKAGE, *(ROOT / name for name in ("passreid_synth3d", "examples", "benchmarks"))]
    for file in [path for folder in folders for path in folder.rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or any(k.arg in ("encoding", None) for k in node.keywords):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            is_text = any(isinstance(a, ast.Constant) and a.value in ("r", "w", "a", "x", "r+") for a in node.args)
            if name in ("read_text", "write_text") or (name == "open" and is_text):
                strays.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert strays == []
