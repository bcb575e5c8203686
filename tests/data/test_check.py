"""Check of a dataset: every error and remark is found with its files, and a sound dataset has none."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from passreid_models.data.check import Check, check_dataset
from passreid_models.data.findings import PUBLISHED, PUBLISHED_JUNK
from tests.reid_data import MARKET, jpeg, write, write_csv, write_flat, write_msmt17, write_persons

CLEAN = tuple(name for name in MARKET if "0003_c6s3_076467" not in name)


def check(data: Path | str, **options: bool) -> Check:
    return check_dataset(data, progress=False, **options)


def copy(root: Path, old: str, new: str) -> None:
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / old, root / new)


# ---- Sound datasets


def test_generated_persons_are_without_a_finding(tmp_path):
    report = check(write_csv_of(write_persons(tmp_path / "persons"), tmp_path / "own.csv"))
    assert report.findings == []
    assert report.ok
    assert report.counts == {
        "train": {"images": 32, "identities": 4, "cameras": 4, "junk": 0, "distractors": 0},
        "query": {"images": 16, "identities": 4, "cameras": 4, "junk": 0, "distractors": 0},
        "gallery": {"images": 19, "identities": 4, "cameras": 4, "junk": 0, "distractors": 3},
    }
    assert str(report).endswith("no errors, no remarks")


def write_csv_of(root: Path, file: Path) -> Path:
    """A Market-1501 folder as a CSV file, which has no published counts."""
    lines = ["path,pid,camid,split"]
    for folder, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for path in sorted((root / folder).iterdir()):
            pid, camera = path.name.split("_")[:2]
            lines.append(f"{path},{pid},{camera[1]},{split}")
    return write_csv(file, lines)


def test_published_counts_stand_beside_those_found(tmp_path, monkeypatch):
    published = {"train": (4, 2, 3), "query": (2, 2, 2), "gallery": (5, 2, 4)}
    monkeypatch.setitem(PUBLISHED, "Market-1501", published)
    monkeypatch.setitem(PUBLISHED_JUNK, "Market-1501", (3_819, 2_798))
    report = check(write(tmp_path / "market", CLEAN))
    assert report.findings == []
    table = [line.split() for line in str(report).splitlines()]
    assert ["train", "4", "4", "2", "2", "3", "3"] in table
    assert ["gallery", "5", "5", "2", "2", "4", "4"] in table
    assert ["junk", "1", "3,819"] in table
    assert ["distractors", "2", "2,798"] in table
    (tmp_path / "market" / CLEAN[0]).unlink()
    [finding] = [f for f in check(tmp_path / "market").findings if f.kind == "counts"]
    assert finding.level == "remark"
    assert finding.message.startswith(
        "train has 3 images of 2 identities, the published Market-1501 has 4 of 2: expected only if"
    )


def test_the_published_counts_are_those_of_the_papers():
    assert PUBLISHED["Market-1501"] == {"train": (12936, 751, 6), "query": (3368, 750, 6), "gallery": (19732, 750, 6)}
    assert PUBLISHED["DukeMTMC-reID"]["gallery"] == (17661, 1110, 8)
    assert PUBLISHED["MSMT17 V2"] == PUBLISHED["MSMT17 V1"]
    assert PUBLISHED["MSMT17 V1"]["gallery"] == (82161, 3060, 15)
    assert sum(PUBLISHED_JUNK["Market-1501"]) == 6617 == 19732 - 13115


# ---- Errors and remarks: how to make a dataset with it, its level, kind and line


def edit(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A sound Market-1501 folder, changed."""

    def make(root: Path) -> Path:
        change(write(root, CLEAN))
        return root

    return make


def without(folder: str) -> Callable[[Path], Path]:
    return edit(lambda root: shutil.rmtree(root / folder))


def changed(name: str, content: bytes) -> Callable[[Path], Path]:
    return edit(lambda root: (root / name).write_bytes(content))


def copied(old: str, new: str) -> Callable[[Path], Path]:
    return edit(lambda root: copy(root, old, new))


def missing_list(root: Path) -> Path:
    write_msmt17(root)
    (root / "list_query.txt").unlink()
    return root


