"""The package as a whole: a quiet import, public names, documentation that is true, one version.

Python in README.md runs here, fence by fence in one namespace, in a folder that holds

    query.jpg  a.jpg  b.jpg  frame.jpg  my_crops/*.jpg      generated persons
    official.pth                                            a PASS ViT-S of random weights as the authors publish them
    my_model/                                               what `passreid convert official.pth my_model/` wrote
    run/export/                                             what `passreid-train my_crops/` wrote, of a small model

A fence that cannot run (network, other files) has `<!-- not run: REASON -->` on the line before it.
"""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import timm
import torch
from PIL import Image

import passreid_models
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.run import train
from passreid_models.synthetic import SyntheticPersons
from passreid_models.training import RunConfig
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {"sklearn", "faiss", "matplotlib", "onnx", "onnxruntime", "gdown", "torchvision", "pandas", "scipy", "tqdm"}


def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(passreid_models.__path__, "passreid_models.")
    return [passreid_models, *(importlib.import_module(m.name) for m in found if not m.name.endswith("__main__"))]


# ---- Import


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory) -> dict[str, Any]:
    """What `import passreid_models` does in a new process where every warning is an error."""
    code = """if True:
        import json, sys
        from pathlib import Path
        import timm
        before = set(sys.modules)
        import passreid_models
        modules = {"before": sorted(before), "added": sorted(set(sys.modules) - before)}
        Path(sys.argv[1]).write_text(json.dumps(modules))
    """
    file = tmp_path_factory.mktemp("import") / "modules.json"
    command = [sys.executable, "-W", "error", "-c", code, str(file)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    modules = json.loads(file.read_text()) if file.exists() else {"before": [], "added": []}
    return {"code": process.returncode, "out": process.stdout, "err": process.stderr, **modules}


def test_importing_says_nothing_and_warns_of_nothing(fresh_import):
    assert (fresh_import["out"], fresh_import["err"], fresh_import["code"]) == ("", "", 0)


def test_importing_adds_nothing_heavy_to_what_timm_imports(fresh_import):
    assert "timm" in fresh_import["before"]
    assert "passreid_models.pass_vit" in fresh_import["added"]
    assert HEAVY.isdisjoint(name.split(".")[0] for name in fresh_import["added"])


def test_rooms_that_registering_does_not_need_are_imported_when_they_are_asked_for(fresh_import):
    rooms = {name.removeprefix("passreid_models.").split(".")[0] for name in fresh_import["added"]}
    assert rooms.isdisjoint({"embed", "retrieval", "synthetic", "demo", "cli", "publish"})


# ---- Names, version, files


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.__name__)
def test_every_name_in_all_is_there_once(module):
    names = getattr(module, "__all__", [])
    assert [name for name in names if not hasattr(module, name)] == []
    assert len(set(names)) == len(names)


def test_the_public_names_are_the_ones_of_the_design():
    promised = {"Embedder", "rank", "convert_checkpoint", "load_report", "list_weights"}
    assert promised <= set(passreid_models.__all__)


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="'passreid_models' has no attribute 'Embeder'"):
        passreid_models.Embeder  # noqa: B018


def test_the_package_is_marked_as_typed():
    assert Path(passreid_models.__file__).with_name("py.typed").is_file()


def test_the_version_is_written_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", passreid_models.__version__)
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "passreid_models/__init__.py"
    sources = [ROOT / "pyproject.toml", *(ROOT / "passreid_models").rglob("*.py")]
    assert [p.name for p in sources if f'"{passreid_models.__version__}"' in p.read_text()] == ["__init__.py"]


@pytest.mark.parametrize("script", PROJECT["project"]["scripts"])
def test_console_scripts_point_at_functions_that_return_an_exit_code(script):
    module, function = PROJECT["project"]["scripts"][script].split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    assert signature.return_annotation is int
    assert all(p.default is not p.empty for p in signature.parameters.values())


# ---- Docstrings


