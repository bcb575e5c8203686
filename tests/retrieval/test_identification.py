"""Open-set identification: cases worked out by hand, a plain implementation, and properties."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from passreid_models.retrieval import evaluate, open_set, unknown_identities


def line(cosines: list[float]) -> torch.Tensor:
    """Unit vectors of the plane with these cosines to (1, 0)."""
    x = torch.tensor(cosines)
    return torch.stack([x, (1 - x * x).sqrt()], dim=1)


def test_a_case_worked_out_by_hand():
    # one query direction, (1, 0), asked as persons 1 (known), 2 (known) and 7, 8 (unknown)
    gallery, pids = line([0.9, 0.8, 0.5]), [1, 2, -1]
    found = open_set(line([1.0] * 3), gallery, [1, 2, 7], pids)
    assert (found.num_gallery, len(found.known), len(found.unknown)) == (2, 2, 1)
    assert found.known.tolist() == pytest.approx([-math.inf, 0.9])  # person 2's best hit is person 1
    assert found.unknown.tolist() == pytest.approx([0.9])
    assert (found.fpir(0.85), found.fpir(0.95)) == (1, 0)
    assert (found.fnir(0.85), found.fnir(0.95)) == (0.5, 1)


def test_images_whose_descriptor_is_not_finite_are_left_out_and_counted():
    query, gallery = line([1.0] * 4), line([0.9, 0.8, 0.5])
    query[0], gallery[0] = math.nan, math.nan
    found = open_set(query, gallery, [1, 2, 7, 1], [1, 2, 3])
    assert (found.num_gallery, found.num_not_finite) == (2, 2)
    assert found.known.tolist() == pytest.approx([0.8])
    assert found.unknown.tolist() == pytest.approx([0.8])  # person 1, whose only image is left out, is not unknown


def test_rates_are_those_of_counting():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 8))
    query_pids, gallery_pids = rng.integers(1, 60, 300), rng.integers(1, 40, 200)
    query, gallery = (
        torch.from_numpy(centres[pids] + 0.6 * rng.standard_normal((len(pids), 8))).float()
        for pids in (query_pids, gallery_pids)
    )
    query_camids, gallery_camids = rng.integers(0, 3, 300), rng.integers(0, 3, 200)
    found = open_set(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, budget_mb=0.01)
    similarities = (F.normalize(query) @ F.normalize(gallery).T).numpy()
    known, unknown = [], []
    for i, (pid, camid) in enumerate(zip(query_pids, query_camids, strict=True)):
        allowed = ~((gallery_pids == pid) & (gallery_camids == camid))
        best = np.where(allowed, similarities[i], -np.inf).argmax()
        if pid not in gallery_pids:
            unknown.append(similarities[i, best])
        elif (allowed & (gallery_pids == pid)).any():
            known.append(similarities[i, best] if gallery_pids[best] == pid else -np.inf)
    assert (len(found.known), len(found.unknown)) == (len(known), len(unknown))
    for threshold in (0.2, 0.5, 0.8):
        assert found.fpir(threshold) == pytest.approx(np.mean(np.array(unknown) >= threshold))
        assert found.fnir(threshold) == pytest.approx(np.mean(np.array(known) < threshold))
    for fpir in (0.02, 0.1, 0.5):
        threshold = found.threshold(fpir)
        assert found.fpir(threshold) <= fpir
        assert found.fpir(np.nextafter(np.float32(threshold), np.float32(-1))) > fpir
        assert found.dir_at(fpir) == pytest.approx(np.mean(np.array(known) >= threshold))


def test_with_all_persons_accepted_the_rate_is_rank_1():
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((40, 4))).float()
    pids = np.arange(40) % 10
    query_pids = np.concatenate([pids, [99]])
    found = open_set(torch.cat([x, x[:1]]), x, query_pids, pids, own=[*range(40), -1])
    assert found.dir_at(1.0) == pytest.approx(evaluate(x, x, pids, pids, own=range(40)).rank1)


def test_of_equal_hits_the_first_counts_as_in_a_ranking():
    gallery = line([0.9, 0.9, 0.5])  # the same crop under two identities
    for pids, expected in (([1, 2, 3], 0.9), ([2, 1, 3], -math.inf)):
        found = open_set(line([1.0, 1.0]), gallery, [1, 7], pids)
        assert found.known.tolist() == pytest.approx([expected])
        assert found.dir_at(1.0) == evaluate(line([1.0]), gallery, [1], pids).rank1


def test_a_rate_below_one_of_the_unknown_queries_is_not_measured():
    found = open_set(line([1.0, 0.9]), line([0.95, 0.1]), [1, 5], [1, 2])
    assert math.isnan(found.threshold(0.1))
    assert math.isnan(found.dir_at(0.1))
    assert found.threshold(1.0) == -math.inf


@pytest.mark.parametrize("fpir", [-0.1, 1.5, 10, math.nan])
def test_a_rate_out_of_range_is_refused(fpir):
    found = open_set(line([1.0, 0.9]), line([0.95, 0.1]), [1, 5], [1, 2])
    for rate in (found.threshold, found.dir_at):
        with pytest.raises(ValueError, match=rf"fpir must be in 0\.\.1, got {fpir}"):
            rate(fpir)


@pytest.mark.parametrize(("pids", "message"), [([1, 2], "none of unknown persons"), ([8, 9], "none of known persons")])
def test_without_known_or_unknown_persons_there_is_nothing_to_measure(pids, message):
    with pytest.raises(ValueError, match=message):
        open_set(line([1.0, 0.9]), line([0.95, 0.1]), pids, [1, 2])


def test_unknown_identities_are_half_by_a_seed():
    pids = [-1, *range(1, 10), 3]
    first = unknown_identities(pids)
    assert len(first) == 4
    assert set(first.tolist()) <= set(range(1, 10))
    assert np.array_equal(first, unknown_identities(np.array(pids)))
    assert any(not np.array_equal(first, unknown_identities(pids, seed)) for seed in range(1, 4))
