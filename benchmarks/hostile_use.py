"""Hostile settings, options, outputs and servers."""

import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import mutations as m
from hostile import CLUSTER, FINETUNE, PRETRAIN, STOP, Base, Call, device, odd_file, put

from passreid_models.checkpoints import download, drive
from passreid_models.checkpoints.hub import download_hub
from tests.drive_server import DriveServer
from tests.hub_server import HubServer

RUNNING = ("!!python/object/apply:os.system ['touch {}']", "!!python/object/new:os.mkdir ['{}']",
           "!!python/object/apply:builtins.open ['{}', 'w']", "!!python/name:os.system", "!!binary AAAA",
           "!!timestamp 2001-12-14", "!!set {{a, b}}", "!!omap [a: 1]", "!!int x", "!!float '1e999'")  # fmt: skip


def settings(rng: Random, base: Base, work: Path) -> Call:
    """YAML of ``--config`` and ``--source-config``: tags, aliases, depth, other types, files that are none."""
    run = rng.choice(("run", "reid"))
    text = base.read(f"{run}/config.yaml").decode()
    file = work / "c.yaml"
    kind = rng.random()
    if kind < 0.35:
        lines = text.rstrip().split("\n")
        i = rng.randrange(len(lines))
        key = lines[i].partition(":")[0]
        tag = rng.choice(RUNNING).format(work / "EXECUTED")
        value = rng.choice((tag, json.dumps(rng.choice(m.VALUES)), "*a", "&a [*a]", "|\n  x", "? ", "{<<: *a}", "0o7",
                            "1_0", "1:30", "~", "yes", "[" * 300, "1" * 5000, "'" + "é" * 9))  # fmt: skip
        lines[i] = f"{key}: {value}"
        put(file, "\n".join(lines).encode("utf-8", "replace"))
    elif kind < 0.45:
        names = "abcdefghij"
        aliases = (f"{name}: &{name} [*{of},*{of}]\n" for of, name in pairwise(names))
        put(file, "a: &a [x,x]\n" + "".join(aliases))
    elif kind < 0.6:
        odd_file(rng, file)
    else:
        put(file, m.mutate_text(rng, text))
    out = ["--out", str(work / "out"), *STOP]
    source = ["--source", base.persons, "--source-config", str(file)]
    train = ["train", str(base.root / "images"), *PRETRAIN, "--config", str(file), *out]
    finetuning = ["finetune", base.persons, "--init", "random", *FINETUNE, "--config", str(file), *out]
    clustering = ["cluster", base.persons, "--init", "random", *CLUSTER]
    return rng.choice((train, finetuning, [*clustering, "--config", str(file), *out], [*clustering, *source, *out]))


OPTIONS = (
    "", " ", "0", "-1", "1.5", "nan", "inf", "-inf", "1e3", "9" * 30, "1e400", "0x10", "１２", "4\n", "a\nb", "x,y",
    "64", "[1,2]", "{}", "null", "true", "auto", "64x32", "0x0", "-16x32", "16x16x16", "9999999999x16", "é", "\x1b[31m",
    "1", "x" * 800, "zero", "..", "~", "-", "--", "=", "%s", "*", "\udcff", "cuda", "cuda:99", "cpu:7",
    "meta", "0.5", "mps", "hf-hub:", "local-dir:", "hf-hub:a/b@c@d", "synthetic:", "synthetic:ids=-1",
    "synthetic:ids=" + "9" * 30,
    "synthetic:ids=3,seed=x", "synthetic:size=1x1", "random", "none", "'", '"', "!!python/none", "&a", "*a", "[" * 500,
    "2147483647", "100000",
)  # fmt: skip
COSTLY = {"--ids", "--images", "--make-data"}  # of demo and synth: a large number is asked for, not hostile


