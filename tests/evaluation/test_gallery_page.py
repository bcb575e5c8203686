"""The page of a gallery: its data by hand, and its use in a real browser."""

import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from passreid_models.data.datasets import open_dataset
from passreid_models.data.images import ImageError
from passreid_models.embed import Embedder
from passreid_models.evaluation import gallery_page
from passreid_models.evaluation.gallery_page import write_gallery_page
from tests.chromium import CHROMIUM, Browser
from tests.reid_data import jpeg, make_model, write, write_flat, write_persons


@pytest.fixture(scope="module")
def embed() -> Embedder:
    return Embedder(make_model(), "cpu")


@pytest.fixture(scope="module")
def market(tmp_path_factory) -> Path:
    return write_persons(tmp_path_factory.mktemp("market") / "persons")


@pytest.fixture(scope="module")
def page(market, embed, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "gallery.html"
    write_gallery_page(market, file, embed)
    return file


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    return json.loads(data[1])


# ---- The data


def test_images_have_their_labels_and_nearest_neighbours(page, market, embed):
    gallery = open_dataset(market).gallery
    gallery = gallery.take(np.flatnonzero(gallery.pids != -1))
    images = data_of(page)["images"]
    assert [image["name"] for image in images] == [f"bounding_box_test/{path.name}" for path in gallery.paths]
    assert [image["pid"] for image in images] == [str(pid) if pid else "" for pid in gallery.pids.tolist()]
    assert {image["pid"] for image in images} >= {""}  # distractors
    assert [image["cam"] for image in images] == [str(camid + 1) for camid in gallery.camids.tolist()]
    x = embed(gallery.paths)
    cosines = x @ x.T - 9 * torch.eye(len(x))
    for row, image in enumerate(images):
        best = cosines[row].topk(8)
        assert [j for j, _ in image["near"]] == best.indices.tolist()
        assert [s for _, s in image["near"]] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_map_is_that_of_the_two_largest_components(page, market, embed):
    data = data_of(page)
    gallery = open_dataset(market).gallery
    x = embed([p for p, pid in zip(gallery.paths, gallery.pids, strict=True) if pid != -1]).double().numpy()
    variances, axes = np.linalg.eigh(np.cov(x.T))
    expected = x @ axes[:, :-3:-1]
    points = np.array(data["maps"][0]["points"])
    assert np.abs(points).max() == pytest.approx(1)
    expected = expected - (expected.max(0) + expected.min(0)) / 2
    expected /= np.abs(expected).max()
    assert np.abs(points) == pytest.approx(np.abs(expected), abs=1e-3)
    assert data["maps"][0]["name"] == f"PCA ({100 * variances[-2:].sum() / variances.sum():.0f} % variance)"


def test_a_photograph_that_is_there_twice_is_its_own_twins_neighbour(tmp_path, embed):
    root = write_flat(tmp_path / "own", ids=3, images=2)
    shutil.copy(root / "person 0" / "0.jpg", root / "person 2" / "twin.jpg")
    assert write_gallery_page(root, tmp_path / "a.html", embed).startswith("7 images -> ")
    images = data_of(tmp_path / "a.html")["images"]
    assert [image["pid"] for image in images] == [f"person {i}" for i in (0, 0, 1, 1, 2, 2, 2)]
    assert [image["cam"] for image in images] == [""] * 7
    assert [images[i]["near"][0] for i in (0, 6)] == [[6, pytest.approx(1)], [0, pytest.approx(1)]]
    assert all(i not in [j for j, _ in image["near"]] for i, image in enumerate(images))


def test_without_a_gallery_the_page_shows_training_or_else_the_queries(tmp_path, embed):
    for split, expected in (("query", "2 images -> "), ("train", "1 image -> ")):
        folder = "bounding_box_train" if split == "train" else "query"
        names = ["0001_c1s1_000001_00.jpg", "0002_c2s1_000001_00.jpg"][: 1 + (split == "query")]
        write(tmp_path / "market", [f"{folder}/{name}" for name in names])
        assert write_gallery_page(tmp_path / "market", tmp_path / "a.html", embed).startswith(expected)


def test_identities_and_cameras_have_the_names_of_the_data(tmp_path, embed):
    rows = ["path,pid,camid,split"]
    labels = [("zoe", "0", "train"), ("ben", "0", "query"), ("ben", "1", "gallery"), ("0007", "10", "gallery")]
    labels += [("</script><b>", "0", "gallery")]
    for i, (pid, camid, split) in enumerate(labels):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
        rows.append(f"{i}.jpg,{pid},{camid},{split}")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    write_gallery_page(tmp_path / "own.csv", tmp_path / "a.html", embed)
    images = data_of(tmp_path / "a.html")["images"]
    assert [(x["pid"], x["cam"]) for x in images] == [("ben", "1"), ("7", "10"), ("</script><b>", "0")]


def test_descriptors_of_a_multi_neck_are_compared_by_distance(tmp_path):
    root = write_flat(tmp_path / "own", ids=3, images=2)
    embed = Embedder(make_model(neck="multi"), "cpu")
    write_gallery_page(root, tmp_path / "a.html", embed)
    data = data_of(tmp_path / "a.html")
    assert data["similarity"] == "negative squared distance"
    distances = torch.cdist(embed(root), embed(root)) ** 2 + 99 * torch.eye(6)
    assert [image["near"][0][1] for image in data["images"]] == pytest.approx(
        (-distances.min(1).values).tolist(), abs=1e-3
    )


def test_one_image_and_no_labels_will_do(tmp_path, embed, caplog):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "<b>&.jpg").write_bytes(jpeg(1))
    write_gallery_page(tmp_path / "shop", tmp_path / "a.html", embed)
    data = data_of(tmp_path / "a.html")
    assert [(image["name"], image["pid"], image["near"]) for image in data["images"]] == [("<b>&.jpg", "", [])]
    assert data["maps"][0]["points"] == [[0, 0]]
    assert "the page has no identities: " in caplog.text
    assert "<b>" not in (tmp_path / "a.html").read_text()
    (tmp_path / "shop" / "train" / "morning").mkdir(parents=True)  # no identities, though it has the name of a split
    (tmp_path / "shop" / "train" / "morning" / "c.jpg").write_bytes(jpeg(2))
    write_gallery_page(tmp_path / "shop", tmp_path / "b.html", embed)
    assert [image["name"] for image in data_of(tmp_path / "b.html")["images"]] == ["<b>&.jpg", "train/morning/c.jpg"]


