"""The example scripts and three benchmarks, run end to end, and the settings of the bundled weights."""

import io
import json
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
import train_bundled
import transfer
import yaml
from baselines import colours
from PIL import Image

import passreid_models
from passreid_models.evaluation import evaluate_model
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.network import PASSNetwork
from passreid_models.pretrain.run import train
from passreid_models.reid.config import FinetuneConfig
from passreid_models.synthetic.attributes import stream
from passreid_models.synthetic.scene import draw
from passreid_models.training.folder import RunFolder
from tests import ROOT
from tests.tiny_runs import TINY, tiny, write_images

EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"


def test_the_minimal_example_trains_weights_that_load(tmp_path):
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
    changed = [k for k, v in trained.state_dict().items() if not torch.equal(v, start[k])]
    assert len(changed) == len(start)


def network(state, **dimensions):
    backbone = timm.create_model("test_pass_vit", **dimensions)
    heads = (TINY["num_prototypes"], TINY["hidden_dim"], TINY["bottleneck_dim"])
    model = PASSNetwork(backbone, *heads)
    model.load_state_dict(state)
    return model.train()


def test_a_widened_network_computes_the_same_outputs_and_its_copied_channels_get_different_gradients(
    tmp_path, one_thread
):
    train(tiny(write_images(tmp_path / "data"), tmp_path / "run", epochs=1))
    with pytest.raises(ValueError, match="holds no run"):
        train_bundled.widen(tmp_path / "none", tmp_path / "start.pt")
    train_bundled.widen(tmp_path / "run", tmp_path / "start.pt")
    start = torch.load(tmp_path / "start.pt", weights_only=True)
    saved = RunFolder(tmp_path / "run").load_latest()[1]
    assert start["statistics"] == saved["statistics"]
    assert start["provenance"]["images_seen"] == saved["step"] * saved["config"]["batch_size"]

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


