"""Loading from the Hub with its real client: names, revisions, the cache, refusals, damage, and the tags' repositories.

The client runs in subprocesses (it reads HF_ENDPOINT when it is imported), on a Hub and a Drive of 127.0.0.1; each
starts once and loads everything, and the tests check its results.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch

from passreid_models.checkpoints.local_dir import save_pretrained
from tests.checkpoints.test_zoo import import_path, manifest_row, stand_in
from tests.drive_server import DriveServer
from tests.hub_server import HubServer

PRELUDE = """
import json, os, sys, time
import timm, torch, passreid_models
from pathlib import Path
from passreid_models import load_report
from passreid_models.checkpoints import hub, zoo
from passreid_models.checkpoints.names import find_model

x = torch.linspace(-1, 1, 3 * 64 * 32).reshape(1, 3, 64, 32)

def load(name, **kwargs):
    model = timm.create_model(name, pretrained=True, **kwargs).eval()
    return {"descriptor": model(x).flatten().tolist(), "source": load_report(model).source,
            "mean": list(model.pretrained_cfg["mean"]), "neck": model.neck}

def named(name):
    hashed, sha256 = [], hub.sha256
    hub.sha256 = lambda path: hashed.append(path) or sha256(path)
    models = [find_model(name) for _ in range(3)]  # as in a training: settings, provenance, weights
    model, before = models[-1], len(hashed)
    descriptor = model.create().eval()(x).flatten().tolist()
    result = {"architecture": model.architecture, "settings": model.settings, "descriptor": descriptor}
    return {**result, "hashed": [before, len(hashed)]}

def error(name, **kwargs):
    try:
        load(name, **kwargs)
    except Exception as e:
        return [t.__name__ for t in type(e).__mro__], str(e)
    return [], "no error"

def weights_in_cache(repo):
    folder = Path(os.environ["HF_HOME"]) / "hub" / ("models--" + repo.replace("/", "--"))
    return sorted(p.stat().st_size for p in folder.glob("blobs/*") if p.stat().st_size > 10_000)
