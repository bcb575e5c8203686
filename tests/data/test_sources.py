"""Sources of pre-training images: names, order, cached listings, and errors."""

import io
import os
import pickle
import random
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from passreid_models.data.images import SUFFIXES, ImageError, find_images
from passreid_models.data.sources import Source, open_source
from passreid_models.synthetic import SyntheticPersons

NAMES = ["a-b/1.jpg", "a.jpg", "a/10.JPG", "a/2.jpeg", "a/b/c/1.jpg", "ä ö/1.jpg", "z.jpg"]  # not as Path sorts them
JPEGS: list[bytes] = []
for person, _, _ in SyntheticPersons(len(NAMES), 1, 1, size=(64, 32)):  # type: ignore[attr-defined]
    file = io.BytesIO()
    person.save(file, "JPEG")
    JPEGS.append(file.getvalue())


def write(root: Path, names: list[str] = NAMES, settled: bool = True) -> Path:
    """Images below ``root``, as if they had been there for an hour."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEGS[NAMES.index(name) if name in NAMES else 0])
    if settled:
        settle(root)
    return root


def settle(root: Path, seconds: float = 3600) -> None:
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            status = path.stat()
            os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))


def pack(tar: Path, members: dict[str, bytes]) -> Path:
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    settle(tar.parent)
    return tar


def relative(source: Source, root: Path) -> list[str]:
    return [Path(source.name(i)).relative_to(root).as_posix() for i in range(len(source))]


def pixels(source: Source) -> list[bytes]:
    return [source.load(i).tobytes() for i in range(len(source))]


def listings(cache: Path) -> list[Path]:
    return sorted((cache / "listings").glob("*.npz")) if cache.exists() else []


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_its_images_in_the_order_of_find_images(tmp_path):
    root = write(tmp_path / "crops")
    (root / "notes.md").touch()
    for hidden in (".hidden.jpg", ".thumbnails/1.jpg", "a/._2.jpg", "a/@eaDir/2.jpg/THUMB.jpg", "__MACOSX/1.jpg"):
        write(root, [hidden])
    source = open_source(root)
    paths = find_images(root)
    assert [source.name(i) for i in range(len(source))] == [str(path) for path in paths]
    assert pixels(source) == [Image.open(path).convert("RGB").tobytes() for path in paths]
    assert source.description == "crops/: 7 images"


def test_the_order_and_the_fingerprint_are_those_of_the_names_and_not_of_the_file_system(tmp_path, monkeypatch):
    source = open_source(write(tmp_path / "1" / "crops"))
    shuffled = list(NAMES)
    random.Random(0).shuffle(shuffled)
    write(tmp_path / "2" / "other", shuffled)
    scandir = os.scandir

    @contextmanager
    def reversed_scandir(folder: bytes) -> Iterator[Any]:
        with scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", reversed_scandir)
    other = open_source(tmp_path / "2" / "other")
    assert relative(other, tmp_path / "2" / "other") == relative(source, tmp_path / "1" / "crops")
    assert other.fingerprint == source.fingerprint


def test_the_fingerprint_changes_with_a_name_their_number_and_where_one_ends(tmp_path):
    lists = (["a.jpg", "b.jpg"], ["a.jpg", "c.jpg"], ["a.jpg"], ["a.jpgb.jpg"], ["a.jpgb", ".jpg"])
    fingerprints = set()
    for i, names in enumerate(lists):
        (tmp_path / f"{i}.txt").write_text("\n".join(names))
        fingerprints.add(open_source(tmp_path / f"{i}.txt").fingerprint)
    assert len(fingerprints) == len(lists)


def test_links_are_followed_and_loops_end(tmp_path):
    outside = write(tmp_path / "outside", ["z.jpg"])
    root = write(tmp_path / "crops", ["a.jpg"])
    (root / "file.jpg").symlink_to(outside / "z.jpg")
    (root / "folder").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    for i in range(12):  # each with a link to each of the others: 12! paths
        (root / "net" / str(i)).mkdir(parents=True)
        for j in range(12):
            (root / "net" / str(i) / f"to_{j}").symlink_to(root / "net" / str(j))
    source = open_source(root)
    assert relative(source, root) == ["a.jpg", "file.jpg", "folder/z.jpg", "itself.jpg"]
    assert source.load(1).tobytes() == source.load(2).tobytes()
    with pytest.raises(ImageError, match=r"itself\.jpg: Too many levels of symbolic links"):
        source.load(3)


def test_a_pipe_with_the_name_of_an_image_does_not_stop_the_reader(tmp_path):
    root = write(tmp_path / "crops", ["a.jpg"])
    os.mkfifo(root / "pipe.jpg")
    assert relative(open_source(root), root) == ["a.jpg"]


# ------------------------------------------------------------------------------------------------------------ cache


def add_unseen(root: Path, name: str) -> None:
    """Add a file but keep the times of its folder, so that only a new listing shows it."""
    folder = (root / name).parent
    times = folder.stat()
    write(root, [name], settled=False)
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_listing_is_kept_and_folders_are_not_read_again(tmp_path, cache):
    root = write(tmp_path / "crops")
    first = open_source(root)
    assert len(listings(cache)) == 1
    add_unseen(root, "a/b/new.jpg")
    second = open_source(os.path.relpath(root))
    assert (relative(second, root), second.fingerprint) == (relative(first, root), first.fingerprint)
    assert pixels(second) == pixels(first)
    assert len(listings(cache)) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "another format", "another folder's"])
def test_a_damaged_listing_is_replaced(tmp_path, cache, damage):
    root = write(tmp_path / "crops")
    open_source(root)
    (file,) = listings(cache)
    whole = file.read_bytes()
    add_unseen(root, "new.jpg")
    if damage == "another format":
        np.savez(file, names=np.zeros((2, 2)))
    elif damage == "another folder's":
        open_source(write(tmp_path / "other", ["z.jpg"]))
        next(path for path in listings(cache) if path != file).replace(file)
    else:
        middle = whole.index(b"a.jpg")
        flipped = whole[:middle] + b"x" + whole[middle + 1 :]
        file.write_bytes({"cut": whole[:-30], "flipped": flipped, "text": b"listing", "empty": b""}[damage])
    assert len(open_source(root)) == len(NAMES) + 1
    assert len(open_source(root)) == len(NAMES) + 1
    assert file.read_bytes()[:2] == b"PK"


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write(root, ["a/b/c/2.jpg"], settled=False),
        lambda root: write(root, ["new/1.jpg"], settled=False),
        lambda root: (root / "a/b/c/1.jpg").unlink(),
        lambda root: (root / "a/2.jpeg").rename(root / "a/3.jpeg"),
        lambda root: (root / "a/b").rename(root / "b"),
    ],
    ids=["a file more", "a folder more", "a file less", "a new name", "a folder moved"],
)
def test_a_change_anywhere_in_the_tree_is_seen(tmp_path, change):
    root = write(tmp_path / "crops")
    before = open_source(root)
    change(root)
    after = open_source(root)
    assert [after.name(i) for i in range(len(after))] == [str(path) for path in find_images(root)]
    assert after.fingerprint != before.fingerprint


def test_a_tree_that_changed_just_now_is_not_kept_since_its_clock_may_be_coarse(tmp_path, cache):
    root = write(tmp_path / "crops", settled=False)
    open_source(root)
    assert listings(cache) == []
    add_unseen(root, "a/new.jpg")  # in the same tick of the clock
    assert len(open_source(root)) == len(NAMES) + 1


def test_a_cache_that_cannot_be_written_to_is_no_error(tmp_path):
    root = write(tmp_path / "crops")
    (tmp_path / "file").touch()
    for _ in range(2):
        assert len(open_source(root, cache=tmp_path / "file")) == len(NAMES)


# ------------------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_takes_absolute_paths_and_those_below_its_folder_in_their_order(tmp_path, monkeypatch, end):
    root = write(tmp_path / "crops")
    outside = write(tmp_path / "outside", ["z.jpg"]) / "z.jpg"
    lines = ["# LUP, half of it", "z.jpg", "", f"  {outside} ", "ä ö/1.jpg", "z.jpg", "missing.jpg"]
    (root / "half.lst").write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    monkeypatch.chdir(tmp_path / "outside")
    source = open_source("../crops/half.lst")
    paths = [root / "z.jpg", outside, root / "ä ö/1.jpg", root / "z.jpg", root / "missing.jpg"]
    assert [source.name(i) for i in range(len(source))] == list(map(str, paths))
    assert source.load(2).tobytes() == Image.open(root / "ä ö/1.jpg").tobytes()
    assert source.description == "half.lst: 5 images"
    with pytest.raises(ImageError, match=r"crops/missing\.jpg: no such file"):
        source.load(4)


def test_images_are_known_among_other_files_by_their_paths_and_behind_links(tmp_path, monkeypatch):
    root = write(tmp_path / "crops")
    others = [root / name for name in NAMES[:3]] + [tmp_path / "not_there.jpg"]
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    assert open_source(root).shared(others) == open_source("link").shared(others) == 3
    assert open_source(root).shared([f"link/{NAMES[0]}", "crops/other.jpg"]) == 1
    (tmp_path / "some.txt").write_text(f"{root / NAMES[0]}\n./crops/{NAMES[1]}\ncrops/{NAMES[2]}\ncrops/{NAMES[3]}\n")
    assert open_source("some.txt").shared(others) == 3
    assert open_source(root).shared([]) == 0


# -------------------------------------------------------------------------------------------------------- tar files


def test_a_tar_file_equals_its_folder_pixel_by_pixel(tmp_path):
    root = write(tmp_path / "crops")
    members = dict(reversed([(name, (root / name).read_bytes()) for name in NAMES]))
    tar = pack(
        tmp_path / "crops.tar", {f"./{k}": v for k, v in members.items()} | {"./a/._2.jpg": b"", "./README": b""}
    )
    folder, source = open_source(root), open_source(tar)
    assert relative(source, tar) == relative(folder, root)
    assert pixels(source) == pixels(folder)
    assert source.fingerprint == folder.fingerprint
    assert source.description == "crops.tar: 7 images"


def as_bytes(members: dict[str, bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder) / "inner.tar", members).read_bytes()


LONG = "long/" * 60 + "1.jpg"  # needs a header of its own
TARS: dict[str, Callable[[Path], Path]] = {
    "flat": lambda root: pack(root / "x.tar", {"1.jpg": JPEGS[1], "2.jpg": JPEGS[2]}),
    "folders": lambda root: pack(root / "x.tar", {"b/1.jpg": JPEGS[1], LONG: JPEGS[2], "ä.jpg": JPEGS[3]}),
    "tars in a tar": lambda root: pack(
        root / "x.tar", {f"{i}.tar": as_bytes({f"{i}.jpg": JPEGS[i]}) for i in range(3)}
    ),
    "shards": lambda root: [pack(root / f"{i}.tar", {f"{i}.jpg": JPEGS[i]}) for i in range(3)].pop().parent,
}


@pytest.mark.parametrize("kind", TARS)
def test_tar_files_give_what_timms_reader_gives(tmp_path, kind):
    root = TARS[kind](tmp_path / "data")
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar  # slow, and spawned workers need it not

    reader, source = ReaderImageInTar(str(root), cache_tarinfo=False), open_source(root)
    theirs = {reader.filename(i): Image.open(reader[i][0]).tobytes() for i in range(len(reader))}
    ours = dict(zip(relative(source, root), pixels(source), strict=True))
    assert len(ours) == len(theirs)
    for name, image in theirs.items():
        (match,) = [n for n in ours if n == name or n.endswith(f".tar/{name}")]
        assert ours[match] == image


def test_tars_are_found_at_any_depth(tmp_path):
    inner = as_bytes({"0.jpg": JPEGS[0], "c.tar": as_bytes({"1.jpg": JPEGS[1], "2.jpg": JPEGS[2]})})
    tar = pack(tmp_path / "data" / "a.tar", {"3.jpg": JPEGS[3], "b.tar": inner})
    source = open_source(tar)
    assert relative(source, tar) == ["3.jpg", "b.tar/0.jpg", "b.tar/c.tar/1.jpg", "b.tar/c.tar/2.jpg"]
    assert pixels(source) == [Image.open(io.BytesIO(JPEGS[i])).tobytes() for i in (3, 0, 1, 2)]


def test_shards_are_sorted_named_by_their_tar_and_give_way_to_images(tmp_path):
    root = tmp_path / "shards"
    for shard in ("b/2", "b/10", "a"):
        pack(root / f"{shard}.tar", {"same.jpg": JPEGS[len(shard)], "label.txt": b"7"})
    settle(root)
    source = open_source(root)
    assert relative(source, root) == ["a.tar/same.jpg", "b/10.tar/same.jpg", "b/2.tar/same.jpg"]
    expected = [Image.open(io.BytesIO(JPEGS[i])).tobytes() for i in (1, 4, 3)]
    assert pixels(source) == expected
    assert source.description == "shards/*.tar: 3 images"
    assert pixels(open_source(root)) == expected  # from the cache
    write(root, ["z.jpg"])
    assert relative(open_source(root), root) == ["z.jpg"]


def test_of_members_with_one_name_the_last_counts(tmp_path):
    tar = pack(tmp_path / "data" / "x.tar", {"1.jpg": JPEGS[1]})
    with tarfile.open(tar, "a") as file:
        member = tarfile.TarInfo("1.jpg")
        member.size = len(JPEGS[2])
        file.addfile(member, io.BytesIO(JPEGS[2]))
    assert pixels(open_source(tar)) == [Image.open(io.BytesIO(JPEGS[2])).tobytes()]


def pack_links(tar: Path, links: list[tuple[bytes, str, str]], files: dict[str, bytes]) -> Path:
    """A tar of files, then links: type, name and target."""
    pack(tar, files)
    with tarfile.open(tar, "a") as file:
        for kind, name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)
    settle(tar.parent)
    return tar


def test_a_tar_file_with_hard_and_symbolic_links_equals_its_folder(tmp_path):
    root = write(tmp_path / "crops", ["a.jpg", "b/1.jpg", ".store/9"])
    os.link(root / "a.jpg", root / "b/hard.jpg")
    for name, target in {"0.jpg": "b/hard.jpg", "b/up.jpg": "../a.jpg", "c.jpg": "0.jpg", "d.jpg": ".store/9",
                         "notes.txt": "a.jpg", "self.jpg": "self.jpg"}.items():  # fmt: skip
        (root / name).symlink_to(target)
    with tarfile.open(tmp_path / "crops.tar", "w") as file:
        file.add(root, ".")
    folder, source = open_source(root), open_source(tmp_path / "crops.tar")
    assert relative(source, tmp_path / "crops.tar") == relative(folder, root)
    assert len(source) == 8
    assert source.fingerprint == folder.fingerprint
    for i in range(7):
        assert source.load(i).tobytes() == folder.load(i).tobytes()
    with pytest.raises(ImageError, match=r"crops\.tar/self\.jpg: a link that leads to no file in the tar \(tar -h"):
        source.load(7)


def test_links_in_a_tar_lead_to_files_of_that_tar_alone(tmp_path):
    outside = write(tmp_path / "outside", ["a.jpg"]) / "a.jpg"
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    out = [(soft, "0.jpg", str(outside)), (soft, "1.jpg", "../outside/a.jpg"), (hard, "2.jpg", str(outside)),
           (soft, "3.jpg", "4.jpg"), (soft, "4.jpg", "3.jpg"), (soft, "5.jpg", "/a.jpg")]  # fmt: skip
    inner = pack_links(tmp_path / "1" / "x.tar", [*out, (soft, "6.jpg", "../a.jpg")], {"z.jpg": JPEGS[1]}).read_bytes()
    tar = pack_links(tmp_path / "2" / "y.tar", [(hard, "h.jpg", "a.jpg")], {"a.jpg": JPEGS[0], "inner.tar": inner})
    source = open_source(tar)
    assert relative(source, tar) == ["a.jpg", "h.jpg", *(f"inner.tar/{i}.jpg" for i in range(7)), "inner.tar/z.jpg"]
    assert source.load(1).tobytes() == source.load(0).tobytes()
    for i in range(2, 9):
        with pytest.raises(ImageError, match="a link that leads to no file in the tar"):
            source.load(i)


def test_a_hard_link_in_a_tar_keeps_the_file_before_it_and_a_symbolic_one_takes_the_last(tmp_path):
    tar = pack_links(
        tmp_path / "data" / "x.tar",
        [(tarfile.LNKTYPE, "hard.jpg", "a.jpg"), (tarfile.SYMTYPE, "soft.jpg", "a.jpg"),
         (tarfile.LNKTYPE, "a.jpg", "b.jpg")],
        {"a.jpg": JPEGS[1], "b.jpg": JPEGS[2]},
    )  # fmt: skip
    source = open_source(tar)
    images = dict(zip(relative(source, tar), pixels(source), strict=True))
    old, new = (Image.open(io.BytesIO(JPEGS[i])).tobytes() for i in (1, 2))
    assert images == {"a.jpg": new, "b.jpg": new, "hard.jpg": old, "soft.jpg": new}


def test_folders_that_a_system_adds_are_left_out_of_a_tar_as_well(tmp_path):
    names = ("a/1.jpg", "a/@eaDir/1.jpg/THUMB.jpg", "__MACOSX/a/1.jpg", "__MACOSX/x.tar")
    tar = pack(tmp_path / "data" / "x.tar", dict.fromkeys(names, JPEGS[1]))
    assert relative(open_source(tar), tar) == ["a/1.jpg"]


@pytest.mark.parametrize("folder", ["../crops", "home/.cache/crops"])
def test_what_all_files_of_a_tar_lie_in_is_not_hidden(tmp_path, folder):
    names = (f"{folder}/1.jpg", f"{folder}/.2.jpg", f"{folder}/a/3.jpg", f"{folder}/.b/4.jpg")
    tar = pack(tmp_path / "x.tar", dict.fromkeys(names, JPEGS[1]))
    assert relative(open_source(tar), tar) == [names[0], names[2]]


def test_a_listing_with_a_link_that_leads_nowhere_yet_is_not_kept(tmp_path, cache):
    root = write(tmp_path / "crops", ["1.jpg"])
    (root / "mounted").symlink_to(tmp_path / "disk")
    settle(root)
    assert relative(open_source(root), root) == ["1.jpg"]
    write(tmp_path / "disk", ["2.jpg"])
    assert relative(open_source(root), root) == ["1.jpg", "mounted/2.jpg"]


def test_a_link_to_a_folder_that_is_left_out_is_followed(tmp_path):
    root = write(tmp_path / "crops", ["1.jpg", "@eaDir/2.jpg"])
    (root / "link").symlink_to(root / "@eaDir")
    assert relative(open_source(root), root) == ["1.jpg", "link/2.jpg"]


def test_a_listing_of_a_folder_without_times_is_not_kept(tmp_path, cache):
    root = write(tmp_path / "crops")
    os.utime(root, (0, 0))  # as the root of a FAT file system has
    open_source(root)
    (root / "new.jpg").write_bytes(JPEGS[1])
    os.utime(root, (0, 0))
    assert "new.jpg" in relative(open_source(root), root)
    assert listings(cache) == []


def test_images_of_all_suffixes_are_read(tmp_path):
    root = tmp_path / "crops"
    root.mkdir()
    names = [f"1{suffix}" for suffix in SUFFIXES] + ["2.JFIF"]
    for name in names:
        (root / name).write_bytes(JPEGS[1])
    source = open_source(root)
    assert sorted(relative(source, root)) == sorted(names)
    assert all(source.load(i).size == source.load(0).size for i in range(len(source)))


def test_a_listing_of_tars_without_times_is_kept(tmp_path, cache):
    tar = pack(tmp_path / "x.tar", {"1.jpg": JPEGS[1]})
    os.utime(tar, (0, 0))  # as reproducible builds write them
    open_source(tar)
    assert len(listings(cache)) == 1


def test_a_listing_of_another_format_is_not_read(tmp_path, cache, monkeypatch):
    root = write(tmp_path / "crops")
    open_source(root)
    add_unseen(root, "a/b/new.jpg")
    monkeypatch.setattr("passreid_models.data.listing.FORMAT", 99)
    assert "a/b/new.jpg" in relative(open_source(root), root)
    assert len(listings(cache)) == 2


def test_the_index_of_a_tar_file_is_kept_until_the_file_changes(tmp_path, cache):
    tar = pack(tmp_path / "data" / "x.tar", {"1.jpg": JPEGS[1]})
    open_source(tar)
    assert len(listings(cache)) == 1
    times, damaged = tar.stat(), bytearray(tar.read_bytes())
    damaged[:5] = b"2.jpg"
    tar.write_bytes(damaged)  # a header that cannot be read any more
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert relative(open_source(tar), tar) == ["1.jpg"]
    pack(tar, {"3.jpg": JPEGS[3]})
    assert relative(open_source(tar), tar) == ["3.jpg"]
    times = tar.stat()
    pack(tar, {f"{i:02d}.jpg": JPEGS[4] for i in range(20)})
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times does it
    assert len(open_source(tar)) == 20
    assert sorted(path.name for path in tar.parent.iterdir()) == ["x.tar"]  # nothing beside the data


# -------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_persons_are_those_of_the_generator():
    source = open_source("synthetic:ids=3, images=4,cameras=2,seed=5,size=64x32")
    persons = SyntheticPersons(3, 4, 2, seed=5, size=(64, 32))
    assert pixels(source) == [persons[i][0].tobytes() for i in range(12)]
    assert source.description == "synthetic:ids=3,images=4,cameras=2,seed=5,size=64x32,place=street: 12 images"
    assert source.name(7) == "image 7 of synthetic:ids=3,images=4,cameras=2,seed=5,size=64x32,place=street"


def test_every_key_of_synthetic_can_be_left_out_and_counts_in_the_fingerprint():
    default = open_source("synthetic:")
    assert len(default) == 10_000
    assert default.load(0).size == (128, 256)
    assert open_source("synthetic:size=0256x128,ids=1000").fingerprint == default.fingerprint
    keys = ("ids=9", "images=9", "cameras=9", "seed=9", "size=64x32", "place=studio")
    assert len({open_source(f"synthetic:{key}").fingerprint for key in keys} | {default.fingerprint}) == 7


def test_the_place_of_synthetic_is_that_of_the_generator():
    source = open_source("synthetic:ids=1,images=2,size=64x32,place=studio")
    persons = SyntheticPersons(1, 2, 8, size=(64, 32), place="studio")
    assert pixels(source) == [persons[i][0].tobytes() for i in range(2)]


# ------------------------------------------------------------------------------------------------- reading, errors


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    return file.getvalue()


BAD = {
    "truncated": (JPEGS[0][:-100], "image file is truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"this is not an image", "no image that Pillow can identify"),
    "bomb": (bomb(), "more pixels than Pillow opens"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_image_that_cannot_be_decoded_is_an_error_with_its_name_and_the_reason(tmp_path, kind):
    data, reason = BAD[kind]
    root = write(tmp_path / "crops", ["a.jpg"])
    (root / "bad.jpg").write_bytes(data)
    tar = pack(tmp_path / "tar" / "x.tar", {"a.jpg": JPEGS[0], "bad.jpg": data})
    for source, path in ((open_source(root), root / "bad.jpg"), (open_source(tar), tar / "bad.jpg")):
        with pytest.raises(ImageError, match=reason) as error:
            source.load(1)
        assert str(error.value).startswith(f"{path}: ")
        assert str(error.value).count("bad.jpg") == 1
        assert source.load(0).size == (32, 64)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as another user than root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_files_that_cannot_be_opened_are_errors_with_their_names_and_the_reason(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # those of pytest are closed to others
        root = write(Path(folder) / "crops", ["a.jpg", "b.jpg", "c.jpg", "folder.jpg/1.png", "z.jpg"])
        root.parent.chmod(0o755)
        (root / "all.txt").write_text("a.jpg\nfolder.jpg\nb.jpg\nz.jpg/a.jpg")
        files, listed = open_source(root), open_source(root / "all.txt")
        (root / "a.jpg").chmod(0)
        (root / "c.jpg").unlink()
        with as_nobody(), pytest.raises(ImageError, match=r"/crops/a\.jpg: Permission denied$"):
            files.load(0)
        with pytest.raises(ImageError, match=r"/crops/c\.jpg: no such file$"):
            files.load(2)
        with pytest.raises(ImageError, match=r"/crops/folder\.jpg: Is a directory$"):
            listed.load(1)
        with pytest.raises(ImageError, match=r"/crops/z\.jpg/a\.jpg: Not a directory$"):
            listed.load(3)
        assert files.load(1).tobytes() == listed.load(2).tobytes()
        (root / "folder.jpg").chmod(0)
        with as_nobody(), pytest.raises(ValueError, match=r"/crops/folder\.jpg cannot be read: Permission denied$"):
            open_source(root)


def test_images_of_all_modes_are_rgb_and_upright(tmp_path):
    rng = np.random.default_rng(0)
    gray = Image.fromarray(rng.integers(0, 256, (8, 4), dtype=np.uint8))
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it to the right
    gray.save(tmp_path / "0.png")
    deep.save(tmp_path / "1.png")
    gray.convert("P").save(tmp_path / "2.png")
    gray.convert("RGBA").save(tmp_path / "3.png")
    gray.convert("RGB").save(tmp_path / "4.png", exif=exif)
    gray.convert("RGB").save(tmp_path / "5.tif", exif=exif)
    Image.new("CMYK", (4, 8), (0, 255, 0, 0)).save(tmp_path / "6.tif")
    source = open_source(tmp_path)
    images = [source.load(i) for i in range(len(source))]
    assert [image.mode for image in images] == ["RGB"] * 7
    for image in images[:4]:
        assert np.array_equal(np.asarray(image), np.asarray(gray.convert("RGB")))
    for image in images[4:6]:
        assert np.array_equal(np.asarray(image), np.rot90(np.asarray(gray.convert("RGB")), -1))
    assert images[6].getpixel((0, 0)) == (255, 0, 255)


def test_an_index_out_of_range_is_an_error_and_no_other_image(tmp_path):
    source = open_source(write(tmp_path / "crops"))
    for index in (-1, len(NAMES)):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 7 names"):
            source.load(index)


def gzipped(root: Path) -> Path:
    with tarfile.open(root / "x.tar", "w:gz") as file:
        file.add(write(root / "crops"), "crops")
    return root / "x.tar"


def damaged(root: Path) -> Path:
    tar = pack(root / "x.tar", {f"{i}.jpg": data for i, data in enumerate(JPEGS)})
    data = bytearray(tar.read_bytes())
    at = data.index(b"3.jpg")
    data[at : at + 300] = b"?" * 300
    tar.write_bytes(data)
    return tar


def cut(root: Path) -> Path:
    tar = pack(root / "x.tar", {f"{i}.jpg": data for i, data in enumerate(JPEGS)})
    tar.write_bytes(tar.read_bytes()[:1000])  # in the middle of the first image
    return tar


def joined(root: Path) -> Path:
    tar = pack(root / "x.tar", {"1.jpg": JPEGS[1]})
    tar.write_bytes(tar.read_bytes() + pack(root / "y.tar", {"2.jpg": JPEGS[2]}).read_bytes())
    return tar


def made(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


WRONG: dict[str, tuple[Callable[[Path], Path | str], type[Exception], str]] = {
    "nothing there": (
        lambda root: root / "cropz",
        FileNotFoundError,
        "{data}: no such file or folder; expected a folder of images, a list of paths (.txt or .lst), a .tar file",
    ),
    "no images": (
        lambda root: made(root / "a.md", "").parent,
        FileNotFoundError,
        "no images ({suffixes}) and no .tar file in {data}, 1 other files",
    ),
    "a kind of file": (
        lambda root: made(root / "data.h5", ""),
        ValueError,
        "{data}: images cannot come from this kind of file; expected a folder of images",
    ),
    "an empty list": (
        lambda root: made(root / "all.txt", "# nothing yet\n\n"),
        FileNotFoundError,
        "{data}: the list is empty; expected one image path per line, absolute or relative to ",
    ),
    "a list in UTF-16": (
        lambda root: made(root / "all.txt", "a.jpg\n".encode("utf-16")),
        ValueError,
        "{data}: a list of images is text in UTF-8, this is UTF-16",
    ),
    "an empty tar": (
        lambda root: pack(root / "x.tar", {}),
        FileNotFoundError,
        "no images ({suffixes}) in {data}, 0 other files",
    ),
    "a tar without images": (
        lambda root: pack(root / "x.tar", {"1.txt": b"", "2.txt": b""}),
        FileNotFoundError,
        "in {data}, 2 other files",
    ),
    "shards without images": (
        lambda root: pack(root / "x.tar", {"1.txt": b""}).parent,
        FileNotFoundError,
        "in the 1 tar files of {data}, 1 other files",
    ),
    "a tar of no bytes": (
        lambda root: made(root / "x.tar", b""),
        ValueError,
        "{data} cannot be read as an uncompressed tar file: empty file",
    ),
    "a compressed tar": (gzipped, ValueError, "{data} cannot be read as an uncompressed tar file: "),
    "a damaged tar": (damaged, ValueError, "{data} cannot be read as an uncompressed tar file: no header at byte "),
    "joined tars": (joined, ValueError, "it is damaged, or several tars were joined, which have to be"),
    "a tar cut short": (cut, ValueError, "{data} cannot be read as an uncompressed tar file: unexpected end of data"),
    "an unknown key": (
        lambda root: "synthetic:ids=3,people=3",
        ValueError,
        "{data}: unknown key 'people'; known: ids, images, cameras, seed, size, place",
    ),
    "a key twice": (lambda root: "synthetic:ids=3,ids=4", ValueError, "{data}: ids is given twice"),
    "no value": (lambda root: "synthetic:ids", ValueError, "{data}: ids is given as ''; expected such as ids=1000"),
    "no number": (
        lambda root: "synthetic:seed=-1",
        ValueError,
        "{data}: seed is given as '-1'; expected such as seed=0",
    ),
    "one length": (
        lambda root: "synthetic:size=64",
        ValueError,
        "{data}: size is given as '64'; expected such as size=",
    ),
    "too small": (lambda root: "synthetic:size=8x4", ValueError, "{data}: size must be (height, width) of at least 16"),
    "nowhere": (
        lambda root: "synthetic:place=moon",
        ValueError,
        "{data}: place must be one of street, studio, summer, got 'moon'",
    ),
    "none": (lambda root: "synthetic:ids=0", ValueError, "{data}: num_ids must be an integer of at least 1, got 0"),
    "far too many": (
        lambda root: f"synthetic:ids={10**20}",
        ValueError,
        "num_ids x images_per_id must be less than 2^",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_data_that_are_not_a_source_are_refused_with_what_was_expected(tmp_path, case):
    make, kind, message = WRONG[case]
    (tmp_path / "in").mkdir()
    data = make(tmp_path / "in")
    with pytest.raises(kind) as error:
        open_source(data)
    assert message.format(data=data, suffixes=" ".join(SUFFIXES)) in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- processes, memory


class Pixels(Dataset):
    """All images of some sources, as bytes."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self.keys = [(s, i) for s, source in enumerate(sources) for i in range(len(source))]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, key: int) -> bytes:
        source, i = self.keys[key]
        return self.sources[source].load(i).tobytes()


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    root = write(tmp_path / "crops")
    (root / "all.txt").write_text("\n".join(NAMES * 20))
    tar = pack(tmp_path / "crops.tar", {f"{i:03d}.jpg": JPEGS[i % len(JPEGS)] for i in range(200)})
    specs = (root, root / "all.txt", tar, "synthetic:ids=2,images=3,size=64x32")
    return [open_source(spec) for spec in specs]


