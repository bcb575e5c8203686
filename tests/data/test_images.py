"""Walk of folders and opener: every reader takes the same files, and gives the same reasons for unreadable ones."""

import os
import socket
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from passreid_models.data.check import check_dataset
from passreid_models.data.datasets import open_dataset
from passreid_models.data.images import ImageError, find_images, open_image, reason
from passreid_models.data.sources import open_source
from passreid_models.embed import Embedder
from passreid_models.evaluation import evaluate_dataset
from tests.reid_data import jpeg, make_model, write, write_csv


@pytest.fixture(scope="module")
def embed() -> Embedder:
    return Embedder(make_model(), "cpu", workers=2)


def large(width: int, height: int) -> bytes:
    """A small file of many pixels."""
    file = BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def by_embed(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_images(root)]


def by_training(root: Path) -> list[str]:
    source = open_source(root)
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def by_eval(root: Path) -> list[str]:
    dataset = open_dataset(root)
    assert dataset.name == "folder per identity"
    return [dataset.relative(path) for path in dataset.gallery.paths]


def by_cluster(root: Path) -> list[str]:
    dataset = open_dataset(root, labelled=False)
    return [dataset.relative(path) for path in dataset.train.paths]


READERS: dict[str, Callable[[Path], list[str]]] = {
    "embed": by_embed,
    "training": by_training,
    "eval": by_eval,
    "cluster": by_cluster,
}
IMAGES = ["anna/1.jpg", "anna/2.jpg", "bob/1.jpg", "bob/2.jpg"]


# ---------------------------------------------------------------------------------------------------------- folders


def linked_folder(root: Path) -> list[str]:
    write(root.with_name("outside"), ["1.jpg", "2.jpg"], 20)
    (root / "carl").symlink_to(root.with_name("outside"))
    return [*IMAGES, "carl/1.jpg", "carl/2.jpg"]


def linked_file(root: Path) -> list[str]:
    write(root.with_name("outside"), ["1.jpg"], 20)
    (root / "anna" / "3.jpg").symlink_to(root.with_name("outside") / "1.jpg")
    return [*IMAGES[:2], "anna/3.jpg", *IMAGES[2:]]


def folder_linked_twice(root: Path) -> list[str]:
    (root / "zoe").symlink_to(root / "bob")
    return IMAGES


def link_to_the_folder(root: Path) -> list[str]:
    (root / "loop").symlink_to(root)
    return IMAGES


def link_to_a_parent(root: Path) -> list[str]:
    (root / "anna" / "up").symlink_to(root)
    return IMAGES


def link_to_itself(root: Path) -> list[str]:
    (root / "itself").symlink_to(root / "itself")
    return IMAGES


def broken_link(root: Path) -> list[str]:
    (root / "bob" / "3.jpg").symlink_to(root / "nowhere.jpg")
    return [*IMAGES, "bob/3.jpg"]


def pipe(root: Path) -> list[str]:
    os.mkfifo(root / "anna" / "pipe.jpg")
    (root / "anna" / "link.jpg").symlink_to(root / "anna" / "pipe.jpg")
    return IMAGES


def unix_socket(root: Path) -> list[str]:
    with socket.socket(socket.AF_UNIX) as s:
        folder = os.getcwd()
        try:
            os.chdir(root / "anna")  # the path of a socket must be short
            s.bind("socket.jpg")
        finally:
            os.chdir(folder)
    return IMAGES


def device(root: Path) -> list[str]:
    (root / "anna" / "null.jpg").symlink_to("/dev/null")
    return IMAGES


def folder_with_the_name_of_an_image(root: Path) -> list[str]:
    write(root, ["x.jpg/1.jpg"], 20)
    (root / "bob" / "y.jpg").mkdir()
    return [*IMAGES, "x.jpg/1.jpg"]


def hidden(root: Path) -> list[str]:
    write(root, [".thumbnails/1.jpg", "anna/.3.jpg", "bob/.old/1.jpg"], 20)
    return IMAGES


def other_files(root: Path) -> list[str]:
    for name in ("notes.txt", "anna/Thumbs.db", "bob/jpg"):
        (root / name).touch()
    return IMAGES


