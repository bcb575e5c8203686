"""timm's contract over every registered model, and what PASS adds to a Vision Transformer.

Models are two blocks deep and 64 wide here, with weights large enough that every token matters to every other.
"""

import copy
import io
import pickle
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import Attention
from timm.models import create_feature_extractor, get_graph_node_names, save_for_hf
from timm.models.vision_transformer import Block, ResPostBlock
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from passreid_models import pass_vit
from passreid_models.architectures import ARCHITECTURES
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.checkpoints.zoo import list_weights
from passreid_models.embed import Embedder
from passreid_models.layers import IBN, ConvStem, MultiNeck, SingleNeck, fuse_tokens, prefix_block, resample_positions
from passreid_models.pass_vit import PassVisionTransformer
from tests import GOLDEN

NAMES = list(ARCHITECTURES)
STEMS = ["pass_vit_small_patch16", "pass_vit_small_ics_patch16"]
KINDS = [*STEMS, "transreid_vit_small_patch16", "transreid_vit_small_ics_patch16"]  # all others differ in size alone
TINY = dict(embed_dim=64, depth=2, num_heads=2, img_size=(64, 32))
WIDTH = {"cat": 128, "mean": 64, "parts": 256, "token": 64, "": 64}  # of 64-wide tokens with 3 parts
NECKS = ("", "single", "multi")
NAME_NECKS = [(name, "") for name in KINDS] + [(name, neck) for name in STEMS for neck in NECKS[1:]]

# embed_dim, depth, num_heads, num_parts, conv stem, image size, parameters in millions
FROZEN = {
    "pass_vit_tiny_patch16": (192, 12, 3, 3, False, (256, 128), 5.51),
    "pass_vit_small_patch16": (384, 12, 6, 3, False, (256, 128), 21.64),
    "pass_vit_base_patch16": (768, 12, 12, 3, False, (256, 128), 85.75),
    "pass_vit_small_ics_patch16": (384, 12, 6, 3, True, (256, 128), 23.00),
    "pass_vit_base_ics_patch16": (768, 12, 12, 3, True, (256, 128), 88.39),
    "transreid_vit_small_patch16": (384, 12, 6, 0, False, (256, 128), 21.64),
    "transreid_vit_small_ics_patch16": (384, 12, 6, 0, True, (256, 128), 23.00),
    "transreid_vit_base_ics_patch16": (768, 12, 12, 0, True, (256, 128), 88.39),
    "test_pass_vit": (64, 3, 2, 3, False, (64, 32), 0.20),
}


