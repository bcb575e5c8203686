"""Commands: output, files, exit codes, and one sentence for a mistake."""

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import tqdm
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import passreid_models
from passreid_models import cli, device
from passreid_models.architectures import STATISTICS
from passreid_models.checkpoints import load, zoo
from passreid_models.embed import Embedder
from passreid_models.retrieval import evaluate, rank
from passreid_models.synthetic import SyntheticPersons
from passreid_models.training.run import Stopped
from tests.reid_data import make_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "test_pass_vit"
    passreid_models.save_pretrained(timm.create_model("test_pass_vit"), folder)
    return folder


@pytest.fixture(scope="module")
def model_name(model_dir) -> str:
    return f"local-dir:{model_dir}"


@pytest.fixture(scope="module")
def official_file(tmp_path_factory) -> Path:
    """A backbone as the authors publish it: token and position apart."""
    torch.manual_seed(1)
    tensors = timm.create_model("test_pass_vit").state_dict()
    half = {"cls_token": tensors.pop("cls_token") / 2, "reg_token": tensors.pop("reg_token") / 2}
    tensors |= {"cls_token": half["cls_token"], "cls_pos": half["cls_token"]}
    for i in range(3):
        token = half["reg_token"][:, i : i + 1].clone()
        tensors |= {f"part_token{i + 1}": token, f"part{i + 1}_pos": token}
    path = tmp_path_factory.mktemp("official") / "backbone.pth"
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in tensors.items()}, "epoch": 100}, path)
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    data = SyntheticPersons(3, images_per_id=1, cameras=1, size=(64, 32))
    for i in range(3):
        data[i][0].save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PASSREID_HUB_NAMESPACE", raising=False)


def run(*args: object) -> int:
    """The exit code, wherever argparse or the command decides it."""
    try:
        return cli.main([str(a) for a in args])
    except SystemExit as e:
        return int(e.code)


def refused(capsys, *args: object) -> str:
    """The one sentence with which a command is refused."""
    capsys.readouterr()
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("passreid: ")
    return lines[0]


# ---- embed


def test_embed_writes_the_descriptors_of_files_and_folders_with_their_names(images, model_name, tmp_path, capsys):
    out = tmp_path / "features.safetensors"
    assert run("embed", images / "2.png", images, "-o", out, "--model", model_name) == 0
    assert capsys.readouterr().out == f"4 descriptors of width 128 -> {out}\n"
    names = [str(images / name) for name in ("2.png", "0.png", "1.png", "2.png")]
    with safe_open(out, "pt") as file:
        assert list(file.keys()) == ["descriptors"]
        assert json.loads(file.metadata()["names"]) == names
        assert torch.allclose(file.get_tensor("descriptors"), Embedder(model_name)(names), atol=1e-6)


def test_embed_hands_its_options_to_the_embedder(images, model_name, tmp_path):
    options = ("--fusion", "mean", "--flip", "--parts", "--batch-size", 2, "--dtype", "bfloat16", "--device", "cpu")
    assert run("embed", images, "-o", tmp_path / "f.npz", "--model", model_name, *options, "--force-dtype") == 0
    embed = Embedder(model_name, "cpu", torch.bfloat16, batch_size=2, fusion="mean", flip=True)
    descriptors, parts = embed(images, parts=True)
    with np.load(tmp_path / "f.npz") as file:
        assert np.array_equal(file["descriptors"], descriptors.numpy())
        assert np.array_equal(file["parts"], parts.numpy())
        assert file["descriptors"].shape == (3, 64)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_on_a_cpu_without_it_is_float32_with_a_warning_unless_forced(
    images, model_name, tmp_path, monkeypatch, capsys, fast
):
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: fast)
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    data, results = "synthetic:ids=8,images=4,cameras=2,seed=0,size=64x32", []
    for options in ((), ("--force-dtype",)):
        options = ("--model", model_name, "--dtype", "bfloat16", "--device", "cpu", *options)
        assert run("embed", images, "-o", tmp_path / "f.npz", *options) == 0
        errors = capsys.readouterr().err.splitlines()
        assert run("eval", data, "--json", tmp_path / "m.json", *options) == 0
        errors += capsys.readouterr().err.splitlines()
        errors = [line for line in errors if "computing in float32 (--force-dtype insists)" in line]
        with np.load(tmp_path / "f.npz") as file:
            results.append(
                (len(errors), json.loads((tmp_path / "m.json").read_text())["model"]["dtype"], file["descriptors"])
            )
    expected = [Embedder(model_name, "cpu", dtype)(images).numpy() for dtype in (torch.float32, torch.bfloat16)]
    first = (0, "bfloat16", expected[1]) if fast else (2, "float32", expected[0])
    for ours, theirs in zip(results, (first, (0, "bfloat16", expected[1])), strict=True):
        assert ours[:2] == theirs[:2]
        assert np.array_equal(ours[2], theirs[2])


