"""FinetuneConfig and ClusterConfig: published values, defaults from init, flags and YAML, refused values."""

from dataclasses import replace
from typing import Any

import pytest
import timm

from passreid_models import cli, save_pretrained
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.reid.config import DOMAIN, PRESETS, ClusterConfig, FinetuneConfig
from passreid_models.reid.run import complete
from passreid_models.training.command import read_config
from passreid_models.training.config import RunConfig

CONFIGS = (FinetuneConfig, ClusterConfig)


@pytest.fixture(params=CONFIGS, ids=lambda c: c.__name__)
def config(request) -> type[RunConfig]:
    return request.param


def parse(config: type, *words: Any) -> Any:
    presets = PRESETS["finetune" if config is FinetuneConfig else "cluster"]
    return read_config([str(w) for w in words], config, presets, "passreid", "Train.", "data")


# ---- Published values


def test_the_defaults_of_fine_tuning_are_the_published_recipe():
    c = FinetuneConfig()
    assert (c.ids_per_batch, c.images_per_id, c.batch_size) == (16, 4, 64)
    assert (c.lr, c.bias_lr, c.weight_decay, c.momentum, c.layer_decay) == (4e-4, 2.0, 1e-4, 0.9, 1.0)
    assert c.optimizer == ClusterConfig().optimizer == "sgd"
    assert (c.epochs, c.num_warmup_epochs, c.drop_path, c.margin, c.label_smoothing) == (120, 20, 0.1, None, 0.0)
    assert [FinetuneConfig(epochs=e).num_warmup_epochs for e in (1, 12, 24, 200)] == [0, 2, 4, 20]
    assert (c.neck, c.pad, c.flip_prob, c.erase_prob) == ("multi", 10, 0.5, 0.5)
    assert_published(c)


def test_the_defaults_of_clustering_are_the_published_recipe():
    c = ClusterConfig()
    assert (c.clusters_per_batch, c.images_per_cluster, c.batch_size, c.steps, c.epochs) == (32, 8, 256, 200, 50)
    assert (c.lr, c.num_lr_step, c.lr_gamma, c.weight_decay, c.momentum) == (3.5e-4, 20, 0.1, 5e-4, 0.9)
    assert (c.eps, c.min_samples, c.k1, c.k2, c.temp) == (0.6, 4, 30, 6, 0.05)
    assert (c.memory, c.memory_momentum, c.drop_path, c.dtype) == ("hard", 0.2, 0.3, "float32")
    assert (complete(replace(c, data="market/", init="random")).neck, c.erase_prob) == ("single", 0.5)
    assert_published(c)