def csv(*lines: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write(root, [f"{i}.jpg" for i in range(9)])
        return write_csv(root / "own.csv", ["path,pid,camid,split", *lines])

    return make


def copy_without_cameras(root: Path) -> Path:
    lines = ["path,pid,split", "1/query.jpg,1,query", "1/x.jpg,1,gallery", "2/x.jpg,2,gallery"]
    write(root, ["1/query.jpg", "2/x.jpg"])
    copy(root, "1/query.jpg", "1/x.jpg")
    return write_csv(root / "own.csv", lines)


def flat(root: Path) -> Path:
    return write_flat(root)


QUERY, TEST, TRAIN = "query/0001_c1s1_001051_00.jpg", "bounding_box_test/0001_c2s1_001976_01.jpg", CLEAN[0]
FINDINGS: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    "no folder": (without("query"), "error", "missing split", "no query images, so no evaluation: query/ is missing"),
    "no training": (without("bounding_box_train"), "error", "missing split", "no train images, so no training: bound"),
    "other suffixes": (
        edit(lambda root: (root / "query" / "1.HEIC").write_bytes(b"")), "remark", "other suffixes",
        "1 file left out, since images of .heic are not read: convert them: query/1.HEIC"),
    "no list": (missing_list, "error", "missing split", "so no evaluation: list_query.txt is missing or has no images"),
    "no val list": (
        lambda root: [write_msmt17(root), (root / "list_val.txt").unlink()][0], "error", "layout",
        "/list_val.txt is not there; expected the lists of MSMT17 V1: list_train.txt and list_val.txt"),
    "both versions": (
        lambda root: write_msmt17(write_msmt17(root, 1), 2), "error", "layout", "mixes MSMT17 V1 and V2"),
    "no layout": (lambda root: write(root, ["a.jpg"]), "error", "layout", "1 file (a.jpg), which is no known layout"),
    "a name": (lambda root: write(root, [*CLEAN, "query/x.jpg"]), "error", "layout", "/query/x.jpg: the name shows no"),
    "training alone": (csv("0.jpg,a,1,train", "1.jpg,a,2,train"), "remark", "missing split", "no query images, so no"),
    "no match": (
        edit(lambda root: write(root / "query", ["0004_c1s1_000001_00.jpg", "0001_c2s1_000001_00.jpg"], 40)),
        "remark", "no match", "2 queries of 4 without a match in the gallery under another camera, which do not count: "
        "query/0001_c2s1_000001_00.jpg, query/0004_c1s1_000001_00.jpg"),
    "no match at all": (
        csv("0.jpg,a,1,query", "1.jpg,a,1,gallery", "2.jpg,b,2,gallery"), "error", "no match",
        "1 query of 1 without a match in the gallery under another camera, so there is nothing to evaluate: 0.jpg"),
    "alone in its folder": (
        lambda root: write(write_flat(root), ["lonely/9.jpg"], 40), "remark", "no match",
        "1 query of 13 without a match in the gallery, which do not count: lonely/9.jpg"),
    "one camera": (
        csv("0.jpg,a,1,query", "1.jpg,a,1,gallery"), "remark", "one camera",
        "one camera only: evaluation leaves out only the query itself"),
    "one camera, and junk of none": (
        csv("0.jpg,a,1,query", "1.jpg,a,1,gallery", "2.jpg,-1,-1,gallery"), "remark", "one camera",
        "one camera only: "),
    "no cameras": (flat, "remark", "no cameras", "no cameras are known: evaluation leaves out only the query itself"),
    "some cameras": (
        csv("0.jpg,a,1,query", "1.jpg,a,2,gallery", "2.jpg,a,-1,gallery"), "remark", "some cameras",
        "1 image without a camera: evaluation leaves out only the query itself, and training does not use cameras: "
        "2.jpg"),
    "some cameras of the training set": (
        csv("0.jpg,a,1,query", "1.jpg,a,2,gallery", "2.jpg,b,1,train", "3.jpg,b,2,train", "4.jpg,b,-1,train"),
        "remark", "some cameras", "1 training image without a camera: training does not use cameras: 4.jpg"),
    "some cameras of the test set": (
        csv("0.jpg,a,1,query", "1.jpg,a,-1,gallery", "2.jpg,b,1,train", "3.jpg,b,2,train"), "remark", "some cameras",
        "1 image without a camera: evaluation leaves out only the query itself: 1.jpg"),
    "unreadable": (
        changed(TEST, b"no image"), "error", "unreadable",
        f"1 image cannot be read, no image that Pillow can identify: {TEST}"),
    "cut short": (
        changed(QUERY, jpeg(50)[:-200]), "error", "unreadable",
        f"1 image cannot be read, image file is truncated: {QUERY}"),
    "empty": (changed(TRAIN, b""), "error", "unreadable", f"1 image cannot be read, the file is empty: {TRAIN}"),
    "not there": (csv("nine.jpg,a,1,train"), "error", "unreadable", "be read, no such file: nine.jpg"),
    "leak": (
        copied(TRAIN, "bounding_box_test/0003_c1s1_000001_01.jpg"), "error", "duplicates: leak",
        "1 image more than once: copies of training images are in the test set, which should be disjoint: "
        f"{TRAIN} = "),
    "copy": (
        copied(QUERY, "bounding_box_test/0001_c3s1_000001_01.jpg"), "error", "duplicates: copy",
        "1 image more than once: copies of queries are in the gallery and count as matches: "
        f"{QUERY} = bounding_box_te"),
    "copy without cameras": (
        copy_without_cameras, "error", "duplicates: copy", "and count as matches: 1/query.jpg = 1/x.jpg"),
    "labels": (
        copied(TEST, "bounding_box_test/0003_c2s1_001976_01.jpg"), "error", "duplicates: labels",
        "1 image more than once: copies have different identities: "
        "bounding_box_test/0001_c2s1_001976_01.jpg = bounding"),
    "a distractor": (
        copied(TEST, "bounding_box_test/0000_c2s1_001976_01.jpg"), "error", "duplicates: labels",
        "have different identities: bounding_box_test/0000_c2s1_001976_01.jpg = bounding_box_test/0001_c2"),
    "repeated": (
        copied(TRAIN, TRAIN.replace("03.jpg", "04.jpg")), "remark", "duplicates: repeated",
        "1 image more than once: this does not change the scores: "),
    "repeated as junk": (
        copied(TEST, "bounding_box_test/-1_c2s1_001976_01.jpg"), "remark", "duplicates: repeated",
        "1 image more than once: this does not change the scores: "),
    "same camera": (
        copied(QUERY, QUERY.replace("query", "bounding_box_test")), "remark", "duplicates: counted",
        "1 image more than once: copies in the test set may count as further queries, hits or distractors: "),
    "twice in the gallery": (
        copied(TEST, TEST.replace("01.jpg", "02.jpg")), "remark", "duplicates: counted",
        "1 image more than once: copies in the test set may count as further queries, hits or distractors: "),
    "a distractor twice": (
        copied(CLEAN[7], CLEAN[7].replace("01.jpg", "03.jpg")), "remark", "duplicates: counted", "or distractors: "),
    "a query twice": (
        copied(QUERY, QUERY.replace("00.jpg", "01.jpg")), "remark", "duplicates: counted", "as further queries, "),
    "identities": (
        edit(lambda root: write(root / "bounding_box_train", ["0003_c1s1_000001_00.jpg"], 40)),
        "error", "shared identities",
        "1 identity both in training and test, which should be disjoint: bounding_box_train/0003_c1s1_000001_00.jpg"),
    "identities beside an image": (
        csv("0.jpg,a,1,train", "1.jpg,a,2,train", "1.jpg,a,2,query", "2.jpg,a,1,gallery"), "error", "shared identities",
        "1 identity both in training and test, which should be disjoint: 0.jpg, 1.jpg"),
    "images": (
        csv("0.jpg,a,1,train", "1.jpg,a,2,train", "1.jpg,a,2,query", "2.jpg,a,1,gallery"), "error", "shared images",
        "1 image both in training and test, which should be disjoint: 1.jpg"),
    "single": (
        edit(lambda root: (root / TRAIN).unlink()), "remark", "single images",
        "1 training identity with one image, too few for the triplet loss, which takes two: bounding_box_train/00"),
    "junk in training": (
        csv("0.jpg,-1,1,train"), "remark", "junk", "1 training image marked as junk (-1), of no use there: 0.jpg"),
    "contradiction": (
        csv("0.jpg,a,1,query", "0.jpg,b,1,gallery"), "error", "layout", "/own.csv:3: "),
    "repeated rows": (
        csv("0.jpg,a,1,query", "1.jpg,a,2,gallery", "1.jpg,a,2,gallery"), "remark", "repeated rows",
        "1 repeated row of an image in a split, left out: own.csv:4"),
    "nearly equal names": (
        csv("0.jpg,Anna 1,1,train", "1.jpg,anna_01,1,train", "2.jpg,anna2,1,train"), "remark", "alike",
        "two identities each, though their names are nearly equal: Anna 1 = anna_01"),
    "nearly equal cameras": (
        csv("0.jpg,a,lobby,query", "1.jpg,a,Lobby,gallery", "2.jpg,b,cam a,gallery", "3.jpg,b,cam_a,gallery"),
        "remark", "alike cameras",
        "two cameras each, though their names are nearly equal: Lobby = lobby, cam a = cam_a"),
    "queries in the gallery": (
        csv("0.jpg,a,1,query", "0.jpg,a,1,gallery", "1.jpg,a,2,gallery"), "remark", "queries in the gallery",
        "1 query is in the gallery too; each is left out of its own ranking"),
    "few identities": (
        lambda root: write(root, [f"{i % 3 + 1}/{i}.jpg" for i in range(150)]), "remark", "few identities",
        "3 identities in 150 gallery images: are the folders persons? Scores of folders of cameras, days or scenes"),
    "few identities to train on": (
        lambda root: write(root, [f"train/{i % 3 + 1}/{i}.jpg" for i in range(150)]), "remark", "few identities",
        "3 identities in 150 training images: are the folders persons? Scores of folders of cameras, days or scenes"),
    "clothes": (
        lambda root: write(root, ["query/001_1_c1_1.png", "test/001_2_c2_1.png"]), "remark", "clothes",
        "LTCC's scores are of its standard setting"),
    "frames": (
        lambda root: write(root, ["bbox_test/0006/0006C1T0001F001.jpg", "bbox_test/0006/0006C2T0001F001.jpg"]),
        "remark", "frames", "MARS is read frame by frame; its published scores are of tracklets, so compare with none"),
    "one set": (flat, "remark", "one set", "12 images both in training and test: scores of a model"),
    "one set with distractors": (
        lambda root: write(root, ["-1_c1.jpg", "0000_c1.jpg", "0001_c1.jpg", "0001_c2.jpg"]), "remark", "one set",
        "3 images both in training and test: scores of a model that was trained on them are not valid"),
}  # fmt: skip


