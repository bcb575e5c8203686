"""The loopback Hub serves the real client, and the client behaves as the package expects."""

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest

from tests.hub_server import HubServer, git_sha1

WEIGHTS = bytes(range(256)) * 1000  # 256 kB: many socket reads
OLD = {"config.json": b'{"release": 1}'}
NEW = {"config.json": b'{"release": 2}', "model.safetensors": WEIGHTS, "sub folder/café.txt": b"accents and spaces"}

PRELUDE = """
import json, os, sys
from huggingface_hub import HfApi, CommitOperationAdd as Add, CommitOperationDelete as Delete, constants, file_exists
from huggingface_hub import hf_hub_download, list_repo_files, model_info, snapshot_download

def get(path, repo="org/name", **options):
    with open(hf_hub_download(repo, path, **options), "rb") as file:
        return file.read().hex()

def error(call, *args, **options):
    try:
        return ["no error", str(call(*args, **options))]
    except Exception as caught:
        return [type(caught).__name__, getattr(getattr(caught, "response", None), "status_code", None)]
"""


resumes = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2, reason="older versions resume in the next call, not within one"
)


@pytest.fixture
def hub():
    with HubServer() as hub:
        hub.add_repo("org/name", NEW, tags={"v1": OLD})
        yield hub


def client(hub: HubServer, cache: Path, expression: str, token: str | None = None, **env: str):
    """The value of a Python expression in a fresh process, where the client is the real one."""
    code = f"{PRELUDE}\nprint(json.dumps({expression}))"
    env = {**hub.client_env(cache, token), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cache.parent, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def blobs(cache: Path) -> dict[str, int]:
    """Every file below a cache's `blobs` and `snapshots`, complete or not, with its size."""
    return {p.name: p.stat().st_size for d in ("blobs", "snapshots") for p in cache.rglob(f"{d}/**/*") if p.is_file()}


def test_every_kind_of_revision_gives_its_own_bytes(hub, tmp_path):
    v1, v2 = hub.resolve("org/name", "v1"), hub.resolve("org/name")
    dev = hub.commit("org/name", {"config.json": b'{"release": 3}'}, branch="feature/dev")
    revisions = ["v1", v1, "main", v2, "feature/dev", dev]
    results = client(hub, tmp_path / "hf", f"[get('config.json', revision=r) for r in {revisions}]")
    assert [json.loads(bytes.fromhex(config))["release"] for config in results] == [1, 1, 2, 2, 3, 3]


def test_files_and_their_metadata_are_those_of_the_repo(hub, tmp_path):
    results = client(
        hub,
        tmp_path / "hf",
        """{
            "files": {name: get(name) for name in list_repo_files("org/name")},
            "exists": [file_exists("org/name", name) for name in ("config.json", "nope.json")],
            "shas": [model_info("org/name", revision=r).sha for r in ("v1", "main")],
            "info": [[s.rfilename, s.size, s.blob_id, s.lfs and s.lfs.sha256]
                     for s in model_info("org/name", files_metadata=True).siblings],
            "snapshot": sorted(os.listdir(snapshot_download("org/name", revision="v1"))),
        }""",
    )
    assert {name: bytes.fromhex(data) for name, data in results["files"].items()} == NEW
    assert results["exists"] == [True, False]
    assert results["shas"] == [hub.resolve("org/name", "v1"), hub.resolve("org/name")]
    assert results["info"][0] == ["config.json", 14, git_sha1(NEW["config.json"]), None]
    assert results["info"][1][1::2] == [len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()]
    assert results["snapshot"] == ["config.json"]
    assert blobs(tmp_path)[hashlib.sha256(WEIGHTS).hexdigest()] == len(WEIGHTS)  # ETag of the linked LFS object
    assert hub.downloads == {("org/name", name): 1 for name in NEW} | {("org/name", "config.json"): 2}  # v1 and main


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["HF_HUB_OFFLINE", "connection refused"])
def test_a_cached_model_loads_when_the_hub_is_gone(hub, tmp_path, env):
    ask = "[get('model.safetensors'), get('config.json', revision='v1')]"
    first = client(hub, tmp_path / "hf", ask)
    hub.close()
    assert first == client(hub, tmp_path / "hf", ask, **env) == [WEIGHTS.hex(), OLD["config.json"].hex()]


def test_an_outage_of_the_hub_is_distinguished_from_a_missing_file(hub, tmp_path):
    client(hub, tmp_path / "hf", "get('config.json')")
    hub.refuse(503)
    assert bytes.fromhex(client(hub, tmp_path / "hf", "get('config.json')")) == NEW["config.json"]  # from the cache
    hub.heal()
    assert client(hub, tmp_path / "hf", "error(get, 'nope.json')") == ["RemoteEntryNotFoundError", 404]


def test_missing_and_forbidden_files_are_refused_as_on_the_real_hub(hub, tmp_path):
    hub.add_repo("org/secret", NEW, private=True)
    hub.add_repo("org/gated", NEW, gated=True)
    weights = "'model.safetensors', 'org/secret'"
    results = client(
        hub,
        tmp_path / "hf",
        f"""[
            error(get, "config.json", "org/nope"),
            error(model_info, "org/nope"),
            error(get, "nope.json"),
            error(get, "config.json", revision="nope"),
            error(get, {weights}),
            error(get, {weights}, token="hf_wrong"),
            error(get, "config.json", "org/gated"),
            error(get, "config.json", "org/gated", token="{hub.token}"),
            error(HfApi().create_repo, "org/mine"),
            get({weights}, token="{hub.token}") == (bytes(range(256)) * 1000).hex(),
        ]""",
    )
    assert results == [
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RepositoryNotFoundError", 401],
        ["HfHubHTTPError", 401],
        ["GatedRepoError", 401],
        ["GatedRepoError", 403],
        ["HfHubHTTPError", 401],
        True,
    ]
    assert hub.credentials["hub", f"Bearer {hub.token}"] > 0
    assert [sender for origin, sender in hub.credentials if origin == "cdn"] == [None]