def create(name: str = "pass_vit_small_patch16", lively: bool = True, **kwargs) -> PassVisionTransformer:
    """A two-block model in eval mode; ``lively`` weights make every token and position count."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, **kwargs})
    if lively:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.2 * torch.randn(p.shape, generator=generator)
            for m in model.modules():
                if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                    m.running_mean.copy_(torch.randn(m.num_features, generator=generator))
                    m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
    return model.eval()


def images(batch: int = 2, size: tuple[int, int] = (64, 32), channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(2))


def pools(name: str) -> tuple[str, ...]:
    return tuple(WIDTH) if ARCHITECTURES[name].num_parts else ("token", "")


NAME_POOLS = [(name, pool) for name in KINDS for pool in pools(name)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the largest value, and neither NaN nor all zero."""
    assert actual.shape == expected.shape
    assert expected.isfinite().all()
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def weighted_sum(out: Tensor) -> Tensor:
    """A loss that no normalisation makes constant."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


# ---- Names and weights


@pytest.mark.parametrize("name", NAMES)
def test_names_sizes_and_heads_are_frozen(name):
    model = timm.create_model(name, device="meta")
    stem = isinstance(model.patch_embed, ConvStem)
    size = tuple(model.patch_embed.img_size)
    heads = {block.attn.num_heads for block in model.blocks}
    millions = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    assert len(heads) == 1
    assert (model.embed_dim, len(model.blocks), *heads, model.num_parts, stem, size, millions) == FROZEN[name]
    assert model.blocks[0].mlp.fc1.out_features == 4 * model.embed_dim
    assert model.blocks[0].attn.qkv.bias is not None
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-6
    assert model.pos_embed.shape[1] == size[0] * size[1] // 256  # patches alone


def test_the_registry_holds_these_models_and_no_other():
    assert set(timm.list_models(module="pass_vit")) == set(FROZEN) == set(NAMES)


def test_a_tag_of_384x128_gives_a_model_of_that_size_and_a_user_may_choose_another():
    model = timm.create_model("pass_vit_small_patch16.lup_market1501_384", device="meta")
    assert tuple(model.patch_embed.grid_size) == (24, 8)
    model = timm.create_model("pass_vit_small_patch16", img_size=(384, 128), device="meta")
    assert model.pos_embed.shape == (1, 192, 384)


# ---- Forward and backward


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_neither_outputs_nor_gradients(name):
    model, x = create(name), images()
    expected = model(x), model.forward_views(x)
    expected_gradients = [gradients(model, weighted_sum(out)) for out in expected]
    model.set_grad_checkpointing()
    for out, same, grads in zip((model(x), model.forward_views(x)), expected, expected_gradients, strict=True):
        assert_close(out, same)
        for key, grad in gradients(model, weighted_sum(out)).items():
            torch.testing.assert_close(grad, grads[key], rtol=1e-4, atol=1e-5, msg=key)


def test_gradient_checkpointing_keeps_fewer_activations_of_views_too():
    model, x = create(), images()

    def saved(forward) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward(x)
        return count

    plain = saved(model), saved(model.forward_views)
    model.set_grad_checkpointing()
    assert saved(model) < plain[0] / 2
    assert saved(model.forward_views) < plain[1] / 2


@pytest.mark.parametrize(("name", "pool"), NAME_POOLS)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_every_trainable_parameter_gets_a_gradient(name, pool, num_classes):
    model = create(name, global_pool=pool, num_classes=num_classes).train()
    for key, grad in gradients(model, weighted_sum(model(images(4)))).items():
        assert grad.isfinite().all(), key
        assert grad.abs().max() > 0, key


@pytest.mark.parametrize("neck", ["single", "multi"])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_every_trainable_parameter_gets_a_gradient_through_a_neck(neck, num_classes):
    model = create(neck=neck, num_classes=num_classes).train()
    grads = gradients(model, weighted_sum(model(images(4))))
    assert "fc_norm.bn.weight" in grads
    assert "fc_norm.bn.bias" not in grads  # not trained in re-ID necks
    for key, grad in grads.items():
        assert grad.isfinite().all(), key
        assert grad.abs().max() > 0, key


# ---- Widths, heads, pools


@pytest.mark.parametrize(("name", "pool"), NAME_POOLS)
@pytest.mark.parametrize("neck", NECKS)
def test_widths_are_as_declared_before_and_after_reset_classifier(name, pool, neck):
    model, x = create(name, global_pool=pool, neck=neck, num_classes=5), images()
    features = model.forward_features(x)
    rows = (features.shape[1],) if pool == "" else ()
    assert features.shape == (2, 1 + model.num_parts + 8, model.num_features)
    assert model.head_hidden_size == WIDTH[pool]
    assert model.forward_head(features, pre_logits=True).shape == (2, *rows, model.head_hidden_size)
    assert model(x).shape == (2, *rows, 5)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, *rows, model.head_hidden_size)
    assert_close(model(x), model.forward_head(features, pre_logits=True), 1e-6)


@pytest.mark.parametrize("new", WIDTH)
@pytest.mark.parametrize("old", WIDTH)
@pytest.mark.parametrize("neck", ["", "multi"])
def test_reset_classifier_changes_the_fusion(old, new, neck):
    model, x = create(global_pool=old, neck=neck), images()
    model.reset_classifier(7, global_pool=new)
    model.head.weight.data.normal_()
    fresh = create(global_pool=new, neck=neck)
    assert model.global_pool == new
    assert model.head_hidden_size == model.head.in_features == WIDTH[new]
    if old:  # a neck lost to '' comes back untrained
        assert_close(model.forward_head(model.forward_features(x), pre_logits=True), fresh(x))
    assert model(x).shape[-1] == 7
    assert model(x).ndim == (2 if new else 3)


@pytest.mark.parametrize("neck", ["single", "multi"])
def test_a_model_pooled_again_has_its_neck_again(neck):
    model, x = create(neck=neck), images()
    keys = set(model.state_dict())
    model.reset_classifier(0, global_pool="")
    assert not any(key.startswith("fc_norm") for key in model.state_dict())
    model.reset_classifier(0, global_pool="cat")
    assert set(model.state_dict()) == keys
    tokens = model.forward_features(x)[:, :4]
    untrained = tokens / (1 + 1e-5) ** 0.5
    if neck == "multi":
        expected = fuse_tokens(F.normalize(untrained, dim=-1), "cat")
    else:
        expected = F.normalize(fuse_tokens(untrained, "cat"), dim=-1)
    assert_close(model(x), expected)


@pytest.mark.parametrize(("own", "other"), [("cat", "mean"), ("mean", "token")])  # also one of the same width
def test_a_single_neck_is_of_its_fusion(own, other, tmp_path):
    model = create(neck="single", global_pool=own)
    message = f"single neck is of the fusion '{own}', and not of '{other}'"
    with pytest.raises(ValueError, match=message):
        model.reset_classifier(0, global_pool=other)
    assert (model.global_pool, model(images()).shape) == (own, (2, WIDTH[own]))
    save_pretrained(model, tmp_path / "model")
    saved = partial(timm.create_model, f"local-dir:{tmp_path}/model", pretrained=True)
    assert torch.equal(saved(global_pool=own).eval()(images()), model(images()))
    with pytest.raises(ValueError, match=message):
        saved(global_pool=other)
    assert saved(global_pool=other, neck="").global_pool == other
    args = {"neck": "single", "global_pool": own}
    save_for_hf(model, str(tmp_path / "timm's"), model_args=args, safe_serialization=True)
    with pytest.raises(ValueError, match=message):
        timm.create_model(f"local-dir:{tmp_path}/timm's", pretrained=True, global_pool=other)


@pytest.mark.parametrize("name", NAMES)
def test_first_conv_and_classifier_of_the_cfg_exist(name):
    model = create(name, num_classes=5)
    keys = model.state_dict().keys()
    assert model.pretrained_cfg["first_conv"] + ".weight" in keys
    assert model.pretrained_cfg["classifier"] + ".weight" in keys
    first = model.get_submodule(model.pretrained_cfg["first_conv"])
    assert isinstance(first, nn.Conv2d)
    assert first.in_channels == 3
    assert model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    assert model.get_classifier().out_features == 5


@pytest.mark.parametrize("name", NAMES)
def test_the_default_fusion_is_cat_with_parts_and_token_without(name):
    model, x = create(name), images()
    assert model.global_pool == ("cat" if model.num_parts else "token")
    assert create(name, num_parts=0).global_pool == "token"
    assert model(x).shape == (2, 128 if model.num_parts else 64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(global_pool="avg"), "global_pool must be one of .*got 'avg'"),
        (dict(num_parts=0, global_pool="cat"), "global_pool='cat' needs part tokens"),
        (dict(num_parts=0, global_pool="parts"), "global_pool='parts' needs part tokens"),
        (dict(num_parts=-1), "num_parts must be 0 or more, got -1"),
        (dict(neck="double"), "neck must be one of .*got 'double'"),
    ],
)
def test_bad_constructor_arguments_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(**kwargs)


def test_reset_classifier_refuses_unknown_and_impossible_fusions():
    with pytest.raises(ValueError, match="global_pool must be one of"):
        create().reset_classifier(0, "avg")
    with pytest.raises(ValueError, match="needs part tokens"):
        create("transreid_vit_small_patch16").reset_classifier(0, "cat")


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_the_number_of_parts_is_free(num_parts):
    model = create(num_parts=num_parts, global_pool="parts")
    assert model.reg_token.shape == (1, num_parts, 64)
    assert model(images()).shape == (2, (1 + num_parts) * 64)


# ---- Fusion and necks


def test_fusion_of_a_hand_computed_case():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [6.0, 3.0], [0.0, 9.0]]])  # g, l1, l2, l3; m = (3, 4)
    expected = {
        "cat": [1.0, 2.0, 3.0, 4.0],
        "mean": [2.0, 3.0],
        "parts": [1.0, 2.0, 3.0, 0.0, 6.0, 3.0, 0.0, 9.0],
        "token": [1.0, 2.0],
    }
    for fusion, vector in expected.items():
        assert fuse_tokens(tokens, fusion).tolist() == [vector]


@pytest.mark.parametrize("pool", ["cat", "mean", "parts", "token"])
@pytest.mark.parametrize("neck", NECKS)
def test_the_descriptor_is_neck_and_fusion_of_the_output_tokens(pool, neck):
    model, x = create(global_pool=pool, neck=neck), images()
    tokens = model.forward_features(x)[:, :4]
    if neck == "":
        expected = fuse_tokens(tokens, pool)
    elif neck == "single":
        bn = model.fc_norm.bn
        normed = (fuse_tokens(tokens, pool) - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
        normed = normed * bn.weight + bn.bias
        expected = normed / normed.norm(dim=1, keepdim=True)
    else:
        bn = model.fc_norm.bn
        stats = [t.reshape(4, 64) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
        normed = torch.stack(
            [
                (tokens[:, t] - m) / (v + bn.eps).sqrt() * w + b
                for t, (m, v, w, b) in enumerate(zip(*stats, strict=True))
            ],
            dim=1,
        )
        expected = fuse_tokens(normed / normed.norm(dim=2, keepdim=True), pool)
    assert_close(model(x), expected)


@pytest.mark.parametrize("name", KINDS)
def test_forward_parts_names_the_output_tokens(name):
    model, x = create(name), images()
    parts, tokens = model.forward_parts(x), model.forward_features(x)
    p = model.num_parts
    assert {k: tuple(v.shape) for k, v in parts.items()} == {"cls": (2, 64), "parts": (2, p, 64), "patches": (2, 8, 64)}
    assert torch.equal(torch.cat([parts["cls"][:, None], parts["parts"], parts["patches"]], dim=1), tokens)


# ---- Conv stem


def reference_ibn(ibn: IBN, x: Tensor, training: bool) -> Tensor:
    """InstanceNorm of the first 32 channels and BatchNorm of the others, written out."""
    a, b = x[:, :32], x[:, 32:]
    i, n = ibn.instance_norm, ibn.batch_norm
    a = (a - a.mean((2, 3), keepdim=True)) / (a.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    a = a * i.weight[:, None, None] + i.bias[:, None, None]
    mean = b.mean((0, 2, 3)) if training else n.running_mean
    var = b.var((0, 2, 3), unbiased=False) if training else n.running_var
    b = (b - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return torch.cat([a, b * n.weight[:, None, None] + n.bias[:, None, None]], dim=1)


@pytest.mark.parametrize("training", [False, True])
def test_ibn_is_instance_norm_on_the_first_half_and_batch_norm_on_the_other(training):
    torch.manual_seed(0)
    ibn = IBN(64).train(training)
    for t in (*ibn.parameters(), ibn.batch_norm.running_mean):
        t.data.normal_()
    ibn.batch_norm.running_var.uniform_(0.5, 2)
    x = 2 * torch.randn(3, 64, 6, 5) + 1
    expected = reference_ibn(copy.deepcopy(ibn), x, training)
    assert_close(ibn(x), expected)


def test_the_conv_stem_is_the_published_sequence_of_layers():
    model, x = create("pass_vit_small_ics_patch16"), images()
    conv, proj = model.patch_embed.proj.conv, model.patch_embed.proj.proj
    y = F.conv2d(x, conv[0].weight, stride=2, padding=3)
    y = F.relu(reference_ibn(conv[1], y, training=False))
    y = F.relu(reference_ibn(conv[4], F.conv2d(y, conv[3].weight, padding=1), training=False))
    bn = conv[7]
    y = F.conv2d(y, conv[6].weight, padding=1)
    y = F.relu(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias))
    assert y.shape == (2, 64, 32, 16)
    y = F.conv2d(y, proj.weight, proj.bias, stride=8).flatten(2).transpose(1, 2)
    assert_close(model.patch_embed(x), y)
    assert [tuple(m.weight.shape) for m in (conv[0], conv[3], conv[6], proj)] == [
        (64, 3, 7, 7),
        (64, 64, 3, 3),
        (64, 64, 3, 3),
        (64, 64, 8, 8),
    ]
    assert conv[0].bias is conv[3].bias is conv[6].bias is None


def test_the_conv_stem_refuses_other_patches():
    with pytest.raises(ValueError, match="patches of 16x16 pixels, got patch_size=8"):
        create("pass_vit_small_ics_patch16", patch_size=8)
    with pytest.raises(ValueError, match="patches of 16x16 pixels, got patch_size=8"):
        create("pass_vit_small_ics_patch16").set_input_size(patch_size=8)


# ---- Views


def reference_views(model: PassVisionTransformer, x: Tensor, part: int | None) -> Tensor:
    """Prefix tokens of views of one area (None: global), written out; positions resampled to the views' grid."""
    patches = model.patch_embed.proj(x)
    grid = tuple(patches.shape[-2:])
    pos = model.pos_embed.reshape(1, *model.patch_embed.grid_size, -1).permute(0, 3, 1, 2)
    if grid != tuple(model.patch_embed.grid_size):
        pos = F.interpolate(pos, size=grid, mode="bicubic", antialias=True, align_corners=False)
    patches = (patches + pos).flatten(2).transpose(1, 2)
    prefix = [model.cls_token[0]]
    if model.reg_token is not None:
        prefix += [model.reg_token[0] if part is None else model.reg_token[0, part : part + 1]]
    prefix = torch.cat(prefix)
    tokens = torch.cat([prefix.expand(len(x), -1, -1), patches], dim=1)
    for block in model.blocks:
        tokens = block(tokens)
    return model.norm(tokens)[:, : len(prefix)]


