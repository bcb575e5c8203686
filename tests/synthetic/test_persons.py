"""The synthetic persons: what they promise to a dataset's user, and how hard they are."""

import hashlib
import json
import pickle
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from passreid_models import synthetic
from passreid_models.synthetic import SyntheticPersons, contact_sheet, dataset, draw, identity, scene

SMALL = (64, 32)


def digest(images: list[Image.Image]) -> str:
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


def clear_caches() -> None:
    for cached in (synthetic.identity, synthetic.camera, scene._scene, scene._grain):
        cached.cache_clear()


def retrieval_map(distance: np.ndarray, pids: np.ndarray, camids: np.ndarray) -> float:
    """Mean average precision where images of the query's identity and camera are not in the gallery."""
    precisions = []
    for row, pid, camid in zip(distance, pids, camids, strict=True):
        keep = ~((pids == pid) & (camids == camid))
        hits = np.flatnonzero((pids[keep] == pid)[np.argsort(row[keep], kind="stable")])
        precisions.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
    return float(np.mean(precisions))


def manhattan(features: np.ndarray) -> np.ndarray:
    return np.stack([np.abs(features - f).sum(1) for f in features])


# ---- Determinism


def test_images_do_not_depend_on_the_order_of_drawing_or_on_caches():
    data = SyntheticPersons(3, 6, 3, seed=5, size=SMALL)
    forwards = [data[i][0] for i in range(len(data))]
    clear_caches()
    backwards = [data[i][0] for i in reversed(range(len(data)))][::-1]
    assert digest(forwards) == digest(backwards)


def test_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from passreid_models.synthetic import SyntheticPersons;"
        "d = SyntheticPersons(2, 4, 4, seed=3, size=(64, 32));"
        "print(hashlib.sha256(b''.join(d[i][0].tobytes() for i in range(len(d)))).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    data = SyntheticPersons(2, 4, 4, seed=3, size=SMALL)
    assert out.stdout.strip() == digest([image for image, _, _ in data])


def test_global_random_state_is_neither_used_nor_changed():
    data = SyntheticPersons(1, 4, 2, size=SMALL)
    clear_caches()
    np.random.seed(1), random.seed(1)
    first = digest([image for image, _, _ in data])
    after = np.random.random(), random.random()
    clear_caches()
    np.random.seed(2), random.seed(2)
    assert digest([image for image, _, _ in data]) == first
    np.random.seed(1), random.seed(1)
    assert after == (np.random.random(), random.random())


def test_every_part_of_the_key_changes_the_image():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({draw(*key, size=SMALL).tobytes() for key in keys}) == len(keys)


def test_identities_and_cameras_keep_their_look_whatever_the_dataset_around_them():
    whole, tail = SyntheticPersons(6, 4, 2, size=SMALL), SyntheticPersons(2, 8, 2, size=SMALL, first_id=4)
    pid, camid, image = 4, 1, whole[4 * 4 + 1][0]
    assert tail[1][1:] == (pid, camid)
    assert tail[1][0].tobytes() == image.tobytes()


def test_in_a_studio_the_backdrop_is_gray_under_every_camera_and_persons_are_those_of_the_street():
    street, studio = (SyntheticPersons(12, 4, 4, size=(128, 64), place=place) for place in ("street", "studio"))
    pictures = [np.stack([np.asarray(data[i][0], float) for i in range(48)]) for data in (street, studio)]
    corners = [p[:, :12, [*range(6), *range(-6, 0)]].mean((1, 2)) for p in pictures]  # [48, 3], beside the head
    assert corners[0].std(0).min() > 15
    assert np.median(np.abs(corners[1] - 122)) < 2  # gray; a hat or a passer-by may be in it
    clothes = [p[:, 40:60, 24:40].mean((1, 2)).reshape(12, 4, 3).mean(1) for p in pictures]
    assert np.corrcoef(clothes[0].ravel(), clothes[1].ravel())[0, 1] > 0.9
    assert studio[5][0].tobytes() == draw(0, 1, 1, 0, (128, 64), "studio").tobytes()