def options(rng: Random, base: Base, work: Path) -> Call:
    """Values of options, each of any kind."""
    from passreid_models import cli

    out, value = str(work / "out"), rng.choice(OPTIONS)
    if value == "zero":
        device(rng, work / value)
    trainings = {
        "train": [str(base.root / "images"), *PRETRAIN],
        "finetune": [base.persons, "--init", "random", *FINETUNE],
        "cluster": [base.persons, "--init", "random", *CLUSTER],
    }
    if rng.random() < 0.5:
        from dataclasses import fields

        from passreid_models.pretrain.config import PretrainConfig
        from passreid_models.reid.config import ClusterConfig, FinetuneConfig

        name = rng.choice(sorted(trainings))
        config: Any = {"train": PretrainConfig, "finetune": FinetuneConfig, "cluster": ClusterConfig}[name]
        words = [name, *trainings[name], "--out", out]
        chosen = rng.choice([*sorted({f.name for f in fields(config)} - {"out"}), "config", "preset", "no_such"])
        words += [f"--{chosen}={value}"] if rng.random() < 0.8 else [f"--{chosen.replace('_', '-')}", value]
        return [*words, "--max-minutes=0.001"]
    parsers = cli._parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr,index]
    commands: dict[str, list[str]] = {
        "demo": ["--out", f"{out}.png", "--ids", "3", *base.model[:2]],
        "embed": [base.image, "-o", f"{out}.npz", *base.model],
        "eval": [base.persons, *base.model, "-q"],
        "parts": [base.image, "-o", f"{out}.png", *base.model],
        "gallery": [str(base.root / "images"), "-o", f"{out}.html", *base.model],
        "convert": [str(base.root / "new.pth"), out],
        "plot": [str(base.root / "run"), "--out", f"{out}.png"],
        "synth": ["--ids", "0", "--images", "2", "--out", out],
        "export": [str(base.export), f"{out}.onnx", "--size", "64x32", "--fusion", "no_such"],
    }
    name = rng.choice(sorted(commands))
    words = [name, *commands[name]]
    actions = [a for a in parsers[name]._actions if a.option_strings and "-h" not in a.option_strings]
    action = rng.choice(actions)
    if action.nargs == 0:
        words.append(action.option_strings[-1])
    elif not (COSTLY & set(action.option_strings) and value in ("2147483647", "100000")):
        words.append(f"{action.option_strings[-1]}={value}")
    if rng.random() < 0.3 and not words[1].startswith("-"):
        words[1] = value
    return words


