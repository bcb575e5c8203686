"""A model has one name: every kind of name gives the same weights wherever a model can be named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from passreid_models import Embedder, cli, convert_checkpoint
from passreid_models.architectures import ARCHITECTURES, Architecture
from passreid_models.checkpoints import zoo
from passreid_models.checkpoints.local_dir import read_config, save_pretrained
from passreid_models.checkpoints.names import find_model
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.demo import run as run_demo
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.pretrain.network import make_networks
from passreid_models.pretrain.run import train
from passreid_models.reid.config import ClusterConfig, FinetuneConfig
from passreid_models.reid.model import make_backbone
from passreid_models.reid.run import complete
from passreid_models.reid.supervised import finetune
from passreid_models.reid.unsupervised import cluster
from passreid_models.synthetic import SyntheticPersons
from tests import GOLDEN
from tests.tiny_reid import cluster_config, finetune_config, steps, write_persons
from tests.tiny_runs import tiny, write_images

CPU = torch.device("cpu")
TINY, SMALL, BASE = (f"pass_vit_{size}_patch16" for size in ("tiny", "small", "base"))
RUN_KINDS = ("run", "export", "local-dir:export", "local-dir:run", "weights", "checkpoint", "run without export")
TAG_KINDS = (f"{TINY}.synth", "synth")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrained(home) -> Path:
    train(tiny(write_images(home / "images", 4), home / "pretrained", epochs=1))
    return home / "pretrained"


@pytest.fixture(scope="module")
def persons(home) -> Path:
    return write_persons(home / "persons")


@pytest.fixture(scope="module")
def names(pretrained, home) -> dict[str, str]:
    """Names of one model, by kind."""
    (home / "new" / "checkpoints").mkdir(parents=True)
    (home / "new" / "checkpoints" / steps(pretrained)[-1].name).symlink_to(steps(pretrained)[-1])
    paths = {"run": pretrained, "export": pretrained / "export", "checkpoint": steps(pretrained)[-1]}
    paths |= {"run without export": home / "new", "weights": pretrained / "export" / "model.safetensors"}
    return {
        **{kind: str(path) for kind, path in paths.items()},
        "local-dir:export": f"local-dir:{pretrained}/export",
        "local-dir:run": f"local-dir:{pretrained}",
    }


def by_embedder(name: str, model: str) -> dict[str, Tensor]:
    return Embedder(name, "cpu").model.state_dict()


def by_pretraining(name: str, model: str) -> dict[str, Tensor]:
    config = tiny("unused", Path("unused"), init=name, model=model, size=ARCHITECTURES[model].img_size)
    return make_networks(config, CPU)[0].backbone.state_dict()


def by_reid(kind: type) -> Callable[[str, str], dict[str, Tensor]]:
    def start(name: str, model: str) -> dict[str, Tensor]:
        is_file = find_model(name).file is not None  # which does not tell its model before it is read
        config = complete(kind(data="unused", init=name, model=model if is_file else ""))
        assert config.model == model
        config = replace(config, size=ARCHITECTURES[model].img_size)
        state = make_backbone(config, "bicubic").state_dict()
        return {k: v for k, v in state.items() if not k.startswith("fc_norm.")}

    return start


PLACES = {
    "Embedder": by_embedder,
    "passreid-train --init": by_pretraining,
    "finetune --init": by_reid(FinetuneConfig),
    "cluster --init": by_reid(ClusterConfig),
}


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert [k for k, v in expected.items() if not torch.equal(state[k], v)] == []


@pytest.mark.parametrize("kind", RUN_KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_its_export_and_its_checkpoint_are_the_same_model_in_every_place(names, pretrained, place, kind):
    expected = timm.create_model(f"local-dir:{pretrained}/export", pretrained=True).state_dict()
    assert_equal(PLACES[place](names[kind], "test_pass_vit"), expected)


@pytest.mark.parametrize("name", TAG_KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_tag_is_the_same_model_in_every_place_with_and_without_its_architecture(place, name):
    expected = timm.create_model(f"{TINY}.synth", pretrained=True).state_dict()
    assert_equal(PLACES[place](name, TINY), expected)


# ---- Commands


@pytest.mark.parametrize("kind", ["run", "export", "checkpoint", "synth"])
def test_embed_eval_and_demo_take_every_kind_of_name(names, persons, tmp_path, capsys, kind):
    name = names.get(kind, kind)
    image = next((persons / "query").glob("*.jpg"))
    assert cli.main(["embed", str(image), "--model", name, "--device", "cpu", "-o", f"{tmp_path}/f.safetensors"]) == 0
    expected = Embedder(name, "cpu")([image])
    assert torch.equal(load_file(tmp_path / "f.safetensors")["descriptors"], expected)
    words = ["eval", str(persons), "--model", name, "--device", "cpu", "--no-cache", "--json", f"{tmp_path}/eval.json"]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["model"]["width"] == expected.shape[1]
    assert name in run_demo(name, tmp_path / "ranking.png", 4)


# ---- The descriptor of a checkpoint


OF_RUNS: dict[str, dict[str, Any]] = {
    "pretrained": {},
    "pretrained landscape": {"size": (32, 64), "local_size": (16, 32)},
    "pretrained square": {"size": (64, 64)},
    "pretrained square without parts": {
        "size": (48, 48),
        "local_size": (16, 16),
        "parts": 0,
    },  # 9 patches: not CLS and 8
    "finetuned": {"size": (96, 32), "fusion": "mean", "neck": "multi"},
    "finetuned landscape": {"size": (32, 96), "fusion": "token"},
    "clustered": {"neck": "single", "fusion": "mean"},
}


@pytest.mark.parametrize("kind", OF_RUNS)
def test_the_checkpoint_of_a_run_gives_the_descriptor_of_its_export(kind, persons, tmp_path):
    """Size, parts, fusion, neck, mean and std are the run's, also in the folder that ``convert`` writes."""
    run, options = tmp_path / "run", {"epochs": 1, **OF_RUNS[kind]}
    if kind.startswith("pretrained"):
        train(tiny(write_images(tmp_path / "images", 4), run, **options))
    elif kind.startswith("finetuned"):
        finetune(finetune_config(persons, run, eval_epochs=0, **options))
    else:
        cluster(cluster_config(persons, run, eval_epochs=0, **options))
    file = steps(run)[-1]
    of_export = Embedder(run, "cpu")
    convert_checkpoint(file, tmp_path / "converted")
    args = {"img_size": of_export.input_size[1:], "num_parts": of_export.model.num_parts}
    overlaid = timm.create_model("test_pass_vit", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **args)
    images = SyntheticPersons(2, images_per_id=1, size=(64, 32))
    crops = [images[i][0] for i in range(2)]
    for model in (file, tmp_path / "converted", overlaid):
        embedder = Embedder(model, "cpu")
        assert embedder.model.neck == of_export.model.neck
        assert repr(embedder).partition("fusion")[2] == repr(of_export).partition("fusion")[2]
        torch.testing.assert_close(embedder(crops), of_export(crops))


