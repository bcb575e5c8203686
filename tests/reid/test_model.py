"""ReIDModel: official features and logits, export and loading."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from passreid_models import CheckpointError, Embedder, convert_checkpoint, save_pretrained
from passreid_models.reid.config import ClusterConfig, FinetuneConfig
from passreid_models.reid.model import ReIDModel, make_backbone, without_drop_path
from tests import GOLDEN

VARIANTS = ("multineck_cat", "multineck_mean", "singleneck_cat", "singleneck_mean")


@pytest.fixture(scope="module")
def images() -> Tensor:
    (x,) = load_file(GOLDEN / "images.safetensors").values()
    return x.float()


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


def official(variant: str) -> Path:
    return GOLDEN / f"upstream_supervised_{variant}.pth"


def assert_official(model: ReIDModel, images: Tensor, variant: str) -> None:
    golden = load_file(GOLDEN / f"supervised_{variant}.safetensors")
    with torch.no_grad():
        output = model(images)
    for name, value in zip(("features_before_neck", "features_after_neck", "logits"), output, strict=True):
        torch.testing.assert_close(value, golden[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# ---- Official files


def test_features_before_and_after_the_neck_and_logits_are_the_official_ones(variant, images):
    model = ReIDModel.load(official(variant), num_heads=2)
    assert (model.neck, model.fusion) == tuple(variant.replace("neck", "").split("_"))
    assert not model.training
    assert_official(model, images, variant)


def test_a_converted_folder_gives_the_official_features_and_logits(variant, images, tmp_path):
    convert_checkpoint(official(variant), tmp_path / "model", num_heads=2)
    assert_official(ReIDModel.load(tmp_path / "model"), images, variant)


def test_an_export_gives_the_official_features_and_logits_and_its_model_the_descriptor_before_the_neck(
    variant, images, tmp_path
):
    model, extras = ReIDModel.load(official(variant), num_heads=2).descriptor_model()
    save_pretrained(model, tmp_path / "export", extras)
    assert_official(ReIDModel.load(tmp_path / "export"), images, variant)
    descriptor = timm.create_model(f"local-dir:{tmp_path}/export", pretrained=True)
    golden = load_file(GOLDEN / f"supervised_{variant}.safetensors")["features_before_neck"]
    with torch.no_grad():
        torch.testing.assert_close(descriptor(images), golden, rtol=1e-5, atol=1e-6)
    cfg = descriptor.pretrained_cfg
    assert (list(cfg["mean"]), list(cfg["std"]), cfg["interpolation"]) == ([0.5] * 3, [0.5] * 3, "bilinear")
    assert Embedder(descriptor).l2_normalize


def test_a_file_without_neck_and_classifier_is_refused():
    with pytest.raises(CheckpointError, match=r"upstream_backbone\.pth holds no neck and classifier"):
        ReIDModel.load(GOLDEN / "upstream_backbone.pth", num_heads=2)
    with pytest.raises(CheckpointError, match="no supervised re-ID model"):
        ReIDModel.load(GOLDEN / "upstream_unsupervised_singleneck_cat.pth.tar", num_heads=2)


def test_a_classifier_of_another_width_is_refused(tmp_path):
    checkpoint = torch.load(official("multineck_cat"), weights_only=False)
    checkpoint["classifier.weight"] = torch.zeros(7, 96)
    torch.save(checkpoint, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd\.pth: the classifier is 96 wide, and the descriptor 64"):
        ReIDModel.load(tmp_path / "odd.pth", num_heads=2)


# ---- New models


def small(neck: str = "multi", **options) -> ReIDModel:
    torch.manual_seed(0)
    return ReIDModel(timm.create_model("test_pass_vit", neck=neck, **options), 5)


def test_the_bias_of_the_neck_is_not_trained_and_the_classifier_has_none(variant):
    neck, fusion = variant.replace("neck", "").split("_")
    model = small(neck, global_pool=fusion)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["backbone.fc_norm.bn.bias"]
    assert model.classifier.bias is None
    assert model.classifier.weight.std().item() == pytest.approx(0.001, rel=0.2)


def test_all_parameters_but_the_bias_of_the_neck_get_a_gradient():
    model = small()
    before, _, logits = model(torch.randn(6, 3, 64, 32))
    (F.cross_entropy(logits, torch.arange(6) % 5) + before.square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_backbone_without_a_neck_and_a_single_identity_are_refused():
    with pytest.raises(ValueError, match="needs a backbone with neck='single' or 'multi'"):
        ReIDModel(timm.create_model("test_pass_vit"), 5)
    with pytest.raises(ValueError, match="num_ids must be 2 or more, got 1"):
        ReIDModel(timm.create_model("test_pass_vit", neck="multi"), 1)


@pytest.mark.parametrize(
    ("config", "interpolation"),
    [(FinetuneConfig, "bilinear"), (ClusterConfig, "bicubic")],
)
def test_a_run_begins_with_the_weights_a_new_neck_and_the_statistics_of_fine_tuning(tmp_path, config, interpolation):
    torch.manual_seed(1)
    start = timm.create_model("test_pass_vit", neck="single", num_parts=2)
    start.fc_norm.bn.running_mean += 3
    save_pretrained(start, tmp_path / "start")
    c = config(
        init=str(tmp_path / "start"), model="test_pass_vit", size=(96, 32), neck="single", fusion="cat", drop_path=0.2
    )
    backbone = make_backbone(c, interpolation)
    assert (backbone.num_parts, backbone.patch_embed.img_size) == (2, (96, 32))
    same = {k for k, v in backbone.state_dict().items() if torch.equal(v, start.state_dict().get(k, v + 1))}
    differ = set(backbone.state_dict()) - same
    assert differ == {"pos_embed", "fc_norm.bn.running_mean"}  # another grid, a new neck
    assert backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    cfg = backbone.pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["interpolation"]) == ((0.5,) * 3, (0.5,) * 3, interpolation)
    used = without_drop_path(backbone)
    assert not used.training
    assert isinstance(used.blocks[-1].drop_path1, torch.nn.Identity)
    assert all(torch.equal(v, used.state_dict()[k]) for k, v in backbone.state_dict().items())
    assert used.pretrained_cfg["interpolation"] == interpolation
