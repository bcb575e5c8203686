"""Pseudo-labels: official values, a dense implementation of the method, and edge cases."""

import logging
import sys

import numpy as np
import plain
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from passreid_models.reid.pseudo_labels import cluster_features, jaccard_distances
from tests import GOLDEN


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "clustering.safetensors")


def dense(graph) -> np.ndarray:
    """Dense distances; those that are not stored are 1."""
    graph = graph.tocoo()
    distances = np.ones(graph.shape, dtype=np.float32)
    distances[graph.row, graph.col] = graph.data
    return distances


def persons(seed: int, count: int, width: int = 12, noise: float = 0.7) -> Tensor:
    """Descriptors of persons with some 8 images each."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(1, count // 8), width))
    x = centres[rng.integers(0, len(centres), count)] + noise * rng.standard_normal((count, width))
    return torch.from_numpy(x).float()


def corners(seed: int, count: int) -> Tensor:
    """Descriptors of +-1 in 16 variants, so that products are exact and ties frequent."""
    x = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], (count, 4))).float()
    return torch.cat([x, x, x, x], dim=1)  # of length 4


def same_groups(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the names of the groups, outliers (-1) being no group."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist())) and all((x == -1) == (y == -1) for x, y in pairs)


# ---- Official values


def test_distances_are_those_of_the_official_code(golden):
    distances = dense(jaccard_distances(golden["features"]))
    assert np.abs(distances - golden["jaccard_distance"].numpy()).max() < 1e-5


def test_labels_are_those_of_the_official_code(golden):
    assert same_groups(cluster_features(golden["features"]), golden["dbscan_labels_eps0.6"].numpy())


@pytest.mark.parametrize("fusion", ["cat", "mean"])
def test_multi_neck_features_are_clustered_as_they_come_as_in_the_official_code(fusion):
    with safe_open(GOLDEN / f"clustering_multi_{fusion}.safetensors", "pt") as file:
        settings, golden = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    k1, k2, eps, min_samples = (float(settings[name]) for name in ("k1", "k2", "eps", "min_samples"))
    assert (golden["features"].norm(dim=1) - 1).abs().min() > 0.05
    graph = jaccard_distances(golden["features"], int(k1), int(k2), metric="euclidean")
    assert np.abs(dense(graph) - golden["jaccard"].numpy()).max() < 1e-5
    labels = cluster_features(golden["features"], eps, int(min_samples), int(k1), int(k2), "euclidean")
    assert same_groups(labels, golden["labels"].numpy())
    normalised = dense(jaccard_distances(golden["features"], int(k1), int(k2)))
    assert np.abs(normalised - golden["jaccard"].numpy()).max() > 0.1  # what normalising first would give


@pytest.mark.parametrize("scale", [3.0, 30.0, 300.0])
def test_the_weights_of_long_raw_descriptors_do_not_overflow(scale):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        graph = jaccard_distances(persons(3, 60) * scale, 10, 1, metric="euclidean")
    assert np.isfinite(graph.data).all()
    assert graph.nnz > 60  # not only the diagonal


def test_the_dense_implementation_of_the_benchmark_is_the_official_one(golden):
    distances = plain.plain_jaccard(golden["features"].numpy(), 30, 6)
    assert np.abs(distances - golden["jaccard_distance"].numpy()).max() < 1e-5


# ---- Against the dense implementation


@pytest.mark.parametrize(("count", "k1", "k2"), [(100, 30, 6), (60, 10, 1), (60, 5, 9), (40, 2, 3), (30, 1, 1)])
@pytest.mark.parametrize("make", [persons, corners])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_distances_are_the_dense_ones(seed, make, count, k1, k2):
    x = make(seed, count)
    graph = jaccard_distances(x, k1, k2)
    assert np.abs(dense(graph) - plain.plain_jaccard(x.numpy(), k1, k2)).max() < 1e-5


@pytest.mark.parametrize("count", [2, 3, 17, 29])
def test_with_fewer_images_than_neighbours_all_are_taken_with_a_warning(count, caplog):
    x = persons(0, count)
    with caplog.at_level(logging.WARNING):
        graph = jaccard_distances(x)
    assert f"clustering of {count} images: k1 is {count} instead of 30" in caplog.text
    assert np.abs(dense(graph) - plain.plain_jaccard(x.numpy(), count, 6)).max() < 1e-5


@pytest.mark.parametrize("noise", [0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_labels_are_those_of_dbscan_on_the_dense_distances(seed, noise):
    from sklearn.cluster import DBSCAN

    x = persons(seed, 200, noise=noise)
    expected = DBSCAN(eps=0.5, min_samples=4, metric="precomputed").fit_predict(plain.plain_jaccard(x.numpy(), 20, 6))
    assert expected.max() > 3  # or this would prove little
    assert same_groups(cluster_features(x, eps=0.5, k1=20), expected)


# ---- Properties


@pytest.mark.parametrize("eps", [0.05, 0.4, 0.8])
def test_eps_leaves_out_the_larger_distances_and_no_others(golden, eps):
    whole, limited = (jaccard_distances(golden["features"], eps=e).tocoo() for e in (None, eps))
    kept = whole.data <= eps
    assert 240 <= kept.sum() < whole.nnz
    assert np.array_equal(limited.row, whole.row[kept])
    assert np.array_equal(limited.col, whole.col[kept])
    assert np.array_equal(limited.data, whole.data[kept])


def test_the_graph_is_symmetric_with_a_stored_zero_for_each_image_itself(golden):
    graph = jaccard_distances(golden["features"])
    assert (graph != graph.T).nnz == 0
    coo = graph.tocoo()
    diagonal = coo.row == coo.col
    assert diagonal.sum() == 240
    assert (coo.data[diagonal] == 0).all()
    assert coo.data.min() >= 0
    assert coo.data.max() < 1


@pytest.mark.parametrize("budget_mb", [1e-6, 0.2])
def test_distances_do_not_depend_on_the_budget(budget_mb):
    whole, parts = (jaccard_distances(persons(5, 80), budget_mb=b) for b in (256, budget_mb))
    assert np.abs(dense(whole) - dense(parts)).max() < 1e-6


def test_lengths_and_types_of_descriptors_do_not_matter(golden):
    x = golden["features"]
    scaled = x * torch.linspace(0.1, 5, len(x))[:, None]
    expected = dense(jaccard_distances(x))
    for features in (scaled, x.double(), x.numpy(), x.numpy().tolist(), x.clone().requires_grad_()):
        assert np.abs(dense(jaccard_distances(features)) - expected).max() < 1e-5


def test_the_order_of_images_does_not_matter():
    x = persons(4, 160)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0)).numpy()
    distances, permuted = dense(jaccard_distances(x)), dense(jaccard_distances(x[order]))
    assert np.abs(permuted - distances[np.ix_(order, order)]).max() < 1e-5


def test_clusters_count_from_0_in_the_order_of_their_first_images():
    x = torch.cat([torch.eye(3)[[2, 0, 1]].repeat(6, 1), -torch.ones(1, 3)])
    x = x + 0.01 * torch.randn(19, 3, generator=torch.Generator().manual_seed(0))
    labels = cluster_features(x, k1=6, k2=2)
    assert labels.tolist() == [0, 1, 2] * 6 + [-1]


def test_persons_far_apart_are_found():
    pids = torch.arange(12).repeat(10)
    centres = 5 * torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    x = centres[pids] + torch.randn(120, 32, generator=torch.Generator().manual_seed(1))
    assert same_groups(cluster_features(x, k1=10), pids.numpy())


# ---- Edges


def test_copies_of_one_image_are_one_cluster():
    assert cluster_features(torch.ones(50, 8)).tolist() == [0] * 50


@pytest.mark.parametrize(("count", "labels"), [(0, []), (1, [-1]), (3, [-1, -1, -1])])
def test_too_few_images_for_a_cluster_are_outliers(count, labels):
    assert cluster_features(persons(0, 3)[:count]).tolist() == labels
    assert jaccard_distances(persons(0, 3)[:count]).shape == (count, count)


def test_images_without_similar_ones_are_all_outliers():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert set(cluster_features(x, eps=0.05, k1=5, k2=1).tolist()) == {-1}


# ---- Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k1": 0}, "k1 must be 1 or more, got 0"),
        ({"k2": -1}, "k2 must be 1 or more, got -1"),
        ({"eps": 0}, "eps must be between 0 and 1, a Jaccard distance; got 0"),
        ({"eps": 1.0}, r"eps must be between 0 and 1, a Jaccard distance; got 1\.0"),
        ({"min_samples": 0}, "min_samples must be 1 or more, got 0"),
        ({"budget_mb": 0}, "budget_mb must be more than 0 MB"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        cluster_features(persons(0, 40), **options)


def test_descriptors_of_another_shape_are_refused_with_their_shape():
    with pytest.raises(ValueError, match=r"expected descriptors \[N, C\], got \(2, 3, 4\)"):
        cluster_features(torch.zeros(2, 3, 4))


def test_unreadable_images_are_refused_with_the_first_row():
    x = persons(0, 40)
    x[[7, 9], 3] = float("nan")
    with pytest.raises(ValueError, match="descriptors of 2 images are not finite, the first in row 7"):
        cluster_features(x)


@pytest.mark.parametrize(("module", "name"), [("scipy.sparse", "scipy"), ("sklearn.cluster", "scikit-learn")])
def test_a_missing_library_is_named_with_what_to_install(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'need.? {name}: pip install "\.\[reid\]"'):
        cluster_features(persons(0, 40))