@pytest.mark.parametrize(
    "add",
    [
        linked_folder, linked_file, folder_linked_twice, link_to_the_folder, link_to_a_parent, link_to_itself,
        broken_link, pipe, unix_socket, device, folder_with_the_name_of_an_image, hidden, other_files,
    ],
)  # fmt: skip
def test_every_reader_takes_the_same_images_in_the_same_order(tmp_path, add):
    root = write(tmp_path / "crops", IMAGES)
    expected = add(root)
    assert {name: read(root) for name, read in READERS.items()} == dict.fromkeys(READERS, expected)
    check = check_dataset(root, progress=False)
    assert check.counts["gallery"]["images"] == len(expected)
    unreadable = [finding for finding in check.findings if finding.kind == "unreadable"]
    assert [finding.files for finding in unreadable] == ([["bob/3.jpg"]] if add is broken_link else [])


@pytest.mark.parametrize("add", [link_to_the_folder, link_to_a_parent, link_to_itself])
def test_loops_in_an_unlabelled_folder_end(tmp_path, add):
    root = write(tmp_path / "crops", [*IMAGES, "anna/x/1.jpg"])
    add(root)
    expected = ["anna/1.jpg", "anna/2.jpg", "anna/x/1.jpg", *IMAGES[2:]]
    assert [by_embed(root), by_training(root), by_cluster(root)] == [expected] * 3


def test_a_link_to_a_parent_that_is_a_dataset_is_not_taken_for_the_dataset(tmp_path):
    names = ["query/0001_c1.jpg", "bounding_box_test/0001_c2.jpg", "others/anna/1.jpg", "others/bob/1.jpg"]
    root = write(tmp_path / "market", names) / "others"
    (root / "up").symlink_to(root.parent)
    assert open_dataset(root, labelled=False).name == "unlabelled folder"
    (root / "up").unlink()
    assert by_eval(root) == ["anna/1.jpg", "bob/1.jpg"]


def test_query_and_gallery_may_be_links_to_one_folder(tmp_path):
    root = write(tmp_path / "own", ["gallery/anna/1.jpg", "gallery/anna/2.jpg", "gallery/bob/1.jpg"])
    (root / "query").symlink_to("gallery")
    dataset = open_dataset(root)
    assert (len(dataset.query), len(dataset.gallery)) == (3, 3)
    assert dataset.own.tolist() == [0, 1, 2]
    assert dataset.matches.tolist() == [1, 1, 0]


def test_a_query_that_is_a_link_to_a_gallery_image_is_left_out_of_its_own_ranking(tmp_path):
    root = write(
        tmp_path / "own", ["gallery/anna/1.jpg", "gallery/anna/2.jpg", "gallery/bob/1.jpg", "query/anna/3.jpg"]
    )
    (root / "query" / "anna" / "1.jpg").symlink_to("../../gallery/anna/2.jpg")
    (root / "query" / "bob").mkdir()
    os.link(root / "gallery" / "bob" / "1.jpg", root / "query" / "bob" / "5.jpg")
    dataset = open_dataset(root)
    assert [path.name for path in dataset.query.paths] == ["1.jpg", "3.jpg", "5.jpg"]
    assert dataset.own.tolist() == [1, -1, 2]
    assert dataset.matches.tolist() == [1, 2, 0]
    (root / "query" / "anna" / "3.jpg").unlink()  # a link to an image of another identity takes no match away
    (root / "query" / "anna" / "3.jpg").symlink_to("../../gallery/bob/1.jpg")
    assert open_dataset(root).matches.tolist() == [1, 2, 0]


def test_a_split_that_is_a_broken_link_is_refused_and_a_person_named(tmp_path, caplog):
    root = write(tmp_path / "own", ["train/anna/1.jpg", "gallery/anna/1.jpg", "gallery/bob/1.jpg"])
    (root / "gallery" / "carl").symlink_to("/not/mounted/carl")
    assert open_dataset(root).gallery.num_ids == 2
    assert caplog.text.count("gallery/carl: a link that leads nowhere, left out") == 1
    for name in ("train.csv", "test_1.jpg"):  # files, of which git-annex leaves such links
        (root / name).symlink_to("/not/there")
    assert open_dataset(root).gallery.num_ids == 2
    (root / "query").symlink_to("/not/mounted/query")
    with pytest.raises(ValueError, match="own/query: a link to no folder that can be read; mount it, or remove"):
        open_dataset(root)


@pytest.mark.parametrize("folder", ["#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found"])
def test_deleted_files_of_a_storage_device_are_left_out(tmp_path, folder):
    root = write(tmp_path / "share", ["anna/1.jpg", "bob/1.jpg", f"{folder}/1.jpg", f"{folder}/anna/2.jpg"])
    assert [path.parent.name for path in find_images(root)] == ["anna", "bob"]
    assert open_dataset(root).gallery.num_ids == 2


