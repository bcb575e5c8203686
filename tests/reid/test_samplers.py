"""Batches of identities and clusters: their images, and that they are functions of seed and epoch."""

import numpy as np
import pytest

from passreid_models.reid import samplers
from passreid_models.reid.batches import KeySampler
from passreid_models.reid.samplers import (
    camera_batches,
    count_identity_batches,
    identity_batches,
    shuffled_batches,
)

PIDS = np.repeat(np.arange(7), [1, 3, 4, 5, 8, 13, 9])  # images of each identity
RNG = np.random.default_rng(0)


def identities(epoch: int = 0, seed: int = 0) -> list[np.ndarray]:
    return identity_batches(PIDS, 3, 4, seed, epoch)


def as_lists(batches: list[np.ndarray]) -> list:
    return [b.tolist() for b in batches]


# ---- Identities


def test_a_batch_has_k_images_of_each_of_p_identities():
    for batch in identities():
        assert batch.shape == (3, 4)
        pids = PIDS[batch]
        assert (pids == pids[:, :1]).all()
        assert len(set(pids[:, 0])) == 3


@pytest.mark.parametrize("epoch", range(5))
def test_an_image_is_drawn_once_unless_its_identity_has_too_few(epoch):
    images, counts = np.unique(np.concatenate([b.ravel() for b in identities(epoch)]), return_counts=True)
    enough = np.bincount(PIDS)[PIDS[images]] >= 4
    assert (counts[enough] == 1).all()
    assert (counts[~enough] > 1).any() or not (~enough).any()


@pytest.mark.parametrize("epoch", range(5))
def test_an_epoch_ends_when_too_few_identities_have_chunks_left(epoch):
    chunks = np.maximum(np.bincount(PIDS) // 4, 1)
    counts = np.bincount(np.concatenate([PIDS[b[:, 0]] for b in identities(epoch)]), minlength=7)
    assert (counts <= chunks).all()
    assert (counts < chunks).sum() < 3


def test_epochs_and_seeds_differ_and_repeat():
    assert as_lists(identities()) == as_lists(identities())
    assert as_lists(identities()) != as_lists(identities(epoch=1))
    assert as_lists(identities()) != as_lists(identities(seed=1))


@pytest.mark.parametrize("num_gone", [1, 2, 1024])
@pytest.mark.parametrize("epoch", range(8))
def test_identities_are_drawn_as_from_a_list_of_those_with_images_left(monkeypatch, num_gone, epoch):
    monkeypatch.setattr(samplers, "MAX_GONE", num_gone)
    pids = np.repeat(np.arange(50), np.random.default_rng(epoch).integers(1, 20, 50))
    rng, chunks = np.random.default_rng((3, epoch, samplers.IDENTITIES)), np.maximum(np.bincount(pids) // 4, 1)
    for batch in identity_batches(pids, 6, 4, seed=3, epoch=epoch):
        expected = rng.choice(np.flatnonzero(chunks), 6, replace=False)
        assert pids[batch[:, 0]].tolist() == expected.tolist()
        chunks[expected] -= 1
    assert (chunks > 0).sum() < 6


def test_the_count_of_batches_is_known_without_drawing_the_images():
    counts = count_identity_batches(PIDS, 3, 4, seed=5, epochs=20)
    assert counts == [len(identities(epoch, seed=5)) for epoch in range(20)]
    assert len(set(counts)) > 1  # or a constant would do


def test_labels_may_come_in_any_order():
    order = RNG.permutation(len(PIDS))
    for batch in identity_batches(PIDS[order], 3, 4, 0, 0):
        pids = PIDS[order][batch]
        assert (pids == pids[:, :1]).all()


def test_too_few_identities_are_refused():
    with pytest.raises(ValueError, match="ids_per_batch: 8 is more than the 7 identities"):
        identity_batches(PIDS, 8, 4, 0, 0)


# ---- Without regard to identities


def test_shuffled_batches_hold_each_image_once_and_drop_the_rest():
    batches = shuffled_batches(23, 5, seed=1, epoch=2)
    assert [b.shape for b in batches] == [(5, 1)] * 4
    assert len(set(np.concatenate(batches).ravel())) == 20
    assert as_lists(batches) == as_lists(shuffled_batches(23, 5, 1, 2)) != as_lists(shuffled_batches(23, 5, 1, 3))
    with pytest.raises(ValueError, match="a batch takes 5 images, and the training set has 4"):
        shuffled_batches(4, 5, 0, 0)


# ---- Clusters

LABELS = np.array([0] * 9 + [1] * 3 + [-1] * 5 + [2] * 20 + [3] * 2)
CAMERAS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, *[4, 4, 4], *[0] * 5, *([0] * 19 + [1]), 5, 6])


