"""Configurations of all tasks: options by name and topic, each with a line of help and declared once."""

import inspect
import re
from dataclasses import fields

import pytest
import yaml

from passreid_models import cli
from passreid_models.pretrain import PretrainConfig
from passreid_models.reid import ClusterConfig, FinetuneConfig
from passreid_models.reid.config import ReIDConfig
from passreid_models.training import RunConfig

RUN = "data out resume seed"
MACHINE = "device dtype grad_checkpointing sync_bn workers"
CHECKPOINTS = "save_minutes save_epochs keep max_minutes"
LOG = "log_steps max_unreadable skip_nonfinite tensorboard quiet"
AUGMENTATION = (
    "flip_prob pad erase_prob crop_scale jitter_prob brightness contrast saturation hue gray_prob blur_prob "
    "blur_radius downscale_prob downscale jpeg_prob jpeg_quality"
)
OPTIONS = {
    PretrainConfig: {
        "run": RUN,
        "model": "model init size drop_path parts pos_resampling areas",
        "views": "local_size local_views global_scale local_scale brightness contrast saturation hue gray_prob "
        "solarize_prob blur_radius",
        "training": "epochs lr weight_decay coarse_epochs batch_size accumulate min_lr warmup_epochs weight_decay_end "
        "freeze_last_layer_epochs clip clip_by",
        "distillation": "momentum teacher_temp warmup_teacher_temp warmup_teacher_temp_epochs student_temp "
        "center_momentum num_prototypes hidden_dim bottleneck_dim norm_last_layer",
        "evaluation": "probe probe_epochs",
        "machine": f"{MACHINE} loss_chunk compile",
        "checkpoints": CHECKPOINTS,
        "log": LOG,
    },
    FinetuneConfig: {
        "run": RUN,
        "model": "model init size drop_path fusion neck",
        "batches and augmentation": f"{AUGMENTATION} ids_per_batch images_per_id",
        "training": "epochs lr weight_decay optimizer momentum bias_lr warmup_epochs layer_decay freeze_blocks "
        "id_weight triplet_weight margin label_smoothing",
        "evaluation": "eval_data eval_epochs",
        "machine": f"{MACHINE} cache_images",
        "checkpoints": CHECKPOINTS,
        "log": LOG,
    },
    ClusterConfig: {
        "run": f"{RUN} source source_config",
        "model": "model init size drop_path fusion neck",
        "batches and augmentation": f"{AUGMENTATION} steps clusters_per_batch images_per_cluster",
        "training": "epochs lr weight_decay optimizer momentum lr_step lr_gamma",
        "clusters": "eps min_samples k1 k2 temp memory memory_momentum",
        "evaluation": "eval_data eval_epochs",
        "machine": f"{MACHINE} cache_images",
        "checkpoints": CHECKPOINTS,
        "log": LOG,
    },
}
COMMANDS = {PretrainConfig: "train", FinetuneConfig: "finetune", ClusterConfig: "cluster"}


@pytest.fixture(params=OPTIONS, ids=lambda c: c.__name__)
def config(request) -> type[RunConfig]:
    return request.param


def documented(config: type[RunConfig]) -> list[str]:
    """Names under "Args" in the docstring of a class itself, in order."""
    return re.findall(r"^    (\w+): [A-Z`]", inspect.cleandoc(config.__doc__ or ""), re.MULTILINE)


def test_the_names_of_the_options_are_frozen_and_stand_by_topic(config):
    assert config.topics() == {title: names.split() for title, names in OPTIONS[config].items()}
    assert sorted(f.name for f in fields(config)) == sorted(" ".join(OPTIONS[config].values()).split())


def test_the_help_shows_every_option_under_its_topic(config, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([COMMANDS[config], "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    shown = {title: re.findall(r"^  --(\w+)[ ,]", block, re.MULTILINE) for title, block in
             re.findall(r"^([a-z ]+):\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)}  # fmt: skip
    assert {title: shown.get(title) for title in config.topics()} == config.topics()


def test_a_saved_file_has_the_order_of_the_help(config, tmp_path):
    config(data="crops/").save(tmp_path / "config.yaml")
    names = list(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert names == [name for topic in config.topics().values() for name in topic]


@pytest.mark.parametrize("config", [RunConfig, ReIDConfig, *OPTIONS])
def test_every_new_field_is_described_in_the_class_that_declares_it_and_in_its_order(config):
    inherited = {name for parent in config.__mro__[1:] if issubclass(parent, RunConfig) for name in documented(parent)}
    declared = [f.name for f in fields(config)]
    assert documented(config) == [name for name in declared if name in documented(config)]
    assert set(declared) - inherited <= set(documented(config))


def test_fields_are_keyword_only_and_frozen(config):
    with pytest.raises(TypeError):
        config("crops/")
    with pytest.raises(AttributeError):
        config().epochs = 3


def test_the_reid_tasks_declare_no_field_of_the_same_name():
    shared = {f.name for f in fields(ReIDConfig)}
    own = [{f.name for f in fields(config)} - shared for config in (FinetuneConfig, ClusterConfig)]
    assert own[0] & own[1] == set()
    assert {f.name for f in fields(PretrainConfig)} & (own[0] | own[1]) <= {"warmup_epochs"}