@pytest.mark.parametrize("place", ["passreid-train --init", "finetune --init", "cluster --init"])
def test_weights_of_a_model_that_was_made_otherwise_are_refused_where_training_begins(place, tmp_path):
    """No tensor shows the number of heads."""
    save_pretrained(timm.create_model("test_pass_vit", num_heads=4), tmp_path / "heads")
    with pytest.raises(ValueError, match=r"^init: .*heads is a test_pass_vit with num_heads=4, and training makes it"):
        PLACES[place](f"{tmp_path}/heads", "test_pass_vit")


@pytest.mark.parametrize("place", ["passreid-train --init", "finetune --init"])
@pytest.mark.parametrize(
    "args", [{"dynamic_img_size": True}, {"patch_size": 16, "mlp_ratio": 4.0}, {"drop_path_rate": 0.1}]
)
def test_weights_of_a_model_that_was_made_with_what_changes_nothing_are_taken(place, args, tmp_path):
    model = timm.create_model("test_pass_vit", **args)
    save_pretrained(model, tmp_path / "same")
    assert_equal(PLACES[place](f"{tmp_path}/same", "test_pass_vit"), model.state_dict())


def test_another_trainer_s_file_that_has_a_config_and_a_step_is_converted_by_its_tensors(tmp_path):
    state = timm.create_model("test_pass_vit").state_dict()
    torch.save({"config": {"model": "vit"}, "step": 3, "state_dict": state}, tmp_path / "theirs.pt")
    assert_equal(find_model(f"{tmp_path}/theirs.pt").create().state_dict(), state)


@pytest.mark.parametrize("file", ["supervised_multineck_mean.pth", "unsupervised_multineck_cat.pth.tar"])
def test_an_official_file_gives_the_descriptor_of_its_converted_folder(file, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, SMALL, Architecture(32, 2, 2))
    file = GOLDEN / f"upstream_{file}"
    convert_checkpoint(file, tmp_path / "model")
    images = SyntheticPersons(2, images_per_id=1)
    crops = [images[i][0] for i in range(2)]
    assert torch.equal(Embedder(file, "cpu")(crops), Embedder(tmp_path / "model", "cpu")(crops))


# ---- Tags


def test_a_tag_that_one_architecture_has_selects_it():
    for init, model in (("synth", TINY), ("lup_usl_msmt17", SMALL), ("lup_uda_msmt17_to_market1501", SMALL)):
        assert find_model(init).name == f"{model}.{init}"
        assert complete(FinetuneConfig(data="unused", init=init)).model == model
    assert zoo.get_weight("lup_usl_msmt17") == zoo.get_weight(f"{SMALL}.lup_usl_msmt17")


@pytest.mark.parametrize("tag", ["lup", "lup_market1501"])
@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        (lambda tag: Embedder(tag), ""),
        (lambda tag: complete(FinetuneConfig(data="unused", init=tag)), "init: "),
        (lambda tag: complete(ClusterConfig(data="unused", init=tag)), "init: "),
    ],
    ids=["Embedder", "finetune", "cluster"],
)
def test_a_tag_of_several_architectures_is_refused_with_the_choices(place, prefix, tag):
    choices = f"{prefix}{tag} is a tag of {SMALL} and {BASE}: give {SMALL}.{tag} or {BASE}.{tag}"
    with pytest.raises(ValueError, match=f"^{choices}$"):
        place(tag)


