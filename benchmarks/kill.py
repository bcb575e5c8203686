"""Faults in pre-training, fine-tuning, clustering and domain adaptation: kills, signals, disks, files, data, clocks.

    python benchmarks/kill.py

A case is a fault and what follows it: final weights that are bit for bit those of an uninterrupted run, with each row
of ``metrics.jsonl`` once, or one sentence with the documented exit code, after which the resumed run has those weights.

cases, failures    faults, and those with another outcome
kills              number of kills (kill -9) at random moments
lost               failures in which weights, rows or checkpoints differ, or files are left
hangs, tracebacks  failures in which a process does not end, or ends with a stack trace
identical          1 if nothing is lost, else 0
lost_steps         largest number of steps that had to be repeated after a kill
skipped            kinds of cases that this machine cannot run: full and read-only disks are mounted

On a CPU, with small models that save ten times a second and a loader process. The exit status is 1 if any case
failed or none ran.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # the tiny runs of the tests

import common
import safetensors.torch
import torch
from torch import Tensor

from passreid_models import cli
from passreid_models.checkpoints.read import CheckpointError
from passreid_models.data.loader import SIGNALS
from passreid_models.reid import supervised, unsupervised  # noqa: F401  (imported before the processes are forked)
from passreid_models.runtime import num_cores
from passreid_models.synthetic import SyntheticPersons
from passreid_models.training.folder import RunFolder
from tests.tiny_runs import flat

LIMIT = 180  # seconds after which a process hangs, on a machine that does nothing else
SIZE, LONG = (64, 32), 2  # a run that is killed often has so many times the epochs
SAVING = dict(size="64x32", device="cpu", dtype="float32", log_steps=1, save_minutes=1 / 600, resume="auto")
RUN = dict(SAVING, model="test_pass_vit", workers=1, save_epochs=10**6)
REID = dict(RUN, init="random", fusion="cat", pad=2, lr=0.01, eval_epochs=2)
CLUSTER = dict(REID, steps=6, clusters_per_batch=2, images_per_cluster=4, k1=6, k2=3, min_samples=2, eps=0.7)
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("train", dict(RUN, num_prototypes=256, hidden_dim=64, bottleneck_dim=16, batch_size=8, epochs=6)),
    "finetune": ("finetune", dict(REID, ids_per_batch=2, images_per_id=3, warmup_epochs=1, epochs=6)),
    "cluster": ("cluster", dict(CLUSTER, epochs=6)),
    "adapt": ("cluster", dict(CLUSTER, epochs=3)),
}
SOURCE = dict(epochs=3, warmup_epochs=0, ids_per_batch=2, images_per_id=3, eval_epochs=0, dtype="float32", lr=0.01)
MEASURED = ("images_per_s", "wait_share")  # of a row: no two runs are equally fast


class Failed(Exception):
    """Outcome of a case that is not the documented one; ``kind`` is lost, hangs, tracebacks or unclear."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# ---- Processes


