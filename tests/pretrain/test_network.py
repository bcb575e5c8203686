"""Initial weights of a run: random, or weights of any kind, with their heads and their statistics."""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from passreid_models.architectures import HALF, IMAGENET
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.checkpoints.read import CheckpointError, read_checkpoint, unwrap_checkpoint
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.network import PASSNetwork, _find_heads, make_networks
from passreid_models.pretrain.run import train
from passreid_models.pretrain.trainer import PretrainTrainer
from passreid_models.training.folder import RunFolder
from tests import GOLDEN
from tests.tiny_runs import tiny, write_images

CPU = torch.device("cpu")
OFFICIAL = GOLDEN / "upstream_pretrain_checkpoint.pth"
KINDS = ("cls", "pt1", "pt2", "pt3")


def start(**options: Any) -> tuple[PASSNetwork, PASSNetwork]:
    return make_networks(config(**options), CPU)


def config(**options: Any) -> PretrainConfig:
    return tiny(
        **{"data": "unused", "out": Path("unused"), **{k: str(v) if k == "init" else v for k, v in options.items()}}
    )


def equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert ours.keys() == expected.keys()
    return all(torch.equal(v, expected[k]) for k, v in ours.items())


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A folder as `passreid convert` writes it, with the statistics of fine-tuning."""
    torch.manual_seed(7)
    model = timm.create_model("test_pass_vit")
    model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    folder = tmp_path_factory.mktemp("export") / "model"
    save_pretrained(model, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of an epoch."""
    home = tmp_path_factory.mktemp("run")
    train(tiny(write_images(home / "images", 8), home / "run", epochs=1))
    return home / "run"


@pytest.fixture(scope="module")
def run_from_export(tmp_path_factory, export) -> Path:
    """A run that began with the weights of ``export``, and so with their statistics."""
    home = tmp_path_factory.mktemp("continued")
    train(tiny(write_images(home / "images", 4), home / "run", epochs=1, init=str(export)))
    return home / "run"


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[Path, PASSNetwork]:
    """A network in the layout of the authors' full checkpoint, at the tests' size: the file, and the network."""
    torch.manual_seed(8)
    network = PASSNetwork(timm.create_model("test_pass_vit", img_size=(64, 32)), 32, 16, 8)
    tensors = {f"module.backbone.{k}": v for k, v in network.backbone.state_dict().items()}
    tokens = {"cls_token": tensors.pop("module.backbone.cls_token")}
    for k, part in enumerate(tensors.pop("module.backbone.reg_token").split(1, dim=1), 1):
        tokens |= {f"part_token{k}": part * 0.25, f"part{k}_pos": part * 0.75}
    tokens |= {"cls_pos": tokens["cls_token"] * 0.5, "cls_token": tokens["cls_token"] * 0.5}
    tensors |= {f"module.backbone.{k}": v for k, v in tokens.items()}
    for head, kind in zip(network.heads, KINDS, strict=True):
        tensors |= {f"module.head.mlp_{kind}.{k}": v for k, v in head.mlp.state_dict().items()}
        weight = head.last_layer.parametrizations.weight
        tensors[f"module.head.last_layer_{kind}.weight_g"] = weight.original0
        tensors[f"module.head.last_layer_{kind}.weight_v"] = weight.original1
    student = {k: v + 1 for k, v in tensors.items()}
    path = tmp_path_factory.mktemp("official") / "checkpoint.pth"
    torch.save({"student": student, "teacher": tensors, "epoch": 100, "args": argparse.Namespace(lr=5e-4)}, path)
    return path, network


# ---- Random


def test_a_random_start_is_a_function_of_the_seed_and_equal_in_student_and_teacher():
    (student, teacher), (again, _), (other, _) = start(), start(), start(seed=1)
    assert equal(student.state_dict(), teacher.state_dict())
    assert equal(student.state_dict(), again.state_dict())
    differing = {k for k, v in student.state_dict().items() if not torch.equal(v, other.state_dict()[k])}
    random = {k for k, p in student.named_parameters() if p.std() > 0}
    assert differing == random


def test_the_start_does_not_depend_on_the_generator_of_the_caller():
    torch.manual_seed(5)
    first = start()[0].state_dict()
    torch.manual_seed(6)
    assert equal(start()[0].state_dict(), first)


# ---- Weights of every kind


@pytest.mark.parametrize("name", ["synth", "pass_vit_tiny_patch16.synth"])
def test_a_tag_gives_its_weights_at_the_size_of_the_run_to_both_networks(name):
    expected = timm.create_model("pass_vit_tiny_patch16.synth", pretrained=True, img_size=(64, 32)).state_dict()
    student, teacher = start(model="pass_vit_tiny_patch16", init=name)
    assert equal(student.backbone.state_dict(), expected)
    assert equal(teacher.backbone.state_dict(), expected)


