"""The order of the data: views are a function of (seed, epoch, index), a step's images of (seed, step) alone."""

import multiprocessing
import os
import random
import signal
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from passreid_models.data.images import ImageError
from passreid_models.data.sources import open_source
from passreid_models.pretrain.batches import StepSampler, ViewBatch, ViewDataset, batches_on, make_loader
from passreid_models.pretrain.views import MultiCrop, Views

FINE = MultiCrop(size=(32, 16), local_size=(16, 8), locals_per_area=1)
COARSE = MultiCrop(size=(16, 8), local_size=(8, 8), locals_per_area=1)
N, BATCH = 35, 8
CPU = torch.device("cpu")


class Noise:
    """Source of noise images, image i always the same; ``broken`` ones cannot be read."""

    description, fingerprint = "noise", "0"

    def __init__(self, broken: tuple[int, ...] = (), num: int = N) -> None:
        self.broken, self.num = broken, num

    def __len__(self) -> int:
        return self.num

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int) -> Image.Image:
        if index in self.broken:
            raise ImageError(f"{self.name(index)}: torn")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (24, 12, 3), np.uint8))


def dataset(broken: tuple[int, ...] = (), coarse_epochs: int = 0, seed: int = 5, num: int = N) -> ViewDataset:
    return ViewDataset(Noise(broken, num), FINE, COARSE, coarse_epochs, seed)


def same(a: Views, b: Views) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- Views


@pytest.mark.parametrize(("epoch", "index"), [(0, 0), (0, 34), (3, 0), (3, 17)])
def test_the_views_of_a_key_are_those_of_its_epoch_and_index(epoch, index):
    views, unreadable = dataset()[epoch * N + index]
    assert same(views, FINE(Noise().load(index), np.random.default_rng((5, epoch, index, 1))))
    assert unreadable == []


def test_views_do_not_depend_on_what_was_cut_before_nor_on_global_generators():
    first, data = dataset()[40], dataset()
    for seed, before in ((1, ()), (2, (7, 3)), (3, (41,))):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        for key in before:
            data[key]
        assert same(data[40][0], first[0])


def test_views_differ_with_seed_epoch_and_index():
    views = dataset()[40][0]
    for other in (dataset(seed=6)[40][0], dataset()[N + 40][0], dataset()[41][0]):
        assert not torch.equal(views.params, other.params)
        assert not torch.equal(views.global_views, other.global_views)


def test_coarse_epochs_come_first_and_draw_the_same_boxes_and_colours():
    data = dataset(coarse_epochs=2)
    for epoch in range(4):
        views, size = data[epoch * N + 9][0], (16, 8) if epoch < 2 else (32, 16)
        assert views.global_views.shape == (2, 3, *size)
        crop = COARSE if epoch < 2 else FINE
        assert same(views, crop(Noise().load(9), np.random.default_rng((5, epoch, 9, 1))))
        assert torch.equal(views.params, dataset()[epoch * N + 9][0].params)


# ---- Unreadable images


@pytest.mark.parametrize(
    ("broken", "index", "replacement"), [((4,), 4, 5), ((4, 5, 6), 4, 7), ((34,), 34, 0), ((33, 34, 0), 33, 1)]
)
def test_an_unreadable_image_gives_way_to_the_next_readable_one(broken, index, replacement):
    views, unreadable = dataset(broken)[2 * N + index]
    assert same(views, FINE(Noise().load(replacement), np.random.default_rng((5, 2, index, 1))))
    assert unreadable == [f"image {index}: torn"]  # the others come with their own keys


def test_other_samples_do_not_notice_an_unreadable_image():
    for key in (3, 5, N + 3):
        views, unreadable = dataset((4,))[key]
        assert same(views, dataset()[key][0])
        assert unreadable == []


def test_unreadable_images_of_a_batch_come_with_it():
    loader = make_loader(dataset((1, 2)), StepSampler(N, N, 1, seed=0), workers=0, pin_memory=False)
    (batch,) = loader
    assert sorted(set(batch.unreadable)) == ["image 1: torn", "image 2: torn"]
    assert len(batch.views.global_views) == N


@pytest.mark.parametrize("workers", [0, 1])
def test_when_none_can_be_read_the_error_says_so_in_a_sentence(workers):
    data = dataset(tuple(range(6)), num=6)
    loader = make_loader(data, StepSampler(6, 2, 3, seed=0), workers, pin_memory=False)
    with pytest.raises(ImageError, match=r"^6 images in a row cannot be read; the first: image \d: torn$"):
        next(batches_on(CPU, loader))


def test_a_source_of_millions_is_not_read_to_its_end_when_none_can_be_read(monkeypatch):
    monkeypatch.setattr("passreid_models.data.loader.MAX_TRIES", 3)
    with pytest.raises(ImageError, match="3 images in a row"):
        dataset(tuple(range(N)))[0]


def test_no_data_are_not_the_folder_that_one_happens_to_be_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Noise().load(0).save("a.png")
    with pytest.raises(ValueError, match=r"^data: no images are named; expected a folder of images"):
        open_source("")


# ---- Order


