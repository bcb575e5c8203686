"""Ranking and its scores: the official values, cases worked out by hand, and what must hold for any descriptors."""

import numpy as np
import plain
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from passreid_models.retrieval import (
    RetrievalMetrics,
    evaluate,
    evaluate_distances,
    metrics,
    open_set,
    rank,
    rerank,
    roc,
)
from tests import GOLDEN

NAN = float("nan")
ONE_ROW = 1e-6  # MB: less than a row takes


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "retrieval.safetensors")


def evaluate_golden(
    golden: dict[str, Tensor], order: Tensor | slice = slice(None), **options: float
) -> RetrievalMetrics:
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
    result = evaluate_golden(golden)
    assert result.mAP == golden["mAP"].item()
    assert torch.equal(result.cmc, golden["cmc"])
    assert result.rank1 == golden["cmc"][0].item()


def test_distances_score_exactly_as_the_official_evaluation_of_them(golden):
    ids = [golden[k] for k in ("query_pids", "gallery_pids", "query_camids", "gallery_camids")]
    from_distances = evaluate_distances(golden["distance"], *ids)
    assert from_distances.mAP == golden["mAP"].item()
    assert torch.equal(from_distances.cmc, golden["cmc"])


def test_the_plain_evaluation_of_the_benchmark_is_the_official_one(golden):
    keys = ("query_features", "gallery_features", "query_pids", "gallery_pids", "query_camids", "gallery_camids")
    plain_map, plain_cmc = plain.plain_evaluate(*(golden[k].numpy() for k in keys))
    assert plain_map == golden["mAP"].item()
    assert np.array_equal(plain_cmc, golden["cmc"].numpy())


def test_queries_without_a_match_under_another_camera_are_not_counted(golden):
    q_pids, q_cams = golden["query_pids"][:, None], golden["query_camids"][:, None]
    matches = (q_pids == golden["gallery_pids"]) & (q_cams != golden["gallery_camids"])
    counted = int(matches.any(dim=1).sum())
    assert 0 < counted < len(q_pids)  # or this would prove nothing
    assert evaluate_golden(golden).num_queries == counted


# ---- By hand


def test_average_precision_of_a_ranking_worked_out_by_hand():
    # By similarity: 0.9 same person and camera (left out), 0.8 other, 0.7 match, 0.6 junk (left out), 0.5 other,
    # 0.4 match. Kept: other, match, other, match. AP = (1/2 + 2/4) / 2, the first match at rank 2.
    gallery = line([0.4, 0.9, 0.5, 0.6, 0.8, 0.7])
    result = evaluate(line([1.0]), gallery, [7], [7, 7, 3, -1, 2, 7], [1], [2, 1, 1, 2, 2, 3], max_rank=5)
    assert result.mAP == 0.5
    assert result.mINP == 2 / 4  # 2 matches, the last at rank 4
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]
    assert result.num_queries == 1


def test_map_and_cmc_are_means_over_the_counted_queries():
    # Query 0: match first, AP 1. Query 1: match at rank 3, AP 1/3. Query 2: its person is not in the gallery.
    gallery = line([0.9, 0.8, 0.7])
    result = evaluate(line([1, 1, 1]), gallery, [1, 3, 9], [1, 2, 3], [0, 0, 0], [1, 1, 1], max_rank=3)
    assert result.mAP == pytest.approx((1 + 1 / 3) / 2, abs=1e-12)
    assert result.cmc.tolist() == [0.5, 0.5, 1.0]
    assert result.num_queries == 2
    assert result.average_precision[:2].tolist() == pytest.approx([1, 1 / 3], abs=1e-15)
    assert result.average_precision.isnan().tolist() == [False, False, True]
    assert result.first_match.tolist() == [1, 3, 0]
    assert (result.rank1, result.rank(2), result.rank(3)) == (0.5, 0.5, 1.0)


def test_same_person_under_the_same_camera_is_left_out_but_others_of_that_camera_are_not():
    result = evaluate(line([1.0]), line([0.9, 0.8, 0.7]), [1], [1, 2, 1], [0], [0, 0, 1], max_rank=2)
    assert result.cmc.tolist() == [0, 1]  # the camera's person 2 stands before the match


