"""CSV files of labels: read as people, scripts and spreadsheets write them, or refused with their line."""

import os

import pytest

from passreid_models.data.datasets import open_dataset
from passreid_models.data.sources import open_source
from passreid_models.evaluation.feature_cache import hash_files
from tests.reid_data import rows, write_csv


def test_csv_with_any_text_as_identity_and_camera(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    dataset = open_dataset(write_csv(tmp_path / "lists" / "own.csv", [
        "path, pid, camid, split, note",
        "a.jpg,anna,lobby,train,",
        "b.jpg,bert,gate 2,train,",
        "",
        "q/c.jpg,clara,gate 10,query,\"left, of the door\"",
        f"{tmp_path}/elsewhere/d.jpg,clara,lobby,test,",
        "../e.jpg,-1,lobby,gallery,",
        "f.jpg,0,lobby,gallery,",
    ]))  # fmt: skip
    assert (dataset.name, dataset.root) == ("CSV", tmp_path / "lists")
    assert rows(dataset, dataset.train) == [("a.jpg", 1, 2), ("b.jpg", 2, 0)]
    assert rows(dataset, dataset.query) == [("q/c.jpg", 3, 1)]
    assert rows(dataset, dataset.gallery) == [("../elsewhere/d.jpg", 3, 2), ("../e.jpg", -1, 2), ("f.jpg", 0, 2)]
    assert dataset.description.startswith("CSV, own.csv: 2 training images of 2 identities, 1 query, 3 gallery images")


def test_csv_without_cameras_may_name_one_file_as_query_and_gallery(tmp_path):
    lines = ["path,pid,split", "a.jpg,1,query", "./a.jpg,1,gallery", "b.jpg,1,gallery"]
    dataset = open_dataset(write_csv(tmp_path / "own.csv", lines))
    assert not dataset.has_cameras
    assert dataset.own.tolist() == [0]


CSV_ERRORS = {
    "no split": (
        ["path,pid", "a.jpg,1"],
        r"own.csv: the first line names no column split but path, pid; expected path,",
    ),
    "no header": (["a.jpg,1,2,train"], r"own.csv: the first line names no column path and pid and split but a.jpg, 1"),
    "a long first line": (["x" * 200_000], r"own.csv: the first line names no column path and pid and split but none"),
    "empty": ([], r"own.csv: the first line names no column path and pid and split but none"),
    "no lines": (["path,pid,camid,split"], r"own.csv: no line after the first"),
    "blank pid": (
        ["path,pid,camid,split", "a.jpg,1,1,train", "b.jpg, ,1,train"],
        r"own.csv:3: no pid; expected a value",
    ),
    "blank camera": (["path,pid,camid,split", "a.jpg,1,,train"], r"own.csv:2: no camid; expected a value"),
    "short": (["path,pid,camid,split", "a.jpg,1"], r"own.csv:2: no split and no camid"),
    "camera": (
        ["path,pid,camera,split", "a.jpg,1,1,train"],
        r"own.csv:1: the column camera is not read; expected the na",
    ),
    "cam_id": (
        ["path,pid,split,Cam_ID", "a.jpg,1,train,1"],
        r"own.csv:1: the column cam_id is not read; expected the na",
    ),
    "split": (["path,pid,split", "a.jpg,1,val"], r"own.csv:2: split is 'val'; expected train, query or gallery"),
}


@pytest.mark.parametrize("case", CSV_ERRORS)
def test_a_csv_file_that_does_not_fit_is_refused_with_its_line(tmp_path, case):
    lines, message = CSV_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        open_dataset(write_csv(tmp_path / "own.csv", lines))


LINES = ["path,pid,camid,split", "a/0.jpg,1,1,train", "a/1.jpg,2,2,query", "a/2.jpg,2,1,gallery", "a/3.jpg,3,1,gallery"]
TEXT = "\n".join(LINES) + "\n"
WRITTEN = {
    "BOM and CRLF": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
    "CR": TEXT.replace("\n", "\r").encode(),
    "semicolons": TEXT.replace(",", ";").encode(),
    "tabs": TEXT.replace(",", "\t").encode(),
    "UTF-16": TEXT.replace(",", "\t").encode("utf-16"),
    "UTF-16, high byte first": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "UTF-32, high byte first": b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"),
    "sep": ("sep=;\r\n" + TEXT.replace(",", ";")).encode(),
    "quotes": "".join('"' + line.replace(",", '";"') + '"\n' for line in LINES).encode(),
    "quotes and spaces": "".join('"' + line.replace(",", '" , "') + '"\n' for line in LINES[:1]).encode()
    + TEXT.partition("\n")[2].replace(",", " , ").encode(),
    "upper case": TEXT.replace("path,pid,camid,split", "Path,PID,CamID,Split").replace("query", "Query").encode(),
    "blank lines": ("\n" + TEXT.replace("\n", "\n\n") + ",,,\n  \n,,,\n").encode(),
    "blank columns": TEXT.replace("\n", ",,\n").encode(),
    "backslashes": TEXT.replace("a/", "a\\").encode(),
    "other columns": "".join(f"{i},{line}\n" for i, line in enumerate(LINES)).encode(),
    "no last line end": TEXT.rstrip().encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_csv_as_windows_and_spreadsheets_write_it(tmp_path, case):
    plain = open_dataset(write_csv(tmp_path / "plain" / "own.csv", LINES))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "own.csv").write_bytes(WRITTEN[case])
    dataset = open_dataset(tmp_path / "other" / "own.csv")
    assert [rows(dataset, split) for split in dataset.splits.values()] == [
        [("a/0.jpg", 1, 0)], [("a/1.jpg", 2, 1)], [("a/2.jpg", 2, 0), ("a/3.jpg", 3, 0)],
    ]  # fmt: skip
    assert dataset.fingerprint == plain.fingerprint


def test_a_backslash_in_the_name_of_a_file_stays(tmp_path):
    (tmp_path / "a\\0.jpg").touch()
    dataset = open_dataset(write_csv(tmp_path / "own.csv", [LINES[0], "a\\0.jpg,1,1,train", "a\\1.jpg,2,1,train"]))
    assert [path.name for path in dataset.train.paths] == ["a\\0.jpg", "1.jpg"]


UNCERTAIN = {
    "UTF-16 without its mark": (TEXT.encode("utf-16-le"), "own.csv: UTF-16 without its mark, or no text; expec"),
    "Latin-1": (TEXT.replace("a/2", "\xe9/2").encode("latin-1"), "own.csv:4: no CSV file in UTF-8: .* byte 0xe9"),
    "too many values": (TEXT.replace("a/1", "a,1").encode(), "own.csv:3: 5 values for 4 columns; expected quotes aro"),
    "two columns of one name": (TEXT.replace("camid", "PID").encode(), "own.csv:1: the column pid is named twice"),
    "a quote that does not end": (TEXT.replace("a/1", '"a/1').encode(), "own.csv:5: no line of a CSV file: unexp"),
    "a drive": (TEXT.replace("a/1", "C:\\a\\1").encode(), r"own.csv:3: 'C:.*1.jpg' is a path on Windows; expected"),
    "a rounded number": (TEXT.replace("1.jpg,2", "1.jpg,2.02311E+10").encode(), r"own.csv:3: pid is '2.02311E\+10', a"),
    "nan": (TEXT.replace("1.jpg,2", "1.jpg,nan").encode(), "own.csv:3: no pid; expected a value"),
    "#N/A": (TEXT.replace("1.jpg,2,2", "1.jpg,2,#N/A").encode(), "own.csv:3: no camid; expected a value"),
    "a line after a blank one": (("\n\n" + TEXT + "\n,1,1,query\n").encode(), "own.csv:9: no path; expected a value"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNCERTAIN)
def test_csv_that_may_be_read_in_two_ways_is_refused_with_its_line(tmp_path, case):
    content, message = UNCERTAIN[case]
    (tmp_path / "own.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "own.csv")


@pytest.mark.parametrize("suffix", ["tsv", "txt"])
def test_a_list_of_another_suffix_is_refused_with_the_suffix_to_give_it(tmp_path, suffix):
    file = write_csv(tmp_path / f"own.{suffix}", [line.replace(",", "\t") for line in LINES])
    with pytest.raises(
        ValueError, match=rf"own.{suffix}: .* \(a list with .* or tabs is read once it is named .csv\); e"
    ):
        open_dataset(file)


def test_a_csv_or_a_list_that_is_no_regular_file_or_huge_is_refused_and_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name in ("pipe.csv", "zero.csv"):
        with pytest.raises(ValueError, match=rf"{name} is no regular file"):
            open_dataset(tmp_path / name)
    for name in ("huge.csv", "huge.txt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**34)
    with pytest.raises(ValueError, match=r"huge\.csv is larger than 268,435,456 bytes"):
        open_dataset(tmp_path / "huge.csv")
    with pytest.raises(ValueError, match=r"huge\.txt: a line of 65,536 bytes or more; expected one path per line"):
        open_source(tmp_path / "huge.txt")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**34)
    assert hash_files([tmp_path / "huge.jpg", tmp_path / "pipe.csv"]) == ["", ""]