def test_embed_leaves_out_unreadable_images_by_name_and_exits_with_1(images, model_name, tmp_path, capsys):
    (images / "1.png").write_bytes(b"damaged")
    missing = tmp_path / "missing.jpg"
    assert run("embed", images, missing, "-o", tmp_path / "f.csv", "--model", model_name) == 1
    out, err = capsys.readouterr()
    assert out == f"2 descriptors of width 128 -> {tmp_path / 'f.csv'}\n"
    lines = err.splitlines()
    assert lines[0] == f"passreid: left out: {images / '1.png'}: no image that Pillow can identify"
    assert lines[1:] == [
        f"passreid: left out: {missing}: no such file",
        "passreid: 2 of 4 images could not be read",
    ]
    rows = (tmp_path / "f.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["name", str(images / "0.png"), str(images / "2.png")]
    assert "nan" not in "".join(rows[1:])


def test_descriptors_that_overflow_are_named_and_not_written(images, tmp_path, capsys):
    torch.manual_seed(0)
    model, out = timm.create_model("test_pass_vit"), tmp_path / "f.npz"
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.weight.mul_(1e8)
    passreid_models.save_pretrained(model, tmp_path / "model")
    (images / "1.png").write_bytes(b"damaged")
    assert run("embed", images, "-o", out, "--model", tmp_path / "model", "--dtype", "float16") == 1
    assert not out.exists()
    lines, advice = capsys.readouterr().err.splitlines(), "compute in float32 or bfloat16 (--dtype)"
    assert lines[0].startswith(f"passreid: left out: {images / '1.png'}: ")
    assert lines[1] == f"passreid: left out: {images / '0.png'}: the descriptor is not finite: {advice}"
    assert lines[3:] == [
        f"passreid: 2 of 3 descriptors are not finite: {advice}",
        "passreid: 1 of 3 images could not be read",
        f"passreid: no descriptors, so {out} was not written",
    ]


def test_many_images_whose_descriptor_overflows_are_named_up_to_a_number(images, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_pass_vit")
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.weight.mul_(1e8)
    passreid_models.save_pretrained(model, tmp_path / "model")
    files = [images / "0.png"] * 9
    assert run("embed", *files, "-o", tmp_path / "f.npz", "--model", tmp_path / "model", "--dtype", "float16") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [": the descriptor is not finite: " in line for line in lines] == [True] * 5 + [False] * 3
    assert lines[5] == "passreid: left out: 4 more images for the same reason"
    assert lines[6].startswith("passreid: 9 of 9 descriptors are not finite: ")


def test_eval_of_descriptors_that_overflow_gives_the_advice_and_exits_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PASSREID_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = timm.create_model("test_pass_vit")
    with torch.no_grad():
        model.blocks[-1].mlp.fc2.weight.mul_(1e8)
    passreid_models.save_pretrained(model, tmp_path / "model")
    data = "synthetic:ids=8,images=4,cameras=2,seed=0,size=64x32"
    advice = "16 of 16 descriptors are not finite: compute in float32 or bfloat16 (--dtype)"
    for options in ([], ["--open-set", "--rerank"]):
        assert run("eval", data, "--model", tmp_path / "model", "--dtype", "float16", "--device", "cpu", *options) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"passreid: no query image can be ranked: {advice}"
    assert not list((tmp_path / "cache" / "features").glob("*"))
    assert run("eval", data, "--model", tmp_path / "model", "--dtype", "bfloat16", "--device", "cpu", "--open-set") == 0
    assert "as an open set" in capsys.readouterr().out


def test_embed_strict_stops_at_an_unreadable_image_and_writes_nothing(images, model_name, tmp_path, capsys):
    out, missing = tmp_path / "f.npz", tmp_path / "missing.jpg"
    sentence = refused(capsys, "embed", images, missing, "-o", out, "--model", model_name, "--strict")
    assert sentence == f"passreid: {missing}: no such file"
    assert not out.exists()


def test_embed_of_nothing_but_unreadable_images_writes_no_file_and_exits_with_1(model_name, tmp_path, capsys):
    out = tmp_path / "f.npz"
    (tmp_path / "a.jpg").write_text("no image")
    assert run("embed", tmp_path / "a.jpg", tmp_path / "b.jpg", "-o", out, "--model", model_name) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "passreid: 2 of 2 images could not be read",
        f"passreid: no descriptors, so {out} was not written",
    ]
    assert not out.exists()


@pytest.mark.parametrize("command", ["embed", "parts"])
def test_images_of_which_none_is_there_are_refused_before_any_work(command, images, capsys, monkeypatch):
    monkeypatch.setattr("passreid_models.embed.Embedder.__init__", lambda *a, **k: pytest.fail("the model was loaded"))
    missing = images.with_name(images.name + "x")
    sentence = refused(
        capsys, command, missing, missing / "a.jpg", "-o", images.parent / {"embed": "f.npz", "parts": "f.png"}[command]
    )
    assert sentence == f"passreid: {missing}: no such file or folder; did you mean {images.name}?"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["eval", "data", "--size", "ax"], "passreid eval: argument --size: "),
        (["embed"], "passreid embed: the following arguments are required: images, -o/--output"),
        (["weights"], "passreid weights: the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(words, sentence, capsys):
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(sentence)
    assert line.endswith(f"; passreid {words[0]} --help lists the options")


@pytest.mark.parametrize(
    ("output", "options", "reason"),
    [
        ("f.txt", [], "features are written as one of .safetensors, .npz, .csv"),
        ("f", [], "features are written as one of .safetensors, .npz, .csv"),
        ("f.csv", ["--parts"], "parts do not fit into a CSV file, use .safetensors or .npz"),
    ],
)
def test_embed_refuses_an_output_that_it_cannot_write_before_any_work(
    output, options, reason, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("passreid_models.embed.Embedder.__init__", lambda *a, **k: pytest.fail("the model was loaded"))
    sentence = refused(capsys, "embed", images, "-o", tmp_path / output, *options)
    assert sentence == f"passreid: {tmp_path / output}: {reason}"


def test_embed_refuses_more_names_than_a_safetensors_file_holds_before_any_work(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("passreid_models.embed.Embedder.__init__", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setattr("passreid_models.embed.MAX_NAMES", 100)
    sentence = refused(capsys, "embed", images, "-o", tmp_path / "f.safetensors")
    assert sentence.endswith("a safetensors file has 100 MB for names, and those of 3 images take more; use .npz")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "pass_vit_tyni"], "unknown model 'pass_vit_tyni'; known: pass_vit_tiny_patch16, "),
        (["--model", "resnet50"], "unknown model 'resnet50'; known: "),
        (["--model", "pass_vit_small_patch16.nope"], "there are no weights 'pass_vit_small_patch16.nope'; known: "),
        (["--model", "pass_vit_base_ics_patch16"], "pass_vit_base_ics_patch16 has no bundled weights"),
        (["--model", "local-dir:/no/such/folder"], "/no/such/folder"),
        (["--batch-size", "0"], "batch_size must be 1 or more, got 0"),
        (["--device", "nonsense"], "device: 'nonsense' is not there"),
    ],
)
def test_embed_refuses_wrong_options_in_one_sentence(options, reason, images, model_name, tmp_path, capsys):
    options = options if "--model" in options else [*options, "--model", model_name]
    assert reason in refused(capsys, "embed", images, "-o", tmp_path / "f.npz", *options)
    assert not (tmp_path / "f.npz").exists()