# SPEC: neck, fusion and eps of the published runs, by target; UDA from the other of the two datasets
PUBLISHED = {
    "usl-market1501": ("single", "cat", 0.6),
    "usl-msmt17": ("single", "mean", 0.7),
    "uda-market1501": ("multi", "cat", 0.6),
    "uda-msmt17": ("multi", "mean", 0.7),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_presets_of_clustering_are_the_published_runs(preset):
    c = parse(ClusterConfig, "target/", "--preset", preset)
    assert (c.neck, c.fusion, c.eps) == PUBLISHED[preset]
    assert replace(c, neck="", fusion="", eps=0.6) == ClusterConfig(data="target/")
    if preset == "usl-market1501":  # the defaults
        whole = [complete(replace(x, init="random")) for x in (c, ClusterConfig(data="target/"))]
        assert whole[0] == whole[1]


def test_of_several_presets_the_later_wins():
    c = parse(ClusterConfig, "crops/", "--preset", "usl-msmt17,laptop", "--k1", 7)
    assert (c.fusion, c.eps, c.steps, c.k1) == ("mean", 0.5, 40, 7)
    assert parse(ClusterConfig, "crops/", "--preset", "laptop, usl-msmt17").eps == 0.7
    with pytest.raises(ValueError, match=r"preset: expected one or more of usl-market1501, .*, got 'msmt17'"):
        parse(ClusterConfig, "crops/", "--preset", "laptop,msmt17")


def test_the_neck_is_multi_with_a_source_unless_given():
    necks = [complete(ClusterConfig(data="a/", init="random", source=s, neck=n)).neck
             for s, n in (("", ""), ("b/", ""), ("b/", "single"), ("", "multi"))]  # fmt: skip
    assert necks == ["single", "multi", "single", "multi"]


def assert_published(c: Any) -> None:
    """Check model, fusion and size against those published for the LUPerson weights."""
    for init in ("pass_vit_small_patch16.lup", "random"):
        completed = complete(replace(c, data="market/", init=init))
        assert (completed.model, completed.fusion, completed.size) == ("pass_vit_small_patch16", "cat", (256, 128))


# ---- Defaults from init


def test_model_size_and_fusion_default_to_those_of_the_weights(config, tmp_path):
    model = timm.create_model("test_pass_vit", img_size=(96, 32), global_pool="mean")
    save_pretrained(model, tmp_path / "run" / "export")
    for init in (tmp_path / "run", tmp_path / "run" / "export"):
        c = complete(config(data="market/", init=str(init)))
        assert (c.model, c.size, c.fusion) == ("test_pass_vit", (96, 32), "mean")
    c = complete(config(data="market/", init=str(tmp_path / "run"), size=(64, 32), fusion="parts"))
    assert (c.size, c.fusion) == ((64, 32), "parts")
    tag = complete(config(data="market/", init="pass_vit_base_patch16.lup_market1501_384"))
    assert (tag.model, tag.size, tag.fusion) == ("pass_vit_base_patch16", (384, 128), "cat")


def test_a_model_without_parts_has_token_fusion_only(config):
    c = config(data="market/", init="random", model="transreid_vit_small_patch16")
    assert complete(c).fusion == "token"
    with pytest.raises(ValueError, match="fusion: expected token, since transreid_vit_small_patch16 has no parts"):
        complete(replace(c, fusion="cat"))


def test_a_folder_of_another_package_is_refused_by_name(config, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"init: .*config\.json is not the config of a model of this package"):
        complete(config(data="market/", init=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"init: .*config\.json cannot be read as JSON"):
        complete(config(data="market/", init=str(tmp_path)))


# ---- Flags and YAML


def test_the_domain_preset_switches_all_variation_on_and_combines_with_others(config):
    plain, both = parse(config, "crops/"), parse(config, "crops/", "--preset", "laptop,domain")
    assert both == replace(parse(config, "crops/", "--preset", "laptop"), **DOMAIN)
    names = ["jitter_prob", "gray_prob", "blur_prob", "downscale_prob", "jpeg_prob"]
    assert {name: getattr(plain, name) for name in names} == dict.fromkeys(names, 0)
    assert plain.crop_scale == (1, 1)
    assert all(0 < getattr(both, name) < 1 for name in names)
    assert 0 < both.crop_scale[0] < 1
    assert (both.brightness, both.contrast, both.saturation, both.hue) == (0.4, 0.4, 0.3, 0.05)
    pairs = parse(config, "crops/", "--crop-scale", 0.5, 1, "--jpeg-quality", "40,60", "--downscale=0.5x0.5")
    assert (pairs.crop_scale, pairs.jpeg_quality, pairs.downscale) == ((0.5, 1), (40, 60), (0.5, 0.5))


def test_flags_presets_and_files_set_the_same_fields(config, tmp_path):
    plain = parse(config, "crops/", "--init", "lup", "--size", "384x128", "--grad-checkpointing")
    assert plain == config(data="crops/", init="lup", size=(384, 128), grad_checkpointing=True)
    plain.save(tmp_path / "run.yaml")
    assert parse(config, "--config", tmp_path / "run.yaml") == plain
    assert parse(config, "--config", tmp_path / "run.yaml", "--seed", 4).seed == 4
    laptop = parse(config, "crops/", "--preset", "laptop", "--epochs", 7)
    assert laptop.epochs == 7
    assert config.from_dict(laptop.to_dict()) == laptop


@pytest.mark.parametrize("preset", [(kind, name) for kind, names in PRESETS.items() for name in names])
def test_presets_are_valid(preset):
    kind, name = preset
    config = FinetuneConfig if kind == "finetune" else ClusterConfig
    parsed = parse(config, "crops/", "--preset", name)
    assert {k: getattr(parsed, k) for k in PRESETS[kind][name]} == PRESETS[kind][name]


@pytest.mark.parametrize("command", ["finetune", "cluster"])
def test_the_commands_report_a_mistake_in_one_line(command, capsys, tmp_path):
    out = f"--out={tmp_path}/run"
    assert cli.main([command, out]) == 2
    assert capsys.readouterr().err.startswith(f"passreid {command}: data: expected ")
    assert cli.main([command, "nowhere/", "--init=random", out]) == 2
    assert capsys.readouterr().err.startswith(f"passreid {command}: nowhere/: no such file or folder")
    assert cli.main([command, "a/", "b/", out]) == 2
    assert "data: one is expected, got a/, b/" in capsys.readouterr().err
    assert cli.main([command, "a/", "--epochs=0", out]) == 2
    assert "epochs: expected 1 or more, got 0" in capsys.readouterr().err


# ---- Values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet50"}, "model: expected one of "),
        ({"fusion": "sum"}, "fusion: expected one of cat, mean, parts, token, got 'sum'"),
        ({"optimizer": "adam"}, "optimizer: expected one of sgd, adamw, got 'adam'"),
        ({"dtype": "int8"}, "dtype: expected one of auto"),
        ({"size": (250, 128)}, r"size: expected \(height, width\) in multiples of 16"),
        ({"epochs": 2.5}, "epochs: expected int, got 2.5"),
        ({"lr": -1}, "lr: expected 0 or more"),
        ({"drop_path": 1.0}, "drop_path: expected at least 0 and less than 1"),
        ({"erase_prob": 1.5}, "erase_prob: expected between 0 and 1"),
        ({"log_steps": 0}, "log_steps: expected 1 or more"),
        ({"jitter_prob": -0.1}, "jitter_prob: expected between 0 and 1"),
        ({"gray_prob": 1.1}, "gray_prob: expected between 0 and 1"),
        ({"blur_prob": 2}, "blur_prob: expected between 0 and 1"),
        ({"downscale_prob": 2}, "downscale_prob: expected between 0 and 1"),
        ({"jpeg_prob": 2}, "jpeg_prob: expected between 0 and 1"),
        ({"brightness": -1}, "brightness: expected 0 or more, got -1"),
        ({"hue": 0.6}, "hue: expected between 0 and 0.5, got 0.6"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale: expected \(least, most\) with 0 < least <= most <= 1, got"),
        ({"momentum": 1.0, "optimizer": "adamw"}, r"momentum: expected at least 0 and less than 1, got 1\.0"),
        ({"momentum": 1.0}, r"momentum: expected at least 0 and less than 1, got 1\.0"),
        ({"downscale": (0.5, 1.5)}, r"downscale: expected \(least, most\) with 0 < least <= most <= 1, got"),
        ({"blur_radius": (2.0, 1.0)}, r"blur_radius: expected \(least, most\) with 0 < least <= most, got"),
        ({"blur_radius": (1.0, float("inf"))}, r"blur_radius: expected \(least, most\) with 0 < least <= most, got"),
        ({"jpeg_quality": (0, 50)}, r"jpeg_quality: expected \(least, most\) with 0 < least <= most <= 100, got"),
        ({"jpeg_quality": (30, 101)}, r"jpeg_quality: expected \(least, most\) with 0 < least <= most <= 100, got"),
        ({"jpeg_quality": (30.5, 90)}, r"jpeg_quality: expected tuple\[int, int\]"),
    ],
)
def test_an_invalid_value_is_refused_by_name(config, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neck": ""}, "neck: expected one of single, multi, got ''"),
        ({"warmup_epochs": 9, "epochs": 3}, "warmup_epochs: expected at most epochs = 3"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected at least 0 and less than 1"),
        ({"layer_decay": 1.5}, "layer_decay: expected between 0 and 1"),
        ({"id_weight": 0, "triplet_weight": 0}, "id_weight: expected more than 0"),
        ({"images_per_id": 1}, "images_per_id: expected 2 or more"),
        ({"ids_per_batch": 1}, "ids_per_batch: expected 2 or more"),
        ({"margin": -0.1}, "margin: expected 0 or more"),
    ],
)
def test_an_invalid_value_of_fine_tuning_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        FinetuneConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "median"}, "memory: expected one of hard, mean"),
        ({"eps": 1.0}, "eps: expected more than 0 and less than 1"),
        ({"temp": 0}, "temp: expected more than 0"),
        ({"clusters_per_batch": 1}, "clusters_per_batch: expected 2 or more"),
        ({"lr_gamma": 2}, "lr_gamma: expected between 0 and 1"),
        ({"k1": 0}, "k1: expected 1 or more"),
        ({"source_config": "x.yaml"}, "source_config: expected a source"),
    ],
)
def test_an_invalid_value_of_clustering_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ClusterConfig(**options)