def test_in_summer_the_light_is_warm_and_bright_clothes_are_common():
    street, summer = (SyntheticPersons(40, 2, 2, size=(64, 32), place=place) for place in ("street", "summer"))
    pictures = [np.stack([np.asarray(data[i][0], float) for i in range(80)]) for data in (street, summer)]
    red, _, blue = (pictures[1] / pictures[0].clip(1)).mean((0, 1, 2)) / pictures[1].mean() * pictures[0].mean()
    assert red > 1.1 * blue
    backgrounds = [p[:, :4].mean((0, 1, 2)) for p in pictures]  # above the heads: the same walls in another light
    assert backgrounds[1] / backgrounds[0] == pytest.approx([1.14, 1.02, 0.84], rel=0.08)
    colours = [np.stack([identity(0, p, s).cloth.colour for p in range(300)]) for s in (False, True)]
    saturation = [(c.max(1) - c.min(1)).mean() for c in colours]
    assert saturation[1] > 1.5 * saturation[0]
    assert identity(0, 3, True).upper == identity(0, 3).upper


# ---- The contract of a dataset


@pytest.mark.parametrize("size", [(256, 128), (128, 64), (384, 128)])
def test_items_are_rgb_images_of_the_asked_size_with_labels(size):
    data = SyntheticPersons(2, 5, 3, size=size, first_id=7)
    assert len(data) == 10
    image, pid, camid = data[9]
    assert (image.mode, image.size) == ("RGB", size[::-1])
    assert (pid, camid) == (8, 1)
    assert type(pid) is int
    assert type(camid) is int
    assert np.asarray(image).std() > 10  # a picture, not a flat colour


def test_labels_are_known_without_drawing_and_agree_with_the_items():
    data = SyntheticPersons(3, 5, 2, size=SMALL, first_id=2)
    assert data.pids == [2] * 5 + [3] * 5 + [4] * 5
    assert data.camids == [0, 1, 0, 1, 0] * 3
    assert [item[1:] for item in data] == list(zip(data.pids, data.camids, strict=True))


def test_negative_indices_count_from_the_end_and_others_are_refused():
    data = SyntheticPersons(2, 3, 1, size=SMALL)
    assert data[-1][0].tobytes() == data[5][0].tobytes()
    for index in (6, -7):
        with pytest.raises(IndexError, match="6 images"):
            data[index]


def test_pickles_are_small_and_draw_the_same():
    data = SyntheticPersons(10_000, 8, 4, size=SMALL)
    data[0]
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[79_999][0].tobytes() == data[79_999][0].tobytes()


def test_data_loader_workers_draw_what_this_process_draws():
    data = SyntheticPersons(2, 4, 2, size=SMALL)
    batches = DataLoader(data, batch_size=3, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    loaded = [item for batch in batches for item in batch]
    assert digest([item[0] for item in loaded]) == digest([item[0] for item in data])
    assert [item[1] for item in loaded] == data.pids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_ids=0), "num_ids must be an integer of at least 1, got 0"),
        (dict(num_ids=2, images_per_id=0), "images_per_id .* got 0"),
        (dict(num_ids=2, cameras=2.5), "cameras .* got 2.5"),
        (dict(num_ids=2, seed=-1), "seed must be an integer of at least 0, got -1"),
        (dict(num_ids=2, first_id=-3), "first_id .* got -3"),
        (dict(num_ids=2, size=(256,)), r"size must be \(height, width\).* got \(256,\)"),
        (dict(num_ids=2, size=(8, 128)), r"got \(8, 128\)"),
        (dict(num_ids=2, size=128), "got 128"),
    ],
)
def test_bad_arguments_are_named_with_what_was_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticPersons(**arguments)


# ---- Difficulty


