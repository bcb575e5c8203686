"""PretrainConfig: published values, refused values and their messages, views, the way to YAML and back."""

import math
import re
from dataclasses import fields, replace
from types import NoneType
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from passreid_models.pretrain.config import CLIPS, PRESETS, PretrainConfig
from passreid_models.pretrain.views import HALVES, MultiCrop
from passreid_models.training.config import DTYPES

NAMES = [f.name for f in fields(PretrainConfig)]
KINDS = (str, int, float, bool, tuple[int, int], tuple[float, float], list[tuple[float, float]])  # or None
ODD = PretrainConfig(
    data="ä crops/", parts=2, areas=[(0.0, 0.6), (0.4, 1.0)], size=(384, 128), local_size=(96, 64), local_views=4,
    warmup_epochs=2.5, lr=1e-7, max_minutes=30, tensorboard=True, probe_epochs=3,
)  # fmt: skip


def kinds_of(name: str) -> list[Any]:
    """Kinds of a field but for None."""
    kind = next(f.type for f in fields(PretrainConfig) if f.name == name)
    return [kind] if kind in KINDS else [k for k in get_args(kind) if k is not NoneType]


def of_kind(*kinds: Any) -> list[str]:
    return [name for name in NAMES if kinds_of(name)[0] in kinds]


# ---- Published values


def test_the_defaults_are_the_published_settings():
    c = PretrainConfig()
    assert (c.model, c.num_parts, c.size, c.view_sizes(0)) == (
        "pass_vit_small_patch16", 3, (256, 128), ((256, 128), (128, 64))
    )  # fmt: skip
    assert (c.num_local_views, c.global_scale, c.local_scale) == (9, (0.4, 1.0), (0.1, 0.8))
    assert c.crop(0) == c.crop(c.epochs) == MultiCrop()
    assert (c.num_prototypes, c.hidden_dim, c.bottleneck_dim, c.norm_last_layer) == (65536, 2048, 256, True)
    assert (c.lr, c.min_lr, c.weight_decay, c.weight_decay_end, c.momentum) == (5e-4, 1e-6, 0.04, 0.4, 0.996)
    assert (c.student_temp, c.teacher_temp, c.warmup_teacher_temp, c.center_momentum) == (0.1, 0.04, 0.04, 0.9)
    assert (c.drop_path, c.clip, c.clip_by, c.freeze_last_layer_epochs, c.seed) == (0.1, 3.0, "parameter", 1, 0)
    assert (c.epochs, c.warmup_epochs, c.coarse_epochs, c.accumulate, c.sync_bn) == (100, None, 0, 1, True)


@pytest.mark.parametrize(
    ("preset", "model", "batch"),
    [("pass-vit-s-lup", "pass_vit_small_patch16", 8 * 128), ("pass-vit-b-lup", "pass_vit_base_patch16", 8 * 64)],
)
def test_the_published_presets_differ_from_the_defaults_in_model_and_batch_alone(preset, model, batch):
    c = PretrainConfig(**PRESETS[preset])
    assert c == replace(PretrainConfig(), model=model, batch_size=batch)
    assert (c.batch_size, c.epochs, c.num_prototypes) == (batch, 100, 65536)
    assert c.peak_lr == pytest.approx(5e-4 * batch / 256, rel=1e-15)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_configurations_and_their_models_are_published_architectures(preset):
    c = PretrainConfig(**PRESETS[preset])
    assert c.num_parts == 3
    assert c.view_areas == HALVES


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("epochs", [1, 5])
def test_presets_are_for_any_number_of_epochs(preset, epochs):
    c = PretrainConfig(**PRESETS[preset] | {"epochs": epochs})
    assert c.num_coarse_epochs == ({1: 0, 5: 4}[epochs] if preset == "laptop" else 0)
    assert c.view_sizes(epochs - 1)[0] == c.size