def test_embed_refuses_a_folder_without_images(model_name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    sentence = refused(capsys, "embed", tmp_path / "empty", "-o", tmp_path / "f.npz", "--model", model_name)
    assert sentence.startswith("passreid: no images")
    assert str(tmp_path / "empty") in sentence


# ---- gallery


def test_gallery_writes_a_page_and_names_what_it_leaves_out(images, model_name, tmp_path, capsys):
    out, options = tmp_path / "gallery.html", ("--model", model_name, "--device", "cpu")
    assert run("gallery", images, "-o", out, *options) == 0
    output = capsys.readouterr()
    assert output.out == f"3 images -> {out} ({out.stat().st_size / 1e6:.1f} MB)\n"
    (images / "bad.png").write_bytes(b"no image")
    assert run("gallery", images, "-o", out, *options) == 1
    output = capsys.readouterr()
    assert output.out.startswith("3 of 4 images -> ")
    assert f"passreid: left out: {images / 'bad.png'}: no image that Pillow can identify\n" in output.err
    assert "name a page such as gallery.html" in refused(capsys, "gallery", images, "-o", tmp_path / "a.txt", *options)


# ---- parts


def test_parts_draws_files_and_folders(images, model_name, tmp_path, capsys):
    out = tmp_path / "parts.png"
    assert run("parts", images / "2.png", "-o", out, "--model", model_name, "--device", "cpu") == 0
    assert capsys.readouterr().out == f"1 image -> {out}\n"
    assert run("parts", images / "2.png", images, "-o", out, "--model", model_name, "--device", "cpu") == 0
    assert capsys.readouterr().out == f"4 images -> {out}\n"
    with Image.open(out) as picture:
        assert picture.size == (940, 28 + 4 * 178)  # of maps of 4 tokens, 80x160 pixels each


def test_parts_refuses_what_it_cannot_read_or_write(images, model_name, tmp_path, capsys):
    (images / "bad.png").write_bytes(b"no image")
    options = ("--model", model_name, "--device", "cpu")
    assert "bad.png: no image that Pillow" in refused(capsys, "parts", images, "-o", tmp_path / "a.png", *options)
    assert "name a picture file" in refused(capsys, "parts", images, "-o", tmp_path / "a.txt", *options)
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(capsys, "parts", tmp_path / "empty", "-o", tmp_path / "a.png", *options)
    assert not list(tmp_path.glob("a.*"))


# ---- convert


def test_convert_prints_the_report_and_writes_what_timm_loads(official_file, tmp_path, capsys):
    folder = tmp_path / "converted"
    assert run("convert", official_file, folder) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{official_file}: pre-training checkpoint, teacher\n")
    assert "folded     cls_token" in out
    assert "part_token3 + part3_pos" in out
    assert out.endswith(f'written: timm.create_model("local-dir:{folder}", pretrained=True)\n')
    torch.manual_seed(1)
    original = timm.create_model("test_pass_vit").state_dict()
    converted = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    assert original.keys() == converted.keys()
    assert all(torch.allclose(original[k], v, atol=1e-6) for k, v in converted.items())


def test_convert_hands_its_options_on(official_file, tmp_path):
    options = ("--fusion", "mean", "--mean-std", "0.5", "--img-size", "96x32", "--model", "test_pass_vit")
    assert run("convert", official_file, tmp_path / "out", *options) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "test_pass_vit"
    assert config["fusion"] == "mean"
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 32]
    assert load_file(tmp_path / "out" / "model.safetensors")["pos_embed"].shape == (1, 6 * 2, 64)