class Child:
    """Function in a forked process that leads a process group, as a job of a shell does."""

    def __init__(self, function: Callable[..., int], args: tuple, printed: Path) -> None:
        self.printed = printed
        printed.touch()
        self.process = multiprocessing.get_context("fork").Process(target=_begin, args=(function, args, printed))
        self.process.start()
        with contextlib.suppress(OSError):  # here too: whichever comes first
            os.setpgid(self.process.pid, self.process.pid)

    @property
    def output(self) -> str:
        return self.printed.read_text(encoding="utf-8", errors="replace")

    def wait(self) -> int:
        self.process.join(limit())
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            raise Failed("hangs", f"it hangs: {self.output[-300:]}")
        return self.process.exitcode

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened; return False if the process ended before."""
        end = time.monotonic() + limit()
        while not happened():
            if not self.process.is_alive():
                return False
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise Failed("hangs", f"nothing happens: {self.output[-300:]}")
            time.sleep(0.004)
        return True

    def reach(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened, which is before the process ends."""
        if not self.until(happened):
            raise Failed("unclear", f"it ended: {self.output[-600:]}")

    def signal(self, signum: int, group: bool = True) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, signum)

    def sentence(self, *codes: int) -> str:
        """Wait for the end; return the one sentence with which the program explained it."""
        code, output = self.wait(), self.output
        if "Traceback" in output:
            raise Failed("tracebacks", output[-600:])
        lines = [line for line in output.splitlines() if re.match("passreid[a-z -]*: ", line)]
        if code not in codes or len(lines) != 1:
            raise Failed("unclear", f"exit code {code}, expected {codes}: {output[-400:]}")
        return lines[0]

    def check_nothing_left(self) -> None:
        """Wait until no process of the group is left: a worker looks for its parent every 5 seconds."""
        end = time.monotonic() + limit() / 6
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)
            self.signal(signal.SIGKILL)
            raise Failed("hangs", "processes are left")

    def workers(self) -> list[int]:
        """Processes that load images."""
        return children(self.process.pid)


def _begin(function: Callable[..., int], args: tuple, printed: Path) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for signum in SIGNALS:  # nohup and a job in the background ignore some
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(function(*args))


def limit() -> float:
    return LIMIT * max(1, os.getloadavg()[0] / num_cores())


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def run_cli(words: list[str]) -> int:
    return cli.main(words)