def test_an_exported_folder_gives_its_backbone_and_heads_begin_at_random_which_is_said(export, caplog):
    caplog.set_level(logging.INFO)
    student, teacher = start(init=export)
    expected = timm.create_model(f"local-dir:{export}", pretrained=True).state_dict()
    assert equal(student.backbone.state_dict(), expected)
    assert equal(teacher.backbone.state_dict(), expected)
    assert equal(teacher.heads.state_dict(), student.heads.state_dict())
    assert equal(student.heads.state_dict(), start()[0].heads.state_dict())  # those of the seed
    assert f"{export} holds no projection heads: they begin at random" in caplog.text


@pytest.mark.parametrize("neck", ["single", "multi"])
def test_an_exported_folder_with_a_neck_gives_its_backbone_without_it(tmp_path, neck):
    torch.manual_seed(9)
    model = timm.create_model("test_pass_vit", neck=neck, img_size=(64, 32))
    save_pretrained(model, tmp_path / "model")
    student, teacher = start(init=tmp_path / "model")
    expected = model.state_dict()
    of_neck = {k for k in expected if k.startswith("fc_norm.")}
    assert of_neck
    assert equal(student.backbone.state_dict(), {k: v for k, v in expected.items() if k not in of_neck})
    assert equal(teacher.state_dict(), student.state_dict())


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_a_run_and_its_checkpoint_give_the_teachers_backbone_and_heads(run, what):
    checkpoint = RunFolder(run).latest()
    state = read_checkpoint(checkpoint)
    student, teacher = start(init=run if what == "run" else checkpoint)
    assert equal(student.state_dict(), state["teacher"])
    assert equal(teacher.state_dict(), state["teacher"])
    assert not equal(student.state_dict(), state["student"])


def test_a_folder_beside_a_name_does_not_take_its_place(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "pass_vit_tiny_patch16.synth")
    monkeypatch.chdir(tmp_path)
    expected = timm.create_model("pass_vit_tiny_patch16.synth", pretrained=True, img_size=(64, 32)).state_dict()
    student, _ = start(model="pass_vit_tiny_patch16", init="pass_vit_tiny_patch16.synth")
    assert equal(student.backbone.state_dict(), expected)


def test_gains_of_a_run_that_trained_them_become_1_where_they_are_to_stay_so(run, tmp_path):
    checkpoint = RunFolder(run).latest()
    state = read_checkpoint(checkpoint)
    gains = [k for k in state["teacher"] if k.endswith("weight.original0")]
    assert len(gains) == 4
    for key in gains:
        state["teacher"][key] = state["teacher"][key] + 0.5
    torch.save(state, tmp_path / "step_000000001.pt")
    for norm_last_layer, gain in ((True, 1.0), (False, 1.5)):
        student, teacher = start(init=tmp_path / "step_000000001.pt", norm_last_layer=norm_last_layer)
        for network in (student, teacher):
            values = torch.cat([network.state_dict()[key].flatten() for key in gains])
            assert torch.equal(values, torch.full_like(values, gain))


def test_of_a_run_without_checkpoints_the_export_is_taken(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "checkpoints")
    expected = timm.create_model(f"local-dir:{run}/export", pretrained=True).state_dict()
    assert equal(start(init=copy)[0].backbone.state_dict(), expected)


def test_the_official_full_checkpoint_gives_the_teachers_backbone_folded_and_all_heads(official):
    path, expected = official
    student, teacher = start(init=path)
    torch.testing.assert_close(dict(student.state_dict()), dict(expected.state_dict()), rtol=1e-6, atol=1e-7)
    assert equal(teacher.state_dict(), student.state_dict())
    assert equal(student.heads.state_dict(), expected.heads.state_dict())


def test_heads_of_the_authors_file_are_found_by_kind_of_token():
    tensors, _ = unwrap_checkpoint(read_checkpoint(OFFICIAL), "teacher")
    heads = _find_heads(tensors)
    assert len(heads) == 4 * (6 + 2)
    prefix = next(k for k in tensors if "head.mlp_cls" in k).partition("head.")[0]
    for i, kind in enumerate(KINDS):
        for layer in (0, 2, 4):
            assert torch.equal(heads[f"{i}.mlp.{layer}.weight"], tensors[f"{prefix}head.mlp_{kind}.{layer}.weight"])
        for name in ("weight_g", "weight_v"):
            key = f"{prefix}head.last_layer_{kind}.{name}"
            assert torch.equal(heads[f"{i}.last_layer.{name}"], tensors[key])
    network = PASSNetwork(timm.create_model("pass_vit_small_patch16", embed_dim=32, depth=2, num_heads=2), 64, 64, 32)
    network.heads.load_state_dict(heads)  # every one has its place
    assert torch.equal(network.heads[3].mlp[2].weight, tensors[f"{prefix}head.mlp_pt3.2.weight"])