def test_colour_histograms_do_better_than_chance_but_do_not_solve_it():
    data = SyntheticPersons(60, 8, 4, size=(128, 64))
    pids, camids = np.array(data.pids), np.array(data.camids)
    rgb, striped = [], []
    for image, _, _ in data:
        bins = np.asarray(image, int) // 32
        rgb.append(np.bincount((bins @ (64, 8, 1)).ravel(), minlength=512))
        hsv = np.asarray(image.convert("HSV"), int) // (16, 64, 64) @ (16, 4, 1)
        striped.append(np.concatenate([np.bincount(s.ravel(), minlength=256) / s.size for s in np.array_split(hsv, 6)]))
    chance = retrieval_map(np.random.default_rng(0).random((len(pids), len(pids))), pids, camids)
    assert 1.3 * chance < retrieval_map(manhattan(np.array(rgb) / (128 * 64)), pids, camids) < 0.15
    assert 1.3 * chance < retrieval_map(manhattan(np.array(striped)), pids, camids) < 0.35


def test_the_clothes_tell_identities_apart_once_cameras_are_accounted_for():
    """Mean colours along the image's middle, standardised in each camera: what is left is mostly the person."""
    data = SyntheticPersons(60, 8, 4, size=(128, 64))
    pids, camids = np.array(data.pids), np.array(data.camids)
    middle = [np.asarray(i.resize((16, 32), Image.Resampling.BOX), float)[2:30, 5:11] for i, _, _ in data]
    features = np.stack([m.reshape(28, 2, 3, 3).mean(2).ravel() for m in middle])
    for camid in range(4):
        here = camids == camid
        features[here] = (features[here] - features[here].mean(0)) / features[here].std(0)
    assert retrieval_map(manhattan(features), pids, camids) > 0.2


# ---- Market-1501 on disk

NAME = re.compile(r"(\d{4})_c(\d)s1_\d{6}_01\.jpg")


def read_names(folder: Path) -> list[tuple[int, int]]:
    return [(int(m[1]), int(m[2])) for m in (NAME.fullmatch(path.name) for path in sorted(folder.iterdir())) if m]


def test_market1501_folders_hold_disjoint_identities_and_every_query_has_a_match_in_another_camera(tmp_path):
    data = SyntheticPersons(5, 6, 3, size=SMALL)
    root = data.write_market1501(tmp_path / "deep" / "market", train_ids=2, distractors=4)
    train, query, gallery = (read_names(root / f) for f in ("bounding_box_train", "query", "bounding_box_test"))
    assert {pid for pid, _ in train} == {1, 2}
    assert {pid for pid, _ in query} == {3, 4, 5}
    assert {pid for pid, _ in gallery} == {0, 3, 4, 5}
    assert sorted(query) == [(pid, camera) for pid in (3, 4, 5) for camera in (1, 2, 3)]
    assert (len(train), len(gallery)) == (12, 9 + 4)
    cameras = defaultdict(set)
    for pid, cam in gallery:
        cameras[pid].add(cam)
    assert all(cameras[pid] - {cam} for pid, cam in query)
    with Image.open(root / "query" / "0003_c1s1_000000_01.jpg") as image:
        assert image.size == SMALL[::-1]
        error = np.abs(np.asarray(image, float) - np.asarray(data[12][0], float)).mean()
    assert error < 12  # the named person, up to JPEG's losses
    assert json.loads((root / "synthetic_persons.json").read_text())["images"] == 5 * 6 + 4
    assert [path.name for path in root.parent.iterdir()] == ["market"]


def test_worker_processes_write_the_same_files_and_replace_an_older_set(tmp_path):
    data = SyntheticPersons(2, 6, 2, size=SMALL)
    alone = data.write_market1501(tmp_path / "alone")
    SyntheticPersons(4, 6, 2, size=SMALL).write_market1501(tmp_path / "pool")
    pool = data.write_market1501(tmp_path / "pool", workers=2)
    files = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*.jpg")} for root in (alone, pool)]
    assert len(files[0]) == 12
    assert files[0] == files[1]