@pytest.mark.parametrize("counts", ["_counts_by_row", "_counts_at_once"])
def test_equal_similarities_are_scored_in_the_order_of_the_gallery(counts, monkeypatch):
    monkeypatch.setattr(metrics, "_counts_by_row", getattr(metrics, counts))
    same = torch.ones(6, 3)
    # index 3 is left out by its camera, index 4 is junk: neither takes a rank
    result = evaluate(torch.ones(1, 3), same, [1], [2, 1, 3, 1, -1, 1], [0], [1, 1, 1, 0, 1, 1], max_rank=3)
    assert result.mAP == (1 / 2 + 2 / 4) / 2
    assert result.cmc.tolist() == [0, 1, 1]


@pytest.mark.parametrize("budget_mb", [256, ONE_ROW])
def test_copies_of_an_image_are_ranked_by_index_whatever_the_library_makes_of_them(budget_mb):
    # numpy's product gives equal columns other last bits, depending on where they stand
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(5, 24, generator=generator)[torch.arange(100) % 5]
    ranking = rank(torch.randn(40, 24, generator=generator), gallery, topk=100, budget_mb=budget_mb)
    assert (ranking.indices.view(40, 5, 20).diff(dim=2) == 5).all()


# ---- Data without cameras


def test_without_cameras_only_the_querys_own_image_is_left_out():
    # Images 0 and 2 are of person 1, 1 of person 2; each is a query against all three.
    gallery = line([1.0, 0.9, 0.6])
    alone = evaluate(gallery[[0, 2]], gallery, [1, 1], [1, 2, 1], own=[0, 2], max_rank=3)
    assert alone.average_precision.tolist() == [0.5, 0.5]  # of 0: 1, 2; of 2: 1, 0
    assert alone.first_match.tolist() == [2, 2]
    assert evaluate(gallery[[0, 2]], gallery, [1, 1], [1, 2, 1], max_rank=3).rank1 == 1.0  # each found itself


def test_a_query_that_is_not_in_the_gallery_has_no_own_image():
    gallery = line([1.0, 0.9, 0.6])
    result = evaluate(gallery[[0, 0]], gallery, [1, 1], [1, 2, 1], own=[-1, 0], max_rank=3)
    assert result.first_match.tolist() == [1, 2]


def test_the_own_image_is_left_out_beside_the_camera_and_whatever_its_label():
    # own row 0 bears another identity by mistake, row 1 is of the query's camera: the match at row 3 has rank 2
    gallery = line([1.0, 0.9, 0.8, 0.7])
    result = evaluate(line([1.0]), gallery, [1], [5, 1, 2, 1], [0], [1, 0, 1, 1], own=[0], max_rank=4)
    assert result.first_match.tolist() == [2]


def test_all_images_against_all_score_as_each_against_the_others(golden):
    x, pids = golden["gallery_features"][:60], golden["gallery_pids"][:60]
    result = evaluate(x, x, pids, pids, own=torch.arange(60))
    for i in range(60):
        others = torch.arange(60) != i
        if (pids[others] == pids[i]).any():
            one = evaluate(x[i : i + 1], x[others], pids[i : i + 1], pids[others])
            assert result.average_precision[i] == one.mAP
        else:
            assert result.average_precision[i].isnan()


def test_cmc_is_as_long_as_asked_for_even_when_the_gallery_is_shorter():
    result = evaluate(line([1.0]), line([0.9, 0.8]), [1], [2, 1], [0], [1, 1], max_rank=6)
    assert result.cmc.tolist() == [0, 1, 1, 1, 1, 1]


# ---- Properties


def test_scores_do_not_depend_on_the_order_of_the_gallery(golden):
    order = torch.randperm(len(golden["gallery_pids"]), generator=torch.Generator().manual_seed(0))
    permuted, result = evaluate_golden(golden, order), evaluate_golden(golden)
    assert permuted.mAP == pytest.approx(result.mAP, abs=1e-12)
    assert torch.equal(permuted.cmc, result.cmc)


