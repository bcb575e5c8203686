"""Parameter groups, clipping and the teacher's average, against their definitions parameter by parameter."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import Tensor, nn

from passreid_models.pretrain.network import PASSNetwork
from passreid_models.pretrain.optim import clip_gradients, make_optimizer, update_teacher
from passreid_models.training.optim import set_hyperparameters

MODELS = {
    "pass": ("pass_vit_small_patch16", {}),
    "one part": ("pass_vit_small_patch16", {"num_parts": 1}),
    "no parts": ("transreid_vit_small_patch16", {}),
    "conv stem": ("pass_vit_small_ics_patch16", {}),
    "gains learn": ("pass_vit_small_patch16", {}),
}
models = pytest.mark.parametrize("model", MODELS)


def network(model: str = "pass", seed: int = 0) -> PASSNetwork:
    torch.manual_seed(seed)
    name, options = MODELS[model]
    backbone = timm.create_model(name, embed_dim=16, depth=1, num_heads=2, img_size=(32, 16), **options)
    return PASSNetwork(backbone, 12, 8, 4, norm_last_layer=model != "gains learn")


def with_gradients(net: PASSNetwork) -> PASSNetwork:
    """Random gradients of very different norms, from 0.01 to 100."""
    generator = torch.Generator().manual_seed(1)
    params = [p for p in net.parameters() if p.requires_grad]
    for p, scale in zip(params, torch.logspace(-2, 2, len(params))[torch.randperm(len(params))], strict=True):
        direction = torch.randn(p.shape, generator=generator)
        p.grad = scale * direction / direction.norm()
    if net.backbone.reg_token is not None:
        net.backbone.reg_token.grad *= torch.logspace(-1, 1, net.backbone.num_parts)[:, None]
    return net


def gradients(net: PASSNetwork) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


# ---- Groups


@models
def test_every_trainable_parameter_is_in_exactly_one_group(model):
    net = network(model)
    ids = [id(p) for group in make_optimizer(net).param_groups for p in group["params"]]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {id(p) for p in net.parameters() if p.requires_grad}
    gains = [p for name, p in net.named_parameters() if name.endswith("original0")]
    assert len(gains) == net.backbone.num_prefix_tokens
    assert {id(p) in ids for p in gains} == {model == "gains learn"}


@models
def test_biases_and_norms_do_not_decay_and_folded_tokens_move_twice_as_far(model):
    net = network(model)
    factors = {
        id(p): (group["lr_scale"], group["wd_scale"])
        for group in make_optimizer(net).param_groups
        for p in group["params"]
    }
    names = set()
    for name, p in net.named_parameters():
        if p.requires_grad:
            if name in ("backbone.cls_token", "backbone.reg_token"):
                expected = (2.0, 0.5)
            elif name.endswith(".bias") or "norm" in name or ".conv.7." in name:  # BatchNorm of the conv stem
                expected = (1.0, 0.0)
            else:
                expected = (1.0, 1.0)
            assert factors[id(p)] == expected, name
            names.add(name)
    assert {"backbone.cls_token", "backbone.pos_embed", "heads.0.last_layer.parametrizations.weight.original1"} <= names
    assert ("backbone.reg_token" in names) == (model != "no parts")
    assert ("backbone.patch_embed.proj.conv.1.instance_norm.weight" in names) == (model == "conv stem")


def test_learning_rate_and_weight_decay_are_shared_out_by_the_factors():
    optimizer = make_optimizer(network())
    set_hyperparameters(optimizer, 0.3, 0.04)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.3, 0.04), (0.3, 0.0), (0.6, 0.02)]
    set_hyperparameters(optimizer, 0.1, 0.4)  # anew, not on top
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.4), (0.1, 0.0), (0.2, 0.2)]


def test_a_folded_token_moves_as_token_and_position_do_together():
    net = network()
    folded = {"cls": net.backbone.cls_token, "parts": net.backbone.reg_token}
    pairs = {k: [nn.Parameter(0.3 * p.detach()), nn.Parameter(0.7 * p.detach())] for k, p in folded.items()}
    ours = make_optimizer(net)
    theirs = torch.optim.AdamW([p for pair in pairs.values() for p in pair])
    for step in range(20):
        lr, weight_decay = 1e-3 * (1 + step), 0.04 * (1 + step)
        set_hyperparameters(ours, lr, weight_decay)
        theirs.param_groups[0].update(lr=lr, weight_decay=weight_decay)
        torch.manual_seed(step)
        for k, p in folded.items():
            p.grad = torch.randn_like(p)
            for q in pairs[k]:
                q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for k, p in folded.items():
        torch.testing.assert_close(p, pairs[k][0] + pairs[k][1], rtol=1e-5, atol=1e-6)


# ---- Clipping


def pieces(net: PASSNetwork) -> list[Tensor]:
    """Gradients by upstream's parameters, of which each part token is one."""
    grads = []
    for name, grad in gradients(net).items():
        grads += list(grad[0]) if name == "backbone.reg_token" else [grad]
    return grads