def run_rank(words: list[str], rank: int, port: int) -> int:
    """One of two processes that find each other as those of torchrun do."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return cli.main(words)


def run_elastic(words: list[str]) -> int:
    """torchrun with two processes, which it starts again when one fails."""
    from torch.distributed.run import main

    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    options = ["--nproc-per-node=2", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    main([*options, "-m", "passreid_models", *words])
    return 0


def run_with_clock_set_back(words: list[str]) -> int:
    """Run while the clock goes back by a day every second."""
    begin, real, real_ns = time.monotonic(), time.time, time.time_ns

    def days() -> int:
        return int(time.monotonic() - begin)

    time.time = lambda: real() - 86400 * days()
    time.time_ns = lambda: real_ns() - 86400 * 10**9 * days()
    return cli.main(words)


# ---- Runs


@dataclass
class Lab:
    """Where a case works, and what it may use."""

    home: Path
    case: str
    task: str
    seed: int
    epochs: int = 1  # times those of TASKS
    processes: int = 1  # of the run to compare with
    num_kills: int = 0
    counts: Counter = field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # kind, case, message
    lost_steps: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed} {self.case} {self.task}")
        self.folder = self.home / f"{self.case.replace(' ', '_')}-{self.task}"
        self.data = self.home / ("images" if self.task == "pretrain" else "persons")
        self.number = 0
        self.children: list[Child] = []
        self.new_run()

    def new_run(self) -> None:
        self.number += 1
        self.out = self.folder / f"run{self.number}"

    @property
    def reference(self) -> Path:
        """An uninterrupted run."""
        return self.home / f"whole-{self.task}-{self.epochs}-{self.processes}"

    def words(self, **options: Any) -> list[str]:
        command, settings = TASKS[self.task]
        settings = {**settings, "out": self.out, **options}
        settings["epochs"] *= self.epochs
        if self.task == "adapt":
            settings |= {"source": self.home / "source", "source_config": self.home / f"source{self.epochs}.yaml"}
        return [command, str(self.data), *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items())]

    def start(self, function: Callable[..., int] = run_cli, *args: Any, **options: Any) -> Child:
        self.folder.mkdir(exist_ok=True)
        printed = self.folder / f"printed{len(self.children)}.txt"
        self.children.append(Child(function, (self.words(**options), *args), printed))
        return self.children[-1]

    def start_ranks(self) -> list[Child]:
        import socket

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        return [self.start(run_rank, rank, port) for rank in range(2)]

    def folders(self, out: Path | None = None) -> list[RunFolder]:
        """Folders of the run; domain adaptation has two."""
        out, names = out or self.out, ["source", ""] if self.task == "adapt" else [""]
        return [RunFolder(out / name, state_keys=()) for name in names]

    def rows(self, out: Path | None = None) -> int:
        files = [folder.metrics_file for folder in self.folders(out)]
        return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())

    def part_done(self, share: float) -> Callable[[], bool]:
        """Whether this share of the rows is written, and a checkpoint."""
        rows = share * self.rows(self.reference)
        return lambda: self.rows() >= rows and any(folder.latest() for folder in self.folders())

    def begin(self, share: float = 0.5) -> None:
        """Make a run that was killed when a share of it was done."""
        child = self.start()
        child.reach(self.part_done(share))
        child.signal(signal.SIGKILL)
        child.wait()

    def newest(self) -> RunFolder:
        """Folder of the run that was last saved."""
        return next(folder for folder in reversed(self.folders()) if folder.latest())

    def finish(self) -> None:
        """Resume the run to its end and compare it with the uninterrupted one."""
        child = self.start()
        if code := child.wait():
            output = child.output
            raise Failed("tracebacks" if "Traceback" in output else "unclear", f"exit code {code}: {output[-600:]}")
        self.compare()

    def compare(self) -> None:
        for folder, whole in zip(self.folders(), self.folders(self.reference), strict=True):
            expected, actual = tensors(whole), tensors(folder)
            differing = [name for name, value in expected.items() if not same(value, actual.get(name))]
            if differing or actual.keys() != expected.keys():
                raise Failed("lost", f"{len(differing)} of {len(expected)} tensors differ, such as {differing[:1]}")
            if records(folder) != records(whole):
                steps = [[row.get("step") for row in records(f)] for f in (folder, whole)]
                raise Failed("lost", f"rows of metrics.jsonl: {steps[0]}, expected {steps[1]}")
        if hidden := [p.name for p in self.out.rglob(".*") if p.name != ".run.lock"]:
            raise Failed("lost", f"files are left: {hidden}")

    def check_checkpoints(self, before: dict[Path, Path]) -> dict[Path, Path]:
        """Check that the newest checkpoint can be read and is no older than the one before; return the newest."""
        newest = {}
        for folder in self.folders():
            try:
                loaded = folder.load_latest()
            except CheckpointError as e:
                raise Failed("lost", str(e)) from None
            if loaded and loaded[0] != folder.latest():
                raise Failed("lost", f"{folder.latest()} cannot be read")
            old = before.get(folder.path)
            if old and (loaded is None or loaded[0].name < old.name):
                raise Failed("lost", f"{old} is gone")
            if loaded:
                newest[folder.path] = loaded[0]
                rows = [row["step"] for row in records(folder) if "loss" in row]
                lost = max(rows, default=0) - int(loaded[0].stem.removeprefix("step_"))
                self.lost_steps = max(self.lost_steps, lost)
        return newest

    @contextlib.contextmanager
    def counted(self, cases: int = 1) -> Iterator[None]:
        """Count cases, and a failure if one is raised."""
        self.counts[self.case] += cases
        try:
            yield
        except Failed as e:
            self.failures.append((e.kind, self.case, f"{self.case}, {self.task}: {e}"))
        except Exception:
            self.failures.append(("unclear", self.case, f"{self.case}, {self.task}: {traceback.format_exc()[-900:]}"))
        finally:
            for child in self.children:
                if child.process.is_alive():
                    child.signal(signal.SIGKILL)


def tensors(folder: RunFolder) -> dict[str, Tensor]:
    """Numbers of the last checkpoint and of the exports, by name."""
    newest = folder.load_latest()
    if newest is None:
        raise Failed("lost", f"{folder.path} has no checkpoint")
    exports = {
        name: safetensors.torch.load_file(file)
        for name in ("export", "best")
        if (file := folder.path / name / "model.safetensors").is_file()
    }
    return dict(flat("", {**{k: v for k, v in newest[1].items() if k != "config"}, **exports}))


def same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)


def records(folder: RunFolder) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` without what was measured; a last one that a kill cut short is left out."""
    text = folder.metrics_file.read_bytes() if folder.metrics_file.is_file() else b""
    rows = [json.loads(line) for line in text.split(b"\n")[:-1]]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