def test_a_given_architecture_decides_for_a_tag_of_several():
    for kind in (FinetuneConfig, ClusterConfig):
        c = complete(kind(data="unused", init="lup_market1501_384", model=BASE))
        assert (c.model, c.size) == (BASE, (384, 128))
    assert find_model("lup", BASE).name == f"{BASE}.lup"


def test_a_tag_that_the_given_architecture_does_not_have_is_refused_with_those_that_it_has():
    known = ", ".join(w.name for w in zoo.list_weights(TINY))
    with pytest.raises(ValueError, match=f"^there are no weights '{TINY}.lup'; known: {known}$"):
        find_model("lup", TINY)
    with pytest.raises(ValueError, match=f"^there are no weights '{BASE}.lupp'; known: .*{BASE}.lup_msmt17_384"):
        find_model(f"{BASE}.lupp")


# ---- No such model


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("lup_market", ["lup_market1501", "lup_market1501_384"]),
        ("synth_red", ["synth", "synth_reid"]),
        ("pass_vit_tyni_patch16.lup_usl", ["lup_usl_market1501", "lup_usl_msmt17"]),
        ("resnet50", ["their tags"]),
        ("runs/mine", ["a folder with config.json, a run, or a checkpoint file"]),
        ("", []),
    ],
)
@pytest.mark.parametrize("command", ["embed", "eval", "demo"])
def test_an_unknown_name_is_refused_in_one_sentence_with_the_choices(persons, tmp_path, capsys, command, name, listed):
    words: dict[str, list[Any]] = {
        "embed": [persons, "-o", tmp_path / "f.npz"],
        "eval": [persons],
        "demo": ["--ids", 2, "--out", tmp_path / "x.png"],
    }
    assert cli.main([command, *map(str, words[command]), "--model", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"passreid: unknown model {name!r}; known: ")
    for known in (*ARCHITECTURES, *listed, "`passreid weights list` has all"):
        assert known in line


def test_a_folder_without_a_model_and_one_of_another_make_are_refused_in_every_place(tmp_path):
    for place in PLACES.values():
        with pytest.raises(ValueError, match=f"{tmp_path} holds no model: expected a folder with config.json"):
            place(str(tmp_path), "test_pass_vit")
    for text, message in (
        ("{", "cannot be read as JSON"),
        ('{"architecture": "resnet18"}', "is not the config of a model of"),
    ):
        (tmp_path / "config.json").write_text(text)
        for place in PLACES.values():
            with pytest.raises(ValueError, match=f"{tmp_path}/config.json {message}"):
                place(str(tmp_path), "test_pass_vit")
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)


def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"notes\.pth is not a PyTorch checkpoint"):
        Embedder(tmp_path / "notes.pth")


def test_a_file_that_begins_with_the_name_of_an_architecture_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_pass_vit.pth").write_bytes(b"")
    assert find_model("test_pass_vit.pth").file == Path("test_pass_vit.pth")


def test_weights_pull_and_verify_take_a_tag_alone(capsys):
    assert cli.main(["weights", "pull", "synth"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == f"{TINY}.synth"
    assert cli.main(["weights", "verify", "synth"]) == 0


# ---- Without an architecture


@pytest.mark.parametrize("kind", ["run", "export", "weights", "checkpoint", "run without export"])
def test_a_run_names_its_architecture_wherever_training_begins(names, kind):
    assert PretrainConfig(init=names[kind]).model == "test_pass_vit"
    for config in (FinetuneConfig, ClusterConfig):
        completed = complete(config(data="crops/", init=names[kind]))
        assert (completed.model, completed.size) == ("test_pass_vit", (64, 32))


def test_a_tag_names_its_architecture_in_pretraining_too():
    assert PretrainConfig(init="synth").model == TINY
    assert PretrainConfig().model == SMALL
    assert PretrainConfig(init="lup", model=BASE).model == BASE
    with pytest.raises(ValueError, match=f"init: .*{SMALL}.lup.*{BASE}.lup"):
        PretrainConfig(init="lup")
    with pytest.raises(ValueError, match=f"init: .*{TINY}.synth_reid.*{SMALL}.synth_reid"):
        PretrainConfig(init="synth_reid")


def test_an_official_file_names_its_architecture(tmp_path):
    model = timm.create_model(TINY)
    torch.save({f"backbone.{k}": v for k, v in model.state_dict().items()}, tmp_path / "file.pth")
    assert PretrainConfig(init=str(tmp_path / "file.pth")).model == TINY
    assert complete(FinetuneConfig(data="crops/", init=str(tmp_path / "file.pth"))).model == TINY


def test_weights_of_another_architecture_are_refused_by_name(names):
    for kind in ("run", "export", "checkpoint"):
        with pytest.raises(ValueError, match=f"init: .* holds test_pass_vit, and model is {TINY}"):
            make_networks(PretrainConfig(model=TINY, init=names[kind], num_prototypes=8), CPU)
