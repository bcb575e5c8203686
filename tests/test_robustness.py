"""Hostile input of every class ends in a valid result or in one sentence, without a traceback, a wait or code run.

The long form draws hundreds of each class: ``pytest tests/test_robustness.py --hypothesis-profile long``. The classes
are those of ``benchmarks/robustness.py``, whose cases are decided by a seed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hostile import make_base
from hypothesis import given
from hypothesis import strategies as st
from robustness import CLASSES, run_case

from tests import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory, one_thread):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", CLASSES)
@given(rng=st.randoms(use_true_random=False))
def test_hostile_input_ends_in_a_result_or_a_sentence(base, kind, rng):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as parent:
        work = Path(parent).resolve() / "case"
        work.mkdir()
        call = CLASSES[kind](rng, base, work)
        outcome = run_case(call, work)
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
        (lambda: b"x" * 2**28, "over 2 GB"),
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


@pytest.mark.slow
def test_the_benchmark_of_robustness_reports_its_figures():
    command = [sys.executable, ROOT / "benchmarks" / "robustness.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    zeros = dict.fromkeys(("failures", "kills", "lost", "tracebacks", "hangs", "over_2gb", "code_executed"), 0)
    assert json.loads(done.stdout.splitlines()[-1]) == {"cases": 3 * len(CLASSES), **zeros}