@pytest.mark.parametrize(
    ("name", "config", "settings", "overrides"),
    [
        ("pass_vit_tiny_patch16.synth", PretrainConfig, "bundled.yaml", {}),
        ("pass_vit_small_patch16.synth", PretrainConfig, "bundled.yaml", "WIDENED"),
        ("pass_vit_tiny_patch16.synth_reid", FinetuneConfig, "bundled_reid.yaml", {}),
    ],
)
def test_the_settings_are_those_of_the_bundled_weights(name, config, settings, overrides):
    overrides = overrides and getattr(train_bundled, overrides)
    expected = config.from_dict(yaml.safe_load((EXAMPLES / settings).read_text()) | overrides).to_dict()
    folder = ROOT / "weights" / name
    trained = json.loads((folder / "config.json").read_text())["provenance"]["config"]
    free = {"model", "fusion"}  # set by the run
    differing = {k: (expected[k], v) for k, v in trained.items() if expected[k] != v and k not in free}
    assert not differing


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["small", "--widen"], "", "--widen: {work} holds no pass_vit_tiny_patch16.synth: make tiny there first"),
        (["tiny", "--widen"], "", "--widen: only small is twice as wide as tiny"),
        (["tiny", "--ids", "0"], "", "--ids: expected 1 or more, got 0"),
        (["tiny", "--test-ids", "-1"], "", "--test-ids: expected 1 or more, got -1"),
        (["tiny", "--settings", "none.yaml"], "", "none.yaml"),
        (["tiny", "--settings", "{yaml}"], "epochs: [1", "while parsing a flow sequence"),
        (["tiny", "--settings", "{yaml}"], "epochs: 0", "epochs: expected 1 or more, got 0"),
        (["tiny", "--reid-settings", "{yaml}"], "erasing: 0", "erasing"),
    ],
)
def test_bundling_reports_mistakes_before_it_draws(words, settings, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("passreid_synth3d.dataset.write_market1501", lambda *args, **more: pytest.fail("it draws"))
    work = tmp_path / "work"
    (tmp_path / "some.yaml").write_text(settings)
    with pytest.raises(SystemExit) as error:
        train_bundled.main([*(word.format(yaml=tmp_path / "some.yaml") for word in words), "--work", str(work)])
    assert error.value.code not in (None, 0)
    assert message.format(work=work) in f"{error.value.code} {capsys.readouterr().err}"


def bundle(work, *words):
    command = [sys.executable, EXAMPLES / "train_bundled.py", *words, "--work", work]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_bundling_runs_from_drawing_to_packed_weights_that_load(tmp_path):
    heads = "num_prototypes: 64\nhidden_dim: 64\nbottleneck_dim: 16\n"
    (tmp_path / "pass.yaml").write_text(f"size: [128, 64]\nepochs: 1\nlocal_views: 3\nbatch_size: 16\n{heads}")
    (tmp_path / "reid.yaml").write_text("size: [128, 64]\nepochs: 1\nids_per_batch: 2\ntriplet_weight: 0\n")
    words = ["--ids", "4", "--test-ids", "4", "--split", "--settings", tmp_path / "pass.yaml"]
    words += ["--reid-settings", tmp_path / "reid.yaml"]
    done = bundle(tmp_path / "work", "tiny", *words)
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
    assert config["provenance"]["init_provenance"]["images_seen"] == 32  # the provenance goes back to the first run

    again = bundle(tmp_path / "work", "tiny", *words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is there") == 2
    wide = bundle(tmp_path / "work", "small", "--widen", *words)
    assert wide.returncode == 0, wide.stderr
    config = json.loads((tmp_path / "work/pass_vit_small_patch16.synth_reid/config.json").read_text())
    pretraining = config["provenance"]["init_provenance"]
    assert (pretraining["init"], pretraining["init_provenance"]["images_seen"]) == ("small-start.pt", 32)


def test_the_baselines_are_measured_on_any_labelled_dataset(tmp_path):
    dark_red, black = Image.new("RGB", (64, 128), (128, 0, 0)), Image.new("RGB", (64, 128))
    x = colours([dark_red, black, black])
    torch.testing.assert_close(x @ x.T, torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]]))
    command = [sys.executable, BENCHMARKS / "baselines.py", "--quick"]
    done = subprocess.run([*command, "synthetic:ids=8,size=128x64"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["pixels_mAP"] > figures["chance_mAP"] > 0
    write_images(tmp_path / "unlabelled")
    refused = subprocess.run([*command, tmp_path / "unlabelled"], capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_foreign_cameras_are_unlike_those_of_training():
    for camera in (transfer.foreign_camera(camid, seed) for seed in range(20) for camid in range(9)):
        assert camera.gamma < 0.75 or camera.gamma > 1.33
        red, _, blue = camera.gains
        assert red / blue < 0.75 or red / blue > 1.33
        assert 2 < camera.blur < 3
        assert 0.15 < camera.scale < 0.3
        assert 5 < camera.noise < 20
        assert 10 <= camera.quality < 30


def test_a_foreign_camera_gives_all_its_images_one_look_that_differs_from_other_cameras_and_shows_the_person():
    image = draw(0, 0, 0, 0)

    def shot(camid, *image_key):
        content = transfer.photograph(image, transfer.foreign_camera(camid), stream(*image_key))
        return content, Image.open(io.BytesIO(content))

    first, look = shot(0, 1)
    assert shot(0, 1)[0] == first != shot(0, 2)[0]
    assert look.size == image.size
    colour = [np.asarray(shot(camid, 1)[1], float).mean((0, 1)) for camid in range(4)]
    assert np.abs(np.asarray(shot(0, 2)[1], float).mean((0, 1)) - colour[0]).max() < 1
    assert all(np.abs(a - b).max() > 25 for a, b in combinations(colour, 2))
    gray = np.asarray(image.convert("L").resize((16, 32)), float).ravel()
    for camid in range(4):
        seen = np.asarray(shot(camid, 1)[1].convert("L").resize((16, 32)), float).ravel()
        assert np.corrcoef(gray, seen)[0, 1] > 0.85


def test_transfer_measures_models_and_baselines_on_three_sets(tmp_path, capsys, monkeypatch, one_thread):
    def flat(seed, pid, camid, k, size, patterns, place):  # instead of the renderer
        return draw(seed, pid, camid, k, size)

    monkeypatch.setattr("passreid_synth3d.dataset._find_draw", lambda: flat)
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    name, work = str(tmp_path / "model"), tmp_path / "work"
    passreid_models.save_pretrained(timm.create_model("test_pass_vit"), name)
    words = [name, "--quick", "--size", "64", "32", "--work", str(work)]
    transfer.main(words)
    output = capsys.readouterr().out
    figures = json.loads(output.splitlines()[-1])
    assert figures.keys() == {
        f"{row}_{column}_{metric}"
        for row in ("pixels", "colours", "chance", "random", name)
        for column in ("held-out", "2-D", "foreign")
        for metric in ("mAP", "rank1")
    }
    command = "--ids 6 --images 8 --cameras 4 --train-ids 0 --seed 7 --patterns held-out; generator"
    assert f"held-out: passreid synth {command}" in output
    for column in ("held-out", "foreign"):
        evaluation = evaluate_model(work / f"{column}-6", name, size=(64, 32))
        assert len(evaluation.dataset.query) == len(evaluation.dataset.gallery) == 24
        assert figures[f"{name}_{column}_mAP"] == pytest.approx(100 * evaluation.metrics.mAP, abs=0.01)
    assert figures["colours_held-out_mAP"] > figures["colours_foreign_mAP"]

    before = {path: path.read_bytes() for path in work.glob("foreign-6/*/*.jpg")}
    transfer.main(words)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert {path: path.read_bytes() for path in work.glob("foreign-6/*/*.jpg")} == before

    marker = work / "held-out-6" / "synthetic3d.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"generator": 0}))
    with pytest.raises(SystemExit, match="was begun with generator=0, and now generator="):
        transfer.main(words)
    with pytest.raises(SystemExit, match="colours names a baseline"):
        transfer.main(["colours", "--quick"])
    with pytest.raises(SystemExit, match="no_such_model"):
        transfer.main(["no_such_model", "--quick"])


@pytest.mark.slow
def test_the_comparison_of_methods_reports_figures_of_each_method(tmp_path):
    command = [sys.executable, BENCHMARKS / "learning.py", "--quick", "--jobs", "2", "--out", tmp_path / "a folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    methods = ["random", "dino", "dino_small", "pass", "pass_1", "pass_5", "random_reid", "dino_reid", "pass_reid"]
    methods += ["dino_parts_reid", "pixels", "colours", "chance"]
    assert figures.keys() == {
        f"{place}{method}_{metric}" for place in ("", "studio_") for method in methods for metric in ("mAP", "rank1")
    }
    assert figures["studio_colours_mAP"] > 2 * figures["studio_chance_mAP"]