@pytest.mark.parametrize("case", FINDINGS)
def test_errors_and_remarks_are_found_with_their_files(tmp_path, case):
    make, level, kind, line = FINDINGS[case]
    report = check(make(tmp_path / "data"))
    matching = [f for f in report.findings if (f.kind, f.level) == (kind, level) and line in str(f)]
    assert len(matching) == 1, str(report)
    assert str(matching[0]) in str(report).splitlines()
    assert report.ok == (level == "remark"), str(report)


def test_a_link_to_a_gallery_image_is_the_image_itself_and_no_copy(tmp_path):
    names = [f"{split}/{pid}/{i}.jpg" for split in ("train", "gallery") for pid in "ab" for i in "12"]
    root = write(tmp_path / "own", names)
    (root / "query").symlink_to("gallery")
    assert not [f for f in check(root).findings if "duplicates" in f.kind]
    (root / "query").unlink()
    (root / "query" / "b").mkdir(parents=True)
    (root / "query" / "b" / "3.jpg").symlink_to("../../gallery/a/1.jpg")
    assert "duplicates: labels" in [f.kind for f in check(root).findings]
    shutil.rmtree(root / "query")
    (root / "query" / "a").mkdir(parents=True)
    os.link(root / "gallery" / "a" / "1.jpg", root / "query" / "a" / "1.jpg")
    assert not [f for f in check(root).findings if "duplicates" in f.kind]
    shutil.copy(root / "gallery" / "a" / "1.jpg", root / "query" / "a" / "3.jpg")
    assert "copy" in str([f.kind for f in check(root).findings])