"""

WITH_A_NETWORK = """
results = {
    "main": load("hf-hub:org/tiny"),
    "v1": load("hf-hub:org/tiny@v1"),
    "sha": load("hf-hub:org/tiny@" + os.environ["SHA"]),
    "missing": error("hf-hub:org/missing"),
    "no revision": error("hf-hub:org/tiny@v9"),
    "private": error("hf-hub:org/private"),
    "gated": error("hf-hub:org/gated"),
    "no weights": error("hf-hub:org/config-only"),
    "damaged": error("hf-hub:org/damaged"),
    "damaged config": error("hf-hub:org/config"),
    "damaged in the cache": weights_in_cache("org/damaged"),
    "damaged once": load("hf-hub:org/once"),
    "another cache": load("hf-hub:org/tiny@v1", cache_dir=os.environ["OTHER_CACHE"]),
    "named": named("hf-hub:org/tiny@v1"),
    "overlay": load("test_pass_vit", pretrained_cfg_overlay=dict(hf_hub_id="org/tiny")),
    "overlay, source": load("test_pass_vit", pretrained_cfg_overlay=dict(source="hf-hub", hf_hub_id="org/tiny")),
    "overlay, neck": error("test_pass_vit", pretrained_cfg_overlay=dict(hf_hub_id="org/tiny@v1")),
}
os.environ["PASSREID_HUB_NAMESPACE"] = "org"
results["tag"] = load("test_pass_vit.published")
results["tag with a repository of its own"] = load("test_pass_vit.pinned")
os.environ["PASSREID_HUB_NAMESPACE"] = "nobody"
results["tag, no repository"] = error("test_pass_vit.other")
results["tag, only on the Drive"] = load("test_pass_vit.drive")
os.environ["PASSREID_HUB_NAMESPACE"] = "shut"
results["tag, private repository"] = error("test_pass_vit.published")
os.environ["PASSREID_HUB_NAMESPACE"] = "broken"
results["tag, damaged"] = error("test_pass_vit.published")
os.environ["HF_TOKEN"] = os.environ["TOKEN"]
results["private with a token"] = load("hf-hub:org/private")
print(json.dumps(results))
"""

WITHOUT = """
results = {name: load("hf-hub:org/" + name) for name in ("tiny", "tiny@v1", "once")}
results["another cache"] = load("hf-hub:org/tiny@v1", cache_dir=os.environ["OTHER_CACHE"])
os.environ["PASSREID_HUB_NAMESPACE"] = "org"
results["tag"] = load("test_pass_vit.published")
waits = []
time.sleep = waits.append  # between its tries for what is not in the cache, the client waits 23 s
results["never loaded"] = error("hf-hub:org/other")
waits.clear()
results["tag never loaded"] = error("test_pass_vit.other")
results["waits"] = waits
print(json.dumps(results))
"""


def descriptor(model: torch.nn.Module) -> list[float]:
    x = torch.linspace(-1, 1, 3 * 64 * 32).reshape(1, 3, 64, 32)
    return model.eval()(x).flatten().tolist()


def saved(folder: Path, seed: int, **kwargs: object) -> tuple[dict[str, bytes], list[float]]:
    """Files of a model drawn from ``seed``, and its descriptor of the clients' image."""
    model = timm.create_model("test_pass_vit", **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.pretrained_cfg["mean"] = (seed / 10,) * 3
    save_pretrained(model, folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}, descriptor(model)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> SimpleNamespace:
    """Results of two clients with one cache: the first with the Hub, the second without."""
    work = tmp_path_factory.mktemp("hub")
    (old, old_descriptor), (new, new_descriptor) = saved(work / "old", 1, neck="single"), saved(work / "new", 2)
    rows = [manifest_row(f"test_pass_vit.{tag}", drive_id=f"ID-{tag}") for tag in ("published", "other", "drive")]
    stand_in(work / "site", [*rows, manifest_row("test_pass_vit.pinned", hub_id="org/tiny@v1")])

    def client(code: str, **env: str) -> dict:
        env = {**server.client_env(work / "hf"), "PYTHONPATH": import_path(work / "site"), "TOKEN": server.token, **env}
        env |= {"OTHER_CACHE": str(work / "other"), "PASSREID_CACHE": str(work / "passreid")}
        env["PASSREID_DRIVE_ENDPOINT"] = drive.endpoint
        command = [sys.executable, "-c", PRELUDE + code]
        done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    torch.save({k: t.float() for k, t in safetensors.torch.load(new["model.safetensors"]).items()}, work / "drive.pth")
    with HubServer() as server, DriveServer((work / "drive.pth").read_bytes(), {"ID-drive": "confirm"}) as drive:
        server.add_repo("org/tiny", new, tags={"v1": old})
        for repo in ("org/damaged", "org/once", "org/test_pass_vit.published", "broken/test_pass_vit.published"):
            server.add_repo(repo, new)
        server.add_repo("org/config", new)
        server.metadata["org/config", "config.json"] = {"ETag": '"' + 40 * "a" + '"'}
        server.add_repo("org/private", new, private=True)
        server.add_repo("shut/test_pass_vit.published", new, private=True)
        server.add_repo("org/gated", new, gated=True)
        server.add_repo("org/config-only", {"config.json": new["config.json"]})
        for repo in ("org/damaged", "broken/test_pass_vit.published"):
            server.corrupt(repo, "model.safetensors")
        server.corrupt("org/once", "model.safetensors", times=1)
        online = client(WITH_A_NETWORK, SHA=server.resolve("org/tiny", "v1"))
    return SimpleNamespace(
        old=old_descriptor,
        new=new_descriptor,
        online=online,
        drive=drive,
        offline=client(WITHOUT),
        server=server,
        work=work,
    )


def test_a_repository_loads_by_name_at_its_newest_commit(hub):
    assert hub.online["main"]["descriptor"] == hub.new
    assert hub.online["main"]["mean"] == [0.2] * 3  # of its config.json
    assert hub.old != hub.new


@pytest.mark.parametrize("revision", ["v1", "sha"])
def test_a_revision_is_loaded_with_its_own_config_and_weights(hub, revision):
    assert hub.online[revision]["descriptor"] == hub.old
    assert hub.online[revision]["mean"] == [0.1] * 3
    assert hub.online[revision]["neck"] == "single"


def test_architecture_size_and_fusion_of_a_repository_are_known_before_its_weights_are_loaded(hub):
    named = hub.online["named"]
    assert (named["architecture"], named["settings"]) == ("test_pass_vit", {"size": [64, 32], "fusion": "cat"})
    assert named["descriptor"] == pytest.approx(hub.old, abs=1e-5)


def test_weights_are_hashed_once_however_often_their_name_is_looked_up(hub):
    assert hub.online["named"]["hashed"] == [0, 1]  # before the model is made, and after


def test_the_report_names_the_file_in_the_cache(hub):
    source = Path(hub.online["main"]["source"])
    assert source.name == "model.safetensors"
    assert source.is_relative_to(hub.work / "hf" / "hub" / "models--org--tiny")


def test_a_repository_in_an_overlay_is_read_as_a_file_is(hub):
    assert hub.online["overlay"]["descriptor"] == hub.online["overlay, source"]["descriptor"] == hub.new
    assert hub.online["overlay"]["source"] == hub.online["main"]["source"]
    kinds, message = hub.online["overlay, neck"]
    assert "CheckpointError" in kinds
    assert "it has a neck and does not state of which fusion" in message
    assert "hf-hub:ORG/NAME" in message


def test_the_second_load_needs_no_server(hub):
    assert hub.offline["tiny"]["descriptor"] == hub.new
    assert hub.offline["tiny@v1"]["descriptor"] == hub.old
    assert hub.offline["once"]["descriptor"] == hub.new


def test_each_revision_is_downloaded_once(hub):
    assert hub.server.downloads["org/tiny", "model.safetensors"] == 3  # main, v1 (its sha is the same), another cache


def test_a_cache_of_the_callers_is_used_for_the_weights_too(hub):
    assert hub.online["another cache"]["descriptor"] == hub.old  # its single neck asks the config again
    assert Path(hub.online["another cache"]["source"]).is_relative_to(hub.work / "other")
    assert hub.offline["another cache"]["descriptor"] == hub.old


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("missing", "RepositoryNotFoundError", "org/missing"),
        ("no revision", "RevisionNotFoundError", "v9"),
        ("private", "HfHubHTTPError", "401"),
        ("gated", "GatedRepoError", "org/gated"),
        (
            "no weights",
            "WeightsUnavailableError",
            "model.safetensors of org/config-only on the Hub: 404 Client Error: Entry Not Found for url",
        ),
        ("damaged config", "CheckpointError", "config.json of org/config was damaged on its way from the Hub"),
        ("damaged", "CheckpointError", "arrives damaged: its hash is not the one that the Hub states"),
    ],
)
def test_repositories_that_cannot_be_loaded_are_errors_with_the_reason(hub, case, error, words):
    kinds, message = hub.online[case]
    assert error in kinds
    assert words in message
    assert {"OSError", "ValueError"} & set(kinds)  # what the command line turns into exit code 2


def test_a_private_repository_loads_with_a_token_which_only_the_hub_sees(hub):
    assert hub.online["private with a token"]["descriptor"] == hub.new
    assert hub.server.credentials["hub", f"Bearer {hub.server.token}"] > 0
    assert hub.server.credentials["cdn", f"Bearer {hub.server.token}"] == 0


def test_a_damaged_download_is_tried_again_and_does_not_stay_in_the_cache(hub):
    assert hub.server.downloads["org/damaged", "model.safetensors"] == 2
    assert hub.online["damaged in the cache"] == []


def test_a_download_damaged_once_heals(hub):
    assert hub.online["damaged once"]["descriptor"] == hub.new
    assert hub.server.downloads["org/once", "model.safetensors"] == 2


def test_a_tag_is_found_under_the_namespace_with_the_settings_of_the_manifest(hub):
    for result in (hub.online["tag"], hub.offline["tag"]):
        assert result["descriptor"] == hub.new
        assert result["mean"] == [0.485, 0.456, 0.406]


def test_the_manifests_repository_comes_before_the_namespace_and_may_name_a_revision(hub):
    result = hub.online["tag with a repository of its own"]
    assert "models--org--tiny" in result["source"]


def test_a_tag_without_a_repository_comes_from_the_drive(hub):
    assert hub.online["tag, only on the Drive"]["descriptor"] == hub.new


def test_the_drive_is_asked_only_where_the_hub_has_nothing(hub):
    assert hub.drive.count == {"ID-other": 1, "ID-drive": 2, "ID-published": 1}


@pytest.mark.parametrize(
    ("where", "case", "name", "reason"),
    [
        ("online", "tag, no repository", "other", "there is no such file on Google Drive"),
        ("online", "tag, private repository", "published", "there is no such file on Google Drive"),
        ("offline", "tag never loaded", "other", "test_pass_vit.other on the Hub: ConnectError: "),
        ("offline", "tag never loaded", "other", "the download from Google Drive failed: ConnectError: "),
    ],
)
def test_a_tag_that_is_nowhere_is_an_error_of_one_sentence_that_names_both(hub, where, case, name, reason):
    kinds, message = getattr(hub, where)[case]
    assert kinds[0] == "WeightsUnavailableError"
    assert f"/test_pass_vit.{name} on the Hub: " in message
    assert reason in message
    url = f"https://drive.google.com/file/d/ID-{name}/view"
    assert f"download {url} by hand and run `passreid weights pull test_pass_vit.{name} --from FILE`" in message
    assert "\n" not in message


def test_without_a_network_hub_and_drive_are_each_asked_once_more_after_a_second(hub):
    assert hub.offline["waits"] == [1, 1]


def test_a_damaged_repository_of_a_tag_is_an_error_and_not_passed_over(hub):
    kinds, message = hub.online["tag, damaged"]
    assert kinds[0] == "CheckpointError"
    assert "model.safetensors of broken/test_pass_vit.published on the Hub arrives damaged" in message


def test_without_a_server_a_repository_that_was_never_loaded_is_an_error(hub):
    kinds, message = hub.offline["never loaded"]
    assert {"OSError", "ValueError"} & set(kinds)
    assert "we cannot find the requested files in the local cache" in message