@pytest.fixture
def not_ours(tmp_path) -> dict[str, Path]:
    """Files that are no checkpoint of this family, by a part of the reason."""
    folder = tmp_path / "not_ours"
    folder.mkdir()
    (folder / "notes.pth").write_text("root:x:0:0: a text file\n")
    (folder / "empty.pth").touch()
    (folder / "page.pth").write_text("<html>Quota exceeded</html>")
    (folder / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    resnet = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
    torch.save(resnet, folder / "resnet.pth")
    save_file(resnet, folder / "resnet.safetensors")
    torch.save([1, 2], folder / "list.pth")
    return {
        "no checkpoint at": folder / "missing.pth",
        f"{folder / 'notes.pth'} is not a PyTorch checkpoint": folder / "notes.pth",
        f"{folder / 'empty.pth'} is not a PyTorch checkpoint": folder / "empty.pth",
        f"{folder / 'page.pth'} is not a PyTorch checkpoint": folder / "page.pth",
        "is not a whole safetensors file": folder / "short.safetensors",
        "resnet.pth: this is a ResNet": folder / "resnet.pth",
        "resnet.safetensors: this is a ResNet": folder / "resnet.safetensors",
        "expected a dictionary of named tensors, got a list": folder / "list.pth",
        "it is a folder": folder,
    }


def test_convert_refuses_files_that_are_not_checkpoints_of_this_family_in_one_sentence(not_ours, tmp_path, capsys):
    for reason, path in not_ours.items():
        sentence = refused(capsys, "convert", path, tmp_path / "out")
        assert reason in sentence
        assert str(path) in sentence
        assert not (tmp_path / "out").exists()


def test_convert_refuses_a_folder_with_content_and_leaves_it_as_it_is(official_file, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    sentence = refused(capsys, "convert", official_file, tmp_path / "precious")
    assert sentence == f"passreid: {tmp_path / 'precious'} exists and is not an empty folder: name another"
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("size", ["384", "axb", "384x", "384x128x3", "0x0", "-16x16", "250x128"])
def test_convert_refuses_image_sizes_that_are_none(size, official_file, tmp_path, capsys):
    assert run("convert", official_file, tmp_path / "out", f"--img-size={size}") == 2
    err = capsys.readouterr().err
    assert f"expected HEIGHTxWIDTH in multiples of 16 such as 384x128, got '{size}'" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "nope"], "unknown model 'nope'; known: "),
        (["--model", "pass_vit_small_patch16"], "use test_pass_vit"),
        (["--network", "student"], "no student, only: teacher, epoch"),
        (["--num-heads", "0"], "64 wide, which cannot be split over 0 heads"),
        (["--num-heads", "3"], "64 wide, which cannot be split over 3 heads"),
    ],
)
def test_convert_refuses_options_that_do_not_fit_the_file(options, reason, official_file, tmp_path, capsys):
    assert reason in refused(capsys, "convert", official_file, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


# ---- weights


def test_weights_list_shows_every_row_of_the_manifest(capsys):
    assert run("weights", "list") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "here", "size", "mAP", "Rank-1", "measured", "on,", "by", "training", "data"]
    assert [row.split()[0] for row in rows] == [w.name for w in zoo.list_weights()]
    row = next(row for row in rows if row.startswith("pass_vit_small_patch16.lup_market1501 "))
    assert row.split()[1:] == [
        "-",
        "256x128",
        "92.2",
        "96.3",
        *["Market-1501,", "the", "authors", "LUPerson,", "Market-1501"],
    ]
    row = next(row for row in rows if row.startswith("pass_vit_tiny_patch16.synth_reid "))
    assert "46.5    56.9  300 generated persons on the street, this package " in row