@pytest.mark.parametrize("name", KINDS)
def test_a_global_view_of_the_native_size_has_the_prefix_tokens_of_forward_features(name):
    model, x = create(name), images()
    assert_close(model.forward_views(x), model.forward_features(x)[:, : 1 + model.num_parts], 1e-6)


@pytest.mark.parametrize("name", STEMS)
def test_a_batch_of_local_views_of_mixed_areas_equals_one_by_one(name):
    model, x = create(name), images(5, (32, 16))
    areas = [2, 0, 1, 1, 0]
    batch = model.forward_views(x, torch.tensor(areas))
    assert batch.shape == (5, 2, 64)
    for i, area in enumerate(areas):
        assert_close(batch[i : i + 1], model.forward_views(x[i : i + 1], torch.tensor([area])))
        assert_close(batch[i : i + 1], reference_views(model, x[i : i + 1], area))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(32, 16), (64, 32), (32, 64), (96, 48), (16, 16)])
def test_views_of_any_size_take_positions_resampled_to_their_grid(name, size):
    model, x = create(name), images(2, size)
    # to rounding: the last block works on fewer tokens; a resampling at the native size would be 1000 times as far off
    assert_close(model.forward_views(x), reference_views(model, x, None))


@pytest.mark.parametrize(("name", "grid"), [("to_256x128", (16, 8)), ("to_128x64", (8, 4))])
def test_positions_are_resampled_as_in_the_official_pretraining_on_request(name, grid):
    golden = load_file(GOLDEN / "pos_resampling.safetensors")
    official = resample_positions(golden["pos_embed"], (16, 8), grid, "official")
    assert_close(official, golden[name], 1e-6)
    ours = resample_positions(golden["pos_embed"], (16, 8), grid, "antialiased")
    assert (ours - golden[name]).abs().max() > 1e-3
    assert (grid == (16, 8)) == torch.equal(ours, golden["pos_embed"])


