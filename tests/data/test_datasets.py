"""Labelled images in every layout: splits, identities and cameras; and the errors for anything else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest
import torch

from passreid_models.data.datasets import ReIDDataset, open_dataset
from passreid_models.retrieval import RetrievalMetrics, evaluate
from passreid_models.synthetic import SyntheticPersons
from tests.reid_data import MARKET, jpeg, rows, write, write_csv, write_flat, write_msmt17

# ---------------------------------------------------------------------------------------- Market-1501, DukeMTMC-reID


def test_market1501_by_the_names_with_junk_and_distractors(tmp_path):
    dataset = open_dataset(write(tmp_path / "market", MARKET))
    assert dataset.name == "Market-1501"
    assert rows(dataset, dataset.train) == [
        ("bounding_box_train/0002_c1s1_000451_03.jpg", 2, 0),
        ("bounding_box_train/0002_c2s1_000776_01.jpg", 2, 1),
        ("bounding_box_train/0007_c2s3_071002_01.jpg", 7, 1),
        ("bounding_box_train/0007_c3s3_077419_03.jpg", 7, 2),
    ]
    assert rows(dataset, dataset.query) == [
        ("query/0001_c1s1_001051_00.jpg", 1, 0),
        ("query/0003_c6s3_076542_00.jpg", 3, 5),
    ]
    assert rows(dataset, dataset.gallery) == [
        ("bounding_box_test/-1_c3s2_079637_00.jpg", -1, 2),
        ("bounding_box_test/0000_c1s1_000151_01.jpg", 0, 0),
        ("bounding_box_test/0000_c2s1_000151_02.jpg", 0, 1),
        ("bounding_box_test/0001_c2s1_001976_01.jpg", 1, 1),
        ("bounding_box_test/0003_c5s3_074937_01.jpg", 3, 4),
        ("bounding_box_test/0003_c6s3_076467_01.jpg", 3, 5),
    ]
    assert (dataset.gallery.num_ids, dataset.gallery.num_cameras, len(dataset.gallery)) == (2, 5, 6)
    assert dataset.has_cameras
    assert dataset.own.tolist() == [-1, -1]
    assert dataset.description == (
        "Market-1501, market/: 4 training images of 2 identities, 2 queries, 6 gallery images, 5 cameras"
    )


def test_dukemtmc_is_told_by_its_names(tmp_path):
    files = ("bounding_box_train/0001_c2_f0046182.jpg", "query/0005_c2_f0046985.jpg",
             "bounding_box_test/0005_c5_f0051341.jpg", "bounding_box_test/4622_c8_f0106208.jpg")  # fmt: skip
    dataset = open_dataset(write(tmp_path, files))
    assert dataset.name == "DukeMTMC-reID"
    assert dataset.gallery.pids.tolist() == [5, 4622]
    assert dataset.gallery.camids.tolist() == [4, 7]


@pytest.mark.parametrize("name", ["Market-1501-v15.09.15", "market"])
def test_an_archive_may_lie_in_a_folder_of_its_own(tmp_path, name):
    inner = write(tmp_path / "unpacked" / name, MARKET)
    (tmp_path / "unpacked" / "__MACOSX").mkdir()
    (tmp_path / "unpacked" / "readme.txt").touch()
    dataset = open_dataset(tmp_path / "unpacked")
    assert (dataset.name, dataset.root) == ("Market-1501", inner)
    assert dataset.fingerprint == open_dataset(inner).fingerprint
    (tmp_path / "unpacked" / "another").mkdir()
    with pytest.raises(ValueError, match=f"holds Market-1501 in {name}/ beside other folders: name one"):
        open_dataset(tmp_path / "unpacked")


def test_hidden_files_and_others_than_images_are_no_images(tmp_path):
    write(tmp_path, MARKET)
    for name in ("query/Thumbs.db", "query/.0001_c1s1_001051_00.jpg", "bounding_box_test/readme.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    dataset = open_dataset(tmp_path)
    assert [len(split) for split in dataset.splits.values()] == [4, 2, 6]


def test_folders_that_a_system_adds_hold_no_images(tmp_path):
    write(tmp_path, MARKET)
    fingerprint = open_dataset(tmp_path).fingerprint
    write(tmp_path, ["bounding_box_test/@eaDir/0001_c2s1_001976_01.jpg/SYNOPHOTO_THUMB_M.jpg",
                     "@eaDir/query/SYNOINDEX.jpg", "query/__MACOSX/0001_c1s1_001051_00.jpg"])  # fmt: skip
    assert open_dataset(tmp_path).fingerprint == fingerprint


def test_0000_is_a_person_where_queries_or_training_have_it(tmp_path):
    """Own data in this layout often counts from 0."""
    files = ("query/0000_c1s1_000001_00.jpg", "query/0001_c1s1_000001_00.jpg",
             "bounding_box_test/0000_c2s1_000001_00.jpg", "bounding_box_test/0001_c2s1_000001_00.jpg")  # fmt: skip
    dataset = open_dataset(write(tmp_path, files))
    assert dataset.query.pids.tolist() == dataset.gallery.pids.tolist() == [2, 1]
    assert dataset.query.num_ids == 2


def test_cameras_that_count_from_0_stay_as_they_are(tmp_path):
    files = ("query/0001_c0_000001.jpg", "bounding_box_test/0001_c1_000001.jpg", "bounding_box_test/0002_c10_00001.jpg")
    dataset = open_dataset(write(tmp_path, files))
    assert [*dataset.query.camids, *dataset.gallery.camids] == [0, 1, 10]


def test_a_single_camera_does_not_count(tmp_path):
    files = ("bounding_box_train/0009_c1_1.jpg", "bounding_box_train/0009_c2_1.jpg", "query/0001_c1_1.jpg",
             "bounding_box_test/0001_c1_2.jpg")  # fmt: skip
    dataset = open_dataset(write(tmp_path, files))
    assert not dataset.has_cameras
    assert dataset.query.camids.tolist() == [0]


def test_junk_without_a_camera_leaves_matches_to_other_cameras(tmp_path):
    lines = ["path,pid,camid,split", "a,1,1,query", "b,1,1,gallery", "c,1,2,gallery", "j,-1,-1,gallery"]
    dataset = open_dataset(write_csv(tmp_path / "own.csv", [*lines, "k,-1,-1,query"]))
    assert dataset.has_cameras
    assert dataset.matches.tolist() == [1, 0]
    assert not open_dataset(write_csv(tmp_path / "own.csv", [*lines, "k,0,-1,gallery"])).has_cameras  # a distractor
    lines = ["path,pid,camid,split", "a,1,1,query", "b,1,1,gallery", "j,-1,2,gallery"]
    assert not open_dataset(write_csv(tmp_path / "own.csv", lines)).has_cameras  # one camera, and junk of another


# ------------------------------------------------------------------------------- VeRi-776, MARS, DukeMTMC-VideoReID


def score(dataset: ReIDDataset) -> RetrievalMetrics:
    """Metrics of descriptors that are drawn by the content of the image."""
    x = [
        torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(crc32(p.read_bytes()))) for p in s.paths])
        for s in (dataset.query, dataset.gallery)
    ]
    cameras = (dataset.query.camids, dataset.gallery.camids) if dataset.has_cameras else (None, None)
    own = None if dataset.has_cameras else dataset.own
    return evaluate(*x, dataset.query.pids, dataset.gallery.pids, *cameras, own=own)


def test_veri_gives_what_the_market_layout_of_the_same_files_gives(tmp_path):
    names = [name.replace("_c", "_c00").replace("s1", "_0001") for name in MARKET]
    market = open_dataset(write(tmp_path / "market", names))
    folders = {"bounding_box_train": "image_train", "query": "image_query", "bounding_box_test": "image_test"}
    veri = open_dataset(write(tmp_path / "VeRi", [f"{folders[a]}/{b}" for a, b in (n.split("/") for n in names)]))
    assert (veri.name, veri.parts) == ("VeRi-776", ("image_train/", "image_query/", "image_test/"))
    for a, b in zip(market.splits.values(), veri.splits.values(), strict=True):
        assert (a.pids.tolist(), a.camids.tolist()) == (b.pids.tolist(), b.camids.tolist())
    assert (veri.query.pids.tolist(), veri.query.camids.tolist()) == ([1, 3], [0, 5])
    assert score(veri).mAP == score(market).mAP


def test_mars_has_cameras_junk_and_distractors_and_leaves_out_the_frames_of_the_tracklet(tmp_path):
    dataset = open_dataset(write(tmp_path, [
        "bbox_train/0001/0001C1T0001F001.jpg", "bbox_train/0001/0001C2T0001F001.jpg",
        "bbox_test/00-1/00-1C1T0001F001.jpg", "bbox_test/0000/0000C6T0001F001.jpg",
        "bbox_test/0006/0006C1T0001F001.jpg", "bbox_test/0006/0006C1T0001F002.jpg",
        "bbox_test/0006/0006C3T0002F001.jpg",
    ]))  # fmt: skip
    assert dataset.name == "MARS"
    assert (dataset.train.pids.tolist(), dataset.train.camids.tolist()) == ([1, 1], [0, 1])
    assert dataset.gallery.pids.tolist() == [-1, 0, 6, 6, 6]
    assert dataset.gallery.camids.tolist() == [0, 5, 0, 0, 2]
    assert (dataset.query.pids.tolist(), dataset.query.camids.tolist()) == ([6, 6, 6], [0, 0, 2])
    assert dataset.has_cameras
    assert dataset.matches.tolist() == [1, 1, 2]  # frames of the query's own tracklet do not count
    inner = open_dataset(tmp_path / "bbox_test")
    assert inner.query.pids.tolist() == inner.train.pids.tolist()[1:] == [6, 6, 6]


def test_dukemtmc_videoreid_has_a_folder_for_each_tracklet(tmp_path):
    dataset = open_dataset(write(tmp_path, [
        "train/0001/0001/0001_C6_F0044_X2.jpg", "train/0001/0002/0001_C7_F0044_X3.jpg",
        "query/0005/0010/0005_C1_F0001_X9.jpg", "query/0005/0010/0005_C1_F0002_X9.jpg",
        "gallery/0005/0010/0005_C1_F0001_X9.jpg", "gallery/0005/0011/0005_C8_F0001_X10.jpg",
        "gallery/0009/0012/0009_C2_F0001_X11.jpg",
    ]))  # fmt: skip
    assert dataset.name == "DukeMTMC-VideoReID"
    assert (dataset.train.pids.tolist(), dataset.train.camids.tolist()) == ([1, 1], [5, 6])
    assert (dataset.query.pids.tolist(), dataset.query.camids.tolist()) == ([5, 5], [0, 0])
    assert (dataset.gallery.pids.tolist(), dataset.gallery.camids.tolist()) == ([5, 5, 9], [0, 7, 1])
    assert dataset.matches.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "camera"),
    [
        ("0006C1T0001F001.jpg", 1), ("0001_C6_F0044_X2.jpg", 6), ("0002_c3s1_000451_03.jpg", 3), ("7_c001_0_0.jpg", 1),
        ("anna-c4-c9-1.png", 4), ("0000_000_01_0303morning_0008_0.jpg", 1), ("c2.jpg", 2), ("abc2_1.jpg", 0),
    ],
)  # fmt: skip
def test_cameras_are_read_from_the_names_of_images(tmp_path, name, camera):
    dataset = open_dataset(write(tmp_path, [f"anna/{name}", "bert/x_c0_1.jpg"]))
    assert dataset.train.camids.tolist() == ([camera, 0] if camera else [-1, 0])


# ------------------------------------------------------------------------------------------------------------ MSMT17


@pytest.mark.parametrize(("version", "train", "test"), [(1, "train", "test"), (2, "mask_train_v2", "mask_test_v2")])
def test_msmt17_by_its_lists_and_v1_and_v2_by_their_folders(tmp_path, version, train, test):
    dataset = open_dataset(write_msmt17(tmp_path / "msmt", version))
    end = "_ex" * (version == 2)
    assert dataset.name == f"MSMT17 V{version}"
    assert rows(dataset, dataset.train) == [  # train and val; identities count from 1, cameras from 0
        (f"{train}/0000/0000_000_01_0303morning_0008_0{end}.jpg", 1, 0),
        (f"{train}/0000/0000_001_05_0303noon_0015_0{end}.jpg", 1, 4),
        (f"{train}/0001/0001_000_14_0113afternoon_0112_1{end}.jpg", 2, 13),
    ]
    assert rows(dataset, dataset.query) == [(f"{test}/0000/0000_000_01_0113afternoon_1224_0{end}.jpg", 1, 0)]
    assert rows(dataset, dataset.gallery) == [
        (f"{test}/0000/0000_001_02_0113noon_1224_0{end}.jpg", 1, 1),
        (f"{test}/0001/0001_000_15_0302morning_0112_1{end}.jpg", 2, 14),
    ]
    assert all(path.is_file() for split in dataset.splits.values() for path in split.paths)


def test_a_mix_of_msmt17_v1_and_v2_is_refused(tmp_path):
    write_msmt17(write_msmt17(tmp_path, 1), 2)
    with pytest.raises(
        ValueError, match=r"mixes MSMT17 V1 and V2, which give different numbers: it holds train/, test/ of V1 and"
    ):
        open_dataset(tmp_path)


@pytest.mark.parametrize("missing", ["list_train.txt", "list_val.txt"])
def test_half_of_the_training_lists_of_msmt17_is_no_training_set(tmp_path, missing):
    write_msmt17(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"/{missing} is not there; expected the lists of MSMT17 V1"):
        open_dataset(tmp_path)


def test_the_images_of_msmt17_without_any_list_are_no_folder_per_identity(tmp_path):
    write_msmt17(tmp_path)
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"list_train.txt is not there; expected the lists of MSMT17 V1"):
        open_dataset(tmp_path)


# ----------------------------------------------------------------------------------------------- folder per identity


def test_one_folder_per_identity_is_train_query_and_gallery_and_knows_each_query_in_the_gallery(tmp_path):
    write_flat(tmp_path / "own", ids=2, images=2)
    write(tmp_path / "own", ["-1/junk.jpg"])
    dataset = open_dataset(tmp_path / "own")
    assert dataset.name == "folder per identity"
    everything = [("-1/junk.jpg", -1, -1), ("person 0/0.jpg", 1, -1), ("person 0/1.jpg", 1, -1)]
    everything += [("person 1/0.jpg", 2, -1), ("person 1/1.jpg", 2, -1)]
    assert rows(dataset, dataset.train) == rows(dataset, dataset.gallery) == everything
    assert rows(dataset, dataset.query) == everything[1:]
    assert dataset.own.tolist() == [1, 2, 3, 4]
    assert not dataset.has_cameras


def test_folders_of_numbers_keep_them_and_others_are_numbered_in_natural_order(tmp_path):
    numbers = open_dataset(write(tmp_path / "numbers", ["0012/a.jpg", "0007/a.jpg", "0/a.jpg"]))
    assert rows(numbers, numbers.train) == [("0/a.jpg", 13, -1), ("0007/a.jpg", 7, -1), ("0012/a.jpg", 12, -1)]
    texts = open_dataset(write(tmp_path / "texts", ["id10/a.jpg", "id9/a.jpg", "anna/a.jpg"]))
    assert rows(texts, texts.train) == [("anna/a.jpg", 1, -1), ("id10/a.jpg", 3, -1), ("id9/a.jpg", 2, -1)]


OTHER_FOLDERS = {
    "VeRi": (["image_train/1/x.jpg", "image_test/1/x.jpg"], "2 folders are named like a split or set, .*: image_t"),
    "cameras": (["c1/a.jpg", "c2/a.jpg", "c3/a.jpg", "Camera 4/a.jpg"], "4 folders .*: Camera 4, c1, c2, ..; expected"),
    "one of them": (["anna/a.jpg", "bert/a.jpg", "train_split/a.jpg"], "a folder is named like a split .*: train_sp"),
    "in a split": (["query/1/a.jpg", "gallery/1/b.jpg", "gallery/distractors/b.jpg"], "gallery: a folder is named"),
    "views": (["view1/a.jpg", "view2/a.jpg", "ch 3/a.jpg"], "3 folders are named like a camera, .*: ch 3, view1, v"),
    "Celeb-reID": (["train/1_1_0.jpg", "query/2_1_0.jpg", "gallery/2_2_0.jpg"], "query/2_1_0.jpg: the name shows no"),
    "LaST": (["train/000001/1.jpg", "test/query/1.jpg", "test/gallery/1.jpg"], "test: 2 folders are named like a spl"),
    "CCVID": (["session1/001_01/00001.jpg", "session2/001_02/00001.jpg"], "split or set, .*: session1, session2; exp"),
    "UnrealPerson": (["images/0001_c001_f0001.jpg", "images/0002_c002_f0001.jpg"], "a split or set, .*: images; expec"),
    "PersonX": (["1/query/0001_c1_1.jpg", "2/query/0001_c1_1.jpg"], "holds Market-1501 in 1/ beside other folders: na"),
    "SenseReID": (["test_probe/00001_0.jpg", "test_gallery/00001_1.jpg"], "split or set, .*: test_gallery, test_probe"),
    "sessions": (["day 1/a.jpg", "session2/a.jpg"], "a folder is named like a split or set, .*: session2; expected"),
    "parts": (["fold1/a.jpg", "batch_2/a.jpg", "part 3/a.jpg", "tracklet_1/a.jpg"], "4 folders .* like a split or set"),
    "bodies": (["whole_body/1.jpg", "occluded_body/1.jpg"], "like a split or set, .*: occluded_body, whole_body"),
    "spectra": (["Thermal/1.jpg", "Visible/1.jpg"], "2 folders are named like a split or set, .*: Thermal, Visible"),
    "upper case": (["TrainSet/1/a.jpg", "TestSet/1/a.jpg"], "like a split or set, .*: TestSet, TrainSet; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_FOLDERS)
def test_folders_named_like_splits_sets_or_cameras_are_no_identities(tmp_path, case):
    names, message = OTHER_FOLDERS[case]
    with pytest.raises(ValueError, match=message):
        open_dataset(write(tmp_path / "data", names))


SCENES = ["camA camB", "cam1_morning cam2_morning", "cam_front cam_back", "camFront camBack", "cam-1-2 cam-2-2",
          "lobby_cam door_cam", "ipcam1 ipcam2", "cctv1 cctv2", "Kamera1 C\xe1mara2", "0001_cam1 0001_cam2",
          "2024-01-05 2024-01-06", "20240105 20240106", "05.01.2024 06.01.2024", "2024-01-05_08-30 2024-01-05T14-00",
          "monday tuesday", "Mon Tue", "morning night", "jan05 jan06", "day1 day2", "monday_2024-01-05 week2",
          "left right", "entrance exit", "1st_floor 2nd_floor", "lobby gate2", "-1 day1 day2",
          "0000 left right"]  # fmt: skip


@pytest.mark.parametrize("folders", SCENES)
def test_folders_that_are_all_named_by_cameras_times_and_places_are_no_identities(tmp_path, folders):
    names = [f"{folder}/{i}.jpg" for i, folder in enumerate(folders.split())]
    with pytest.raises(ValueError, match=r"folders are named like a camera, time or place, not like an identity: "):
        open_dataset(write(tmp_path / "data", names))
    with pytest.raises(ValueError, match=r"/gallery: 2 folders are named like a camera, time"):
        open_dataset(write(tmp_path / "splits", [f"gallery/{name}" for name in names]))


PERSONS = ["Day May anna", "April Johnson", "person_01 person_02", "id12 id13", "ID-3 ID-4", "20240105 20241399",
           "a b c", "0001 0002", "track1 track2", "Camilla Camille", "p1 p2", "Sunny Rainer", "1 2024-01-05", "007 008",
           "site3_anna site4_bert", "0001_20240105 0002_20240105"]  # fmt: skip


@pytest.mark.parametrize("folders", PERSONS)
def test_persons_named_as_a_day_among_others_and_numbers_are_identities(tmp_path, folders):
    dataset = open_dataset(write(tmp_path / "data", [f"{folder}/a.jpg" for folder in folders.split()]))
    assert dataset.train.num_ids == len(folders.split())


OTHER_NAMES = {
    "entrance": (["front door/0000_c1s1_000451_03.jpg", "front door/0001_c1s1_000451_03.jpg", "anna/x.jpg"],
                 r"0001_c1s1_000451_03.jpg: the name tells identity 1, and that of front door/0000_.* identity 0, but"),
    "two folders": (["foyer/0001_c1_f0046182.jpg", "kiosk/0001_c2_f0046182.jpg"],
                    r"kiosk/0001_c2_f0046182.jpg: .* identity 1, and that of foyer/0001_.* identity 1, but .* kiosk/;"),
    "a number": (["7/0007_c1s1_000451_03.jpg", "7/0008_c1s1_000451_03.jpg", "9/0009_c1s1_000451_03.jpg"],
                 r"7/0008_c1s1_000451_03.jpg: the name tells identity 8, but the folder is 7/; expected a folder f"),
    "MSMT17": (["0/0000_000_01_0303morning_0008_0.jpg", "1/0002_000_01_0303morning_0008_0.jpg"], "identity 2, but the"),
    "VeRi": (["1/0001_c001_00016450_0.jpg", "2/0001_c002_00016450_0.jpg"], "tells identity 1, but the folder is 2/"),
    "MARS": (["a/0006C1T0001F001.jpg", "a/0007C1T0001F001.jpg", "b/x.jpg"], "identity 7, and that of a/0006C1T"),
    "a junk image": (["a/0006C1T0001F001.jpg", "a/00-1C1T0001F001.jpg"], "identity 6, and that of .* identity -1"),
}  # fmt: skip


@pytest.mark.parametrize("split", ["", "query/", "gallery/"])
@pytest.mark.parametrize("case", OTHER_NAMES)
def test_images_named_as_other_identities_than_their_folders_are_refused(tmp_path, case, split):
    names, message = OTHER_NAMES[case]
    with pytest.raises(ValueError, match=message):
        open_dataset(write(tmp_path / "data", [split + name for name in names]))


def test_images_whose_names_agree_with_their_folders_or_tell_frames_are_those_of_the_folders(tmp_path):
    names = ["7/0007_c1s1_000451_03.jpg", "anna/0001_c2_f0046182.jpg", "anna/0001_c1_f0046182.jpg",
             "bert/000451_c1.jpg", "bert/000452_c1.jpg", "carl/000451_c1.jpg", "-1/0009_c1s1_000451_03.jpg",
             "-1/0003_c1s1_000451_03.jpg", "dora/00_c1s1_000451_03.jpg", "0000/4622_c8_f0106208.jpg"]  # fmt: skip
    assert open_dataset(write(tmp_path / "own", names)).query.num_ids == 5


OTHER_SETS = {
    "PRCC": ["rgb/train/001/A_cropped_rgb001.jpg", "rgb/test/A/002/cropped_rgb001.jpg"],
    "CUHK01": ["campus/0001001.png", "campus/0002001.png"],
    "CUHK02": ["P1/cam1/001_001.png", "P1/cam2/001_001.png"],
    "CUHK03": ["images_detected/1_001_1_01.png", "images_labeled/1_001_1_01.png"],
    "CUHK-SYSU": ["Image/SSM/s1.jpg", "Image/SSM/s2.jpg"],
    "GRID": ["probe/0001_1_25004_107_32_106_221.jpeg", "gallery/0001_2_25023_116_134_128_330.jpeg"],
    "iLIDS-VID": ["sequences/cam1/person001/1.png", "sequences/cam2/person001/1.png"],
    "PRID2011": ["single_shot/cam_a/person_0001.png", "multi_shot/cam_a/person_0001/0001.png"],
    "VIPeR": ["cam_a/000_45.bmp", "cam_b/000_90.bmp"],
    "Partial-REID": ["partial_body_images/001_001.jpg", "whole_body_images/001_001.jpg"],
    "Occluded-REID": ["occluded_body_images/001/001_01.tif", "whole_body_images/001/001_01.tif"],
    "P-DukeMTMC-reID": ["train/occluded_body_images/1/c1_f0046182.jpg", "test/whole_body_images/2/c2_f0046182.jpg"],
    "VC-Clothes": ["train/0001-01-01-01.jpg", "query/0002-01-01-01.jpg", "gallery/0002-02-01-01.jpg"],
    "SYSU-MM01": ["cam1/0001/0001.jpg", "cam3/0001/0001.jpg"],
    "RegDB": ["Thermal/1/male_front_t_00001_1.bmp", "Visible/1/male_front_v_00001_1.bmp"],
    "DeepChange": ["train-set/P1C1.jpg", "test-set-query/P2C1.jpg"],
    "VehicleID": ["image/0000001.jpg", "image/0000002.jpg"],
}


@pytest.mark.parametrize("case", OTHER_SETS)
def test_public_sets_of_other_folders_are_refused_by_name(tmp_path, case):
    message = f"named as in {case}, whose folders do not tell identities and cameras; expected a CSV file with the col"
    with pytest.raises(ValueError, match=message):
        open_dataset(write(tmp_path / "data", OTHER_SETS[case]))
    inner = tmp_path / "data" / OTHER_SETS[case][0].partition("/")[0]
    with pytest.raises(ValueError, match=r"named as in|expected"):
        open_dataset(inner)


def test_ltcc_is_read_by_its_names(tmp_path):
    dataset = open_dataset(write(tmp_path, [
        "train/001_1_c1_015833.png", "train/001_2_c5_015833.png", "query/005_1_c12_001.png", "test/005_1_c12_002.png",
        "test/005_2_c3_003.png", "test/007_1_c3_003.png",
    ]))  # fmt: skip
    assert dataset.name == "LTCC"
    assert (dataset.train.pids.tolist(), dataset.train.camids.tolist()) == ([1, 1], [0, 4])
    assert (dataset.query.pids.tolist(), dataset.query.camids.tolist()) == ([5], [11])
    assert (dataset.gallery.pids.tolist(), dataset.gallery.camids.tolist()) == ([5, 5, 7], [11, 2, 2])
    assert dataset.matches.tolist() == [1]


@pytest.mark.parametrize("folders", [False, True])
def test_cameras_of_randperson_are_those_of_a_scene(tmp_path, folders):
    names = [f"0000{pid}_s0{scene}_c0{camera}_f000012.jpg" for pid in (0, 3) for scene in (0, 1) for camera in (0, 1)]
    dataset = open_dataset(write(tmp_path, [f"{name[:5]}/{name}" if folders else name for name in names]))
    assert dataset.name == ("folder per identity" if folders else "RandPerson")
    assert dataset.train.num_ids == 2
    assert dataset.train.camids.tolist() == [0, 1, 2, 3] * 2
    assert dataset.matches.tolist() == [3] * 8


def test_such_folders_are_unlabelled_where_labels_are_not_needed(tmp_path):
    dataset = open_dataset(write(tmp_path / "cameras", ["cam_a/1.jpg", "cam_b/1.jpg"]), labelled=False)
    assert (dataset.name, dataset.train.pids.tolist()) == ("unlabelled folder", [-1, -1])
    dataset = open_dataset(write(tmp_path / "one", ["monday/1.jpg", "monday/2.jpg"]), labelled=False)
    assert (dataset.name, dataset.train.pids.tolist()) == ("unlabelled folder", [-1, -1])


def test_folders_of_identities_have_any_other_name(tmp_path):
    folders = ["-1", "0001", "7", "Valerie", "Camilla", "Carl", "anna", "c", "id_3", "person 3", "track12", "tester"]
    dataset = open_dataset(write(tmp_path, [f"{folder}/a.jpg" for folder in folders]))
    assert dataset.train.num_ids == len(folders) - 1


def test_split_folders_are_numbered_together_and_cameras_come_from_the_names(tmp_path):
    files = ["train/7/0007_c1s1_000451_03.jpg", "train/9/0009_c2s1_000451_03.jpg", "query/3/0003_c1s1_000001_00.jpg",
             "gallery/3/0003_c4s1_000001_00.jpg", "gallery/-1/-1_c3s1_000001_00.jpg",
             "gallery/0000/0000_c3s1_000001_00.jpg"]  # fmt: skip
    dataset = open_dataset(write(tmp_path, files))
    assert dataset.name == "folder per identity"
    assert dataset.train.pids.tolist() == [7, 9]
    assert rows(dataset, dataset.query) == [("query/3/0003_c1s1_000001_00.jpg", 3, 0)]
    assert [(pid, camid) for _, pid, camid in rows(dataset, dataset.gallery)] == [(-1, 2), (0, 2), (3, 3)]
    assert dataset.has_cameras
    (tmp_path / "query/3/no_camera.jpg").write_bytes(jpeg(0))
    assert not open_dataset(tmp_path).has_cameras


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train_all", "train", "val", "query", "multi-query", "gallery"),
         ("train_all/1/x.jpg", "query/1/x.jpg", "gallery/1/x.jpg")),
        (("train", "query", "test"), ("train/1/x.jpg", "query/1/x.jpg", "test/1/x.jpg")),
        (("bounding_box_train", "query", "bounding_box_test"),
         ("bounding_box_train/1/x.jpg", "query/1/x.jpg", "bounding_box_test/1/x.jpg")),
        (("train", "test"), ("train/1/x.jpg", "test/1/x.jpg", "test/1/x.jpg")),
    ],
)  # fmt: skip
def test_split_folders_may_have_these_names(tmp_path, folders, expected):
    dataset = open_dataset(write(tmp_path, [f"{folder}/1/x.jpg" for folder in folders]))
    assert tuple(dataset.relative(split.paths[0]) for split in dataset.splits.values()) == expected
    assert dataset.own.tolist() == ([0] if "query" not in folders else [-1])


@pytest.mark.parametrize("image", ["1/x.jpg", "0001_c1s1_000451_03.jpg"])
@pytest.mark.parametrize(
    ("folders", "unread"),
    [
        ("train probe gallery", "probe/"), ("train queries gallery", "queries/"), ("train val test", "val/"),
        ("train query gallery test", "test/"), ("train Validation test_2", "Validation/, test_2/"),
        ("train query gallery distractors", "distractors/"),
        ("train query gallery multi-query", "multi-query/"),
    ],
)  # fmt: skip
def test_a_folder_named_as_a_split_that_would_be_left_out_is_refused(tmp_path, folders, unread, image):
    root = write(tmp_path / "data", [f"{folder}/{image}" for folder in folders.split()])
    with pytest.raises(ValueError, match=rf"data: {unread} beside .* would be left out; expected one fol"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("folders", "image"),
    [
        ("Train QUERY Gallery", "1/x.jpg"),
        ("Train QUERY Gallery", "0001_c1s1_000451_03.jpg"),
        ("train_all query gallery", "0001_c1s1_000451_03.jpg"),
        ("bounding_box_train Query Bounding_box_test", "0001_c1s1_000451_03.jpg"),
        ("Image_train image_query Image_Test", "0001_c001_00016450_0.jpg"),
    ],
)
def test_folders_of_splits_may_be_in_upper_case_and_beside_others(tmp_path, folders, image):
    root = write(tmp_path / "data", [f"{name}/{image}" for name in folders.split()])
    (root / "val").mkdir()
    write(root, ["Valerie/x.jpg", "plots/x.jpg"])
    dataset = open_dataset(root)
    assert dataset.parts == tuple(f"{name}/" for name in folders.split())
    assert [len(split) for split in dataset.splits.values()] == [1, 1, 1]


SPLIT_KINDS = [
    ("train/1/x.jpg train/0009_c1.jpg query/1/x.jpg gallery/1/x.jpg", "train/1/x.jpg", "train/0009_c1.jpg"),
    ("train/1/x.jpg query/1/x.jpg gallery/1/x.jpg gallery/0009_c1.jpg", "train/1/x.jpg", "gallery/0009_c1.jpg"),
    ("train/1/x.jpg query/0001_c1.jpg gallery/0001_c2.jpg", "train/1/x.jpg", "query/0001_c1.jpg"),
    ("train/0009_c1.jpg query/1/x.jpg test/1/x.jpg", "test/1/x.jpg", "train/0009_c1.jpg"),
    ("train/1/x.jpg query/0001_c1.jpg gallery/1/x.jpg", "train/1/x.jpg", "query/0001_c1.jpg"),
    ("train/x.jpg query/1/x.jpg gallery/1/x.jpg", "query/1/x.jpg", "train/x.jpg"),
    ("bounding_box_train/0009_c1.jpg query/0001_c1.jpg bounding_box_test/0001_c2.jpg bounding_box_test/x/0001_c3.jpg",
     "bounding_box_test/x/0001_c3.jpg", "query/0001_c1.jpg"),
    ("image_train/9/0009_c1.jpg image_query/0001_c1.jpg", "image_train/9/0009_c1.jpg", "image_query/0001_c1.jpg"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "inside", "outside"), SPLIT_KINDS)
def test_splits_of_folders_and_of_images_are_not_mixed_and_the_message_has_one_of_each(
    tmp_path, names, inside, outside
):
    root = write(tmp_path / "data", names.split())
    message = rf"data: {inside} lies in a folder of its split, and {outside} in none; expected one of the two: train/ID"
    with pytest.raises(ValueError, match=f"{message}.*, or move those that are not of this dataset out of the folder$"):
        open_dataset(root)


# ------------------------------------------------------------------------------------------------------- flat folder


def test_a_flat_folder_is_train_query_and_gallery_by_its_names(tmp_path):
    dataset = open_dataset(write(tmp_path / "own", ["0002_c1s1_000451_03.jpg", "0002_c3_f0046182.jpg", "0000_c1.jpg"]))
    assert dataset.name == "flat folder"
    everything = [("0000_c1.jpg", 3, 0), ("0002_c1s1_000451_03.jpg", 2, 0), ("0002_c3_f0046182.jpg", 2, 2)]
    for split in dataset.splits.values():
        assert rows(dataset, split) == everything
    assert dataset.own.tolist() == [0, 1, 2]
    assert dataset.matches.tolist() == [0, 1, 1]
    assert dataset.has_cameras
    assert dataset.is_one_set
    assert dataset.description.startswith("flat folder, own/: 3 training images of 2 identities, 3 queries, 3 gallery")


@pytest.mark.parametrize("test", ["gallery", "test"])
def test_train_query_and_gallery_may_be_flat_folders(tmp_path, test):
    names = [name.replace("bounding_box_train", "train").replace("bounding_box_test", test) for name in MARKET]
    dataset = open_dataset(write(tmp_path / "own", names))
    market = open_dataset(write(tmp_path / "market", MARKET))
    assert (dataset.name, dataset.parts) == ("flat folder", ("train/", "query/", f"{test}/"))
    assert [len(split) for split in dataset.splits.values()] == [4, 2, 6]
    assert dataset.gallery.pids.tolist() == market.gallery.pids.tolist()
    assert score(dataset).mAP == score(market).mAP


def test_0000_is_a_distractor_of_a_flat_folder_beside_junk_as_in_the_gallery_of_market1501(tmp_path):
    dataset = open_dataset(write(tmp_path, ["-1_c1.jpg", "0000_c1.jpg", "0001_c1.jpg", "0001_c2.jpg"]))
    assert dataset.query.pids.tolist() == [1, 1]
    assert dataset.gallery.pids.tolist() == [-1, 0, 1, 1]
    assert dataset.train.pids.tolist() == [-1, 1, 1]
    assert dataset.is_one_set


def test_a_flat_folder_has_cameras_and_no_identities_where_these_are_not_needed(tmp_path):
    names = ["0002_c1s1_000001_01.jpg", "0002_c2s1_000001_01.jpg", "0003_c3s1_000001_01.jpg"]
    dataset = open_dataset(write(tmp_path, names), labelled=False)
    assert dataset.name == "unlabelled folder"
    assert dataset.train.pids.tolist() == [-1, -1, -1]
    in_folders = open_dataset(write(tmp_path / "2", [f"{name[:4]}/{name}" for name in names]), labelled=False)
    assert dataset.train.camids.tolist() == in_folders.train.camids.tolist() == [0, 1, 2]
    assert dataset.train.has_cameras
    assert not dataset.has_cameras  # of queries and gallery: there are none
    assert not open_dataset(write(tmp_path, ["someone.jpg"]), labelled=False).train.has_cameras


def test_folders_of_identities_with_such_names_are_no_flat_folder(tmp_path):
    dataset = open_dataset(write(tmp_path, ["7/0007_c1s1_000451_03.jpg", "9/0009_c2s1_000451_03.jpg"]))
    assert dataset.name == "folder per identity"
    assert dataset.train.pids.tolist() == [7, 9]


# --------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_is_drawn_once_and_named_by_its_recipe(monkeypatch):
    text = "synthetic:ids=4,images=5,cameras=3,seed=3,size=32x16,train_ids=1"
    dataset = open_dataset(text)
    full = "synthetic:ids=4,images=5,cameras=3,seed=3,size=32x16,place=street,train_ids=1"
    assert dataset.name == "synthetic"
    assert dataset.description.startswith(f"{full}: 5 training images of 1 identity, 9 queries, 6 gallery images")
    monkeypatch.setattr(SyntheticPersons, "write_market1501", None)
    again = open_dataset(full)
    assert again.train.paths == dataset.train.paths
    assert again.fingerprint == dataset.fingerprint


def test_synthetic_that_lost_files_is_drawn_again():
    text = "synthetic:ids=2,images=4,cameras=2,size=32x16"
    dataset = open_dataset(text)
    shutil.rmtree(dataset.root / "query")
    assert len(open_dataset(text).query) == len(dataset.query) == 2


def test_a_wrong_recipe_of_synthetic_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"unknown key 'people'; known: ids, .* place, train_ids"):
        open_dataset("synthetic:people=3")
    with pytest.raises(ValueError, match=r"^synthetic:ids=4,images=3: the Market-1501 layout takes"):
        open_dataset("synthetic:ids=4,images=3")


# ---------------------------------------------------------------------------------------------- unlabelled, mistakes


def test_any_folder_of_images_opens_unlabelled_where_labels_are_not_needed(tmp_path):
    write(tmp_path, ["b.jpg", "day 1/cam 2/a.png", ".trash/c.jpg"])
    dataset = open_dataset(tmp_path, labelled=False)
    assert dataset.name == "unlabelled folder"
    assert rows(dataset, dataset.train) == [("b.jpg", -1, -1), ("day 1/cam 2/a.png", -1, -1)]
    assert (len(dataset.query), len(dataset.gallery), dataset.has_cameras) == (0, 0, False)
    assert dataset.train.num_ids == 0


def test_a_known_layout_keeps_its_labels_where_they_are_not_needed(tmp_path):
    root = write(tmp_path, MARKET)
    assert open_dataset(root, labelled=False).fingerprint == open_dataset(root).fingerprint


def test_a_split_that_is_needed_and_empty_is_named(tmp_path):
    dataset = open_dataset(write(tmp_path, [name for name in MARKET if not name.startswith("query")]))
    assert dataset.require("train", "gallery") is dataset
    with pytest.raises(
        ValueError, match=rf"no query images in query/ of {tmp_path} \(Market-1501\); expected Market-1501 or"
    ):
        dataset.require("train", "query")


def market_name(root: Path) -> Path:
    return write(root, [*MARKET, "query/person.jpg"])


def msmt_line(root: Path, line: str) -> Path:
    write_msmt17(root)
    (root / "list_val.txt").write_text(f"\n{line}\n")
    return root


MISTAKES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda root: root / "none", r"none: no such file or folder; expected Market-1501 or DukeMTMC-reID \("),
    "empty": (lambda root: root, r" holds 0 folders and 0 files, which is no known layout; expected Market-1501"),
    "flat": (lambda root: write(root, ["abcd/a.jpg", "b.jpg"]), r"b.jpg: an image beside the folders of identities"),
    "images": (lambda root: write(root, ["b.jpg"]), r"holds 0 folders and 1 file \(b.jpg\), which is no known layout"),
    "deep": (lambda root: write(root, ["a1/id/b.jpg"]), r"a1/id/b.jpg: an image below the folder of an identity"),
    "file": (lambda root: write(root, ["b.jpg"]) / "b.jpg", r"cannot come from this kind of file; expected Market"),
    "a name of a flat folder": (
        lambda root: write(root, ["0002_c1.jpg", "person.jpg"]), r"/data/person.jpg: the name shows no identity and"),
    "name": (market_name, r"/query/person.jpg: the name shows no identity and camera; expected PPPP_cC in front"),
    "line": (lambda root: msmt_line(root, "a/b.jpg 3"), r"list_val.txt:2: 'a/b.jpg 3'; expected a path, whose name"),
    "no pid": (lambda root: msmt_line(root, "a/0_0_01_x.jpg"), r"list_val.txt:2: 'a/0_0_01_x.jpg'; expected a path"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_dataset_of_no_layout_is_refused_with_the_file_and_the_expected_layouts(tmp_path, case):
    make, message = MISTAKES[case]
    (tmp_path / "data").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_dataset(make(tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_is_of_names_and_labels_and_not_of_the_place(tmp_path):
    first, second = (open_dataset(write(tmp_path / place / "data", MARKET)) for place in ("here", "there"))
    assert first.fingerprint == second.fingerprint
    (second.root / "query/0001_c1s1_001051_00.jpg").rename(second.root / "query/0003_c1s1_001051_00.jpg")
    assert open_dataset(second.root).fingerprint != first.fingerprint
    lines = ["path,pid,camid,split", "../a.jpg,1,1,train", "b.jpg,2,2,train"]
    lists = [open_dataset(write_csv(tmp_path / place / "own.csv", lines)).fingerprint for place in "ab"]
    moved = open_dataset(write_csv(tmp_path / "c" / "own.csv", [*lines[:2], "b.jpg,2,2,gallery"])).fingerprint
    assert lists[0] == lists[1] != moved


def test_no_image_is_opened(tmp_path):
    root = write(tmp_path, MARKET)
    for path in list(root.rglob("*.jpg")):
        path.unlink()
        path.symlink_to("/nowhere")
    assert len(open_dataset(root).gallery) == 6


def test_written_persons_are_called_synthetic_and_not_compared_with_published_counts(tmp_path):
    SyntheticPersons(4, 5, 3, size=(32, 16)).write_market1501(tmp_path / "persons")
    assert open_dataset(tmp_path / "persons").name == "synthetic"


@pytest.mark.parametrize(
    ("marker", "name"),
    [
        ('{"generator": 2, "seed": 3}', "synthetic 3-D (generator 2, seed 3)"),
        ('{"seed": 3}', "synthetic 3-D (generator 1, seed 3)"),  # before the generator had a version
        ("{", "synthetic 3-D"),
        ('["generator"]', "synthetic 3-D"),
        ('{"generator": null, "seed": 3}', "synthetic 3-D"),
    ],
)
def test_drawn_persons_are_named_by_generator_and_seed(tmp_path, marker, name):
    SyntheticPersons(4, 5, 3, size=(32, 16)).write_market1501(tmp_path)
    (tmp_path / "synthetic_persons.json").unlink()
    (tmp_path / "synthetic3d.json").write_text(marker)
    dataset = open_dataset(tmp_path)
    assert dataset.name == name
    assert dataset.description.startswith(f"{name}, {tmp_path.name}/: ")


def test_a_table_in_a_folder_of_no_layout_and_a_near_name_are_pointed_at(tmp_path):
    (tmp_path / "shop").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "shop" / name).write_bytes(jpeg(1))
    (tmp_path / "shop" / "labels.csv").write_text("path,pid\na.jpg,1\n")
    with pytest.raises(ValueError, match=r"no known layout; if .*shop/labels\.csv lists it, name that file; expected"):
        open_dataset(tmp_path / "shop")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; did you mean shop\?$"):
        open_dataset(tmp_path / "shopp")
