"""3-D persons on disk: the layout, resuming, refused folders and `passreid synth`; images are drawn by a cheap stub."""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from passreid_models import cli
from passreid_models.data.datasets import open_dataset
from passreid_models.data.images import find_images
from passreid_models.data.sources import open_source
from passreid_models.synthetic import SyntheticPersons
from passreid_synth3d import dataset
from passreid_synth3d.dataset import write_market1501
from tests.tiny_runs import LIMIT, Child

SMALL = (32, 16)


def cheap(
    seed: int, pid: int, camid: int, k: int, size: tuple[int, int], patterns: str, where: str = "street"
) -> Image.Image:
    """Noise, different for each image."""
    rng = np.random.default_rng([seed, pid, camid, k, patterns == "train", where == "street"])
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def slow(*key: Any) -> Image.Image:
    time.sleep(0.02)
    return cheap(*key)


def deadly(seed: int, pid: int, *key: Any) -> Image.Image:
    if pid == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return cheap(seed, pid, *key)


def full_disk(seed: int, pid: int, *key: Any) -> Image.Image:
    if pid == 3:
        raise OSError("no space left")
    return slow(seed, pid, *key)


def thread_dependent(*key: Any) -> Image.Image:
    """An image that depends on the number of threads, as the order of a sum does."""
    return cheap(torch.get_num_threads(), *key[1:])


def write(root: Path, num_ids: int = 5, images_per_id: int = 6, **options: Any) -> Path:
    defaults: dict[str, Any] = dict(cameras=3, size=SMALL, workers=0, progress=False, draw=cheap)
    return write_market1501(root, num_ids, images_per_id, **{**defaults, **options})


def content(root: Path) -> dict[str, bytes]:
    """Bytes of all files, hidden ones too, except the lock; folders as empty bytes."""
    paths = [p for p in root.rglob("*") if p.name != ".synth.lock"]
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in paths}


def pictures(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("*/*.jpg") if p.name[0] != ".")


def marker(root: Path) -> dict[str, Any]:
    return json.loads((root / "synthetic3d.json").read_text())


# ---- Layout


def test_the_folder_reads_as_market1501_with_the_requested_persons_cameras_and_splits(tmp_path):
    data = open_dataset(write(tmp_path / "deep" / "market", train_ids=2, first_id=10))
    assert {name: sorted(set(split.pids.tolist())) for name, split in data.splits.items()} == {
        "train": [11, 12], "query": [13, 14, 15], "gallery": [13, 14, 15],
    }  # fmt: skip
    assert [len(split) for split in data.splits.values()] == [2 * 6, 3 * 3, 3 * 3]
    assert all(np.bincount(split.camids).tolist() == [len(split) // 3] * 3 for split in data.splits.values())
    pairs = list(zip(data.query.pids.tolist(), data.query.camids.tolist(), strict=True))
    assert len(set(pairs)) == 9  # a query a camera
    assert data.has_cameras


def test_each_camera_of_an_identity_is_of_a_random_site(tmp_path):
    root = write(tmp_path / "market", 30, sites=4, quality=100, train_ids=15)
    names = [p.name for p in pictures(root)]
    sites = {(name[:4], name[5:7]): name[7:9] for name in names}
    assert len(sites) == 30 * 3  # both images of a person in a camera are of one site
    assert all((name[:4], name[5:7]) in sites and sites[name[:4], name[5:7]] == name[7:9] for name in names)
    assert Counter(sites.values()).keys() == {"s1", "s2", "s3", "s4"}
    assert max(Counter(sites.values()).values()) < 40  # of 90
    assert len({tuple(sites[f"{pid:04d}", f"c{c}"] for c in (1, 2, 3)) for pid in range(1, 31)}) > 15
    path = next(p for p in pictures(root) if "c3s2" in p.name and "000000_01" in p.name)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), float)
    pid = int(path.name[:4]) - 1
    right, wrong = (np.asarray(cheap(0, pid, c, 0, SMALL, "train").convert("L"), float) for c in (1 * 3 + 2, 2))
    assert np.abs(pixels - right).mean() < 3 < 20 < np.abs(pixels - wrong).mean()
    assert open_dataset(root).query.num_ids == 15


def test_the_files_have_the_names_of_the_two_dimensional_generator(tmp_path):
    two = SyntheticPersons(5, 7, 3, size=SMALL, first_id=4).write_market1501(tmp_path / "two", train_ids=3)
    three = write(tmp_path / "three", images_per_id=7, train_ids=3, first_id=4)
    assert [p.relative_to(three) for p in pictures(three)] == [p.relative_to(two) for p in pictures(two)]