@pytest.mark.parametrize("budget_mb", [ONE_ROW, 0.02, 1000])
def test_scores_do_not_depend_on_the_budget(golden, budget_mb):
    result = evaluate_golden(golden, budget_mb=budget_mb)
    assert result.mAP == pytest.approx(golden["mAP"].item(), abs=1e-12)
    assert torch.equal(result.cmc, golden["cmc"])
    assert result.num_queries == evaluate_golden(golden).num_queries


@pytest.mark.parametrize("seed", range(5))
def test_distractors_never_raise_map_or_cmc(golden, seed):
    noise = torch.randn(100, 16, generator=torch.Generator().manual_seed(seed))
    count = torch.zeros(100, dtype=torch.int64)
    more = dict(golden)
    for name, rows in (("features", noise), ("pids", count), ("camids", count)):
        more[f"gallery_{name}"] = torch.cat([golden[f"gallery_{name}"], rows])
    crowded, result = evaluate_golden(more), evaluate_golden(golden)
    assert crowded.mAP < result.mAP
    assert (crowded.cmc <= result.cmc).all()
    assert crowded.num_queries == result.num_queries


def test_junk_is_ignored_wherever_it_ranks(golden):
    copies = {f"gallery_{k}": golden[f"query_{k}"] for k in ("features", "camids")}  # as near as can be
    copies["gallery_pids"] = torch.full_like(golden["query_pids"], -1)
    junk = {k: torch.cat([v, golden[k]]) for k, v in copies.items()}
    result = evaluate_golden({**golden, **junk})
    assert result.mAP == golden["mAP"].item()
    assert torch.equal(result.cmc, golden["cmc"])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("counts", ["_counts_by_row", "_counts_at_once"])
def test_scores_are_those_of_a_stable_sort_where_many_similarities_are_equal(seed, counts, monkeypatch):
    monkeypatch.setattr(metrics, "_counts_by_row", getattr(metrics, counts))
    rng = np.random.default_rng(seed)
    query, gallery = rng.integers(-1, 2, (20, 3)).astype(np.float32), rng.integers(-1, 2, (70, 3)).astype(np.float32)
    q_pids, g_pids = rng.integers(0, 4, 20), rng.integers(-1, 4, 70)
    q_cams, g_cams = rng.integers(0, 3, 20), rng.integers(0, 3, 70)
    distances = ((query[:, None] - gallery) ** 2).sum(axis=2)
    expected, first = np.full(20, NAN), np.zeros(20, dtype=int)
    for q in range(20):
        order = np.argsort(distances[q], kind="stable")
        kept = order[(g_pids[order] != -1) & ~((g_pids[order] == q_pids[q]) & (g_cams[order] == q_cams[q]))]
        ranks = np.flatnonzero(g_pids[kept] == q_pids[q]) + 1
        if len(ranks):
            expected[q], first[q] = (np.arange(1, len(ranks) + 1) / ranks).mean(), ranks[0]
    ids = torch.tensor(q_pids), torch.tensor(g_pids), torch.tensor(q_cams), torch.tensor(g_cams)
    descriptors = torch.from_numpy(query), torch.from_numpy(gallery)
    for budget_mb in (256, ONE_ROW):
        result = evaluate(*descriptors, *ids, metric="euclidean", budget_mb=budget_mb)
        np.testing.assert_allclose(result.average_precision, expected, rtol=0, atol=1e-15)
        assert result.first_match.tolist() == first.tolist()
    assert evaluate_distances(torch.from_numpy(distances), *ids).first_match.tolist() == first.tolist()


def test_features_that_tell_persons_apart_score_one():
    pids = np.repeat(np.arange(6), 4)
    camids = np.tile(np.arange(4), 6)
    perfect, is_query = torch.eye(6)[pids], camids == 0
    result = evaluate(
        perfect[is_query], perfect[~is_query], pids[is_query], pids[~is_query], camids[is_query], camids[~is_query]
    )
    assert (result.mAP, result.rank1, result.num_queries) == (1.0, 1.0, 6)
    assert result.cmc.eq(1).all()


def test_ids_may_be_lists_arrays_or_tensors(golden):
    ids = [golden[k] for k in ("query_pids", "gallery_pids", "query_camids", "gallery_camids")]
    features = golden["query_features"], golden["gallery_features"]
    for convert in (Tensor.tolist, Tensor.numpy, Tensor.clone):
        assert evaluate(*features, *map(convert, ids)).mAP == golden["mAP"].item()


