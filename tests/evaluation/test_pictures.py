"""Pictures of an evaluation: which images are shown in which frame, and which numbers are drawn."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from passreid_models.data.datasets import Split, open_dataset
from passreid_models.embed import Embedder
from passreid_models.evaluation.evaluate import Evaluation, evaluate_dataset
from passreid_models.evaluation.pictures import best_hits, draw_evaluation, draw_ranking
from passreid_models.evaluation.report import Retrieved
from tests.reid_data import make_model, write_flat, write_persons

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Evaluation:
    dataset = open_dataset(write_persons(tmp_path_factory.mktemp("market") / "persons"))
    result = evaluate_dataset(dataset, Embedder(make_model(), "cpu"), cache=False, per_camera=True)
    assert result is not None
    return result


def plain(folder: Path, has_cameras: bool, own: int = -1) -> Retrieved:
    """One query of identity 1 under camera 1 and five gallery images of one colour each, best first."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(6):
        Image.new("RGB", (20, 40), (10 * i, 0, 100)).save(folder / f"{i}.png")
    angles = torch.linspace(0, 1, 6)
    x = torch.stack([angles.cos(), angles.sin()], 1)
    gallery = Split([folder / f"{i}.png" for i in range(1, 6)], np.array([1, 1, 2, 1, 0]), np.array([0, 1, 1, 2, 0]))
    return Retrieved(
        query=Split([folder / "0.png"], np.array([1]), np.array([0])),
        gallery=gallery,
        query_features=x[:1],
        gallery_features=x[1:],
        own=np.array([own]),
        pids=(np.array([1]), gallery.pids),
        has_cameras=has_cameras,
        metric="cosine",
        unreadable=[],
        not_finite=[],
        advice="",
        images=6,
        cached=0,
    )


@pytest.mark.parametrize(
    ("cameras", "own", "expected"),
    [(True, -1, [1, 2, 3]), (False, -1, [0, 1, 2]), (False, 1, [0, 2, 3]), (True, 0, [1, 2, 3])],
)
def test_hits_are_in_order_without_those_that_the_protocol_leaves_out(tmp_path, cameras, own, expected):
    assert best_hits(plain(tmp_path, cameras, own), 0, 3).tolist() == expected
    assert len(best_hits(plain(tmp_path, cameras, own), 0, 99)) == (4 if cameras or own >= 0 else 5)


def test_hits_have_the_colour_of_right_and_wrong_and_their_images_inside(tmp_path):
    sheet = draw_ranking(plain(tmp_path, True), np.array([0]), topk=4)
    frames = [sheet.getpixel((column * 72 + (8 if column else 0) + 1, 60)) for column in range(5)]
    black, green, red = (0, 0, 0), (0, 128, 0), (255, 0, 0)
    assert frames == [black, green, red, green, red]
    inside = [sheet.getpixel((column * 72 + (8 if column else 0) + 36, 60)) for column in range(5)]
    assert inside == [(10 * i, 0, 100) for i in (0, 2, 3, 4, 5)]
    label = np.asarray(sheet.crop((0, 136, sheet.width, sheet.height)).convert("L"))
    assert [(label[:, x : x + 72] < 128).any() for x in (0, 80, 152, 224, 296)] == [True] * 5


def test_places_without_a_hit_stay_white(tmp_path):
    sheet = draw_ranking(plain(tmp_path, True), np.array([0]), topk=6)
    assert sheet.getpixel((5 * 72 + 9, 60)) == (255, 255, 255)


def test_without_cameras_no_camera_is_named(tmp_path):
    retrieved = plain(tmp_path, False)
    retrieved.query.camids[:], retrieved.gallery.camids[:] = -1, -1
    sheet = draw_ranking(retrieved, np.array([0]), topk=4)
    label = np.asarray(sheet.crop((0, 136, sheet.width, sheet.height)).convert("L"))
    assert [bool((label[:, x : x + 72] < 128).any()) for x in (0, 80, 152, 224, 296)] == [True, *[False] * 4]


def test_four_pictures_are_written(evaluation, tmp_path):
    paths = draw_evaluation(evaluation, tmp_path / "pictures", queries=3, topk=5)
    names = ["cmc.png", "ranking.png", "roc.png", "similarities.png"]
    assert sorted(path.name for path in paths) == sorted(p.name for p in (tmp_path / "pictures").iterdir()) == names
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    with Image.open(tmp_path / "pictures" / "ranking.png") as ranking:
        assert ranking.size == (6 * 72 + 8, 3 * 150)


def test_the_curves_are_those_of_the_evaluation(evaluation, tmp_path, monkeypatch):
    plots, stairs, lines = [], {}, []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: None)
    plot, draw_stairs = Axes.plot, Axes.stairs
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: plots.append((a[0], a[1], k["label"])) or plot(self, *a, **k)
    )
    monkeypatch.setattr(
        Axes, "stairs", lambda self, *a, **k: stairs.update({k["label"]: a}) or draw_stairs(self, *a, **k)
    )
    axvline = Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **k: lines.append(x) or axvline(self, x, **k))
    draw_evaluation(evaluation, tmp_path, queries=1, topk=1)
    ranks, shares, label = plots[0]
    assert (ranks[0], ranks[-1]) == (1, 50)
    assert shares == pytest.approx((100 * evaluation.metrics.cmc).tolist())
    assert label == f"as ranked, mAP {100 * evaluation.metrics.mAP:.1f}"
    assert plots[1][0].tolist() == evaluation.roc.fpr.tolist()
    assert plots[1][1] == pytest.approx(100 * evaluation.roc.tpr)
    assert (plots[2][0], plots[2][1]) == ([evaluation.roc.eer], [pytest.approx(100 - 100 * evaluation.roc.eer)])
    assert lines == [evaluation.roc.eer_threshold]
    for name, counts in (
        ("right pairs", evaluation.roc.positive_histogram),
        ("wrong pairs", evaluation.roc.negative_histogram),
    ):
        heights, edges = stairs[name]
        assert sum(heights) == pytest.approx(100)
        assert len(edges) == len(heights) + 1
        peak = int(np.argmax(counts))
        assert edges[int(np.argmax(heights))] == evaluation.roc.histogram_edges[peak]


def test_queries_that_do_not_count_are_not_shown(tmp_path, monkeypatch):
    root = write_flat(tmp_path / "own", ids=3, images=2)
    (root / "person 0" / "1.jpg").unlink()
    evaluation = evaluate_dataset(open_dataset(root), Embedder(make_model(), "cpu"), cache=False)
    assert evaluation is not None
    shown: list[int] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: None)
    monkeypatch.setattr(
        "passreid_models.evaluation.pictures.draw_ranking",
        lambda retrieved, rows, topk: shown.extend(rows.tolist()) or Image.new("RGB", (1, 1)),
    )
    draw_evaluation(evaluation, tmp_path / "pictures")
    assert shown == [1, 2, 3, 4]


def test_without_matplotlib_the_extra_is_named_and_nothing_written(evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pictures: pip install "passreid-models\[viz\]"'):
        draw_evaluation(evaluation, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