def outputs(rng: Random, base: Base, work: Path) -> Call:
    """Outputs that cannot be written, or a disk that is full: an error that names them, and nothing left."""
    suffixes = ("", ".npz", ".csv", ".safetensors", ".png", ".json", ".html")
    target = work / rng.choice(("a/b/out.npz", *(f"out{suffix}" for suffix in suffixes)))
    kind = rng.randrange(5)
    if kind == 0:
        odd_file(rng, target)
    elif kind == 1:
        target = put(work / "file", b"x") / "out.npz"
    elif kind == 2:
        target = work / ("x" * 300 + ".npz")
    out = str(target)
    words = rng.choice(
        (
            ["embed", base.image, "-o", out, *base.model],
            ["eval", base.persons, *base.model, "-q", "--json", out],
            ["parts", base.image, "-o", out, *base.model],
            ["gallery", str(base.root / "images"), "-o", out, *base.model],
            ["convert", str(base.root / "new.pth"), out],
            ["plot", str(base.root / "run"), "--out", out],
            ["data", "check", base.persons, "--no-verify", "--json", out],
            ["train", str(base.root / "images"), "--out", out, *PRETRAIN, *STOP],
            ["finetune", base.persons, "--init", "random", "--out", out, *FINETUNE, "--cache-images=none", *STOP],
        )
    )
    if kind < 3:
        return words
    limit = rng.choice((0, 10, 1000, 20_000, 60_000))

    def on_a_full_disk() -> None:
        from passreid_models import cli

        before = set(work.rglob("*"))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log, err = (os.dup(fd) for fd in (1, 2))  # the log is a file too
        read, write = os.pipe()
        os.dup2(write, 1)
        os.dup2(write, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            code = cli.main(words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.dup2(log, 1)
            os.dup2(err, 2)
        os.set_blocking(read, False)
        text = os.read(read, 10**5).decode(errors="replace") if code else ""
        assert code in (0, 1, 2), f"exit code {code}"
        if code == 2:
            is_run = words[0] in ("train", "finetune")
            assert out in text or repr(target.suffix[1:]) in text, f"the message does not name {out}: {text}"
            left = {p for p in set(work.rglob("*")) - before if p.is_file() and not p.name.endswith(".lock")}
            left = {p for p in left if (work / "cache") not in p.parents}
            assert is_run or not left, f"{left} is left"

    return on_a_full_disk


FAULTS = ("drop", "reset", "short", "stall", "drip", "page", "long", "corrupt")
DRIVE = ("file", "confirm", "quota", "login", "cut", "cut-always", "whole-again", "busy", "denied", "loop", "reset",
         "page", "trickle", "other-part", "changed", "private", "wait", "wait-long", "nowhere", "missing")  # fmt: skip
ODD_HEADERS = ("", '""', "x", '"/tmp/x"', '"../../x"', "0" * 40, "0" * 64, "-1", "nan", str(2**50), "\x7f", 'W/"a"')


def network(rng: Random, base: Base, work: Path) -> Call:
    """A Hub and a Drive with faults: the right file, or an error, and no half file."""
    content = bytes(range(256)) * 40
    fault = rng.choice((*FAULTS, "status", "headers", "none"))
    times, at = rng.choice((None, 1, 2, 7)), rng.randrange(len(content))
    status = rng.choice((200, 204, 206, 301, 302, 303, 307, 400, 401, 403, 404, 408, 416, 418, 429, 500, 502, 503, 504))
    what = rng.choice(("HEAD", "GET", "cdn"))
    wait = rng.choice((None, "0", "3", "86400", "-1", "x", "Wed, 21 Oct 2999 07:28:00 GMT", "9" * 30))
    header = rng.choice(("X-Linked-ETag", "X-Linked-Size", "X-Repo-Commit", "ETag", "Location"))
    value = rng.choice(ODD_HEADERS)
    name = rng.choice(("model.safetensors", "config.json", "model.safetensors", *m.TEXTS))
    drive_kind = rng.choice(DRIVE)

    def hub() -> None:
        with HubServer() as server, _client(server):
            server.add_repo("org/name", {"model.safetensors": content, "config.json": b"{}"})
            if fault in ("drip", "page", "long"):
                server.spoil("org/name", "model.safetensors", fault, at=4000, times=times)
            elif fault == "corrupt":
                server.corrupt("org/name", "model.safetensors", at=at, times=times)
            elif fault in FAULTS:
                server.truncate("org/name", "model.safetensors", fault, at=at, times=times)
            elif fault == "status":
                headers = {"Retry_After": wait} if wait else {}
                server.refuse(status, what, times=times, **headers)
            elif fault == "headers":
                server.metadata["org/name", "model.safetensors"] = {header: value}
            outside = set(work.rglob("*"))
            try:
                file = download_hub("org/name", name, work / "hub")
            except (ValueError, OSError):
                left = {p for p in set(work.rglob("*")) - outside if p.is_file() and not p.name.endswith(".lock")}
                assert not left, f"{left} is left"
                raise
            finally:
                credentials = [sender for origin, sender in server.credentials if origin == "cdn"]
                assert credentials in ([], [None]), "a credential has followed a redirect"
            assert (work / "hub") in file.parents, "outside the cache"
            assert file.read_bytes() == (content if name == "model.safetensors" else b"{}"), "another file"

    def from_drive() -> None:
        file = work / "x.pth"
        with DriveServer(content, kind=drive_kind) as server:
            drive._ENDPOINT, before = server.endpoint, drive._ENDPOINT
            download.time = SimpleNamespace(sleep=lambda s: None, monotonic=time.monotonic, time=time.time)  # type: ignore[assignment]
            download.TIMEOUT = 1.0
            try:
                drive.download_drive("file", file)
            finally:
                drive._ENDPOINT = before
        assert file.read_bytes() == content, "another file"

    return hub if rng.random() < 0.75 else from_drive


@contextmanager
def _client(server: HubServer) -> Iterator[None]:
    """The Hub's client, in this process, asks a server on the loopback, and does not wait."""
    from huggingface_hub import constants, file_download

    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants.ENDPOINT = server.endpoint
    for module in (constants, file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            module.HUGGINGFACE_CO_URL_TEMPLATE = template
    constants.HF_HUB_OFFLINE = False
    del os.environ["HF_HUB_OFFLINE"]
    constants.HF_HUB_ETAG_TIMEOUT = 2
    os.environ["HF_TOKEN"] = server.token
    download.time = SimpleNamespace(sleep=lambda s: None, monotonic=time.monotonic, time=time.time)  # type: ignore[assignment]
    download.TIMEOUT = 1.0
    yield