def test_weights_list_of_an_architecture_shows_its_rows_alone(capsys):
    assert run("weights", "list", "pass_vit_base_patch16") == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert rows
    assert all(row.startswith("pass_vit_base_patch16.") for row in rows)


def test_weights_list_json_is_the_manifest(capsys):
    assert run("weights", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((zoo.weights_dir() / "manifest.json").read_text())


def test_weights_verify_prints_ok_for_bundled_files_and_not_pulled_for_the_others(capsys):
    assert run("weights", "verify") == 0
    states = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert states == {w.name: "ok" if w.bundled_file else "not pulled" for w in zoo.list_weights()}


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("not pulled", 0), ("damaged", 1), ("missing", 1)])
def test_weights_verify_exits_with_1_when_a_file_is_damaged_or_missing(state, code, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "verify", lambda name: [("a.b", "ok"), ("c.d", state)])
    assert run("weights", "verify") == code
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=1) == ["c.d", state]


@pytest.mark.parametrize(
    ("command", "quoted"), [("pull", "'nope.tag'"), ("verify", "'nope.tag'"), ("list", "'nope.tag'")]
)
def test_weights_refuses_unknown_names(command, quoted, capsys):
    sentence = refused(capsys, "weights", command, "nope.tag")
    assert quoted in sentence
    assert "passreid weights list" in sentence


def test_weights_pull_of_an_unknown_tag_lists_the_known_ones(capsys):
    sentence = refused(capsys, "weights", "pull", "pass_vit_base_patch16.nope")
    known = ", ".join(w.name for w in zoo.list_weights("pass_vit_base_patch16"))
    assert sentence.endswith(f"known: {known}")


