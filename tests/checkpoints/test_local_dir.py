"""A saved model comes back bit for bit through timm's ``local-dir:``, with all that belongs to it."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed as dist
from timm.models import save_for_hf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from passreid_models.checkpoints import local_dir
from passreid_models.checkpoints.load import load_report
from passreid_models.checkpoints.local_dir import convert_checkpoint, save_pretrained
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.embed import Embedder
from passreid_models.reid.model import ReIDModel

TINY = dict(embed_dim=64, depth=2, num_heads=2, img_size=(64, 32))

VARIANTS = {
    "as registered": ("test_pass_vit", {}),
    "classes": ("test_pass_vit", dict(num_classes=5)),
    "gray images": ("test_pass_vit", dict(in_chans=1)),
    "four channels": ("test_pass_vit", dict(in_chans=4, pretrained_cfg_overlay=dict(mean=(0.4,) * 4, std=(0.5,) * 4))),
    "other image size": ("test_pass_vit", dict(img_size=(96, 32))),
    "wide images": ("test_pass_vit", dict(img_size=(32, 64))),
    "one part": ("test_pass_vit", dict(num_parts=1)),
    "five parts, all": ("test_pass_vit", dict(num_parts=5, global_pool="parts")),
    "no parts": ("test_pass_vit", dict(num_parts=0)),
    "single neck": ("test_pass_vit", dict(neck="single", global_pool="mean")),
    "multi neck": ("test_pass_vit", dict(neck="multi", num_classes=3)),
    "unpooled": ("test_pass_vit", dict(global_pool="")),
    "other depth and heads": ("test_pass_vit", dict(depth=1, num_heads=4)),
    "other dimensions of a large one": ("pass_vit_base_patch16", TINY),
    "conv stem": ("transreid_vit_small_ics_patch16", TINY),
    "conv stem, gray": ("pass_vit_small_ics_patch16", dict(**TINY, in_chans=1)),
    "a tag": ("pass_vit_small_patch16.lup_usl_msmt17", TINY),
    "a tag at 384x128": ("pass_vit_small_patch16.lup_msmt17_384", {**TINY, "img_size": (384, 128)}),
}


def create(name: str = "test_pass_vit", **kwargs) -> nn.Module:
    """A model in eval mode, each of its tensors drawn at random, the running statistics included."""
    model = timm.create_model(name, **kwargs)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(0.5 * torch.rand(tensor.shape, generator=generator) + 0.1)
    return model.eval()


@pytest.fixture(params=["compiled", "DataParallel", "DDP", "compiled DDP", "averaged"])
def wrap(request, tmp_path) -> Iterator[Callable[[nn.Module], nn.Module]]:
    if "DDP" not in request.param:
        yield {"compiled": torch.compile, "DataParallel": nn.DataParallel, "averaged": AveragedModel}[request.param]
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield lambda x: DistributedDataParallel(torch.compile(x) if "compiled" in request.param else x)
    finally:
        dist.destroy_process_group()


def test_a_wrapped_model_is_saved_embedded_and_reported_as_the_model_inside(wrap, tmp_path):
    model, x = create(), torch.randn(2, 3, 64, 32)
    save_pretrained(model, tmp_path / "plain")
    model = load(tmp_path / "plain")
    wrapped = wrap(model)
    save_pretrained(wrapped, tmp_path / "wrapped")
    plain, saved = (safetensors.torch.load_file(tmp_path / x / "model.safetensors") for x in ("plain", "wrapped"))
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[k], saved[k]) for k in plain)
    assert torch.equal(Embedder(wrapped, "cpu")(x), Embedder(model, "cpu")(x))
    assert load_report(wrapped).to_dict() == load_report(model).to_dict()


def load(folder: Path, **kwargs) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def images(model: nn.Module) -> torch.Tensor:
    shape = (2, model.in_chans, *model.patch_embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def model_args_of(folder: Path) -> dict:
    """Without what timm 1.0.31 adds of its own."""
    return {k: v for k, v in config_of(folder)["model_args"].items() if k not in ("in_chans", "num_classes")}


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert list(model.state_dict()) == list(state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, variant):
    name, kwargs = VARIANTS[variant]
    model = create(name, **kwargs)
    save_pretrained(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert_same_state(model, again)
    assert torch.equal(model(images(model)), again(images(model)))
    assert (again.global_pool, again.neck, again.num_classes) == (model.global_pool, model.neck, model.num_classes)
    assert tuple(again.pretrained_cfg["input_size"]) == (model.in_chans, *model.patch_embed.img_size)
    for key in ("architecture", "interpolation", "crop_mode", "crop_pct"):
        assert again.pretrained_cfg[key] == model.pretrained_cfg[key], key
    if model.in_chans == 3:  # for others timm 1.0.31 averages them
        for key in ("mean", "std"):
            assert tuple(again.pretrained_cfg[key]) == model.pretrained_cfg[key], key


@pytest.mark.parametrize("half", [False, True])
def test_a_model_in_channels_last_is_saved(tmp_path, half):
    model = create().to(memory_format=torch.channels_last)
    save_pretrained(model, tmp_path / "model", half=half)
    assert not model.patch_embed.proj.weight.is_contiguous()
    saved = load(tmp_path / "model").state_dict()
    assert all(torch.equal(saved[k], v.half().float() if half else v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("neck", ["", "multi"])
def test_half_precision_stores_the_rounded_values_and_leaves_the_model_alone(tmp_path, neck):
    model = create(neck=neck)
    save_pretrained(model, tmp_path / "model", half=True)
    stored = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    assert {t.dtype for k, t in stored.items() if not k.endswith("num_batches_tracked")} == {torch.float16}
    again = load(tmp_path / "model")
    for key, tensor in model.state_dict().items():
        assert again.state_dict()[key].dtype == tensor.dtype == (torch.int64 if "tracked" in key else torch.float32)
        assert torch.equal(again.state_dict()[key], tensor.half().to(tensor.dtype)), key
    save_pretrained(model, tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("model", "whole")]
    assert sizes[0] < 0.55 * sizes[1]


def test_config_holds_what_belongs_to_the_weights(tmp_path):
    model = create("pass_vit_small_patch16.lup_usl_msmt17", **TINY)
    save_pretrained(model, tmp_path / "model", info={"provenance": {"source": "a.pth"}, "step": 7})
    config = config_of(tmp_path / "model")
    assert config["architecture"] == "pass_vit_small_patch16"
    assert (config["fusion"], config["neck"], config["l2_normalize"]) == ("mean", "single", True)
    assert config["provenance"] == {"source": "a.pth"}
    assert config["step"] == 7
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_mode"]) == ([3, 64, 32], "squash")
    assert "tag" not in cfg  # these are not the weights of that tag
    assert cfg["license"] == "other"
    assert (cfg["mean"], cfg["std"], cfg["interpolation"]) == ([0.5] * 3, [0.5] * 3, "bicubic")
    assert model_args_of(tmp_path / "model") == {**TINY, "img_size": [64, 32], "global_pool": "mean", "neck": "single"}


BUNDLED = "pass_vit_tiny_patch16.synth_reid"
CLAIMS = {"tag": "synth_reid", "license": "apache-2.0"}


def claims(model: nn.Module, folder: Path) -> dict[str, Any]:
    save_pretrained(model, folder)
    cfg = config_of(folder)["pretrained_cfg"]
    assert ("description" in cfg) == ("tag" in cfg)
    return {k: cfg[k] for k in CLAIMS if k in cfg}


BUNDLED = "pass_vit_tiny_patch16.synth_reid"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"img_size": (384, 128)}, {"global_pool": "mean"}, {"dtype": torch.bfloat16}],
    ids=lambda changes: next(iter(changes), "none"),
)
def test_weights_as_they_were_loaded_keep_tag_and_licence_even_through_a_folder(tmp_path, changes, half):
    model = timm.create_model(BUNDLED, pretrained=True, **changes)
    save_pretrained(model, tmp_path / "first", half=half)
    assert claims(model, tmp_path / "second") == claims(load(tmp_path / "first"), tmp_path / "third") == CLAIMS


def trained(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.001)


def one_value(model: nn.Module) -> None:
    model.norm.bias.data[-1] += 1e-4


CHANGES = {
    "trained": trained,
    "one value": one_value,
    "other weights": lambda model: model.load_state_dict(create("pass_vit_tiny_patch16").state_dict()),
    "a new classifier": lambda model: model.reset_classifier(5),
    "its file gone": lambda model: setattr(model, "origin", replace(model.origin, file="gone.safetensors")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("through_a_folder", [False, True])
def test_other_weights_than_those_loaded_lose_tag_and_licence(tmp_path, change, through_a_folder):
    model = timm.create_model(BUNDLED, pretrained=True)
    if through_a_folder:
        save_pretrained(model, tmp_path / "first")
        model = load(tmp_path / "first")
    change(model)
    assert claims(model, tmp_path / "model") == {"license": "other"}


def test_trained_weights_saved_over_their_own_file_stay_without_a_tag(tmp_path):
    save_pretrained(timm.create_model(BUNDLED, pretrained=True), tmp_path / "own")
    model = load(tmp_path / "own")
    trained(model)
    save_pretrained(model, tmp_path / "own", overwrite=True)
    assert (
        claims(model, tmp_path / "model") == claims(load(tmp_path / "own"), tmp_path / "again") == {"license": "other"}
    )


def test_trained_weights_in_a_folder_of_timms_own_save_stay_without_a_tag(tmp_path):
    model = timm.create_model("pass_vit_tiny_patch16.synth", pretrained=True)  # of the fusion mean
    trained(model)
    save_for_hf(model, str(tmp_path / "timm's"), safe_serialization=True)
    again = load(tmp_path / "timm's")
    assert again.global_pool == model.global_pool
    assert claims(again, tmp_path / "again") == {"license": "other"}


def test_layers_that_are_given_as_classes_are_saved_by_the_name_that_info_gives(tmp_path):
    model = create(act_layer=nn.ReLU, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    with pytest.raises(ValueError, match=r"act_layer and norm_layer: .* info={'model_args': {'act_layer': NAME}}"):
        save_pretrained(model, tmp_path / "model")
    names = {"act_layer": "relu", "norm_layer": None}
    save_pretrained(model, tmp_path / "model", info={"model_args": names})
    assert torch.equal(load(tmp_path / "model")(images(model)), model(images(model)))


def test_a_patch_size_that_was_set_later_is_saved(tmp_path):
    for name, old, new in (("up", 8, 16), ("down", 16, 8)):
        model = create(patch_size=old)
        model.set_input_size(patch_size=new)
        save_pretrained(model, tmp_path / name)
        assert torch.equal(load(tmp_path / name)(images(model)), model(images(model)))


def test_layers_that_a_config_names_are_those_of_the_architecture(exported):
    config = config_of(exported)
    config["pretrained_cfg"].update(classifier="blocks.0.attn.qkv", first_conv="blocks.1.attn.qkv", num_classes=5)
    (exported / "config.json").write_text(json.dumps({**config, "num_classes": 5}))
    expected = safetensors.torch.load_file(exported / "model.safetensors")
    for options in ({"num_classes": 0}, {"num_classes": 0, "in_chans": 1}):
        state = load(exported, **options).state_dict()
        assert all(torch.equal(state[k], v) for k, v in expected.items() if not k.startswith("patch_embed"))
        torch.testing.assert_close(
            state["patch_embed.proj.weight"].sum(1), expected["patch_embed.proj.weight"].sum(1), rtol=0, atol=1e-6
        )


def test_descriptors_of_a_multi_neck_are_not_to_be_normalised_again(tmp_path):
    save_pretrained(create(neck="multi"), tmp_path / "model")
    config = config_of(tmp_path / "model")
    assert (config["fusion"], config["neck"], config["l2_normalize"]) == ("cat", "multi", False)


def test_only_what_was_changed_is_recorded_beside_size_fusion_and_neck(tmp_path):
    save_pretrained(create(), tmp_path / "plain")
    assert model_args_of(tmp_path / "plain") == {"img_size": [64, 32], "global_pool": "cat", "neck": ""}
    save_pretrained(create(num_parts=1), tmp_path / "one")
    assert model_args_of(tmp_path / "one")["num_parts"] == 1


def test_extras_are_stored_beside_the_model_and_not_in_it(tmp_path):
    model = create()
    extras = {"classifier.weight": torch.randn(7, 128), "transposed": torch.randn(3, 4).t()}
    save_pretrained(model, tmp_path / "model", extras)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "extras.safetensors",
        "model.safetensors",
    ]
    stored = safetensors.torch.load_file(tmp_path / "model" / "extras.safetensors")
    assert stored.keys() == extras.keys()
    assert all(torch.equal(stored[key], extras[key]) for key in extras)
    loaded = load(tmp_path / "model")
    assert_same_state(model, loaded)
    assert load_report(loaded).source == str(tmp_path / "model" / "model.safetensors")
    save_pretrained(model, tmp_path / "without", {})
    assert not (tmp_path / "without" / "extras.safetensors").exists()


def test_a_loaded_folder_takes_another_classifier_channels_and_size(tmp_path):
    model = create(num_classes=5)
    save_pretrained(model, tmp_path / "model")
    other = load(tmp_path / "model", num_classes=2, in_chans=1, img_size=(128, 64), drop_path_rate=0.1)
    assert other(torch.zeros(1, 1, 128, 64)).shape == (1, 2)
    assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    kept = load(tmp_path / "model", num_classes=0)
    x = images(model)
    assert torch.equal(kept(x), model.forward_head(model.forward_features(x), pre_logits=True))


def test_a_second_save_of_a_loaded_model_gives_the_same_files(tmp_path):
    save_pretrained(create(neck="single", num_parts=2, img_size=(96, 48)), tmp_path / "a")
    save_pretrained(load(tmp_path / "a"), tmp_path / "b")
    stored = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


@pytest.mark.parametrize("occupied", ["by a file inside", "by a file"])
def test_a_path_in_use_is_refused_and_left_alone(tmp_path, occupied):
    folder = tmp_path / "model"
    mine = folder if occupied == "by a file" else folder / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    for write in (lambda: save_pretrained(create(), folder), lambda: convert_checkpoint(tmp_path / "absent", folder)):
        with pytest.raises(FileExistsError, match="model exists and is not an empty folder: name another"):
            write()
    assert mine.read_text() == "mine"
    assert [p for p in tmp_path.rglob("*") if p not in (folder, mine)] == []


def test_an_empty_folder_is_accepted(tmp_path):
    (tmp_path / "model").mkdir()
    model = create()
    save_pretrained(model, tmp_path / "model")
    assert_same_state(model, load(tmp_path / "model"))


def test_a_damaged_folder_is_refused_by_name(tmp_path):
    save_pretrained(create(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model/model\.safetensors is not a whole safetensors file"):
        load(tmp_path / "model")


def test_overwriting_keeps_the_model_card_and_files_of_others(tmp_path):
    save_pretrained(create(), tmp_path / "model")
    for name in ("README.md", "model.onnx"):
        (tmp_path / "model" / name).write_text("mine")
    save_pretrained(create(depth=1), tmp_path / "model", overwrite=True)
    assert [(tmp_path / "model" / name).read_text() for name in ("README.md", "model.onnx")] == ["mine", "mine"]
    assert len(load(tmp_path / "model").blocks) == 1


def test_overwriting_replaces_the_folder_whole(tmp_path):
    save_pretrained(create(num_parts=1), tmp_path / "model", {"classifier.weight": torch.zeros(2, 2)})
    model = create(depth=1)
    save_pretrained(model, tmp_path / "model", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert_same_state(model, load(tmp_path / "model"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_fails_late_leaves_the_folder_unchanged(tmp_path, monkeypatch, overwrite):
    model = create()
    if overwrite:
        save_pretrained(model, tmp_path / "model")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))

    def disk_full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(local_dir.safetensors.torch, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, tmp_path / "model", {"a": torch.zeros(1)}, overwrite=overwrite)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


# ---- config.json of others

WRONG_FIELDS = {
    "no object": ("", [], "is not the config of a model of this package"),
    "architecture": ("architecture", ["x"], "is not the config of a model of this package"),
    "pretrained_cfg": ("pretrained_cfg", 5, "is not the config of a model of this package"),
    "model_args": ("model_args", [1], r"model_args: expected an object, got \[1\]"),
    "provenance": ("provenance", "mine", "provenance: expected an object, got 'mine'"),
    "unknown argument": ("model_args.a", 1, "no model can be made from it .*unexpected keyword argument 'a'"),
    "depth": ("model_args.depth", 10**9, "model_args: depth: expected a whole number from 1 to 1,000, got 1000000000"),
    "wide": ("model_args.embed_dim", 8192, "the model is to have embed_dim 8192 and not 64 as in the weights"),
    "deep": ("model_args.depth", 900, "the model is to have depth 900 and not 3 as in the weights"),
    "parts": ("model_args.num_parts", 999, "the model is to have num_parts 999 and not 3 as in the weights"),
    "size": (
        "model_args.img_size",
        [10**9, 32],
        "model_args: img_size: expected 2 values, each a whole number from 16",
    ),
    "activation": ("model_args.act_layer", "x", "no model can be made from it"),
    "fusion": ("model_args.global_pool", 7, "no model can be made from it .*global_pool must be one of"),
    "classes": ("num_classes", 10**9, "num_classes: expected a whole number from 0 to 100,000, got 1000000000"),
    "interpolation": ("pretrained_cfg.interpolation", "x", "pretrained_cfg: interpolation: expected one of bicubic"),
    "interpolation type": (
        "pretrained_cfg.interpolation",
        ["bicubic"],
        "pretrained_cfg: interpolation: expected one of",
    ),
    "mean": ("pretrained_cfg.mean", [0.5, "x", 0.5], "pretrained_cfg: mean: expected 1 to 64 values"),
    "std": ("pretrained_cfg.std", [0, 1, 1], "pretrained_cfg: std: expected 1 to 64 values, each a number from 1e-06"),
    "input size": ("pretrained_cfg.input_size", [3, True, 32], "pretrained_cfg: input_size: expected channels"),
    "no channels": ("pretrained_cfg.input_size", [], "pretrained_cfg: input_size: expected channels"),
    "unknown field": ("pretrained_cfg.a", 1, "no model can be made from it .*unexpected keyword argument 'a'"),
}


READ_BY_TIMM = (
    "no object", "architecture", "pretrained_cfg", "model_args", "provenance", "classes", "size", "input size",
    "no channels",
)  # fmt: skip


@pytest.mark.parametrize("way", ["Embedder", "timm", "ReIDModel"])
@pytest.mark.parametrize("kind", WRONG_FIELDS)
def test_an_impossible_config_is_one_sentence_with_file_and_field(exported, kind, way):
    field, value, message = WRONG_FIELDS[kind]
    config = original = json.loads((exported / "config.json").read_text())
    *parents, name = field.split(".")
    for parent in parents:
        config = config[parent]
    if name:
        config[name] = value
    (exported / "config.json").write_text(json.dumps(original if name else value))
    if way == "timm" and kind in READ_BY_TIMM:
        pytest.skip("timm reads these itself")
    make = {"Embedder": Embedder, "timm": lambda name: timm.create_model(name, pretrained=True), "ReIDModel": None}[way]
    with pytest.raises(ValueError, match=message) as e:
        make(f"local-dir:{exported}") if make else ReIDModel.load(exported)
    assert str(exported) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.fixture
def exported(tmp_path) -> Path:
    model = timm.create_model("test_pass_vit", neck="single")
    save_pretrained(model, tmp_path / "model", {"classifier.weight": torch.zeros(4, model.head_hidden_size)})
    return tmp_path / "model"


def test_a_folder_without_weights_and_damaged_extras_are_named(exported):
    (exported / "extras.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(CheckpointError, match=r"extras\.safetensors is not a whole safetensors file"):
        ReIDModel.load(exported)
    (exported / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*model\.safetensors"):
        Embedder(f"local-dir:{exported}")


def test_a_config_that_is_nested_without_end_no_text_or_too_large_is_refused(exported):
    for content in (b"[" * 10**5, b"\xff\xfe"):
        (exported / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
            Embedder(f"local-dir:{exported}")
    os.truncate(exported / "config.json", 2**24 + 1)
    with pytest.raises(ValueError, match=r"config\.json is larger than 16,777,216 bytes$"):
        Embedder(f"local-dir:{exported}")
