"""Conversion of official checkpoints: the golden values of the authors' code, and every kind of bad file.

`tests/golden` holds outputs of the official code on small random networks, 32 wide and two blocks deep.
"""

import copy
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from passreid_models.architectures import IMAGENET
from passreid_models.checkpoints.convert import convert_state_dict, guess_grid
from passreid_models.checkpoints.load import (
    LoadReport,
    fit_to_model,
    load_report,
    pretrained_filter_fn,
    resize_pos_embed,
)
from passreid_models.checkpoints.local_dir import convert_checkpoint, save_pretrained
from passreid_models.checkpoints.read import CheckpointError, read_checkpoint, unwrap_checkpoint
from passreid_models.embed import Embedder
from passreid_models.layers import ConvStem, fuse_tokens
from tests import GOLDEN

PASS = "pass_vit_small_patch16"
ICS = "pass_vit_small_ics_patch16"
TRANSREID = "transreid_vit_small_patch16"
SMALL = dict(embed_dim=32, depth=2, num_heads=2)
VARIANTS = [f"{neck}neck_{fusion}" for neck in ("single", "multi") for fusion in ("cat", "mean")]
WAYS = ["overlay", "local-dir"]


def golden(name: str) -> dict[str, Tensor]:
    return {k: v.float() for k, v in safetensors.torch.load_file(GOLDEN / f"{name}.safetensors").items()}


def images() -> Tensor:
    return golden("images")["images"]


def overlay(name: str, source: str | Path | dict, **kwargs) -> nn.Module:
    """A model with the weights of a file, or of tensors."""
    key = "state_dict" if isinstance(source, dict) else "file"
    source = source if isinstance(source, dict) else str(source)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={key: source}, **{**SMALL, **kwargs}).eval()


def load(
    way: str, file: Path, folder: Path, name: str, fusion: str | None = None, neck: str | None = None
) -> nn.Module:
    """An official file as a model, in one of the two ways."""
    if way == "overlay":
        return overlay(name, file, global_pool=fusion, neck=neck or "")
    convert_checkpoint(file, folder, fusion=fusion, neck=neck, num_heads=2)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def backbone() -> dict[str, Tensor]:
    return read_checkpoint(GOLDEN / "upstream_backbone.pth")


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if k not in names}