def clusters(steps: int = 6, num: int = 2, images: int = 4, epoch: int = 0, cameras: np.ndarray = CAMERAS) -> list:
    return camera_batches(LABELS, cameras, num, images, steps, 0, epoch)


def test_there_are_as_many_batches_as_steps_and_outliers_are_in_none():
    batches = clusters(steps=7)
    assert [b.shape for b in batches] == [(2, 4)] * 7
    labels = LABELS[np.stack(batches)]  # [steps, clusters, images]
    assert (labels == labels[:, :, :1]).all()
    assert (labels >= 0).all()
    assert (labels[:, 0, 0] != labels[:, 1, 0]).all()


def test_images_are_of_other_cameras_than_the_anchor_if_the_cluster_has_some():
    clusters_seen = set()
    for batch in clusters(steps=60):
        for group in batch:
            cluster, cameras = LABELS[group[0]], CAMERAS[group]
            clusters_seen.add(int(cluster))
            if cluster == 1:  # one camera: others of it, but not the anchor
                assert (group[1:] != group[0]).all()
            else:
                assert (cameras[1:] != cameras[0]).all()
    assert clusters_seen == {0, 1, 2, 3}


def test_an_image_is_repeated_only_if_there_are_too_few():
    for batch in clusters(steps=40):
        for group in batch:
            others = (CAMERAS[LABELS[group[0]] == LABELS] != CAMERAS[group[0]]).sum()
            if others >= 3:
                assert len(set(group)) == 4


def test_without_cameras_images_are_any_others_of_the_cluster():
    unknown = np.full(len(LABELS), -1)
    groups = [g for b in clusters(steps=40, cameras=unknown) for g in b]
    assert all((g[1:] != g[0]).all() for g in groups)
    mixed = [g for g in groups if LABELS[g[0]] == 0 and len(set(CAMERAS[g])) < 4]
    assert mixed  # images of one camera meet


def test_every_cluster_is_drawn_once_before_one_is_drawn_again():
    firsts = [LABELS[b[:, 0]] for b in clusters(steps=8)]
    for a, b in zip(firsts[::2], firsts[1::2], strict=True):
        assert sorted([*a, *b]) == [0, 1, 2, 3]


def test_with_fewer_clusters_than_a_batch_takes_every_batch_has_all():
    assert all(sorted(LABELS[b[:, 0]]) == [0, 1, 2, 3] for b in clusters(num=9))


def test_a_cluster_of_one_image_repeats_it():
    (batch,) = camera_batches(np.array([0, -1]), np.array([0, 0]), 4, 3, 1, 0, 0)
    assert batch.tolist() == [[0, 0, 0]]


def test_batches_of_clusters_are_a_function_of_the_epoch():
    assert as_lists(clusters()) == as_lists(clusters()) != as_lists(clusters(epoch=1))


def test_outliers_alone_are_refused():
    with pytest.raises(ValueError, match="all images are outliers"):
        camera_batches(np.full(4, -1), np.zeros(4), 2, 2, 1, 0, 0)


# ---- Processes


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_a_batch_and_keep_identities_whole(world):
    batches = [np.arange(24).reshape(6, 4) + 100 * i for i in range(3)]
    draw = {2: batches}.__getitem__
    shares = [list(KeySampler(draw, [0, 4, 10, 13], rank, world, range(11, 13))) for rank in range(world)]
    assert all(len(s) == 2 for s in shares)
    for nth, batch in enumerate(batches[1:]):
        keys = [k for s in shares for k in s[nth]]
        assert {step for step, _, _ in keys} == {11 + nth}
        assert {(place, image) for _, place, image in keys} == set(enumerate(batch.ravel().tolist()))
        for s in shares:
            images = np.array([image for _, _, image in s[nth]]).reshape(-1, 4)
            assert (images // 4 == images[:, :1] // 4).all()
