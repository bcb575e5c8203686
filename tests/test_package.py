"""The package as a whole: a quiet import, public names, documentation that is true, one version.

Python in README.md and in each page of docs/ runs here, fence by fence in one namespace a page, in a folder that holds

    query.jpg  a.jpg  b.jpg  frame.jpg  my_crops/*.jpg      generated persons
    official.pth                                            a PASS ViT-S of random weights as the authors publish them
    my_model/                                               what `passreid convert official.pth my_model/` wrote
    run/export/                                             what `passreid-train my_crops/` wrote, of a small model

A fence that cannot run (network, other files) has `<!-- not run: REASON -->` on the line before it. Of shell fences the
command lines of this package are parsed and their settings checked, not run; links, images and scripts that the
documents name must be there.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import timm
import torch
import yaml
from PIL import Image

import passreid_models
from passreid_models import cli
from passreid_models.checkpoints.publish import CITATION
from passreid_models.pretrain import PretrainConfig, train
from passreid_models.pretrain.config import PRESETS
from passreid_models.reid import ClusterConfig, FinetuneConfig
from passreid_models.reid.config import PRESETS as REID_PRESETS
from passreid_models.synthetic import SyntheticPersons
from passreid_models.training import RunConfig
from passreid_models.training.command import read_config
from tests import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "MODEL_CARD.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
CONFIGS: dict[str, tuple[Any, Any]] = {
    "train": (PretrainConfig, PRESETS),
    "finetune": (FinetuneConfig, REID_PRESETS["finetune"]),
    "cluster": (ClusterConfig, REID_PRESETS["cluster"]),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = {
    "sklearn",
    "faiss",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torchvision",
    "pandas",
    "scipy",
    "tqdm",
}


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


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 itself warns of a temporary folder")
def test_importing_says_nothing_and_warns_of_nothing(fresh_import):
    assert (fresh_import["out"], fresh_import["err"], fresh_import["code"]) == ("", "", 0)


def test_importing_adds_nothing_heavy_to_what_timm_imports(fresh_import):
    assert "timm" in fresh_import["before"]
    assert "passreid_models.pass_vit" in fresh_import["added"]
    assert HEAVY.isdisjoint(name.split(".")[0] for name in fresh_import["added"])


def test_rooms_that_registering_does_not_need_are_imported_when_they_are_asked_for(fresh_import):
    rooms = {name.removeprefix("passreid_models.").split(".")[0] for name in fresh_import["added"]}
    assert rooms.isdisjoint({"embed", "retrieval", "synthetic", "export", "demo", "cli", "publish"})


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
    assert all((ROOT / name / "py.typed").is_file() for name in ("passreid_models", "passreid_synth3d"))


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


# ---- Dependencies, wheel


def requirement(text: str) -> tuple[str, str]:
    """Name of a library as pip normalises it, and what follows it."""
    name, rest = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", text).groups()
    return name.lower().replace("_", "-"), rest


def test_every_dependency_has_a_lower_bound_the_same_everywhere_and_a_licence_in_the_list():
    extras = PROJECT["project"]["optional-dependencies"]
    own = [requirement(text) for key, group in extras.items() if key not in ("test", "docs") for text in group]
    own += map(requirement, PROJECT["project"]["dependencies"])
    assert all(rest.startswith(">=") for _, rest in own)
    tested = dict(map(requirement, extras["test"]))
    assert {name: rest for name, rest in own if tested.get(name, rest) != rest} == {}
    table = (ROOT / "SECURITY.md").read_text().partition("| libraries | licence |")[2].partition("\n\n")[0]
    cells = [re.sub(r" \(.*?\)", "", row.split("|")[1]).split(",") for row in table.splitlines()[2:]]
    assert {name for name, _ in own} == {name.strip() for cell in cells for name in cell}


def tracked(folder: Path) -> set[str]:
    """Files below a folder, without what git ignores."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip


@pytest.mark.slow
def test_the_wheel_holds_the_packages_weights_and_licences_alone_and_its_bytes_follow_from_them(tmp_path):
    names = ("passreid_models", "passreid_synth3d", "weights", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
    wheels = []
    for tree in ("a", "b/other"):  # with the times of the copy
        (tmp_path / tree).mkdir(parents=True)
        for name in (*names, ".gitignore"):
            copy = partial(shutil.copytree, copy_function=shutil.copy) if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tmp_path / tree / name)
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / tree / "dist"]
        subprocess.run(command, cwd=tmp_path / tree, check=True, capture_output=True)
        wheels += (tmp_path / tree / "dist").glob("*.whl")
    contents = [wheel.read_bytes() for wheel in wheels]
    assert contents[0] == contents[1]
    assert len(contents[0]) < 75e6
    info = f"passreid_models-{passreid_models.__version__}.dist-info"
    expected = {f"{name}/{file}" for name in names[:2] for file in tracked(ROOT / name)}
    expected |= {f"passreid_models/_weights/{file}" for file in tracked(ROOT / "weights")}
    expected |= {f"{info}/{file}" for file in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
                                               "licenses/NOTICE")}  # fmt: skip
    assert set(zipfile.ZipFile(wheels[0]).namelist()) == expected


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