def test_sources_pickle_and_are_the_same_again(sources):
    for source in sources:
        again = pickle.loads(pickle.dumps(source))
        assert (again.description, again.fingerprint, len(again)) == (
            source.description,
            source.fingerprint,
            len(source),
        )
        assert again.name(3) == source.name(3)
        assert pixels(again) == pixels(source)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])  # a spawned one imports torch for seconds
def test_workers_read_the_same_as_the_parent_that_has_read_before_them(sources, start, workers):
    dataset = Pixels(sources)
    expected = [dataset[i] for i in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=start)
    assert list(loader) == expected


def test_a_listing_takes_its_letters_and_eight_bytes_a_name(tmp_path):
    root = tmp_path / "crops"
    root.mkdir()
    (tmp_path / "empty").touch()
    for pid in range(200):
        (root / f"{pid:04d}").mkdir()
        for i in range(100):
            os.link(tmp_path / "empty", root / f"{pid:04d}" / f"{pid:04d}_c1s1_{i:06d}_00.jpg")
        os.utime(root / f"{pid:04d}", (1e9, 1e9))
    os.utime(root, (1e9, 1e9))
    letters = len("0000/0000_c1s1_000000_00.jpg")
    for _ in range(2):  # the first that is read from the cache imports what reads it
        open_source(root)
    tracemalloc.start()
    source = open_source(root)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(source) == 20_000
    assert len(pickle.dumps(source)) / 20_000 < letters + 8.1
    assert held / 20_000 < letters + 10