def steps(num_steps: int = 12, world_size: int = 1, accumulate: int = 1, **options: int) -> list[list[list[int]]]:
    """Keys of the micro-batches of all processes, by step."""
    keys_by_step: list[list[list[int]]] = []
    for rank in range(world_size):
        sampler = StepSampler(
            N, BATCH, num_steps, **{"seed": 5, **options}, rank=rank, world_size=world_size, accumulate=accumulate
        )
        micro = list(sampler)
        assert len(micro) == len(sampler)
        for i, keys in enumerate(micro):
            if i // accumulate == len(keys_by_step):
                keys_by_step.append([])
            keys_by_step[i // accumulate].append(keys)
    return keys_by_step


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_step_takes_the_same_images_whatever_the_processes_and_micro_batches(world_size, accumulate):
    if world_size * accumulate > BATCH:
        accumulate = 1
    ours, joint = steps(world_size=world_size, accumulate=accumulate), steps()
    assert len(ours) == len(joint) == 12
    for shared, (whole,) in zip(ours, joint, strict=True):
        assert [len(keys) for keys in shared] == [BATCH // world_size // accumulate] * (world_size * accumulate)
        assert sorted(key for keys in shared for key in keys) == sorted(whole)


def test_an_epoch_is_a_permutation_less_the_images_that_fill_no_batch():
    per_epoch = N // BATCH
    left_out, orders = [], []
    for epoch in range(6):
        keys = np.concatenate([step[0] for step in steps(6 * per_epoch)[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert set(keys // N) == {epoch}
        assert len(set(keys)) == len(keys) == per_epoch * BATCH
        orders.append(tuple(keys % N))
        left_out.append(frozenset(range(N)) - set(keys % N))
    assert len(set(orders)) == 6
    assert {len(images) for images in left_out} == {N % BATCH}
    assert len(set(left_out)) == 6
    assert set.union(*map(set, orders)) == set(range(N))


def test_the_order_of_an_epoch_and_the_views_of_its_first_sample_are_drawn_from_different_streams(monkeypatch):
    streams, make = [], np.random.default_rng

    def spy(key: tuple[int, ...]) -> np.random.Generator:
        streams.append(make(key).bit_generator.state["state"]["state"])  # numpy takes (5,) and (5, 0) for the same
        return make(key)

    monkeypatch.setattr(np.random, "default_rng", spy)
    data = ViewDataset(open_source(f"synthetic:ids={N},images=1,size=64x32"), FINE, FINE, 0, seed=5)
    monkeypatch.setattr(data.source, "load", lambda _: Image.new("RGB", (12, 24)))
    for epoch in range(3):
        list(StepSampler(N, N, epoch + 1, seed=5, start=epoch))
        data[epoch * N]
    assert len(set(streams)) == len(streams) == 6


def test_the_order_is_that_of_the_seed():
    assert steps() == steps()
    assert steps() != steps(seed=6)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6, 11, 12])  # an epoch has 4 steps
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 2)])
def test_a_run_that_starts_later_goes_on_in_the_full_order(start, world_size, accumulate):
    shared = {"world_size": world_size, "accumulate": accumulate}
    assert steps(start=start, **shared) == steps(**shared)[start:]


def test_a_batch_as_large_as_the_data_is_all_of_it_in_every_step():
    for step, keys in enumerate(StepSampler(8, 8, 3, seed=0)):
        assert sorted(keys) == list(range(8 * step, 8 * step + 8))


# ---- Loading


def load(workers: int, num_steps: int = 6, start: int = 0) -> list[ViewBatch]:
    sampler = StepSampler(N, BATCH, num_steps, seed=5, start=start, accumulate=2)
    loader = make_loader(dataset((3,), coarse_epochs=1), sampler, workers, pin_memory=False)
    with closing(batches_on(CPU, loader)) as batches:
        return list(batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_with_any_number_of_workers(workers):
    expected, ours = load(0), load(workers)
    assert len(ours) == len(expected) == 12
    for a, b in zip(ours, expected, strict=True):
        assert same(a.views, b.views)
        assert a.unreadable == b.unreadable
    assert any(batch.unreadable for batch in ours)


def test_batches_are_the_stacked_views_of_their_keys_and_sizes_change_with_the_epoch():
    data = dataset((3,), coarse_epochs=1)
    for keys, batch in zip(StepSampler(N, BATCH, 6, seed=5, accumulate=2), load(0), strict=True):
        for i, key in enumerate(keys):
            assert same(Views(*(x[i] for x in batch.views)), data[key][0])
    heights = [batch.views.global_views.shape[-2] for batch in load(0)]
    assert heights == [16] * 8 + [32] * 4


def test_a_resumed_loader_gives_the_batches_that_were_left():
    for a, b in zip(load(0, start=3), load(0)[6:], strict=True):
        assert same(a.views, b.views)


@pytest.mark.parametrize("num", [1, 5])
def test_workers_are_gone_when_batches_on_is_closed(num):
    before = set(multiprocessing.active_children())
    loader = make_loader(dataset(), StepSampler(N, BATCH, 400, seed=5), workers=2, pin_memory=False)
    batches = batches_on(CPU, loader)
    for _ in range(num):
        next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before


def test_workers_leave_the_signals_of_the_process_group_to_the_training_process():
    before = set(multiprocessing.active_children())
    loader = make_loader(dataset(), StepSampler(N, BATCH, 40, seed=5), workers=2, pin_memory=False)
    with closing(batches_on(CPU, loader)) as batches:
        received = [next(batches), next(batches)]  # one of each worker, so that both are at work
        for worker in set(multiprocessing.active_children()) - before:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(worker.pid, signum)
        received += batches
    assert len(received) == 40
