"""Projection heads: initial values as published, unit lengths, gains, and the older layout of their weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_models.pretrain.heads import ProjectionHead


def make(norm_last_layer: bool = True) -> ProjectionHead:
    torch.manual_seed(0)
    return ProjectionHead(12, num_prototypes=40, hidden_dim=20, bottleneck_dim=8, norm_last_layer=norm_last_layer)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def large() -> ProjectionHead:
    """Enough weights for their distribution to show: 384 to 512 to 512 to 256 to 1,024."""
    torch.manual_seed(0)
    return ProjectionHead(384, num_prototypes=1024, hidden_dim=512)


# ---- Initial values


def test_the_published_sizes_are_the_defaults():
    with torch.device("meta"):
        head = ProjectionHead(384)
    shapes = [tuple(layer.weight.shape) for layer in head.mlp[::2]]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]
    assert head.last_layer.parametrizations.weight.original1.shape == (65536, 256)
    assert head.last_layer.bias is None
    assert [type(layer) for layer in head.mlp[1::2]] == [torch.nn.GELU] * 2


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_the_mlp_starts_normal_of_std_002_with_biases_of_zero(large, layer):
    weight, bias = large.mlp[layer].weight, large.mlp[layer].bias
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=2e-4)
    within = torch.tensor([(weight.abs() < k * 0.02).float().mean() for k in (1, 2, 3)])
    torch.testing.assert_close(within, torch.tensor([0.6827, 0.9545, 0.9973]), rtol=0, atol=0.005)  # of a normal
    assert not bias.any()


def test_the_directions_of_the_last_layer_start_uniform_between_plus_and_minus_a_sixteenth(large):
    v = large.last_layer.parametrizations.weight.original1
    assert 0.999 / 16 < v.max().item() <= 1 / 16
    assert -1 / 16 <= v.min().item() < -0.999 / 16
    assert v.std().item() == pytest.approx(3**-0.5 / 16, rel=0.01)
    assert (v.abs() < 1 / 32).float().mean().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("frozen", [True, False])
def test_gains_start_at_one_and_learn_only_without_norm_last_layer(tokens, frozen):
    head = make(norm_last_layer=frozen)
    gain, direction = (getattr(head.last_layer.parametrizations.weight, f"original{i}") for i in (0, 1))
    assert gain.shape == (40, 1)
    assert gain.eq(1).all()
    head(tokens).square().mean().backward()
    assert gain.requires_grad is (not frozen)
    assert (gain.grad is None) == frozen
    assert direction.grad.any()
    assert all(p.grad.any() for p in head.mlp.parameters())


# ---- Outputs


def test_features_have_length_one_whatever_the_length_of_the_tokens(tokens):
    for scale in (0.01, 1, 100):
        features = make().features(scale * tokens)
        assert features.shape == (3, 5, 8)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 5))


def test_prototypes_have_length_one_whatever_the_length_of_the_directions():
    head = make()
    before = head.prototypes
    assert before.shape == (40, 8)
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(40))
    with torch.no_grad():
        head.last_layer.parametrizations.weight.original1 *= torch.linspace(0.1, 9, 40)[:, None]
    torch.testing.assert_close(head.prototypes, before)


def test_trained_gains_are_the_lengths_of_the_prototypes():
    head = make(norm_last_layer=False)
    with torch.no_grad():
        head.last_layer.parametrizations.weight.original0 += torch.linspace(0, 3, 40)[:, None]
    torch.testing.assert_close(head.prototypes.norm(dim=-1), torch.linspace(1, 4, 40))


@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 5, 12), (2, 3, 5, 12)])
def test_logits_are_the_cosines_of_features_and_prototypes(shape):
    head, x = make(), torch.randn(shape)
    logits = head(x)
    assert logits.shape == (*shape[:-1], 40)
    torch.testing.assert_close(logits, head.features(x) @ head.prototypes.T)
    assert logits.abs().max() <= 1 + 1e-6


# ---- State dicts


def old_layout(head: ProjectionHead) -> dict[str, Tensor]:
    """With the names that torch.nn.utils.weight_norm gave, gain and direction."""
    new = "last_layer.parametrizations.weight.original"
    names = {f"{new}0": "last_layer.weight_g", f"{new}1": "last_layer.weight_v"}
    return {names.get(k, k): v for k, v in head.state_dict().items()}


def test_state_dicts_of_the_older_weight_norm_load_as_they_are(tokens):
    old = {k: torch.randn_like(v) for k, v in old_layout(make()).items()}
    head = make()
    assert not any(head.load_state_dict(dict(old)))  # nothing missing, nothing unexpected
    weight = old["last_layer.weight_g"] * F.normalize(old["last_layer.weight_v"], dim=1)
    torch.testing.assert_close(head.prototypes, weight)
    torch.testing.assert_close(head(tokens), head.features(tokens) @ weight.T)


@pytest.mark.parametrize("frozen", [True, False])
def test_loading_leaves_frozen_gains_frozen_and_others_not(frozen):
    head = make(norm_last_layer=frozen)
    head.load_state_dict(old_layout(make()))
    assert head.last_layer.parametrizations.weight.original0.requires_grad is (not frozen)


def test_a_head_loads_its_own_state_dict(tokens):
    head, other = make(), make()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(tokens), head(tokens))