# ---- Descriptors that are not finite


def broken(x: Tensor, rows: list[int], value: float = NAN) -> Tensor:
    """The descriptors with one number of these rows replaced."""
    x = x.clone()
    x[rows, 1] = value
    return x


@pytest.mark.parametrize("value", [NAN, torch.inf, 1e30])  # 1e30: finite, while its square is not
def test_images_whose_descriptor_is_not_finite_are_left_out_and_counted(golden, value):
    names = ("features", "pids", "camids")
    (query, *q), (gallery, *g) = ([golden[f"{split}_{k}"].float() for k in names] for split in ("query", "gallery"))
    lost_q, lost_g = [0, 7], [3, 50, 51, 120]
    kept_q, kept_g = (torch.tensor([i for i in range(len(x)) if i not in lost])
                      for x, lost in ((query, lost_q), (gallery, lost_g)))  # fmt: skip
    labels = [x.long() for pair in zip(q, g, strict=True) for x in pair]
    kept = [x[k].long() for pair in zip(q, g, strict=True) for x, k in zip(pair, (kept_q, kept_g), strict=True)]
    given, clean = (broken(query, lost_q, value), broken(gallery, lost_g, value)), (query[kept_q], gallery[kept_g])
    reranked, reranked_clean = rerank(*given, metric="euclidean"), rerank(*clean, metric="euclidean")
    for result, expected in (
        (evaluate(*given, *labels, metric="euclidean"), evaluate(*clean, *kept, metric="euclidean")),
        (evaluate_distances(reranked, *labels), evaluate_distances(reranked_clean, *kept)),
        (evaluate_distances(reranked.dense(), *labels), evaluate_distances(reranked_clean, *kept)),
        (evaluate_distances(reranked.dense().nan_to_num(posinf=NAN), *labels, budget_mb=ONE_ROW),
         evaluate_distances(reranked_clean, *kept)),
    ):  # fmt: skip
        assert (result.mAP, result.mINP, result.num_queries) == (expected.mAP, expected.mINP, expected.num_queries)
        assert torch.equal(result.cmc, expected.cmc)
        assert torch.equal(result.first_match[kept_q], expected.first_match)
        assert not result.first_match[lost_q].any()
        assert (result.num_not_finite, expected.num_not_finite) == (6, 0)
    assert "num_not_finite=6" in repr(result)


@pytest.mark.parametrize("function", [rank, evaluate, rerank, roc, open_set])
@pytest.mark.parametrize("kind", ["query", "gallery"])
def test_nothing_finite_is_refused(function, kind):
    x = {"query": line([1.0, 0.5]), "gallery": line([0.9, 0.4, 0.3])}
    x[kind] = x[kind] * NAN
    labels = [] if function in (rank, rerank) else [[1, 2], [1, 2, 3]]
    count = len(x[kind])
    with pytest.raises(ValueError, match=f"none of the {count} {kind} descriptors is finite: there is nothing to comp"):
        function(x["query"], x["gallery"], *labels)
    if function is evaluate:
        with pytest.raises(ValueError, match="none of the 2 query descriptors is finite"):
            evaluate_distances(torch.full((2, 3), torch.inf), *labels)


def test_where_the_only_match_is_not_finite_the_count_is_named():
    with pytest.raises(
        ValueError, match=r"are their identities disjoint\?; 1 descriptors that are not finite are left"
    ):
        evaluate(line([1.0]), broken(line([0.9, 0.4]), [0]), [1], [1, 2])


def test_a_single_distance_that_is_nan_is_refused_and_infinity_ranks_last():
    distances = torch.tensor([[0.1, 0.2, NAN], [0.3, 0.1, 0.4]])
    labels = [1, 2], [2, 1, 2]
    for budget_mb in (256, ONE_ROW):
        with pytest.raises(ValueError, match="the distance of query 0 and gallery image 2 is NaN; expected a number"):
            evaluate_distances(distances, *labels, budget_mb=budget_mb)
    result = evaluate_distances(distances.nan_to_num(nan=torch.inf), [1, 2], [2, 3, 1])
    assert (result.first_match.tolist(), result.num_not_finite) == ([3, 2], 0)


