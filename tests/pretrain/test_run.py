"""Whole runs: stopped, killed and resumed bit for bit; disks that are full; images that cannot be read."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

from passreid_models import __version__
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.data import images
from passreid_models.data.images import ImageError
from passreid_models.pretrain.batches import ViewBatch
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.run import PretrainRun, train
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.training.folder import RunFolder
from passreid_models.training.run import Stopped, pick_workers
from passreid_models.training.trainer import NonFiniteLossError
from tests import ROOT
from tests.tiny_runs import (
    EPOCH_STEPS,
    LONG,
    LONG_STEPS,
    STEPS,
    Child,
    assert_same_bits,
    files,
    flags,
    metrics,
    one_sentence,
    result,
    run_cli,
    saved_steps,
    steps_logged,
    tiny,
    write_images,
)


@pytest.fixture(scope="module")
def whole(home, data) -> Path:
    """An uninterrupted run, with all of its checkpoints."""
    train(tiny(data, home / "whole", keep=99))
    return home / "whole"


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """Copy of ``whole``, for a test that changes it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def back_to(run: Path, step: int) -> None:
    """Forget the checkpoints after a step."""
    for path in RunFolder(run).checkpoints():
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()


# ---- A run and what it leaves


def test_a_run_leaves_config_log_metrics_checkpoints_and_export_and_nothing_else(whole):
    assert {f for f in files(whole) if "/" not in f} == {
        "config.yaml", "log.txt", "metrics.jsonl", "checkpoints", "export",
    }  # fmt: skip
    assert saved_steps(whole) == [4, 8, 12]
    assert {p.name for p in (whole / "export").iterdir()} == {"config.json", "model.safetensors"}
    assert len(list((whole / "checkpoints").iterdir())) == 3


def test_metrics_have_each_step_once_and_indicators_at_the_ends_of_epochs(whole):
    records = metrics(whole)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in records] == [s / EPOCH_STEPS for s in range(1, STEPS + 1)]
    assert [r["step"] for r in records if "teacher_entropy" in r] == [4, 8, 12]
    assert all(r["loss"] > 0 and r["images_per_s"] > 0 and 0 <= r["wait_share"] <= 1 for r in records)
    assert records[0]["lr"] == 0
    assert records[1]["lr"] == pytest.approx(0.05 * 4 / 256)  # the warm-up is a tenth of 12 steps


def test_the_scaled_learning_rate_and_the_division_of_the_batch_are_logged_at_the_start(whole, data, tmp_path):
    log = (whole / "log.txt").read_text()
    assert "learning rate: 0.05 x 4 / 256 = 0.00078125 after the warm-up" in log
    assert "3 epochs of 4 steps of 4 images: 1 processes x 1 micro-batches x 4" in log
    assert "data: images/: 16 images" in log
    with pytest.raises(Stopped):
        train(tiny(data, tmp_path, batch_size=16, accumulate=2, lr=5e-4, max_minutes=1e-9))
    log = (tmp_path / "log.txt").read_text()
    assert "learning rate: 0.0005 x 16 / 256 = 3.125e-05 after the warm-up" in log
    assert "3 epochs of 1 steps of 16 images: 1 processes x 2 micro-batches x 8" in log


def test_the_export_is_the_backbone_of_the_teacher_bit_for_bit_with_its_provenance(whole):
    model = timm.create_model(f"local-dir:{whole}/export", pretrained=True)
    teacher = result(whole)
    state = model.state_dict()
    assert state.keys() == {k.removeprefix("/teacher/backbone.") for k in teacher if k.startswith("/teacher/backbone.")}
    assert all(torch.equal(v, teacher[f"/teacher/backbone.{k}"]) for k, v in state.items())
    assert not torch.equal(state["pos_embed"], teacher["/student/backbone.pos_embed"])
    provenance = json.loads((whole / "export" / "config.json").read_text())["provenance"]
    assert re.fullmatch("[0-9a-f]{64}", provenance.pop("config_sha256"))
    assert provenance.pop("data_fingerprint")
    saved = RunFolder(whole).load_latest()[1]["config"]
    assert provenance.pop("config") == {
        k: v for k, v in saved.items() if k not in PretrainConfig.FREE
    }  # names of folders stay here
    assert provenance == {
        "method": "PASS", "init": "", "data": "images/: 16 images", "images_seen": 4 * STEPS, "step": STEPS,
        "package": f"passreid-models {__version__}",
    }  # fmt: skip


