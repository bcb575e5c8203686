"""Logging of runs: the time left, an early first line, and what the terminal shows."""

import pytest

from passreid_models import cli
from passreid_models.training import log
from tests.tiny_runs import flags, write_images


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    time = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: time[0])
    return time


def test_the_time_left_is_that_of_the_steps_and_of_an_epochs_other_work(clock):
    left = log.TimeLeft(step=0, total_steps=1000, epochs=10)
    clock[0] = 50.0  # such as clustering
    with left.stepping():
        clock[0] += 2.0
    assert left.after(1) == "41:37"  # 999 steps of 2 s and of a hundredth of 50 s
    for _ in range(199):
        with left.stepping():
            clock[0] += 2.0
    clock[0] += 50.0
    assert left.after(200) == "33:20"  # 800 steps of 2 s and of 100 s / 200
    assert left.after(1000) == "00:00"


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(clock):
    left = log.TimeLeft(step=900, total_steps=1000, epochs=10)
    with left.stepping():
        clock[0] += 4.0
    assert left.after(901) == "06:36"


def test_the_speed_is_that_of_the_images_of_each_step(clock):
    window = log.Window()
    for images in (8, 40):
        clock[0] += 2.0
        window.add({"loss": 1.0}, images)
    assert window.summary()["images_per_s"] == 12.0


def test_a_line_after_the_first_step_shows_that_the_run_goes_and_how_long(tmp_path, capsys):
    data, out = write_images(tmp_path / "images", 16), tmp_path / "run"
    assert cli.train(flags(data, out, epochs=2, log_steps=100)) == 0
    lines = [line for line in (out / "log.txt").read_text().splitlines() if " step " in line]
    assert [line.partition("step ")[2].split()[0] for line in lines] == ["1/8", "4/8", "8/8"]
    assert all("  loss " in line for line in lines)
    assert [line.split("  eta ")[1][:3] for line in lines] == ["00:", "00:", "00:"]
    assert lines[-1].endswith("  eta 00:00")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2  # the ends of the epochs
    assert "step 1/8" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["-q", "--quiet"])
def test_a_quiet_run_shows_nothing_and_logs_all(word, tmp_path, capsys):
    data, out = write_images(tmp_path / "images", 4), tmp_path / "run"
    assert cli.train([word, *flags(data, out, epochs=1)]) == 0
    output, error = capsys.readouterr()
    assert (output, error) == (f'timm.create_model("local-dir:{out}/export", pretrained=True)\n', "")
    assert "step 1/1" in (out / "log.txt").read_text()


def test_a_quiet_run_shows_warnings(tmp_path, capsys):
    data, out = write_images(tmp_path / "images", 5), tmp_path / "run"
    (data / "00.png").write_bytes(b"no image")
    assert cli.train(["-q", *flags(data, out, epochs=1, max_unreadable=1, batch_size=5)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "left out: " in line
