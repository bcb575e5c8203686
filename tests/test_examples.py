"""Pre-training on one page: its loss equals the official code's, and it makes weights that load."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import passreid_models
from passreid_models.synthetic import SyntheticPersons

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "pretrain_minimal.py"
TOKENS = ("cls", "part1", "part2", "part3")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("pretrain_minimal", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("epoch", "temperature"), [(0, 0.04), (1, 0.055), (5, 0.07)])
def test_the_loss_equals_the_official_one(example, epoch, temperature):
    golden = load_file(ROOT / "tests" / "data" / "pretrain_step.safetensors")
    student = [golden[f"student_global_out.{token}"] for token in TOKENS]  # [2 * B, K], then the local views
    areas = (1, 2, 3)
    student[0] = torch.cat([student[0], *(golden[f"student_local_out.area{k}.cls"] for k in areas)])
    for k in areas:
        student[k] = torch.cat([student[k], golden[f"student_local_out.area{k}.part"]])
    teacher = [golden[f"teacher_out.{token}"].unflatten(0, (2, 2)) for token in TOKENS]
    centers = [golden[f"centers_before.center_{token}"][0] for token in ("cls", "pt1", "pt2", "pt3")]
    loss = example.pass_loss([z.unflatten(0, (-1, 2)) for z in student], teacher, centers, temperature)
    torch.testing.assert_close(loss, golden[f"loss.epoch{epoch}"], rtol=1e-6, atol=1e-6)


def test_the_views_of_an_image_are_two_global_ones_and_three_an_area(example, tmp_path):
    SyntheticPersons(1, 1, 1, size=(128, 64))[0][0].save(tmp_path / "a.png")
    global_views, local_views = example.Views([tmp_path / "a.png"], (64, 32), 3)[0]
    assert global_views.shape == (2, 3, 64, 32)
    assert local_views.shape == (9, 3, 32, 16)


@pytest.mark.slow
def test_it_trains_from_a_folder_to_weights_that_load(tmp_path):
    data = SyntheticPersons(4, 4, 2, size=(128, 64))
    (tmp_path / "crops").mkdir()
    for i in range(len(data)):
        data[i][0].save(tmp_path / "crops" / f"{i}.png")
    arguments = "--model test_pass_vit --size 64 32 --coarse-epochs 0 --epochs 3 --batch 4 --prototypes 16 --hidden 16"
    command = [sys.executable, EXAMPLE, "--images", tmp_path / "crops", "--out", tmp_path / "out", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    start = timm.create_model("test_pass_vit").state_dict()
    trained = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert len(passreid_models.load_report(trained).loaded) == len(start)
    moved = [k for k, v in trained.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) == len(start)
