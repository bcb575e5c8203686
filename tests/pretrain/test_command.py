"""passreid-train: options, presets and files become a configuration; exit codes; one sentence for a mistake."""

import re
import tomllib
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from passreid_models import cli
from passreid_models.pretrain.config import PRESETS, PretrainConfig
from passreid_models.pretrain.run import train
from passreid_models.training.folder import RunFolder
from tests import ROOT
from tests.tiny_runs import TINY, assert_same_bits, files, flags, result, tiny, write_images

# A name that changes breaks the command lines, the YAML files and the runs of users.


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 8)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run of an epoch of two steps."""
    return train(tiny(data, tmp_path_factory.mktemp("run") / "run", epochs=1)).parent


def parse(*words: object) -> PretrainConfig:
    return cli._train_config([str(w) for w in words])


def call(words: list[str], program: str = "passreid-train") -> int:
    """Exit code, returned or raised."""
    try:
        return cli.train(words) if program == "passreid-train" else cli.main(["train", *words])
    except SystemExit as e:
        return int(e.code or 0)


def refused(capsys, words: list[str], code: int = 2) -> str:
    """Error output of a command that ends with ``code``."""
    capsys.readouterr()
    assert call(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "Warning" not in err
    return err


# ---- Options


def test_data_alone_gives_the_published_settings():
    assert parse("crops/") == PretrainConfig(data="crops/")


@pytest.mark.parametrize(
    "words",
    [
        ["crops/", "--epochs", 5, "--lr", 0.1],
        ["--epochs", 5, "crops/", "--lr", 0.1],
        ["--epochs=5", "--lr=0.1", "crops/"],
        ["--lr", 0.1, "--data", "crops/", "--epochs", 5],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_data_stands_anywhere_among_the_options(words):
    assert parse(*words) == PretrainConfig(data="crops/", epochs=5, lr=0.1)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--batch-size", 32], {"batch_size": 32}),
        (["--batch_size", 32], {"batch_size": 32}),
        (["--batch-size=32"], {"batch_size": 32}),
        (["--warmup-teacher_temp-epochs=3"], {"warmup_teacher_temp_epochs": 3}),
        (["--size", "64x32"], {"size": (64, 32)}),
        (["--size=64x32"], {"size": (64, 32)}),
        (["--size", 64, 32], {"size": (64, 32)}),
        (["--local-size", 32, 16, "--seed", 3], {"local_size": (32, 16), "seed": 3}),
        (["--size=[64,32]", "--local-size=32x16"], {"size": (64, 32), "local_size": (32, 16)}),
        (["--blur-radius", "0.5", "1"], {"blur_radius": (0.5, 1.0)}),
        (["--local-scale=.3,0.8", "--global-scale", "[0.5, 1]"], {"local_scale": (0.3, 0.8), "global_scale": (0.5, 1)}),
        (["--local-scale", "[0.2,0.5]"], {"local_scale": (0.2, 0.5)}),
        (["--areas", "[[0,0.5],[0.2,0.7],[0.5,1]]"], {"areas": [(0.0, 0.5), (0.2, 0.7), (0.5, 1.0)]}),
        (["--parts", 0, "--workers=3"], {"parts": 0, "workers": 3}),
        (["--workers", "null"], {"workers": None}),
        (["--lr", "1e-3"], {"lr": 1e-3}),
        (["--init", ""], {"init": ""}),
        (["--init=", "--seed=4"], {"init": "", "seed": 4}),
        (["--out", "a=b"], {"out": "a=b"}),
        (["--out", "12x34"], {"out": "12x34"}),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_options_take_dashes_underscores_equals_signs_and_sizes(words, values):
    assert parse("crops/", *words) == PretrainConfig(data="crops/", **values)
    assert parse(*words, "crops/") == PretrainConfig(data="crops/", **values)


@pytest.mark.parametrize("name", [f.name for f in fields(PretrainConfig) if f.type is bool])
def test_switches_are_bare_or_explicit(name):
    flag = "--" + name.replace("_", "-")
    for words, value in (
        ([flag], True), ([flag, "true"], True), ([flag, "false"], False), ([flag + "=false"], False),
        ([flag + "=true"], True), ([flag, "False"], False),
    ):  # fmt: skip
        expected = PretrainConfig(data="crops/", seed=3, **{name: value})
        assert parse("crops/", *words, "--seed", 3) == expected
        assert parse("--seed=3", *words, "crops/") == expected


# ---- Presets and files


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_a_valid_configuration_and_flags_win_wherever_they_stand(preset):
    expected = PretrainConfig(data="crops/", **PRESETS[preset])
    assert parse("crops/", "--preset", preset) == expected
    assert parse(f"--preset={preset}", "crops/") == expected
    for words in (["--epochs=90", f"--preset={preset}"], [f"--preset={preset}", "--epochs=90"]):
        assert parse("crops/", *words) == replace(expected, epochs=90)


def test_the_weights_to_begin_with_decide_the_model_and_not_a_preset(tmp_path):
    small = "pass_vit_small_patch16"
    (tmp_path / "settings.yaml").write_text(f"init: {small}.synth_reid\n")
    assert parse("crops/", "--preset=laptop", f"--init={small}.synth_reid").model == small
    assert parse("crops/", "--preset=laptop", f"--config={tmp_path}/settings.yaml").model == small
    assert parse("crops/", "--preset=laptop", "--init=synth").model == "pass_vit_tiny_patch16"
    assert parse("crops/", "--preset=laptop", f"--model={small}").model == small


def test_a_file_wins_over_the_preset_and_flags_over_the_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("data: from_file/\nlr: 0.01\nseed: 7\nsize: [128, 64]\n")
    laptop = PretrainConfig(data="from_file/", **PRESETS["laptop"])
    expected = replace(laptop, lr=0.01, seed=7, size=(128, 64))
    assert parse("--config", file, "--preset=laptop") == expected
    for words in (["--seed=8", "--config", file, "crops/"], ["crops/", f"--config={file}", "--seed", 8]):
        assert parse(*words) == PretrainConfig(data="crops/", lr=0.01, seed=8, size=(128, 64))


def test_a_file_can_name_a_preset_that_its_other_lines_a_flag_and_another_preset_win_over(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("data: from_file/\npreset: laptop\nlr: 0.01\n")
    expected = PretrainConfig(data="from_file/", **PRESETS["laptop"] | {"lr": 0.01})
    assert parse("--config", file) == expected
    assert parse(f"--config={file}", "--momentum=0.9") == replace(expected, momentum=0.9)
    lup = PretrainConfig(data="from_file/", **PRESETS["pass-vit-s-lup"], lr=0.01)
    assert parse(f"--config={file}", "--preset=pass-vit-s-lup") == lup


def test_presets_and_files_that_are_named_one_by_one_all_count(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("preset: laptop\nmomentum: 0.9\n")
    two.write_text("lr: 0.01\n")
    laptop = PRESETS["laptop"] | {"lr": 0.01}
    assert parse("crops/", f"--config={one}", f"--config={two}") == PretrainConfig(
        data="crops/", **laptop | {"momentum": 0.9}
    )
    both = PRESETS["laptop"] | PRESETS["pass-vit-s-lup"]
    assert parse("crops/", "--preset=laptop", "--preset=pass-vit-s-lup") == PretrainConfig(data="crops/", **both)


@pytest.mark.parametrize("text", ["lr: [0.1\nseed: {", "- lr\n", "preset: [laptop]\n", "preset: desktop\n"])
def test_a_file_that_is_no_configuration_is_refused_without_a_traceback(tmp_path, capsys, text):
    (tmp_path / "settings.yaml").write_text(text)
    err = refused(capsys, ["crops/", f"--config={tmp_path}/settings.yaml"])
    assert "config" in err or "preset: expected" in err or '"preset"' in err
    assert err.count("\n") == 1


def test_a_binary_file_as_configuration_is_refused_by_its_name(tmp_path, capsys):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    err = refused(capsys, ["crops/", f"--config={tmp_path}/photo.jpg"])
    assert f"config: {tmp_path}/photo.jpg is no text file, expected YAML" in err


def test_the_configuration_of_a_run_is_a_file_that_makes_the_same_run_again(run, data, tmp_path, capsys):
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert sorted(saved) == sorted(f.name for f in fields(PretrainConfig))
    assert parse("--config", run / "config.yaml") == tiny(data, run, epochs=1)
    assert call([f"--config={run}/config.yaml", f"--out={tmp_path}/again"]) == 0
    assert_same_bits(tmp_path / "again", result(run))


def test_every_option_survives_the_file(tmp_path):
    config = PretrainConfig(
        data="a b: c/", areas=[(0.0, 0.4), (0.6, 1.0)], parts=2, local_views=4, size=(128, 64), local_size=(64, 32),
        workers=2, warmup_epochs=1.5, lr=3e-7, tensorboard=True, norm_last_layer=False,
    )  # fmt: skip
    config.save(tmp_path / "config.yaml")
    assert parse(f"--config={tmp_path}/config.yaml") == config


# ---- Help


@pytest.mark.parametrize("program", ["passreid-train", "passreid"])
def test_help_names_every_option_with_its_meaning(capsys, program):
    assert call(["--help"], program) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: passreid-train DATA")
    assert [f.name for f in fields(PretrainConfig) if not re.search(rf"--{f.name}[ ,]", out)] == []
    assert "Passes over the data." in out
    assert all(preset in re.sub(r"-\n\s+", "-", out) for preset in PRESETS)


def test_the_installed_command_is_this_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["passreid-train"].partition(":")
    assert getattr(import_module(module), name) is cli.train


# ---- Exit codes


@pytest.mark.parametrize("program", ["passreid-train", "passreid"])
def test_a_finished_run_and_one_out_of_time_end_with_0(data, tmp_path, capsys, program):
    words = flags(data, tmp_path / "run", epochs=1)
    assert call([*words, "--max-minutes=1e-9"], program) == 0
    assert "stopped at step 1 of 2; --resume auto continues" in capsys.readouterr().err
    assert call([*words, "--resume", "auto"], program) == 0
    assert f"{tmp_path}/run/export" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs=0"], "passreid-train: epochs: expected 1 or more, got 0\n"),
        (["--lr", "-1"], "passreid-train: lr: expected 0 or more, got -1.0\n"),
        (["--clip-by=value"], "passreid-train: clip_by: expected one of parameter, norm, got 'value'\n"),
        (["--model=resnet50"], "passreid-train: model: expected one of pass_vit_tiny_patch16, "),
        (["--size=60x32"], "passreid-train: size: expected (height, width) in multiples of 16, got (60, 32)\n"),
        (["--size=64"], "passreid-train: size: expected two numbers such as 256x128, got 64"),
        (["--local-size=64"], "passreid-train: local_size: expected two numbers such as 256x128, got 64"),
        (["--local-scale=0.5"], "passreid-train: local_scale: expected two numbers, got 0.5"),
        (["--epochs=many"], "passreid-train: epochs: expected int, got many"),
        (["--compile=perhaps"], "passreid-train: compile: expected bool, got perhaps"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--init", "--seed", "3"], "argument --init: expected one argument"),
        (["--preset=desktop"], "preset: expected one or more of pass-vit-s-lup, "),
        (["--epoch=5"], "unrecognized arguments: --epoch=5"),
        (["--learning-rate", "0.1"], "unrecognized arguments: --learning_rate=0.1"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["second/"], "passreid-train: data: one is expected, got "),
        (["--batch-size=9"], "passreid-train: batch_size: 9 is more than the 8 images of "),
        (["--batch-size=4", "--accumulate=3"], "passreid-train: batch_size: 4 is not divisible by "),
        (["--init=nowhere"], "nowhere"),
        (["--resume=nowhere.pt"], "passreid-train: no checkpoint at nowhere.pt\n"),
        (["--device=cuda:99"], "passreid-train: device: 'cuda:99' is not there"),
        (["--probe=nowhere"], "passreid-train: probe: "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_ends_with_2_is_named_and_leaves_no_files(data, tmp_path, capsys, words, message):
    options = {w.split("=")[0].lstrip("-").replace("-", "_") for w in words}
    common = [f for f in flags(data, tmp_path / "run") if f.split("=")[0].lstrip("-").replace("-", "_") not in options]
    err = refused(capsys, [*common, *words])
    assert message in err
    if message.startswith("passreid-train: "):
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "passreid-train: data: expected a folder of person crops, such as passreid-train my_crops/\n"),
        ("{}/nowhere", "passreid-train: {}/nowhere: no such file or folder; expected a folder of images, "),
        ("{}/empty", "passreid-train: "),
        ("synthetic:people=5", "passreid-train: synthetic:people=5: unknown key 'people'; known: ids, "),
    ],
)
def test_data_that_are_not_there_are_named(tmp_path, capsys, where, message):
    (tmp_path / "empty").mkdir()
    words = [w for w in flags(where.format(tmp_path), tmp_path / "run") if w]
    assert refused(capsys, words).startswith(message.format(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_run_that_is_there_is_neither_overwritten_nor_mixed_with_other_settings(run, data, capsys):
    before = {f: (run / f).read_bytes() for f in files(run) if (run / f).is_file()}
    words = flags(data, run, epochs=1)
    assert "holds a run (step_000000002.pt): --resume auto continues it" in refused(capsys, words)
    err = refused(capsys, [*words, "--resume=auto", "--lr=0.1", "--drop-path=0.2"])
    assert "other settings (drop_path: 0.2, in the run 0.1; lr: 0.1, in the run 0.05)" in err
    assert {f: (run / f).read_bytes() for f in files(run) if (run / f).is_file()} == before


def test_a_loss_that_is_not_finite_ends_with_1_and_names_step_term_and_checkpoint(data, tmp_path, capsys):
    words = flags(data, tmp_path / "run", lr=1e30, warmup_epochs=0)
    assert call(words) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("passreid-train: the loss of step 2 is not finite (CLS: teacher's global view 1, student's")
    assert line.endswith("; the last good checkpoint: none yet")


def test_skip_nonfinite_tolerates_as_many_steps_and_no_more(run, data, tmp_path, capsys):
    words = flags(data, tmp_path / "run")
    assert call([*words, "--max-minutes=1e-9"]) == 0
    path = RunFolder(tmp_path / "run").latest()
    state = RunFolder(tmp_path / "run").load(path)
    state["student"]["heads.0.mlp.4.bias"][0] = torch.nan
    torch.save(state, path)
    assert call([*words, "--resume=auto", "--skip-nonfinite=3"]) == 1
    err = capsys.readouterr().err
    assert [f"left out, {i} of 3 allowed" in err for i in (1, 2, 3)] == [True] * 3
    line = err.splitlines()[-1]
    assert line.startswith("passreid-train: the loss of step 5 is not finite (CLS: ")
    assert line.endswith(f"; the last good checkpoint: {path}")  # none of the NaN, though an epoch ended


def test_the_options_of_the_tests_are_options(data, tmp_path):
    assert parse(*flags(data, tmp_path)) == tiny(data, tmp_path)
    assert set(TINY) < {f.name for f in fields(PretrainConfig)}