def test_the_laptop_preset_is_coarse_first_and_smaller_in_everything():
    c, published = PretrainConfig(**PRESETS["laptop"]), PretrainConfig(**PRESETS["pass-vit-s-lup"])
    assert c.view_sizes(0) == ((128, 64), (64, 32))
    assert c.view_sizes(c.epochs - 1) == ((256, 128), (128, 64))
    for name in ("batch_size", "epochs", "num_prototypes", "hidden_dim", "momentum"):
        assert getattr(c, name) < getattr(published, name), name


# ---- Views


@pytest.mark.parametrize(("parts", "views"), [(None, 9), (0, 9), (1, 9), (2, 10), (3, 9), (4, 12), (5, 10)])
def test_the_number_of_local_views_follows_the_parts(parts, views):
    assert PretrainConfig(parts=parts).num_local_views == views


@pytest.mark.parametrize(
    ("parts", "areas"),
    [
        (0, ((0.0, 1.0),)),
        (1, ((0.0, 1.0),)),
        (2, ((0.0, 2 / 3), (1 / 3, 1.0))),
        (3, ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))),
        (4, ((0.0, 0.4), (0.2, 0.6), (0.4, 0.8), (0.6, 1.0))),
    ],
)
def test_areas_are_overlapping_windows_of_equal_height_one_a_part(parts, areas):
    c = PretrainConfig(parts=parts, local_views=12)
    assert (c.num_parts, c.num_areas) == (parts, len(areas))
    np.testing.assert_allclose(c.view_areas, areas, rtol=1e-15)
    assert len({round(bottom - top, 12) for top, bottom in c.view_areas}) == 1


def test_the_areas_of_three_parts_are_exactly_the_published_halves():
    assert PretrainConfig().view_areas == HALVES
    assert PretrainConfig(areas=[(0, 0.3), (0.3, 0.6), (0.6, 1)]).view_areas == ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0))


@pytest.mark.parametrize("model", ["pass_vit_small_patch16", "transreid_vit_small_patch16"])
def test_the_architecture_says_the_number_of_parts_unless_it_is_given(model):
    assert PretrainConfig(model=model).num_parts == (3 if model.startswith("pass") else 0)
    assert PretrainConfig(model=model, parts=1).num_parts == 1


@pytest.mark.parametrize("coarse", [3, 0.6])
def test_coarse_epochs_come_first_and_halve_both_sizes(coarse):
    c = PretrainConfig(coarse_epochs=coarse, epochs=5, size=(256, 128), local_size=(96, 64))
    assert [c.view_sizes(e)[0][0] for e in range(5)] == [128, 128, 128, 256, 256]
    assert [c.view_sizes(e) for e in (2, 3)] == [((128, 64), (48, 32)), ((256, 128), (96, 64))]


def test_the_crop_of_an_epoch_has_its_sizes_and_every_setting_of_the_views():
    colours = dict(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.05, gray_prob=0.4, solarize_prob=0.6)
    scales = dict(global_scale=(0.5, 0.9), local_scale=(0.2, 0.7), blur_radius=(0.3, 0.6))
    c = PretrainConfig(local_views=6, parts=2, epochs=2, coarse_epochs=0.5, **colours, **scales)
    fine = MultiCrop((256, 128), (128, 64), ((0, 2 / 3), (1 / 3, 1.0)), 3, **colours, **scales)
    assert c.crop(1) == fine
    assert c.crop(0) == replace(fine, size=(128, 64), local_size=(64, 32))


def test_the_learning_rate_scales_with_the_batch():
    assert PretrainConfig(batch_size=256, lr=3e-4).peak_lr == 3e-4
    assert PretrainConfig(batch_size=64, lr=3e-4).peak_lr == 3e-4 / 4


