"""Curves of a run: which metrics are drawn, and the errors without metrics."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from passreid_models.pretrain.trainer import token_kinds
from passreid_models.training.plot import PANELS, plot_run


@pytest.fixture
def curves(monkeypatch) -> dict[str, tuple[list[float], list[float]]]:
    """Curves by label, recorded while they are drawn; the picture itself, which takes a second, is not made."""
    recorded: dict[str, tuple[list[float], list[float]]] = {}
    plot = Axes.plot

    def spy(self: Axes, x: list[float], y: list[float], **options: object) -> object:
        recorded[str(options["label"])] = list(x), list(y)
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: None)
    return recorded


def record(step: int, parts: int = 3) -> dict[str, float]:
    losses = {f"loss_{kind.lower()}": 9.0 - step / 10 for kind in token_kinds(parts)}
    schedules = {"lr": step * 1e-4, "weight_decay": 0.04, "momentum": 0.996, "teacher_temp": 0.04}
    return {"step": step, "epoch": step / 2, "loss": 9.5, **losses, **schedules, "images_per_s": 20.0, "wait_share": 0}


def write(run: Path, records: list[dict[str, float]], end: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return run


def test_the_picture_is_a_png_in_the_folder_of_the_run(tmp_path):
    run = write(tmp_path, [record(1), record(2)])
    assert plot_run(run) == run / "curves.png"
    with Image.open(run / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 400
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert sorted(p.name for p in run.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize(("name", "begin"), [("a.pdf", b"%PDF"), ("b/a.svg", b"<?xml")])
def test_the_suffix_of_the_picture_decides_its_format(tmp_path, name, begin):
    picture = plot_run(write(tmp_path / "run", [record(1)]), tmp_path / name)
    assert picture == tmp_path / name
    assert picture.read_bytes().startswith(begin)
    assert not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("parts", [0, 1, 3, 5])
def test_a_curve_is_drawn_for_the_loss_of_every_kind_of_token(tmp_path, curves, parts):
    plot_run(write(tmp_path, [record(1, parts), record(2, parts)]))
    expected = ["loss", "loss_cls", *(f"loss_part{k + 1}" for k in range(parts))]
    assert [name for name in curves if name.startswith("loss")] == expected
    assert curves["loss_cls"] == ([0.5, 1.0], [8.9, 8.8])


def test_every_metric_that_was_written_and_has_a_panel_is_drawn(tmp_path, curves):
    names = {name for patterns in PANELS.values() for name in patterns if "*" not in name}
    plot_run(write(tmp_path, [{**record(s), **dict.fromkeys(names - set(record(s)), 0.5)} for s in (1, 2)]))
    assert set(curves) == names | {"loss_cls", "loss_part1", "loss_part2", "loss_part3"}


def test_schedules_are_drawn_as_shares_of_their_largest_value(tmp_path, curves):
    plot_run(write(tmp_path, [record(1), record(2), record(4)]))
    assert curves["lr"][0] == [0.5, 1.0, 2.0]
    assert curves["lr"][1] == pytest.approx([0.25, 0.5, 1.0])
    assert curves["momentum"][1] == [1, 1, 1]
    assert curves["images_per_s"][1] == [20, 20, 20]


def test_a_schedule_of_zeros_is_drawn_as_zeros(tmp_path, curves):
    plot_run(write(tmp_path, [{**record(1), "lr": 0.0}]))
    assert curves["lr"] == ([0.5], [0.0])


def test_metrics_in_some_lines_only_are_drawn_at_those_epochs(tmp_path, curves):
    last = {**record(4), "teacher_entropy": 5.5, "probe_mAP": 31.0}
    del last["loss"]  # no finite step
    plot_run(write(tmp_path, [record(1), record(2), last]))
    assert curves["teacher_entropy"] == ([2.0], [5.5])
    assert curves["probe_mAP"] == ([2.0], [31.0])
    assert curves["loss"][0] == [0.5, 1.0]
    assert "kl" not in curves


def test_the_panel_of_the_map_says_where_the_run_began(tmp_path, curves, monkeypatch):
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title, **options: titles.append(title))
    scores = [{"step": step, "epoch": step / 2, "mAP": mAP} for step, mAP in ((0, 37.2), (2, 36.6), (4, 34.4))]
    plot_run(write(tmp_path, [scores[0], record(1), *scores[1:]]))
    assert titles[-2] == "retrieval, %: mAP 37.2 before, 36.6 at best, 34.4 at the end"
    assert curves["mAP"] == ([0.0, 1.0, 2.0], [37.2, 36.6, 34.4])
    plot_run(write(tmp_path, [record(1), *scores[1:]]))  # a run of an older version
    assert titles[-2] == "retrieval, %"


def test_few_points_are_drawn_as_points_and_all_panels_show_the_whole_run(tmp_path, monkeypatch):
    sizes: dict[tuple[str, int], float] = {}
    limits: set[tuple[float, float]] = set()
    plot = Axes.plot

    def save(self: Figure, file: object, **options: object) -> None:
        limits.update(axes.get_xlim() for axes in self.axes)

    def spy(self: Axes, x: list[float], y: list[float], **options: Any) -> object:
        assert options["marker"] == "o"
        sizes[options["label"], len(x)] = options["markersize"]
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    monkeypatch.setattr(Figure, "savefig", save)
    plot_run(write(tmp_path, [record(1)]))
    assert sizes["loss", 1] == 5
    plot_run(write(tmp_path, [record(step) | ({"mAP": 9.0} if step % 20 == 0 else {}) for step in range(1, 61)]))
    assert (sizes["loss", 60], sizes["mAP", 3]) == (2, 5)
    assert {tuple(map(round, 1000 * np.array(ends))) for ends in limits} == {(-15, 515), (-900, 30900)}


def test_null_is_a_gap_in_a_curve(tmp_path, curves):
    records = [record(1), {**record(2), "loss": None, "lr": None}, {**record(4), "kl": None}]
    plot_run(write(tmp_path, records))
    assert curves["loss"][1] == pytest.approx([9.5, math.nan, 9.5], nan_ok=True)
    assert curves["lr"][1] == pytest.approx([0.25, math.nan, 1], nan_ok=True)
    assert curves["kl"][1] == pytest.approx([math.nan], nan_ok=True)


@pytest.mark.parametrize(
    "end", ['{"step": 3, "epo', "{", '{"step": 9, "loss": 1}\n', "\n", "5\n", '{"step": 9, "epoch": 9, "loss": "x"}\n']
)
def test_a_line_that_a_kill_cut_short_or_without_epoch_is_left_out(tmp_path, curves, end):
    plot_run(write(tmp_path, [record(1), record(2)], end))
    assert curves["loss"] == ([0.5, 1.0], [9.5, 9.5])


def test_a_folder_without_metrics_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=r"metrics.jsonl is not there: .* is no training run"):
            plot_run(folder)


@pytest.mark.parametrize("end", ["", '{"st'])
def test_metrics_without_a_step_are_refused(tmp_path, end):
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no steps yet"):
        plot_run(write(tmp_path, [], end))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("name", "message"), [("curves", "name a picture file such as curves.png"), ("a.xyz", "xyz")])
def test_a_picture_of_unknown_format_is_refused_and_leaves_no_file(tmp_path, name, message):
    run = write(tmp_path, [record(1)])
    with pytest.raises(ValueError, match=message):
        plot_run(run, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'plot: pip install "\.\[viz\]"'):
        plot_run(write(tmp_path, [record(1)]))
