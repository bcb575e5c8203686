"""Every command on a full disk: one sentence that names the file, exit code 2, and nothing left there.

A limit of the size of a file stands for the full disk: it needs no root, and cuts a write short as a full disk does.
"""

import errno
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from passreid_models import Embedder, Gallery, SyntheticPersons, cli, export, export_model, save_pretrained
from passreid_models.runtime import atomic_buffer, check_file
from tests import ROOT

pytestmark = [
    pytest.mark.usefixtures("no_network"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, a dataset and the metrics of a run."""
    home = tmp_path_factory.mktemp("disk")
    torch.manual_seed(0)
    save_pretrained(timm.create_model("test_pass_vit", num_classes=0), home / "model")
    SyntheticPersons(4, 4, 2, size=(64, 32)).write_market1501(home / "data", train_ids=2)
    (home / "run").mkdir()
    rows = [{"step": i, "epoch": i / 4, "loss": 1 / i} for i in range(1, 9)]
    (home / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return home


COMMANDS = [
    "embed DATA/query -o OUT.safetensors --model MODEL",
    "embed DATA/query -o OUT.npz --model MODEL",
    "embed DATA/query -o OUT.csv --model MODEL",
    "eval DATA --no-cache --json OUT.json --model MODEL",
    pytest.param("eval DATA --no-cache --pictures OUT --model MODEL", marks=pytest.mark.slow),
    "parts DATA/query -o OUT.png --model MODEL",
    "parts DATA/query -o OUT.jpg --model MODEL",
    "gallery DATA -o OUT.html --model MODEL",
    "convert WEIGHTS OUT --num-heads 2",
    pytest.param("export MODEL OUT.pt2", marks=pytest.mark.slow),
    "export MODEL OUT.pt",
    "export MODEL OUT --format roboflow-reid",
    "plot RUN --out OUT.png",
    pytest.param("plot RUN --out OUT.pdf", marks=pytest.mark.slow),
    "plot RUN --out OUT.jpg",
    "data check DATA --json OUT.json",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_full_disk_names_its_file_and_leaves_nothing(command, home, tmp_path, capsys):
    places = {"DATA": home / "data", "MODEL": home / "model", "RUN": home / "run", "OUT": tmp_path / "disk" / "out"}
    places["WEIGHTS"] = ROOT / "tests" / "golden" / "upstream_backbone.pth"
    words = command.split()
    for name, path in places.items():
        words = [word.replace(name, str(path)) for word in words]
    with file_size(50):
        assert cli.main(words) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("passreid: ")]
    assert f"{tmp_path / 'disk' / 'out'}" in message
    assert "could not be written: " in message
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("share", [0.1, 0.999])
def test_a_generated_dataset_a_gallery_and_a_model_are_written_whole_or_not_at_all(share, home, tmp_path):
    embed = Embedder(str(home / "model"), device="cpu")
    gallery = Gallery(embed)
    gallery.add(["a", "b"], torch.randn(2, embed.dim))
    model = timm.create_model("test_pass_vit", num_classes=0)
    writers = {
        "persons": lambda path: SyntheticPersons(4, 4, 2, size=(64, 32)).write_market1501(path),
        "gallery.safetensors": gallery.save,
        "model": lambda path: save_pretrained(model, path),
    }
    for name, write in writers.items():
        write(tmp_path / "whole" / name)
        largest = max(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file() and name in str(p))
        with file_size(int(share * largest)), pytest.raises(OSError, match=f"{name}.* could not be written: "):
            write(tmp_path / "disk" / name)
        assert [p for p in (tmp_path / "disk").rglob("*") if p.is_file()] == []


def test_a_picture_that_a_full_disk_cuts_short_is_an_error(tmp_path):
    image = Image.effect_noise((64, 64), 50)
    with atomic_buffer(tmp_path / "whole.jpg") as buffer:
        image.save(buffer)
    size = (tmp_path / "whole.jpg").stat().st_size
    for limit in (size - 1, size // 2, 0):
        refused = pytest.raises(OSError, match=r"a\.jpg could not be written")
        with file_size(limit), refused, atomic_buffer(tmp_path / "a.jpg") as buffer:
            image.save(buffer)
        assert [p.name for p in tmp_path.iterdir()] == ["whole.jpg"]


def test_an_export_whose_description_does_not_fit_leaves_no_model(home, tmp_path, monkeypatch):
    def full(path: Path, *args: object) -> None:
        raise OSError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr(export, "write_json", full)
    with pytest.raises(OSError, match=r"a\.pt\.json could not be written"):
        export_model(Embedder(str(home / "model"), device="cpu"), tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_standard_output_does_not_take_is_an_error(tmp_path, monkeypatch, capsys):
    with (tmp_path / "list.txt").open("w") as output, file_size(1000):
        monkeypatch.setattr("sys.stdout", output)
        assert cli.main(["weights", "list"]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == "passreid: standard output could not be written: File too large\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("wrong"), 2, "wrong"),
        (OSError(errno.EFBIG, "File too large", "a.npz"), 2, "[Errno 27] File too large: 'a.npz'"),
        (OSError("a.npz could not be written: No space"), 2, "a.npz could not be written: No space"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(0), 2, "standard output could not be written: File too large"),
    ],
)
def test_an_error_of_the_command_is_told_where_standard_output_does_not_take_it(
    error, code, message, tmp_path, monkeypatch, capsys
):
    def work() -> int:
        print("2,000 letters: " + 2000 * "a")
        raise error

    with (tmp_path / "list.txt").open("w") as output, file_size(1000):
        monkeypatch.setattr("sys.stdout", output)
        try:
            raise LookupError("handled by the caller")
        except LookupError:
            assert cli.run("passreid", work) == code
        monkeypatch.undo()
    assert capsys.readouterr().err == f"passreid: {message}\n"


@pytest.mark.parametrize("stream", ["none", "closed"])
def test_a_command_runs_without_standard_output(stream, tmp_path, monkeypatch, capsys):
    output = (tmp_path / "closed.txt").open("w")
    output.close()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", output if stream == "closed" else None)
        assert cli.run("passreid", lambda: 0) == 0
        assert cli.main(["eval", str(tmp_path / "none")]) == 2
    assert "none: no such file or folder" in capsys.readouterr().err


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(OSError, match=f"{os.devnull} is no regular file: name another"):
        check_file(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is no regular file"), atomic_buffer(tmp_path / "pipe"):
        pass