def test_half_of_the_identities_train_by_default_and_each_file_shows_the_identity_of_its_name(tmp_path):
    root = write(tmp_path / "market", seed=7, patterns="held-out", quality=100)
    assert len({p.name[:4] for p in (root / "bounding_box_train").iterdir()}) == 2
    with Image.open(root / "bounding_box_test" / "0004_c2s1_000001_01.jpg") as image:
        assert image.size == SMALL[::-1]
        pixels = np.asarray(image.convert("L"), float)
    expected, another = (np.asarray(cheap(7, pid, 1, 1, SMALL, "held-out").convert("L"), float) for pid in (3, 4))
    assert np.abs(pixels - expected).mean() < 3 < 20 < np.abs(pixels - another).mean()


def test_if_all_identities_train_there_are_no_test_folders_and_readers_accept_it(tmp_path):
    root = write(tmp_path / "market", images_per_id=3, train_ids=5)
    assert {p.name for p in root.iterdir()} == {"bounding_box_train", "synthetic3d.json", ".synth.lock"}
    data = open_dataset(root).require("train")
    assert ([len(split) for split in data.splits.values()], data.train.num_ids) == ([15, 0, 0], 5)
    assert len(open_source(str(root))) == len(find_images(root)) == 15


def test_the_marker_holds_the_whole_recipe_and_that_the_folder_is_complete(tmp_path):
    assert marker(write(tmp_path / "market", 4, 5, seed=3, quality=80)) == {
        "num_ids": 4, "images_per_id": 5, "cameras": 3, "sites": 1, "seed": 3, "size": [32, 16], "train_ids": 2,
        "patterns": "train", "place": "street", "first_id": 0, "quality": 80, "generator": 2, "complete": True,
        "libraries": {name: version(name) for name in ("anny", "warp-lang")},
    }  # fmt: skip