def test_a_linked_folder_is_a_split_of_market1501(tmp_path):
    outside = write(tmp_path / "elsewhere", ["0001_c1.jpg", "0001_c2.jpg"])
    root = write(tmp_path / "market", ["query/0001_c3.jpg"])
    (root / "bounding_box_test").symlink_to(outside)
    (root / "query" / "folder.jpg").mkdir()
    os.mkfifo(root / "query" / "0009_c1.jpg")
    dataset = open_dataset(root)
    assert (dataset.name, len(dataset.query), len(dataset.gallery)) == ("Market-1501", 1, 2)


def test_names_are_sorted_as_paths_are_and_not_as_text(tmp_path):
    names = ["a-b/1.jpg", "a.jpg", "a/10.JPG", "a/2.jpeg", "ä ö/1.jpg", "z.jpg", "Ｆ.jpg", "😀.jpg"]
    root = write(tmp_path / "crops", names)
    expected = [path.relative_to(root).as_posix() for path in sorted(root / name for name in names)]
    assert [by_embed(root), by_training(root), by_cluster(root)] == [expected] * 3


# ----------------------------------------------------------------------------------------------------------- images


REASONS = {
    "empty": (b"", "the file is empty"),
    "truncated": (jpeg(0)[:-200], "image file is truncated"),
    "text": (b"this is no image", "no image that Pillow can identify"),
    "missing": (None, "no such file"),
    "many pixels": (
        large(10_001, 5_000),
        "an image of 10001x5000 pixels (width x height); the limit is 50,000,000 pixels (PASSREID_MAX_PIXELS)",
    ),
    "without pixels": (b"P6 0 4 255\n", "no image that Pillow can identify"),
}


