"""Runs of several processes: the steps of one, in one folder, stopped together."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.evaluation.evaluate import evaluate_model
from passreid_models.pretrain.batches import StepSampler
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.run import train
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.training.folder import RunFolder
from passreid_models.training.run import Stopped
from tests import ROOT
from tests.reid_data import write_flat
from tests.tiny_runs import (
    EPOCH_STEPS,
    LONG,
    LONG_STEPS,
    STEPS,
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
    world,
)


def without_key_biases(tensors: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """A network's weights without key biases: attention does not depend on them, and Adam moves them by rounding."""
    weights = {k: v.detach() for k, v in tensors.items() if k.startswith(f"/{network}/")}
    return {k: v.view(3, -1)[[0, 2]] if k.endswith("attn.qkv.bias") else v for k, v in weights.items()}


TWO = {"drop_path": 0.0, "lr": 0.02}  # each process draws its own drop path


@pytest.fixture(scope="module")
def joint(home, data) -> Path:
    """A run of one process, which two processes must equal."""
    train(tiny(data, home / "joint", **TWO))
    return home / "joint"


def test_two_processes_take_the_steps_of_one_with_the_same_batch_and_write_one_folder(joint, home, data):
    run = home / "two"
    with ExitStack() as stack:
        children = world(run_cli, flags(data, run, **TWO), folder=home / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [0, 0]
    weights, expected_weights = result(run), result(joint)
    for network in ("student", "teacher"):
        ours, expected = (without_key_biases(x, network) for x in (weights, expected_weights))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        start = without_key_biases(start_of(joint), network)
        assert max((expected[k] - start[k]).abs().max().item() for k in expected) > 1e-3
    torch.testing.assert_close(weights["/centers"], expected_weights["/centers"], rtol=0, atol=1e-4)
    assert files(run) == files(joint)
    assert [r["step"] for r in metrics(run)] == list(range(1, STEPS + 1))
    for ours, expected in zip(metrics(run), metrics(joint), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-3)
    assert "3 epochs of 4 steps of 4 images: 2 processes x 1 micro-batches x 2" in (run / "log.txt").read_text()
    assert (run / "log.txt").read_text().count("learning rate:") == 1


def start_of(run: Path) -> dict[str, Tensor]:
    trainer = PretrainTrainer(
        PretrainConfig.from_dict(RunFolder(run).load_latest()[1]["config"]), 16, torch.device("cpu")
    )
    networks = {"student": trainer.student, "teacher": trainer.teacher}
    return {f"/{name}/{k}": v for name, network in networks.items() for k, v in network.state_dict().items()}


def test_a_signal_to_one_process_stops_all_and_another_number_of_them_goes_on_with_a_warning(joint, home, data):
    run = home / "fewer"
    with ExitStack() as stack:
        children = world(run_cli, flags(data, run, **LONG, **TWO), folder=home / "world")
        for child in children:
            stack.enter_context(child)
        children[0].wait_until(lambda: steps_logged(run) > 2)
        children[1].signal(signal.SIGTERM)
        assert [child.wait() for child in children] == [0, 143]
    step = saved_steps(run)[-1]
    with pytest.raises(Stopped, match=f"stopped at step {step + 1} of {LONG_STEPS}"):
        train(tiny(data, run, **LONG, resume="auto", max_minutes=1e-9, **TWO))
    log = (run / "log.txt").read_text()
    assert "resumed with 1 processes instead of 2: batches are the same, but results agree up to rounding only" in log
    assert [r["step"] for r in metrics(run)] == list(range(1, step + 2))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_sentence_and_the_run_resumes(home, data):
    run = home / "bereaved"
    with ExitStack() as stack:
        children = world(run_cli, flags(data, run, **LONG, **TWO, save_minutes=0), folder=home / "world")
        for child in children:
            stack.enter_context(child)
        children[0].wait_until(lambda: steps_logged(run) > 2)
        children[1].signal(signal.SIGKILL)
        assert [child.wait() for child in children] == [1, -signal.SIGKILL]
    assert "another process of this run has ended" in one_sentence(children[0].output)
    step = saved_steps(run)[-1]
    with pytest.raises(Stopped, match=f"stopped at step {step + 1} of {LONG_STEPS}"):
        train(tiny(data, run, **LONG, resume="auto", max_minutes=1e-9, **TWO))
    assert [r["step"] for r in metrics(run)] == list(range(1, step + 2))


def test_a_batch_that_the_processes_cannot_share_is_refused(data, home):
    with ExitStack() as stack:
        children = world(run_cli, flags(data, home / "uneven", batch_size=3), folder=home / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2, 2]
    assert "batch_size: 3 is not divisible by 2 processes" in one_sentence(children[0].output)
    assert not (home / "uneven").exists()


def test_processes_that_find_different_checkpoints_are_refused_and_change_nothing(joint, data, tmp_path):
    shutil.copytree(joint, tmp_path / "run0")
    with ExitStack() as stack:
        words = flags(data, tmp_path / "run{rank}", resume="auto", **TWO)
        children = world(run_cli, words, folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2, 2]
    for rank, step in enumerate((STEPS, 0)):
        message = one_sentence(children[rank].output)
        assert f"out: the processes found different steps (this one {step}, their mean is {STEPS // 2})" in message
        assert f"{tmp_path}/run{rank} must be one folder for all processes" in message
    assert files(tmp_path / "run0") == files(joint)
    assert not (tmp_path / "run1").exists()


def test_processes_that_are_at_the_mean_step_of_all_are_refused_with_the_others(joint, data, tmp_path):
    steps = (STEPS, 0, STEPS // 2, STEPS // 2)
    for rank, step in enumerate(steps):
        if step:
            shutil.copytree(joint, run := tmp_path / f"run{rank}")
            state = RunFolder(run).load_latest()[1]
            for file in RunFolder(run).checkpoints():
                file.unlink()
            torch.save({**state, "step": step}, run / "checkpoints" / f"step_{step:09}.pt")
    with ExitStack() as stack:
        words = flags(data, tmp_path / "run{rank}", resume="auto", **TWO)
        children = world(run_cli, words, folder=tmp_path / "world", size=4)
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2] * 4
    for child, step in zip(children, steps, strict=True):
        message = f"out: the processes found different steps (this one {step}, their mean is {STEPS // 2})"
        assert message in one_sentence(child.output)


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_names_its_unreadable_images_and_all_are_counted_together(data, tmp_path, count):
    images, run = Path(shutil.copytree(data, tmp_path / "images")), tmp_path / "run"
    first, second = (
        sorted(chain(*StepSampler(16, 4, EPOCH_STEPS, seed=0, rank=rank, world_size=2))) for rank in (0, 1)
    )
    broken = [images / f"{i:02}.png" for i in (second[0], second[-1], first[3])[:count]]
    for path in broken:
        path.write_bytes(b"no image")
    with ExitStack() as stack:
        children = world(run_cli, flags(images, run, epochs=1, max_unreadable=0.125), folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [0 if count == 2 else 2] * 2
    log = (run / "log.txt").read_text()
    assert [log.count(f"left out: {path}") for path in broken] == [1] * count
    refusal = "max_unreadable: 3 of 16 images cannot be read, more than 12.50%"
    assert [refusal in one for one in (log, *(child.output for child in children))] == [count == 3] * 3


def test_processes_that_find_different_images_are_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "images0")
    images = Path(shutil.copytree(data, tmp_path / "images1"))
    (images / "00.png").rename(images / "another.png")
    with ExitStack() as stack:
        children = world(run_cli, flags(tmp_path / "images{rank}", tmp_path / "run"), folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2, 2]
    for rank, child in enumerate(children):
        assert f"data: the processes found different images in {tmp_path}/images{rank} (" in one_sentence(child.output)
    assert not (tmp_path / "run").exists()


def test_processes_that_find_other_images_to_evaluate_on_are_refused(data, tmp_path):
    for rank, ids in enumerate((3, 4)):
        write_flat(tmp_path / f"probe{rank}", ids)
    with ExitStack() as stack:
        words = flags(data, tmp_path / "run", probe=tmp_path / "probe{rank}")
        children = world(run_cli, words, folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2, 2]
    for child in children:
        assert "the processes found different images to evaluate on" in one_sentence(child.output)
    assert not (tmp_path / "run").exists()


def test_processes_that_begin_with_other_weights_train_with_those_of_the_first(data, home, tmp_path):
    for rank in range(2):
        torch.manual_seed(rank)
        save_pretrained(timm.create_model("test_pass_vit", img_size=(64, 32)), tmp_path / f"start{rank}")
    runs = {}
    for name, init in (("same", "start0"), ("other", "start{rank}")):
        runs[name] = tmp_path / name
        with ExitStack() as stack:
            words = flags(data, runs[name], init=tmp_path / init, epochs=1, **TWO)
            children = world(run_cli, words, folder=tmp_path / f"world_{name}")
            for child in children:
                stack.enter_context(child)
            assert [child.wait() for child in children] == [0, 0]
    assert_same_bits(runs["other"], result(runs["same"]))


def test_what_fails_in_the_first_process_alone_ends_all_with_the_same_sentence(data, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open()
    with ExitStack() as stack:
        stack.callback(folder.close)
        children = world(run_cli, flags(data, tmp_path / "run"), folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2, 2]
    for child in children:
        assert "run: another process trains in it; if none does" in one_sentence(child.output)


@pytest.mark.parametrize("broken", ["one", "all"])
def test_the_processes_share_the_probe_and_log_the_figures_of_eval(data, tmp_path, broken):
    probe, run = write_flat(tmp_path / "persons"), tmp_path / "run"
    for path in sorted(probe.rglob("*.jpg"))[: 1 if broken == "one" else None]:
        path.write_bytes(b"")
    with ExitStack() as stack:
        children = world(run_cli, flags(data, run, epochs=2, probe=probe, probe_epochs=2), folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [0, 0]
    log, rows = (run / "log.txt").read_text(), [row for row in metrics(run) if "probe_mAP" in row]
    assert log.count(f"{1 if broken == 'one' else 12} images cannot be read, the first: {probe}/person 0/0.jpg: ") == 1
    if broken == "all":
        assert rows == []
        assert (
            f"probe: no query image can be ranked: all are junk or cannot be read; the first: {probe}/person 0" in log
        )
        return
    evaluation = evaluate_model(probe, str(run), device="cpu")
    assert evaluation is not None
    assert evaluation.metrics.num_queries == 11
    [row] = rows
    expected = evaluation.to_dict()
    assert (row["probe_mAP"], row["probe_rank1"]) == pytest.approx((expected["mAP"], expected["rank1"]), abs=1e-3)


@pytest.mark.slow
def test_the_processes_rank_the_probe_with_the_statistics_of_the_first_ones_conv_stem(data, tmp_path):
    options = {"model": "pass_vit_small_ics_patch16", "epochs": 1, "probe": write_flat(tmp_path / "persons")}
    with ExitStack() as stack:
        children = world(run_cli, flags(data, tmp_path / "run", **options), folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [0, 0]
    evaluation = evaluate_model(options["probe"], str(tmp_path / "run"), device="cpu")
    assert evaluation is not None
    [mAP] = [row["probe_mAP"] for row in metrics(tmp_path / "run") if "probe_mAP" in row]
    assert mAP == pytest.approx(evaluation.to_dict()["mAP"], abs=1e-3)


def test_a_probe_that_cannot_be_ranked_is_refused_by_all_processes(data, tmp_path):
    with ExitStack() as stack:
        children = world(run_cli, flags(data, tmp_path / "run", probe="nowhere"), folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2, 2]
        assert one_sentence(children[0].output).startswith("passreid-train: probe: nowhere: no such file or folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_such_a_run(joint, home, data):
    run = home / "torchrun"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0", "-m", "passreid_models.cli", "train", *flags(data, run, **TWO),
    ]  # fmt: skip
    root = ROOT
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    ours, expected = (without_key_biases(result(x), "teacher") for x in (run, joint))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert files(run) == files(joint)