def test_workers_write_the_same_folder_as_one_process_and_all_draw_with_one_thread(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pool, alone = (
            write(tmp_path / str(workers), seed=1, draw=thread_dependent, workers=workers) for workers in (2, 0)
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(pictures(alone)) == 30
    assert content(pool) == content(alone) == content(write(tmp_path / "one thread", seed=1))


# ---- Resuming


def test_a_second_call_draws_the_missing_images_and_leaves_the_others_unchanged(tmp_path):
    root = write(tmp_path / "market")
    whole = content(root)
    missing = pictures(root)[::7]
    for file in missing:
        file.unlink()
    inodes = {file: file.stat().st_ino for file in pictures(root)}
    calls = []
    write(root, draw=lambda *key: calls.append(key) or cheap(*key))
    assert len(calls) == len(missing) == 5
    assert {file: file.stat().st_ino for file in inodes} == inodes
    assert content(root) == whole
    write(root, draw=None)  # nothing to draw, so anny is not needed
    assert content(root) == whole


def test_the_marker_says_incomplete_until_all_images_are_written(tmp_path):
    flags = []
    root = tmp_path / "market"
    write(root, draw=lambda *key: flags.append(marker(root)["complete"]) or cheap(*key))
    assert (set(flags), marker(root)["complete"]) == ({False}, True)
    pictures(root)[0].unlink()
    with pytest.raises(OSError, match="no space left"):
        write(root, draw=lambda *key: full_disk(0, 3))
    assert marker(root)["complete"] is False


def test_an_incomplete_folder_is_not_continued_with_other_libraries_but_a_complete_one_is_accepted(tmp_path):
    root = write(tmp_path / "market")
    record = marker(root)
    record["libraries"]["anny"] = "0.0.1"
    (root / "synthetic3d.json").write_text(json.dumps(record))
    assert write(root) == root
    missing = pictures(root)[0]
    missing.unlink()
    with pytest.raises(
        FileExistsError, match=r"begun with anny=0\.0\.1, warp-lang=.*, and anny=.* would draw other bodies"
    ):
        write(root)
    assert not missing.exists()


def run_slowly(root: Path) -> int:
    try:
        write(root, 12, 8, draw=slow, workers=2)
    except KeyboardInterrupt:
        return 130
    return 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, bytes]:
    return content(write(tmp_path_factory.mktemp("whole") / "market", 12, 8))


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + LIMIT
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_resumes_to_the_same_bytes(uninterrupted, tmp_path):
    root = tmp_path / "market"
    with Child(run_slowly, root, folder=tmp_path / "printed") as child:
        child.wait_until(lambda: len(pictures(root)) > 10)
        os.kill(child.process.pid, signal.SIGKILL)  # the parent alone: its workers have to notice
        assert child.wait() == -signal.SIGKILL
        assert wait_for(lambda: not child.is_left())
    assert 10 < len(pictures(root)) < 96
    assert marker(root)["complete"] is False
    for folder, name in (("query", "0009_c1s1_000000_01.jpg"), ("", "synthetic3d.json")):  # killed while it wrote
        leftover = root / folder / f".{name}.abc_d123" / "new"
        leftover.mkdir(parents=True)
        (leftover / name).write_bytes(b"half")
    assert len(open_dataset(root).query) == len(list((root / "query").glob("0*.jpg")))
    write(root, 12, 8)
    assert content(root) == uninterrupted


@pytest.mark.parametrize(
    "images", [-1, pytest.param(10, marks=pytest.mark.slow)], ids=["while workers start", "while workers draw"]
)
def test_ctrl_c_ends_all_processes_at_once_and_silently_and_a_second_call_continues(uninterrupted, tmp_path, images):
    root = tmp_path / "market"
    with Child(run_slowly, root, folder=tmp_path / "printed") as child:
        child.wait_until(lambda: (root / "synthetic3d.json").exists() and len(pictures(root)) > images)
        if images < 0:
            time.sleep(0.5)  # into the imports of the workers
        child.signal(signal.SIGINT)
        assert child.wait() == 130
        assert wait_for(lambda: not child.is_left())
    assert child.output == ""
    assert len(pictures(root)) < 96
    assert not [name for name in content(root) if "/." in name]
    write(root, 12, 8)
    assert content(root) == uninterrupted


def test_a_dead_worker_is_reported_in_one_sentence_and_a_second_call_continues(tmp_path):
    with pytest.raises(ChildProcessError, match=r"process that draws died.* the same command goes on"):
        write(tmp_path / "market", draw=deadly, workers=2)
    assert content(write(tmp_path / "market")) == content(write(tmp_path / "whole"))


def test_an_error_in_a_worker_stops_all_workers_and_is_raised_unchanged(tmp_path):
    root = tmp_path / "market"
    with pytest.raises(OSError, match="no space left"):
        write(root, 200, 6, draw=full_disk, workers=2)
    count = len(pictures(root))
    assert count < 600
    time.sleep(0.2)
    assert len(pictures(root)) == count


# ---- Folders and arguments that are refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seed=1), r"begun with seed=0, and now seed=1 is asked for"),
        (dict(num_ids=6), r"begun with num_ids=5, train_ids=2, and now num_ids=6, train_ids=3 is"),
        (
            dict(size=(64, 32), patterns="held-out"),
            "size=32x16, patterns=train, and now size=64x32, patterns=held-out",
        ),
        (dict(quality=90, first_id=7), r"begun with first_id=0, quality=92, and now first_id=7, quality=90 is"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_and_the_differing_keys_are_named(tmp_path, options, message):
    before = content(write(tmp_path / "market"))
    with pytest.raises(FileExistsError, match=message):
        write(tmp_path / "market", **options)
    assert content(tmp_path / "market") == before


def test_images_of_an_older_generator_are_not_continued(tmp_path):
    root = write(tmp_path / "market")
    (root / ".DS_Store").touch()  # of the Finder
    (root / "synthetic3d.json").write_text(json.dumps(marker(root) | {"generator": 1}))
    with pytest.raises(FileExistsError, match="begun with generator=1, and now generator=2"):
        write(root)


def test_a_folder_with_other_files_is_refused_and_left_unchanged(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt, which this command did not write"):
        write(tmp_path)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file"):
        write(tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    own = write(tmp_path / "own")
    (own / "query" / "0001_c1s1_000000_01.jpg").write_bytes(b"of a train identity")
    with pytest.raises(FileExistsError, match=r"holds query/0001_c1s1_000000_01\.jpg"):
        write(own)
    two = SyntheticPersons(2, 4, 2, size=SMALL).write_market1501(tmp_path / "two")
    with pytest.raises(FileExistsError, match="holds bounding_box_test, which"):
        write(two, 2, 5)


def test_a_damaged_marker_is_named(tmp_path):
    root = write(tmp_path / "market")
    for text in ("{", "3"):
        (root / "synthetic3d.json").write_text(text)
        with pytest.raises(FileExistsError, match=r"synthetic3d\.json is damaged"):
            write(root)


def test_two_calls_do_not_write_in_one_folder_at_once(tmp_path):
    root, refusals = tmp_path / "market", []

    def draw(*key: Any) -> Image.Image:
        if not refusals:
            with pytest.raises(ValueError, match="market: another process draws in it") as error:
                write(root)
            refusals.append(error)
        return cheap(*key)

    write(root, draw=draw)
    assert len(refusals) == 1
    assert content(root) == content(write(tmp_path / "alone"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_ids=0), "num_ids must be an integer of at least 1, got 0"),
        (dict(num_ids=2.0), r"num_ids .* got 2\.0"),
        (dict(seed=-1), "seed .* at least 0, got -1"),
        (dict(first_id=True), "first_id .* got True"),
        (dict(workers=-1), "workers .* got -1"),
        (dict(train_ids=9), "train_ids must be between 0 and num_ids = 5, got 9"),
        (dict(quality=101), "quality must be between 1 and 100, got 101"),
        (dict(size=(8, 32)), "size must be .* at least 16 pixels"),
        (dict(size=32), "size must be .* got 32"),
        (dict(patterns="test"), "patterns must be one of train, held-out, got 'test'"),
        (dict(cameras=1), "2 to 9 cameras .* got cameras=1"),
        (dict(cameras=10, images_per_id=20), "2 to 9 cameras .* got cameras=10"),
        (dict(images_per_id=4), r"at least cameras \+ 2 .* images_per_id=4"),
        (dict(images_per_id=2, train_ids=5), "at least cameras where all identities train, .* images_per_id=2"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "market", **arguments)
    assert not list(tmp_path.iterdir())


# ---- passreid synth, on a complete folder so that nothing needs anny

OPTIONS = ["--ids=4", "--images=5", "--cameras=3", "--sites=1", "--seed=2", "--train-ids=1", "--size=32x16",
           "--patterns=held-out", "--place=studio", "--first-id=6"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "market"
    return write(root, 4, 5, seed=2, train_ids=1, patterns="held-out", place="studio", first_id=6)


def refused(capsys, *words: object) -> str:
    """Run a command that must be refused; return its one line of stderr."""
    capsys.readouterr()
    assert cli.main(["synth", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_synth_reports_the_content_of_the_folder(whole, capsys):
    before = content(whole)
    assert cli.main(["synth", *OPTIONS, f"--out={whole}", "--workers=2"]) == 0
    assert capsys.readouterr().out == f"20 images of 4 3-D persons under 3 cameras -> {whole} (all were there)\n"
    assert content(whole) == before


@pytest.mark.parametrize("word", ["--ids=5", "--images=6", "--cameras=2", "--sites=2", "--seed=3", "--train-ids=2",
                                  "--size=48x16", "--patterns=train", "--place=street", "--first-id=0"])  # fmt: skip
def test_synth_passes_every_option_on(whole, word, capsys):
    option, value = word.split("=")
    key = {"--ids": "num_ids", "--images": "images_per_id"}.get(option, option[2:].replace("-", "_"))
    assert f"and now {key}={value} is asked for" in refused(capsys, *OPTIONS, f"--out={whole}", word)


def test_synth_reports_the_speed_and_how_many_images_were_there(whole, tmp_path):
    root = shutil.copytree(whole, tmp_path / "market")
    pictures(root)[0].unlink()
    options = dict(
        cameras=3, seed=2, train_ids=1, size=SMALL, patterns="held-out", place="studio", first_id=6, workers=0
    )
    report = dataset.make_data(root, 4, 5, **options, draw=cheap)
    assert report.startswith("20 images of 4 3-D persons under 3 cameras -> ")
    assert report.endswith(" images/s, 19 were there)")


def test_a_camera_of_several_sites_counts_once_in_the_report_as_in_the_names(tmp_path):
    root = tmp_path / "market"
    report = dataset.make_data(root, 5, 6, cameras=3, sites=2, size=SMALL, workers=0, draw=cheap)
    assert report.startswith("30 images of 5 3-D persons under 3 cameras at each of 2 sites -> ")
    assert len(open_dataset(root).camera_names) == 3


@pytest.mark.parametrize(
    ("word", "message"), [("--cameras=1", "2 to 9 cameras"), ("--workers=-1", "workers must be"), ("--seed=-1", "seed")]
)
def test_synth_reports_mistakes_in_one_line(tmp_path, capsys, word, message):
    assert message in refused(capsys, "--ids=4", "--images=12", f"--out={tmp_path / 'market'}", word)
    assert not list(tmp_path.iterdir())


def test_synth_without_anny_says_what_to_install_and_creates_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "anny", None)
    error = refused(capsys, "--ids=4", "--images=12", f"--out={tmp_path / 'market'}")
    assert error == 'passreid: 3-D persons need anny: pip install ".[synth3d]" in a clone of passreid-models\n'
    assert not list(tmp_path.iterdir())
