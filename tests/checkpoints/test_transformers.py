"""Exported folders in transformers' timm wrapper: the model's descriptors, the Embedder's preprocessing."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, TimmWrapperForImageClassification, pipeline

from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.embed import Embedder
from tests import ROOT
from tests.checkpoints.test_local_dir import VARIANTS, create, images

pytestmark = pytest.mark.usefixtures("no_network")
UNKNOWN = (
    "ImportError: The model architecture 'test_pass_vit' is not supported in your version of timm ({}). "
    "Please upgrade timm to a more recent version with `pip install -U timm`."
)


@pytest.fixture
def person() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (150, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pooled_output_is_the_descriptor_also_after_transformers_has_saved_it(tmp_path, variant):
    name, kwargs = VARIANTS[variant]
    model = create(name, **kwargs)
    save_pretrained(model, tmp_path / "model")
    model.reset_classifier(0)
    x = images(model)
    loaded = AutoModel.from_pretrained(tmp_path / "model").eval()
    loaded.save_pretrained(tmp_path / "again")
    for network in (loaded, AutoModel.from_pretrained(tmp_path / "again").eval()):
        output = network(x)
        torch.testing.assert_close(output.pooler_output, model(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(output.last_hidden_state, model.forward_features(x), rtol=0, atol=1e-5)


def test_bundled_weights_give_the_descriptors_of_the_embedder(tmp_path, person):
    folder = ROOT / "weights" / "pass_vit_tiny_patch16.synth_reid"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    x = AutoImageProcessor.from_pretrained(folder)(person, return_tensors="pt")["pixel_values"]
    embed = Embedder("pass_vit_tiny_patch16", "cpu")
    assert torch.equal(x[0], embed.transform(person))
    torch.testing.assert_close(F.normalize(model(x).pooler_output), embed(person), rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("weights/*/config.json")))
def test_no_bundled_config_names_the_classes_twice(folder):
    config = json.loads((ROOT / "weights" / folder / "config.json").read_text(encoding="utf-8"))
    assert config["num_classes"] == 0
    assert "num_classes" not in config["model_args"]


def test_size_interpolation_and_statistics_are_those_of_the_embedder(tmp_path, person):
    model = create(img_size=(96, 32))
    model.pretrained_cfg.update(interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    save_pretrained(model, tmp_path / "model")
    x = AutoImageProcessor.from_pretrained(tmp_path / "model")(person, return_tensors="pt")["pixel_values"]
    assert x.shape == (1, 3, 96, 32)
    assert torch.equal(x[0], Embedder(f"local-dir:{tmp_path / 'model'}", "cpu").transform(person))


def test_the_pipeline_gives_the_descriptor(tmp_path, person):
    save_pretrained(create(), tmp_path / "model")
    features = pipeline("image-feature-extraction", str(tmp_path / "model"), device="cpu")(person, pool=True)
    descriptor = F.normalize(torch.tensor(features))
    torch.testing.assert_close(descriptor, Embedder(f"local-dir:{tmp_path / 'model'}", "cpu")(person))


def test_a_classifier_is_loaded_or_made_anew_and_what_was_fine_tuned_loads_in_timm(tmp_path):
    model = create(num_classes=5)
    save_pretrained(model, tmp_path / "model")
    x = images(model)
    kept = TimmWrapperForImageClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(kept(x).logits, model(x), rtol=0, atol=1e-5)
    fine_tuned = TimmWrapperForImageClassification.from_pretrained(
        tmp_path / "model", num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    loss = fine_tuned(x, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert fine_tuned.timm_model.reg_token.grad.abs().sum() > 0
    fine_tuned.save_pretrained(tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    torch.testing.assert_close(again(x), fine_tuned(x).logits, rtol=0, atol=1e-5)


def test_without_this_package_the_error_is_the_one_in_the_documentation(tmp_path):
    save_pretrained(create(), tmp_path / "model")
    code = "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == UNKNOWN.format(timm.__version__)
