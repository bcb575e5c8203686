"""Hostile checkpoints, exported folders and runs."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mutations as m
import numpy as np
import safetensors.torch
import torch
from hostile import FINETUNE, PRETRAIN, STOP, Base, Call, copy, odd_file, put

from passreid_models import Embedder
from passreid_models.checkpoints.local_dir import read_config
from passreid_models.checkpoints.names import find_model
from passreid_models.checkpoints.read import read_checkpoint
from passreid_models.reid.model import ReIDModel
from passreid_models.training.folder import RunFolder
from tests.tiny_runs import flat


def assert_same(actual: Any, expected: Any) -> None:
    """Two nested structures hold the same tensors."""
    a, b = dict(flat("", actual)), dict(flat("", expected))
    assert a.keys() == b.keys(), "other tensors than were written"
    assert all(torch.equal(a[k], v) for k, v in b.items()), "other values than were written"


def assert_finite(out: Path) -> None:
    """Weights in a folder, and descriptors in a file of its name with ``.npz``, are finite, where there are any."""
    if (file := out / "model.safetensors").is_file():
        for name, x in safetensors.torch.load_file(file).items():
            assert x.isfinite().all(), f"{name} is not finite"
    if (file := out.with_suffix(".npz")).is_file():
        with np.load(file) as arrays:
            for name, x in arrays.items():
                assert x.dtype.kind != "f" or np.isfinite(x).all(), f"{name} is not finite"


def use_checkpoint(rng: Random, base: Base, file: Path) -> Call:
    """A command or a call that reads a checkpoint."""
    out = str(file.parent / "out")
    return rng.choice(
        (
            ["convert", str(file), out],
            ["convert", str(file), out, "--network", "student"],
            ["convert", str(file), out, "--num-heads", "2", "--neck", "multi"],
            ["embed", base.image, "-o", f"{out}.npz", "--model", str(file), "--device", "cpu"],
            ["train", str(base.root / "images"), "--out", out, "--init", str(file), *PRETRAIN, *STOP],
            ["finetune", base.persons, "--out", out, "--init", str(file), *FINETUNE, *STOP],
            ["weights", "pull", "pass_vit_small_patch16.lup", "--from", str(file)],
            partial(_descriptors, str(file), base.image),
            partial(ReIDModel.load, file),
            partial(RunFolder(file.parent).load, file),
        )
    )


def _descriptors(model: str, image: str) -> None:
    x = Embedder(model, "cpu", workers=1)([image])
    assert x.isfinite().all(), "descriptors that are not finite"
    assert x.abs().max() > 0, "descriptors of zeros"


def pickles(rng: Random, base: Base, work: Path) -> Call:
    """Pickles that would run code, alone, in an old and in a new file of torch."""
    content = m.running_pickle(rng, work / "EXECUTED")
    wrapping = rng.randrange(3)
    if wrapping == 1:
        content = m.rewrite_zip(base.read("new.pth"), {"/data.pkl": content})
    elif wrapping == 2:
        old = base.read("old.pth")
        at = rng.choice((0, old.find(b"}q")))
        content = old[:at] + content + old[at:]
    return use_checkpoint(rng, base, put(work / f"x{rng.choice(('.pth', '.pth', '.pt', '.pth.tar', ''))}", content))


def zips(rng: Random, base: Base, work: Path) -> Call:
    """Zip files of torch, damaged anywhere: the same tensors, or an error."""
    content = base.read("new.pth")
    if rng.random() < 0.4:
        file = put(work / "x.pth", m.mutate_bytes(rng, content))
        return lambda: assert_same(read_checkpoint(file), base.state)
    return use_checkpoint(rng, base, put(work / "x.pth", m.mutate_zip(rng, content)))


def old_files(rng: Random, base: Base, work: Path) -> Call:
    """Files of torch before 1.6: pickles one after the other, then storages, with their sizes."""
    content = base.read("old.pth")
    content = m.mutate_bytes(rng, content) if rng.random() < 0.4 else _mutate_old(rng, content)
    return use_checkpoint(rng, base, put(work / "x.pth", content))


def _mutate_old(rng: Random, content: bytes) -> bytes:
    end = content.find(b".PK") if b".PK" in content else 20_000
    return m.mutate_pickle(rng, content[:end]) + content[end:]


def safetensors_files(rng: Random, base: Base, work: Path) -> Call:
    """Safetensors files: lying headers, sizes and types."""
    file = put(work / "x.safetensors", m.mutate_safetensors(rng, base.read("export/model.safetensors")))
    return use_checkpoint(rng, base, file)


def state_dicts(rng: Random, base: Base, work: Path) -> Call:
    """Tensors of other types, layouts, ranks, sizes and names, in every wrapping."""
    state: Any = m.mutate_state(rng, base.state)
    wrappings: list[Callable[[Any], Any]] = [
        lambda s: s, lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {"model": s}, lambda s: [s],
        lambda s: {"teacher": s, "student": s, "args": None}, lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"base.{k}": v for k, v in s.items()}, lambda s: {"teacher": {"state_dict": s}},
        lambda s: {"config": rng.choice(m.VALUES), "step": rng.choice(m.VALUES), "student": s, "teacher": s},
    ]  # fmt: skip
    file = work / "x.pth"
    try:
        torch.save(rng.choice(wrappings)(state), file, _use_new_zipfile_serialization=rng.random() < 0.7)
    except (RuntimeError, NotImplementedError, ValueError):  # torch cannot write it
        torch.save({}, file)
    if file.stat().st_size > 10**8:
        torch.save({}, file)
    return use_checkpoint(rng, base, file)


def model_folders(rng: Random, base: Base, work: Path) -> Call:
    """Exported folders: ``config.json`` with other values, files that lack or are others."""
    config = json.loads(base.read("reid/export/config.json" if rng.random() < 0.5 else "export/config.json"))
    source = rng.choice(("export", "reid/export"))
    changed: dict[str, bytes | None] = {}
    if rng.random() < 0.8:
        changed["config.json"] = m.mutate_json(rng, config)
    else:
        name = rng.choice(("model.safetensors", "extras.safetensors"))
        original = base.read("reid/export/extras.safetensors" if "extras" in name else f"{source}/{name}")
        changed[name] = rng.choice((None, m.mutate_safetensors(rng, original)))
    folder = copy(base, source, work / "folder", changed)
    if rng.random() < 0.08:
        odd_file(rng, folder / rng.choice(("config.json", "model.safetensors", "extras.safetensors")))
    name, out = str(folder), str(work / "out")
    return rng.choice(
        (
            ["embed", base.image, "-o", f"{out}.csv", "--model", name, "--device", "cpu"],
            ["embed", base.image, "-o", f"{out}.npz", "--model", f"local-dir:{name}", "--device", "cpu", "--parts"],
            ["eval", base.persons, "--model", name, "--device", "cpu", "--no-cache", "-q"],
            ["train", str(base.root / "images"), "--out", out, "--init", name, *PRETRAIN, *STOP],
            ["finetune", base.persons, "--out", out, "--init", name, *FINETUNE, *STOP],
            ["weights", "publish", name, "org/name", "--dry-run"],
            ["parts", base.image, "-o", f"{out}.png", "--model", name, "--device", "cpu"],
            ["gallery", str(base.root / "images"), "-o", f"{out}.html", "--model", name, "--device", "cpu"],
            partial(_descriptors, name, base.image),
            partial(ReIDModel.load, folder),
            partial(read_config, folder),
            lambda: find_model(name).create(),
        )
    )


def runs(rng: Random, base: Base, work: Path) -> Call:
    """Checkpoints, settings and exports of training: resumed as they were written, or an error."""
    name = rng.choice(("run", "reid"))
    file = next((base.root / name / "checkpoints").glob("step_*.pt"))
    key, original = f"checkpoints/{file.name}", file.read_bytes()
    kind = rng.random()
    if kind < 0.3:
        changed = m.mutate_bytes(rng, original)
        folder = copy(base, name, work / "run", {key: changed})
        state_keys = ("student", "teacher") if name == "run" else ("model",)

        def load() -> None:
            newest = RunFolder(folder, state_keys=state_keys).load_latest()
            assert newest is not None
            assert_same(newest[1], read_checkpoint(file))

        return load
    if kind < 0.6:
        content = m.mutate_zip(rng, original)
    else:
        state = torch.load(file, weights_only=True)
        entry = rng.choice(sorted(state))
        if isinstance(state[entry], dict) and rng.random() < 0.8:
            tensors = {k: v for k, v in state[entry].items() if isinstance(v, torch.Tensor)}
            mutated = m.mutate_state(rng, tensors) if tensors else m.mutate_value(rng, state[entry])
            state[entry] = {**state[entry], **mutated} if tensors else mutated
        elif isinstance(state[entry], torch.Tensor):
            state[entry] = m.mutate_tensor(rng, state[entry])
        else:
            state[entry] = m.mutate_value(rng, state[entry])
        out = io.BytesIO()
        try:
            torch.save(state, out)
        except (RuntimeError, NotImplementedError, ValueError):
            torch.save({}, out)
        content = out.getvalue() if out.tell() < 10**8 else original[:100]
    folder = copy(base, name, work / "run", {key: content})
    if rng.random() < 0.1:
        odd_file(rng, folder / rng.choice((key, "metrics.jsonl", "log.txt", "config.yaml", ".run.lock", "export")))
    stop = ["--out", str(folder), "--resume", rng.choice(("auto", str(folder / key))), *STOP]
    image = [base.image, "-o", str(work / "out.npz"), "--device", "cpu"]
    config = ["--config", str(folder / "config.yaml")]
    resumed = (["train", str(base.root / "images"), *config, *stop, "-q", "--epochs", "1"] if name == "run"
               else ["finetune", base.persons, *config, *stop, "-q", "--epochs", "1"])  # fmt: skip
    return rng.choice((resumed, resumed, ["embed", *image, "--model", str(folder / key)],
                       ["train", str(base.root / "images"), "--init", str(folder), *PRETRAIN, "--out",
                        str(work / "out"), *STOP]))  # fmt: skip
