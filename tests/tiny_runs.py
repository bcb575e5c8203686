"""Tiny training runs: in this process, and in processes of their own that can be stopped and killed.

A process of its own is forked from a server that has imported everything, so that it starts quickly. It leads a process
group, as a shell's job does, so that a signal reaches its workers too, and a test sees whether any is left.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from passreid_models import cli
from passreid_models.pretrain.config import PretrainConfig
from passreid_models.synthetic import SyntheticPersons
from passreid_models.training.folder import RunFolder

LIMIT = 60  # seconds for a process
PRELOAD = ["jsonargparse", "timm", "torchvision", "yaml", "sklearn.cluster", "passreid_models.pretrain.run",
           "passreid_models.reid.unsupervised"]  # fmt: skip
TINY: dict[str, Any] = dict(
    model="test_pass_vit", size=(64, 32), num_prototypes=32, hidden_dim=16, bottleneck_dim=8, batch_size=4, epochs=3,
    lr=0.05, momentum=0.8, local_views=3, dtype="float32", device="cpu", workers=0, log_steps=1,
)  # fmt: skip

EPOCH_STEPS = 4  # of 16 images in batches of 4
STEPS = TINY["epochs"] * EPOCH_STEPS  # of the run that most tests compare with
LONG = {"epochs": 12, "save_epochs": 99}  # a run that is still training when it is stopped
LONG_STEPS = 12 * EPOCH_STEPS


def write_images(folder: Path, count: int = 16) -> Path:
    """Persons of 64x32 pixels, as PNG files."""
    folder.mkdir(parents=True)
    persons = SyntheticPersons(count, images_per_id=1, size=(64, 32))
    for i in range(count):
        persons[i][0].save(folder / f"{i:02}.png")
    return folder


def tiny(data: Path | str, out: Path, **options: Any) -> PretrainConfig:
    return PretrainConfig(**{**TINY, "data": str(data), "out": str(out), **options})


def flags(data: Path | str, out: Path, **options: Any) -> list[str]:
    """``tiny`` as words of a command line."""
    values = {**TINY, "out": out, **options}
    words = {k: "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in values.items()}
    return [str(data), *(f"--{k.replace('_', '-')}={v}" for k, v in words.items())]


# ---- Output of a run


def result(run: Path) -> dict[str, Tensor]:
    """All numbers of the last checkpoint and of the export, by name."""
    newest = RunFolder(run).load_latest()
    assert newest is not None
    names = ("step", "student", "teacher", "optimizer", "centers", "scaler")
    exported = safetensors.torch.load_file(run / "export" / "model.safetensors")
    return dict(flat("", {**{name: newest[1][name] for name in names}, "export": exported}))


def flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(f"{name}/{key}", inner)
    elif isinstance(value, list | tuple):
        yield from flat(name, dict(enumerate(value)))
    elif isinstance(value, int | float | Tensor):
        yield name, torch.as_tensor(value)


def assert_same_bits(run: Path, expected: dict[str, Tensor]) -> None:
    tensors = result(run)
    assert tensors.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(tensors[name], value)]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def saved_steps(run: Path) -> list[int]:
    return [int(p.stem.removeprefix("step_")) for p in RunFolder(run).checkpoints()]


def files(folder: Path) -> set[str]:
    """All files and folders below a folder, also hidden ones, without the lock."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} - {".run.lock"}


def one_sentence(output: str) -> str:
    """Message of passreid-train at the end of its output, which must have no traceback."""
    assert "Traceback" not in output
    assert "Error" not in output.replace("ImageError", "")
    messages = [line for line in output.splitlines() if line.startswith("passreid-train: ")]
    assert len(messages) == 1, output
    assert output.rstrip().endswith(messages[0])
    return messages[0]


# ---- Processes


class Child:
    """Function in a process of its own, which leads a process group."""

    def __init__(self, function: Callable[..., Any], *args: Any, folder: Path, **options: Any) -> None:
        """
        Args:
            function: Function of a module that returns the exit code.
            args: Its arguments.
            folder: Folder for its output.
            options: ``env``, variables to set; ``file_size``, limit of the size of a file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.printed = folder / f"printed_{len(list(folder.iterdir()))}.txt"
        self.printed.touch()
        multiprocessing.set_forkserver_preload(PRELOAD)
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_begin, args=(function, args, self.printed, options))
        self.process.start()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *args: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # before it had a group of its own
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def output(self) -> str:
        return self.printed.read_text()

    def wait(self) -> int:
        """The exit code; below 0 the signal that killed it."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, f"it hangs:\n{self.output}"
        return self.process.exitcode

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Return as soon as something has happened, at the latest when the process has ended."""
        end = time.monotonic() + LIMIT
        while not happened() and self.process.is_alive():
            assert time.monotonic() < end, f"it never happened:\n{self.output}"
            time.sleep(0.002)
        assert self.process.is_alive(), f"it ended too soon:\n{self.output}"

    def signal(self, signum: int) -> None:
        """Send a signal to its whole group, as a terminal and Slurm do."""
        os.killpg(self.process.pid, signum)

    def is_left(self) -> bool:
        """Whether a process of its group lives on."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def _begin(function: Callable[..., Any], args: tuple, printed: Path, options: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore Ctrl-C
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has all below it ignore the end of the terminal
    multiprocessing.set_start_method("fork", force=True)  # of the workers, as in a process of a shell
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({"OMP_NUM_THREADS": "1", **options.get("env", {})})
    torch.set_num_threads(1)
    if size := options.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    sys.exit(function(*args))


def run_cli(words: list[str]) -> int:
    """passreid-train; ``{rank}`` in a word is that of the process."""
    return cli.train([word.replace("{rank}", os.environ.get("RANK", "0")) for word in words])


def world(function: Callable[..., Any], *args: Any, folder: Path, size: int = 2) -> list[Child]:
    """Processes that find each other as those of torchrun do."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Child(function, *args, folder=folder / f"rank{i}", env={**env, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(size)
    ]