# ---- Cases


def whole(lab: Lab) -> None:
    """Make the uninterrupted run that the others are compared with."""
    lab.out = lab.reference
    ended = lab.start_ranks() if lab.processes == 2 else [lab.start()]
    for child in ended:
        if child.wait():
            raise Failed("unclear", child.output[-2000:])


def kills(lab: Lab) -> None:
    """kill -9 at random moments, of the process alone or of its workers too."""
    total, count, done, newest = lab.rows(lab.reference), lab.num_kills, 0, {}
    while done < count:
        with lab.counted(0):
            child = lab.start()
            at_start = lab.rng.random() < 0.2  # before the first step, or while it reads a checkpoint
            share = (done % 13 + lab.rng.random()) / (min(count, 13) + 1)
            ended = not child.until(lambda rows=0 if at_start else share * total: lab.rows() >= rows)
            child.process.join(lab.rng.uniform(0, 1.5 if at_start else 0.3))
            if ended or child.process.exitcode is not None:
                if child.wait():
                    raise Failed("unclear", child.output[-600:])
                lab.compare()
                lab.new_run()
                newest = {}
                continue
            child.signal(signal.SIGKILL, group=lab.rng.random() < 0.5)
            child.wait()
            done += 1
            with lab.counted():
                newest = lab.check_checkpoints(newest)
        if lab.failures:
            return
    with lab.counted(0):
        lab.finish()
        for child in lab.children:
            child.check_nothing_left()


def signals(lab: Lab) -> None:
    """Signals to the whole group, as a terminal and Slurm send them; each saves."""
    for i, signum in enumerate(SIGNALS):
        with lab.counted():
            child, before = lab.start(), lab.rows()
            due = lab.part_done((i + 0.5 + lab.rng.random() / 2) / (len(SIGNALS) + 1))
            child.reach(lambda before=before, due=due: lab.rows() > before + 1 and due())
            child.signal(signum)
            sentence = child.sentence(128 + signum)
            newest = lab.newest()
            saved = int(newest.latest().stem.removeprefix("step_"))
            if f"stopped at step {saved} of" not in sentence or max(r["step"] for r in records(newest)) != saved:
                raise Failed("lost", f"step {saved} is saved: {sentence}")
            child.check_nothing_left()
    with lab.counted(0):
        lab.finish()


def worker(lab: Lab) -> None:
    """A process that loads images dies."""
    with lab.counted():
        child = lab.start(workers=2)
        child.reach(lambda: lab.part_done(0.4)() and len(child.workers()) == 2)
        os.kill(child.workers()[0], signal.SIGKILL)
        if "a process that loads images died" not in (sentence := child.sentence(1)):
            raise Failed("unclear", sentence)
        child.check_nothing_left()
        lab.finish()


def rank(lab: Lab) -> None:
    """A process of torchrun dies; torchrun starts both again, which resume."""
    with lab.counted():
        child = lab.start(run_elastic)
        child.reach(lab.part_done(0.4))
        os.kill(lab.rng.choice(child.workers()), signal.SIGKILL)
        code, output = child.wait(), child.output
        if code:
            raise Failed("unclear", f"exit code {code}: {output[-9000:]}")
        if re.search(r"Traceback.*\n(?!.*resource_sharer)", output):  # Python's own, in a worker of the killed process
            raise Failed("tracebacks", output[-1500:])
        lab.compare()