def test_weights_pull_from_a_file_that_is_missing_names_it(tmp_path, capsys):
    sentence = refused(capsys, "weights", "pull", "pass_vit_small_patch16.lup", "--from", tmp_path / "missing.pth")
    assert str(tmp_path / "missing.pth") in sentence


def test_publish_dry_run_shows_the_files_and_the_card_and_asks_nobody(model_dir, monkeypatch, capsys):
    monkeypatch.setattr("passreid_models.checkpoints.publish.HfApi", lambda *a, **k: pytest.fail("the Hub was asked"))
    assert run("weights", "publish", model_dir, "org/name", "--dry-run") == 0
    listing, card = capsys.readouterr().out.split("\n\n", 1)
    sizes = {row.split()[1]: int(row.split()[0].replace(",", "")) for row in listing.splitlines()}
    assert sizes["model.safetensors"] == (model_dir / "model.safetensors").stat().st_size
    assert sizes.keys() == {"model.safetensors", "config.json", "README.md"}
    assert card.startswith("---\n")
    assert "**Training data:** " in card
    assert card.endswith("\nnothing was pushed to org/name (--dry-run)\n")


def test_publish_refuses_other_folders_and_other_names(model_dir, tmp_path, capsys):
    assert "has no model.safetensors" in refused(capsys, "weights", "publish", tmp_path, "org/name", "--dry-run")
    assert "expected a repository org/name, got 'name'" in refused(
        capsys, "weights", "publish", model_dir, "name", "--dry-run"
    )


# ---- demo