def test_a_published_folder_comes_back_byte_for_byte(hub, tmp_path):
    folder = tmp_path / "model"
    files = {**NEW, "README.md": b"---\nlicense: mit\n---\n# A model\n", "empty.bin": b""}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    published = client(
        hub,
        tmp_path / "publisher",
        f"""[
            HfApi().whoami()["name"],
            HfApi().create_repo("org/new", private=True).repo_id,
            HfApi().create_repo("org/new", exist_ok=True).repo_id,
            error(HfApi().create_repo, "org/new"),
            HfApi().upload_folder(repo_id="org/new", folder_path={str(folder)!r}).oid,
            HfApi().upload_folder(repo_id="org/new", folder_path={str(folder)!r}).oid,
        ]""",
        token=hub.token,
    )
    assert published[:4] == ["tester", "org/new", "org/new", ["HfHubHTTPError", 409]]
    assert published[4] == published[5] == hub.resolve("org/new")  # nothing new: no second commit
    assert {name: data for name, data in hub.files("org/new").items() if name != ".gitattributes"} == files
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    assert {key: n for key, n in hub.requests.items() if key[0] == "PUT"} == {("PUT", f"/org/new/lfs/{oid}"): 1}
    assert all(origin == "hub" for origin, sender in hub.credentials if sender)
    loaded = client(
        hub, tmp_path / "user", f"{{name: get(name, 'org/new') for name in {list(files)}}}", token=hub.token
    )
    assert {name: bytes.fromhex(data) for name, data in loaded.items()} == files


def test_commits_add_delete_and_refuse_a_stale_parent(hub, tmp_path):
    base = hub.resolve("org/name")
    hub.commit("org/name", {}, branch="dev")
    results = client(
        hub,
        tmp_path / "hf",
        f"""(lambda commit: [
            commit([Add("a.bin", b"new")], revision="dev").oid,
            commit([Delete("sub folder/"), Add("b.txt", b"b")], parent_commit="{base}").oid,
            error(commit, [Add("c.txt", b"c")], parent_commit="{base}"),
            error(commit, [Add("c.txt", b"c")], revision="nope"),
            error(commit, [Add("c.txt", b"c")], token=False),
        ])(lambda todo, **options: HfApi().create_commit("org/name", todo, commit_message="x", **options))""",
        token=hub.token,
    )
    assert results[:2] == [hub.resolve("org/name", "dev"), hub.resolve("org/name")]
    assert results[2:] == [["HfHubHTTPError", 412], ["RevisionNotFoundError", 404], ["RepositoryNotFoundError", 401]]
    assert hub.files("org/name", "dev") == {**NEW, "a.bin": b"new"}
    assert set(hub.files("org/name")) == {"config.json", "model.safetensors", "b.txt"}
    assert hub.files("org/name", base) == NEW


@resumes
@pytest.mark.parametrize(("how", "raised"), [("short", "OSError"), ("reset", "ReadError")])
def test_a_truncated_download_leaves_no_half_file_and_a_retry_completes(hub, tmp_path, how, raised):
    hub.truncate("org/name", "model.safetensors", how, times=1)
    assert client(hub, tmp_path / "hf", "error(get, 'model.safetensors')") == [raised, None]
    assert blobs(tmp_path) == {}
    assert client(hub, tmp_path / "hf", "get('model.safetensors')") == WEIGHTS.hex()
    assert hub.sent["org/name", "model.safetensors"] == 1.5 * len(WEIGHTS)  # no resume across calls


@resumes
@pytest.mark.parametrize(("chunk", "sent_twice"), [(10_000, 0), (10 * 2**20, 100_000)])
def test_a_connection_dropped_once_is_resumed_from_the_last_whole_chunk(hub, tmp_path, chunk, sent_twice):
    hub.truncate("org/name", "model.safetensors", at=100_000, times=1)
    resume = f"[setattr(constants, 'DOWNLOAD_CHUNK_SIZE', {chunk}), get('model.safetensors')]"
    assert client(hub, tmp_path / "hf", resume) == [None, WEIGHTS.hex()]
    assert hub.downloads["org/name", "model.safetensors"] == 2
    assert hub.sent["org/name", "model.safetensors"] == len(WEIGHTS) + sent_twice


@resumes
def test_a_connection_always_dropped_at_the_same_byte_fails_after_five_retries(hub, tmp_path):
    hub.truncate("org/name", "model.safetensors")
    assert client(hub, tmp_path / "hf", "error(get, 'model.safetensors')") == ["RemoteProtocolError", None]
    assert blobs(tmp_path) == {}
    assert hub.downloads["org/name", "model.safetensors"] == 6


def test_the_client_verifies_no_hash_so_a_corrupted_file_stays_in_its_cache(hub, tmp_path):
    wrong = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 0xFF])
    hub.corrupt("org/name", "model.safetensors", times=1)
    ask = "[get('model.safetensors'), get('model.safetensors'), get('model.safetensors', force_download=True)]"
    assert client(hub, tmp_path / "hf", ask) == [wrong.hex(), wrong.hex(), WEIGHTS.hex()]
    assert hub.downloads["org/name", "model.safetensors"] == 2


def test_a_closed_hub_leaves_no_thread_and_can_be_closed_again():
    before = set(threading.enumerate())
    with HubServer() as hub:
        assert hub.endpoint != hub.cdn
        hub.close()
        assert set(threading.enumerate()) == before
