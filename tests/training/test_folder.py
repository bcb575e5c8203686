"""RunFolder: checkpoints that are complete or absent, one process at a time, and metrics without repeated steps."""

import errno
import json
import logging
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from passreid_models.checkpoints.read import CheckpointError
from passreid_models.training.folder import RunFolder

HOLD = """import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)"""


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "a")
    run.open()
    yield run
    run.close()


def state(step: int) -> dict[str, Any]:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(step))
    return {
        "config": {"size": [256, 128], "areas": None, "lr": 1e-4}, "step": step, "student": {"w": weights},
        "teacher": {"w": weights / 2}, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
        "centers": torch.zeros(2, 3),
    }  # fmt: skip


def names(run: RunFolder) -> list[str]:
    """Files in the folder of the checkpoints, hidden ones too."""
    return sorted(p.name for p in run.checkpoint_folder.iterdir())


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    weights = state(int(path.stem.removeprefix("step_")))["student"]["w"].numpy().tobytes()
    flipped = bytearray(data)
    flipped[data.index(weights)] ^= 1  # torch does not look at the checksums
    path.write_bytes(
        {"cut": data[: len(data) // 2], "empty": b"", "other": b"no checkpoint", "flipped": bytes(flipped)}[how]
    )


# ---- Saving


def test_a_checkpoint_comes_back_as_it_was_saved(folder):
    path = folder.save(state(120), keep=2)
    assert path == folder.latest() == folder.checkpoint_folder / "step_000000120.pt"
    loaded = folder.load(path)
    expected = state(120)
    assert loaded.keys() == expected.keys()
    assert loaded["config"] == expected["config"]
    assert loaded["step"] == 120
    assert torch.equal(loaded["student"]["w"], expected["student"]["w"])
    assert torch.equal(loaded["optimizer"]["state"][0]["step"], torch.tensor(3.0))


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept_and_nothing_else_stays(folder, keep):
    for step in (1, 9, 10, 99, 100, 1000):
        folder.save(state(step), keep)
    kept = [1, 9, 10, 99, 100, 1000][-keep:]
    assert names(folder) == [f"step_{step:09d}.pt" for step in kept]
    assert [p.name for p in folder.checkpoints()] == names(folder)
    assert folder.latest().name == f"step_{1000:09d}.pt"


def test_saving_the_same_step_again_replaces_it(folder):
    folder.save(state(3), keep=2)
    folder.save({**state(3), "centers": torch.ones(2, 3)}, keep=2)
    assert names(folder) == ["step_000000003.pt"]
    assert folder.load(folder.latest())["centers"].eq(1).all()


def test_a_checkpoint_just_saved_is_kept_although_a_later_one_exists(folder):
    for step in (1, 2, 3):
        folder.save(state(step), keep=3)
    damage(folder.latest(), "cut")  # so that the run goes on from step 2 or 1
    path = folder.save(state(2), keep=1)
    assert names(folder) == ["step_000000002.pt", "step_000000003.pt"]
    assert folder.load_latest()[0] == path
    folder.save(state(4), keep=1)
    assert names(folder) == ["step_000000004.pt"]


def test_other_files_are_not_taken_for_checkpoints(folder):
    for name in ("step_1.pt.tmp", "step_x.pt", "best.pt", ".step_000000009.pt"):
        (folder.checkpoint_folder / name).write_bytes(b"")
    assert folder.checkpoints() == []
    assert folder.latest() is None
    assert folder.load_latest() is None
    folder.save(state(1), keep=1)
    assert len(names(folder)) == 5


def test_a_loader_process_that_dies_during_a_save_is_not_taken_for_a_full_disk(folder, monkeypatch):
    message = "DataLoader worker (pid 7) is killed by signal: Killed. "

    def interrupted(*args):
        raise RuntimeError(message)  # as torch's signal handler does, wherever the main thread is

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        folder.save(state(1), keep=1)
    assert not folder.checkpoints()


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays_whole(folder):
    last = folder.save(state(1), keep=1)
    large = {**state(2), "student": {"w": torch.zeros(1 << 20)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=r"step_000000002.pt could not be written \(.+\); the last whole") as e:
            folder.save(large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(last) in str(e.value)
    assert "full" in str(e.value)
    assert names(folder) == [last.name]
    assert folder.load(last)["step"] == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("enforce fail\nat line 1")])
def test_errors_of_the_writer_are_one_line_with_the_last_whole_checkpoint(folder, monkeypatch, error):
    def fail(state: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"(No space left|enforce fail).*; the last whole checkpoint: none$") as e:
        folder.save(state(1), keep=1)
    assert "\n" not in str(e.value)
    assert names(folder) == []


# ---- Loading


@pytest.mark.parametrize("how", ["cut", "empty", "other", "flipped"])
def test_a_damaged_newest_checkpoint_is_skipped_and_named(folder, caplog, how):
    for step in (1, 2, 3):
        folder.save(state(step), keep=3)
    damage(folder.latest(), how)
    with caplog.at_level(logging.WARNING):
        path, loaded = folder.load_latest()
    assert (path.name, loaded["step"]) == ("step_000000002.pt", 2)
    assert torch.equal(loaded["student"]["w"], state(2)["student"]["w"])
    (message,) = caplog.messages
    assert message.startswith("passed over: ")
    assert "step_000000003.pt" in message


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError(NO_MEMORY)])
def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(folder, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    folder.save(state(1), keep=2)
    newest = folder.save(state(2), keep=2)
    monkeypatch.setattr(*((zipfile.ZipFile, "testzip") if isinstance(error, OSError) else (torch, "load")), fail)
    with pytest.raises(type(error), match=str(newest) if isinstance(error, OSError) else None):
        folder.load_latest()


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_when_all_checkpoints_are_damaged_loading_raises_instead_of_starting_over(folder, caplog, how):
    for step in (1, 2):
        damage(folder.save(state(step), keep=2), how)
    none_left = f"{folder.path} holds no checkpoint that can be read, of 2: another --out begins anew"
    with pytest.raises(CheckpointError, match=f"^{none_left}$"):
        folder.load_latest()
    assert [re.search(r"step_00000000\d.pt is .*damaged", m) is not None for m in caplog.messages] == [True, True]
    assert "again" not in caplog.text  # there is no other copy of a run
    folder.export_folder.mkdir()
    (folder.export_folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"^{none_left}, and with --init {folder.export_folder} from its last"):
        folder.load_latest()


def test_a_missing_folder_holds_no_checkpoint_and_is_not_made(tmp_path):
    run = RunFolder(tmp_path / "none")
    assert (run.checkpoints(), run.latest(), run.load_latest()) == ([], None, None)
    run.forget_after(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "foreign",
    [
        {"teacher": {"module.backbone.cls_token": torch.zeros(1)}, "student": {}, "args": Namespace(arch="vit")},
        {"cls_token": torch.zeros(1, 1, 4)},
        [1, 2],
        {k: v for k, v in state(1).items() if k != "optimizer"},
    ],
    ids=["official", "backbone", "list", "without optimiser"],
)
def test_checkpoints_of_other_programs_are_refused_with_advice(folder, tmp_path, foreign):
    path = tmp_path / "checkpoint.pth"
    torch.save(foreign, path)
    with pytest.raises(CheckpointError, match=r"checkpoint.pth is no checkpoint of passreid-train: give it to --init"):
        folder.load(path)


def test_a_missing_checkpoint_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none.pt"):
        folder.load(folder.path / "none.pt")


@pytest.mark.parametrize("resume", ["", "auto", "elsewhere/step_000000120.pt"])
@pytest.mark.parametrize("model", ["export", "best"])
def test_a_run_without_its_checkpoints_is_refused_with_advice(folder, model, resume):
    assert folder.find("") is folder.find("auto") is None  # as of a run that was killed before its first checkpoint
    (folder.path / model).mkdir()
    assert folder.find("auto") is None
    (folder.path / model / "config.json").write_text("{}")
    advice = f"another --out begins anew, and with --init {folder.path / model} from its weights"
    with pytest.raises(
        ValueError, match=f"^{folder.path} holds a run without its checkpoints: put them back .*; {advice}$"
    ):
        folder.find(resume)
    folder.save(state(3), keep=1)
    assert folder.find("auto")["step"] == 3


@pytest.mark.parametrize("name", ["export/notes.txt", "best/notes.txt", "export"])
def test_a_new_run_does_not_replace_files_of_others(folder, name):
    file = folder.path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not an empty folder: name another"):
        folder.find("")
    assert file.read_text() == "mine"
    folder.save(state(3), keep=1)  # a run's own export may hold more
    assert folder.find("auto")["step"] == 3


# ---- One process at a time


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_closed(folder):
    second = RunFolder(folder.path)
    with pytest.raises(ValueError, match=r"runs/a: another process trains in it"):
        second.open()
    folder.close()
    second.open()
    second.close()


def test_a_killed_process_leaves_the_folder_unlocked(tmp_path):
    run = RunFolder(tmp_path)
    run.open()
    run.close()
    (held,) = tmp_path.glob(".*.lock")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(held)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process trains in it"):
            run.open()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
    run.open()
    run.close()


def test_a_folder_that_cannot_be_made_is_refused_with_advice(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=r"file.* cannot be written to \(.+\): name another folder with --out"):
            RunFolder(path).open()


def write(run: RunFolder) -> None:
    run.add_metrics({"step": 1, "loss": 1.0})


def save(run: RunFolder) -> None:
    run.save(state(1), keep=2)


@pytest.mark.parametrize("act", [write, save])
@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_folder_that_is_deleted_moved_or_replaced_is_not_made_again(folder, tmp_path, how, act):
    (folder.path / "config.yaml").touch()
    folder.path.rename(tmp_path / "elsewhere")
    if how == "deleted":
        shutil.rmtree(tmp_path / "elsewhere")
    other = RunFolder(folder.path)
    if how == "replaced":
        other.open()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"runs/a was deleted, moved or replaced while the run wrote to it"):
        act(folder)
    other.close()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_goes_on_without_its_hidden_files(folder):
    (folder.path / "config.yaml").touch()
    (folder.path / ".run.lock").unlink()
    write(folder)
    save(folder)
    assert names(folder) == ["step_000000001.pt"]


