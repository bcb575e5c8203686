"""Runs of several processes: the steps of one, in one folder, stopped together."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from passreid_models.pretrain.batches import StepSampler
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.run import train
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.training.folder import RunFolder
from passreid_models.training.run import Stopped
from tests import ROOT
from tests.tiny_runs import (
    EPOCH_STEPS,
    LONG,
    LONG_STEPS,
    STEPS,
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
    write_images,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module", autouse=True)
def own_cache(home) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PASSREID_CACHE", str(home / "cache"))
        yield


@pytest.fixture(scope="module")
def data(home) -> Path:
    return write_images(home / "images")


def without_key_biases(tensors: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """A network's weights. Attention does not depend on its key biases: they move by Adam's steps of rounding."""
    found = {k: v.detach() for k, v in tensors.items() if k.startswith(f"/{network}/")}
    return {k: v.view(3, -1)[[0, 2]] if k.endswith("attn.qkv.bias") else v for k, v in found.items()}


TWO = {"drop_path": 0.0, "lr": 0.02}  # stochastic depth is drawn by each process


@pytest.fixture(scope="module")
def joint(home, data, one_thread) -> Path:
    """What two processes must come to."""
    train(tiny(data, home / "joint", **TWO))
    return home / "joint"


def test_two_processes_take_the_steps_of_one_with_the_same_batch_and_write_one_folder(joint, home, data):
    run = home / "two"
    with ExitStack() as stack:
        children = world(run_cli, flags(data, run, **TWO), folder=home / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [0, 0]
    found, expected = result(run), result(joint)
    for network in ("student", "teacher"):
        ours, wanted = (without_key_biases(x, network) for x in (found, expected))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
        start = without_key_biases(start_of(joint), network)
        assert max((wanted[k] - start[k]).abs().max().item() for k in wanted) > 1e-3
    torch.testing.assert_close(found["/centers"], expected["/centers"], rtol=0, atol=1e-4)
    assert files(run) == files(joint)
    assert [r["step"] for r in metrics(run)] == list(range(1, STEPS + 1))
    for ours, wanted in zip(metrics(run), metrics(joint), strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], abs=1e-3)
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


def test_a_batch_that_the_processes_cannot_share_is_refused(data, home):
    with ExitStack() as stack:
        children = world(run_cli, flags(data, home / "uneven", batch_size=3), folder=home / "world")
        for child in children:
            stack.enter_context(child)
        assert [child.wait() for child in children] == [2, 2]
    assert "batch_size: 3 is not divided by 2 processes" in one_sentence(children[0].output)
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
        said = one_sentence(children[rank].output)
        assert f"out: the processes found different steps (this one {step}, their mean is {STEPS // 2})" in said
        assert f"{tmp_path}/run{rank} must be one folder for all processes" in said
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
        said = f"out: the processes found different steps (this one {step}, their mean is {STEPS // 2})"
        assert said in one_sentence(child.output)


@pytest.mark.parametrize("count", [1, 2])
def test_each_process_names_its_unreadable_images_and_counts_them_among_its_own(data, tmp_path, count):
    images, run = Path(shutil.copytree(data, tmp_path / "images")), tmp_path / "run"
    seen_by_second = sorted(chain(*StepSampler(16, 4, EPOCH_STEPS, seed=0, rank=1, world_size=2)))
    broken = [images / f"{i:02}.png" for i in seen_by_second[:: len(seen_by_second) - 1][:count]]
    for path in broken:
        path.write_bytes(b"no image")
    with ExitStack() as stack:
        children = world(run_cli, flags(images, run, epochs=1, max_unreadable=0.125), folder=tmp_path / "world")
        for child in children:
            stack.enter_context(child)
        assert children[1].wait() == (0 if count == 1 else 2)
    log = (run / "log.txt").read_text()
    assert [log.count(f"left out: {path}") for path in broken] == [1] * count
    refusal = "max_unreadable: 2 of 8 images cannot be read, more than 12.50%"  # of all 16 they are no more
    assert [refusal in one for one in (log, children[1].output)] == [count == 2] * 2


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
    ours, wanted = (without_key_biases(result(x), "teacher") for x in (run, joint))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert files(run) == files(joint)
