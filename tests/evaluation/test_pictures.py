"""Pictures of an evaluation: which images are shown in which frame, and which numbers are drawn."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from passreid_models.data.datasets import ReIDDataset, Split, open_dataset
from passreid_models.embed import Embedder
from passreid_models.evaluation.evaluate import Evaluation, evaluate_dataset
from passreid_models.evaluation.pictures import best_hits, draw_evaluation, draw_ranking
from passreid_models.evaluation.report import Retrieved
from tests.reid_data import make_model, write_flat, write_persons


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


def named(retrieved: Retrieved, cameras: tuple[str, ...] = ("lobby", "gate", "stairs")) -> ReIDDataset:
    """The dataset of ``plain``, whose identities and cameras have names."""
    pids, camids = {0: "0000", 1: "anna", 2: "ben"}, {-1: "", **dict(enumerate(cameras))}
    splits = retrieved.query.take(np.arange(0)), retrieved.query, retrieved.gallery
    return ReIDDataset(
        "CSV", retrieved.query.paths[0].parent, *splits, retrieved.has_cameras, pid_names=pids, camera_names=camids
    )


def ranking(retrieved: Retrieved, topk: int, **names: tuple[str, ...]) -> Image.Image:
    return draw_ranking(retrieved, named(retrieved, **names), np.array([0]), topk)


def labels(sheet: Image.Image, columns: int, first: int, last: int) -> list[bool]:
    """Whether there is text below each image, in these rows of pixels."""
    pixels = np.asarray(sheet.convert("L"))[136 + first : 136 + last]
    return [bool((pixels[:, x : x + 72] < 128).any()) for x in [0, *range(80, 80 + 72 * (columns - 1), 72)]]


@pytest.mark.parametrize(
    ("cameras", "own", "expected"),
    [(True, -1, [1, 2, 3]), (False, -1, [0, 1, 2]), (False, 1, [0, 2, 3]), (True, 0, [1, 2, 3])],
)
def test_hits_are_in_order_without_those_that_the_protocol_leaves_out(tmp_path, cameras, own, expected):
    assert best_hits(plain(tmp_path, cameras, own), 0, 3).tolist() == expected
    assert len(best_hits(plain(tmp_path, cameras, own), 0, 99)) == (4 if cameras or own >= 0 else 5)


def test_hits_have_the_colour_of_right_and_wrong_and_their_images_inside(tmp_path):
    sheet = ranking(plain(tmp_path, True), topk=4)
    frames = [sheet.getpixel((column * 72 + (8 if column else 0) + 1, 60)) for column in range(5)]
    black, green, red = (0, 0, 0), (0, 128, 0), (255, 0, 0)
    assert frames == [black, green, red, green, red]
    inside = [sheet.getpixel((column * 72 + (8 if column else 0) + 36, 60)) for column in range(5)]
    assert inside == [(10 * i, 0, 100) for i in (0, 2, 3, 4, 5)]
    assert labels(sheet, 5, 0, 13) == labels(sheet, 5, 13, 26) == [True] * 5


def test_identities_and_cameras_have_the_names_of_the_data(tmp_path, monkeypatch):
    written: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self, xy, text, *args, **options):
        if not args:  # Pillow 10 draws the lines of a text by itself
            written.append(text)
        draw_text(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    ranking(plain(tmp_path, True), topk=4)
    expected = ["id anna\ncam lobby", "id anna\ncam gate", "id ben\ncam gate", "id anna\ncam stairs"]
    assert written == [*expected, "distractor\ncam lobby"]
    written.clear()
    sheet = ranking(plain(tmp_path, True), topk=4, cameras=("x", "a camera whose name is long", "W" * 40))
    assert written[1] == "id anna\ncam a c..is long"
    gaps = np.asarray(sheet.convert("L"))[136:, [*range(72, 84), *range(152, 156), *range(224, 228)]]
    assert (gaps > 128).all()  # no label runs into the next


def test_places_without_a_hit_stay_white(tmp_path):
    sheet = ranking(plain(tmp_path, True), topk=6)
    assert sheet.getpixel((5 * 72 + 9, 60)) == (255, 255, 255)


def test_without_cameras_no_camera_is_named(tmp_path):
    retrieved = plain(tmp_path, False)
    retrieved.query.camids[:], retrieved.gallery.camids[:] = -1, -1
    sheet = ranking(retrieved, topk=4)
    assert labels(sheet, 5, 0, 13) == [True] * 5
    assert labels(sheet, 5, 13, 26) == [False] * 5


def test_four_pictures_are_written(evaluation, tmp_path):
    paths = draw_evaluation(evaluation, tmp_path / "pictures", queries=3, topk=5)
    names = ["cmc.png", "ranking.png", "roc.png", "similarities.png"]
    assert sorted(path.name for path in paths) == sorted(p.name for p in (tmp_path / "pictures").iterdir()) == names
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    with Image.open(tmp_path / "pictures" / "ranking.png") as ranking:
        assert ranking.size == (6 * 72 + 8, 3 * 162)


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
        lambda retrieved, dataset, rows, topk: shown.extend(rows.tolist()) or Image.new("RGB", (1, 1)),
    )
    draw_evaluation(evaluation, tmp_path / "pictures")
    assert shown == [1, 2, 3, 4]


def test_without_matplotlib_the_extra_is_named_and_nothing_written(evaluation, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pictures: pip install "\.\[viz\]"'):
        draw_evaluation(evaluation, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
