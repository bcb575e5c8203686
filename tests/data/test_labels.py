"""Labels that are equal as numbers, and images with two labels: one number, or refused with both places."""

import pytest

from passreid_models.data.datasets import open_dataset
from passreid_models.data.labels import number_cameras
from tests.reid_data import write, write_csv, write_msmt17


def test_labels_that_a_spreadsheet_wrote_as_decimals_are_the_numbers_they_were(tmp_path):
    lines = ["0.jpg,7,1,train", "1.jpg,12,2,train", "2.jpg,3,1,query", "3.jpg,3,2,gallery", "4.jpg,-1,2,gallery",
             "5.jpg,0,-1,gallery"]  # fmt: skip
    cells = [line.split(",") for line in lines]
    decimals = [f"{path},{pid}.0,{camid}.00,{split}" for path, pid, camid, split in cells]
    head = "path,pid,camid,split"
    first = open_dataset(write_csv(tmp_path / "a" / "own.csv", [head, *lines]))
    second = open_dataset(write_csv(tmp_path / "b" / "own.csv", [head, *decimals]))
    assert second.gallery.pids.tolist() == [3, -1, 0]
    assert second.gallery.camids.tolist() == [1, 1, -1]
    assert first.fingerprint == second.fingerprint


def test_zeros_in_front_are_no_other_identity_or_camera_where_all_have_them(tmp_path):
    lines = ["path,pid,camid,split", "a.jpg,0012,01,query", "b.jpg,0012,02,gallery", "c.jpg,anna,10,gallery"]
    dataset = open_dataset(write_csv(tmp_path / "own.csv", lines))
    assert (dataset.query.pids.tolist(), dataset.gallery.pids.tolist()) == ([1], [1, 2])
    assert (dataset.query.camids.tolist(), dataset.gallery.camids.tolist()) == ([0], [1, 9])
    names = ["query/0012_c1_1.jpg", "bounding_box_test/12_c02_1.jpg", "bounding_box_test/012_c001_1.jpg"]
    market = open_dataset(write(tmp_path / "market", names))  # identity and camera are numbers by this layout
    assert (market.query.pids.tolist(), market.gallery.pids.tolist()) == ([12], [12, 12])
    assert market.gallery.camids.tolist() == [0, 1]
    assert market.matches.tolist() == [1]