# ---- Arrays


def _read_only(x: Tensor) -> np.ndarray:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "convert",
    [
        Tensor.numpy,
        Tensor.tolist,
        _read_only,
        lambda x: x.double().numpy(),
        lambda x: x.numpy().astype(">f4"),
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.flip(0).numpy()[::-1],  # torch has no negative strides
        lambda x: x.clone().requires_grad_(),
    ],
)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_arrays_give_what_tensors_give(convert, metric):
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(6, 8, generator=generator), torch.randn(20, 8, generator=generator)
    pids = [0, 1, 2, 3, 8, 9], [i % 4 for i in range(20)]
    expected, arrays = (query, gallery), (convert(query), convert(gallery))
    for function in (evaluate, roc, open_set):
        assert str(function(*arrays, *pids, metric=metric)) == str(function(*expected, *pids, metric=metric))
    ranking = rank(*arrays, topk=3, metric=metric)
    assert torch.equal(ranking.indices, rank(*expected, topk=3, metric=metric).indices)
    assert torch.equal(rank(arrays[0][0], arrays[1], 3, metric).indices, ranking.indices[:1])
    assert torch.equal(rank(arrays[1], arrays[1], 1, metric).indices[:, 0], torch.arange(20))
    distances = rerank(*arrays, k1=5, metric=metric).dense()
    assert torch.equal(distances, rerank(*expected, k1=5, metric=metric).dense())
    if convert is not _read_only:
        assert evaluate_distances(convert(distances), *pids).mAP == evaluate_distances(distances, *pids).mAP


def test_float16_arrays_are_compared_in_float32():
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(rank(x.numpy(), x.numpy()).similarities, rank(x.float(), x.float()).similarities)


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (np.array([["a.jpg", "b.jpg"]]), "expected a tensor or an array of numbers, got an array of <U5"),
        ([[1.0, 2.0], [1.0]], "expected a tensor or an array of numbers: .*inhomogeneous"),
        (np.zeros((1, 3)), r"expected descriptors \[Q, C\] and \[G, C\], G > 0; got \(1, 3\) and \(4, 2\)"),
        (np.zeros((1, 2), complex), "got an array of complex128"),
        (torch.zeros(1, 2, dtype=torch.complex64), "a dense tensor of real numbers, got .* strided, complex64"),
        (torch.zeros(1, 2).to_sparse(), "a dense tensor of real numbers, got .* sparse_coo, float32"),
        (torch.zeros(1, 2, device="meta"), "a dense tensor of real numbers, got .* meta"),
        (np.ma.masked_array(np.ones((1, 2)), mask=[[0, 1]]), "expected an array without a mask"),
    ],
)
def test_what_is_no_array_of_descriptors_is_refused(query, reason):
    for function in (rank, rerank, lambda q, g: evaluate(q, g, [1], [1, 2, 1, 3])):
        with pytest.raises(ValueError, match=reason):
            function(query, np.zeros((4, 2)))


# ---- rank


def test_rank_gives_the_indices_and_cosines_of_the_nearest_first():
    ranking = rank(line([1.0]), line([0.2, 0.9, -0.5, 0.6]), topk=3)
    assert ranking.indices.tolist() == [[1, 3, 0]]
    assert torch.allclose(ranking.similarities, torch.tensor([[0.9, 0.6, 0.2]]), atol=1e-6)


@pytest.mark.parametrize("budget_mb", [ONE_ROW, 0.05, 1000])
def test_rank_agrees_with_the_official_distances_whatever_the_budget(golden, budget_mb):
    ranking = rank(golden["query_features"], golden["gallery_features"], topk=200, budget_mb=budget_mb)
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