# ---- Golden values


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_supervised_files_give_the_official_tokens_and_feature(variant, way, tmp_path):
    expected, fusion = golden(f"supervised_{variant}"), variant.split("_")[1]
    model = load(way, GOLDEN / f"upstream_supervised_{variant}.pth", tmp_path / "out", PASS, fusion)
    assert model.neck == ""
    assert_close(model.forward_features(images())[:, :4], expected["tokens"])
    assert_close(model(images()), expected["features_before_neck"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_supervised_extras_give_the_official_feature_after_the_neck_and_logits(variant, tmp_path):
    expected, (neck, fusion) = golden(f"supervised_{variant}"), variant.split("neck_")
    report = convert_checkpoint(GOLDEN / f"upstream_supervised_{variant}.pth", tmp_path / "out", num_heads=2)
    extras = safetensors.torch.load_file(tmp_path / "out" / "extras.safetensors")
    assert set(extras) == set(report.extras)
    bn = [extras[f"fc_norm.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    tokens = expected["tokens"]
    if neck == "single":
        after = F.batch_norm(fuse_tokens(tokens, fusion), *bn)
    else:
        after = fuse_tokens(F.batch_norm(tokens.flatten(1), *bn).reshape(tokens.shape), fusion)
    assert_close(after, expected["features_after_neck"])
    assert_close(after @ extras["classifier.weight"].T, expected["logits"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_unsupervised_files_give_the_official_feature_after_their_neck(variant, way, tmp_path):
    neck, fusion = variant.split("neck_")
    file = GOLDEN / f"upstream_unsupervised_{variant}.pth.tar"
    model = load(way, file, tmp_path / "out", PASS, fusion, neck)
    assert model.neck == neck
    assert_close(model(images()), golden(f"unsupervised_{variant}")["features"])
    assert load_report(model).extras == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_convert_finds_fusion_neck_and_statistics_of_the_layout(variant, tmp_path):
    neck, fusion = variant.split("neck_")
    for task in ("supervised", "unsupervised"):
        suffix = ".pth" if task == "supervised" else ".pth.tar"
        report = convert_checkpoint(GOLDEN / f"upstream_{task}_{variant}{suffix}", tmp_path / task, num_heads=2)
        config = json.loads((tmp_path / task / "config.json").read_text())
        expected_fusion = fusion if (task, neck) != ("unsupervised", "multi") else "cat"
        assert config["fusion"] == expected_fusion
        assert any("'cat' assumed" in note for note in report.notes) == ((task, neck) == ("unsupervised", "multi"))
        assert config["neck"] == (neck if task == "unsupervised" else "")
        assert config["l2_normalize"] == (config["neck"] != "multi")
        cfg = config["pretrained_cfg"]
        assert (cfg["mean"], cfg["std"]) == ([0.5] * 3, [0.5] * 3)
        assert cfg["interpolation"] == ("bilinear" if task == "supervised" else "bicubic")
        assert report.layout == f"{task} re-ID model"


def test_the_neck_of_a_supervised_file_is_put_into_the_model_on_request(tmp_path):
    file = GOLDEN / "upstream_supervised_multineck_cat.pth"
    convert_checkpoint(file, tmp_path / "out", neck="multi", num_heads=2)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert set(safetensors.torch.load_file(tmp_path / "out" / "extras.safetensors")) == {"classifier.weight"}
    tokens, converted = golden("supervised_multineck_cat")["tokens"], convert_state_dict(read_checkpoint(file))
    bn = [converted.neck[f"fc_norm.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    normed = F.normalize(F.batch_norm(tokens.flatten(1), *bn).reshape(tokens.shape), dim=-1)
    assert_close(model(images()), fuse_tokens(normed, "cat"))


@pytest.mark.parametrize("way", WAYS)
def test_the_conv_stem_file_gives_the_official_tokens_of_global_and_local_views(way, tmp_path):
    expected = golden("ics_backbone")
    x = expected["images"]
    model = load(way, GOLDEN / "upstream_ics_backbone.pth", tmp_path / "out", ICS)
    assert isinstance(model.patch_embed, ConvStem)
    assert_close(model.forward_features(x)[:, :4], expected["tokens"])
    assert_close(model.forward_views(x), expected["tokens"])
    local = model.forward_views(x[:, :, :128, :64], torch.tensor([1, 1]))
    assert_close(local, expected["tokens_local_area2_topleft128x64"])


@pytest.mark.parametrize("way", WAYS)
def test_the_full_pretraining_file_and_its_backbone_are_the_same_model(way, tmp_path):
    full = load(way, GOLDEN / "upstream_pretrain_checkpoint.pth", tmp_path / "full", PASS)
    plain = load(way, GOLDEN / "upstream_backbone.pth", tmp_path / "plain", PASS)
    assert_close(full(images()), plain(images()), 1e-7)
    for model in (full, plain):
        assert tuple(model.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)


def project(tokens: dict[str, Tensor], weights: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """The official projection heads, written out: MLP, L2, weight-normalised linear layer."""
    out = {}
    for token, x in tokens.items():
        head = {k.removeprefix(f"{network}.head."): v for k, v in weights.items() if k.startswith(f"{network}.head.")}
        for i in (0, 2, 4):
            x = F.linear(x, head[f"mlp_{token}.{i}.weight"], head[f"mlp_{token}.{i}.bias"])
            x = F.gelu(x) if i < 4 else F.normalize(x, dim=-1)
        g, v = head[f"last_layer_{token}.weight_g"], head[f"last_layer_{token}.weight_v"]
        out[token] = x @ (g * v / v.norm(dim=1, keepdim=True)).T
    return out


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_the_views_of_both_networks_give_the_official_outputs_of_the_heads(network, tmp_path):
    step = golden("pretrain_step")
    convert_checkpoint(GOLDEN / "upstream_pretrain_checkpoint.pth", tmp_path / "out", network=network, num_heads=2)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    kinds = ("cls", "pt1", "pt2", "pt3")

    tokens = model.forward_views(step["views.global"].flatten(0, 1))
    out = project(dict(zip(kinds, tokens.unbind(1), strict=True)), step, network)
    prefix = "teacher_out" if network == "teacher" else "student_global_out"
    for kind, name in zip(kinds, ("cls", "part1", "part2", "part3"), strict=True):
        assert_close(out[kind], step[f"{prefix}.{name}"])

    if network == "student":  # 9 local views, 3 of each area, in one call
        area = torch.arange(3).repeat_interleave(6)
        tokens = model.forward_views(step["views.local"].flatten(0, 1), area)
        for k in range(3):
            cls, part = tokens[area == k].unbind(1)
            out = project({"cls": cls, f"pt{k + 1}": part}, step, network)
            assert_close(out["cls"], step[f"student_local_out.area{k + 1}.cls"])
            assert_close(out[f"pt{k + 1}"], step[f"student_local_out.area{k + 1}.part"])


def test_the_teacher_is_preferred_and_the_student_given_on_request(tmp_path):
    file = GOLDEN / "upstream_pretrain_checkpoint.pth"
    for network in ("teacher", "student"):
        report = convert_checkpoint(file, tmp_path / network, network=network, num_heads=2)
        config = json.loads((tmp_path / network / "config.json").read_text())
        assert report.layout == config["provenance"]["layout"] == f"pre-training checkpoint, {network}"
    default, student = overlay(PASS, file), timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    teacher = timm.create_model(f"local-dir:{tmp_path / 'teacher'}", pretrained=True)
    assert torch.equal(default.cls_token, teacher.cls_token)
    assert not torch.equal(default.cls_token, student.cls_token)


def test_positions_are_resized_as_in_the_official_fine_tuning():
    expected = golden("pos_embed_resize")
    resized, method = resize_pos_embed(expected["pos_embed_256x128"], (16, 8), (24, 8))
    assert method == "bilinear"
    assert_close(resized, expected["pos_embed_384x128_bilinear"])
    model = overlay(PASS, {**backbone(), "pos_embed": expected["pos_embed_256x128"]}, img_size=(384, 128))
    assert_close(model.pos_embed, expected["pos_embed_384x128_bilinear"])
    assert load_report(model).resized == {"pos_embed": "16x8 -> 24x8, bilinear"}


def test_positions_of_other_grids_are_resized_bicubic_antialiased_and_the_caller_can_choose():
    pos = backbone()["pos_embed"]
    grid = pos.reshape(1, 16, 8, 32).permute(0, 3, 1, 2)

    def by(mode: str, size: tuple[int, int], antialias: bool) -> Tensor:
        return F.interpolate(grid, size=size, mode=mode, antialias=antialias).flatten(2).transpose(1, 2)

    for new in ((8, 4), (8, 16), (20, 8)):
        resized, method = resize_pos_embed(pos, (16, 8), new)
        assert method == "bicubic antialiased"
        assert_close(resized, by("bicubic", new, True), 1e-6)
    assert_close(resize_pos_embed(pos, (16, 8), (8, 4), "bilinear")[0], by("bilinear", (8, 4), False), 1e-6)
    model = overlay(PASS, backbone(), img_size=(384, 128), pos_embed_resize="bicubic")
    assert_close(model.pos_embed, by("bicubic", (24, 8), True), 1e-6)
    assert load_report(model).resized == {"pos_embed": "16x8 -> 24x8, bicubic antialiased"}
    same, method = resize_pos_embed(pos, (16, 8), (16, 8))
    assert torch.equal(same, pos)
    assert method == ""
    with pytest.raises(ValueError, match=r"resized by one of .*got 'nearest'"):
        resize_pos_embed(pos, (16, 8), (8, 4), "nearest")


def test_a_384x128_file_is_recognised_and_loads_as_it_is(tmp_path):
    tensors = {**backbone(), "pos_embed": golden("pos_embed_resize")["pos_embed_384x128_bilinear"]}
    torch.save(tensors, tmp_path / "large.pth")
    convert_checkpoint(tmp_path / "large.pth", tmp_path / "out", num_heads=2)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert tuple(model.patch_embed.img_size) == (384, 128)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 384, 128]
    assert torch.equal(model.pos_embed, tensors["pos_embed"])
    by_overlay = overlay(PASS, tmp_path / "large.pth", img_size=(384, 128))
    assert torch.equal(by_overlay.pos_embed, tensors["pos_embed"])
    smaller = overlay(PASS, tmp_path / "large.pth")
    assert load_report(smaller).resized == {"pos_embed": "24x8 -> 16x8, bicubic antialiased"}


def test_convert_to_another_size_resizes_the_positions_once_and_for_all(tmp_path):
    report = convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out", img_size=(384, 128), num_heads=2)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert report.resized == {"pos_embed": "16x8 -> 24x8, bilinear"}
    assert_close(model.pos_embed, golden("pos_embed_resize")["pos_embed_384x128_bilinear"])
    assert load_report(model).resized == {}


def test_a_landscape_model_is_resized_from_the_grid_that_its_config_declares(tmp_path):
    model = timm.create_model(PASS, **SMALL, img_size=(128, 256))
    save_pretrained(model, tmp_path / "out")
    portrait = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, img_size=(256, 128))
    grid = model.pos_embed.reshape(1, 8, 16, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(16, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert_close(portrait.pos_embed, expected, 1e-6)
    assert load_report(portrait).resized == {"pos_embed": "8x16 -> 16x8, bicubic antialiased"}


def test_guess_grid_knows_persons_and_nothing_else():
    assert {n: guess_grid(n) for n in (8, 128, 192, 32)} == {8: (4, 2), 128: (16, 8), 192: (24, 8), 32: (8, 4)}
    assert [guess_grid(n) for n in (196, 197, 129, 193, 256, 0)] == [None] * 6


# ---- Layouts without golden values


def test_folded_tokens_equal_tokens_plus_positions():
    tensors = backbone()
    model = overlay(PASS, tensors)
    patches = model.patch_embed(images()) + tensors["pos_embed"]
    prefix = [tensors["cls_token"] + tensors["cls_pos"]]
    prefix += [tensors[f"part_token{k}"] + tensors[f"part{k}_pos"] for k in (1, 2, 3)]
    tokens = torch.cat([*(t.expand(2, -1, -1) for t in prefix), patches], dim=1)
    assert torch.equal(model.norm(model.blocks(tokens)), model.forward_features(images()))
    assert load_report(model).folded == {
        "cls_token": ["cls_token", "cls_pos"],
        "reg_token": ["part_token1", "part1_pos", "part_token2", "part2_pos", "part_token3", "part3_pos"],
    }


def transreid(conv_stem: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """TransReID-SSL's network (timm's plain ViT, a position for CLS too), and its weights under the published keys."""
    torch.manual_seed(0)
    layer = dict(embed_layer=ConvStem) if conv_stem else {}
    model = VisionTransformer(img_size=(256, 128), num_classes=0, **SMALL, **layer).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    keys = {}
    for key, value in model.state_dict().items():
        key = key.replace("patch_embed.proj.proj.", "patch_embed.PROJ.").replace("proj.conv.", "conv.")
        key = key.replace("instance_norm", "IN").replace("batch_norm", "BN").replace("PROJ", "proj")
        keys[key] = value.clone()
    return model, keys


@pytest.mark.parametrize("prefix", ["model.", "module.", "net._orig_mod."])
def test_a_supervised_file_behind_the_prefix_of_another_trainer_is_what_it_is_without(prefix):
    plain = read_checkpoint(GOLDEN / "upstream_supervised_multineck_mean.pth")
    assert "classifier.weight" in plain
    wrapped = {prefix + k: v for k, v in plain.items()}
    expected, converted = convert_state_dict(plain), convert_state_dict(wrapped)
    assert (converted.task, converted.neck_kind) == (expected.task, expected.neck_kind) == ("supervised", "multi")
    assert converted.neck.keys() == expected.neck.keys()
    assert converted.classifier.keys() == expected.classifier.keys()
    assert converted.fusion == expected.fusion == "mean"
    del wrapped[f"{prefix}classifier.weight"]
    assert convert_state_dict(wrapped).task == "supervised"


def test_parameters_load_as_their_values_do():
    tensors = torch.load(GOLDEN / "upstream_backbone.pth")
    parameters = {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in tensors.items()}
    ours, expected = overlay(PASS, parameters), overlay(PASS, tensors)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in ours.state_dict().items())


def test_a_pass_file_of_another_stride_is_refused():
    tensors = dict(torch.load(GOLDEN / "upstream_backbone.pth"))
    tensors["pos_embed"] = torch.rand(1, 22 * 11, 32)
    with pytest.raises(CheckpointError, match="242 positions: those of a stride of 11 pixels"):
        convert_state_dict(tensors)


@pytest.mark.parametrize("patch_size", [8, 32])
def test_a_model_without_parts_and_of_other_patches_loads_as_it_was_saved(tmp_path, patch_size):
    torch.manual_seed(0)
    size = (7 * patch_size, 4 * patch_size)  # 28 positions are 9x3 with one of CLS
    model = timm.create_model("transreid_vit_small_patch16", patch_size=patch_size, img_size=size, depth=1)
    with torch.no_grad():
        model.pos_embed.normal_()
    save_pretrained(model, tmp_path / "model")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_folder_whose_config_states_another_size_than_its_positions_is_refused(tmp_path):
    save_pretrained(timm.create_model("test_pass_vit", img_size=(96, 32)), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["pretrained_cfg"]["input_size"], config["model_args"]["img_size"] = [3, 64, 32], [64, 32]  # as transformers
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has 12 patch positions, and .* states 64x32 pixels, which have 8"):
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    config["pretrained_cfg"]["input_size"], config["model_args"]["img_size"] = [3, 96, 32], [96, 32]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    resized = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, img_size=(64, 32))
    assert load_report(resized).resized == {"pos_embed": "6x2 -> 4x2, bicubic antialiased"}


def test_a_transreid_file_of_384x128_keeps_its_size(tmp_path):
    torch.manual_seed(0)
    reference = VisionTransformer(img_size=(384, 128), num_classes=0, **SMALL).eval()
    torch.save(reference.state_dict(), tmp_path / "large.pth")
    assert convert_state_dict(reference.state_dict()).architecture.img_size == (384, 128)
    convert_checkpoint(tmp_path / "large.pth", tmp_path / "out", num_heads=2)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert load_report(model).resized == {}
    images = torch.randn(2, 3, 384, 128)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("conv_stem", [False, True])
@pytest.mark.parametrize("layout", ["backbone", "pretrain", "supervised", "unsupervised"])
def test_transreid_files_give_the_cls_token_of_a_plain_vit(layout, conv_stem, way, tmp_path):
    reference, tensors = transreid(conv_stem)
    assert tensors["pos_embed"].shape == (1, 129, 32)
    assert ("patch_embed.conv.1.IN.weight" in tensors) == conv_stem
    bottleneck = {f"bottleneck.{k}": torch.rand(32) for k in ("weight", "bias", "running_mean", "running_var")}
    bottleneck["bottleneck.num_batches_tracked"] = torch.tensor(3)
    if layout == "pretrain":
        heads = {"head.mlp.0.weight": torch.rand(4, 32), "head.last_layer.weight_v": torch.rand(4, 4)}
        network = {**{f"backbone.{k}": v for k, v in tensors.items()}, **heads}
        student = {f"module.{k}": torch.zeros_like(v) for k, v in network.items()}
        file = {"student": student, "teacher": network, "epoch": 3, "args": Namespace(arch="vit_small")}
    elif layout == "supervised":
        head = {
            "base.fc.weight": torch.rand(5, 32),
            "base.fc.bias": torch.rand(5),
            "classifier.weight": torch.rand(7, 32),
        }
        file = {**{f"base.{k}": v for k, v in tensors.items()}, **head, **bottleneck}
    elif layout == "unsupervised":
        file = {f"module.{k}": v for k, v in {**tensors, **bottleneck}.items()}
        file = {"state_dict": file, "epoch": 3, "best_mAP": np.float64(0.5)}
    else:
        file = tensors
    torch.save(file, tmp_path / "file.pth")
    neck = "single" if layout == "unsupervised" else ""
    name = "transreid_vit_small_ics_patch16" if conv_stem else TRANSREID
    model = load(way, tmp_path / "file.pth", tmp_path / "out", name, "token", neck)
    cls = reference.forward_features(images())[:, 0]
    assert_close(model.forward_features(images())[:, 0], cls)
    if neck:
        bn = [bottleneck[f"bottleneck.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        cls = F.normalize(F.batch_norm(cls, *bn), dim=-1)
    assert_close(model(images()), cls)


def test_convert_names_the_registered_architecture_that_the_tensors_show(tmp_path):
    for name, overrides in (("pass_vit_tiny_patch16", {}), ("test_pass_vit", {"img_size": (256, 128)})):
        model = timm.create_model(name, **overrides)
        safetensors.torch.save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
        convert_checkpoint(tmp_path / f"{name}.safetensors", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architecture"] == name
        again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True)
        assert again.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


# ---- Purity


def assert_untouched(value, before) -> None:
    if isinstance(value, Tensor):
        assert torch.equal(value, before)
    elif isinstance(value, dict):
        assert list(value) == list(before)
        for key in value:
            assert_untouched(value[key], before[key])
    else:
        assert value == before


@pytest.mark.parametrize(
    "file",
    [
        "upstream_backbone.pth",
        "upstream_pretrain_checkpoint.pth",
        "upstream_supervised_multineck_cat.pth",
        "upstream_unsupervised_multineck_cat.pth.tar",
        "upstream_ics_backbone.pth",
    ],
)
def test_conversion_leaves_its_arguments_as_they_are(file):
    checkpoint = read_checkpoint(GOLDEN / file)
    before = copy.deepcopy(checkpoint)
    model = timm.create_model(ICS if "ics" in file else PASS, **SMALL, img_size=(384, 128), num_classes=5)
    state = copy.deepcopy(model.state_dict())
    unwrap_checkpoint(checkpoint)
    converted = convert_state_dict(checkpoint)
    fields = copy.deepcopy(vars(converted))
    chosen, _ = fit_to_model(converted, model.state_dict(), (24, 8), free=("head.",))
    pretrained_filter_fn(checkpoint, model)
    assert_untouched(vars(converted), fields)
    assert_untouched(checkpoint, before)
    assert_untouched(dict(model.state_dict()), dict(state))
    assert chosen["pos_embed"].shape == (1, 192, 32)


def test_a_file_in_the_cfg_is_read_as_one_in_the_overlay_is():
    file = str(GOLDEN / "upstream_unsupervised_singleneck_mean.pth.tar")
    expected = timm.create_model(PASS, pretrained=True, pretrained_cfg_overlay={"file": file}, **SMALL)
    ours = timm.create_model(PASS, pretrained=True, pretrained_cfg={"file": file}, **SMALL)
    assert (ours.neck, ours.global_pool) == (expected.neck, expected.global_pool) == ("single", "mean")
    assert ours.pretrained_cfg["input_size"] == expected.pretrained_cfg["input_size"] == (3, 256, 128)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in expected.state_dict().items())


def test_a_state_dict_given_as_overlay_is_not_changed():
    for tensors, name in ((backbone(), PASS), (transreid()[1], TRANSREID)):
        before = copy.deepcopy(tensors)
        overlay(name, tensors, num_classes=5, in_chans=1, img_size=(384, 128))
        assert_untouched(tensors, before)


# ---- Reports


def test_the_report_survives_json_and_prints_as_a_table(tmp_path):
    file = GOLDEN / "upstream_supervised_multineck_cat.pth"
    report = convert_checkpoint(file, tmp_path / "out", img_size=(384, 128), num_heads=2)
    assert LoadReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["load_report"]
    assert stored == {**report.to_dict(), "source": file.name}
    lines = [re.sub(" {2,}", "|", line) for line in str(report).splitlines()]
    assert lines == [
        f"{file}: supervised re-ID model",
        "loaded|31 tensors",
        "folded|cls_token|cls_token + cls_pos",
        "folded|reg_token|part_token1 + part1_pos + part_token2 + part2_pos + part_token3 + part3_pos",
        "resized|pos_embed|16x8 -> 24x8, bilinear",
        "extras|fc_norm.* (5)|multi neck, not held by this model",
        "extras|classifier.weight|identity classifier of the training set",
        "ignored|fc.* (2)|unused ImageNet head",
        f"note|SHA-256 of the file: {hashlib.sha256(file.read_bytes()).hexdigest()}",
    ]
    rows = str(report).splitlines()
    assert {rows[2].index("cls_token +"), rows[3].index("part_token1"), rows[6].index("identity")} == {30}  # aligned


@pytest.mark.parametrize(
    ("file", "name"),
    [("upstream_pretrain_checkpoint.pth", PASS), ("upstream_backbone.pth", PASS), ("upstream_ics_backbone.pth", ICS)],
)
def test_the_report_accounts_for_every_tensor_of_the_file_and_of_the_model(file, name):
    model = overlay(name, GOLDEN / file)
    report = load_report(model)
    tensors, _ = unwrap_checkpoint(read_checkpoint(GOLDEN / file))
    folded = sum(len(parts) for parts in report.folded.values())
    assert len(tensors) == len(report.loaded) - len(report.folded) + folded + len(report.ignored) + len(report.extras)
    assert set(report.loaded) == set(model.state_dict())
    assert report.missing == []
    assert report.mismatched == {}
    assert report.source == str(GOLDEN / file)
    assert report.layout == ("pre-training checkpoint, teacher" if "pretrain" in file else "backbone")


def test_load_report_is_there_for_features_only_and_copies_and_absent_without_pretrained_weights():
    model = overlay(PASS, GOLDEN / "upstream_backbone.pth")
    features = overlay(PASS, GOLDEN / "upstream_backbone.pth", features_only=True, out_indices=(0, 1))
    assert load_report(features) == load_report(model) == load_report(copy.deepcopy(model))
    assert load_report(pickle.loads(pickle.dumps(model))).folded == load_report(model).folded
    with pytest.raises(ValueError, match="made without pretrained weights"):
        load_report(timm.create_model(PASS, **SMALL))


def test_features_only_loads_the_weights_and_keeps_no_second_copy_of_them():
    model = overlay(PASS, GOLDEN / "upstream_backbone.pth")
    features = overlay(PASS, GOLDEN / "upstream_backbone.pth", features_only=True, out_indices=(0, 1))
    expected = model.forward_intermediates(images(), intermediates_only=True)
    for a, b in zip(features(images()), expected, strict=True):
        assert torch.equal(a, b)
    for m in (model, features, features.model):
        assert not m.pretrained_cfg.get("state_dict")


def test_a_loaded_model_can_still_be_scripted():
    model = overlay(PASS, GOLDEN / "upstream_backbone.pth")
    assert_close(torch.jit.script(model)(images()), model(images()), 1e-6)


# ---- Other heads and channels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [PASS, ICS])
def test_one_channel_weights_are_the_sum_over_colours(name, way, tmp_path):
    file = GOLDEN / ("upstream_ics_backbone.pth" if name == ICS else "upstream_backbone.pth")
    three = overlay(name, file)
    if way == "overlay":
        one = overlay(name, file, in_chans=1)
    else:
        convert_checkpoint(file, tmp_path / "out", num_heads=2)
        one = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, in_chans=1).eval()
    gray = images()[:, :1]
    assert_close(one(gray), three(gray.expand(-1, 3, -1, -1)))


def test_a_one_channel_model_is_written_and_read_back(tmp_path):
    model = overlay(PASS, GOLDEN / "upstream_backbone.pth", in_chans=1)
    save_pretrained(model, tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(again(images()[:, :1]), model(images()[:, :1]))


@pytest.mark.parametrize("way", WAYS)
def test_five_classes_start_from_the_backbone_and_a_new_classifier(way, tmp_path):
    file = GOLDEN / "upstream_supervised_multineck_cat.pth"
    if way == "overlay":
        model = overlay(PASS, file, num_classes=5)
    else:
        convert_checkpoint(file, tmp_path / "out", num_heads=2)
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5).eval()
    features = model.forward_head(model.forward_features(images()), pre_logits=True)
    assert_close(features, golden("supervised_multineck_cat")["features_before_neck"])
    assert model(images()).shape == (2, 5)
    assert model.head.weight.std() > 0
    assert load_report(model).notes[0] == "head: a new classifier, initialised at random"


@pytest.mark.parametrize("num_classes", [0, 5, 7])
def test_the_report_lists_a_trained_classifier_as_loaded_or_as_extra(num_classes, tmp_path):
    model = timm.create_model(PASS, **SMALL, num_classes=5).eval()
    save_pretrained(model, tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=num_classes).eval()
    report = load_report(again)
    heads = {"head.weight", "head.bias"}
    if num_classes == 5:
        assert torch.equal(again(images()), model(images()))
        assert heads <= set(report.loaded)
        assert report.extras == {}
    else:
        assert not heads & set(report.loaded)
        assert set(report.extras) == heads
    assert bool(report.notes) == (num_classes == 7)


def test_raw_files_bring_their_statistics_and_converted_ones_keep_the_configs(tmp_path):
    for file, mean, interpolation in (
        ("upstream_supervised_singleneck_cat.pth", 0.5, "bilinear"),
        ("upstream_unsupervised_multineck_mean.pth.tar", 0.5, "bicubic"),
        ("upstream_pretrain_checkpoint.pth", 0.485, "bicubic"),
    ):
        cfg = overlay(PASS, GOLDEN / file).pretrained_cfg
        assert (cfg["mean"][0], cfg["interpolation"]) == (mean, interpolation)
    convert_checkpoint(
        GOLDEN / "upstream_backbone.pth", tmp_path / "out", mean_std="0.5", interpolation="bilinear", num_heads=2
    )
    cfg = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).pretrained_cfg
    assert (tuple(cfg["mean"]), cfg["interpolation"]) == ((0.5, 0.5, 0.5), "bilinear")


def test_convert_notes_in_the_report_that_it_assumed_the_statistics(tmp_path):
    report = convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out", num_heads=2)
    assert report.notes[0] == "mean/std: the tensors do not show them, ImageNet's assumed"
    assert not (tmp_path / "out" / "extras.safetensors").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_the_folder_records_where_it_came_from(tmp_path):
    file = GOLDEN / "upstream_backbone.pth"
    convert_checkpoint(file, tmp_path / "out", num_heads=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["provenance"]["source"] == file.name
    assert config["provenance"]["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


# ---- Bad input


def refused(source: Path | dict, tmp_path: Path, match: str, name: str = PASS, **kwargs) -> str:
    """The one-sentence message with which both ways refuse a file; nothing is written."""
    messages = []
    if isinstance(source, dict):
        torch.save(source, tmp_path / "bad.pth")
        source = tmp_path / "bad.pth"
    with pytest.raises(CheckpointError, match=match) as e:
        overlay(name, source, **kwargs)
    messages.append(str(e.value))
    with pytest.raises(CheckpointError, match=match) as e:
        convert_checkpoint(source, tmp_path / "refused", num_heads=2)
    messages.append(str(e.value))
    for message in messages:
        assert str(source) in message
        assert "\n" not in message
        assert len(message) < 1000
    assert not (tmp_path / "refused").exists()
    return messages[0]


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors", ""])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint\n", b"<html>Google Drive</html>", b"\x00" * 64, b"\x80\x04."]
)
def test_a_file_that_is_no_checkpoint_is_refused(content, suffix, tmp_path):
    (tmp_path / f"file{suffix}").write_bytes(content)
    what = "not a whole safetensors file" if suffix == ".safetensors" else "not a PyTorch checkpoint"
    refused(tmp_path / f"file{suffix}", tmp_path, what)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused_and_to_be_downloaded_again(share, tmp_path):
    whole = (GOLDEN / "upstream_backbone.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
    refused(tmp_path / "cut.pth", tmp_path, "cut short or damaged .*; download or copy it again")
    safetensors.torch.save_file(backbone(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: int(share * len(whole))])
    refused(tmp_path / "cut.safetensors", tmp_path, "not a whole safetensors file .* download it again")


def test_a_truncated_file_of_the_old_format_is_refused(tmp_path):
    torch.save(backbone(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_untouched(read_checkpoint(tmp_path / "old.pth"), backbone())
    whole = (tmp_path / "old.pth").read_bytes()
    for share in (0.02, 0.5, 0.999):
        (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
        refused(tmp_path / "cut.pth", tmp_path, "not a PyTorch checkpoint")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "old", "pickle2", "zip4", "pickle4"])
def test_a_pickle_that_would_run_code_is_refused_with_the_name_of_the_function_and_does_not_run(form, tmp_path):
    payload_folder, file = tmp_path / "made", tmp_path / "evil.pth"
    content = {**backbone(), "extra": Payload(payload_folder)}
    protocol = 4 if form.endswith("4") else 2
    if "pickle" not in form:
        torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=form != "old")
        torch.load(file, weights_only=False)  # the payload works
    else:
        file.write_bytes(pickle.dumps(Payload(payload_folder), protocol))
        pickle.loads(file.read_bytes())
    assert payload_folder.is_dir()
    payload_folder.rmdir()
    message = rf"refused: it asks to run {os.mkdir.__module__}\.mkdir while loading"
    refused(
        file, tmp_path, message if protocol == 2 else "refused: pickle protocol 4 cannot be opened without letting it"
    )
    assert not payload_folder.exists()


def test_namespaces_and_numpy_scalars_of_the_published_files_are_let_in(tmp_path):
    assert isinstance(read_checkpoint(GOLDEN / "upstream_pretrain_checkpoint.pth")["args"], Namespace)
    best = read_checkpoint(GOLDEN / "upstream_unsupervised_singleneck_cat.pth.tar")["best_mAP"]
    assert isinstance(best, np.float64)
    torch.save({**backbone(), "best": np.float32(0.5), "epoch": np.int64(3)}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth")["best"] == np.float32(0.5)
    torch.save({"state_dict": backbone(), "extra": nn.Linear(2, 2)}, tmp_path / "module.pth")
    refused(tmp_path / "module.pth", tmp_path, r"asks to run torch\.nn\.modules\.linear\.Linear")


@pytest.mark.parametrize("prefix", ["", "module.", "base.", "state_dict"])
def test_a_resnet_is_named(prefix, tmp_path):
    tensors = dict(timm.create_model("resnet18").state_dict())
    file = {"state_dict": tensors} if prefix == "state_dict" else {prefix + k: v for k, v in tensors.items()}
    refused(file, tmp_path, "this is a ResNet: it has conv1.weight, .* but no blocks.0.attn.qkv.weight")


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("name", [PASS, ICS])
def test_missing_part_tokens_are_an_error_whatever_the_classes(name, num_classes):
    tensors = backbone() if name == PASS else read_checkpoint(GOLDEN / "upstream_ics_backbone.pth")
    parts = [f"part_token{k}" for k in (1, 2, 3)] + [f"part{k}_pos" for k in (1, 2, 3)]
    with pytest.raises(CheckpointError, match=r"missing reg_token; .*with 0 part tokens"):
        overlay(name, without(tensors, *parts), num_classes=num_classes)
    with pytest.raises(CheckpointError, match=r"mismatched reg_token \(1x2x32 in the file, 1x3x32 in the model\)"):
        overlay(name, without(tensors, "part_token3", "part3_pos"), num_classes=num_classes)


@pytest.mark.parametrize("key", ["cls_pos", "part2_pos", "part_token1"])
def test_a_token_without_its_position_is_an_error(key, tmp_path):
    refused(without(backbone(), key), tmp_path, f"part tokens without their counterpart: {key} missing")


@pytest.mark.parametrize("kwargs", [{}, dict(num_classes=5), dict(in_chans=1), dict(img_size=(384, 128))])
@pytest.mark.parametrize("key", ["pos_embed", "patch_embed.proj.bias", "blocks.1.mlp.fc2.weight", "norm.bias"])
def test_a_missing_backbone_tensor_is_an_error_that_names_it(key, kwargs, tmp_path):
    with pytest.raises(CheckpointError, match=f"missing {re.escape(key)};"):
        overlay(PASS, without(backbone(), key), **kwargs)
    torch.save(without(backbone(), key), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"missing {re.escape(key)};"):
        convert_checkpoint(tmp_path / "file.pth", tmp_path / "out", num_heads=2)


@pytest.mark.parametrize("key", ["cls_token", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"])
def test_a_file_without_a_tensor_that_every_vit_has_is_no_vision_transformer_of_this_family(key, tmp_path):
    refused(without(backbone(), key), tmp_path, f"no vision transformer of this family: .*but no {re.escape(key)}$")


def test_a_conv_stem_file_without_a_class_token_is_refused():
    own = timm.create_model(ICS, **SMALL).state_dict()
    with pytest.raises(CheckpointError, match="but no cls_token"):
        overlay(ICS, without(own, "cls_token"))


def test_an_unexpected_tensor_is_an_error_and_no_silent_loss():
    with pytest.raises(CheckpointError, match=r"without a place in the model: blocks\.0\.ls1\.gamma"):
        overlay(PASS, {**backbone(), "blocks.0.ls1.gamma": torch.ones(32)})


@pytest.mark.parametrize(
    ("fitting", "model", "overrides"),
    [
        ("pass_vit_small_patch16", "pass_vit_base_patch16", {}),
        ("pass_vit_tiny_patch16", "pass_vit_small_patch16", {}),
        ("pass_vit_small_patch16", "pass_vit_small_patch16", dict(depth=2)),
        ("transreid_vit_small_patch16", "pass_vit_small_patch16", {}),
        ("pass_vit_small_ics_patch16", "pass_vit_small_patch16", {}),
        ("pass_vit_small_patch16", "pass_vit_small_ics_patch16", {}),
        ("transreid_vit_small_ics_patch16", "transreid_vit_small_patch16", {}),
    ],
)
def test_a_file_of_another_architecture_names_the_one_that_fits(fitting, model, overrides):
    tensors = state_of(fitting)
    with pytest.raises(CheckpointError, match="does not fit the model") as e:
        timm.create_model(model, pretrained=True, pretrained_cfg_overlay=dict(state_dict=tensors), **overrides)
    assert str(e.value).endswith(f": use {fitting}")
    assert len(str(e.value)) < 1000


def state_of(name: str) -> dict[str, Tensor]:
    """Zeros in the shapes of a registered model."""
    model = timm.create_model(name, device="meta")
    return {k: torch.zeros(v.shape, dtype=torch.float16) for k, v in model.state_dict().items()}


def test_a_file_that_fits_no_architecture_is_refused_with_its_width_and_depth(tmp_path):
    with pytest.raises(CheckpointError, match=r"the file is 32 wide and 2 deep, with 3 part tokens$"):
        timm.create_model(PASS, pretrained=True, pretrained_cfg_overlay=dict(state_dict=backbone()))
    with pytest.raises(ValueError, match="32 wide, which no registered model is: give the number of heads"):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_networks_of_transreid_whose_descriptor_is_made_elsewhere_are_refused():
    tensors = {f"base.{k}": v for k, v in backbone().items()}
    for key, what in (("b1.0.norm1.weight", "jigsaw branch"), ("fcneck.weight", "reduction")):
        with pytest.raises(CheckpointError, match=f"{key} is of the {what} of TransReID .*: models here have none"):
            convert_state_dict(tensors | {key: torch.zeros(32)})


def test_positions_of_a_stride_of_11_are_refused_unless_the_size_is_stated():
    tensors = {k: v for k, v in backbone().items() if "part" not in k and k != "cls_pos"}
    tensors["pos_embed"] = torch.zeros(1, 243, 32)
    with pytest.raises(CheckpointError, match=r"243 positions: those of a stride of 11 pix.*, or 27x9 without CLS"):
        convert_state_dict(tensors)
    converted = convert_state_dict(tensors, size=(432, 144))
    assert converted.backbone["pos_embed"].shape == (1, 243, 32)


def test_a_file_is_not_said_to_be_that_of_a_tag(tmp_path):
    tag = f"{PASS}.synth_reid"
    with pytest.raises(ValueError, match=f"expected an architecture without a tag, got {tag} "):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out", tag, num_heads=2)


@pytest.mark.parametrize("task", ["backbone", "our own"])
def test_assumed_statistics_are_named_in_a_warning(tmp_path, caplog, task):
    file = GOLDEN / "upstream_backbone.pth"
    if task == "our own":
        statistics = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        model = timm.create_model("test_pass_vit", global_pool="mean", pretrained_cfg_overlay=statistics)
        save_pretrained(model, tmp_path / "own")
        file = tmp_path / "own" / "model.safetensors"
        assert tuple(Embedder(file).data_config["mean"]) == (0.5,) * 3  # by the config.json beside it
        shutil.copy(file, tmp_path / "alone.safetensors")
        file = tmp_path / "alone.safetensors"
    assert not caplog.records
    model = overlay(PASS, file) if task == "backbone" else Embedder(file).model
    assert model.pretrained_cfg["mean"] == IMAGENET[0]
    assert "does not state its mean, std and fusion: (0.485, 0.456, 0.406)" in caplog.text
    assert "and cat are taken" in caplog.text


def test_our_own_file_with_a_neck_needs_its_folder(tmp_path):
    save_pretrained(timm.create_model("test_pass_vit", neck="single"), tmp_path / "own")
    assert Embedder(tmp_path / "own").model.neck == "single"
    file = shutil.copy(tmp_path / "own" / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: it has a neck and does not state of which fusion"):
        Embedder(file)
    cfg = {"file": str(file)}
    model = timm.create_model("test_pass_vit", True, pretrained_cfg_overlay=cfg, neck="single")
    assert model.neck == "single"


def test_a_neck_that_a_folders_config_does_not_state_is_not_dropped(tmp_path):
    model = overlay(PASS, GOLDEN / "upstream_unsupervised_singleneck_mean.pth.tar")
    save_for_hf(model, str(tmp_path), model_args=SMALL, safe_serialization=True)
    with pytest.raises(CheckpointError, match=r"it has a neck, which its config\.json does not state: give neck"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, neck="single", global_pool="mean").eval()
    assert torch.equal(again(images()), model(images()))


def test_our_own_file_with_a_neck_is_converted_with_the_fusion_that_is_given_whatever_the_default_has(tmp_path):
    """The default weights of this architecture are of the fusion cat."""
    model = timm.create_model(PASS, neck="single", global_pool="mean")
    save_pretrained(model, tmp_path / "own")
    file = shutil.copy(tmp_path / "own" / "model.safetensors", tmp_path / "alone.safetensors")
    convert_checkpoint(file, tmp_path / "out", PASS, fusion="mean", neck="single")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert (again.neck, again.global_pool) == ("single", "mean")
    assert torch.equal(again.reg_token, model.reg_token)


def test_a_users_file_has_no_claims_of_the_default_weights():
    model = overlay(PASS, GOLDEN / "upstream_supervised_singleneck_cat.pth")
    assert not {"tag", "description", "origin_url"} & model.pretrained_cfg.keys()
    assert model.pretrained_cfg["license"] == "other"
    stated = {"file": str(GOLDEN / "upstream_backbone.pth"), "license": "mit", "description": "mine"}
    cfg = timm.create_model(PASS, pretrained=True, pretrained_cfg_overlay=stated, **SMALL).pretrained_cfg
    assert (cfg["license"], cfg["description"]) == ("mit", "mine")


@pytest.mark.parametrize("neck", ["single", "multi"])
def test_a_file_by_its_address_gives_the_descriptors_of_the_file(neck, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = GOLDEN / f"upstream_unsupervised_{neck}neck_mean.pth.tar"
    by_file, by_url = (
        timm.create_model(PASS, pretrained=True, pretrained_cfg_overlay=source, **SMALL).eval()
        for source in (dict(file=str(file)), dict(url=file.as_uri()))
    )
    assert by_url.neck == by_file.neck == neck
    assert torch.equal(by_url(images()), by_file(images()))
    assert load_report(by_url).source == str(tmp_path / "checkpoints" / file.name)


def test_convert_with_a_name_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"upstream_backbone\.pth: the checkpoint does not fit the model"):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out", "test_pass_vit")
    with pytest.raises(ValueError, match="unknown model 'vit_small'; known: pass_vit_tiny_patch16"):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out", "vit_small")
    with pytest.raises(ValueError, match=r"mean_std must be one of .*got 'imagenet21k'"):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out", mean_std="imagenet21k", num_heads=2)
    with pytest.raises(ValueError, match="network must be 'teacher' or 'student', got 'both'"):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", tmp_path / "out", network="both", num_heads=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "module.", "base."])
def test_camera_embeddings_are_ignored_and_listed(prefix, tmp_path):
    tensors = {prefix + k: v for k, v in {**backbone(), "sie_embed": torch.ones(6, 1, 32)}.items()}
    model = overlay(PASS, tensors)
    reason = "camera or view embedding: descriptors here are camera-free"
    assert load_report(model).ignored == {"sie_embed": reason}
    assert_close(model(images()), overlay(PASS, backbone())(images()), 1e-7)
    torch.save(tensors, tmp_path / "file.pth")
    report = convert_checkpoint(tmp_path / "file.pth", tmp_path / "out", num_heads=2)
    assert report.ignored == {"sie_embed": reason}
    assert re.search(f"^ignored +sie_embed +{reason}$", str(report), re.MULTILINE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["blocks.1.mlp.fc1.weight", "part2_pos", "pos_embed"])
def test_nan_and_infinite_weights_are_refused_by_name(key, value, tmp_path):
    tensors = backbone()
    tensors[key].view(-1)[3] = value
    refused(tensors, tmp_path, f"NaN or infinite values in 1 tensors, the first: {re.escape(key)}")


@pytest.mark.parametrize("name", [PASS, TRANSREID])
def test_a_vit_of_224x224_images_is_named(name, tmp_path):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=224, num_classes=0, **SMALL).state_dict()
    assert vit["pos_embed"].shape == (1, 197, 32)
    refused(dict(vit), tmp_path, r"a ViT for 224x224 images\), no grid of person images", name)
    vit = {**vit, "pos_embed": vit["pos_embed"][:, 1:]}
    refused(vit, tmp_path, r"196 positions \(a ViT for 224x224 images\), no grid of person images", name)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, r"a dictionary with the keys \(none\)"),
        ({"epoch": 3, "lr": 0.1}, "a dictionary with the keys epoch, lr"),
        ({"state_dict": {}}, r"a dictionary with the keys \(none\)"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({1: torch.ones(2)}, "a dictionary with the keys 1"),
    ],
)
def test_a_checkpoint_without_named_tensors_is_refused_with_its_content(checkpoint, message, tmp_path):
    torch.save(checkpoint, tmp_path / "file.pth")
    refused(tmp_path / "file.pth", tmp_path, f"expected a dictionary of named tensors, got {message}")


def test_a_pretraining_file_without_the_network_is_refused_with_the_ones_it_has(tmp_path):
    torch.save({"student": backbone(), "epoch": 1}, tmp_path / "file.pth")
    refused(tmp_path / "file.pth", tmp_path, "has no teacher, only: student, epoch")
    report = convert_checkpoint(tmp_path / "file.pth", tmp_path / "out", network="student", num_heads=2)
    assert report.layout == "pre-training checkpoint, student"


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for way in (lambda f: overlay(PASS, f), lambda f: convert_checkpoint(f, tmp_path / "out", num_heads=2)):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pth$"):
            way(tmp_path / "absent.pth")
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*: it is a folder$"):
            way(tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_content_is_refused_and_unchanged(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out exists and is not an empty folder: name another"):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", out, num_heads=2)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match=r"notes\.txt exists and is not an empty folder"):
        convert_checkpoint(GOLDEN / "upstream_backbone.pth", out / "notes.txt", num_heads=2)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="not an empty folder"):  # before a large file is read
        convert_checkpoint(GOLDEN / "absent.pth", out, num_heads=2)
    shutil.rmtree(out)
    out.mkdir()
    convert_checkpoint(GOLDEN / "upstream_backbone.pth", out, num_heads=2)  # an empty folder is taken
    assert (out / "model.safetensors").is_file()


def test_save_pretrained_replaces_a_folder_only_on_request(tmp_path):
    one, two = (timm.create_model("test_pass_vit", depth=d) for d in (1, 2))
    save_pretrained(one, tmp_path / "out")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_pretrained(two, tmp_path / "out")
    assert len(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).blocks) == 1
    save_pretrained(two, tmp_path / "out", overwrite=True)
    assert len(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).blocks) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # and leaves nothing beside it


@pytest.mark.parametrize("neck", ["", "single", "multi"])
@pytest.mark.parametrize("fusion", ["cat", "mean", "parts", "token"])
def test_a_model_comes_back_from_its_folder_bit_for_bit(fusion, neck, tmp_path):
    model = timm.create_model("test_pass_vit", depth=2, num_parts=2, global_pool=fusion, neck=neck, img_size=(96, 32))
    if neck:
        model.fc_norm.bn.running_mean.normal_()
    save_pretrained(model.eval(), tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, 96, 32)
    assert (again.global_pool, again.neck, again.num_parts) == (fusion, neck, 2)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("neck", ["single", "multi"])
@pytest.mark.parametrize("fusion", ["cat", "mean"])
def test_an_untagged_model_takes_the_published_descriptor_of_a_raw_file_from_its_layout(neck, fusion):
    file = GOLDEN / f"upstream_unsupervised_{neck}neck_{fusion}.pth.tar"
    settings = {"global_pool": fusion} if neck == "multi" else {}  # tensors of a multi neck do not show the fusion
    overlay = {"file": str(file)}
    dims = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model(
        "pass_vit_small_patch16", pretrained=True, pretrained_cfg_overlay=overlay, **dims, **settings
    ).eval()
    images = safetensors.torch.load_file(GOLDEN / "images.safetensors")["images"].float()
    expected = safetensors.torch.load_file(GOLDEN / f"unsupervised_{neck}neck_{fusion}.safetensors")["features"]
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_preprocessing_in_an_overlay_overrides_that_of_the_layout():
    overlay = {"file": str(GOLDEN / "upstream_supervised_singleneck_cat.pth"), "interpolation": "bicubic"}
    dims = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    cfg = timm.create_model(
        "pass_vit_small_patch16", pretrained=True, pretrained_cfg_overlay=overlay, **dims
    ).pretrained_cfg
    assert (tuple(cfg["mean"]), cfg["interpolation"]) == ((0.5, 0.5, 0.5), "bicubic")


# ---- Files of other trainers, and damaged ones


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return torch.load(GOLDEN / "upstream_backbone.pth", weights_only=True)


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "encoder.", "timm_model.", "teacher.backbone.", "student_backbone."]
)
def test_the_prefix_of_another_trainer_is_taken_off_and_reported(official, prefix):
    tensors = {**{f"{prefix}{k}": v for k, v in official.items()}, "step": torch.ones(1), "queue": torch.arange(3)}
    converted, expected = convert_state_dict(tensors), convert_state_dict(official)
    assert converted.backbone.keys() == expected.backbone.keys()
    assert all(torch.equal(v, expected.backbone[k]) for k, v in converted.backbone.items())
    assert converted.layout == f"{expected.layout}, keys of {prefix!r}"
    assert converted.ignored["queue"] == f"not among the keys of {prefix!r}"


def test_of_several_networks_the_teacher_or_the_average_is_taken_and_others_are_named(official):
    def both(*prefixes: str) -> dict[str, Tensor]:
        return {f"{p}{k}": v + i for i, p in enumerate(prefixes) for k, v in official.items()}

    for prefixes in (("student_net.", "teacher_net."), ("model.", "model_ema.")):
        converted = convert_state_dict(both(*prefixes))
        assert torch.equal(converted.backbone["norm.weight"], official["norm.weight"] + 1)
        assert converted.ignored[f"{prefixes[0]}norm.weight"] == f"not among the keys of {prefixes[1]!r}"
    student = convert_state_dict(both("student_net.", "teacher_net."), "student")
    assert torch.equal(student.backbone["norm.weight"], official["norm.weight"])
    with pytest.raises(CheckpointError, match=r"it holds 2 networks, with keys of 'a\.', 'b\.'; expected one"):
        convert_state_dict(both("a.", "b."))


def test_keys_that_become_one_are_refused_unless_their_tensors_are_equal(official):
    doubled = {**official, **{f"module.{k}": v.clone() for k, v in official.items()}}
    assert convert_state_dict(doubled).backbone.keys() == convert_state_dict(official).backbone.keys()
    doubled["module.norm.weight"] = doubled["module.norm.weight"] * 0
    with pytest.raises(CheckpointError, match=r"the keys norm\.weight and module\.norm\.weight are one without"):
        convert_state_dict(doubled)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_not_of_floating_point_are_refused(official, dtype):
    with pytest.raises(CheckpointError, match=f"are not of floating point of 16 bits or more, .* is {str(dtype)[6:]}"):
        convert_state_dict({k: v.to(dtype) for k, v in official.items()})
    convert_state_dict({**official, "queue_ptr": torch.zeros(1, dtype=torch.long)})  # no weight


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    content = bytearray((GOLDEN / "upstream_backbone.pth").read_bytes())
    content[len(content) // 2] ^= 0x10
    (tmp_path / "flipped.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flipped\.pth is damaged: the checksum of .* does not match"):
        read_checkpoint(tmp_path / "flipped.pth")


@pytest.mark.parametrize("key", ["cls_pos", "part1_pos", "part_token2"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_token_and_a_position_of_other_shapes_are_refused_and_not_broadcast(official, key, shape):
    with pytest.raises(CheckpointError, match=f"{key} is .*; expected 1x1x32"):
        convert_state_dict({**official, key: torch.ones(shape)})


@pytest.mark.parametrize(("raw", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_an_average_beside_the_raw_weights_is_reported(official, raw, average):
    converted = convert_state_dict({raw: official, average: official})
    assert converted.layout == f"'{raw}' of a training checkpoint, not its '{average}'"


@pytest.mark.parametrize("average", ["state_dict_ema", "averaged_model", "model_avg", "swa", "modelEMA"])
@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("upstream_supervised_singleneck_cat.pth", "supervised re-ID model"),
        ("upstream_unsupervised_singleneck_cat.pth.tar", "unsupervised re-ID model"),
    ],
)
def test_an_average_beside_fine_tuned_weights_is_reported(file, kind, average):
    tensors, _ = unwrap_checkpoint(read_checkpoint(GOLDEN / file))
    converted = convert_state_dict({"state_dict": tensors, average: tensors})
    assert converted.layout == f"{kind}, 'state_dict' of a training checkpoint, not its '{average}'"


def test_a_name_that_contains_ema_is_no_average(official):
    both = {f"{p}_encoder.{k}": v for p in ("person", "semantic") for k, v in official.items()}
    with pytest.raises(CheckpointError, match="it holds 2 networks, with keys of 'person_encoder"):
        convert_state_dict(both)
    converted = convert_state_dict({"model": official, "schema": {"a": torch.ones(1)}})
    assert converted.layout == "'model' of a training checkpoint"


@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone.", "ema."])
def test_a_student_that_is_not_in_the_file_is_refused(official, prefix):
    with pytest.raises(CheckpointError, match="the file holds no network that is called student"):
        convert_state_dict({prefix + k: v for k, v in official.items()}, "student")


def test_the_necks_of_many_parts_keep_their_order(official):
    tensors = {k: v for k, v in official.items() if not k.startswith("part")}
    for i in range(1, 11):
        tensors |= {f"part_token{i}": official["part_token1"], f"part{i}_pos": official["part1_pos"]}
    for i in range(11):
        for stat in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"bottleneck_pt{i}.{stat}" if i else f"bottleneck.{stat}"] = torch.full((32,), float(i))
        tensors[f"bottleneck_pt{i}.num_batches_tracked" if i else "bottleneck.num_batches_tracked"] = torch.tensor(1)
    neck = convert_state_dict(tensors).neck["fc_norm.bn.weight"]
    assert torch.equal(neck, torch.arange(11.0).repeat_interleave(32))


def test_a_norm_before_the_blocks_is_loaded_or_refused(official):
    tensors = {**official, "norm_pre.weight": torch.full((32,), 2.0), "norm_pre.bias": torch.zeros(32)}
    with pytest.raises(CheckpointError, match=r"without a place in the model: norm_pre\.weight, norm_pre\.bias"):
        overlay(PASS, tensors)
    model = overlay(PASS, without(tensors, "patch_embed.proj.bias"), pre_norm=True)
    assert torch.equal(model.norm_pre.weight, torch.full((32,), 2.0))


def test_tensors_that_do_not_fit_are_not_said_to_be_of_the_bundled_file(official):
    with pytest.raises(CheckpointError, match=r"^the given state dict: the checkpoint does not fit the model"):
        timm.create_model(PASS, pretrained=True, pretrained_cfg_overlay=dict(state_dict=without(official, "norm.bias")))
    assert load_report(overlay(PASS, official)).source == "the given state dict"


@pytest.mark.parametrize("change", ["too few", "too many"])
def test_the_architecture_in_use_is_not_advised(change):
    tensors = state_of("test_pass_vit")
    if change == "too few":
        del tensors["blocks.0.attn.qkv.bias"]
    else:
        tensors["blocks.0.ls1.gamma"] = torch.zeros(64)
    with pytest.raises(CheckpointError, match=r"64 wide and 3 deep, with 3 part tokens$"):
        timm.create_model("test_pass_vit", pretrained=True, pretrained_cfg_overlay=dict(state_dict=tensors))


@pytest.mark.parametrize("wrapper", ["", "module.", "backbone.", "_orig_mod.module."])
def test_a_network_beside_a_wrapped_one_is_refused_unless_it_is_the_teacher(official, wrapper):
    def beside(prefix: str) -> dict[str, Tensor]:
        return {
            **{f"{wrapper}{k}": v for k, v in official.items()},
            **{f"{prefix}{k}": v + 1 for k, v in official.items()},
        }

    name = repr(wrapper) if wrapper else "no prefix"
    with pytest.raises(CheckpointError, match=rf"it holds 2 networks, with keys of {name}, 'model\.'; expected one"):
        convert_state_dict(beside("model."))
    converted = convert_state_dict(beside("model_ema."))
    assert torch.equal(converted.backbone["norm.weight"], official["norm.weight"] + 1)
    assert converted.layout.endswith("keys of 'model_ema.'")
    assert converted.ignored[f"{wrapper}norm.weight"] == "not among the keys of 'model_ema.'"


def test_the_decoder_of_a_masked_autoencoder_is_no_second_network(official):
    decoder = {f"decoder_{k}": v for k, v in official.items() if k.startswith("blocks.")}
    assert convert_state_dict({**official, **decoder}).ignored.keys() >= decoder.keys()


WRONG_TENSORS = {
    "sparse": ("part_token1", lambda v: v.to_sparse(), "part_token1 is sparse_coo; expected a dense tensor"),
    "meta": ("norm.weight", lambda v: v.to("meta"), r"norm\.weight is without values"),
    "stride 0": (
        "fc.weight",
        lambda v: torch.zeros(1).expand(10**11),
        r"fc\.weight is declared as 100000000000, and .* 4 ",
    ),
    "float8": ("part_token1", lambda v: v.to(torch.float8_e4m3fn), "part_token1 is float8_e4m3fn"),
    "width": ("part_token1", lambda v: v[..., :7], "part_token1 is 1x1x7; expected 1x1x32"),
    "scalar token": ("cls_token", lambda v: torch.ones(()), "cls_token is a scalar; expected 1x1x32"),
    "scalar positions": ("pos_embed", lambda v: torch.ones(()), "pos_embed is a scalar; expected 1xNx32"),
    "flat positions": ("pos_embed", lambda v: v[0], "pos_embed is 128x32; expected 1xNx32"),
    "no positions": ("pos_embed", lambda v: v[:, :0], "pos_embed is 1x0x32; expected 1xNx32"),
    "stray block": ("blocks.999999999.x", lambda v: torch.zeros(1), "of block 999999999, and none of block 2"),
    "empty block": ("blocks.2.x", lambda v: torch.zeros(1), r"there is no blocks\.2\.attn\.qkv\.weight"),
    "other block": (
        "blocks.1.mlp.fc1.bias",
        lambda v: v[:5],
        r"blocks\.1\.mlp\.fc1\.bias is 5, and that of blocks\.0 128",
    ),
    "attention": ("blocks.0.attn.qkv.weight", lambda v: v[0], r"blocks\.0\.attn\.qkv\.weight is 32; expected 3DxD"),
    "attention scalar": ("blocks.0.attn.qkv.weight", lambda v: v[0, 0], "is a scalar; expected 3DxD"),
    "attention empty": ("blocks.0.attn.qkv.weight", lambda v: v[:0, :0], "is 0x0; expected 3DxD"),
    "classifier": (
        "classifier.weight",
        lambda v: torch.ones(()),
        r"classifier\.weight is a scalar; expected 2 dimensions",
    ),
    "neck": ("bottleneck.weight", lambda v: torch.ones(()), r"bottleneck\.weight is a scalar; expected 1 dimension$"),
}


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_a_tensor_that_cannot_be_a_weight_is_one_sentence_that_names_its_key(official, kind, tmp_path):
    key, change, message = WRONG_TENSORS[kind]
    tensors = {**official, key: change(official.get(key))}
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(tensors)
    torch.save(tensors, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}/file\.pth: .*{message}"):
        convert_checkpoint(tmp_path / "file.pth", tmp_path / "out", num_heads=2)
    assert not (tmp_path / "out").exists()


def test_a_zip_whose_entries_are_larger_than_itself_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(CheckpointError, match=r"bomb\.pth was refused: its entries are larger than the file"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_convert_prints_the_hash_and_whether_damage_would_show(official, legacy, tmp_path):
    file = tmp_path / "file.pth"
    torch.save(official, file, _use_new_zipfile_serialization=not legacy)
    note = convert_checkpoint(file, tmp_path / "out", num_heads=2).notes[-1]
    assert note.startswith(f"SHA-256 of the file: {hashlib.sha256(file.read_bytes()).hexdigest()}")
    assert note.endswith("has no checksum, so that damage does not show") == legacy
