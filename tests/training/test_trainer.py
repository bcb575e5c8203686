"""Positions of a trainer in its epochs."""

from types import SimpleNamespace

import pytest

from passreid_models.training.trainer import BaseTrainer


class Steps(BaseTrainer):
    """A trainer of epochs alone."""

    def __init__(self, log_steps: int, *epochs: int) -> None:
        self.config, self.step, self.epoch_starts = SimpleNamespace(log_steps=log_steps), 0, [0]
        for steps in epochs:
            self.epoch_starts.append(self.epoch_starts[-1] + steps)

    def lines(self) -> list[int]:
        """Steps after which a log line follows."""
        lines = []
        while self.step < self.epoch_starts[-1]:
            ends = self.ends_window
            self.step += 1
            lines += [self.step] * ends
        return lines


@pytest.mark.parametrize(
    ("log_steps", "epochs", "expected"),
    [
        (1, (2, 3), [1, 2, 3, 4, 5]),
        (2, (5, 4), [2, 5, 7, 9]),  # no window of the fifth step alone
        (50, (101,), [50, 101]),
        (50, (125, 126), [50, 125, 175, 225, 251]),
        (50, (99, 99), [50, 99, 149, 198]),  # none of step 100 alone
        (50, (3, 1, 60), [3, 4, 64]),
    ],
)
def test_log_lines_end_windows_of_more_than_half_their_steps(log_steps, epochs, expected):
    assert Steps(log_steps, *epochs).lines() == expected
