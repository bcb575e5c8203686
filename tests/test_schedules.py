"""Schedules: the official values step by step, and the ends of each curve."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from passreid_models.schedules import cosine, linear_epochs, warmup_cosine, warmup_cosine_epochs
from tests import GOLDEN

EPOCHS, ITERATIONS, WARMUP = 10, 7, 2  # of the golden file
TOTAL = EPOCHS * ITERATIONS


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "pretrain_schedules.safetensors")


def float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- Official values


def test_learning_rate_is_the_official_one_at_every_step(golden):
    ours = float64([warmup_cosine(i, TOTAL, WARMUP * ITERATIONS, 5e-4 * 64 / 256, 1e-6) for i in range(TOTAL)])
    torch.testing.assert_close(ours, golden["lr"], rtol=3e-16, atol=0)  # the last bit of a float64


def test_weight_decay_is_the_official_one_at_every_step(golden):
    assert torch.equal(float64([cosine(i, TOTAL, 0.04, 0.4) for i in range(TOTAL)]), golden["weight_decay"])


def test_teacher_momentum_is_the_official_one_at_every_step(golden):
    assert torch.equal(float64([cosine(i, TOTAL, 0.996, 1.0) for i in range(TOTAL)]), golden["momentum"])


def test_teacher_temperature_is_the_official_one_at_every_epoch():
    # The metadata of golden/pretrain_step: linspace(0.04, 0.07, 3), then 0.07; the loss is given at epochs 0, 1 and 5.
    ours = [linear_epochs(epoch, 3, 0.04, 0.07) for epoch in range(6)]
    assert ours == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07, 0.07], rel=1e-15)


@pytest.mark.parametrize("warmup", [1, 2, 3, 30])
def test_linear_epochs_is_a_linspace_and_then_constant(warmup):
    ours = [linear_epochs(epoch, warmup, 0.04, 0.07) for epoch in range(warmup + 3)]
    assert ours == pytest.approx([*np.linspace(0.04, 0.07, warmup), 0.07, 0.07, 0.07], rel=1e-15)


@pytest.mark.parametrize("warmup", [0, 1, 30])
def test_the_published_teacher_temperature_is_flat(warmup):
    assert {linear_epochs(epoch, warmup, 0.04, 0.04) for epoch in range(100)} == {0.04}


# ---- Ends


def test_cosine_runs_from_start_through_the_middle_to_end():
    assert cosine(0, 8, 3.0, 1.0) == 3.0
    assert cosine(4, 8, 3.0, 1.0) == pytest.approx(2.0, abs=1e-15)
    assert cosine(8, 8, 3.0, 1.0) == 1.0


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.04, 0.4)])
def test_cosine_never_turns_and_stays_short_of_the_end(start, end):
    values = float64([cosine(i, 50, start, end) for i in range(50)])
    assert ((values.diff() > 0) == (end > start)).all()
    assert values[-1] != end


def test_warm_up_starts_at_zero_reaches_the_peak_at_its_last_step_and_the_cosine_starts_there_again():
    values = [warmup_cosine(i, 20, 5, 8.0, 1.0) for i in range(20)]
    assert values[:6] == [0.0, 2.0, 4.0, 6.0, 8.0, 8.0]
    assert values[5:] == [cosine(i, 15, 8.0, 1.0) for i in range(15)]


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert [warmup_cosine(i, 4, 0, 8.0, 1.0) for i in range(4)] == [cosine(i, 4, 8.0, 1.0) for i in range(4)]
    assert warmup_cosine(0, 4, 0, 8.0, 1.0) == 8.0


def test_a_warm_up_of_one_step_is_at_zero():
    assert [warmup_cosine(i, 3, 1, 8.0, 1.0) for i in range(3)] == [0.0, 8.0, pytest.approx(4.5)]


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak():
    assert [warmup_cosine(i, 3, 3, 8.0, 1.0) for i in range(3)] == [0.0, 4.0, 8.0]


def test_a_run_of_one_step_takes_the_first_value():
    assert cosine(0, 1, 0.04, 0.4) == pytest.approx(0.04, rel=1e-15)
    assert warmup_cosine(0, 1, 0, 8.0, 1.0) == 8.0
    assert warmup_cosine(0, 1, 1, 8.0, 1.0) == 0.0


def test_a_teacher_temperature_without_warm_up_is_at_its_end_from_the_first_epoch():
    assert [linear_epochs(epoch, 0, 0.04, 0.07) for epoch in range(3)] == [0.07, 0.07, 0.07]


def test_the_rates_of_supervised_fine_tuning_are_the_official_ones():
    golden = load_file(GOLDEN / "supervised_lr.safetensors")["lr_by_epoch"]
    for scale, column in ((1, 0), (2, 1)):  # weights, biases
        rates = [warmup_cosine_epochs(e, 120, 20, scale * 4e-4, 0.01 * 4e-4, 0.002 * 4e-4) for e in range(121)]
        assert rates == pytest.approx(golden[:, column].tolist(), rel=1e-12)