def test_a_resumed_run_may_change_only_options_that_do_not_affect_the_weights(config):
    here = config(data="a/")
    free = {"data", "out", "init", "device", "workers", "resume", "save_minutes", "save_epochs", "keep", "log_steps",
            "max_minutes", "max_unreadable", "skip_nonfinite", "eval_data", "eval_epochs", "tensorboard", "quiet",
            "cache_images"}  # fmt: skip
    extra = set() if config is FinetuneConfig else {"source", "source_config"}
    assert set(config.FREE) == free | extra
    assert here.changed(config(data="b/", eval_epochs=3, dtype="float16").to_dict()) == {}
    assert here.changed(config(lr=0.5).to_dict()) == {"lr": (config().lr, 0.5)}


def test_the_laptop_preset_means_the_tiny_model_unless_init_or_model_names_another(config, tmp_path):
    tiny, small = "pass_vit_tiny_patch16", "pass_vit_small_patch16"
    (tmp_path / "run.yaml").write_text(f"preset: laptop\ninit: {small}.synth_reid\n")
    for words, model in (
        (["--init", "random"], tiny),
        (["--init", "synth_reid"], tiny),
        (["--init", f"{small}.synth_reid"], small),
        (["--init", "random", "--model", small], small),
        (["--config", tmp_path / "run.yaml"], small),
        (["--config", tmp_path / "run.yaml", "--init", "random"], tiny),
    ):
        preset = [] if "--config" in words else ["--preset", "laptop"]
        assert complete(parse(config, "market/", *preset, *words)).model == model