def together(lab: Lab) -> None:
    """Two and four processes begin at once in one folder: one trains, the others are refused."""
    for count in (2, 4):
        with lab.counted():
            lab.new_run()
            started = [lab.start() for _ in range(count)]
            codes = sorted(child.wait() for child in started)
            if codes != [0] + [2] * (count - 1):
                raise Failed("unclear", f"exit codes {codes}")
            for child in started:
                if child.process.exitcode and "another process" not in (sentence := child.sentence(2)):
                    raise Failed("unclear", sentence)
            lab.compare()


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """Mount a file system of so many bytes; yield a function to mount it again with other options."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    subprocess.run(command, check=True, capture_output=True, text=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def why_not_mounted(home: Path) -> str:
    """Why this process cannot mount a file system; empty if it can."""
    try:
        with disk(home / "disk", 4096):
            return ""
    except subprocess.CalledProcessError as e:
        return (e.stderr or str(e)).partition("\n")[0]
    except OSError as e:  # no such program
        return str(e)


def full_disk(lab: Lab) -> None:
    """The disk is full, at first for anything, then for the checkpoints; then there is room."""
    needed = sum(p.stat().st_size for p in lab.reference.rglob("*") if p.is_file())
    with disk(lab.folder / "disk", 4096) as remount:
        lab.out = lab.folder / "disk" / "run"
        newest: dict[Path, Path] = {}
        for share in (0, 0.02, 0.1, 0.25 + lab.rng.random() / 4, 0.6 + lab.rng.random() / 4):
            with lab.counted():
                remount(f"size={max(8192, int(share * needed))}")
                child = lab.start()
                if child.wait() == 0 and share > 0.5:  # it was enough: fewer checkpoints are there at once
                    continue
                if str(lab.out) not in (sentence := child.sentence(2)):
                    raise Failed("unclear", sentence)
                if left := [p.name for p in lab.out.rglob(".*") if p.name != ".run.lock"]:
                    raise Failed("lost", f"files are left: {left}")
                newest = lab.check_checkpoints(newest)
        with lab.counted(0):
            remount(f"size={20 * needed}")
            lab.finish()


def read_only(lab: Lab) -> None:
    """The disk is read-only, before the run begins and before it goes on."""
    with disk(lab.folder / "disk", 2**28) as remount:
        lab.out = lab.folder / "disk" / "run"
        for share in (0, 0.4):
            with lab.counted():
                if share:
                    lab.begin(share)
                for child in lab.children:
                    child.check_nothing_left()
                before = contents(lab.out)
                remount("ro")
                sentence = lab.start().sentence(2)
                if str(lab.out) not in sentence:
                    raise Failed("unclear", sentence)
                if contents(lab.out) != before:
                    raise Failed("lost", "files differ")
                remount("rw")
        with lab.counted(0):
            lab.finish()


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flipped(lab: Lab) -> None:
    """A byte of the newest checkpoint is flipped."""
    for share in (0.3, 0.5, 0.7):
        with lab.counted():
            lab.begin(share)
            file = lab.newest().latest()
            content = bytearray(file.read_bytes())
            content[lab.rng.randrange(len(content))] ^= 1 << lab.rng.randrange(8)
            file.write_bytes(content)
    with lab.counted(0):
        lab.finish()


def foreign_rows(lab: Lab) -> None:
    """``metrics.jsonl`` has lines of others."""
    lines = [b"note", b"[1]", b"\xff\xfe\x00", b'{"step": "3"}', b'{"step": 1e999}', b"[" * 10**5, b"", b'{"step": 7,']
    with lab.counted():
        lab.begin()
        file = lab.newest().metrics_file
        rows = file.read_bytes().split(b"\n")
        for line in lines:
            rows.insert(lab.rng.randrange(len(rows)), line)
        file.write_bytes(b"\n".join(rows))
        lab.finish()


def changed_data(lab: Lab) -> None:
    """Images come and go between two starts, and while the run goes on."""
    lab.folder.mkdir()
    lab.data = Path(shutil.copytree(lab.data, lab.folder / lab.data.name))  # its name is part of the run's description
    aside = lab.folder / "aside"
    aside.mkdir()
    lab.begin(0.6)
    images = sorted(p for p in lab.data.rglob("*.*g") if "query" not in str(p) and "test" not in str(p))
    extra = images[0].with_name("9" + images[0].name[1:])
    for change in ("more", "fewer", "renamed"):
        with lab.counted():
            if change == "more":
                shutil.copy(images[0], extra)
            else:
                images[0].rename(extra if change == "renamed" else aside / images[0].name)
            if "the run to resume has" not in (sentence := lab.start().sentence(2)):
                raise Failed("unclear", sentence)
            if change == "more":
                extra.unlink()
            else:
                (extra if change == "renamed" else aside / images[0].name).rename(images[0])
    with lab.counted():
        child = lab.start(workers=0, **({} if lab.task == "pretrain" else {"cache_images": "none"}))
        child.reach(lab.part_done(0.75))
        for image in images:
            image.rename(aside / image.name)
        if str(lab.out) not in (sentence := child.sentence(2)) and str(lab.data) not in sentence:
            raise Failed("unclear", sentence)
        for image in images:
            (aside / image.name).rename(image)
        lab.finish()


def deleted(lab: Lab) -> None:
    """The folder of the run is deleted or moved while it goes on."""
    for how in ("deleted", "moved"):
        with lab.counted():
            lab.new_run()
            child = lab.start()
            child.reach(lab.part_done(0.5))
            moved = lab.out.with_name("moved")
            lab.out.rename(moved)
            if how == "deleted":
                shutil.rmtree(moved)
            if str(lab.out) not in (sentence := child.sentence(2)):
                raise Failed("unclear", sentence)
            child.check_nothing_left()
            if any(folder.latest() for folder in lab.folders()):
                raise Failed("lost", "it was made again, without what was in it")
            shutil.rmtree(lab.out, ignore_errors=True)
            if how == "moved":
                moved.rename(lab.out)
            lab.finish()


def clock(lab: Lab) -> None:
    """The clock goes back: while the run goes on, and before it is resumed."""
    with lab.counted():
        child = lab.start(run_with_clock_set_back)
        child.reach(lab.part_done(0.5))
        child.signal(signal.SIGKILL)
        child.wait()
        for path in lab.out.rglob("*"):
            os.utime(path, (time.time() + 86400,) * 2)
        if lab.start(run_with_clock_set_back).wait():
            raise Failed("unclear", lab.children[-1].output[-600:])
        lab.compare()


CASES: dict[str, Callable[[Lab], None]] = {
    "signals": signals,
    "a loader process dies": worker,
    "a process of torchrun dies": rank,
    "several processes in one folder": together,
    "full disk": full_disk,
    "read-only disk": read_only,
    "a flipped byte": flipped,
    "foreign rows": foreign_rows,
    "changed data": changed_data,
    "folder deleted or moved": deleted,
    "clock set back": clock,
}
QUICK = {"pretrain": list(CASES)[4:], "cluster": ["signals", "a loader process dies", "foreign rows"]}
KILLS, WHOLE = "kill -9", "uninterrupted"
MOUNTING = ("full disk", "read-only disk")


def work(lab: Lab) -> Lab:
    """Run a case, in a process of its own."""
    torch.set_num_threads(1)
    with lab.counted(0):
        {**CASES, KILLS: kills, WHOLE: whole}[lab.case](lab)
    lab.children = []
    if lab.case != WHOLE:
        shutil.rmtree(lab.folder, ignore_errors=True)
    return lab


def write_data(home: Path) -> None:
    (home / "images").mkdir()
    persons = SyntheticPersons(48, images_per_id=1, size=SIZE)
    common.write_images(home / "images", (persons[i][0] for i in range(48)), ".png")
    for name, seed in (("persons", 0), ("source", 1)):
        SyntheticPersons(10, 6, 3, size=SIZE, seed=seed).write_market1501(home / name, train_ids=6)
    for times in (1, LONG):
        settings = {**SOURCE, "epochs": SOURCE["epochs"] * times}
        (home / f"source{times}.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="number of kills over all trainings (default: 50; 4 with --quick)")
    parser.add_argument("--quick", action="store_true", help="two of the trainings and some of the cases")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--case", action="append", help="only cases with this text, such as pretrain: clock")
    parser.add_argument("--folder", help="where to write the runs; default: the system's temporary folder")
    args = parser.parse_args()
    num_kills = args.kills if args.kills is not None else 4 if args.quick else 50
    cases = QUICK if args.quick else {task: list(CASES) for task in TASKS}
    for text in args.case or ():
        if not any(text in f"{task}: {name}" for task, names in cases.items() for name in names):
            parser.error(f"no case has {text!r}")
    if args.case:
        cases = {
            task: [n for n in names if any(c in f"{task}: {n}" for c in args.case)] for task, names in cases.items()
        }
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder, ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        os.environ["PASSREID_CACHE"] = str(home / "cache")
        write_data(home)
        reason = why_not_mounted(home)
        skipped = {n: reason for n in MOUNTING if reason and any(n in names for names in cases.values())}
        shares = {task: len(range(i, num_kills, len(cases))) for i, task in enumerate(cases)}
        labs = [Lab(home, KILLS, task, args.seed, LONG, num_kills=n) for task, n in shares.items() if n]
        labs += [
            Lab(home, name, task, args.seed, processes=2 if CASES[name] is rank else 1)
            for task, names in cases.items()
            for name in names
            if name not in skipped
        ]
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
            wholes = {(lab.task, lab.epochs, lab.processes) for lab in labs}
            references = [Lab(home, WHOLE, t, args.seed, epochs, p) for t, epochs, p in sorted(wholes)]
            for lab in pool.map(work, references):
                if lab.failures:
                    raise SystemExit(lab.failures[0][2])
            done = []
            for ended in as_completed([pool.submit(work, lab) for lab in labs]):
                done.append(lab := ended.result())
                print(f"{lab.task}: {lab.case}: {lab.counts.total()} cases", file=sys.stderr, flush=True)
                for _, _, message in lab.failures:
                    print(message, file=sys.stderr, flush=True)
    sys.exit(report(done, skipped, time.perf_counter() - start))


def report(done: list[Lab], skipped: dict[str, str], seconds: float) -> bool:
    """Print the table; return whether a case failed, or none ran."""
    cases: Counter = sum((lab.counts for lab in done), Counter())
    failures = [failure for lab in done for failure in lab.failures]
    failed, kinds = Counter(case for _, case, _ in failures), Counter(kind for kind, _, _ in failures)
    figures = {
        "cases": cases.total(), "failures": len(failures), "kills": cases[KILLS], "lost": kinds["lost"],
        "hangs": kinds["hangs"], "tracebacks": kinds["tracebacks"],
        "identical": float(not kinds["lost"]),
        "lost_steps": max((lab.lost_steps for lab in done), default=0), "skipped": len(skipped),
    }  # fmt: skip
    rows = [(name, f"{count} cases, {failed[name]} failed") for name, count in cases.items()]
    rows += [(name, f"skipped: {reason}") for name, reason in skipped.items()]
    rows.append(("time", f"{seconds:.0f} s"))
    tasks = ", ".join(dict.fromkeys(lab.task for lab in done))
    common.report(f"faults while training ({tasks}); {common.machine(torch.device('cpu'))}", rows, figures)
    return bool(failures) or not cases.total()


if __name__ == "__main__":
    main()