SPELLINGS = {
    "identities": (["a.jpg,1,1,query", "b.jpg,01,2,gallery"],
                   r"own.csv:3: identity '01', and '1' in .*/own.csv:2, which is the same number; expected one"),
    "decimals": (["a.jpg,1,1,query", "", "b.jpg,1.0,2,gallery"], r"own.csv:4: identity '1.0', and '1' in .*/own.csv:2"),
    "beside text": (["a.jpg,anna,1,query", "b.jpg,7,2,train", "c.jpg,007,2,train"], r"identity '.*7', and '.*7' in"),
    "a sign": (["a.jpg,1,1,query", "b.jpg,+1,2,gallery"], r"own.csv:3: identity '\+1', and '1' in .*/own.csv:2, which"),
    "an exponent": (["a.jpg,1e1,1,query", "b.jpg,10,2,gallery"], r"own.csv:3: identity '10', and '1e1' in .*own.csv:2"),
    "decimals of cameras": (["a.jpg,1,2.50,query", "b.jpg,1,2.5,gallery"], r"camera '2.5', and '2.50' in"),
    "c1": (["a.jpg,1,1,query", "b.jpg,1,c1,gallery"], r"own.csv:3: camera 'c1', and '1' in .*/own.csv:2, which is the"),
    "cam 1": (["a.jpg,1,c01,query", "b.jpg,1,Cam 1,gallery"], r"own.csv:3: camera 'Cam 1', and 'c01' in .*/own.csv:2"),
    "cameras": (["a.jpg,1,1,query", "b.jpg,1,01,gallery"], r"own.csv:3: camera '01', and '1' in .*/own.csv:2, which"),
    "decimal commas": (['a.jpg,1,1,query', 'b.jpg,"1,0",2,gallery'], r"own.csv:3: identity '1,0', and '1' in .*csv:2"),
    "no zero in front": (["a.jpg,.5,1,query", "b.jpg,0.5,2,gallery"], r"identity '0.5', and '.5' in .*csv:2, which is"),
    "commas of thousands": (['a.jpg,1234,1,query', 'b.jpg,"1,234",2,gallery'], r"identity '1,234', and '1234' in"),
    "points of thousands": (['a.jpg,1.234,1,query', 'b.jpg,"1.234,0",2,gallery', "c.jpg,1234,1,query"],
                            r"own.csv:4: identity '1234', and '1.234' in"),
    "thousands and decimals": (['a.jpg,"1.234,00",1,query', 'b.jpg,1234,2,gallery'], r"'1234', and '1.234,00' in"),
    "an apostrophe": (["a.jpg,1,1,query", "b.jpg,'1,2,gallery"], r"own.csv:3: identity \"'1\", and '1' in .*csv:2"),
    "a minus": (["a.jpg,-1,1,query", "b.jpg,\u22121,2,gallery"], r"own.csv:3: identity '\u22121', and '-1' in .*csv:2"),
    "Arabic digits": (["a.jpg,12,1,query", "b.jpg,\u0661\u0662,2,gallery"], r"own.csv:3: identity '.*', and '12' in"),
    "wide digits": (["a.jpg,12,1,query", "b.jpg,\uff11\uff12,2,gallery"], r"own.csv:3: identity '.*', and '12' in"),
    "an invisible character": (["a.jpg,1,1,query", "b.jpg,\u200b1,2,gallery"], r"identity '\\u200b1', and '1' in .*cs"),
    "invisible in text": (["a.jpg,anna,1,query", "b.jpg,an\u200bna,2,gallery"],
                          r"own.csv:3: identity 'an\\u200bna', and 'anna' in .*csv:2, which looks the same; expec"),
    "forms of an accent": (["a.jpg,Jos\xe9,1,query", "b.jpg,Jose\u0301,2,gallery"], r"identity .* looks the same"),
    "a space that does not break": (["a.jpg,gate 1,1,query", "b.jpg,gate\xa01,2,gallery"], "which looks the same"),
    "view01": (["a.jpg,1,view1,query", "b.jpg,1,view01,gallery"], r"camera 'view01', and 'view1' in .* same number"),
    "view1": (["a.jpg,1,1,query", "b.jpg,1,view1,gallery"], r"own.csv:3: camera 'view1', and '1' in .*own.csv:2, w"),
    "decimal commas of cameras": (['a.jpg,1,c1,query', 'b.jpg,1,"1,0",gallery'], r"camera '1,0', and 'c1' in .*csv:2"),
    "junk": (["a.jpg,-1,1,query", "b.jpg,-1.0,1,gallery"], r"identity '-1.0', and '-1' in .*/own.csv:2"),
    "a path": (["a.jpg,1,1,train", "b.jpg,2,1,train", "./a.jpg,2,1,train"],
               r"own.csv:4: .*/a.jpg has identity 2, and 1 in .*/own.csv:2; expected one identity and one camera"),
    "a path in two splits": (["a.jpg,1,1,query", "a.jpg,2,1,gallery"], r"own.csv:3: .*/a.jpg has identity 2, and 1 in"),
    "a path with two cameras": (["a.jpg,1,1,query", "a.jpg,1,2,gallery"], r"own.csv:3: .*/a.jpg has camera 2, and 1"),
    "a path without a camera": (["a.jpg,1,1,query", "a.jpg,1,-1,gallery"], r":3: .* has camera unknown, and 1 in"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_two_spellings_of_a_number_and_two_labels_of_an_image_are_refused_with_both_lines(tmp_path, case):
    lines, message = SPELLINGS[case]
    with pytest.raises(ValueError, match=message):
        open_dataset(write_csv(tmp_path / "own.csv", ["path,pid,camid,split", *lines]))


def test_labels_that_only_look_like_numbers_stay_text(tmp_path):
    names = ["00e1", "00e2", "12e400", "1_0", "c1", "c01x", "1" * 40, "1" * 39 + "2"]
    lines = ["path,pid,split", *(f"{i}.jpg,{name},train" for i, name in enumerate(names))]
    dataset = open_dataset(write_csv(tmp_path / "own.csv", lines))
    assert dataset.train.num_ids == len(names)
    assert dataset.alike == ()
    lines = ["path,pid,split", "0.jpg,+7,train", "1.jpg,1e1,train", "2.jpg,-0.0,gallery"]
    dataset = open_dataset(write_csv(tmp_path / "numbers.csv", lines))
    assert (dataset.train.pids.tolist(), dataset.gallery.pids.tolist()) == ([7, 10], [0])


def test_numbers_of_a_german_spreadsheet_and_of_other_scripts_are_the_numbers_they_were(tmp_path):
    lines = ["path;pid;camid;split", "0.jpg;1,0;'1;query", "1.jpg;1,0;2,00;gallery", "2.jpg;\u22121;\uff13;gallery",
             "3.jpg;\u0660,0;4.0;gallery", "4.jpg;\u200b7;\u22121;gallery"]  # fmt: skip
    dataset = open_dataset(write_csv(tmp_path / "own.csv", lines))
    assert (dataset.query.pids.tolist(), dataset.gallery.pids.tolist()) == ([1], [1, -1, 0, 7])
    assert (dataset.query.camids.tolist(), dataset.gallery.camids.tolist()) == ([0], [1, 2, 3, -1])


def test_folders_of_one_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"1/a.jpg: identity '1', and '01' in .*01/a.jpg, which is the same number"):
        open_dataset(write(tmp_path / "own", ["01/a.jpg", "1/a.jpg", "anna/a.jpg"]))
    with pytest.raises(ValueError, match=r"1/b.jpg: identity '1', and '0001' in .*query/0001/a.jpg"):
        open_dataset(write(tmp_path / "splits", ["query/0001/a.jpg", "gallery/1/b.jpg"]))


def test_a_list_of_msmt17_that_contradicts_another_is_refused_with_both_lines(tmp_path):
    write_msmt17(tmp_path)
    line = (tmp_path / "list_query.txt").read_text().replace(" 0", " 1")
    (tmp_path / "list_gallery.txt").write_bytes(b"\xef\xbb\xbf" + line.replace("\n", "\r\n").encode())
    with pytest.raises(ValueError, match=r"list_gallery.txt:1: .* has identity 2, and 1 in .*/list_query.txt:1; expec"):
        open_dataset(tmp_path)


def test_repeated_rows_count_once(tmp_path):
    lines = ["path,pid,split", "a.jpg,1,query", "a.jpg,1,gallery", "b.jpg,1,gallery", "c.jpg,2,gallery"]
    once = open_dataset(write_csv(tmp_path / "a" / "own.csv", lines))
    twice = open_dataset(write_csv(tmp_path / "b" / "own.csv", [*lines, "./a.jpg,1,gallery", "c.jpg,2,gallery"]))
    assert twice.repeated == ("own.csv:6", "own.csv:7")
    assert twice.fingerprint == once.fingerprint
    assert (twice.own.tolist(), twice.matches.tolist()) == ([0], [1])


def test_cameras_with_more_digits_than_an_integer_holds_are_numbered_in_their_order():
    cameras = number_cameras([["9" * 20, "7"], ["9" * 30], ["7", ""]])
    assert [split.tolist() for split in cameras] == [[1, 0], [2], [0, -1]]