def test_the_number_of_workers_changes_no_bit(whole, data, home):
    with Child(run_cli, flags(data, home / "workers", workers=2), folder=home / "printed") as child:
        assert child.wait() == 0
        assert not child.is_left()
    assert_same_bits(home / "workers", result(whole))


def labelled_folder(data, folder):
    for i, path in enumerate(sorted(data.iterdir())[:8]):
        person = folder / f"person{i // 2}"
        person.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, person)
    return str(folder)


def test_a_probe_of_images_that_are_trained_on_is_said_with_their_number(data, tmp_path):
    labelled = labelled_folder(data, tmp_path / "labelled")
    log = (train(tiny(data, tmp_path / "apart", epochs=1, probe=labelled)).parent / "log.txt").read_text()
    assert (log.count("probe: "), "trained on too" in log) == (1, False)
    log = (train(tiny(labelled, tmp_path / "shared", epochs=1, probe=labelled)).parent / "log.txt").read_text()
    assert "probe: 8 images are trained on too; scores are not those of images that the model has not seen" in log


def test_a_probe_that_a_kill_interrupted_is_repeated(data, tmp_path):
    config = tiny(data, tmp_path / "run", epochs=1, probe=labelled_folder(data, tmp_path / "labelled"))
    train(config)
    whole = metrics(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text("".join(line for line in file.open() if "probe_mAP" not in line))
    train(replace(config, resume="auto"))
    assert metrics(tmp_path / "run") == whole
    train(replace(config, resume="auto"))
    assert metrics(tmp_path / "run") == whole


def test_a_probe_is_logged_every_so_many_epochs_and_changes_no_bit(whole, data, home, tmp_path):
    labelled = labelled_folder(data, tmp_path / "labelled")
    train(tiny(data, tmp_path / "run", probe=labelled, probe_epochs=2, log_steps=5))
    assert_same_bits(tmp_path / "run", result(whole))
    records = metrics(tmp_path / "run")
    assert [r["step"] for r in records] == [4, 8, 8, 12]  # the probe, after the checkpoint, has its own line
    assert [i for i, r in enumerate(records) if "probe_mAP" in r] == [2]
    assert 0 < records[2]["probe_mAP"] <= 100
    assert 0 <= records[2]["probe_rank1"] <= 100
    losses = [r["loss"] for r in metrics(whole)]
    assert records[1]["loss"] == pytest.approx(sum(losses[4:8]) / 4)  # a line is the mean of the steps since the last


@pytest.mark.slow
def test_tensorboard_gets_what_metrics_get(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(data, tmp_path / "run", epochs=1, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {e.step: e.value for e in events.Scalars("loss")}
    assert losses == pytest.approx({r["step"]: r["loss"] for r in metrics(tmp_path / "run")})


@pytest.mark.slow
def test_tensorboard_has_each_step_of_a_resumed_run_once(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (8, -1, STEPS):  # gone back to a checkpoint, begun anew
        train(tiny(data, tmp_path / "run", resume="auto", tensorboard=True, keep=9))
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        assert [e.step for e in events.Scalars("loss")] == list(range(1, STEPS + 1))
        back_to(tmp_path / "run", step)
        if step < 0:
            shutil.rmtree(tmp_path / "run" / "export")


def test_workers_are_the_cores_of_a_process_but_one(monkeypatch, data, tmp_path):
    auto = tiny(data, tmp_path, workers=None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    assert pick_workers(auto) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert pick_workers(auto) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "48")
    assert pick_workers(auto) == 1
    assert pick_workers(tiny(data, tmp_path, workers=0)) == 0


# ---- Stopped and resumed


def test_a_run_stopped_after_each_step_ends_as_one_that_was_not(whole, data, tmp_path):
    for step in range(1, 7):
        with pytest.raises(Stopped, match=f"stopped at step {step} of {STEPS}; --resume auto continues") as stopped:
            train(tiny(data, tmp_path / "run", resume="auto", max_minutes=1e-9))
        assert stopped.value.signum is None
    assert saved_steps(tmp_path / "run") == [5, 6]
    export = train(tiny(data, tmp_path / "run", resume="auto"))
    assert export == tmp_path / "run" / "export"
    assert_same_bits(tmp_path / "run", result(whole))
    kept = ("step", "loss", "lr", "grad_norm", "teacher_entropy")
    records, expected = ([{k: r.get(k) for k in kept} for r in metrics(run)] for run in (tmp_path / "run", whole))
    assert records == expected


class Stop(NamedTuple):
    signum: int
    code: int
    output: str
    steps: int
    is_left: bool


@pytest.fixture(scope="module")
def stops(home, data) -> list[Stop]:
    """A run that each signal stops once, with two workers."""
    run, records = home / "stopped", []
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        words = flags(data, run, **LONG, workers=2, resume="auto")
        with Child(run_cli, words, folder=home / "printed") as child:
            steps = steps_logged(run)
            child.wait_until(lambda steps=steps: steps_logged(run) > steps + EPOCH_STEPS)  # past an epoch's end
            child.signal(signum)
            code = child.wait()
            records.append(Stop(signum, code, child.output, steps_logged(run), child.is_left()))
    return records


def test_a_signal_stops_the_run_with_128_plus_its_number_and_advice_to_resume(stops):
    assert [s.code for s in stops] == [143, 138, 129, 130]
    for stop in stops:
        message = one_sentence(stop.output)
        assert message == f"passreid-train: stopped at step {stop.steps} of {LONG_STEPS}; --resume auto continues"
    assert all(f"resumed at step {stop.steps} of" in later.output for stop, later in pairwise(stops))


def run_before_a_reader_that_goes(words: list[str]) -> int:
    """passreid-train with its output in a pipe, whose reader goes after a few steps, as head does."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(writing)

    def read() -> None:
        with os.fdopen(reading) as lines:
            next(line for line in lines if f"step {EPOCH_STEPS + 2}/" in line)

    threading.Thread(target=read, daemon=True).start()
    return run_cli(words)


def test_a_run_whose_log_nobody_reads_any_more_saves_and_stops_quietly_as_at_a_lost_terminal(home, data):
    words = flags(data, home / "unread", **LONG)
    with Child(run_before_a_reader_that_goes, words, folder=home / "printed") as child:
        assert child.wait() == 128 + signal.SIGHUP
        assert child.output == ""
    log = (home / "unread" / "log.txt").read_text()
    assert "; --resume auto continues" in log
    assert saved_steps(home / "unread")[-1] == steps_logged(home / "unread") < LONG_STEPS


def test_no_worker_is_left_after_a_stop(stops):
    assert not any(stop.is_left for stop in stops)


def test_a_run_stopped_by_signals_ends_as_one_that_was_not(stops, home, data):
    for name in ("stopped", "not_stopped"):
        train(tiny(data, home / name, **LONG, resume="auto"))
    assert_same_bits(home / "stopped", result(home / "not_stopped"))
    assert [r["step"] for r in metrics(home / "stopped")] == list(range(1, LONG_STEPS + 1))
    assert any(stop.steps % EPOCH_STEPS for stop in stops)
    log = (home / "stopped" / "log.txt").read_text()
    assert all(f"Stopped: stopped at step {stop.steps} of {LONG_STEPS}; --resume" in log for stop in stops)


def test_three_kills_at_random_moments_change_no_bit_and_leave_nothing_behind(home, data):
    run, rng, children = home / "killed", random.Random(0), []
    with ExitStack() as stack:
        for kill in range(3):
            words = flags(data, run, epochs=4, workers=int(kill == 0), resume="auto", save_minutes=0)
            child = stack.enter_context(Child(run_cli, words, folder=home / "printed"))
            child.wait_until(lambda after=4 * kill + 2: max(saved_steps(run), default=0) >= after)
            time.sleep(rng.uniform(0, 0.08))  # a step, its checkpoint and its export take about as long
            child.process.kill()  # it alone, not its worker
            assert child.wait() == -signal.SIGKILL
            assert 0 < max(saved_steps(run)) < 4 * EPOCH_STEPS
            children.append(child)
        for name in ("killed", "not_killed"):
            train(tiny(data, home / name, epochs=4, resume="auto"))
        end = time.monotonic() + 20
        while any(child.is_left() for child in children) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(child.is_left() for child in children)  # a worker looks for its parent every 5 seconds
    assert_same_bits(run, result(home / "not_killed"))
    assert [r["step"] for r in metrics(run)] == list(range(1, 4 * EPOCH_STEPS + 1))
    assert not [f for f in files(run) if re.search(r"(^|/)\.", f)]


def test_half_written_files_of_a_killed_run_are_not_used_as_checkpoints_and_are_removed(whole, copy, data):
    half = copy / "checkpoints" / ".step_000000009.pt.abc" / "new"
    half.mkdir(parents=True)
    shutil.copy(copy / "checkpoints" / "step_000000012.pt", half / "step_000000009.pt")
    (copy / ".export.xyz" / "new").mkdir(parents=True)
    (copy / ".export.old").mkdir()
    (copy / ".mine.d").mkdir()  # not of a run
    (copy / "metrics.jsonl").open("a").write('{"step": 13, "lo')
    back_to(copy, 8)
    train(tiny(data, copy, resume="auto", keep=99))
    assert_same_bits(copy, result(whole))
    assert files(copy) == files(whole) | {".mine.d"}
    assert [r["step"] for r in metrics(copy)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("harm", ["cut short", "empty"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_for_the_one_before(whole, copy, data, harm):
    newest = copy / "checkpoints" / "step_000000012.pt"
    newest.write_bytes(newest.read_bytes()[:-5000] if harm == "cut short" else b"")
    train(tiny(data, copy, resume="auto"))
    log = (copy / "log.txt").read_text()
    assert f"passed over: {newest}" in log
    assert f"resumed at step 8 of {STEPS}" in log
    assert_same_bits(copy, result(whole))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(copy, data):
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    before = files(copy)
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be read, of"):
        train(tiny(data, copy, resume="auto"))
    assert files(copy) == before


def test_a_finished_run_makes_no_step_and_restores_a_missing_export(whole, copy, data):
    shutil.rmtree(copy / "export")  # killed between its last checkpoint and the export, or between two renames
    train(tiny(data, copy, resume="auto"))
    assert_same_bits(copy, result(whole))
    assert metrics(copy) == metrics(whole)


@pytest.mark.parametrize("step", [8, STEPS])
def test_a_model_card_in_the_export_stays_when_a_run_is_resumed(copy, data, step):
    back_to(copy, step)
    (copy / "export" / "README.md").write_text("mine")
    train(tiny(data, copy, resume="auto"))
    assert (copy / "export" / "README.md").read_text() == "mine"


def test_a_run_resumes_in_the_same_process_while_the_traceback_of_its_error_is_alive(data, tmp_path):
    with pytest.raises(Stopped) as stopped:  # holds the traceback, as a notebook does
        train(tiny(data, tmp_path / "run", max_minutes=1e-9))
    train(tiny(data, tmp_path / "run", resume="auto"))
    assert saved_steps(tmp_path / "run")[-1] == STEPS
    assert stopped.value.signum is None


def test_a_run_resumes_from_a_named_checkpoint_file(whole, data, copy):
    train(tiny(data, copy, resume=str(copy / "checkpoints" / "step_000000004.pt"), keep=99))
    assert f"resumed at step 4 of {STEPS}" in (copy / "log.txt").read_text()
    assert_same_bits(copy, result(whole))
    aside = {p.name for p in (copy / "checkpoints").glob("*.later")}
    assert aside == {"step_000000008.pt.later", "step_000000012.pt.later"}
    assert [r["step"] for r in metrics(copy)] == list(range(1, STEPS + 1))


def test_a_checkpoint_file_of_another_run_is_refused_where_a_run_is(whole, data, copy):
    before, other = files(copy), whole / "checkpoints" / "step_000000004.pt"
    with pytest.raises(ValueError, match=f"{copy} holds another run than {other}: name another --out"):
        train(tiny(data, copy, resume=str(other)))
    assert files(copy) == before


@pytest.mark.parametrize(
    ("options", "message", "tolerance"),
    [
        ({"accumulate": 2}, "2 accumulate instead of 1", 0.05),  # the stochastic depth is drawn for each micro-batch
        ({"loss_chunk": 1}, "1 loss_chunk instead of None", 1e-5),
        ({"grad_checkpointing": True}, "True grad_checkpointing instead of False", 1e-5),
        ({"dtype": "bfloat16"}, "torch.bfloat16 dtype instead of torch.float32", 0.05),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_run_resumes_with_other_numerics_after_a_warning(whole, copy, data, options, message, tolerance):
    back_to(copy, 8)
    train(tiny(data, copy, resume="auto", **options))
    log = (copy / "log.txt").read_text()
    warning = "batches are the same, but results agree up to rounding only, and drop-path masks and the"
    assert f"resumed with {message}: {warning}" in log
    assert f"resumed at step 8 of {STEPS}" in log
    found, expected = ([r["loss"] for r in metrics(run)] for run in (copy, whole))
    assert found[:8] == expected[:8]
    assert found == pytest.approx(expected, rel=tolerance)
    assert tolerance < 1e-3 or found[8] != pytest.approx(expected[8], rel=1e-6)  # it does what it now says


@pytest.fixture(scope="module")
def weights(home) -> Path:
    """Exported weights of images that were normalised by a mean and a std of 0.5."""
    torch.manual_seed(0)
    model = timm.create_model("test_pass_vit")
    model.pretrained_cfg.update(mean=(0.5,) * 3, std=(0.5,) * 3)
    save_pretrained(model, home / "begin" / "weights")
    return home / "begin" / "weights"


def test_other_initial_weights_are_not_used_by_a_run_that_resumes_which_says_so(weights, data, tmp_path, copy):
    begin = result(copy)
    train(tiny(data, copy, init=str(weights), resume="auto"))
    assert_same_bits(copy, begin)
    log = (copy / "log.txt").read_text()
    assert f"init: {weights} is not used: the run to resume began with random" in log


@pytest.mark.parametrize("first", ["", "backend='inductor' raised:\n"])  # torch 2.6 has the second
def test_a_compilation_that_fails_is_one_sentence(data, tmp_path, monkeypatch, first):
    class InductorError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(self, batches):
        raise InductorError(f"{first}InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(PretrainTrainer, "training_step", fail)
    with pytest.raises(ValueError, match=r"^compile: torch.compile fails here: InvalidCxxCompiler: No working C.. co"):
        train(tiny(data, tmp_path / "run"))


def test_a_run_resumes_without_its_initial_weights_and_keeps_their_statistics(weights, home, data, tmp_path):
    begin, run = Path(shutil.copytree(weights, tmp_path / "weights")), tmp_path / "run"
    train(tiny(data, home / "from_weights", epochs=2, init=str(begin)))
    for init in (str(begin), ""):  # given again, or not
        with pytest.raises(Stopped):
            train(tiny(data, run, epochs=2, init=init, resume="auto", max_minutes=1e-9))
        shutil.rmtree(begin, ignore_errors=True)
    with pytest.raises(ValueError, match="init: unknown model"):
        tiny(data, tmp_path / "another", model="", init=str(begin), resume="auto")
    train(tiny(data, run, epochs=2, model="", init=str(begin), resume="auto"))
    assert_same_bits(run, result(home / "from_weights"))
    exported = json.loads((run / "export" / "config.json").read_text())
    assert exported["pretrained_cfg"]["mean"] == exported["pretrained_cfg"]["std"] == [0.5] * 3
    assert exported["provenance"]["init"] == "weights"
    state = RunFolder(run).load_latest()[1]
    trainer = PretrainTrainer(tiny(data, run, epochs=2), 16, torch.device("cpu"), state["fingerprint"])
    assert trainer.photometric.mean.flatten().tolist() != [0.5] * 3
    trainer.load_state(state)
    assert trainer.photometric.mean.flatten().tolist() == trainer.photometric.std.flatten().tolist() == [0.5] * 3


def test_the_export_names_no_folder_of_the_machine(weights, data, tmp_path):
    labelled, run = tmp_path / "secret_probe", tmp_path / "secret_out"
    for i, path in enumerate(sorted(data.iterdir())[:4]):
        (labelled / f"person{i // 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, labelled / f"person{i // 2}")
    train(tiny(data, run, epochs=1, init=str(weights), probe=str(labelled)))
    exported = (run / "export" / "config.json").read_text()
    assert '"init": "weights"' in exported
    for name in (data.parent, weights.parent, "secret"):
        assert str(name) not in exported


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"keep": 1}, [12]),
        ({"keep": 9, "save_epochs": 2}, [8, 12]),
        ({"keep": 3, "save_minutes": 0}, [10, 11, 12]),
    ],
    ids=["keep", "save_epochs", "save_minutes"],
)
def test_checkpoints_are_saved_and_kept_as_configured(data, tmp_path, options, steps):
    train(tiny(data, tmp_path / "run", **options))
    assert saved_steps(tmp_path / "run") == steps


# ---- Refused


def test_a_folder_with_a_run_is_neither_overwritten_nor_resumed_unasked(copy, data):
    before = {f: (copy / f).read_bytes() for f in files(copy) if (copy / f).is_file()}
    advice = "--resume auto continues it, another --out begins anew"
    with pytest.raises(ValueError, match=rf"holds a run \(step_000000012.pt\): {advice}"):
        train(tiny(data, copy))
    assert {f: (copy / f).read_bytes() for f in files(copy) if (copy / f).is_file()} == before


def test_a_run_is_resumed_with_its_own_settings_and_images_alone(copy, data, tmp_path):
    before = {f: (copy / f).read_bytes() for f in files(copy) if (copy / f).is_file()}
    with pytest.raises(ValueError, match=r"\(lr: 0.1, in the run 0.05; num_prototypes: 64, in the run 32\)"):
        train(tiny(data, copy, resume="auto", lr=0.1, num_prototypes=64))
    more = write_images(tmp_path / "more", 17)
    with pytest.raises(ValueError, match=f"16 images, and {more} now holds 17"):
        train(tiny(more, copy, resume="auto"))
    renamed = Path(shutil.copytree(data, tmp_path / "others"))
    (renamed / "05.png").rename(renamed / "16.png")
    message = f"16 images, and {renamed} now holds 16, not the same ones: begin a new run with"
    with pytest.raises(ValueError, match=message):
        train(tiny(renamed, copy, resume="auto"))
    assert {f: (copy / f).read_bytes() for f in files(copy) if (copy / f).is_file()} == before


def test_a_second_process_is_refused_in_the_folder_and_the_first_continues(data, home):
    run = home / "shared"
    with Child(run_cli, flags(data, run, **LONG), folder=home / "printed") as child:
        child.wait_until(lambda: steps_logged(run) > EPOCH_STEPS)
        os.kill(child.process.pid, signal.SIGSTOP)
        before = metrics(run)
        with pytest.raises(ValueError, match=f"{run}: another process trains in it"):
            train(tiny(data, run, **LONG, resume="auto"))
        assert metrics(run) == before
        os.kill(child.process.pid, signal.SIGCONT)
        child.signal(signal.SIGTERM)
        assert child.wait() == 143


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_file_in_the_way_of_the_run_is_a_clear_error_that_leaves_nothing(data, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=f"{tmp_path / out} cannot be written to .*: name another folder with --out"):
        train(tiny(data, tmp_path / out))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 17}, "batch_size: 17 is more than the 16 images"),
        ({"accumulate": 3}, "batch_size: 4 is not divisible by"),
        ({"data": "nowhere"}, "nowhere: no such file or folder"),
        ({"resume": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
        ({"init": "nowhere"}, "nowhere"),
        ({"probe": "nowhere"}, "probe: nowhere: no such file or folder"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not there"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_refused_run_leaves_no_files(data, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(tiny(**{"data": data, "out": tmp_path / "run", **options}))
    assert not list(tmp_path.iterdir())


# ---- A loss that is not finite


def test_nan_in_the_student_stops_with_step_term_and_last_checkpoint(copy, data):
    back_to(copy, 8)
    path = copy / "checkpoints" / "step_000000008.pt"
    state = RunFolder(copy).load(path)
    state["student"]["heads.2.mlp.0.weight"][3, 4] = torch.nan
    torch.save(state, path)
    term = r"PART2: teacher's global view 1, student's view 2"
    with pytest.raises(NonFiniteLossError) as stopped:
        train(tiny(data, copy, resume="auto"))
    assert str(stopped.value) == f"the loss of step 9 is not finite ({term}); the last good checkpoint: {path}"

    with pytest.raises(NonFiniteLossError, match="the loss of step 11 is not finite"):
        train(tiny(data, copy, resume="auto", skip_nonfinite=2))
    log = (copy / "log.txt").read_text()
    assert f"NonFiniteLossError: {stopped.value}" in log
    assert all(f"the loss of step {s} is not finite ({term}): left out, {s - 8} of 2 allowed" in log for s in (9, 10))
    assert saved_steps(copy) == [4, 8]
    assert "loss" not in metrics(copy)[-1]  # no step with one
    assert metrics(copy)[-1]["step"] == 10


def test_a_step_left_out_at_the_end_of_an_epoch_has_no_indicators_and_the_next_one_saves(data, tmp_path, monkeypatch):
    step, bad, run = PretrainTrainer.training_step, {8}, tmp_path / "run"

    def spoiled(self: PretrainTrainer, batches: list[ViewBatch]) -> dict[str, float]:
        """The step, with an infinite gradient in a bad one."""
        factor = math.inf if self.step + 1 in bad else 1.0
        with self.student.backbone.cls_token.register_hook(lambda g: g * factor):
            return step(self, batches)

    monkeypatch.setattr(PretrainTrainer, "training_step", spoiled)
    train(tiny(data, run, keep=99, skip_nonfinite=1))
    records = metrics(run)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "teacher_entropy" in r] == [4, 12]
    assert [r["step"] for r in records if "loss" not in r] == [8]
    assert saved_steps(run) == [4, 9, 12]

    back_to(run, 9)
    bad.add(11)
    with pytest.raises(NonFiniteLossError, match=r"gradient of step 11 is not finite; .*: .*step_000000009\.pt"):
        train(tiny(data, run, skip_nonfinite=1, resume="auto"))  # which knows that one step was left out
    log = (run / "log.txt").read_text()
    assert "the gradient of step 8 is not finite: left out, 1 of 1 allowed" in log
    assert "NonFiniteLossError: the gradient of step 11 is not finite" in log


# ---- A full disk


@pytest.fixture(scope="module")
def checkpoint_sizes(whole) -> list[int]:
    return [p.stat().st_size for p in RunFolder(whole).checkpoints()]


def test_a_disk_that_fills_up_is_a_clear_error_and_the_run_resumes_when_there_is_room(
    whole, data, home, checkpoint_sizes
):
    run = home / "full"
    first, second, _ = checkpoint_sizes  # the second has moments of the last layers too
    words = flags(data, run, log_steps=99)
    with Child(run_cli, words, folder=home / "printed", file_size=(first + second) // 2) as child:
        assert child.wait() == 2
    message = one_sentence(child.output)
    newest = f"{run}/checkpoints/step_000000008.pt"
    assert re.fullmatch(
        f"passreid-train: {newest} could not be written .*; the last whole checkpoint: .*/step_000000004.pt", message
    )
    assert saved_steps(run) == [4]
    assert not [f for f in files(run) if re.search(r"(^|/)\.", f)]
    train(tiny(data, run, resume="auto"))
    assert_same_bits(run, result(whole))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (300, "{run}/config.yaml could not be written: File too large"),
        (1500, "{run} cannot be written to (File too large)"),  # the log and the metrics
        (100_000, "{run}/checkpoints/step_000000004.pt could not be written"),
    ],
)
def test_a_disk_that_is_full_from_the_start_is_a_clear_error(data, tmp_path, limit, message):
    run = tmp_path / "run"
    with Child(run_cli, flags(data, run), folder=tmp_path / "printed", file_size=limit) as child:
        assert child.wait() == 2
    assert message.format(run=run) in one_sentence(child.output)
    assert not [f for f in files(run) if re.search(r"(^|/)\.", f)]
    assert not saved_steps(run)


# ---- Images that cannot be read


@pytest.fixture
def damaged(data, tmp_path) -> Path:
    """Two of the 16 images cannot be read."""
    folder = Path(shutil.copytree(data, tmp_path / "images"))
    (folder / "05.png").write_bytes(b"no image")
    (folder / "15.png").write_bytes((folder / "15.png").read_bytes()[:100])
    return folder


def test_an_unreadable_image_is_replaced_by_the_next_and_named_once(damaged, data, tmp_path):
    replaced = Path(shutil.copytree(data, tmp_path / "replaced" / "images"))
    shutil.copy(replaced / "06.png", replaced / "05.png")
    shutil.copy(replaced / "00.png", replaced / "15.png")
    train(tiny(replaced, tmp_path / "expected"))
    words = flags(damaged, tmp_path / "run", max_unreadable=0.125, workers=2)
    with Child(run_cli, words, folder=tmp_path / "printed") as child:
        assert child.wait() == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert [log.count(f"left out: {damaged / name}") for name in ("05.png", "15.png", "06.png")] == [1, 1, 0]
    assert_same_bits(tmp_path / "run", result(tmp_path / "expected"))


def test_unreadable_images_in_a_row_count_once_each_in_an_epoch(data, tmp_path):
    folder = Path(shutil.copytree(data, tmp_path / "images"))
    for i in range(3):
        (folder / f"{i:02}.png").write_bytes(b"")
    train(tiny(folder, tmp_path / "run", epochs=2, max_unreadable=3 / 16))
    with pytest.raises(ValueError, match=r"max_unreadable: 3 of 16 images .* more than 18\.00%"):
        train(tiny(folder, tmp_path / "strict", epochs=2, max_unreadable=0.18))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run_with_the_field_and_where_they_are_named(damaged, tmp_path, workers):
    run = tmp_path / "run"
    words = flags(damaged, run, max_unreadable=0.124, workers=workers)
    with Child(run_cli, words, folder=tmp_path / "printed") as child:
        assert child.wait() == 2
        assert not child.is_left()
    assert one_sentence(child.output) == (
        f"passreid-train: max_unreadable: 2 of 16 images cannot be read, more than 12.40%; {run}/log.txt names them"
    )
    log = (run / "log.txt").read_text()
    assert "ValueError: max_unreadable: 2 of 16 images cannot be read, more than 12.40%" in log
    assert f"left out: {damaged / '05.png'}" in log
    assert f"left out: {damaged / '15.png'}" in log


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_ends_with_an_error_if_no_image_can_be_read(tmp_path, workers):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.jpg").write_text("no image")
    words = flags(folder, tmp_path / "run", workers=workers, max_unreadable=1)
    with Child(run_cli, words, folder=tmp_path / "printed") as child:
        assert child.wait() == 2  # and does not wait for its workers forever
        assert not child.is_left()
    message = one_sentence(child.output)
    assert re.match(f"passreid-train: 8 images in a row cannot be read; the first: {folder}/[0-7].jpg: ", message)
    with pytest.raises(ImageError, match="8 images in a row"):
        train(tiny(folder, tmp_path / "other", max_unreadable=1))


# ---- Workers in trouble


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_leaves_no_other_behind(data, home):
    run = home / "bereaved"
    with Child(run_cli, flags(data, run, **LONG, workers=2), folder=home / "printed") as child:
        child.wait_until(lambda: steps_logged(run) > EPOCH_STEPS)
        pid = child.process.pid
        workers = [int(w) for w in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)  # as the system does when memory runs out
        assert child.wait() == 1
        assert not child.is_left()
    message = one_sentence(child.output)
    assert "a process that loads images died (DataLoader worker" in message
    assert "fewer --workers" in message


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_a_script_without_the_main_guard_names_it_in_both_processes(method, data, tmp_path):
    config = tiny(data, tmp_path / "run", epochs=1, workers=1)
    script = tmp_path / "script.py"
    script.write_text(
        f"import multiprocessing\nfrom passreid_models.pretrain import PretrainConfig, train\n"
        f"multiprocessing.set_start_method({method!r}, force=True)\ntrain(PretrainConfig(**{config.to_dict()}))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith(("RuntimeError", "ChildProcessError"))]
    assert len(errors) == 2
    assert all('training stands below if __name__ == "__main__":' in line for line in errors)


def test_a_run_that_another_process_made_meanwhile_is_left_alone(whole, data, tmp_path, monkeypatch):
    prepare = PretrainRun.prepare

    def slowly(self: PretrainRun, *args: object) -> PretrainTrainer:
        trainer = prepare(self, *args)
        monkeypatch.undo()
        train(tiny(data, tmp_path / "run"))  # from its beginning to its end
        return trainer

    monkeypatch.setattr(PretrainRun, "prepare", slowly)
    with pytest.raises(ValueError, match="another process has trained in it just now: start again"):
        train(tiny(data, tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("*.later"))
    assert_same_bits(tmp_path / "run", result(whole))
    train(tiny(data, tmp_path / "run", resume="auto"))  # the lock is free


def test_a_run_whose_folder_is_moved_stops_and_goes_on_where_it_is_moved_back(whole, data, tmp_path, monkeypatch):
    run, step = tmp_path / "run", PretrainTrainer.training_step

    def move(self: PretrainTrainer, *args: object) -> dict[str, float]:
        if self.step == 6:
            run.rename(tmp_path / "moved")
        return step(self, *args)

    monkeypatch.setattr(PretrainTrainer, "training_step", move)
    with pytest.raises(OSError, match="run was deleted, moved or replaced while the run wrote to it"):
        train(tiny(data, run))
    assert not run.exists()
    monkeypatch.undo()
    (tmp_path / "moved").rename(run)
    train(tiny(data, run, resume="auto"))
    assert_same_bits(run, result(whole))
    assert [r["step"] for r in metrics(run)] == list(range(1, STEPS + 1))


def run_on_a_disk_that_is_gone(words: list[str]) -> int:
    """Run where reading ``gone.png`` waits forever, as from a network disk."""
    read_file = images.read_file

    def wait(path: str) -> bytes:
        if path.endswith("gone.png"):
            time.sleep(3600)
        return read_file(path)

    images.read_file = wait
    return run_cli(words)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_ctrl_c_ends_a_run_whose_data_hangs(data, tmp_path, workers):
    paths = [*sorted(data.iterdir()), tmp_path / "gone.png"]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    run = tmp_path / "run"
    words = flags(tmp_path / "list.txt", run, workers=workers)
    with Child(run_on_a_disk_that_is_gone, words, folder=tmp_path / "printed") as child:
        seen = [-1, 0]
        while seen[-1] != seen[-2] or not seen[-1]:
            time.sleep(2)
            seen.append(steps_logged(run))
        for _ in range(2):
            child.signal(signal.SIGINT)
            time.sleep(0.5)
        assert child.wait() == 130
        assert not child.is_left()
    assert one_sentence(child.output) == "passreid-train: interrupted"
