"""k-reciprocal re-ranking: the official values, the dense reading of the paper, and the edges."""

import logging
import sys

import numpy as np
import plain
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from passreid_models.retrieval import evaluate, evaluate_distances, rerank
from tests import GOLDEN

NAN = float("nan")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "retrieval.safetensors")


def persons(seed: int, count: int, width: int = 12, noise: float = 0.7) -> Tensor:
    """Descriptors of persons with some 6 images each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 6), width))
    return torch.from_numpy(centres[rng.integers(0, len(centres), count)] + noise * rng.standard_normal((count, width)))


def corners(seed: int, count: int) -> Tensor:
    """Descriptors of +-1, few enough to be alike often: products are exact, and ties are everywhere."""
    x = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], (count, 4))).float()
    return torch.cat([x, x, x, x], dim=1)  # of length 4


def test_distances_are_those_of_the_official_code(golden):
    reranked = rerank(golden["query_features"], golden["gallery_features"])
    assert reranked.shape == (40, 200)
    assert (reranked.dense() - golden["reranked_distance"]).abs().max() < 5e-3  # it computes in float16


def test_scores_are_those_of_the_official_code(golden):
    ids = [golden[k] for k in ("query_pids", "gallery_pids", "query_camids", "gallery_camids")]
    metrics = evaluate_distances(rerank(golden["query_features"], golden["gallery_features"]), *ids)
    assert metrics.mAP == pytest.approx(golden["reranked_mAP"].item(), abs=1e-3)
    assert torch.equal(metrics.cmc, golden["reranked_cmc"])
    assert metrics.mAP > evaluate(golden["query_features"], golden["gallery_features"], *ids).mAP + 0.1


def test_the_plain_reading_of_the_benchmark_is_the_official_one(golden):
    distances = plain.plain_rerank(golden["query_features"].numpy(), golden["gallery_features"].numpy(), 20, 6, 0.3)
    assert np.abs(distances - golden["reranked_distance"].numpy()).max() < 5e-3


@pytest.mark.parametrize(
    ("k1", "k2", "lambda_value"), [(20, 6, 0.3), (7, 1, 0.0), (5, 9, 0.5), (1, 1, 0.3), (2, 3, 1.0)]
)
@pytest.mark.parametrize("make", [persons, corners])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_distances_are_the_dense_ones(seed, make, k1, k2, lambda_value):
    x = make(seed, 60).float()
    distances = rerank(x[:20], x[20:], k1, k2, lambda_value).dense()
    expected = plain.plain_rerank(x[:20].numpy(), x[20:].numpy(), k1, k2, lambda_value)
    assert np.abs(distances.numpy() - expected).max() < 1e-5


def test_without_the_jaccard_distance_the_ranking_is_that_of_the_descriptors():
    x = persons(0, 60)
    distances = rerank(x[:20], x[20:], lambda_value=1.0).dense()
    cosines = torch.nn.functional.cosine_similarity(x[:20, None], x[None, 20:], dim=2)
    farthest = torch.nn.functional.cosine_similarity(x[:20, None], x[None], dim=2).amin(dim=1, keepdim=True)
    torch.testing.assert_close(distances, ((1 - cosines) / (1 - farthest)).float(), rtol=1e-4, atol=1e-5)


def test_euclidean_is_cosine_on_unit_vectors_and_counts_lengths_on_others():
    x = torch.nn.functional.normalize(persons(1, 80), dim=1)
    units = rerank(x[:30], x[30:], metric="euclidean").dense()
    torch.testing.assert_close(units, rerank(x[:30], x[30:]).dense(), rtol=0, atol=1e-5)
    longer = x * torch.linspace(0.5, 2, 80)[:, None]
    assert (rerank(longer[:30], longer[30:], metric="euclidean").dense() - units).abs().max() > 0.1
    torch.testing.assert_close(rerank(longer[:30], longer[30:]).dense(), units, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget_mb", [1e-6, 0.02])
def test_distances_do_not_depend_on_the_budget(budget_mb):
    x = persons(5, 60)
    distances = rerank(x[:20], x[20:], budget_mb=budget_mb).dense()
    torch.testing.assert_close(distances, rerank(x[:20], x[20:]).dense(), rtol=0, atol=1e-6)


def test_rows_are_those_of_the_dense_matrix_and_can_be_asked_for_in_any_order(golden):
    reranked = rerank(golden["query_features"], golden["gallery_features"])
    dense = reranked.dense()
    for start, stop in ((25, 40), (0, 3), (7, 8), (5, 5)):
        torch.testing.assert_close(reranked.rows(start, stop), dense[start:stop], rtol=0, atol=1e-6)
    kept = reranked.rows(0, 2)
    reranked.rows(2, 4)
    torch.testing.assert_close(kept, dense[:2], rtol=0, atol=1e-6)  # no memory is shared between calls


def test_distances_follow_the_gallery_when_it_is_permuted(golden):
    query, gallery = golden["query_features"], golden["gallery_features"]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        rerank(query, gallery[order]).dense(), rerank(query, gallery).dense()[:, order], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("count", [2, 3, 15, 20])
def test_fewer_images_than_neighbours_take_all_and_say_so(count, caplog):
    x = persons(2, count).float()
    with caplog.at_level(logging.WARNING):
        distances = rerank(x[:1], x[1:]).dense()
    assert f"re-ranking of {count} images: k1 is {count - 1} instead of 20" in caplog.text
    assert np.abs(distances.numpy() - plain.plain_rerank(x[:1].numpy(), x[1:].numpy(), count - 1, 6, 0.3)).max() < 1e-5


@pytest.mark.parametrize(("count", "k1"), [(90, 20), (24, 22)])  # k1: most of the images, of which none is unreadable
def test_unreadable_images_are_at_no_distance_and_change_no_others(count, k1):
    x = persons(3, count)
    query, gallery = (torch.cat([y[:1], torch.full((3, 12), NAN, dtype=x.dtype), y[1:]]) for y in (x[:10], x[10:]))
    distances, whole = rerank(query, gallery, k1=k1), rerank(x[:10], x[10:], k1=k1).dense()
    assert not distances.dense()[1:4].isfinite().any()
    assert not distances.dense()[:, 1:4].isfinite().any()
    kept = [i for i in range(len(gallery)) if i not in (1, 2, 3)]
    # the products of fewer rows round otherwise on some CPUs
    torch.testing.assert_close(distances.dense()[[0, *range(4, 13)]][:, kept], whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(distances.rows(3, 6)[1:, kept], whole[1:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lost", [[], [2, 7, 40]])  # rows without a descriptor: of a query alone, one of both, others
def test_an_image_that_is_query_and_gallery_counts_once_among_the_neighbours(lost):
    x = persons(4, 60)
    x[lost] = NAN
    expected = rerank(x[:20], x[20:]).dense()
    every = rerank(x, x, own=range(60)).dense()
    torch.testing.assert_close(every[:20, 20:], expected, rtol=0, atol=1e-6)
    some = rerank(x[:20], x[5:], own=[-1] * 5 + list(range(15))).dense()  # 5 queries are not in the gallery
    torch.testing.assert_close(some[:, 15:], expected, rtol=0, atol=1e-6)
    assert (rerank(x, x).dense()[:20, 20:] - expected)[expected.isfinite()].abs().max() > 0.1  # twice each
    torch.testing.assert_close(rerank(x, x, own=[-1] * 60).dense(), rerank(x, x).dense(), rtol=0, atol=0)


def test_rows_that_are_not_in_the_gallery_are_refused():
    with pytest.raises(ValueError, match=r"own must hold rows of the gallery, 0 to 19, or -1 .* got 0 to 20"):
        rerank(torch.eye(30)[:2], torch.eye(30)[10:], own=[0, 20])


def test_images_that_are_all_alike_are_at_distance_zero():
    assert rerank(torch.ones(3, 4), torch.ones(30, 4), k1=32).dense().abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": 0}, "k1 must be 1 or more, got 0"),
        ({"k2": 0}, "k2 must be 1 or more, got 0"),
        ({"lambda_value": 1.5}, r"lambda_value must be in 0\.\.1, got 1\.5"),
        ({"metric": "l1"}, "'cosine' or 'euclidean', got 'l1'"),
        ({"budget_mb": 0}, "budget_mb must be more than 0 MB"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        rerank(torch.eye(30)[:10], torch.eye(30)[10:], **options)


def test_a_missing_scipy_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ValueError, match=r're-ranking and clustering need scipy: pip install "\.\[reid\]"'):
        rerank(torch.eye(4)[:2], torch.eye(4)[2:], k1=2)
