"""Cache of decoded images: the images of the source, shared by processes, within its limit."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, Resize

from passreid_models.data import image_cache
from passreid_models.data.image_cache import CachedSource, cache_bytes, cache_limit
from passreid_models.data.images import ImageError
from passreid_models.data.sources import FileSource, open_source

SIZE = (32, 16)
RESIZE = Resize(SIZE, InterpolationMode.BICUBIC)


@pytest.fixture
def source(tmp_path) -> FileSource:
    rng = np.random.default_rng(0)
    folder = tmp_path / "crops"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (50, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    return open_source(folder, tmp_path / "listings")


def pixels(image: Image.Image) -> bytes:
    assert image.size == SIZE[::-1]
    return image.tobytes()


def test_images_are_those_of_the_source_resized_and_their_files_are_read_once(source):
    cached = CachedSource(source, SIZE, RESIZE)
    expected = [pixels(RESIZE(source.load(i))) for i in range(3)]
    assert [pixels(cached.load(i)) for i in range(3)] == expected
    for i in range(3):
        Path(source.name(i)).unlink()
    assert [pixels(cached.load(i)) for i in (2, 0, 1)] == [expected[i] for i in (2, 0, 1)]
    assert (len(cached), cached.name(1), cached.fingerprint) == (4, source.name(1), source.fingerprint)


def test_an_unreadable_image_is_tried_again(source):
    cached = CachedSource(source, SIZE, RESIZE)
    with pytest.raises(ImageError, match=r"3\.png: no image"):
        cached.load(3)
    Image.new("RGB", (20, 50), (0, 0, 0)).save(source.name(3))  # black: its sum is not that of an image not loaded
    assert pixels(cached.load(3)) == bytes(32 * 16 * 3)
    Path(source.name(3)).unlink()
    assert pixels(cached.load(3)) == bytes(32 * 16 * 3)


def test_a_row_that_is_half_written_is_decoded_again(source):
    cached = CachedSource(source, SIZE, RESIZE)
    expected = pixels(cached.load(0))
    cached.pixels[0, 16:] = 0
    assert pixels(cached.load(0)) == expected
    assert cached.pixels[0].numpy().tobytes() == expected


def _load_all(cached: CachedSource) -> None:
    for i in range(3):
        cached.load(i)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_what_one_process_loads_the_others_have(source, start):
    cached = CachedSource(source, SIZE, RESIZE)
    worker = torch.multiprocessing.get_context(start).Process(target=_load_all, args=(cached,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    expected = [pixels(RESIZE(source.load(i))) for i in range(3)]
    for i in range(3):
        Path(source.name(i)).unlink()
    assert [pixels(cached.load(i)) for i in range(3)] == expected
    assert not multiprocessing.active_children()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_limit_is_a_quarter_of_the_free_memory_shared_by_the_processes(monkeypatch):
    monkeypatch.setattr(image_cache, "_number", lambda pattern, file: 4000)
    monkeypatch.setattr(image_cache, "_container_memory", lambda: 1 << 62)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 62))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cache_limit() == 4000 * 1024 // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cache_limit() == 4000 * 1024 // 8
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=80_000))
    assert cache_limit() == 10_000
    monkeypatch.setattr(image_cache, "_container_memory", lambda: 8000)
    assert cache_limit() == 1000
    monkeypatch.setattr(image_cache, "_container_memory", lambda: -8)
    assert cache_limit() == 0
    assert cache_bytes(10, (256, 128)) == 10 * 256 * 128 * 3


def test_without_proc_nothing_is_cached(monkeypatch):
    monkeypatch.setattr(image_cache, "SHARED_MEMORY", Path("/no/such/folder"))
    assert cache_limit() == 0


@pytest.mark.parametrize(
    ("limit", "stat", "names"),
    [
        ("memory.max", "memory.stat", ("anon", "shmem")),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", ("total_rss", "total_shmem")),
    ],
)
def test_the_limit_of_a_container_or_job_counts_less_what_cannot_be_freed(tmp_path, limit, stat, names):
    groups = tmp_path / "groups"
    assert image_cache._container_memory(tmp_path, groups) == 1 << 62
    write(tmp_path / limit, "1000\n")
    write(tmp_path / stat, f"cache 900\n{names[0]} 100\nfile 700\n{names[1]} 50\n")
    assert image_cache._container_memory(tmp_path, groups) == 850
    job, is_second = Path(limit).parent / "slurm/job_7/step", limit == "memory.max"
    write(groups, "0::/slurm/job_7/step\n" if is_second else "9:cpu,cpuacct:/\n4:memory,hugetlb:/slurm/job_7/step\n")
    assert image_cache._container_memory(tmp_path, groups) == 850
    for folder, size in ((job.parent, "500"), (job, "700")):  # limits of the job and of its step
        write(tmp_path / folder / Path(limit).name, size)
        write(tmp_path / folder / "memory.stat", f"{names[0]} 20\n{names[1]} 10\n")
    assert image_cache._container_memory(tmp_path, groups) == 470
    if is_second:
        for folder in (Path(), job.parent, job):
            write(tmp_path / folder / "memory.max", "max\n")
        assert image_cache._container_memory(tmp_path, groups) == 1 << 62