def test_rank_refuses_queries_that_are_not_finite_with_their_rows():
    queries = broken(line([0.1 * i for i in range(9)]), [1, 2, 3, 5, 6, 8])
    with pytest.raises(
        ValueError, match=r"6 query descriptors are not finite and cannot be ranked, in rows 1, 2, 3, 5,"
    ):
        rank(queries, line([0.9]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rank_takes_any_floating_type_and_compares_in_float32(dtype):
    ranking = rank(line([1.0]).to(dtype), line([0.2, 0.9, 0.6]).to(dtype), topk=3)
    assert ranking.indices.tolist() == [[1, 2, 0]]
    assert ranking.similarities.dtype == torch.float32


def test_rank_and_evaluate_leave_their_arguments_as_they_are(golden):
    before = {k: v.clone() for k, v in golden.items()}
    rank(golden["query_features"], golden["gallery_features"])
    evaluate_golden(golden)
    assert all(torch.equal(before[k], v) for k, v in golden.items())


# ---- Errors


@pytest.mark.parametrize(
    ("query", "gallery"), [((2, 3), (4, 5)), ((2, 3), (0, 3)), ((2, 3), (3,)), ((2, 2, 3), (4, 3)), ((5,), (4, 3))]
)
def test_shapes_that_do_not_match_are_refused_with_both_shapes(query, gallery):
    with pytest.raises(ValueError, match=r"expected descriptors \[Q, C\] and \[G, C\]") as e:
        rank(torch.zeros(query), torch.zeros(gallery))
    assert str(gallery) in str(e.value)


@pytest.mark.parametrize("budget_mb", [0, -1, NAN])
def test_a_budget_of_nothing_is_refused(golden, budget_mb):
    with pytest.raises(ValueError, match="budget_mb must be more than 0 MB"):
        evaluate_golden(golden, budget_mb=budget_mb)


def test_cameras_of_one_side_only_are_refused_by_name(golden):
    features = golden["query_features"], golden["gallery_features"]
    with pytest.raises(ValueError, match="gallery_camids is missing: give the cameras of both queries and gallery"):
        evaluate(*features, golden["query_pids"], golden["gallery_pids"], golden["query_camids"])


@pytest.mark.parametrize("row", [-2, 3])
def test_an_own_image_outside_the_gallery_is_refused(row):
    with pytest.raises(ValueError, match=r"own must hold rows of the gallery, 0 to 2, or -1"):
        evaluate(torch.eye(3), torch.eye(3), [1, 1, 1], [1, 1, 1], own=[0, 1, row])


def test_ranks_beyond_the_curve_are_refused(golden):
    with pytest.raises(ValueError, match="rank must be 1 to 5"):
        evaluate_golden(golden, max_rank=5).rank(6)


def test_ids_that_are_no_whole_numbers_are_refused(golden):
    with pytest.raises(ValueError, match="query_pids must hold whole numbers, got float32"):
        evaluate_golden({**golden, "query_pids": golden["query_pids"].float()})


@pytest.mark.parametrize(
    ("count", "message"), [(0, "1 or more, got 0"), (-1, "1 or more, got -1"), (2.5, r"a whole number, got 2\.5")]
)
def test_counts_that_are_no_whole_number_of_one_or_more_are_refused_by_name(count, message):
    x = torch.eye(4)
    with pytest.raises(ValueError, match=f"topk must be {message}"):
        rank(x, x, topk=count)
    with pytest.raises(ValueError, match=f"max_rank must be {message}"):
        evaluate(x, x, [1, 1, 2, 2], [1, 1, 2, 2], own=range(4), max_rank=count)
    with pytest.raises(ValueError, match=f"k2 must be {message}"):
        rerank(x, x, k2=count)


def test_a_count_may_be_numpys():
    assert rank(torch.eye(4), torch.eye(4), topk=np.int64(2)).indices.shape == (4, 2)


def test_unknown_cameras_are_refused_but_of_junk():
    x, pids = line([1.0, 0.9, 0.8]), [1, 1, -1]
    for measure in (evaluate, roc, open_set):
        with pytest.raises(
            ValueError, match="query_camids holds 1 cameras below 0: unknown cameras cannot be compared"
        ):
            measure(x[:1], x, [1], pids, [-1], [0, 1, 0])
        with pytest.raises(ValueError, match="gallery_camids holds 2 cameras below 0"):
            measure(x[:1], x, [1], pids, [0], [-1, -1, 0])
    assert evaluate(x[:1], x, [1], pids, [0], [0, 1, -1]).rank1 == 1
    assert evaluate(x[:1], x, [1], [1, 1, 0], [0], [0, 1, -1]).rank1 == 1  # of a distractor no camera is compared


@pytest.mark.parametrize("wrong", ["query_pids", "gallery_pids", "query_camids", "gallery_camids"])
def test_ids_of_another_number_are_refused_by_name(golden, wrong):
    with pytest.raises(ValueError, match=f"{wrong} must hold one entry per image"):
        evaluate_golden({**golden, wrong: golden[wrong][:-1]})


def test_data_of_one_camera_is_refused_with_the_likely_cause():
    with pytest.raises(ValueError, match=r"is this data of a single camera.* leave the cameras out"):
        evaluate(torch.eye(2), torch.eye(2), [1, 2], [1, 2], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="besides its own image: are their identities disjoint"):
        evaluate(torch.eye(2), torch.eye(2), [1, 2], [1, 2], own=[0, 1])


def test_junk_queries_have_no_matches():
    result = evaluate(line([1, 1]), line([0.9, 0.8]), [-1, 1], [-1, 1], max_rank=2)
    assert result.first_match.tolist() == [0, 1]


def test_euclidean_ranks_by_distance_and_agrees_with_cosine_on_unit_vectors():
    generator = torch.Generator().manual_seed(0)
    query, gallery = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    ranking = rank(query, gallery, topk=40, metric="euclidean")
    distances = torch.cdist(query, gallery)
    assert torch.equal(ranking.indices, distances.argsort(dim=1, stable=True))
    torch.testing.assert_close(-ranking.similarities, distances.sort(dim=1).values.square(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(ranking.indices, rank(query, gallery, topk=40).indices)
    units = [torch.nn.functional.normalize(x, dim=1) for x in (query, gallery)]
    assert torch.equal(rank(*units, topk=40, metric="euclidean").indices, rank(*units, topk=40).indices)
    with pytest.raises(ValueError, match="'cosine' or 'euclidean', got 'l1'"):
        rank(query, gallery, metric="l1")


# ---- Numerics


@pytest.mark.parametrize(("offset", "dtype"), [(300.0, torch.float32), (1e4, torch.float64), (1e6, torch.float64)])
def test_a_common_offset_does_not_change_distances(offset, dtype):
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (6, 40))
    expected = torch.cdist(query, gallery).square().float()
    gallery = torch.cat([gallery, torch.full((1, 16), NAN, dtype=torch.float64)])  # no part of the mean
    ranking = rank((query + offset).to(dtype), (gallery + offset).to(dtype), topk=40, metric="euclidean")
    distances = torch.empty(6, 40).scatter_(1, ranking.indices, -ranking.similarities)
    torch.testing.assert_close(distances, expected, rtol=1e-4, atol=2e-3)


def test_a_common_offset_does_not_change_the_scores(golden):
    shifted = {k: v.double() + 1e4 if k.endswith("features") else v for k, v in golden.items()}
    assert evaluate_golden(shifted, metric="euclidean").mAP == pytest.approx(
        evaluate_golden(golden, metric="euclidean").mAP, abs=1e-6
    )


@pytest.mark.parametrize("scale", [1e-14, 1e-20, 1e-30])
def test_cosines_do_not_depend_on_the_scale_however_small(golden, scale):
    query, gallery = golden["query_features"], golden["gallery_features"]
    expected = rank(query, gallery, topk=5)
    for scaled in (rank(scale * query, scale * gallery), rank(query, scale * gallery), rank(scale * query, gallery)):
        torch.testing.assert_close(scaled.similarities, expected.similarities, rtol=0, atol=1e-5)
    scaled, whole = rerank(scale * query, scale * gallery).dense(), rerank(query, gallery).dense()
    torch.testing.assert_close(scaled, whole, rtol=0, atol=1e-4)


def test_descriptors_of_zeros_have_the_cosine_zero():
    assert rank(torch.zeros(1, 2), line([0.5, 0.9]), topk=2).similarities.tolist() == [[0, 0]]
    assert rank(line([0.5]), torch.zeros(2, 2), topk=2).similarities.tolist() == [[0, 0]]
