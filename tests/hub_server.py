"""A Hugging Face Hub on 127.0.0.1, for tests: the real `huggingface_hub` client loads from it and publishes to it.

    with HubServer() as hub:
        commit = hub.add_repo("org/name", {"config.json": b"{}", "model.safetensors": weights}, tags={"v1": old_files})
        subprocess.run([sys.executable, "-c", code], env=hub.client_env(tmp_path, token=hub.token))
        hub.files("org/name")  # what a publish left there

The client reads HF_ENDPOINT when it is imported, so it runs in a subprocess. As on the real Hub, small text comes from
the Hub itself (ETag: git blob sha1), and weights are LFS objects (ETag: sha256) to which the Hub only redirects: they
lie on a second origin (`hub.cdn`), where the client must not send its token. Only models, no Xet, no pull requests.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".npy", ".npz", ".gz", ".zip", ".png", ".jpg")
LFS_FROM_BYTES = 10 * 2**20
DEFAULT_GITATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES).encode()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """The Hub's rule in `preupload`: by suffix, by size, or binary by its first 512 bytes."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_FROM_BYTES or b"\0" in sample[:512])


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def describe(path: str, data: bytes) -> dict:
    """A file as `tree` lists it; an LFS file's git oid is that of its pointer."""
    if not is_lfs(path, len(data), data):
        return {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    oid = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
    lfs = {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(data), "oid": git_sha1(pointer), "lfs": lfs}


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha -> the whole tree
    uploads: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    kind: str | int  # "corrupt", "drop", "reset", "short", "stall", "drip", "page", "long", or a status
    at: int | None = None
    times: int | None = None  # None: always
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer other than success; the client picks its exception by the X-Error-Code."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message)
        coded = {"X-Error-Code": code} if code else {}
        self.status, self.headers = status, {**coded, "X-Error-Message": message, **headers}


class HubServer:
    """The Hub's state and its two listening sockets; a context manager.

    Counters: `requests` by (method, path); `downloads` (GETs of a file's bytes, which for LFS files are the cdn's) and
    `sent` (the bytes they sent) by (repo_id, path); `credentials` by ("hub" or "cdn", Authorization header or None).
    """

    def __init__(self, user: str = "tester", token: str = "hf_loopback"):
        self.user, self.token = user, token
        self.requests: Counter[tuple[str, str]] = Counter()
        self.downloads: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.credentials: Counter[tuple[str, str | None]] = Counter()
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self._faults: dict[tuple[str, str], Fault] = {}  # (repo_id, path) -> what its downloads suffer
        self._refusals: list[tuple[re.Pattern, Fault]] = []
        self._servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []
        self.metadata: dict[tuple[str, str], dict[str, str]] = {}
        """Headers of metadata to send in place of the true ones, by (repo_id, path); an empty one is left out."""
        self.closing = threading.Event()

    def __enter__(self) -> "HubServer":
        for _ in range(2):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self._servers.append((server, thread))
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server, _ in self._servers)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; from then on the endpoint refuses connections."""
        self.closing.set()
        for server, thread in self._servers:
            server.shutdown()
            server.server_close()
            thread.join()
        self._servers.clear()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        private: bool = False,
        gated: bool = False,
        tags: Mapping[str, Mapping[str, bytes]] | None = None,
    ) -> str:
        """Create a repo whose `main` holds exactly `files`, after the commits of `tags`; return the sha of `main`."""
        self.repos[repo_id] = Repo(private, gated)
        for name, tagged in (tags or {}).items():
            self.repos[repo_id].tags[name] = self._record(repo_id, "main", dict(tagged))
        return self._record(repo_id, "main", dict(files))

    def commit(self, repo_id: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Add or replace files on a branch (a new one starts from `main`) and return the sha of the commit."""
        branches = self.repos[repo_id].branches
        tree = self.repos[repo_id].commits[branches.get(branch, branches["main"])]
        return self._record(repo_id, branch, {**tree, **files})

    def resolve(self, repo_id: str, revision: str = "main") -> str:
        """The commit sha a branch, a tag or a (full) sha names."""
        repo = self.repos[repo_id]
        sha = repo.branches.get(revision) or repo.tags.get(revision) or revision
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return dict(self.repos[repo_id].commits[self.resolve(repo_id, revision)])

    def corrupt(self, repo_id: str, path: str, *, at: int = -1, times: int | None = None) -> None:
        """Flip one byte of what downloads get (the last: a safetensors header still parses); size and ETag stay."""
        self._faults[repo_id, path] = Fault("corrupt", at, times)

    def truncate(
        self, repo_id: str, path: str, how: str = "drop", *, at: int | None = None, times: int | None = None
    ) -> None:
        """Send nothing past byte `at` (default: half). `how`: "drop" closes the connection there, "reset" resets it,
        "stall" sends nothing more, and "short" announces the short body as the whole one, as a careless proxy does."""
        self._faults[repo_id, path] = Fault(how, at, times)

    def spoil(self, repo_id: str, path: str, how: str, *, at: int = 1000, times: int | None = None) -> None:
        """`how`: "drip" sends `at` bytes every 0.1 s, "page" sends a page of HTML, "long" a body twice as long."""
        self._faults[repo_id, path] = Fault(how, at, times)

    def refuse(self, status: int, match: str = "", *, times: int | None = None, **headers: str) -> None:
        """Answer requests whose "METHOD path" contains the regex `match` with this status: 403, 429, 503, ..."""
        self._refusals.append((re.compile(match), Fault(status, times=times, headers=headers)))

    def heal(self) -> None:
        """Withdraw every fault."""
        self._faults.clear()
        self._refusals.clear()

    def client_env(self, cache_dir: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment of a subprocess that sees this Hub, an empty cache under `cache_dir`, and nothing of ours."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"HF_|HUGGING|(ALL|HTTPS?)_PROXY", k, re.I)}
        flags = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        home = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache_dir), **dict.fromkeys(flags, "1")}
        return {**kept, **home, **({"HF_TOKEN": token} if token else {})}

    def _record(self, repo_id: str, branch: str, tree: dict[str, bytes]) -> str:
        with self.lock:
            repo = self.repos[repo_id]
            parent = f"{repo_id} {branch} {len(repo.commits)} {repo.branches.get(branch)}"
            listing = "".join(f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in sorted(tree.items()))
            sha = hashlib.sha1((parent + listing).encode()).hexdigest()
            repo.commits[sha], repo.branches[branch] = tree, sha
            repo.uploads |= {hashlib.sha256(d).hexdigest(): d for p, d in tree.items() if is_lfs(p, len(d), d)}
            return sha

    def _strike(self, fault: Fault | None) -> bool:
        """Whether the fault hits this time; counts down its `times`."""
        with self.lock:
            if fault is None or fault.times == 0:
                return False
            fault.times = fault.times and fault.times - 1
            return True


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass  # the tests read hub.requests

    def _serve(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.sender = self.headers.get("Authorization")
        origin = "hub" if self.server.server_port == urlsplit(hub.endpoint).port else "cdn"
        request = f"{self.command} {unquote(url.path)}"
        with hub.lock:
            hub.requests[self.command, unquote(url.path)] += 1
            hub.credentials[origin, self.sender] += 1
        try:
            for pattern, fault in hub._refusals:
                if pattern.search(request) and hub._strike(fault):
                    raise Refusal(fault.kind, message="refused by the test", **fault.headers)
            if origin == "hub" and self.sender not in (None, f"Bearer {hub.token}"):
                raise Refusal(401, message="Invalid credentials in Authorization header")
            for pattern, action in ROUTES:
                if route := re.fullmatch(pattern, f"{self.command} {url.path}"):
                    return action(self, *(unquote(group or "") for group in route.groups()))
            raise Refusal(404, message=f"this imitation of the Hub has no {request}")
        except Refusal as refusal:
            self._reply({"error": str(refusal)}, refusal.status, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _reply(self, body: object, status: int = 200, *, length: int | None = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        sent = {"Content-Type": kind, "Content-Length": str(len(data) if length is None else length), **headers}
        for name, value in {**sent, "Connection": "close"}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if self.sender is None and (write or (repo and repo.private)):
            # The Hub sends no code here: the client reads RepoNotFound into any bare 401, but only over https.
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repo

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo, sha = self._repo(repo_id), self.hub.resolve(repo_id, revision)
        if repo.gated:
            raise Refusal(403 if self.sender else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if path not in repo.commits[sha]:
            raise Refusal(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        data = repo.commits[sha][path]
        false = self.hub.metadata.get((repo_id, path), {})
        if not is_lfs(path, len(data), data):
            true = {"ETag": f'"{git_sha1(data)}"', "X-Repo-Commit": sha}
            return self._send_file(repo_id, path, data, **{k: v for k, v in {**true, **false}.items() if v})
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        location = f"{self.hub.cdn}/{quote(repo_id)}/cdn/{sha}/{quote(path)}"
        true = {"Location": location, "X-Repo-Commit": sha, **linked}
        self._reply(b"", 302, **{k: v for k, v in {**true, **false}.items() if v})

    def cdn(self, repo_id: str, sha: str, path: str) -> None:  # as signed urls do, it asks for no token
        data = self.hub.files(repo_id, sha)[path]
        self._send_file(repo_id, path, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    def _send_file(self, repo_id: str, path: str, data: bytes, **headers: str) -> None:
        start, stop, status = 0, len(data), 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop, status = int(span[1]), min(int(span[2]) + 1 if span[2] else stop, stop), 206
            if start >= len(data):
                raise Refusal(416, message="Range not satisfiable", Content_Range=f"bytes */{len(data)}")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        end = stop
        headers["Accept-Ranges"] = "bytes"
        fault = self.hub._faults.get((repo_id, path)) if self.command == "GET" else None
        kind = fault.kind if self.hub._strike(fault) else None
        if kind == "corrupt":
            data = bytearray(data)
            data[fault.at] ^= 0xFF
        elif kind == "page":
            page = b"<html><title>Sign in &amp; pay</title><body>" + b"x" * len(data)
            return self._reply(page, **{"Content-Type": "text/html"})
        elif kind == "long":
            return self._reply(data + data, **headers)
        elif kind == "drip":
            return self._drip(data[start:], fault.at, status, headers)
        elif kind:
            end = max(start, min(end, len(data) // 2 if fault.at is None else fault.at))
        body, promised = bytes(data[start:end]), None if kind in (None, "corrupt", "short") else stop - start
        if self.command == "GET":
            with self.hub.lock:
                self.hub.downloads[repo_id, path] += 1
                self.hub.sent[repo_id, path] += len(body)
        self._reply(body, status, length=promised, **headers)
        if kind == "stall":
            self.wfile.flush()
            self.hub.closing.wait(30)
        if kind == "reset":  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())

    def _drip(self, body: bytes, step: int, status: int, headers: Mapping[str, str]) -> None:
        self._reply(b"", status, length=len(body), **headers)
        with contextlib.suppress(OSError):  # the client has given up
            for i in range(0, len(body), step):
                self.wfile.write(body[i : i + step])
                time.sleep(0.1)

    def info(self, repo_id: str, revision: str) -> None:
        repo, sha = self._repo(repo_id), self.hub.resolve(repo_id, revision or "main")
        files = [describe(path, data) for path, data in sorted(repo.commits[sha].items())]
        details = [{**file, "blobId": file["oid"]} if self.query.get("blobs") else {} for file in files]
        siblings = [{"rfilename": file["path"], **more} for file, more in zip(files, details, strict=True)]
        about = {"author": repo_id.split("/")[0], "private": repo.private, "gated": repo.gated and "manual", "tags": []}
        self._reply({"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, **about})

    def tree(self, repo_id: str, revision: str) -> None:
        tree = self._repo(repo_id).commits[self.hub.resolve(repo_id, revision)]
        self._reply([describe(path, data) for path, data in sorted(tree.items())])  # files only, as if recursive

    def whoami(self) -> None:
        if self.sender is None:
            raise Refusal(401, message="Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._reply({"type": "user", "name": self.hub.user, "fullname": self.hub.user, "orgs": [], "auth": auth})

    def create(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        if self.sender is None:
            raise Refusal(401, message="Invalid username or password.")
        created = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repos:
                return self._reply({**created, "error": "You already created this model repo"}, 409)
            first = {".gitattributes": DEFAULT_GITATTRIBUTES}
            self.hub.add_repo(repo_id, first, private=request.get("private") or request.get("visibility") == "private")
        self._reply(created)

    def preupload(self, repo_id: str, revision: str) -> None:
        tree = self._repo(repo_id, write=True).commits[self.hub.resolve(repo_id, revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if old := file["path"] in tree and describe(file["path"], tree[file["path"]]):
                entry["oid"] = old.get("lfs", old)["oid"]
            files.append(entry)
        self._reply({"files": files})

    def lfs_batch(self, repo_id: str) -> None:
        repo, objects = self._repo(repo_id, write=True), json.loads(self.body)["objects"]
        for new in (item for item in objects if item["oid"] not in repo.uploads):
            verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"}
            new["actions"] = {
                "upload": {"href": f"{self.hub.cdn}/{repo_id}/lfs/{new['oid']}"},
                "verify": verify,
            }
        self._reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo_id: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, message="the uploaded bytes do not have the announced sha256")
        self.hub.repos[repo_id].uploads[oid] = self.body
        self._reply(b"")

    def lfs_verify(self, repo_id: str) -> None:
        repo, item = self._repo(repo_id, write=True), json.loads(self.body)
        if len(repo.uploads.get(item["oid"], b"")) != item["size"]:
            raise Refusal(404, message="LFS object not found")
        self._reply({})

    def commit(self, repo_id: str, branch: str) -> None:
        hub, repo = self.hub, self._repo(repo_id, write=True)
        if branch not in repo.branches or self.query.get("create_pr"):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch} (only branches take commits here)")
        lines = [json.loads(line) for line in self.body.splitlines()]
        with hub.lock:
            tree = hub.files(repo_id, branch)
            for key, value in ((line["key"], line["value"]) for line in lines):
                path = value.get("path", "")
                if key == "header" and value.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
                    raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
                if key == "file":
                    tree[path] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    if value["oid"] not in repo.uploads:
                        raise Refusal(400, message=f"LFS pointer of {path} points to no uploaded object")
                    tree[path] = repo.uploads[value["oid"]]
                elif key in ("deletedFile", "deletedFolder"):
                    doomed = [name for name in tree if name == path or name.startswith(path.rstrip("/") + "/")]
                    if not doomed:
                        raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                    for name in doomed:
                        del tree[name]
            sha = hub._record(repo_id, branch, tree)
        self._reply({"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}"})


_REPO, _ONE = "([^/]+/[^/]+)", "([^/]+)"
_API = f"/api/models/{_REPO}"
ROUTES = [
    (f"(?:GET|HEAD) /{_REPO}/resolve/{_ONE}/(.+)", _Handler.resolve),
    (f"(?:GET|HEAD) /{_REPO}/cdn/{_ONE}/(.+)", _Handler.cdn),
    (f"GET {_API}(?:/revision/{_ONE})?", _Handler.info),
    (f"GET {_API}/tree/{_ONE}", _Handler.tree),
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", lambda handler: handler._reply({"errors": [], "warnings": []})),
    (f"POST {_API}/preupload/{_ONE}", _Handler.preupload),
    (f"POST /{_REPO}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (f"POST /{_REPO}\\.git/info/lfs/verify", _Handler.lfs_verify),
    (f"PUT /{_REPO}/lfs/{_ONE}", _Handler.lfs_put),
    (f"POST {_API}/commit/{_ONE}", _Handler.commit),
]