def test_local_views_of_a_model_that_drops_patches_are_refused():
    model = create(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="patch_drop_rate drops patches beside CLS and all parts"):
        model.forward_views(images(), torch.tensor([0, 1]))
    assert model.forward_views(images()).shape == (2, 4, 64)


def test_views_take_the_rule_that_is_asked_for():
    model, x = create(), images(2, (32, 16))
    official = model.forward_views(x, pos_resampling="official")
    resampled = resample_positions(model.pos_embed, model.patch_embed.grid_size, (2, 1), "official")
    small = create(img_size=(32, 16))
    small.load_state_dict({**model.state_dict(), "pos_embed": resampled})
    assert_close(official, small.forward_views(x), 1e-5)
    assert (official - model.forward_views(x)).abs().max() > 1e-3


@pytest.mark.parametrize("dynamic", [False, True])
def test_local_views_of_the_native_size_carry_cls_and_their_part(dynamic):
    model, x = create(dynamic_img_size=dynamic), images()
    assert_close(model.forward_views(x, torch.tensor([1, 1])), reference_views(model, x, 1), 1e-6)


def test_views_send_gradients_only_to_the_parts_they_carry():
    model, x = create(), images(3, (32, 16))
    weighted_sum(model.forward_views(x, torch.tensor([2, 0, 2]))).backward()
    assert (model.reg_token.grad[0].abs().amax(dim=1) > 0).tolist() == [True, False, True]
    assert model.pos_embed.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "size", "part_index", "message"),
    [
        ("pass_vit_small_patch16", (40, 32), None, "40x32 pixels are not divisible by 16x16"),
        ("pass_vit_small_ics_patch16", (32, 24), None, "32x24 pixels are not divisible by 16x16"),
        ("pass_vit_small_patch16", (32, 16), [0], r"got shape \(1,\) for 2 views"),
        ("pass_vit_small_patch16", (32, 16), [[0], [1]], r"got shape \(2, 1\) for 2 views"),
        ("transreid_vit_small_patch16", (32, 16), [0, 0], "a model with 0 parts"),
    ],
)
def test_bad_views_are_refused(name, size, part_index, message):
    index = None if part_index is None else torch.tensor(part_index)
    with pytest.raises(ValueError, match=message):
        create(name).forward_views(images(2, size), index)


