"""Hostile settings and files of a run: one sentence each, and no waiting."""

import errno
import json
import os

import pytest
from safetensors import SafetensorError

from passreid_models.cli import main
from passreid_models.data.listing import list_images
from passreid_models.runtime import atomic_file, atomic_folder
from passreid_models.training.folder import RunFolder

LAUGHS = "a: &a [x,x]\nb: [*a,*a]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(LAUGHS, "has an alias, *a"), ("a: " + "[" * 20 + "]" * 20, "is nested more than 10 deep")],
    ids=["alias", "depth"],
)
def test_a_yaml_that_grows_when_parsed_is_refused(content, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(content)
    assert main(["train", str(tmp_path), "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_pipes_are_refused_and_not_waited_for(tmp_path, capsys):
    for name in ("c.yaml", "x.tar"):
        os.mkfifo(tmp_path / name)
    assert main(["train", str(tmp_path), "--config", str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml: it is no regular file" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"x\.tar is no regular file"):
        list_images(tmp_path / "x.tar", tmp_path / "cache")


@pytest.mark.parametrize("command", ["train", "finetune", "cluster"])
@pytest.mark.parametrize("option", ["--epochs", "--log-steps", "--workers", "--seed", "--keep"])
def test_a_count_beyond_any_use_is_refused_with_its_bounds(command, option, tmp_path, capsys):
    assert main([command, str(tmp_path), option, "9" * 20]) == 2
    name = option.removeprefix("--").replace("-", "_")
    assert f"{name}: expected between " in capsys.readouterr().err


def test_metrics_lines_that_are_no_records_are_dropped(tmp_path):
    lines = ['{"step": 1, "loss": 2}', "[1]", "5", "null", '"step"', '{"step": "x"}', '{"step": 9}', "{", "[" * 10**5]
    lines += ['{"step": 1, "note": "x"}', '{"step": 1e999}']
    (tmp_path / "metrics.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode() + b"\xff\xfe\x00\n")
    run = RunFolder(tmp_path)
    assert run.metric(1, "loss") == 2
    assert run.metric(2, "loss") is None
    run.forget_after(1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2}


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
@pytest.mark.parametrize("error", [SafetensorError("no space"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_is_an_oserror_that_names_the_output_and_leaves_nothing(write, error, tmp_path):
    with pytest.raises(OSError, match=r"out could not be written: [Nn]o space"), write(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []
