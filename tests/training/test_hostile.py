"""Hostile settings and files of a run: one sentence each, and no waiting."""

import errno
import math
import os

import pytest
import torch
from safetensors import SafetensorError

from passreid_models.checkpoints.read import CheckpointError
from passreid_models.cli import main, run
from passreid_models.data.listing import list_images
from passreid_models.runtime import atomic_file, atomic_folder
from passreid_models.training.folder import RunFolder
from passreid_models.training.optim import load_optimizer
from passreid_models.training.plot import plot_run

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


@pytest.mark.parametrize("write", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.write_text(LAUGHS)])
def test_settings_of_a_source_pass_the_same_check(write, tmp_path, capsys):
    write(tmp_path / "s.yaml")
    words = ["--init", "random", "--source", "x", "--source-config", str(tmp_path / "s.yaml")]
    assert main(["cluster", str(tmp_path), *words, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("passreid cluster: source_config: ")
    assert "it is no regular file" in message or "has an alias, *a" in message


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
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [lines[0], '{"step": 1, "note": "x"}']


def test_foreign_lines_of_metrics_are_not_drawn(tmp_path):
    lines = ["null", '{"epoch": "x", "step": 1}', '{"step": 2, "epoch": 1, "loss": "x", "lr": [1], "mAP": null}']
    content = "".join(f"{line}\n" for line in [*lines, "[" * 10**5, '{"step": 3, "epoch": 1.5, "loss": 0.5}'])
    (tmp_path / "metrics.jsonl").write_bytes(content.encode() + b'\xff\n{"step": 1' + b"0" * 5000 + b"}\n")
    _, second, last = RunFolder(tmp_path).metrics()
    assert second.keys() == {"step", "epoch", "mAP"}
    assert math.isnan(second["mAP"])
    assert last == {"step": 3, "epoch": 1.5, "loss": 0.5}
    assert plot_run(tmp_path) == tmp_path / "curves.png"


def test_metrics_that_are_a_pipe_or_huge_are_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is no regular file"):
        RunFolder(tmp_path).metrics()
    (tmp_path / "metrics.jsonl").unlink()
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is larger than 8,589,934,592 bytes"):
        RunFolder(tmp_path).metrics()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"step": "5"}, "step: expected a whole number"),
        ({"images_seen": -1}, "images_seen: expected a whole number"),
        ({"config": []}, "config: expected an object"),
        ({"config": {"model": "x"}}, "config: model: expected one of"),
        ({"config": {"init": 5}}, "config: init: expected a text"),
        ({"student": {"a": 0.5}}, "student: expected tensors by name"),
        ({"student": {"norm.weight": torch.zeros(2, dtype=torch.int8)}}, "not of floating point"),
        ({"teacher": {"a": torch.zeros(1).expand(10**9)}}, "is declared as 1000000000"),
        ({"centers": 5}, "centers: expected a tensor"),
        ({"statistics": {"mean": [0.5] * 3, "x": 1}}, "statistics: expected mean, std and interpolation"),
        ({"before": {"mAP": "x"}}, "before: expected scores"),
        ({"identities": 5}, "identities: expected texts"),
    ],
)
def test_an_entry_of_a_checkpoint_that_no_run_writes_is_named(entry, message, tmp_path):
    folder = RunFolder(tmp_path)
    state = {"config": {}, "step": 5, "student": {}, "teacher": {}, "optimizer": {}, "centers": torch.zeros(1)}
    folder.checkpoint_folder.mkdir()
    file = folder.save(state, 1)
    assert folder.load(file)["step"] == 5
    torch.save({**state, **entry}, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        folder.load(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_moments_of_other_parameters_are_refused_and_settings_are_the_configurations():
    def optimizer(size, lr):
        p = torch.nn.Parameter(torch.zeros(size))
        optimizer = torch.optim.AdamW([p], lr=lr)
        p.grad = torch.ones(size)
        optimizer.step()
        return optimizer

    new = optimizer(2, 0.5)
    load_optimizer(new, optimizer(2, 0.25).state_dict())
    assert new.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"exp_avg of the optimiser is torch\.strided \(3,\), and its parameter \(2,"):
        load_optimizer(new, optimizer(3, 0.5).state_dict())


def test_a_name_with_control_characters_stays_in_one_line(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "a\nb\x1b[2J")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert r"a\nb\x1b[2J: no such file or folder" in message


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "Python has none left"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error"
            ),
            "can't allocate memory: you tried to allocate 8 bytes",
        ),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB). Tried to allocate 2 GB."),
            "MPS backend out of memory (MPS allocated: 8 GB, max allowed: 9 GB)",
        ),
    ],
)
def test_exhausted_memory_of_the_cpu_is_reported_as_that_of_a_gpu(error, reason, capsys):
    def work():
        raise error

    assert run("passreid", work) == 1
    assert capsys.readouterr().err.endswith(f"out of memory: a smaller --batch-size needs less ({reason})\n")


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
@pytest.mark.parametrize("error", [SafetensorError("no space"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_is_an_oserror_that_names_the_output_and_leaves_nothing(write, error, tmp_path):
    with pytest.raises(OSError, match=r"out could not be written: [Nn]o space"), write(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []
