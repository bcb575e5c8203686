"""Published folders load back equal, their cards follow the Hub's conventions, and a dry run sends nothing."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import AutoModel

from passreid_models import cli
from passreid_models.checkpoints.local_dir import save_pretrained
from passreid_models.checkpoints.publish import CITATION, files_to_publish, model_card, publish
from passreid_models.checkpoints.zoo import get_weight, list_weights
from tests.hub_server import DEFAULT_GITATTRIBUTES, HubServer

TINY = dict(embed_dim=64, depth=2, num_heads=2, img_size=(64, 32))
PROVENANCE = {"source": "checkpoint0100.pth", "source_sha256": "f" * 64, "layout": "pre-training checkpoint, teacher"}
EXTRAS = {"classifier.weight": torch.ones(3, 128)}


def written(folder: Path, name: str = "test_pass_vit", extras: dict | None = None, **kwargs: object) -> Path:
    torch.manual_seed(1)
    model = timm.create_model(name, **kwargs)
    if "." in name:  # as if pulled
        file = folder.with_suffix(".safetensors")
        save_file(model.state_dict(), file)
        model.origin = dataclasses.replace(model.origin, file=str(file))
    save_pretrained(model, folder, extras, {"provenance": PROVENANCE})
    return folder


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------------------------------------------------- the card


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> ModelCard:
    """Model card of a folder with the settings of a published tag, read by the Hub's own class."""
    folder = written(tmp_path_factory.mktemp("card") / "model", "pass_vit_small_patch16.lup_market1501", depth=2)
    return ModelCard(model_card(config_of(folder), "org/pass-small"))


def test_the_metadata_follow_the_conventions_of_timm_and_the_hub(card):
    data = card.data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.license == "other"
    assert data.license_name  # the Hub asks for it beside "other"
    assert data.datasets == ["LUPerson", "Market-1501"]
    assert {"timm", "person-re-identification"} <= set(data.tags)


@pytest.mark.parametrize("weight", list_weights(), ids=lambda w: w.name)
def test_the_datasets_of_every_tag_have_the_form_of_the_hubs_ids(weight):
    """Free text here is refused by the Hub, which checks the metadata of a commit."""
    config = {"architecture": weight.architecture, "fusion": "cat", "neck": "", "l2_normalize": True}
    cfg = {"tag": weight.tag, "input_size": [3, 256, 128], "mean": [0.5] * 3, "std": [0.5] * 3, "license": "other"}
    datasets = ModelCard(
        model_card({**config, "pretrained_cfg": {**cfg, "interpolation": "bicubic"}}, "a/b")
    ).data.datasets
    assert datasets[0] in ("LUPerson", "generated-3-D-persons")
    assert ("MSMT17" in datasets) == ("msmt17" in weight.tag)
    assert ("Market-1501" in datasets) == ("market1501" in weight.tag)
    for dataset in datasets:
        validate_repo_id(dataset)


def test_the_card_states_what_the_tag_is_and_where_it_comes_from(card):
    weight = get_weight("pass_vit_small_patch16.lup_market1501")
    text = card.text
    assert "# pass-small" in text
    for words in (
        "`pass_vit_small_patch16`, 256x128",
        "fusion `cat`, neck `none`, L2-normalised",
        "squash to 256x128, bilinear, mean [0.5, 0.5, 0.5]",
        "mAP 92.2, Rank-1 96.3 on Market-1501, measured by the authors",
        weight.license_note,
        CITATION,
        *PROVENANCE.values(),
    ):
        assert words in text
    assert [text.index(f"## {part}") for part in ("Usage", "Provenance", "Citation")]


def test_the_cards_usage_is_valid_python_of_this_repository(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert "timm.create_model('hf-hub:org/pass-small', pretrained=True, num_classes=0)" in calls
    assert "Embedder('hf-hub:org/pass-small')" in calls
    assert "torch.randn(1, 3, 256, 128)" in calls


def test_weights_of_another_make_do_not_take_the_claims_of_a_tag(tmp_path):
    save_pretrained(timm.create_model("pass_vit_small_patch16.lup_market1501", **TINY), tmp_path / "model")
    card = ModelCard(model_card(config_of(tmp_path / "model"), "org/mine"))
    assert card.data.license == "other"
    assert card.data.datasets is None
    assert "92.2" not in card.text


BUNDLED = "pass_vit_tiny_patch16.synth_reid"
DESCRIPTORS = {
    "another fusion": dict(global_pool="token"),
    "another size": dict(img_size=(128, 64)),
    "another number of heads": dict(num_heads=6),
    "other statistics": dict(pretrained_cfg_overlay=dict(mean=(0.4, 0.4, 0.4))),
    "another interpolation": dict(pretrained_cfg_overlay=dict(interpolation="bicubic")),
}


@pytest.mark.parametrize("case", ["the tag's own", *DESCRIPTORS])
def test_the_card_gives_the_accuracy_of_a_tag_for_its_own_descriptor_alone(case, tmp_path):
    save_pretrained(timm.create_model(BUNDLED, pretrained=True, **DESCRIPTORS.get(case, {})), tmp_path / "model")
    card = ModelCard(model_card(config_of(tmp_path / "model"), "me/mine"))
    assert card.data.license == "apache-2.0"  # of the weights, which are the tag's
    assert get_weight(BUNDLED).data in card.text
    assert ("mAP 46.5" in card.text) == bool(card.data.eval_results) == (case == "the tag's own")


@pytest.mark.parametrize("name", [w.name for w in list_weights() if w.bundled_file])
def test_a_bundled_folder_is_published_with_the_accuracy_of_its_row(name):
    weight = get_weight(name)
    card = model_card(config_of(weight.bundled_file.parent), "me/mine")
    assert weight.license_note in card
    assert f"mAP {weight.accuracy['mAP']:.1f}, Rank-1 {weight.accuracy['rank1']:.1f} on" in card


def test_a_model_of_no_tag_claims_no_data_and_no_accuracy(tmp_path):
    folder = written(tmp_path / "model", neck="multi")
    card = ModelCard(model_card(config_of(folder), "me/mine"))
    assert card.data.datasets is None
    assert card.data.license == config_of(folder)["pretrained_cfg"]["license"]
    assert "mAP" not in card.text
    assert "**Training data:** not stated" in card.text
    assert "neck `multi`, not L2-normalised" in card.text


RUN = {"data": "Market-1501, mine/: 9 images", "method": "supervised re-ID", "mAP": 61.234, "rank1": 80.0}


@pytest.mark.parametrize(
    ("provenance", "data", "task"),
    [
        ({"init": "random"}, "", ""),
        (
            {"init": "pass_vit_small_patch16.lup"},
            "LUPerson (4.18M images); then ",
            "self-supervised pre-training, then ",
        ),
        ({"init": "lup"}, "LUPerson (4.18M images); then ", "self-supervised pre-training, then "),
        ({"init": "official.pth"}, "not stated for the weights `official.pth`; then ", ""),
        (
            {"init": "export", "init_provenance": {"method": "PASS", "data": "crops/: 5 images", "init": ""}},
            "crops/: 5 images; then ",
            "PASS, then ",
        ),
    ],
)
def test_the_card_of_a_run_states_its_data_from_the_first_weights_on_and_its_accuracy(tmp_path, provenance, data, task):
    model = timm.create_model("pass_vit_small_patch16.lup_msmt17", **TINY)
    save_pretrained(model, tmp_path / "best", info={"provenance": {**RUN, **provenance}})
    card = ModelCard(model_card(config_of(tmp_path / "best"), "me/mine"))
    assert f"**Training data:** {data}{RUN['data']}\n" in card.text
    assert f"**Task:** {task}supervised re-ID\n" in card.text
    assert "**Accuracy:** mAP 61.2, Rank-1 80.0 on queries and gallery of Market-1501, mine/: 9 images, " in card.text
    assert ", measured during the training; of its checkpoints, this one had the highest mAP\n" in card.text
    assert card.data.datasets is None  # folders are not datasets of the Hub


def results_of(card: ModelCard) -> list[tuple]:
    """Model index: data, metric, value and source of each entry."""
    assert card.data.model_name
    return [
        (r.dataset_name, r.dataset_type, r.metric_name, r.metric_value, r.source_url) for r in card.data.eval_results
    ]


def test_the_model_index_has_the_accuracy_with_its_data_and_the_authors_as_source_of_their_own(card, tmp_path):
    paper = "https://arxiv.org/abs/2203.03931"
    market = ("Market-1501", "Market-1501")
    assert results_of(card) == [(*market, "mAP", 92.2, paper), (*market, "Rank-1", 96.3, paper)]
    info = {"provenance": {**RUN, "evaluation_data": "Duke, other/: 3 queries"}}
    save_pretrained(timm.create_model("test_pass_vit"), tmp_path / "best", info=info)
    own = ModelCard(model_card(config_of(tmp_path / "best"), "me/mine"))
    duke = ("Duke, other/", "Duke-other")
    assert results_of(own) == [(*duke, "mAP", 61.23, None), (*duke, "Rank-1", 80.0, None)]
    assert own.data.model_name == "mine"


def test_the_card_says_how_to_install_the_package(card):
    assert "```bash\npip install .    # in a clone of passreid-models\n```" in card.text


@pytest.mark.parametrize("num_classes", [0, 5])
def test_a_folder_of_timms_own_save_is_published_as_the_model_that_it_loads_and_claims_no_tag(
    num_classes, tmp_path, no_network
):
    folder = tmp_path / "timm"
    model = timm.create_model("pass_vit_small_patch16.lup_market1501", num_classes=num_classes, **TINY)
    save_for_hf(model, str(folder), model_args=TINY, safe_serialization=True)
    files = files_to_publish(folder, "me/mine")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads(files["config.json"])
    assert (config["fusion"], config["neck"], config["l2_normalize"]) == ("cat", "", True)
    assert config["pretrained_cfg"]["license"] == "other"
    assert not {"tag", "origin_url"} & config["pretrained_cfg"].keys()
    card = files["README.md"].decode()
    assert "fusion `cat`, neck `none`, L2-normalised" in card
    assert "**Training data:** not stated" in card
    assert "92.2" not in card
    assert publish(folder, "me/mine", dry_run=True)[1]["config.json"] == len(files["config.json"])


def test_what_is_published_of_timms_own_save_of_a_tag_gives_the_descriptors_of_the_folder(tmp_path, no_network):
    model = timm.create_model("pass_vit_small_patch16.lup_usl_msmt17", **TINY)  # mean, with a single neck
    save_for_hf(model, str(tmp_path / "timm"), model_args=TINY, safe_serialization=True)
    (tmp_path / "hub").mkdir()
    for name, file in files_to_publish(tmp_path / "timm", "me/mine").items():
        (tmp_path / "hub" / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert (again.global_pool, again.neck) == ("mean", "single")
    x = torch.randn(2, 3, 64, 32)
    assert torch.equal(again(x), model.eval()(x))


def test_weights_that_transformers_has_saved_claim_no_tag_no_run_and_no_accuracy(tmp_path, no_network):
    bundled = get_weight(BUNDLED).bundled_file.parent
    model = AutoModel.from_pretrained(bundled)
    for parameter in model.parameters():  # trained
        parameter.data.mul_(1.001)
    model.save_pretrained(tmp_path)
    assert {"provenance", "fusion"} <= config_of(tmp_path).keys()
    files = files_to_publish(tmp_path, "me/mine")
    assert isinstance(files["config.json"], bytes)
    config = json.loads(files["config.json"])
    assert not {"provenance", "load_report"} & config.keys()
    assert (config["fusion"], config["pretrained_cfg"]["license"]) == (config_of(bundled)["fusion"], "other")
    card = files["README.md"].decode()
    assert "**Training data:** not stated" in card
    assert "- not recorded" in card
    assert "mAP" not in card


def test_a_folder_of_another_family_by_timm_is_refused(tmp_path, no_network):
    save_for_hf(timm.create_model("test_vit"), str(tmp_path / "timm"), safe_serialization=True)
    with pytest.raises(ValueError, match="is not the config of a model of this package"):
        publish(tmp_path / "timm", "me/mine", dry_run=True)


def test_only_the_authors_weights_name_the_authors_repository(tmp_path):
    written(tmp_path / "theirs", "pass_vit_small_patch16.lup_market1501", **TINY)
    save_pretrained(timm.create_model("pass_vit_small_patch16.lup_market1501", **TINY), tmp_path / "tuned")
    written(tmp_path / "own")
    folders = [tmp_path / "own", tmp_path / "tuned", *(w.bundled_file.parent for w in list_weights() if w.bundled_file)]
    assert "CASIA-IVA-Lab" in config_of(tmp_path / "theirs")["pretrained_cfg"]["origin_url"]
    for folder in folders:
        assert "CASIA-IVA-Lab" not in json.dumps(config_of(folder)) + model_card(config_of(folder), "me/mine")
    assert "pypi.org" not in model_card(config_of(tmp_path / "theirs"), "me/mine")


def test_a_missing_provenance_is_stated_as_not_recorded(tmp_path):
    folder = written(tmp_path / "model")
    config = {k: v for k, v in config_of(folder).items() if k != "provenance"}
    assert "## Provenance\n\n- not recorded\n" in model_card(config, "me/mine")


# ------------------------------------------------------------------------------------------------- before the network


def test_a_dry_run_shows_the_files_and_sends_nothing(tmp_path, no_network, capsys):
    folder = written(tmp_path / "model", extras=EXTRAS)
    before = sorted(p.name for p in folder.iterdir())
    url, sizes = publish(folder, "org/name", dry_run=True)
    assert url == ""
    assert {name: sizes[name] for name in before} == {p.name: p.stat().st_size for p in folder.iterdir()}
    assert sizes.keys() - set(before) == {"README.md"}
    assert sizes["README.md"] == len(model_card(config_of(folder), "org/name").encode())
    assert cli.main(["weights", "publish", str(folder), "org/name", "--dry-run"]) == 0
    listing, rest = capsys.readouterr().out.split("\n\n", 1)
    assert {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listing.splitlines()} == sizes
    card = model_card(config_of(folder), "org/name")
    assert rest == f"{card}\nnothing was pushed to org/name (--dry-run)\n"
    assert sorted(p.name for p in folder.iterdir()) == before


def test_other_files_of_the_folder_stay_here_and_its_own_card_goes_out(tmp_path, no_network):
    folder = written(tmp_path / "model")
    (folder / "secrets.txt").write_text("mine")
    (folder / "README.md").write_text("# by hand, é\n")
    _, sizes = publish(folder, "org/name", dry_run=True)
    assert sorted(sizes) == ["README.md", "config.json", "model.safetensors"]
    assert sizes["README.md"] == len("# by hand, é\n".encode())


def test_a_card_that_is_older_than_the_weights_is_remarked(tmp_path, no_network, caplog):
    folder = written(tmp_path / "model")
    (folder / "README.md").write_text("mine")
    publish(folder, "org/name", dry_run=True)
    assert not caplog.records
    save_pretrained(timm.create_model("test_pass_vit"), folder, overwrite=True)
    os.utime(folder / "README.md", (0, 0))
    publish(folder, "org/name", dry_run=True)
    assert "README.md is older than model.safetensors: does it describe these weights?" in caplog.text


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "/name", "org/", ""])
def test_a_repository_is_named_with_its_owner(tmp_path, no_network, repo_id):
    folder = written(tmp_path / "model")
    with pytest.raises(ValueError, match="expected a repository org/name, got"):
        publish(folder, repo_id)


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
def test_a_folder_without_its_files_is_refused(tmp_path, no_network, lost):
    folder = written(tmp_path / "model")
    (folder / lost).unlink()
    with pytest.raises(FileNotFoundError, match=f"model has no {lost}: .* `passreid convert`, or a run's export/"):
        publish(folder, "org/name")


def test_a_damaged_file_does_not_leave(tmp_path, no_network):
    folder = written(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        publish(folder, "org/name")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "is not the config of a model of this package"),
        ("[1]", "is not the config of a model of this package"),
        ('{"architecture": "vit", "pretrained_cfg": {}}', "is not the config of a model of this package"),
        ('{"architecture": "test_pass_vit", "pretrained_cfg": {}}', "pretrained_cfg has no input_size"),
    ],
)
def test_a_config_of_another_make_is_refused(tmp_path, no_network, text, message):
    folder = written(tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"model/config\.json:? {message}"):
        publish(folder, "org/name")


# ------------------------------------------------------------------------------------------------------ to a Hub

CLIENT = """
import contextlib, io, json, os, re
import safetensors.torch, timm, torch
from huggingface_hub import ModelCard, hf_hub_download
from passreid_models import cli
from passreid_models.checkpoints.publish import publish

def refused(*args, **kwargs):
    try:
        publish(*args, **kwargs)
    except Exception as e:
        return [t.__name__ for t in type(e).__mro__], str(e)

def command(*args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["weights", "publish", *args])
    return code, out.getvalue(), err.getvalue()

def same(name):
    loaded, saved = (timm.create_model(n, pretrained=True).state_dict() for n in (name, "local-dir:model"))
    return loaded.keys() == saved.keys() and all(torch.equal(t, loaded[k]) for k, t in saved.items())

results = {"no token": refused("model", "org/name"), "no token, command": command("model", "org/name")}
os.environ["HF_TOKEN"] = "hf_wrong"
results["wrong token"] = refused("model", "org/name")
os.environ["HF_TOKEN"] = os.environ["TOKEN"]
results["url"], results["sizes"] = publish("model", "org/name")
results["loads back"] = same("hf-hub:org/name")
extras = safetensors.torch.load_file(hf_hub_download("org/name", "extras.safetensors"))
results["extras"] = {k: t.tolist() for k, t in extras.items()}
card = ModelCard.load("org/name")
results["card"] = card.data.to_dict()
scope = {}
exec(re.search(r"```python\\n(.*?)```", card.text, re.S)[1], scope)
results["usage"] = [list(scope["descriptor"].shape), list(scope["descriptors"].shape)]
results["private, command"] = command("model", "org/mine", "--private")
publish("again", "org/name")
results["no branch"] = refused("model", "org/name", revision="dev")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Results of a client that published, and the Hub after it."""
    work = tmp_path_factory.mktemp("publish")
    written(work / "model", extras=EXTRAS, neck="single")
    written(work / "again", depth=1)
    (work / "again" / "README.md").write_text("---\nlicense: mit\n---\nby hand\n")
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(np.full((64, 32, 3), 100, np.uint8)).save(work / name)
    with HubServer() as hub:
        env = {**hub.client_env(work / "hf"), "TOKEN": hub.token}
        command = [sys.executable, "-c", CLIENT]
        done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        yield SimpleNamespace(results=json.loads(done.stdout), hub=hub, work=work)


def first_commit(published: SimpleNamespace) -> dict[str, bytes]:
    sha = published.results["url"].rsplit("/", 1)[1]
    return published.hub.files("org/name", sha)


def test_the_hub_has_the_folders_files_and_a_card(published):
    files = first_commit(published)
    model = published.work / "model"
    sent = {name: (model / name).read_bytes() for name in ("config.json", "extras.safetensors", "model.safetensors")}
    sent |= {"README.md": model_card(config_of(model), "org/name").encode(), ".gitattributes": DEFAULT_GITATTRIBUTES}
    assert files == sent
    assert published.results["sizes"] == {k: len(v) for k, v in sent.items() if k != ".gitattributes"}
    assert published.results["url"].startswith(f"{published.hub.endpoint}/org/name/commit/")


def test_published_weights_load_back_equal(published):
    assert published.results["loads back"] is True
    assert published.results["extras"] == {k: t.tolist() for k, t in EXTRAS.items()}


def test_the_published_card_is_read_by_the_hubs_client(published):
    card = published.results["card"]
    assert card["library_name"] == "timm"
    assert card["pipeline_tag"] == "image-feature-extraction"


def test_the_published_cards_usage_runs(published):
    assert published.results["usage"] == [[1, 128], [2, 128]]


def test_publishing_again_replaces_the_files_and_takes_the_card_written_by_hand(published):
    files = published.hub.files("org/name")
    again = published.work / "again"
    assert {name: files[name] for name in ("config.json", "model.safetensors", "README.md")} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }


def test_private_is_passed_on_and_the_command_prints_the_commit(published):
    code, out, err = published.results["private, command"]
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith(f"{published.hub.endpoint}/org/mine/commit/")
    assert published.hub.repos["org/mine"].private
    assert not published.hub.repos["org/name"].private


@pytest.mark.parametrize("token", ["no token", "wrong token"])
def test_without_a_valid_token_the_hub_refuses_in_one_sentence(published, token):
    kinds, message = published.results[token]
    assert kinds[0] == "WeightsUnavailableError"
    assert message.startswith("the Hub refused org/name: ")
    assert message.endswith("; is HF_TOKEN set, and allowed to write?")
    assert "\n" not in message


def test_a_refusal_is_one_line_and_exit_code_2_of_the_command(published):
    code, out, err = published.results["no token, command"]
    assert (code, out) == (2, "")
    assert err.startswith("passreid: the Hub refused org/name")
    assert err.count("\n") == 1


def test_a_branch_that_does_not_exist_is_an_error_and_leaves_main_unchanged(published):
    kinds, message = published.results["no branch"]
    assert kinds[0] == "WeightsUnavailableError"
    assert message.startswith("the Hub refused org/name: 404 Client Error: Revision Not Found")
    assert "dev" in message
    assert "HF_TOKEN" not in message
    assert list(published.hub.repos["org/name"].branches) == ["main"]