def documented_arguments(docstring: str) -> list[str] | None:
    """Names in the "Args:" section of a Google docstring, in order; None without one."""
    section = re.search(r"^Args:\n((?:(?: .*)?\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return re.findall(r"^    \*{0,2}(\w+)(?: \(.*?\))?:", section[1], re.MULTILINE) if section else None


def public_callables() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Name, callable and docstring of public functions, methods and classes of the package."""
    for module in modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            path = f"{module.__name__}.{name}"
            if inspect.isclass(thing):
                if not issubclass(thing, RunConfig):  # tests/training/test_config.py
                    yield path, thing, thing.__doc__ or ""
                for method, member in vars(thing).items():
                    function = getattr(member, "__func__", member)  # of class methods
                    if inspect.isfunction(function) and (method == "__init__" or not method.startswith("_")):
                        yield f"{path}.{method}", function, function.__doc__ or ""
            elif callable(thing):
                yield path, thing, thing.__doc__ or ""


def signature_arguments(thing: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def test_documented_arguments_are_those_of_the_signature_in_its_order():
    documented = {
        name: (arguments, signature_arguments(thing))
        for name, thing, docstring in public_callables()
        if (arguments := documented_arguments(docstring)) is not None
    }
    assert {"passreid_models.embed.Embedder.__init__", "passreid_models.retrieval.ranking.rank"} <= documented.keys()
    assert {name: both for name, both in documented.items() if both[0] != both[1]} == {}


def test_the_docstring_reader_finds_arguments_and_not_other_sections():
    docstring = """Do it.

        Args:
            first: One, which
                goes on: here.

            second (int): Two.
            **rest: Three.

        Returns:
            value: Not an argument.
        """
    assert documented_arguments(docstring) == ["first", "second", "rest"]
    assert documented_arguments("Do it.\n\n    Returns:\n        value: This.\n") is None


# ---- README.md


class Fence(NamedTuple):
    line: int  # of its first line of code
    code: str
    reason: str | None  # why it is not run; None where it is


def python_fences(text: str) -> list[Fence]:
    """Python fences of a Markdown text, also indented ones."""
    fences = []
    pattern = r"^(?P<indent> *)```(?:python|py)\b[^\n]*\n(?P<code>.*?)^ *```[ ]*$"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].splitlines()
        comment = re.fullmatch(r"\s*<!-- not run:(.*)-->\s*", before[-1]) if before else None
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        fences.append(Fence(len(before) + 2, code, comment[1].strip() if comment else None))
    return fences


def test_python_fences_are_found_with_their_lines_and_reasons():
    text = (
        "# A\n```python\nx = 1\n```\n\n<!-- not run: network -->\n```python\ny\n```\n<!-- not run: -->\n```py\nz\n```\n"
    )
    text += "- item\n  ```python\n  if x:\n      x = 2\n  ```\n```bash\nls\n```\n```pycon\n>>> 1\n```\n"
    assert python_fences(text) == [
        Fence(3, "x = 1\n", None),
        Fence(8, "y\n", "network"),
        Fence(12, "z\n", ""),
        Fence(16, "if x:\n    x = 2\n", None),
    ]


def save_official(path: Path) -> None:
    """A PASS ViT-S of random weights in the layout of the authors' pre-training file: token and position apart."""
    tensors = timm.create_model("pass_vit_small_patch16").state_dict()
    cls, parts = tensors.pop("cls_token"), tensors.pop("reg_token")
    tensors |= {"cls_token": cls, "cls_pos": torch.zeros_like(cls)}
    for i, part in enumerate(parts.split(1, dim=1), start=1):
        tensors |= {f"part_token{i}": part.clone(), f"part{i}_pos": torch.zeros_like(part)}
    torch.save({"teacher": {f"backbone.{key}": value for key, value in tensors.items()}}, path)


@pytest.fixture
def readme_folder(tmp_path, monkeypatch) -> Path:
    data = SyntheticPersons(4, images_per_id=2, cameras=2, seed=11)
    images = [data[i][0] for i in range(len(data))]
    names = ["query", "a", "b", *(f"my_crops/{i}" for i in range(5))]
    (tmp_path / "my_crops").mkdir()
    for name, image in zip(names, images, strict=True):
        image.save(tmp_path / f"{name}.jpg")
    frame = Image.new("RGB", (640, 360), "gray")
    for i in range(4):
        frame.paste(images[i], (20 + 160 * i, 60))
    frame.save(tmp_path / "frame.jpg")
    save_official(tmp_path / "official.pth")
    passreid_models.convert_checkpoint(tmp_path / "official.pth", tmp_path / "my_model")
    sizes = dict(size=(64, 32), num_prototypes=16, hidden_dim=16, bottleneck_dim=8, batch_size=2, epochs=1)
    data, out = str(tmp_path / "my_crops"), str(tmp_path / "run")
    config = PretrainConfig(data=data, out=out, model="test_pass_vit", workers=0, **sizes)
    train(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_python_fence_of_the_readme_runs_or_says_why_not(readme_folder):
    text = (ROOT / "README.md").read_text()
    fences = python_fences(text)
    assert any(fence.reason is None for fence in fences)
    assert [fence.line for fence in fences if fence.reason == ""] == []  # a reason has to be given
    namespace: dict[str, Any] = {"__name__": "README"}
    for fence in fences:
        if fence.reason is None:
            blank = "\n" * (fence.line - 1)  # so that a traceback shows the line of README.md
            exec(compile(blank + fence.code, str(ROOT / "README.md"), "exec"), namespace)
