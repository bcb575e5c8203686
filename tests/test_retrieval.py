"""Ranking and its scores: the official values, cases worked out by hand, and what must hold for any descriptors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from passreid_models.retrieval import RetrievalMetrics, evaluate, rank

NAN = float("nan")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "retrieval.safetensors")


def scores(golden: dict[str, Tensor], order: Tensor | slice = slice(None), **options: int) -> RetrievalMetrics:
    gallery = [golden[f"gallery_{name}"][order] for name in ("features", "pids", "camids")]
    query = [golden[f"query_{name}"] for name in ("features", "pids", "camids")]
    return evaluate(query[0], gallery[0], query[1], gallery[1], query[2], gallery[2], **options)


def line(cosines: list[float]) -> Tensor:
    """Unit vectors of the plane with these cosines to (1, 0), longest first to show that lengths do not count."""
    x = torch.tensor(cosines, dtype=torch.float64)
    vectors = torch.stack([x, (1 - x * x).sqrt()], dim=1)
    return (vectors * torch.linspace(9, 1, len(cosines), dtype=torch.float64)[:, None]).float()


# ---- Official values


def test_map_and_cmc_are_exactly_those_of_the_official_evaluation(golden):
    metrics = scores(golden)
    assert metrics.mAP == golden["mAP"].item()
    assert torch.equal(metrics.cmc, golden["cmc"])
    assert metrics.rank1 == golden["cmc"][0].item()


def test_queries_without_a_match_under_another_camera_are_not_counted(golden):
    q_pids, q_cams = golden["query_pids"][:, None], golden["query_camids"][:, None]
    matches = (q_pids == golden["gallery_pids"]) & (q_cams != golden["gallery_camids"])
    counted = int(matches.any(dim=1).sum())
    assert 0 < counted < len(q_pids)  # or this would prove nothing
    assert scores(golden).num_queries == counted


# ---- By hand


def test_average_precision_of_a_ranking_worked_out_by_hand():
    # By similarity: 0.9 same person and camera (left out), 0.8 other, 0.7 match, 0.6 junk (left out), 0.5 other,
    # 0.4 match. Kept: other, match, other, match. AP = (1/2 + 2/4) / 2, the first match at rank 2.
    gallery = line([0.4, 0.9, 0.5, 0.6, 0.8, 0.7])
    metrics = evaluate(line([1.0]), gallery, [7], [7, 7, 3, -1, 2, 7], [1], [2, 1, 1, 2, 2, 3], max_rank=5)
    assert metrics.mAP == 0.5
    assert metrics.cmc.tolist() == [0, 1, 1, 1, 1]
    assert metrics.num_queries == 1


def test_map_and_cmc_are_means_over_the_counted_queries():
    # Query 0: match first, AP 1. Query 1: match at rank 3, AP 1/3. Query 2: its person is not in the gallery.
    gallery = line([0.9, 0.8, 0.7])
    metrics = evaluate(line([1, 1, 1]), gallery, [1, 3, 9], [1, 2, 3], [0, 0, 0], [1, 1, 1], max_rank=3)
    assert metrics.mAP == pytest.approx((1 + 1 / 3) / 2, abs=1e-12)
    assert metrics.cmc.tolist() == [0.5, 0.5, 1.0]
    assert metrics.num_queries == 2


def test_same_person_under_the_same_camera_is_left_out_but_others_of_that_camera_are_not():
    metrics = evaluate(line([1.0]), line([0.9, 0.8, 0.7]), [1], [1, 2, 1], [0], [0, 0, 1], max_rank=2)
    assert metrics.cmc.tolist() == [0, 1]  # the camera's person 2 stands before the match


def test_equal_similarities_are_scored_in_the_order_of_the_gallery():
    same = torch.ones(4, 3)
    metrics = evaluate(torch.ones(1, 3), same, [1], [2, 1, 3, 1], [0], [1, 1, 1, 1], max_rank=3)
    assert metrics.mAP == (1 / 2 + 2 / 4) / 2
    assert metrics.cmc.tolist() == [0, 1, 1]


def test_cmc_is_as_long_as_asked_for_even_when_the_gallery_is_shorter():
    metrics = evaluate(line([1.0]), line([0.9, 0.8]), [1], [2, 1], [0], [1, 1], max_rank=6)
    assert metrics.cmc.tolist() == [0, 1, 1, 1, 1, 1]


# ---- Properties


def test_scores_do_not_depend_on_the_order_of_the_gallery(golden):
    order = torch.randperm(len(golden["gallery_pids"]), generator=torch.Generator().manual_seed(0))
    permuted, metrics = scores(golden, order), scores(golden)
    assert permuted.mAP == pytest.approx(metrics.mAP, abs=1e-12)
    assert torch.equal(permuted.cmc, metrics.cmc)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_scores_do_not_depend_on_the_chunk(golden, chunk):
    metrics = scores(golden, chunk=chunk)
    assert metrics.mAP == pytest.approx(golden["mAP"].item(), abs=1e-12)
    assert torch.equal(metrics.cmc, golden["cmc"])
    assert metrics.num_queries == scores(golden).num_queries


@pytest.mark.parametrize("seed", range(5))
def test_distractors_never_raise_map_or_cmc(golden, seed):
    noise = torch.randn(100, 16, generator=torch.Generator().manual_seed(seed))
    count = torch.zeros(100, dtype=torch.int64)
    more = dict(golden)
    for name, rows in (("features", noise), ("pids", count), ("camids", count)):
        more[f"gallery_{name}"] = torch.cat([golden[f"gallery_{name}"], rows])
    crowded, metrics = scores(more), scores(golden)
    assert crowded.mAP < metrics.mAP
    assert (crowded.cmc <= metrics.cmc).all()
    assert crowded.num_queries == metrics.num_queries


def test_junk_is_ignored_wherever_it_ranks(golden):
    copies = {f"gallery_{k}": golden[f"query_{k}"] for k in ("features", "camids")}  # as near as can be
    copies["gallery_pids"] = torch.full_like(golden["query_pids"], -1)
    junk = {k: torch.cat([v, golden[k]]) for k, v in copies.items()}
    metrics = scores({**golden, **junk})
    assert metrics.mAP == golden["mAP"].item()
    assert torch.equal(metrics.cmc, golden["cmc"])


def test_features_that_tell_persons_apart_score_one():
    pids = np.repeat(np.arange(6), 4)
    camids = np.tile(np.arange(4), 6)
    perfect, is_query = torch.eye(6)[pids], camids == 0
    metrics = evaluate(
        perfect[is_query], perfect[~is_query], pids[is_query], pids[~is_query], camids[is_query], camids[~is_query]
    )
    assert (metrics.mAP, metrics.rank1, metrics.num_queries) == (1.0, 1.0, 6)
    assert metrics.cmc.eq(1).all()


def test_ids_may_be_lists_arrays_or_tensors(golden):
    ids = [golden[k] for k in ("query_pids", "gallery_pids", "query_camids", "gallery_camids")]
    features = golden["query_features"], golden["gallery_features"]
    for convert in (Tensor.tolist, Tensor.numpy, Tensor.clone):
        assert evaluate(*features, *map(convert, ids)).mAP == golden["mAP"].item()


def test_unreadable_gallery_images_count_as_ranked_last():
    gallery = torch.cat([line([0.2, 0.9]), torch.full((1, 2), NAN), line([0.5])])
    metrics = evaluate(line([1.0]), gallery, [1], [2, 3, 1, 4], [0], [1, 1, 1, 1], max_rank=4)
    assert metrics.mAP == 1 / 4
    assert metrics.cmc.tolist() == [0, 0, 0, 1]


# ---- rank


def test_rank_gives_the_indices_and_cosines_of_the_nearest_first():
    ranking = rank(line([1.0]), line([0.2, 0.9, -0.5, 0.6]), topk=3)
    assert ranking.indices.tolist() == [[1, 3, 0]]
    assert torch.allclose(ranking.similarities, torch.tensor([[0.9, 0.6, 0.2]]), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_rank_agrees_with_the_official_distances_whatever_the_chunk(golden, chunk):
    ranking = rank(golden["query_features"], golden["gallery_features"], topk=200, chunk=chunk)
    official = 1 - golden["distance"].gather(1, ranking.indices) / 2  # squared distance of unit vectors
    assert torch.allclose(ranking.similarities, official, atol=1e-5)
    assert (ranking.similarities.diff(dim=1) <= 0).all()
    assert torch.equal(ranking.indices.sort(dim=1).values, torch.arange(200).expand(40, -1))


def test_rank_orders_equal_similarities_by_gallery_index():
    gallery = torch.eye(3)[[1, 0, 2, 0, 1, 0]]
    ranking = rank(torch.eye(3)[:2], gallery, topk=6)
    assert ranking.indices.tolist() == [[1, 3, 5, 0, 2, 4], [0, 4, 1, 2, 3, 5]]


def test_rank_takes_a_single_descriptor():
    ranking = rank(line([1.0])[0], line([0.2, 0.9]), topk=1)
    assert ranking.indices.tolist() == [[1]]


def test_rank_gives_the_whole_gallery_when_it_is_smaller_than_topk():
    assert rank(line([1.0]), line([0.2, 0.9]), topk=5).indices.tolist() == [[1, 0]]


def test_rank_of_no_queries_is_empty_with_the_right_width():
    for topk, width in ((2, 2), (5, 3)):
        ranking = rank(torch.empty(0, 2), line([0.2, 0.9, 0.1]), topk=topk)
        assert ranking.indices.shape == ranking.similarities.shape == (0, width)
        assert ranking.indices.dtype == torch.int64


def test_rank_puts_unreadable_images_last():
    gallery = torch.cat([torch.full((1, 2), NAN), line([-0.9, 0.3])])
    ranking = rank(line([1.0]), gallery, topk=3)
    assert ranking.indices.tolist() == [[2, 1, 0]]
    assert ranking.similarities[0, 2] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rank_takes_any_floating_type_and_compares_in_float32(dtype):
    ranking = rank(line([1.0]).to(dtype), line([0.2, 0.9, 0.6]).to(dtype), topk=3)
    assert ranking.indices.tolist() == [[1, 2, 0]]
    assert ranking.similarities.dtype == torch.float32


def test_rank_and_evaluate_leave_their_arguments_as_they_are(golden):
    before = {k: v.clone() for k, v in golden.items()}
    rank(golden["query_features"], golden["gallery_features"])
    scores(golden)
    assert all(torch.equal(before[k], v) for k, v in golden.items())


# ---- Errors


@pytest.mark.parametrize(
    ("query", "gallery"), [((2, 3), (4, 5)), ((2, 3), (0, 3)), ((2, 3), (3,)), ((2, 2, 3), (4, 3)), ((5,), (4, 3))]
)
def test_shapes_that_do_not_match_are_refused_with_both_shapes(query, gallery):
    with pytest.raises(ValueError, match=r"expected descriptors \[Q, C\] and \[G, C\]") as e:
        rank(torch.zeros(query), torch.zeros(gallery))
    assert str(gallery) in str(e.value)


@pytest.mark.parametrize("topk", [0, -1])
def test_topk_below_one_is_refused(topk):
    with pytest.raises(ValueError, match=f"topk must be 1 or more, got {topk}"):
        rank(torch.eye(2), torch.eye(2), topk=topk)


@pytest.mark.parametrize("wrong", ["query_pids", "gallery_pids", "query_camids", "gallery_camids"])
def test_ids_of_another_number_are_refused_by_name(golden, wrong):
    with pytest.raises(ValueError, match=f"{wrong} must hold one entry an image"):
        scores({**golden, wrong: golden[wrong][:-1]})


def test_data_of_one_camera_is_refused_with_the_likely_cause():
    with pytest.raises(ValueError, match="is this data of a single camera"):
        evaluate(torch.eye(2), torch.eye(2), [1, 2], [1, 2], [0, 0], [0, 0])


def test_euclidean_ranks_by_distance_and_agrees_with_cosine_on_unit_vectors():
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    found = rank(query, gallery, topk=40, metric="euclidean")
    distances = torch.cdist(query, gallery)
    assert torch.equal(found.indices, distances.argsort(dim=1, stable=True))
    torch.testing.assert_close(-found.similarities, distances.sort(dim=1).values.square(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.indices, rank(query, gallery, topk=40).indices)
    units = [torch.nn.functional.normalize(x, dim=1) for x in (query, gallery)]
    assert torch.equal(rank(*units, topk=40, metric="euclidean").indices, rank(*units, topk=40).indices)
    with pytest.raises(ValueError, match="'cosine' or 'euclidean', got 'l1'"):
        rank(query, gallery, metric="l1")
