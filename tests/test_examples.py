"""The examples do what they say: pre-training in about 100 lines makes weights that load."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from tiny_runs import TINY, tiny, write_images

import passreid_models
from passreid_models.ssl.loop import train
from passreid_models.ssl.network import PASSNetwork
from passreid_models.training.folder import RunFolder

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


def network(state, **dimensions):
    backbone = timm.create_model("test_pass_vit", **dimensions)
    heads = (TINY["num_prototypes"], TINY["hidden_dim"], TINY["bottleneck_dim"])
    made = PASSNetwork(backbone, *heads)
    made.load_state_dict(state)
    return made.train()


def test_a_widened_start_computes_what_the_run_did_and_its_copies_part_in_training(tmp_path, one_thread):
    spec = importlib.util.spec_from_file_location("train_bundled", EXAMPLES / "train_bundled.py")
    train_bundled = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_bundled)
    train(tiny(write_images(tmp_path / "data"), tmp_path / "run", epochs=1))
    train_bundled.widen(tmp_path / "run", tmp_path / "start.pt")
    start = torch.load(tmp_path / "start.pt", weights_only=True)
    saved = RunFolder(tmp_path / "run").load_latest()[1]
    assert start["statistics"] == saved["statistics"]

    narrow, wide = network(saved["teacher"]), network(start["teacher"], embed_dim=128, num_heads=4)
    views = torch.randn(2, 3, 3, 64, 32), torch.randn(3, 3, 3, 32, 16)
    outputs = wide(*views).logits()
    for z, expected in zip(outputs, narrow(*views).logits(), strict=True):
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
    tokens = wide.backbone.forward_views(views[0][0])
    torch.testing.assert_close(tokens, narrow.backbone.forward_views(views[0][0]).repeat(1, 1, 2), rtol=1e-4, atol=1e-5)
    sum(z.square().sum() for z in outputs).backward()
    grad = wide.backbone.blocks[0].mlp.fc1.weight.grad  # its rows: hidden channels, each twice
    assert ((grad[:256] - grad[256:]).norm() / grad.norm()) > 0.1


@pytest.mark.slow
def test_the_bundled_weights_are_made_from_nothing_to_folders_that_load(tmp_path):
    heads = "num_prototypes: 64\nhidden_dim: 64\nbottleneck_dim: 16\n"
    (tmp_path / "pass.yaml").write_text(f"size: [128, 64]\nepochs: 1\nlocal_views: 3\nbatch_size: 16\n{heads}")
    (tmp_path / "reid.yaml").write_text("size: [128, 64]\nepochs: 1\nids_per_batch: 2\neval_epochs: 1\n")
    command = [sys.executable, EXAMPLES / "train_bundled.py", "tiny", "--work", tmp_path / "work", "--split"]
    command += ["--ids", "4", "--test-ids", "4", "--settings", tmp_path / "pass.yaml"]
    command += ["--reid-settings", tmp_path / "reid.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for tag, seen in (("synth", 32), ("synth_reid", 8)):  # of 40 images in batches of 16; of 4 persons in one of 2 x 4
        folder = tmp_path / "work" / f"pass_vit_tiny_patch16.{tag}"
        config = json.loads((folder / "config.json").read_text())
        assert (config["pretrained_cfg"]["tag"], config["pretrained_cfg"]["license"]) == (tag, "apache-2.0")
        assert config["provenance"]["images_seen"] >= seen
        figures = json.loads((folder / "figures.json").read_text())
        assert figures.keys() == {"street", "studio"}
        assert all(abs(f["float16"]["mAP"] - f["float32"]["mAP"]) < 2 for f in figures.values())
        assert f"pass_vit_tiny_patch16.{tag} as float16, street: mAP" in done.stdout
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert any(("probe_mAP" if tag == "synth" else "mAP") in record for record in log)
        pieces = sorted(folder.glob("model.safetensors.*"))
        assert all(p.stat().st_size < 2**24 for p in pieces)
        (folder / "model.safetensors").write_bytes(b"".join(p.read_bytes() for p in pieces))
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert model.patch_embed.img_size == (256, 128)
    assert config["provenance"]["init_provenance"]["images_seen"] == 32  # the chain goes back to the beginning