def test_of_many_images_some_at_equal_distances_are_shown_and_counted(market, tmp_path, embed, page, monkeypatch):
    names = [image["name"] for image in data_of(page)["images"]]
    monkeypatch.setattr(gallery_page, "MAX_IMAGES", 5)
    line = write_gallery_page(market, tmp_path / "a.html", embed)
    assert line.startswith(f"5 of {len(names)} images -> ")
    data = data_of(tmp_path / "a.html")
    assert data["note"].startswith(f"5 of {len(names)} images, Embedder(test_pass_vit")
    shown = [names.index(image["name"]) for image in data["images"]]
    assert (shown[0], shown[-1]) == (0, len(names) - 1)
    assert np.ptp(np.diff(shown)) <= 1


def test_unreadable_images_are_left_out_and_named(tmp_path, embed):
    root = write_flat(tmp_path / "own", ids=2, images=3)
    (root / "person 0" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"1.jpg: no image"):
        write_gallery_page(root, tmp_path / "a.html", embed)
    errors: list[str] = []
    write_gallery_page(root, tmp_path / "a.html", embed, errors)
    assert [Path(error.split(": ")[0]).name for error in errors] == ["1.jpg"]
    assert [i["name"] for i in data_of(tmp_path / "a.html")["images"]] == [
        f"person {i}/{k}.jpg" for i, k in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2))
    ]
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"no image of .*own has a descriptor; the first: .*0.jpg: no image"):
        write_gallery_page(root, tmp_path / "b.html", embed, [])
    assert not (tmp_path / "b.html").exists()


@pytest.mark.parametrize(
    ("data", "name", "error", "message"),
    [
        ("none", "a.html", FileNotFoundError, "none: no such file or folder"),
        (".", "a.html", ValueError, "no known layout"),
        (".", "a.pdf", ValueError, "a.pdf: name a page such as gallery.html"),
        (".", "a.html/b.html", NotADirectoryError, "b.html: .*a.html is no folder"),
    ],
)
def test_mistakes_are_refused_and_leave_no_file(tmp_path, embed, data, name, error, message):
    if "/" in name:
        (tmp_path / name).parent.touch()
    with pytest.raises(error, match=message):
        write_gallery_page(tmp_path / data, tmp_path / name, embed)
    assert [path for path in tmp_path.iterdir() if path.stat().st_size] == []