def clipped_by_torch(grads: list[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    total = nn.utils.clip_grad_norm_(params, max_norm)
    return [p.grad for p in params], total


@models
@pytest.mark.parametrize("max_norm", [0.05, 3.0])
def test_each_parameter_is_clipped_on_its_own_as_torch_clips_it(model, max_norm):
    net = with_gradients(network(model))
    expected = [clipped_by_torch([g], max_norm)[0][0] for g in pieces(net)]
    before = [g.norm() for g in pieces(net)]
    clip_gradients(net, max_norm)
    after = [g.norm() for g in pieces(net)]
    for ours, theirs in zip(pieces(net), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert any(n > max_norm for n in before)
    assert any(n < max_norm for n in before)
    for n, m in zip(before, after, strict=True):
        assert m == pytest.approx(min(n.item(), max_norm), rel=1e-4)


def test_rows_of_the_part_tokens_are_clipped_one_by_one():
    net = with_gradients(network())
    grad = torch.zeros_like(net.backbone.reg_token)
    grad[0, :, 0] = torch.tensor([1.0, 4.0, 30.0])
    net.backbone.reg_token.grad = grad
    clip_gradients(net, 3.0)
    torch.testing.assert_close(grad[0, :, 0], torch.tensor([1.0, 3.0, 3.0]), rtol=1e-6, atol=0)
    assert not grad[0, :, 1:].any()


@models
def test_the_norm_of_all_gradients_is_clipped_as_torch_does(model):
    net = with_gradients(network(model))
    names = list(gradients(net))
    expected, total = clipped_by_torch(list(gradients(net).values()), 3.0)
    returned = clip_gradients(net, 3.0, "norm")
    torch.testing.assert_close(returned, total, rtol=1e-5, atol=0)
    for name, theirs in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients(net)[name], theirs, rtol=1e-5, atol=0)
    assert torch.cat([g.flatten() for g in pieces(net)]).norm() == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("by", ["parameter", "norm"])
@pytest.mark.parametrize("max_norm", [0, 0.0, 1e6])
def test_zero_and_norms_out_of_reach_clip_nothing(by, max_norm):
    net = with_gradients(network())
    before = deepcopy(gradients(net))
    clip_gradients(net, max_norm, by)
    assert all(torch.equal(g, before[name]) for name, g in gradients(net).items())


@pytest.mark.parametrize("by", ["parameter", "norm"])
@pytest.mark.parametrize("max_norm", [0.0, 3.0])
def test_the_norm_before_clipping_is_returned(by, max_norm):
    net = with_gradients(network())
    expected = torch.cat([g.flatten() for g in gradients(net).values()]).norm()
    torch.testing.assert_close(clip_gradients(net, max_norm, by), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("by", ["parameter", "norm"])
def test_gradients_of_zero_stay_zero_and_parameters_without_one_are_left_out(by):
    net = with_gradients(network())
    net.backbone.pos_embed.grad = None
    net.backbone.cls_token.grad.zero_()
    assert clip_gradients(net, 0.5, by).isfinite()
    assert net.backbone.pos_embed.grad is None
    assert not net.backbone.cls_token.grad.any()


# ---- Teacher


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 1.0])
@pytest.mark.parametrize("model", ["pass", "conv stem"])
def test_the_teacher_is_the_moving_average_of_all_parameters_and_of_no_buffer(model, momentum):
    student, teacher = network(model), network(model, seed=1).requires_grad_(False)
    for buffer in student.buffers():
        buffer.fill_(7)
    before = {who: deepcopy(net.state_dict()) for who, net in (("student", student), ("teacher", teacher))}
    update_teacher(teacher.parameters(), student.parameters(), momentum)
    params = dict(teacher.named_parameters())
    for name, value in teacher.state_dict().items():
        old, new = before["teacher"][name], before["student"][name]
        if name in params:
            torch.testing.assert_close(value, momentum * old + (1 - momentum) * new, rtol=1e-5, atol=1e-7, msg=name)
        else:
            assert torch.equal(value, old), name
    assert (len(params) < len(before["teacher"])) == (model == "conv stem")
    assert all(torch.equal(v, before["student"][k]) for k, v in student.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_momentum_one_keeps_the_teacher_and_zero_gives_the_student_to_the_last_bit():
    def same(a: PASSNetwork, b: PASSNetwork) -> bool:
        return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

    student, teacher, old = network(), network(seed=1), network(seed=1)
    update_teacher(teacher.parameters(), student.parameters(), 1.0)
    assert same(teacher, old)
    assert not same(teacher, student)
    update_teacher(teacher.parameters(), student.parameters(), 0.0)
    assert same(teacher, student)
