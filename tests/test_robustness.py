"""Hostile input of every class ends in a valid result or in one sentence, without a traceback, a wait or code run.

The long form draws hundreds of each class: ``pytest tests/test_robustness.py --hypothesis-profile long``. The classes
are those of ``benchmarks/robustness.py``, whose cases are decided by a seed.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hostile import make_base
from hypothesis import given
from hypothesis import strategies as st
from robustness import CLASSES, SIZED, run_all, run_case
from safetensors.numpy import save_file

from passreid_models import cli
from tests import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", CLASSES)
@given(rng=st.randoms(use_true_random=False))
def test_hostile_input_ends_in_a_result_or_a_sentence(base, kind, rng):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent:
        work = Path(parent).resolve() / "case"
        work.mkdir()
        call = CLASSES[kind](rng, base, work)
        outcome = run_case(call, work, sized=kind in SIZED)
    assert not outcome.failure, f"{outcome.failure} of {call}: {outcome.message}\n{outcome.output}"


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("call", "failure"),
    [
        (lambda: None, ""),
        (lambda: fail(ValueError("x.pth is damaged")), ""),
        (lambda: fail(ValueError("two\nlines")), "unclear message"),
        (lambda: fail(OSError("")), "unclear message"),
        (lambda: fail(KeyError("x")), "traceback"),
        (lambda: fail(MemoryError()), "over 2 GB"),
        (lambda: b"x" * 2**29, "over 2 GB"),
        (lambda: Path("EXECUTED").touch(), "code executed"),
        (lambda: subprocess.run(["sleep", "60"]), "hang"),
        (lambda: os._exit(0), "died"),
        (["no_such_command"], ""),
        (["plot", "no_such_folder"], ""),
    ],
)
def test_the_judge_knows_each_kind_of_failure(call, failure, tmp_path):
    (tmp_path / "case").mkdir()
    seconds = 1 if failure == "hang" else 60
    assert run_case(call, tmp_path / "case", seconds, memory=2**27).failure == failure


@pytest.mark.parametrize(("sized", "failure"), [(False, "over 2 GB"), (True, "")])
def test_out_of_memory_is_a_good_end_where_the_user_asked_for_a_size(sized, failure, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda words: print("passreid: out of memory: a smaller --batch-size") or 1)
    (tmp_path / "case").mkdir()
    assert run_case(["convert"], tmp_path / "case", sized=sized).failure == failure


@pytest.mark.parametrize(("value", "failure"), [(1, ""), (np.nan, "wrong result")])
@pytest.mark.parametrize("command", ["convert", "embed"])
def test_what_a_command_wrote_is_finite(command, value, failure, tmp_path, monkeypatch):
    x = np.full(3, value, np.float32)

    def write(words):
        if command == "embed":
            np.savez("out.npz", names=["a"], features=x)
        else:
            Path("out").mkdir()
            save_file({"x": x}, "out/model.safetensors")
        return 0

    monkeypatch.setattr(cli, "main", write)
    (tmp_path / "case").mkdir()
    assert run_case([command], tmp_path / "case").failure == failure


def test_a_worker_that_dies_is_a_failure_of_its_cases(tmp_path, monkeypatch):
    monkeypatch.setitem(CLASSES, "deadly", lambda rng, base, work: os._exit(9))
    ended = list(run_all([("deadly", 0), ("deadly", 1)], 0, None, tmp_path))
    assert sorted(number for _, number, _, _ in ended) == [0, 1]
    assert all(outcome.failure == "died" for _, _, outcome, _ in ended)


@pytest.mark.parametrize(
    "words",
    [
        ["robustness.py", "--only", "typo"],
        ["robustness.py", "--case", "typo:1"],
        ["kill.py", "--case", "typo", "--kills", "0"],
        ["run_all.py", "--only", "typo.py"],
        ["scale.py", "--images", "256"],
    ],
)
def test_a_benchmark_refuses_names_that_are_none(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as e:
        importlib.import_module(words[0].removesuffix(".py")).main()
    assert e.value.code == 2
    assert words[1] in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_of_robustness_reports_its_figures():
    command = [sys.executable, ROOT / "benchmarks" / "robustness.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    zeros = dict.fromkeys(
        ("failures", "kills", "lost", "tracebacks", "hangs", "over_2gb", "code_executed", "skipped"), 0
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {"cases": 3 * len(CLASSES), **zeros}