# ---- Documents


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class Fence(NamedTuple):
    line: int  # of its first line of code
    code: str
    reason: str | None  # why it is not run; None where it is


def fences_of(text: str, languages: str = "python|py") -> list[Fence]:
    """Fences of a Markdown text in these languages, also indented ones."""
    fences = []
    pattern = rf"^(?P<indent> *)```(?:{languages})\b[^\n]*\n(?P<code>.*?)^ *```[ ]*$"
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
    assert fences_of(text) == [
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


@pytest.fixture(scope="module")
def written_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    data = SyntheticPersons(4, images_per_id=2, cameras=2, seed=11)
    images = [data[i][0] for i in range(len(data))]
    names = ["query", "a", "b", *(f"my_crops/{i}" for i in range(5))]
    (folder / "my_crops").mkdir()
    for name, image in zip(names, images, strict=True):
        image.save(folder / f"{name}.jpg")
    frame = Image.new("RGB", (640, 360), "gray")
    for i in range(4):
        frame.paste(images[i], (20 + 160 * i, 60))
    frame.save(folder / "frame.jpg")
    save_official(folder / "official.pth")
    passreid_models.convert_checkpoint(folder / "official.pth", folder / "my_model")
    sizes = dict(size=(64, 32), num_prototypes=16, hidden_dim=16, bottleneck_dim=8, batch_size=2, epochs=1)
    crops, run = str(folder / "my_crops"), str(folder / "run")
    train(PretrainConfig(data=crops, out=run, model="test_pass_vit", workers=0, **sizes))
    return folder


@pytest.fixture
def documents_folder(written_folder, monkeypatch) -> Path:
    monkeypatch.chdir(written_folder)
    monkeypatch.setenv("PASSREID_CACHE", str(written_folder / "cache"))
    return written_folder


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_python_fence_of_a_page_runs_or_says_why_not(page, documents_folder):
    fences = fences_of(page.read_text())
    assert [fence.line for fence in fences if fence.reason == ""] == []  # a reason has to be given
    namespace: dict[str, Any] = {"__name__": page.stem}
    for fence in fences:
        if fence.reason is None:
            blank = "\n" * (fence.line - 1)  # so that a traceback shows the line of the page
            exec(compile(blank + fence.code, str(page), "exec"), namespace)


def test_readme_and_the_pages_of_the_models_show_python_that_runs():
    running = {relative(page) for page in PAGES if any(fence.reason is None for fence in fences_of(page.read_text()))}
    names = (
        "cluster",
        "embed",
        "evaluate",
        "export",
        "finetune",
        "gallery",
        "models",
        "pretraining",
        "start",
        "synthetic",
    )
    assert {"README.md", *(f"docs/{name}.md" for name in names)} <= running


# ---- Command lines in documents


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of each command in the shell fences of a text."""
    for fence in fences_of(text, "bash|sh|console"):
        for line in fence.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


def own_words(words: list[str]) -> list[str] | None:
    """What follows ``passreid``, however it was called; None for another program."""
    if words[:1] == ["passreid-train"]:
        return ["train", *words[1:]]
    if words[:1] == ["passreid"]:
        return words[1:]
    for module in ("passreid_models", "passreid_models.cli"):
        if module in words and words[words.index(module) - 1] == "-m":
            return words[words.index(module) + 1 :]
    return None


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the parser says against a command of this package; empty where it takes it."""
    if words[0] in CONFIGS:
        name, config, presets = words[0], *CONFIGS[words[0]]
        try:
            read_config(words[1:], config, presets, f"passreid {name}", "", "data")
        except ValueError as e:
            return str(e)
        return ""
    try:
        cli._parser().parse_args(words)
    except SystemExit as e:
        return capsys.readouterr().err if e.code else ""
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_command_line_of_this_package_is_taken_with_its_settings(document, capsys):
    commands = [words for line in command_lines(document.read_text()) if (words := own_words(line))]
    assert {shlex.join(words): error for words in commands if (error := refused(words, capsys))} == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_script_that_a_document_calls_is_there_with_its_options(document):
    inline = [shlex.split(code) for code in re.findall(r"`(python [^`]+)`", document.read_text())]
    wrong = []
    for words in [*inline, *command_lines(document.read_text())]:
        if words[0] == "python" and words[1].endswith(".py"):
            script = ROOT / words[1]
            source = script.read_text() if script.is_file() else ""
            options = [word for word in words if word.startswith("--")]
            wrong += [words] if not source or any(f'"{option}"' not in source for option in options) else []
    assert wrong == []


def test_the_reader_of_commands_finds_them_however_they_are_called(capsys):
    text = """```bash
pip install . && passreid demo --ids 3 # a comment
torchrun --nproc-per-node 2 -m passreid_models finetune \\
    data/ --initial x
passreid-train a/ --hue=0.1 --gray-probability 0
ls && passreid eval a --modell b
```"""
    own = [words for line in command_lines(text) if (words := own_words(line))]
    assert [words[0] for words in own] == ["demo", "finetune", "train", "eval"]
    errors = [refused(words, capsys) for words in own[:3]]
    assert errors[0] == ""
    assert "unrecognized arguments: --initial" in errors[1]
    assert "unrecognized arguments: --gray_probability" in errors[2]
    assert "--modell" in refused(own[3], capsys)


def all_options() -> set[str]:
    """Options of all commands and scripts, with dashes."""
    names = {"--config", "--preset", "--help", "--version"}
    names |= {f"--{field.name.replace('_', '-')}" for config, _ in CONFIGS.values() for field in fields(config)}
    parsers = [cli._parser()]
    while parsers:
        for action in parsers.pop()._actions:
            names |= set(action.option_strings)
            parsers += action.choices.values() if isinstance(action.choices, dict) else []
    for script in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        names |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))
    return names | {"--signal", "--max-restarts", "--nnodes"}  # of Slurm and torchrun


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_option_named_in_the_text_exists(document):
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(re.findall(r"`([^`]+)`", prose(document.read_text()))))
    assert set(named) - all_options() == set()