# ---- Wrong values


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_another_kind_is_refused_by_name_in_every_field(name):
    for value in (object(), b"1", {"a": 1}, [1, 2, 3]):
        with pytest.raises(ValueError, match=rf"^{name}: expected .+, got {re.escape(repr(value))}$"):
            PretrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (of_kind(int, float), "5e-4"),  # what PyYAML makes of 5e-4
        (of_kind(int, float), True),
        (of_kind(int), 1.5),
        (of_kind(bool), 1),
        (of_kind(bool), "no"),
        (of_kind(str), 5),
        (of_kind(str), None),
        (of_kind(tuple[int, int]), 256),
        (of_kind(tuple[int, int]), (256,)),
        (of_kind(tuple[int, int]), (256.0, 128.0)),
        (of_kind(tuple[int, int]), "256x128"),
        (of_kind(tuple[float, float]), 0.4),
        (of_kind(tuple[float, float]), (0.4, 0.6, 1.0)),
        (of_kind(list[tuple[float, float]]), [0.0, 0.5, 1.0]),
        (of_kind(list[tuple[float, float]]), [(0.0, 0.5), (0.5, 1.0), "x"]),
    ],
)
def test_near_misses_of_the_kind_are_refused_by_name(names, value):
    assert names
    for name in names:
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            PretrainConfig(**{name: value})


