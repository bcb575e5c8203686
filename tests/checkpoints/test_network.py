"""Downloads from a Hub with faults, with its real client: the right file or a clear error, and nothing half there.

One client, in a subprocess, meets all faults; each has a repository of its own, and the tests check what became of it.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import ROOT
from tests.hub_server import HubServer

WEIGHTS = bytes(range(256)) * 160  # 40 kB
CONFIG = b'{"architecture": "test_pass_vit"}'

CLIENT = """
import hashlib, json, os, sys, time
from pathlib import Path
from passreid_models.checkpoints.hub import download_hub

sleep, waits, results = time.sleep, [], {}
time.sleep = waits.append
for hub_id, filename in json.load(sys.stdin):
    waits.clear()
    try:
        path = download_hub(hub_id, filename)
        kinds, message = [], hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as e:
        kinds, message = [kind.__name__ for kind in type(e).__mro__], str(e)
    folder = Path(os.environ["HF_HOME"], "hub", "models--" + hub_id.partition("@")[0].replace("/", "--"))
    files = sorted(p.relative_to(folder).parts[0] for p in folder.rglob("*") if p.is_file())
    results[hub_id + " " + filename] = kinds, message, list(waits), files
print(json.dumps(results))
"""
COMPLETE = ["blobs", "refs", "snapshots"]  # one file in each


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> SimpleNamespace:
    work = tmp_path_factory.mktemp("network")
    with HubServer() as server:
        outside, up = f'"{work}/outside"', '"../../../../outside"'
        files = {"model.safetensors": WEIGHTS, "config.json": CONFIG}
        names = (
            "whole reset reset-always drop short short-always stall stall-always drip trickle corrupt corrupt-always "
            "page long long-length cdn-401 cdn-403 cdn-404 cdn-500 cdn-429 cdn-429-long 429 429-long 500 500-always "
            "401 403 etag etag-up etag-sha1 no-etag commit no-commit no-size config-etag config-corrupt page-head huge"
        )
        for name in names.split():
            server.add_repo(f"org/{name}", files)
        for how in ("reset", "drop", "short", "stall"):
            server.truncate(f"org/{how}", "model.safetensors", how, times=1)
        for how in ("reset", "short", "stall"):
            server.truncate(f"org/{how}-always", "model.safetensors", how)
        server.spoil("org/drip", "model.safetensors", "drip", at=4000)
        server.spoil("org/trickle", "model.safetensors", "drip", at=20, times=1)
        server.spoil("org/page", "model.safetensors", "page")
        server.spoil("org/long", "model.safetensors", "long")
        server.corrupt("org/corrupt", "model.safetensors", times=1)
        server.corrupt("org/corrupt-always", "model.safetensors")
        server.corrupt("org/config-corrupt", "config.json", times=1)
        for status in (401, 403, 404):
            server.refuse(status, f"GET /org/cdn-{status}/cdn")
        server.refuse(500, "GET /org/cdn-500/cdn", times=1)
        server.refuse(429, "GET /org/cdn-429/cdn", times=1, Retry_After="7")
        server.refuse(429, "GET /org/cdn-429-long/cdn", Retry_After="86400")
        server.refuse(429, "HEAD /org/429/", times=1, Retry_After="7")
        server.refuse(429, "HEAD /org/429-long/", Retry_After="86400")
        server.refuse(500, "HEAD /org/500/", times=1)
        server.refuse(500, "HEAD /org/500-always/")
        server.refuse(401, "HEAD /org/401/")
        server.refuse(403, "HEAD /org/403/")
        server.refuse(200, "HEAD /org/page-head/")
        model = "model.safetensors"
        server.metadata |= {
            ("org/etag", model): {"X-Linked-ETag": outside},
            ("org/etag-up", model): {"X-Linked-ETag": up},
            ("org/etag-sha1", model): {"X-Linked-ETag": '"' + 40 * "a" + '"'},
            ("org/no-etag", model): {"X-Linked-ETag": ""},
            ("org/commit", model): {"X-Repo-Commit": "../../outside"},
            ("org/no-commit", model): {"X-Repo-Commit": ""},
            ("org/no-size", model): {"X-Linked-Size": ""},
            ("org/huge", model): {"X-Linked-Size": str(2**50)},
            ("org/long-length", model): {"X-Linked-Size": str(len(WEIGHTS) + 1)},
            ("org/config-etag", "config.json"): {"ETag": up},
        }
        asked = [(f"org/{name}", model) for name in names.split() if "config" not in name]
        asked += [(f"org/{name}", "config.json") for name in ("config-etag", "config-corrupt")]
        asked += [("org/missing", model), ("org/whole@main", "other.safetensors"), ("org/whole@v9", model)]
        asked += [(f"{name}", model) for name in ("org/whole@main@x", "org/whole@../x", "org/../x", "x/org/whole", "")]
        asked += [("org/whole", name) for name in ("../config.json", "/etc/passwd", "a/../b.bin", ".hidden")]
        env = server.client_env(work / "cache", server.token)
        env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
        command = [sys.executable, "-c", CLIENT]
        done = subprocess.run(
            command, env=env, cwd=work, input=json.dumps(asked), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    return SimpleNamespace(server=server, work=work, results=json.loads(done.stdout), stderr=done.stderr)


def result(hub: SimpleNamespace, name: str, filename: str = "model.safetensors") -> tuple:
    return hub.results[f"org/{name} {filename}"]


@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("whole", []),
        ("reset", [1]),
        ("drop", [1]),
        ("short", [1]),
        ("stall", [1]),
        ("drip", []),
        ("trickle", [1]),
        ("corrupt", []),
        ("cdn-500", [1]),
        ("cdn-429", [7]),
        ("429", [7]),
        ("500", [1]),
    ],
)
def test_the_file_arrives_whole_and_verified_in_spite_of_the_fault(hub, name, waits):
    kinds, message, waited, files = result(hub, name)
    assert (kinds, message) == ([], hashlib.sha256(WEIGHTS).hexdigest())
    assert waited == waits or (name == "429" and waited == [1])  # some clients wait by themselves
    assert files == COMPLETE


@pytest.mark.parametrize("name", ["reset", "drop", "short", "stall"])
def test_a_transfer_that_broke_off_is_resumed(hub, name):
    assert hub.server.sent[f"org/{name}", "model.safetensors"] == len(WEIGHTS)
    assert hub.server.downloads[f"org/{name}", "model.safetensors"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reset-always", "ReadError"),
        ("short-always", "20,480 of 40,960 bytes arrived"),
        ("stall-always", "ReadTimeout"),
        ("corrupt-always", "arrives damaged: its hash is not the one that the Hub states"),
        ("page", "a page comes instead of the file (Sign in & pay)"),
        ("long", "more than 40,960 bytes are sent"),
        ("long-length", "status 416, and not the part of the file that was asked for"),
        ("cdn-401", "status 401"),
        ("cdn-403", "status 403"),
        ("cdn-404", "status 404"),
        ("cdn-429-long", "status 429, and it asks to wait 86,400 seconds"),
        ("429-long", "and it asks to wait 86,400 seconds"),
        ("500-always", "500 Internal Server Error"),
        ("401", "401 Unauthorized"),
        ("403", "403"),
        ("missing", "404 Client Error: Repository Not Found"),
        ("etag", "its ETag is refused: expected a SHA-256, got '/"),
        ("etag-up", "its ETag is refused: expected a SHA-256, got '../"),
        ("etag-sha1", "its ETag is refused: expected a SHA-256, got 'aaa"),
        ("no-etag", "its ETag is refused: expected a SHA-256, got 'None'"),
        ("commit", "the server names no commit, and may be no Hub"),
        ("no-commit", "the server names no commit, and may be no Hub"),
        ("page-head", "the server names no commit, and may be no Hub"),
        ("no-size", " bytes "),
        ("huge", "a size of 1125899906842624 bytes is refused"),
    ],
)
def test_what_cannot_be_had_is_an_error_of_one_sentence_that_leaves_no_file(hub, name, message):
    kinds, error, _, files = result(hub, name)
    assert {"OSError", "ValueError"} & set(kinds)
    assert error.startswith(f"model.safetensors of org/{name} on the Hub")
    assert message in error
    assert "\n" not in error
    assert files == []


@pytest.mark.parametrize(
    ("hub_id", "filename", "message"),
    [
        ("org/whole@main", "other.safetensors", "404 Client Error: Entry Not Found"),
        ("org/whole@v9", "model.safetensors", "404 Client Error: Revision Not Found"),
        ("org/whole@main@x", "model.safetensors", "expected a repository of the Hub, ORG/NAME or ORG/NAME@REVISION"),
        ("org/whole@../x", "model.safetensors", "expected a repository of the Hub"),
        ("org/../x", "model.safetensors", "expected a repository of the Hub"),
        ("x/org/whole", "model.safetensors", "expected a repository of the Hub"),
        ("", "model.safetensors", "expected a repository of the Hub"),
        ("org/whole", "../config.json", "expected the name of a file in the repository, got '../config.json'"),
        ("org/whole", "/etc/passwd", "expected the name of a file in the repository"),
        ("org/whole", "a/../b.bin", "expected the name of a file in the repository"),
        ("org/whole", ".hidden", "expected the name of a file in the repository"),
    ],
)
def test_names_that_nothing_answers_to_are_errors_with_the_reason(hub, hub_id, filename, message):
    kinds, error, _, _ = hub.results[f"{hub_id} {filename}"]
    assert {"OSError", "ValueError"} & set(kinds)
    assert message in error


def test_the_config_is_verified_too(hub):
    assert result(hub, "config-corrupt", "config.json")[:2] == [[], hashlib.sha256(CONFIG).hexdigest()]
    assert hub.server.downloads["org/config-corrupt", "config.json"] == 2
    _, error, _, files = result(hub, "config-etag", "config.json")
    assert "its ETag is refused: expected a hash, got '../" in error
    assert files == []


def test_no_file_is_written_outside_the_cache(hub):
    assert sorted(p.name for p in hub.work.iterdir()) == ["cache"]
    assert not list(hub.work.rglob("outside*"))
    assert {p.name for p in Path(hub.work, "cache").iterdir()} == {"hub"}


def test_no_credential_follows_a_redirect_to_another_host(hub):
    assert hub.server.credentials["hub", f"Bearer {hub.server.token}"] > 0
    assert [sender for origin, sender in hub.server.credentials if origin == "cdn"] == [None]


def test_nothing_in_the_output_tells_the_token(hub):
    assert hub.server.token not in hub.stderr + json.dumps(hub.results)