def test_umap_is_a_second_map_where_it_is_installed(market, tmp_path, embed, monkeypatch):
    given: dict[str, Any] = {}

    class UMAP:
        def __init__(self, **options: Any) -> None:
            given.update(options)

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return np.arange(2.0 * len(x)).reshape(-1, 2)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    write_gallery_page(market, tmp_path / "a.html", embed)
    maps = data_of(tmp_path / "a.html")["maps"]
    assert [m["name"][:4] for m in maps] == ["PCA ", "UMAP"]
    assert (maps[1]["points"][0], maps[1]["points"][-1]) == ([-1, -1], [1, 1])
    assert given == {"n_neighbors": 15, "metric": "cosine", "random_state": 0}
    write_gallery_page(write_flat(tmp_path / "own", ids=5, images=3), tmp_path / "a.html", embed)
    assert len(data_of(tmp_path / "a.html")["maps"]) == 1  # too few images


def test_the_page_may_not_ask_the_network(page):
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:;" in text
    assert not re.search(r"https?:|//\w+\.|\b(src|href)=\"(?!data:)|@import|url\(", text)


# ---- The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def desktop(browser, page) -> Iterator[Browser]:
    browser.open(page, 1100, 700)
    yield browser
    assert browser.faults == []


@pytest.fixture
def phone(browser, page) -> Iterator[Browser]:
    browser.open(page, 390, 760, phone=True)
    yield browser
    assert browser.faults == []


def place(browser: Browser, i: int) -> tuple[float, float]:
    """Place of an image in the window."""
    x, y, left, top = browser.evaluate(
        f"[...screenOf({i}), canvas.getBoundingClientRect().x, canvas.getBoundingClientRect().y]"
    )
    return x + left, y + top


def lone(page: Path, without: Collection[int] = ()) -> int:
    """Image, of those besides ``without``, that is farthest from all others on the map."""
    points = torch.tensor(data_of(page)["maps"][0]["points"])
    distances = (torch.cdist(points, points) + 9 * torch.eye(len(points))).min(1).values
    distances[list(without)] = -1
    return int(distances.argmax())


def drawn(browser: Browser) -> list[list[int]]:
    """Colours at the places of all images, without thumbnails."""
    browser.evaluate("byId('thumbnails').checked = false; draw()")
    code = """(() => {
        const pixels = context.getImageData(0, 0, width, height);
        return points.map((p, i) => {
            const [x, y] = screenOf(i).map(Math.round), start = 4 * (y * pixels.width + x);
            return [...pixels.data.slice(start, start + 4)];
        });
    })()"""
    return browser.evaluate(code)


def test_it_shows_a_point_for_every_image(desktop, page):
    data = data_of(page)
    number = len(data["images"])
    assert desktop.evaluate("document.title") == "persons"
    assert desktop.evaluate("byId('count').textContent") == f"{number} of {number} images"
    colours = drawn(desktop)
    assert all(colour[3] == 255 for colour in colours)
    by_pid: dict[str, set[tuple[int, ...]]] = {}
    for image, colour in zip(data["images"], colours, strict=True):
        by_pid.setdefault(image["pid"], set()).add(tuple(colour))
    assert len({colour for seen in by_pid.values() for colour in seen}) >= len(by_pid)
    desktop.evaluate("byId('thumbnails').checked = true; draw()")
    desktop.wait("decoded.size > 3 && [...decoded.values()].every(image => image.naturalWidth === 64)")


def test_hovering_shows_an_image_its_labels_and_neighbours_and_a_click_keeps_it(desktop, page):
    i = lone(page)
    image = data_of(page)["images"][i]
    x, y = place(desktop, i)
    desktop.mouse("Moved", x + 2, y)
    texts = desktop.evaluate("[...document.querySelectorAll('#panel dd')].map(node => node.textContent)")
    assert texts == [image["pid"] or "none", image["cam"], image["name"]]
    neighbours = desktop.evaluate("[...document.querySelectorAll('#neighbours button')].map(node => node.innerText)")
    assert [text.split()[0] for text in neighbours] == [f"{s:.3f}" for _, s in image["near"]]
    desktop.wait("[...document.querySelectorAll('#panel img')].every(image => image.naturalWidth === 64)")
    desktop.mouse("Moved", 5, 690)
    assert desktop.evaluate("byId('panel').children.length") == 0
    desktop.click(x, y)
    desktop.mouse("Moved", 5, 690)
    assert desktop.evaluate("chosen") == i
    desktop.evaluate("document.querySelector('#neighbours button').click()")
    assert desktop.evaluate("chosen") == image["near"][0][0]