def test_positions_follow_the_size_of_the_run(run):
    state = read_checkpoint(RunFolder(run).latest())["teacher"]
    student, _ = start(init=run, size=(128, 64))
    assert student.backbone.pos_embed.shape == (1, 32, 64)
    assert torch.equal(student.backbone.cls_token, state["backbone.cls_token"])
    assert student.backbone.pos_embed.mean().item() == pytest.approx(
        state["backbone.pos_embed"].mean().item(), abs=1e-3
    )


# ---- Mean and std


@pytest.mark.parametrize("what", ["export", "run", "checkpoint"])
def test_mean_and_std_of_the_views_and_of_the_export_are_those_of_the_weights(export, run_from_export, what):
    init = {"export": export, "run": run_from_export, "checkpoint": RunFolder(run_from_export).latest()}[what]
    trainer = PretrainTrainer(config(init=init), 8, CPU)
    assert trainer.photometric.mean.flatten().tolist() == list(HALF[0])
    assert trainer.photometric.std.flatten().tolist() == list(HALF[1])
    assert tuple(trainer.teacher.backbone.pretrained_cfg["mean"]) == HALF[0]


def test_a_run_exports_the_statistics_it_was_trained_with(run, run_from_export):
    for folder, (mean, std) in ((run, IMAGENET), (run_from_export, HALF)):
        cfg = json.loads((folder / "export" / "config.json").read_text())["pretrained_cfg"]
        assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (mean, std)


def test_pre_training_statistics_are_those_of_a_random_start_and_of_the_official_file(official):
    for options in ({}, {"init": official[0]}):
        mean = PretrainTrainer(config(**options), 8, CPU).photometric.mean.flatten().tolist()
        assert mean == pytest.approx(IMAGENET[0])


@pytest.mark.parametrize("model", ["pass_vit_tiny_patch16", "pass_vit_small_patch16"])
def test_a_random_start_has_the_statistics_of_pre_training_not_those_of_the_default_weights(model):
    for network in start(model=model, size=(64, 32)):
        cfg = network.backbone.pretrained_cfg
        assert (cfg["mean"], cfg["std"], cfg["interpolation"]) == (*IMAGENET, "bicubic")


# ---- Refused


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("pass_vit_tiny_patch16.synth", "init: .*16.synth holds pass_vit_tiny_patch16, and model is test_pass_vit"),
        ("lup", "lup"),
        ("synth", "synth"),
        ("nowhere/at/all", "init: unknown model 'nowhere/at/all'; known: .* a run, or a checkpoint file"),
    ],
)  # fmt: skip
def test_weights_of_another_architecture_and_unknown_ones_are_refused(init, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        start(init=init)


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    save_pretrained(timm.create_model("pass_vit_small_patch16", embed_dim=64, depth=3, num_heads=2), tmp_path / "x")
    with pytest.raises(ValueError, match=r"x holds pass_vit_small_patch16, and model is test_pass_vit"):
        start(init=tmp_path / "x")


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=f"init: {tmp_path}/images holds no model: expected a folder with config.json"):
        start(init=tmp_path / "images")


@pytest.mark.parametrize("official", [OFFICIAL])
def test_an_official_file_of_another_size_is_refused_with_the_widths(official):
    with pytest.raises(CheckpointError, match="the file is 32 wide and 2 deep"):
        start(init=official)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"notes\.pth is not a PyTorch checkpoint"):
        start(init=tmp_path / "notes.pth")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.mul(float("nan")), "NaN or infinite values in 1 tensors"),
        (lambda x: x.to(torch.int8), r"heads of .*: 1 tensors are not of floating point .* 0\.mlp\.0\.weight is int8"),
        (lambda x: x.to_sparse(), "is sparse_coo; expected a dense tensor"),
    ],
)
def test_heads_are_checked_as_the_backbone_is(run, tmp_path, spoil, message):
    state = read_checkpoint(RunFolder(run).latest())
    name = next(k for k in state["teacher"] if k.endswith("heads.0.mlp.0.weight"))
    state["teacher"][name] = spoil(state["teacher"][name])
    torch.save(state, tmp_path / "spoilt.pt")
    with pytest.raises(CheckpointError, match=message):
        start(init=tmp_path / "spoilt.pt")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_prototypes": 64}, "num_prototypes=64"),
        ({"hidden_dim": 8}, "hidden_dim=8"),
        ({"bottleneck_dim": 4}, "bottleneck_dim=4"),
    ],
)
def test_heads_of_other_shapes_are_refused_with_the_fields(run, options, named):
    with pytest.raises(
        CheckpointError, match=rf"init: the projection heads of .* other shapes than .*{named}.* 3 parts"
    ):
        start(init=run, **options)
