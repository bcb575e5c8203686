"""Triplet loss and cluster memory: official values, cases worked out by hand, and properties of any batch."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from passreid_models.reid.losses import ClusterMemory, batch_hard_triplet
from tests import GOLDEN


@pytest.fixture(scope="module")
def triplet() -> dict[str, Tensor]:
    return load_file(GOLDEN / "triplet.safetensors")


@pytest.fixture(scope="module", params=["hard", "mean"])
def memory(request) -> tuple[str, dict[str, Tensor]]:
    return request.param, load_file(GOLDEN / f"cluster_memory_{request.param}.safetensors")


# ---- Triplets


def test_soft_margin_loss_and_gradient_are_the_official_ones(triplet):
    features = triplet["features"].clone().requires_grad_()
    loss = batch_hard_triplet(features, triplet["labels"])
    loss.backward()
    torch.testing.assert_close(loss, triplet["soft_margin_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(features.grad, triplet["soft_margin_grad"], rtol=1e-5, atol=1e-7)


def test_loss_with_a_margin_is_the_official_one(triplet):
    loss = batch_hard_triplet(triplet["features"], triplet["labels"], margin=0.3)
    torch.testing.assert_close(loss, triplet["margin0.3_loss"], rtol=1e-6, atol=0)


def test_a_batch_on_a_line_worked_out_by_hand():
    # 0 and 1 are of one person, 5 and 9 of another: farthest positives 1 1 4 4, nearest negatives 5 4 4 8
    features, pids = torch.tensor([[0.0], [1.0], [5.0], [9.0]]), torch.tensor([3, 3, 8, 8])
    gaps = torch.tensor([1 - 5, 1 - 4, 4 - 4, 4 - 8.0])
    torch.testing.assert_close(batch_hard_triplet(features, pids), gaps.exp().log1p().mean())
    torch.testing.assert_close(batch_hard_triplet(features, pids, margin=3.5), torch.tensor([0, 0.5, 3.5, 0]).mean())


def test_the_order_of_the_batch_does_not_matter(triplet):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    loss = batch_hard_triplet(triplet["features"][order], triplet["labels"][order])
    torch.testing.assert_close(loss, triplet["soft_margin_loss"], rtol=1e-6, atol=0)


def test_an_identity_with_one_image_is_its_own_positive():
    features, pids = torch.tensor([[0.0], [2.0], [3.0]]), torch.tensor([0, 1, 1])
    gaps = torch.tensor([0 - 2.0, 1 - 2, 1 - 3])
    torch.testing.assert_close(batch_hard_triplet(features, pids), F.softplus(gaps).mean(), rtol=1e-5, atol=0)


def test_equal_images_have_a_finite_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(features, torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad.isfinite().all()


def test_a_batch_of_one_identity_is_refused():
    with pytest.raises(ValueError, match="a batch of one identity has no negatives"):
        batch_hard_triplet(torch.eye(3), torch.zeros(3, dtype=torch.int64))


# ---- Cluster memory


def test_loss_gradient_and_memory_are_the_official_ones(memory):
    mode, golden = memory
    inputs = golden["inputs"].clone().requires_grad_()
    cluster_memory = ClusterMemory(golden["memory_before"], temp=0.05, momentum=0.2, mode=mode)
    loss = cluster_memory(inputs, golden["targets"])
    loss.backward()
    cluster_memory.update(inputs, golden["targets"])
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(inputs.grad, golden["grad_inputs"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(cluster_memory.centroids, golden["memory_after"], rtol=1e-5, atol=1e-7)


def test_an_update_changes_neither_its_input_nor_other_clusters(memory):
    mode, golden = memory
    before = golden["memory_before"].clone()
    cluster_memory = ClusterMemory(golden["memory_before"], mode=mode)
    cluster_memory.update(golden["inputs"], golden["targets"])
    untouched = [k for k in range(len(before)) if k not in golden["targets"]]
    assert untouched
    assert torch.equal(cluster_memory.centroids[untouched], before[untouched])
    assert torch.equal(golden["memory_before"], before)


def test_hard_takes_the_least_similar_sample_of_a_cluster():
    cluster_memory = ClusterMemory(torch.tensor([[1.0, 0.0]]), momentum=0.5)
    cluster_memory.update(torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(cluster_memory.centroids, torch.tensor([[0.5, 0.5]]) / 0.5**0.5)


def test_mean_takes_every_sample_in_turn():
    cluster_memory = ClusterMemory(torch.tensor([[1.0, 0.0]]), momentum=0.0, mode="mean")
    cluster_memory.update(torch.tensor([[0.0, 2.0], [3.0, 0.0], [4.0, 3.0]]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(cluster_memory.centroids, torch.tensor([[0.8, 0.6]]))  # with no momentum the last alone


def test_the_length_of_features_does_not_matter(memory):
    mode, golden = memory
    long, usual = (ClusterMemory(golden["memory_before"], mode=mode) for _ in range(2))
    inputs, scales = golden["inputs"], torch.linspace(0.1, 9, 12)[:, None]
    torch.testing.assert_close(long(inputs * scales, golden["targets"]), usual(inputs, golden["targets"]))
    long.update(inputs * scales, golden["targets"])
    usual.update(inputs, golden["targets"])
    torch.testing.assert_close(long.centroids, usual.centroids)


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be 'hard' or 'mean', got 'median'"):
        ClusterMemory(torch.eye(2), mode="median")