def test_neighbours_of_one_identity_and_of_another_are_told_apart(desktop, page):
    images = data_of(page)["images"]
    for i in (0, len(images) - 1):
        desktop.evaluate(f"choose({i}, true)")
        classes = desktop.evaluate("[...document.querySelectorAll('#neighbours button')].map(node => node.className)")
        pids = [(images[i]["pid"], images[j]["pid"]) for j, _ in images[i]["near"]]
        assert classes == [("same" if a == b else "other") if a and b else "" for a, b in pids]


def test_filters_by_identity_name_and_camera(desktop, page):
    images = data_of(page)["images"]
    pid, cam = next((image["pid"], image["cam"]) for image in images if image["pid"])

    def count(query: str, camera: str = "") -> list[int]:
        desktop.evaluate(f"byId('query').value = {query!r}; byId('query').dispatchEvent(new Event('input'))")
        desktop.evaluate(f"byId('camera').value = '{camera}'; byId('camera').dispatchEvent(new Event('change'))")
        shown = desktop.evaluate("shown")
        assert desktop.evaluate("byId('count').textContent") == f"{len(shown)} of {len(images)} images"
        return shown

    of_pid = [i for i, image in enumerate(images) if image["pid"] == pid]
    assert count(pid) == of_pid
    assert count(pid, cam) == [i for i in of_pid if images[i]["cam"] == cam]
    assert count("", cam) == [i for i, image in enumerate(images) if image["cam"] == cam]
    assert count("C2S1") == [i for i, image in enumerate(images) if "c2s1" in image["name"]]
    assert count("no such name") == []
    assert count(pid) == of_pid
    hidden = lone(page, of_pid)
    assert drawn(desktop)[hidden] == [221, 221, 221, 255]
    desktop.evaluate(f"Object.assign(view, {{ x: points[{hidden}][0], y: points[{hidden}][1], zoom: 400 }})")
    desktop.mouse("Moved", *place(desktop, hidden))
    assert desktop.evaluate("chosen") == -1


def test_it_can_be_used_by_keyboard_alone(desktop, page):
    for _ in range(5):  # past the controls
        desktop.key("Tab", code=9)
    assert desktop.evaluate("document.activeElement === canvas")
    desktop.key("ArrowRight")
    first = desktop.evaluate("chosen")
    assert first >= 0
    x = place(desktop, first)[0]
    desktop.key("ArrowRight")
    second = desktop.evaluate("chosen")
    assert second != first
    assert place(desktop, second)[0] > x
    desktop.key("+", "+")
    assert desktop.evaluate("view.zoom") == pytest.approx(1.4)
    desktop.key("0", "0")
    assert desktop.evaluate("view.zoom") == 1
    desktop.evaluate("document.querySelector('#neighbours button').focus()")
    desktop.key("Enter", "\r", code=13)
    third = data_of(page)["images"][second]["near"][0][0]
    desktop.wait(f"chosen === {third}")
    assert desktop.evaluate("document.activeElement.parentElement.id") == "neighbours"
    desktop.evaluate("canvas.focus()")
    desktop.key("Escape")
    assert desktop.evaluate("[chosen, byId('panel').children.length]") == [-1, 0]


def test_wheel_and_drag_move_the_map_and_keep_the_point_below_the_pointer(desktop, page):
    i = lone(page)
    x, y = place(desktop, i)
    desktop.mouse("Wheel", x, y, deltaX=0, deltaY=-400)
    desktop.wait("view.zoom > 2")
    assert place(desktop, i) == pytest.approx((x, y), abs=1)  # pixels of a wheel event are whole
    desktop.mouse("Pressed", x, y, button="left", clickCount=1)
    desktop.mouse("Moved", x + 50, y - 30, button="left")
    desktop.mouse("Released", x + 50, y - 30, button="left", clickCount=1)
    assert place(desktop, i) == pytest.approx((x + 50, y - 30), abs=1)


def test_it_fits_a_phone_and_answers_to_a_tap(phone, page):
    i = lone(page)
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    assert phone.evaluate("document.documentElement.scrollHeight") == 760
    assert phone.evaluate("Math.min(width, height)") > 200
    phone.tap(*place(phone, i))
    phone.wait(f"chosen === {i} && kept")
    sizes = phone.evaluate("[...document.querySelectorAll('input[type=search], select, #neighbours button')]"
                           ".filter(n => n.offsetParent).map(n => n.getBoundingClientRect().height)")  # fmt: skip
    assert min(sizes) >= 32