SET = {
    "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.2, "blur_radius": (1, 2), "downscale": (0.4, 0.5),
    "jpeg_quality": (10, 20), "margin": 0.3, "label_smoothing": 0.1, "eval_data": "x", "clip_by": "norm",
    "probe_epochs": 2,
}  # fmt: skip
ON = {"probe": "x", "eval_epochs": 1}


@pytest.mark.parametrize(
    ("config", "name", "switch"), [(c, *pair) for c in (*CONFIGS, PretrainConfig) for pair in c.SWITCHES.items()]
)
def test_an_option_is_idle_where_it_is_set_and_its_switch_is_off(config, name, switch):
    assert config().idle() == {}
    off = "" if switch == "probe" else 0
    assert config(**{name: SET[name], switch: off}).idle() == {name: switch}
    assert config(**{name: SET[name], switch: ON.get(switch, 0.5)}).idle() == {}
    assert config(**{switch: off}).idle() == {}


def test_the_learning_rate_falls_after_two_fifths_of_the_epochs_unless_lr_step_is_given():
    steps = {epochs: replace(ClusterConfig(), epochs=epochs).num_lr_step for epochs in (1, 10, 50)}
    assert steps == {1: 1, 10: 4, 50: 20}
    assert ClusterConfig(epochs=10, lr_step=8).num_lr_step == 8
    assert ClusterConfig(epochs=10, lr_step=8).resolved().lr_step == 8
    assert ClusterConfig(epochs=10).resolved().lr_step == 4


@pytest.mark.parametrize("words", [["--init", "5e3"], ["--config", "run.yaml"]])
def test_a_folder_whose_name_is_a_number_keeps_its_name(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("init: '5e3'\nepochs: 7\n")
    config = parse(FinetuneConfig, "1e2", *words, "--out", "0x10")
    assert (config.data, config.init, config.out) == ("1e2", "5e3", "0x10")