def test_demo_prints_a_table_and_draws_each_query_with_its_hits(model_name, tmp_path, capsys):
    picture = tmp_path / "ranking.png"
    assert run("demo", "--model", model_name, "--out", picture, "--ids", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 generated persons, 3 queries, 21 gallery images, 4 cameras"
    assert lines[2].split() == ["descriptor", "width", "mAP", "Rank-1"]
    assert [line.split()[-3] for line in lines[3:6]] == ["128", "384", "128"]
    assert [line.split()[0] for line in lines[3:6]] == [model_name, "pixels,", "chance"]
    assert lines[-1] == f"the first 3 queries and their best 8 hits: {picture}"
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.size == (9 * (64 + 8) + 8, 3 * (128 + 8))  # 1 query and 8 hits a row, each in a frame of 4
        pixels = np.asarray(image.convert("RGB"))
    frames = {
        tuple(pixels[136 * row + 2, 72 * column + 8 * bool(column) + 8]) for row in range(3) for column in range(9)
    }
    assert frames == {(0, 0, 0), (0, 128, 0), (255, 0, 0)}  # queries black, right hits green, wrong ones red
    assert all(tuple(pixels[136 * row + 2, 8]) == (0, 0, 0) for row in range(3))


def test_demo_ranks_descriptors_that_are_compared_as_they_come_by_distance(tmp_path, capsys):
    model, picture = make_model(neck="multi", global_pool="mean"), tmp_path / "ranking.png"
    with torch.no_grad():  # lengths that tell
        for parameter in model.fc_norm.parameters():
            parameter.copy_(torch.randn_like(parameter) * 3)
    passreid_models.save_pretrained(model, tmp_path / "model")
    assert run("demo", "--model", tmp_path / "model", "--out", picture, "--ids", 6) == 0
    scores = [float(x) for x in capsys.readouterr().out.splitlines()[3].split()[-2:]]
    data, q = SyntheticPersons(6, 8, 4, seed=0), np.arange(48) % 8 == 0
    x, pids, camids = Embedder(model)([data[i][0] for i in range(48)]), np.array(data.pids), np.array(data.camids)
    labels = pids[q], pids[~q], camids[q], camids[~q]
    euclidean, cosine = (evaluate(x[q], x[~q], *labels, metric=metric) for metric in ("euclidean", "cosine"))
    assert scores == [round(100 * euclidean.mAP, 1), round(100 * euclidean.rank1, 1)]
    assert abs(100 * cosine.mAP - scores[0]) > 0.5
    euclidean, cosine = (pids[~q][rank(x[q], x[~q], 8, metric).indices] for metric in ("euclidean", "cosine"))
    with Image.open(picture) as image:
        frames = np.asarray(image.convert("RGB"))[2::136, 8 + 8 + 72 :: 72][:6]  # of each hit
    assert np.array_equal(frames[..., 1] == 128, euclidean == pids[q][:, None])
    assert not np.array_equal(euclidean, cosine)


def test_demo_of_one_person_is_refused(model_name, tmp_path, capsys):
    sentence = refused(capsys, "demo", "--model", model_name, "--out", tmp_path / "a.png", "--ids", 1)
    assert sentence == "passreid: ranking needs 2 persons or more, got 1"


def test_demo_make_data_writes_the_layout_of_market1501(tmp_path, capsys):
    folder = tmp_path / "persons"
    assert run("demo", "--make-data", folder, "--ids", 2) == 0
    assert capsys.readouterr().out == f"20 images of 2 generated persons under 8 cameras -> {folder}\n"
    names = {
        part: sorted(path.name for path in (folder / part).iterdir())
        for part in ("bounding_box_train", "query", "bounding_box_test")
    }
    assert [len(v) for v in names.values()] == [10, 8, 2]
    assert {name[:4] for name in names["bounding_box_train"]} == {"0001"}
    assert names["query"] == [f"0002_c{camera}s1_000000_01.jpg" for camera in range(1, 9)]


def test_demo_make_data_refuses_a_folder_of_other_files_and_leaves_it_as_it_is(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    sentence = refused(capsys, "demo", "--make-data", tmp_path, "--ids", 2)
    assert str(tmp_path) in sentence
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# ---- Version, usage, interruption


def test_version_is_that_of_the_package(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"passreid-models {passreid_models.__version__}\n"


def test_no_command_and_an_unknown_one_are_refused_with_the_usage(capsys):
    for args in ([], ["train-everything"]):
        assert run(*args) == 2
        assert capsys.readouterr().err.startswith("usage: passreid")


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["evl"], "eval"),
        (["fine-tune"], "finetune"),
        (["weights", "lst"], "list"),
        (["eval", "data/", "--modell", "a"], "--model"),
        (["embed", "a.jpg", "-o", "a.npz", "--dtype", "bfloat61"], "bfloat16"),
    ],
)
def test_a_misspelt_command_option_or_choice_names_the_nearest(words, nearest, capsys):
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"; did you mean {nearest}?\n")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pass_vit_tyni_patch16", "pass_vit_tiny_patch16"),
        ("synth_ried", "synth_reid"),
        ("pass_vit_small_patch16.lup_market", "lup_market1501"),
        ("pass_vit_smal_patch16.lup", "pass_vit_small_patch16.lup"),
    ],
)
def test_a_misspelt_model_or_tag_names_the_nearest(name, nearest, images, tmp_path, capsys):
    assert refused(capsys, "embed", images, "-o", tmp_path / "a.npz", "--model", name).endswith(
        f"; did you mean {nearest}?"
    )