@pytest.mark.parametrize("name", of_kind(int, float))
def test_numbers_below_zero_and_beyond_all_bounds_are_refused_by_name(name):
    for value in (-1, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            PretrainConfig(**{name: value})


ZERO = {"lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip", "loss_chunk", "workers", "seed"}
ZERO |= {"save_minutes", "max_minutes", "skip_nonfinite", "momentum", "center_momentum", "max_unreadable", "drop_path"}
ZERO |= {"brightness", "contrast", "saturation", "hue", "gray_prob", "solarize_prob"}
ZERO |= {"parts", "local_views", "coarse_epochs", "freeze_last_layer_epochs", "warmup_teacher_temp_epochs"}


@pytest.mark.parametrize("name", of_kind(int, float))
def test_zero_is_refused_exactly_where_it_means_nothing(name):
    if name in ZERO:
        assert getattr(PretrainConfig(**{name: 0}), name) == 0
    else:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*(1 or more|more than 0), got 0$"):
            PretrainConfig(**{name: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vit_small"}, "model: expected one of pass_vit_tiny_patch16, .*, got 'vit_small'"),
        ({"clip_by": "value"}, "clip_by: expected one of parameter, norm, got 'value'"),
        ({"dtype": "bf16"}, "dtype: expected one of auto, float32, bfloat16, float16, got 'bf16'"),
        ({"momentum": 1.001}, "momentum: expected between 0 and 1, got 1.001"),
        ({"center_momentum": 2}, "center_momentum: expected between 0 and 1, got 2"),
        ({"max_unreadable": 1.5}, "max_unreadable: expected between 0 and 1, got 1.5"),
        ({"drop_path": 1.0}, "drop_path: expected at least 0 and less than 1, got 1.0"),
        ({"gray_prob": 1.1}, "gray_prob: expected between 0 and 1, got 1.1"),
        ({"solarize_prob": 2}, "solarize_prob: expected between 0 and 1, got 2"),
        ({"hue": 0.6}, "hue: expected between 0 and 0.5, got 0.6"),
        ({"blur_radius": (0.0, 2.0)}, "blur_radius: expected .*0 < least <= most, got"),
        ({"blur_radius": (2.0, 1.0)}, "blur_radius: expected .*least"),
        ({"blur_radius": (0.1, math.inf)}, "blur_radius: expected .*least"),
        ({"global_scale": (0.0, 1.0)}, "global_scale: expected .*0 < least <= most <= 1"),
        ({"global_scale": (0.5, 1.1)}, "global_scale: expected .*least"),
        ({"local_scale": (0.8, 0.1)}, "local_scale: expected .*least"),
        ({"local_scale": (math.nan, 0.1)}, "local_scale: expected .*least"),
        ({"size": (250, 128)}, r"size: expected \(height, width\) in multiples of 16, got \(250, 128\)"),
        ({"size": (256, 0)}, "size: expected .*multiples of 16"),
        (
            {"size": (256, 112)},
            r"size: expected \(height, width\) in multiples of 32, since local views are half as large",
        ),
        ({"size": (256, 112), "coarse_epochs": 0.5}, "size: .*multiples of 32, since the coarse epochs halve it"),
        (
            {"size": (256, 96), "coarse_epochs": 0.5},
            r"size: expected \(height, width\) in multiples of 64, since local views",
        ),
        ({"local_size": (120, 64)}, "local_size: expected .*multiples of 16"),
        ({"local_size": (-16, 64)}, "local_size: expected .*multiples of 16"),
        ({"local_size": (112, 64), "coarse_epochs": 0.5}, "local_size: .*multiples of 32, since the coarse epochs"),
        ({"local_views": 10}, "local_views: expected a multiple of parts = 3, got 10"),
        ({"parts": 2, "local_views": 9}, "local_views: expected a multiple of parts = 2, got 9"),
        ({"areas": [(0, 1)]}, r"areas: expected one \(top, bottom\) for each of 3 parts"),
        ({"areas": []}, "areas: expected one"),
        ({"areas": [(0, 0.5), (0.7, 0.5), (0.5, 1)]}, r"areas: expected .*top < bottom.* got \(0.7, 0.5\)"),
        ({"areas": [(0, 0.5), (0.2, 0.5), (0.5, 1.2)]}, r"areas: expected .*got \(0.5, 1.2\)"),
        ({"warmup_epochs": 101}, "warmup_epochs: expected at most epochs = 100, got 101"),
        ({"coarse_epochs": 101}, "coarse_epochs: expected a whole number of at most epochs = 100, .* got 101"),
        ({"coarse_epochs": 1.5}, "coarse_epochs: expected a whole number .* or less than 1, got 1.5"),
        (
            {"warmup_teacher_temp": 0.01},
            "warmup_teacher_temp: expected teacher_temp = 0.04, since warmup_teacher_temp_epochs is 0, got 0.01",
        ),
        ({"warmup_teacher_temp": 0.01, "teacher_temp": 0.02}, "warmup_teacher_temp: expected teacher_temp = 0.02"),
    ],
)
def test_what_cannot_be_is_refused_by_name_with_what_was_expected(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PretrainConfig(**options)


def test_sizes_at_the_edge_of_what_can_be_are_taken():
    assert PretrainConfig(size=(256, 112), local_size=(96, 48)).view_sizes(0) == ((256, 112), (96, 48))
    assert PretrainConfig(size=(48, 16), local_views=0).size == (48, 16)
    assert PretrainConfig(size=(64, 64), coarse_epochs=0.5).view_sizes(0) == ((32, 32), (16, 16))
    assert PretrainConfig(coarse_epochs=100, warmup_epochs=100).num_coarse_epochs == 100
    assert PretrainConfig(momentum=1, center_momentum=1, max_unreadable=1).momentum == 1


def test_a_teacher_temperature_needs_no_warm_up():
    assert PretrainConfig(teacher_temp=0.03).teacher_temp == 0.03
    assert PretrainConfig(teacher_temp=0.03, warmup_teacher_temp=0.03).warmup_teacher_temp == 0.03
    assert PretrainConfig(warmup_teacher_temp=0.01, warmup_teacher_temp_epochs=1).warmup_teacher_temp == 0.01


@pytest.mark.parametrize(("name", "allowed"), [("dtype", DTYPES), ("clip_by", CLIPS)])
def test_every_listed_choice_is_taken(name, allowed):
    assert [getattr(PretrainConfig(**{name: value}), name) for value in allowed] == list(allowed)


# ---- Dictionaries and files

CONFIGS = {
    "defaults": PretrainConfig(),
    "odd": ODD,
    **{name: PretrainConfig(**preset) for name, preset in PRESETS.items()},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dictionaries_and_yaml_files_give_the_configuration_back(config, tmp_path):
    values = config.to_dict()
    assert sorted(values) == sorted(NAMES)
    assert PretrainConfig.from_dict(values) == config
    config.save(tmp_path / "config.yaml")
    read = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert read == values
    assert PretrainConfig.from_dict(read) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_dictionary_holds_plain_lists_and_keeps_none():
    values = ODD.to_dict()
    assert values["areas"] == [[0.0, 0.6], [0.4, 1.0]]
    assert (values["size"], values["local_size"]) == ([384, 128], [96, 64])
    assert PretrainConfig().to_dict()["local_size"] is None
    back = PretrainConfig.from_dict(values)
    assert (back.size, back.areas) == ((384, 128), [(0.0, 0.6), (0.4, 1.0)])


def test_fields_that_a_dictionary_leaves_out_have_their_defaults():
    assert PretrainConfig.from_dict({"epochs": 7}) == replace(PretrainConfig(), epochs=7)


def test_unknown_fields_are_refused_by_name_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^bach_size, zoo: no such field; known: accumulate, areas, batch_size"):
        PretrainConfig.from_dict({"zoo": 1, "bach_size": 2, "epochs": 3})


@pytest.mark.parametrize("areas", [3, [0.0, 0.5], [[0.0, 0.5], [1.0]], "0-1"])
def test_areas_of_a_file_that_are_none_are_refused_by_name(areas):
    with pytest.raises(ValueError, match=r"^areas: expected "):
        PretrainConfig.from_dict({"areas": areas})


# ---- What a resumed run may change

OTHER: dict[str, Any] = {
    "data": "b", "out": "b", "model": "pass_vit_tiny_patch16", "init": "lup", "resume": "auto", "parts": 1,
    "areas": [(0, 0.5), (0.3, 0.8), (0.5, 1)], "size": (384, 128), "local_size": (96, 64), "local_views": 6,
    "global_scale": (0.3, 1), "local_scale": (0.1, 0.7), "blur_radius": (0.1, 1),
    "clip_by": "norm", "pos_resampling": "official", "dtype": "float32", "device": "cpu", "coarse_epochs": 0.5,
    "probe": "b", "warmup_epochs": 3, "workers": 3,
}  # fmt: skip


def other(name: str) -> Any:
    """Another value of a field."""
    default = getattr(PretrainConfig(), name)
    if isinstance(default, bool):
        return not default
    return (
        OTHER[name]
        if name in OTHER
        else 16
        if default is None
        else default / 2
        if isinstance(default, float)
        else default + 1
    )


@pytest.mark.parametrize("name", NAMES)
def test_changed_names_each_field_that_shapes_the_weights_and_no_other(name):
    saved = PretrainConfig(warmup_teacher_temp_epochs=5)
    config = replace(saved, **{name: other(name)})
    changed = config.changed(saved.to_dict())
    assert list(changed) == ([] if name in PretrainConfig.FREE + PretrainConfig.NUMERICS else [name])
    if changed:
        assert changed[name] == (config.to_dict()[name], saved.to_dict()[name])
    assert not config.changed(config.to_dict())


def test_what_a_resumed_run_may_change_is_where_it_runs_and_what_it_reports():
    assert set(PretrainConfig.FREE) == {
        "data", "out", "init", "device", "workers", "resume", "save_minutes", "save_epochs", "keep", "log_steps",
        "max_minutes", "max_unreadable", "skip_nonfinite", "probe", "probe_epochs", "tensorboard", "quiet",
    }  # fmt: skip


def test_changed_compares_what_was_read_back_from_a_file():
    saved = yaml.safe_load(yaml.safe_dump(ODD.to_dict()))
    assert not ODD.changed(saved)
    assert ODD.changed({**saved, "areas": [[0.0, 0.5], [0.5, 1.0]]}) == {
        "areas": ([[0.0, 0.6], [0.4, 1.0]], [[0.0, 0.5], [0.5, 1.0]])
    }


def test_changed_takes_the_default_for_a_field_that_the_saved_run_does_not_know():
    assert not PretrainConfig().changed({"a field of": "another version"})
    saved = {k: v for k, v in PretrainConfig(hue=0.02).to_dict().items() if k not in ("hue", "gray_prob")}
    assert PretrainConfig(hue=0.02).changed(saved) == {"hue": (0.02, 0.1)}


def test_parts_that_are_given_and_those_of_the_architecture_are_the_same():
    assert not PretrainConfig(parts=3).changed(PretrainConfig().to_dict())
    assert PretrainConfig(parts=1).changed(PretrainConfig().to_dict()) == {"parts": (1, None)}


# ---- Every field


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_of_a_kind_that_flags_and_yaml_have(name):
    kinds = kinds_of(name)
    assert len(kinds) == 1
    assert kinds[0] in KINDS
