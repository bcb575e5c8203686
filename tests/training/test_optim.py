"""Parameter groups of fine-tuning: factors of learning rate and weight decay."""

import pytest
import timm
import torch

from passreid_models.reid.model import ReIDModel
from passreid_models.training.optim import grad_norm, make_grouped_optimizer, set_learning_rates


@pytest.fixture(scope="module")
def model() -> ReIDModel:
    return ReIDModel(timm.create_model("test_pass_vit", neck="multi"), 5)


def scales(model: ReIDModel, optimizer: str = "sgd", **options: float) -> dict[str, tuple[float, float]]:
    """Factor of the learning rate, that of biases included, and weight decay of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_grouped_optimizer(model, model.backbone, optimizer, 0.9, 0.2, **options).param_groups
    return {names[id(p)]: (g["lr_scale"] * g["bias_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_every_trained_parameter_is_in_one_group_and_decays(model):
    factors = scales(model)
    assert set(factors) == {n for n, p in model.named_parameters() if p.requires_grad}
    folded = ("backbone.cls_token", "backbone.reg_token")
    assert all(v == ((2.0, 0.1) if n in folded else (1.0, 0.2)) for n, v in factors.items())


def test_biases_have_their_own_factor(model):
    factors = scales(model, bias_lr=3.0)
    assert factors["backbone.blocks.1.attn.qkv.bias"] == (3.0, 0.2)
    assert factors["backbone.blocks.1.attn.qkv.weight"] == factors["classifier.weight"] == (1.0, 0.2)


def test_layer_decay_falls_from_block_to_block(model):
    factors = {n: v[0] for n, v in scales(model, layer_decay=0.5).items()}
    assert [factors[f"backbone.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert factors["backbone.norm.weight"] == 0.5  # as timm counts: with the last block
    assert factors["classifier.weight"] == factors["backbone.fc_norm.bn.weight"] == 1
    assert factors["backbone.patch_embed.proj.weight"] == factors["backbone.pos_embed"] == 0.0625
    assert factors["backbone.cls_token"] == 2 * 0.0625


def test_adamw_has_the_learning_rates_of_sgd_and_decays_no_vector(model):
    options = {"bias_lr": 3.0, "layer_decay": 0.5}
    ours, sgd = scales(model, "adamw", **options), scales(model, "sgd", **options)
    ndim = {n: p.ndim for n, p in model.named_parameters()}
    assert ours == {n: (lr, decay if ndim[n] > 1 else 0.0) for n, (lr, decay) in sgd.items()}
    optimizer = make_grouped_optimizer(model, model.backbone, "adamw", 0.8, 0.2)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {g["betas"] for g in optimizer.param_groups} == {(0.8, 0.999)}


def test_a_folded_token_moves_as_far_as_token_and_position_together(model):
    torch.manual_seed(0)
    token, position, gradient = torch.randn(3, 1, 1, 8)
    pair = [torch.nn.Parameter(token.clone()), torch.nn.Parameter(position.clone())]
    folded = torch.nn.Parameter(token + position)
    for parameters, lr, decay in ((pair, 0.1, 0.4), ([folded], 0.2, 0.2)):
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
        for _ in range(3):
            for p in parameters:
                p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(folded.data, pair[0].data + pair[1].data)


def test_each_group_gets_the_learning_rate_of_its_factor(model):
    optimizer = make_grouped_optimizer(model, model.backbone, "sgd", 0.9, 0.1, bias_lr=2.0, layer_decay=0.5)
    set_learning_rates(optimizer, lambda bias: 1 + bias)  # a floor of 1, which only biases feel
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert (rates["classifier.weight"], rates["backbone.blocks.2.mlp.fc1.weight"]) == (2, 0.5 * 2)
    assert (rates["backbone.blocks.2.mlp.fc1.bias"], rates["backbone.cls_token"]) == (0.5 * 3, 2 * 0.0625 * 2)


def test_the_norm_is_that_of_all_gradients():
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert grad_norm([a, b, c]).item() == 5
