"""The examples do what they say: pre-training in about 100 lines makes weights that load."""

import subprocess
import sys
from pathlib import Path

import timm
import torch

import passreid_models

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_minimal_example_trains_from_images_to_weights_that_load(tmp_path):
    data = "synthetic:ids=4,images=4,cameras=2,size=128x64"
    options = "--model test_pass_vit --size 64 32 --epochs 3 --batch 4 --prototypes 32 --workers 0"
    command = [sys.executable, EXAMPLES / "pretrain_minimal.py", data, "--out", tmp_path / "out", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 12/12  loss" in done.stdout
    torch.manual_seed(0)
    start = timm.create_model("test_pass_vit").state_dict()  # the student's first backbone
    trained = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert len(passreid_models.load_report(trained).loaded) == len(start)
    moved = [k for k, v in trained.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) == len(start)