def test_a_word_that_is_near_nothing_is_refused_without_a_suggestion(capsys):
    assert run("zzzz") == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["weights", "list"], ["--help"], ["--version"], ["eval", "--help"], ["finetune", "--help"]], ids=" ".join
)
def test_an_output_whose_reader_has_gone_ends_quietly(words, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert run(*words) in (0, 1)  # argparse ignores what it cannot write
        stdout.flush()  # as Python does when it ends
    assert capsys.readouterr().err == ""


def test_names_that_the_output_s_encoding_lacks_are_escaped(images, model_name, tmp_path, monkeypatch):
    (images / "0.png").rename(images / "\u00e9\udcff.png")
    (images / "1.png").write_bytes(b"no image")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert run("embed", images, "-o", tmp_path / "\u00e9.csv", "--model", model_name) == 1
    assert stdout.buffer.getvalue().decode() == f"2 descriptors of width 128 -> {tmp_path}/\\xe9.csv\n"


def test_quiet_shows_no_bars(monkeypatch, images, model_name, tmp_path):
    shown = []
    bar = tqdm.tqdm

    def record(*args: Any, **options: Any) -> Any:
        shown.append(options["disable"])
        return bar(*args, **options)

    monkeypatch.setattr("passreid_models.embed.tqdm", record)
    for words in ([], ["-q"], ["--quiet"]):
        assert run("embed", images, "-o", tmp_path / "a.npz", "--model", model_name, *words) == 0
    assert shown == [None, True, True]  # None: only on a terminal


def test_eval_and_data_check_and_synth_pass_quiet_on(monkeypatch):
    class CalledError(Exception):
        pass

    def called(*args: Any, **options: Any) -> None:
        raise CalledError(options["progress"])

    for name in ("passreid_models.evaluation.evaluate.evaluate_model", "passreid_models.data.check.check_dataset",
                 "passreid_synth3d.dataset.make_data"):  # fmt: skip
        monkeypatch.setattr(name, called)
    for words in (["eval", "a"], ["data", "check", "a"], ["synth", "--ids=2", "--images=2", "--out=a"]):
        for quiet in (False, True):
            with pytest.raises(CalledError) as e:
                run(*words, *["-q"] * quiet)
            assert e.value.args == (not quiet,)


# ---- Completion


@pytest.fixture(scope="module")
def completion(tmp_path_factory) -> Path:
    pytest.importorskip("shtab")
    script = tmp_path_factory.mktemp("completion") / "passreid.bash"
    with script.open("w") as file, contextlib.redirect_stdout(file):
        assert run("--print-completion", "bash") == 0
    return script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["ev"], ["eval"]),
        (["weights", "p"], ["pull", "publish"]),
        (["eval", "--rer"], ["--rerank"]),
        (["finetune", "--lab"], ["--label-smoothing"]),
        (["cluster", "--preset", "usl"], ["usl-market1501", "usl-msmt17"]),
        (["train", "--init", "pass_vit_small_patch16.s"], ["pass_vit_small_patch16.synth_reid"]),
        (["embed", "pict"], ["pictures"]),
    ],
)
def test_bash_completes_commands_options_presets_models_and_files(words, completed, completion, tmp_path):
    (tmp_path / "pictures").mkdir()
    line = shlex.join(["passreid", *words])
    code = f'. {completion}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_passreid; echo "${{COMPREPLY[@]}}"'
    output = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert sorted(output.split()) == sorted(completed)


def test_completion_for_another_shell_or_without_its_library_is_refused(monkeypatch, capsys):
    assert run("--print-completion", "cmd") == 2
    assert "expected one of bash, zsh, tcsh, got 'cmd'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert '".[completion]"' in refused(capsys, "--print-completion", "bash")


def test_interrupting_ends_with_130_and_one_line(monkeypatch, capsys):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "list_weights", interrupt)
    assert run("weights", "list") == 130
    assert capsys.readouterr().err == "passreid: interrupted\n"


def test_an_error_of_the_program_itself_is_not_passed_off_as_the_users(monkeypatch):
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(zoo, "list_weights", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("weights", "list")


def test_choices_of_the_command_line_are_those_of_the_library():
    actions = {
        action.dest: action
        for command in ("embed", "convert")
        for action in cli._parser()._subparsers._group_actions[0].choices[command]._actions
    }
    assert set(actions["mean_std"].choices) == set(STATISTICS)
    assert set(actions["resize"].choices) == set(load.RESIZE_METHODS)
    assert set(actions["fusion"].choices) | {""} == set(passreid_models.pass_vit.POOLS)
    assert {"" if c == "none" else c for c in actions["neck"].choices} == set(passreid_models.pass_vit.NECKS)


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("a mistake"), 2), (TypeError("a fault"), 1), (Stopped("late"), 0)]
)
def test_a_process_that_ends_before_nccls_group_does_not_wait_for_the_others(error, code, monkeypatch, capsys):
    def work() -> int:
        raise error

    def end(code: int) -> None:
        raise SystemExit(f"ended at once: {code}")

    monkeypatch.setattr(cli.os, "_exit", end)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    with pytest.raises(SystemExit, match=f"ended at once: {code}"):
        cli.run("passreid-train", work)
    assert str(error) in capsys.readouterr().err
    assert cli.run("passreid-train", lambda: 0) == 0
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    with pytest.raises(TypeError) if code == 1 else contextlib.nullcontext():
        assert cli.run("passreid-train", work) == code