def test_git_ignores_what_the_commands_of_the_pages_write():
    ignored = set((ROOT / ".gitignore").read_text().split())
    written = set()
    for page in PAGES:
        for words in filter(None, map(own_words, command_lines(page.read_text()))):
            named = {
                words[i + 1] for i, word in enumerate(words) if word in ("-o", "--out", "--make-data", "--pictures")
            }
            written |= named | ({words[2]} if words[0] == "convert" else set())
    assert len(written) > 8
    first = {f"/{name.partition('/')[0]}" for name in written}
    assert first - {name.rstrip("/") for name in ignored} == set()
    assert "/passreid_demo.png" in ignored


# ---- Links


def prose(text: str) -> str:
    """A Markdown text without its fences."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    names: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).lower().replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return set(names)


def broken_links(document: Path) -> list[str]:
    """Relative links and images of a document that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_relative_link_and_image_leads_somewhere(document):
    assert broken_links(document) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.md").write_text("# One, `two` & three\n\n## Again\n\n```bash\n# [x](none.md)\n```\n## Again\n")
    links = (
        "[a](a.md) [b](a.md#one-two--three) [c](a.md#again-1) [d](https://x.y/z) ![e](e.png) [f](#here) [g](a.md#no)"
    )
    (tmp_path / "b.md").write_text(f"# Here\n{links} [h](#x)\n")
    assert broken_links(tmp_path / "b.md") == ["e.png", "a.md#no", "#x"]


def test_every_page_is_reached_from_the_readme_by_links():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document not in reached:
            reached.add(document)
            names = re.findall(r"\]\(([^)\s:#]+)[)#]", document.read_text()) if document.suffix == ".md" else []
            waiting += [(document.parent / name).resolve() for name in names]
    others = [ROOT / name for name in ("CITATION.cff", "LICENSE", "NOTICE", "examples/passreid.ipynb")]
    assert {*DOCUMENTS, *others} - reached == set()


# ---- The site, and pages that follow the code


def test_the_reference_has_all_public_names_and_rooms():
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    things = {name: importlib.import_module(name) for name in named if name.count(".") < 2}
    shown = {getattr(module, name) for module in things.values() for name in module.__all__}
    shown |= {
        getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
        for name in named - set(things)
    }
    assert [name for name in passreid_models.__all__ if getattr(passreid_models, name) not in shown] == []
    rooms = {f"passreid_models.{name}" for name in ("checkpoints", *passreid_models._ROOMS)}
    assert [room for room in rooms if not any(f"{name}.".startswith(f"{room}.") for name in named)] == []


def messages() -> list[str]:
    """Texts in the source of the package, with "..." for the values that are put in."""
    texts = []
    for path in (ROOT / "passreid_models").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_message_of_troubleshooting_is_one_of_the_code():
    known = messages()
    fences = fences_of((ROOT / "docs" / "troubleshooting.md").read_text(), "text")
    quoted = [line for fence in fences for line in fence.code.splitlines()]
    assert len(quoted) > 8

    def is_known(message: str) -> bool:
        """Whether the code holds all that stands between the dots, each piece in one text."""
        return all(any(piece in text for text in known) for piece in filter(None, map(str.strip, message.split("..."))))

    assert [message for message in quoted if not is_known(message)] == []
    assert not is_known("... has no bundled weight that is known")


# ---- README.md, CITATION.cff


def test_the_readme_is_short_and_has_one_test_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert re.findall(r"^pip install .* && pytest", text, re.MULTILINE) == [
        'pip install -e ".[test]" && pytest'
    ]  # .ci/run
    assert "\npip install . && passreid demo\n" in text


def test_the_readme_cites_the_paper_as_the_model_cards_do():
    assert CITATION in (ROOT / "README.md").read_text()


def test_the_citation_file_has_the_fields_that_its_format_asks_for_and_no_second_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["cff-version"] == "1.2.0"
    assert citation.get("version", passreid_models.__version__) == passreid_models.__version__
    paper = citation["preferred-citation"]
    assert paper.keys() >= {"type", "title", "authors"}
    assert [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]] == re.search(
        r"author=\{(.*?)\}", CITATION
    )[1].split(" and ")