def test_an_image_at_the_limit_of_pixels_is_opened_and_the_limit_can_be_raised(monkeypatch):
    assert open_image(large(10_000, 5_000)).size == (10_000, 5_000)
    monkeypatch.setenv("PASSREID_MAX_PIXELS", "50005000")
    assert open_image(large(10_001, 5_000)).size == (10_001, 5_000)
    monkeypatch.setenv("PASSREID_MAX_PIXELS", "99")
    with pytest.raises(ValueError, match=r"an image of 10x10 pixels .* the limit is 99 pixels"):
        open_image(Image.new("RGB", (10, 10)))
    monkeypatch.setenv("PASSREID_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="PASSREID_MAX_PIXELS must be a number of pixels, got 'many'"):
        open_image(large(1, 1))


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(10**11)  # sparse
    with pytest.raises(ValueError, match=r"a file of 100,000,000,000 bytes; the limit is 50,000,000 pixels"):
        open_image(tmp_path / "a.jpg")


def test_an_image_beyond_pillows_own_limit_is_refused_with_ours():
    with pytest.raises(Image.DecompressionBombError) as error:
        open_image(b"P6 100000 100000 255\n")
    expected = "an image of more pixels than Pillow opens; the limit is 50,000,000 pixels (PASSREID_MAX_PIXELS)"
    assert reason(error.value) == expected


@pytest.mark.parametrize("kind", REASONS)
def test_every_reader_gives_the_same_reason_for_an_image_that_cannot_be_read(tmp_path, embed, kind):
    content, why = REASONS[kind]
    root = write(tmp_path / "crops", IMAGES)
    bad = root / IMAGES[3]
    source, dataset = open_source(root), open_dataset(root)
    tar = tmp_path / "crops.tar"
    if content is None:
        bad.unlink()
    else:
        bad.write_bytes(content)
    with tarfile.open(tar, "w") as file:
        file.add(root, ".")
    errors: dict[int, str] = {}
    embed(dataset.gallery.paths, errors=errors)
    assert errors == {3: f"{bad}: {why}"}
    with pytest.raises(ImageError) as error:
        source.load(3)
    assert str(error.value) == f"{bad}: {why}"
    if content is not None:
        with pytest.raises(ImageError) as error:
            open_source(tar).load(3)
        assert str(error.value) == f"{tar}/{IMAGES[3]}: {why}"
    lines = [f"crops/{name},1,gallery" for name in IMAGES]
    (tmp_path / "own.csv").write_text("\n".join(["path,pid,split", *lines]))
    findings = check_dataset(tmp_path / "own.csv", progress=False).findings
    expected = f"error: 1 image cannot be read, {why}: crops/{IMAGES[3]}"
    assert [str(finding) for finding in findings if finding.kind == "unreadable"] == [expected]


def test_paths_contents_pil_images_arrays_and_tensors_of_one_image_open_alike(tmp_path):
    path = write(tmp_path, ["a.jpg"]) / "a.jpg"
    image = open_image(path)
    array = np.asarray(image)
    for item in (
        str(path),
        path.read_bytes(),
        Image.open(path),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
    ):
        assert open_image(item).tobytes() == image.tobytes()
    assert open_image(np.ascontiguousarray(array[..., ::-1]), bgr=True).tobytes() == image.tobytes()
    assert image.mode == "RGB"


@pytest.mark.parametrize("item", [Image.new("L", (0, 4)), np.zeros((4, 0, 3), np.uint8)])
def test_an_image_without_pixels_is_refused(item):
    with pytest.raises(ValueError, match="it has no pixels"):
        open_image(item)


def test_an_image_of_32_bit_integers_is_refused_and_how_pillow_opens_16_bits_is_not():
    image = Image.fromarray(np.full((2, 2), 200 * 257, np.int32))
    with pytest.raises(ValueError, match="32-bit integer image has no known range"):
        open_image(image)
    image.format = "PNG"  # as versions of Pillow open 16 bits
    assert np.array_equal(np.asarray(open_image(image)), np.full((2, 2, 3), 200))


def test_reasons_omit_counts_of_bytes_and_keep_other_details(tmp_path):
    assert reason(OSError("image file is truncated (17 bytes not processed)")) == "image file is truncated"
    assert reason(ValueError("got uint8 (8, 8, 4)")) == "got uint8 (8, 8, 4)"
    assert reason(PermissionError(13, "Permission denied", "a.jpg")) == "Permission denied"
    assert reason(MemoryError()) == "MemoryError"


def test_a_pipe_that_a_list_or_a_csv_file_names_is_an_unreadable_image_and_nobody_waits_for_it(tmp_path):
    root = write(tmp_path / "crops", ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"])
    os.mkfifo(root / "pipe.jpg")
    (tmp_path / "list.txt").write_text("crops/a/1.jpg\ncrops/pipe.jpg\n")
    with pytest.raises(ImageError, match=r"pipe\.jpg: not a regular file"):
        open_source(tmp_path / "list.txt").load(1)
    rows = [f"crops/{name},{name[0]},{split}" for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
            for split in ("query", "gallery")]  # fmt: skip
    file = write_csv(tmp_path / "crops.csv", ["path,pid,split", *rows, "crops/pipe.jpg,a,gallery"])
    errors = [f for f in check_dataset(file).findings if f.kind == "unreadable"]
    assert [(f.level, f.files) for f in errors] == [("error", ["crops/pipe.jpg"])]
    embed = Embedder(make_model(), "cpu")
    evaluation = evaluate_dataset(open_dataset(file), embed, cache=tmp_path / "cache")
    assert [reason.partition("pipe.jpg: ")[2] for reason in evaluation.unreadable] == ["not a regular file"]


@pytest.mark.parametrize("link", ["0000b", "9999"])
def test_a_link_to_a_folder_beside_it_leaves_the_images_to_the_real_one(tmp_path, link):
    root = write(tmp_path / "crops", ["0001/a.jpg", "0001/b.jpg", "0003/a.jpg", "0003/b.jpg"])
    (root / link).symlink_to("0003")
    assert by_embed(root) == by_training(root) == ["0001/a.jpg", "0001/b.jpg", "0003/a.jpg", "0003/b.jpg"]
    assert set(open_dataset(root).train.pids.tolist()) == {1, 3}


def test_a_link_into_a_hidden_folder_is_followed(tmp_path):
    root = write(tmp_path / "crops", ["0001/a.jpg", ".store/x/a.jpg"])
    (root / "0002").symlink_to(".store/x")
    assert by_embed(root) == ["0001/a.jpg", "0002/a.jpg"]


def test_a_folder_without_images_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no images \(\.jpg .*\.gif\) in .*, 1 other file$"):
        find_images(tmp_path)
    (tmp_path / "b.MP4").touch()
    with pytest.raises(FileNotFoundError, match="2 other files; videos are not read: cut the persons"):
        find_images(tmp_path)