def test_a_sound_dataset_has_no_findings_but_counts(tmp_path):
    report = check(write(tmp_path / "market", CLEAN))
    assert {f.kind for f in report.findings} == {"counts"}
    assert report.ok
    assert check(write_msmt17(tmp_path / "msmt")).ok  # identities of both sets have the same numbers there


def test_errors_come_first_and_are_counted(tmp_path):
    root = write(tmp_path / "market", CLEAN)
    (root / QUERY).write_bytes(b"")
    (root / TRAIN).unlink()
    lines = str(check(root)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("error"))
    assert [line.split(":")[0] for line in lines[start:-1]] == ["error", "remark", "remark", "remark", "remark"]
    assert lines[-1] == "1 error, 4 remarks"


def test_a_long_list_is_shortened_in_its_line_and_whole_in_json(tmp_path):
    root = write(tmp_path / "market", CLEAN)
    for path in (root / "bounding_box_test").iterdir():
        path.write_bytes(b"x")
    report = check(root)
    [finding] = [f for f in report.findings if f.kind == "unreadable"]
    assert str(finding).endswith("bounding_box_test/0000_c2s1_000151_02.jpg and 2 more")
    record = json.loads(json.dumps(report.to_dict()))
    [written] = [f for f in record["findings"] if f["kind"] == "unreadable"]
    assert len(written["files"]) == 5
    assert record["ok"] is False
    assert record["counts"]["query"]["images"] == 2
    assert record["published"]["train"] == [12936, 751, 6]


def test_without_verify_no_image_is_opened(tmp_path):
    root = write(tmp_path / "market", CLEAN)
    (root / QUERY).write_bytes(b"")
    copy(root, TRAIN, "bounding_box_test/0003_c1s1_000001_01.jpg")
    assert {f.kind for f in check(root, verify=False).findings} == {"counts"}


def test_data_that_do_not_exist_are_an_error_and_not_a_finding(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such file or folder; expected Market-1501"):
        check(tmp_path / "none")