# ---- The last block: only what is read


BLOCKS = [
    dict(),
    dict(qkv_bias=True),
    dict(qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm),
    dict(init_values=0.5),
    dict(qkv_bias=True, drop_path=0.5),
    dict(scale_attn_norm=True, scale_mlp_norm=True, proj_bias=False),
    dict(gated=True),
    dict(attn_layer="diff"),
    dict(qkv_bias=True, qk_norm=True, init_values=0.5, drop_path=0.5),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", BLOCKS, ids=lambda options: "-".join(options) or "plain")
def test_the_prefix_of_a_block_equals_that_of_timm_with_its_gradients(options, fused):
    torch.manual_seed(0)
    block = Block(64, 2, **{k: v for k, v in options.items() if k != "gated"})
    if "gated" in options:
        block.attn = Attention(64, 2, gated=True)
    block.double()
    block.attn.fused_attn = fused
    for p in block.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    x = torch.randn(6, 12, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for forward in (lambda: block(x)[:, :4], lambda: prefix_block(block, x, 4)):
        torch.manual_seed(1)  # of drop path
        out = forward()
        inputs = {"x": x, **dict(block.named_parameters())}
        grads = torch.autograd.grad(weighted_sum(out), list(inputs.values()))
        results.append({"out": out, **dict(zip(inputs, grads, strict=True)), "next draw": torch.rand(1)})
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("pool", WIDTH)
@pytest.mark.parametrize("neck", NECKS)
def test_descriptors_and_gradients_equal_those_of_all_tokens(pool, neck):
    model, x = (
        create(global_pool=pool, neck=neck, drop_path_rate=0.5, init_values=0.5).double().train(),
        images(4).double(),
    )
    results = []
    for forward in (lambda: model.forward_head(model.forward_features(x)), lambda: model(x)):
        torch.manual_seed(1)
        out = forward()
        results.append({"out": out, **gradients(model, weighted_sum(out))})
    for key, expected in results[0].items():
        torch.testing.assert_close(results[1][key], expected, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", KINDS)
def test_forward_tokens_gives_the_first_tokens_of_forward_features(name):
    model, x = create(name), images()
    assert_close(model.forward_tokens(x), model.forward_features(x)[:, : 1 + model.num_parts], 1e-6)
    assert_close(model(x), model.forward_head(model.forward_features(x)), 1e-6)
    assert create(name, depth=0).forward_tokens(x).shape == (2, 1 + model.num_parts, 64)


def test_the_last_block_leaves_out_the_work_of_the_patches():
    model, x = create(), images(1)

    def products(forward) -> int:
        # FlopCounterMode hooks into all modules, which then compute all tokens
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], with_flops=True) as profile, torch.no_grad():
            forward(x)
        return sum(event.flops or 0 for event in profile.events() if event.name in ("aten::addmm", "aten::bmm")) // 2

    model.blocks[-1].attn.fused_attn = False  # or the counter overlooks the attention
    per_patch = (1 + 1 + 8) * 64**2 + 2 * 12 * 64  # queries, projection, MLP; logits and means of 12 tokens
    full = products(model.forward_features)
    assert full - products(model) == full - products(model.forward_views) == 8 * per_patch


@pytest.mark.parametrize(
    "where", ["norm", "blocks", "blocks.1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"]
)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_a_hook_in_the_last_block_or_on_the_norm_sees_all_tokens(where, kind):
    model, x, seen = create(), images(), []
    expected = model(x)
    handle = getattr(model.get_submodule(where), f"register_{kind}")(lambda module, inputs, *_: seen.append(inputs[0]))
    out = model(x)
    weighted_sum(out).backward()
    assert [tuple(t.shape[:2]) for t in seen] == [(2, 12)]
    assert_close(out, expected, 1e-6)
    handle.remove()
    model(x)
    assert len(seen) == 1


def test_what_replaces_the_container_of_the_blocks_is_called():
    class Halved(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model, x = create(), images()
    expected = model(x)
    model.blocks = torch.compile(model.blocks, backend="eager")
    assert_close(model(x), expected, 1e-6)
    model.blocks = Halved(*model.blocks._orig_mod)
    assert_close(model(x), model.forward_head(model.forward_features(x)), 1e-6)
    assert_close(model.forward_tokens(x), model.forward_features(x)[:, :4], 1e-6)


def test_what_replaces_a_part_of_the_last_block_is_used():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Doubled(Block):
        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            return 2 * super().forward(x, *args, **kwargs)

    def patch(model: PassVisionTransformer) -> None:
        forward = model.blocks[-1].attn.forward
        model.blocks[-1].attn.forward = lambda x, **kwargs: 2 * forward(x)

    def replace(model: PassVisionTransformer) -> None:
        model.blocks[-1].attn.qkv.__class__ = Scaled

    x = images()
    for model, change in (
        (create(), patch),
        (create(), replace),
        (create(block_fn=Doubled), None),
        (create(block_fn=ResPostBlock), None),
    ):
        before = model(x)
        if change:
            change(model)
            assert (model(x) - before).abs().max() > 1e-2
        assert_close(model(x), model.forward_head(model.forward_features(x)), 1e-6)


class MeanAdded(nn.Module):
    """A layer that mixes tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x + x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("where", ["norm", "blocks.1.norm2", "blocks.1.mlp", "blocks.1.mlp.act", "blocks.1.ls2"])
def test_a_layer_that_mixes_tokens_gets_all_tokens(where):
    model, x = create(), images()
    before = model(x)
    model.set_submodule(where, MeanAdded(model.get_submodule(where)))
    expected = model.forward_head(model.forward_features(x))
    assert (expected - before).abs().max() > 1e-2
    assert_close(model(x), expected, 1e-6)
    expected = model.forward_features(x)[:, :4]
    assert_close(model.forward_views(x), expected, 1e-6)


def all_tokens_features(self: PassVisionTransformer, x: Tensor, **kwargs) -> Tensor:
    return 2 * PassVisionTransformer.forward_features(self, x, **kwargs)


def all_tokens_head(self: PassVisionTransformer, x: Tensor, pre_logits: bool = False) -> Tensor:
    return PassVisionTransformer.forward_head(self, x, pre_logits) + x[:, 4:].mean()


def all_tokens_pool(self: PassVisionTransformer, x: Tensor, pool_type: str | None = None) -> Tensor:
    return x[:, 4:].mean(dim=1).repeat(1, 2)


@pytest.mark.parametrize("of_class", [True, False])
@pytest.mark.parametrize("method", [all_tokens_features, all_tokens_head, all_tokens_pool])
def test_an_overridden_method_is_used_with_all_tokens(method, of_class):
    model, x = create(), images()
    before, name = model(x), method.__name__.replace("all_tokens", "forward").replace("forward_pool", "pool")
    if of_class:
        model.__class__ = type("Own", (PassVisionTransformer,), {name: method})
    else:
        setattr(model, name, method.__get__(model))
    expected = model.forward_head(model.forward_features(x))
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(model(x), expected)
    assert_close(Embedder(model, "cpu")(x), F.normalize(expected, dim=-1), 1e-5)


def test_a_hook_on_all_modules_sees_the_last_block():
    model, seen = create(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(images())
    finally:
        handle.remove()
    assert [m for m in seen if isinstance(m, Block)] == list(model.blocks)


@pytest.mark.parametrize("neck", [SingleNeck(4 * 768, "parts"), MultiNeck(4, 768, "parts")], ids=NECKS[1:])
def test_a_neck_normalises_in_float32_and_an_overflow_there_is_no_zero(neck):
    neck, x = copy.deepcopy(neck).eval(), 1e4 * torch.randn(2, 4, 768, generator=torch.Generator().manual_seed(0))
    x = x if isinstance(neck, MultiNeck) else x.flatten(1)
    assert_close(neck.half()(x.half()).float(), F.normalize(x, dim=-1).flatten(1), 2e-3)  # lengths beyond float16
    neck.float()
    assert neck(1e20 * x).isnan().all()


def test_masks_reach_every_block():
    model, x, mask = create(), images(), torch.zeros(12, 12)
    mask[:, 5:] = -torch.inf
    for options in (dict(attn_mask=mask), dict(is_causal=True)):
        assert torch.equal(model(x, **options), model.forward_head(model.forward_features(x, **options)))
        assert (model(x, **options) - model(x)).abs().max() > 1e-2


def test_compiled_and_exported_models_equal_eager():
    model, x = create(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x), 1e-6)
    assert_close(torch.export.export(model, (x,)).module()(x), model(x), 1e-6)


# ---- Torchscript and fx

traced = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot trace timm's Attention")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("name", "pool"), [p for p in NAME_POOLS if p[0] in STEMS or p[1] in ("cat", "token")])
def test_torchscript_script_and_trace_equal_eager(name, pool):
    model, x = create(name, global_pool=pool), images()
    assert_close(torch.jit.script(model)(x), model(x), 1e-6)
    assert_close(torch.jit.trace(model, x)(x), model(x), 1e-6)


@pytest.mark.parametrize("neck", ["single", "multi"])
@pytest.mark.parametrize("pool", ["cat", "mean", ""])
def test_torchscript_of_a_neck_equals_eager(neck, pool):
    model, x = create(global_pool=pool, neck=neck, num_classes=5), images()
    scripted = torch.jit.script(model)
    assert_close(scripted(x), model(x), 1e-6)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), scripted(x))


def fx_model(model: nn.Module) -> nn.Module:
    train, evaluation = get_graph_node_names(model)
    assert train[-1] == evaluation[-1]
    return create_feature_extractor(model, {train[-1]: "out"})


@traced
@pytest.mark.parametrize(("name", "neck"), NAME_NECKS)
def test_fx_forward_and_torchscript_of_it_equal_eager(name, neck):
    model, x = create(name, neck=neck), images()
    graph = fx_model(model).eval()
    assert_close(graph(x)["out"], model(x), 1e-6)
    assert_close(torch.jit.script(graph)(x)["out"], model(x), 1e-6)


@traced
@pytest.mark.parametrize(("name", "neck"), NAME_NECKS)
def test_fx_backward_gives_the_gradients_of_eager(name, neck):
    model, x = create(name, neck=neck, num_classes=5).double().train(), images(4).double()
    expected = gradients(model, weighted_sum(model(x)))
    graph = fx_model(model).train()
    for key, grad in gradients(graph, weighted_sum(graph(x)["out"])).items():
        torch.testing.assert_close(grad, expected.pop(key), rtol=1e-9, atol=1e-9, msg=key)
    assert not expected


@traced
def test_fx_features_of_the_last_block_hold_all_tokens():
    model, x = create(), images()
    out = create_feature_extractor(model, {"blocks.1": "out"})(x)["out"]
    assert_close(model.norm(out), model.forward_features(x), 1e-6)


# ---- Features of inner layers


@pytest.mark.parametrize("name", KINDS)
def test_forward_intermediates_agree_with_forward_features(name):
    model, x = create(name), images()
    expected = model.forward_features(x)
    t = 1 + model.num_parts
    final, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, expected)
    assert [tuple(m.shape) for m in maps] == [(2, 64, 4, 2)] * 2
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), expected[:, t:])
    ((patches, prefix),) = model.forward_intermediates(
        x, indices=[1], norm=True, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )
    assert torch.equal(torch.cat([prefix, patches], dim=1), expected)
    stopped = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(stopped[0], model.forward_intermediates(x, intermediates_only=True)[0])


@pytest.mark.parametrize(("name", "neck"), NAME_NECKS)
def test_features_only_agrees_with_forward_intermediates(name, neck):
    model, x = create(name, neck=neck), images()
    features = create(name, neck=neck, lively=False, features_only=True, out_indices=(0, 1))
    features.model.load_state_dict({k: model.state_dict()[k] for k in features.model.state_dict()})
    assert features.feature_info.channels() == [64, 64]
    assert features.feature_info.reduction() == [16, 16]
    for a, b in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(a, b)


def test_features_by_a_graph_are_those_of_the_blocks():
    name = "pass_vit_tiny_patch16.synth"
    model = timm.create_model(name, True, features_only=True, feature_cls="fx", out_indices=(0, 2)).eval()
    assert "state_dict" not in model.pretrained_cfg
    whole = timm.create_model(name, True).eval()
    x = torch.rand(1, 3, 256, 128)
    expected = whole.forward_intermediates(x, indices=[0, 2], output_fmt="NLC", return_prefix_tokens=True)[1]
    for ours, (patches, prefix) in zip(model(x), expected, strict=True):
        torch.testing.assert_close(ours, torch.cat([prefix, patches], 1))


@pytest.mark.parametrize("name", KINDS)
def test_features_only_gives_the_last_three_blocks_by_default(name):
    features = timm.create_model(name, **{**TINY, "depth": 4}, features_only=True)
    assert [f["module"] for f in features.feature_info.get_dicts()] == ["blocks.1", "blocks.2", "blocks.3"]
    assert [tuple(f.shape) for f in features(images())] == [(2, 64, 4, 2)] * 3


@pytest.mark.parametrize(("name", "neck"), NAME_NECKS)
def test_pruned_models_give_the_intermediates_of_whole_ones(name, neck):
    model, x = create(name, num_classes=5, neck=neck), images()
    expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert len(model.blocks) == 1
    assert (model.num_classes, model.global_pool) == (0, "")
    assert not any(key.startswith(("head", "fc_norm", "norm.")) for key in model.state_dict())
    assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[0], expected)
    patches = model(x)[:, 1 + model.num_parts :]
    assert torch.equal(patches.transpose(1, 2).reshape(expected.shape), expected)


# ---- Sizes, channels, devices, types


@pytest.mark.parametrize("name", KINDS)
def test_dynamic_img_size_equals_the_fixed_model_at_home_and_views_elsewhere(name):
    fixed, dynamic = create(name), create(name, dynamic_img_size=True)
    assert_close(dynamic(images()), fixed(images()), 1e-6)
    for size in ((96, 48), (32, 64)):
        x = images(2, size)
        out = dynamic.forward_features(x)
        assert out.shape == (2, 1 + fixed.num_parts + size[0] * size[1] // 256, 64)
        assert_close(out[:, : 1 + fixed.num_parts], fixed.forward_views(x), 1e-6)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(96, 32), (32, 64), (128, 64), (32, 32)])  # (32, 64): as many patches as at home
def test_set_input_size_resamples_the_positions_to_the_new_grid(name, size):
    model, x = create(name), images(2, size)
    expected = reference_views(model, x, None)
    model.set_input_size(size)
    assert tuple(model.patch_embed.img_size) == size
    assert_close(model.forward_features(x)[:, : 1 + model.num_parts], expected)
    assert model.pos_embed.requires_grad
    with pytest.raises(AssertionError, match=r"[Ii]nput"):
        model(images())


@pytest.mark.parametrize("name", KINDS)
def test_models_of_one_channel_read_one_channel(name):
    model, x = create(name, in_chans=1), images(channels=1)
    assert model.in_chans == model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model(x).shape == (2, model.head_hidden_size)
    assert not torch.allclose(model(x), model(-x), atol=1e-2)


@pytest.mark.parametrize(("name", "neck"), NAME_NECKS)
def test_a_meta_model_filled_with_nan_is_finite_after_init_weights(name, neck):
    model = timm.create_model(name, **TINY, neck=neck, num_classes=5, device="meta")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    for t in model.state_dict().values():
        t.fill_(float("nan") if t.is_floating_point() else 99)
    model.init_weights()
    for key, t in model.state_dict().items():
        assert t.isfinite().all(), key
    assert all(b == 0 for k, b in model.named_buffers() if k.endswith("num_batches_tracked"))
    torch.manual_seed(0)
    fresh = timm.create_model(name, **TINY, neck=neck, num_classes=5)
    for (key, a), b in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert a.shape == b.shape
        if key.endswith("weight") and a.numel() > 2000:  # drawn from the same distribution
            assert 0.9 < a.std() / b.std() < 1.1, key
        elif key.endswith(("bias", "running_mean", "running_var")) and "patch_embed" not in key:
            assert torch.equal(a, b), key
    assert model.eval()(images()).isfinite().all()


@pytest.mark.parametrize(("name", "neck"), NAME_NECKS)
def test_bfloat16_is_close_to_float32_and_dtype_builds_it(name, neck):
    model, x = create(name, neck=neck), images()
    expected, views = model(x), model.forward_views(images(2, (32, 16)))
    half = copy.deepcopy(model).to(torch.bfloat16)
    built = timm.create_model(name, **TINY, neck=neck, device="cpu", dtype=torch.bfloat16).eval()
    assert {t.dtype for t in built.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    built.load_state_dict(half.state_dict())
    out = built(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, half(x.bfloat16()))
    assert F.cosine_similarity(out.float(), expected).min() > 0.99
    out = built.forward_views(images(2, (32, 16)).bfloat16())
    assert out.dtype == torch.bfloat16
    assert F.cosine_similarity(out.float(), views, dim=-1).min() > 0.99


# ---- Optimisation and initialisation


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_puts_no_backbone_parameter_in_the_head_group(name):
    model = create(name, num_classes=5)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    by_name = {n: scale[id(p)] for n, p in model.named_parameters()}
    assert {n for n, s in by_name.items() if s == 1.0} == {"head.weight", "head.bias"}
    stem = {s for n, s in by_name.items() if n.startswith(("patch_embed", "cls_token", "reg_token", "pos_embed"))}
    assert stem == {min(by_name.values())}
    first, second = by_name["blocks.0.attn.qkv.weight"], by_name["blocks.1.attn.qkv.weight"]
    assert (*stem, first, second) == (0.125, 0.25, 0.5)
    assert by_name["norm.weight"] == second
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert all(decay[id(p)] == 0 for p in (model.cls_token, model.pos_embed))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_start_with_the_spread_of_pass(name):
    model = create(name, lively=False, embed_dim=1024, depth=1, num_heads=1, mlp_ratio=0.1)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.07)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.07)
    if model.num_parts:
        for part in model.reg_token[0]:
            assert part.std().item() == pytest.approx(0.0283, rel=0.07)


@pytest.mark.parametrize("mode", ["jax", "moco", "skip"])
def test_timm_weight_init_modes_keep_the_tokens_of_pass(mode):
    model = create(lively=False, embed_dim=1024, depth=1, num_heads=1, weight_init=mode)
    if mode == "skip":
        model.init_weights()
    assert model.reg_token.std().item() == pytest.approx(0.0283, rel=0.07)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.07)


def test_the_same_seed_gives_the_same_model():
    a, b = create(lively=False), create(lively=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- Copies


@pytest.mark.parametrize(("name", "neck"), NAME_NECKS)
def test_copies_and_pickles_are_equal_and_apart(name, neck):
    model, x = create(name, neck=neck), images()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert twin.pretrained_cfg == model.pretrained_cfg
        twin.cls_token.data.add_(1)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)


def test_necks_are_batch_norms_with_an_untrained_bias():
    assert isinstance(create(neck="single").fc_norm, SingleNeck)
    assert isinstance(create(neck="multi").fc_norm, MultiNeck)
    for neck in ("single", "multi"):
        bn = create(neck=neck).fc_norm.bn
        assert (bn.bias.requires_grad, bn.weight.requires_grad) == (False, True)
        assert bn.num_features == {"single": 128, "multi": 256}[neck]


def test_the_bundled_default_is_announced_once_with_the_other_tags(caplog):
    tags = [w.tag for w in list_weights("pass_vit_small_patch16")]
    pass_vit._announce_default.cache_clear()
    for _ in range(2):
        pass_vit._announce_default(f"pass_vit_small_patch16.{tags[0]}")
    (record,) = caplog.records
    assert tags[0] in record.message
    assert all(tag in record.message for tag in tags[1:])