def test_closing_twice_or_before_opening_does_nothing(tmp_path):
    run = RunFolder(tmp_path)
    run.close()
    run.open()
    run.close()
    run.close()


# ---- Metrics


def test_metrics_are_one_json_object_per_line(folder):
    for step in (10, 20):
        folder.add_metrics({"step": step, "loss": 1 / 3})
    lines = folder.metrics_file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 10, "loss": 1 / 3}, {"step": 20, "loss": 1 / 3}]


def test_a_metric_that_is_not_finite_is_null(folder):
    folder.add_metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "kl": float("-inf"), "lr": 0.5})
    assert folder.metrics_file.read_text() == '{"step": 1, "loss": null, "grad_norm": null, "kl": null, "lr": 0.5}\n'


@pytest.mark.parametrize(("step", "kept"), [(0, []), (10, [10]), (15, [10]), (30, [10, 20, 30]), (99, [10, 20, 30])])
def test_metrics_of_steps_that_will_be_repeated_are_dropped(folder, step, kept):
    for s in (10, 20, 30):
        folder.add_metrics({"step": s})
    folder.forget_after(step)
    assert [json.loads(line)["step"] for line in folder.metrics_file.read_text().splitlines()] == kept


@pytest.mark.parametrize("length", [1, 8, 12, 25])
def test_a_line_that_a_kill_cut_short_is_dropped_and_the_next_begins_a_line(folder, length):
    for s in (10, 20):
        folder.add_metrics({"step": s, "loss": 9.5})
    with folder.metrics_file.open("a") as file:
        file.write(json.dumps({"step": 25, "loss": 9.125, "lr": 1e-4})[:length])
    folder.forget_after(40)
    folder.add_metrics({"step": 30, "loss": 9.25})
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]


def test_forgetting_without_metrics_makes_no_file(folder):
    folder.forget_after(10)
    assert not folder.metrics_file.exists()