def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    data = SyntheticPersons(2, 4, 2, size=SMALL)
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt, which this command did not write; give a new or an"):
        data.write_market1501(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        data.write_market1501(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_files_that_a_file_manager_left_count_as_nothing(tmp_path):
    data, root = SyntheticPersons(2, 4, 2, size=SMALL), tmp_path / "crops"
    root.mkdir()
    for _ in range(2):  # an empty folder, and one with persons
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (root / name).touch()
        data.write_market1501(root)
        assert not (root / ".DS_Store").exists()
    (root / "query" / "Thumbs.db").touch()
    (root / "query" / "@eaDir").mkdir()
    (root / "query" / "@eaDir" / "SYNOPHOTO_THUMB_M.jpg").touch()
    data.write_market1501(root)
    assert not any((root / "query" / name).exists() for name in ("Thumbs.db", "@eaDir"))


@pytest.mark.parametrize(
    "file",
    ["notes.txt", "query/0099_c1s1_000001_01.jpg", "bounding_box_train/0002_c1s1_000000_01.jpg", "query/me/a.jpg"],
)
def test_a_drawn_folder_with_files_of_the_user_is_refused_and_left_alone(tmp_path, file):
    data = SyntheticPersons(2, 4, 2, size=SMALL)
    root = data.write_market1501(tmp_path / "crops", train_ids=1, distractors=1)
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text("mine")
    with pytest.raises(FileExistsError, match=f"crops holds {file if 'me/' not in file else 'query/me'}, which"):
        SyntheticPersons(3, 4, 2, size=SMALL).write_market1501(root)
    assert (root / file).read_text() == "mine"
    assert len(list(root.rglob("*.jpg"))) == 9 + file.endswith(".jpg")


def test_files_that_come_while_the_persons_are_drawn_are_kept(tmp_path, monkeypatch):
    data = SyntheticPersons(2, 4, 2, size=SMALL)
    own, save = data.write_market1501(tmp_path / "crops") / "query" / "mine.jpg", dataset._save
    monkeypatch.setattr(dataset, "_save", lambda *args: (save(*args), own.write_text("mine")))
    with pytest.raises(FileExistsError, match=r"holds query/mine\.jpg"):
        data.write_market1501(tmp_path / "crops")
    assert own.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["crops"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"num_ids": "2", "train_ids": 1, "distractors": 0, "images": 8}'])
def test_a_drawn_folder_with_a_damaged_recipe_is_refused(tmp_path, text):
    data = SyntheticPersons(2, 4, 2, size=SMALL)
    root = data.write_market1501(tmp_path / "crops")
    (root / "synthetic_persons.json").write_text(text)
    with pytest.raises(FileExistsError, match=r"synthetic_persons\.json is damaged"):
        data.write_market1501(root)


def test_an_interrupted_write_leaves_the_old_data_and_no_half(tmp_path, monkeypatch):
    root = SyntheticPersons(2, 4, 2, size=SMALL).write_market1501(tmp_path / "market")
    before = sorted(p.name for p in root.rglob("*"))
    save, calls = dataset._save, []

    def full_disk(*args):
        if len(calls) == 3:
            raise OSError("disk full")
        calls.append(save(*args))

    monkeypatch.setattr(dataset, "_save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        SyntheticPersons(4, 4, 2, size=SMALL).write_market1501(root)
    assert sorted(p.name for p in root.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["market"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (dict(cameras=1), {}, "2 to 9 cameras .* got cameras=1"),
        (dict(cameras=4, images_per_id=5), {}, "at least cameras \\+ 2 .* images_per_id=5"),
        (dict(cameras=2), dict(train_ids=9), "between 0 and num_ids = 4, got 9"),
        (dict(cameras=2), dict(distractors=-1), "distractors .* got -1"),
        (dict(cameras=2), dict(workers=-1), "workers .* got -1"),
    ],
)
def test_layouts_that_cannot_be_evaluated_are_refused_before_anything_is_written(tmp_path, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticPersons(4, **arguments, size=SMALL).write_market1501(tmp_path / "market", **options)
    assert not list(tmp_path.iterdir())


# ---- Contact sheet


def test_contact_sheet_places_images_row_by_row():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = contact_sheet([Image.new("RGB", (4, 6), colour) for colour in colours], columns=2)
    assert sheet.size == (10, 14)
    assert [sheet.getpixel(at) for at in ((0, 0), (6, 0), (0, 8), (6, 8))] == [*colours, (255, 255, 255)]
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])
