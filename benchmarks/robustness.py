"""Hostile files, options, outputs and servers: how many make a command fail in another way than by a clear sentence.

    python benchmarks/robustness.py
    python benchmarks/robustness.py --case "images:17"      # one case again, with its output

cases          number of cases, and of kills
failures       cases with another end than a valid result, or an error of one sentence (exit code 0, 1 or 2)
kills, lost    kills of trainings (``kill.py``), and how many lost something
tracebacks     cases that end with another exception than ValueError and OSError
hangs          cases that take longer than the time limit
over_2gb       cases that take more than 2 GB
code_executed  cases in which code from a file was run
skipped        kinds of faults of training that this machine cannot run

``hostile_*.py`` make the cases. A case is decided by its class, its number and the seed; it runs in a process of its
own, with limits of time and memory. The exit status is 1 unless all cases ran and none failed.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import resource
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
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # the servers and tiny runs of the tests

import common
import hostile_data as data
import hostile_use as use
import hostile_weights as weights
import torch
from hostile import Base, Call, make_base
from huggingface_hub import constants

from passreid_models import cli

CASES, QUICK_CASES, KILLS = 300, 3, 50  # cases of each class
SECONDS, MEMORY = 60, 2 * 2**30
ADDRESS_SPACE = 4 * 2**30  # on top of what is there: threads reserve more than they use
MAX_MESSAGE = 4000  # characters
NO_MEMORY = re.compile(r"out of memory: |MemoryError|allocate memory|std::bad_alloc|not enough memory|Cannot allocate")


CLASSES: dict[str, Callable[[Random, Base, Path], Call]] = {
    "pickles": weights.pickles,
    "zip checkpoints": weights.zips,
    "old checkpoints": weights.old_files,
    "safetensors": weights.safetensors_files,
    "state dicts": weights.state_dicts,
    "model folders": weights.model_folders,
    "settings": use.settings,
    "tables": data.tables,
    "datasets": data.datasets,
    "lists and tars": data.listings,
    "images": data.images,
    "galleries": data.galleries,
    "caches and records": data.caches,
    "runs": weights.runs,
    "metrics": data.metrics,
    "options": use.options,
    "outputs": use.outputs,
    "network": use.network,
}
SIZED = ("settings", "options")  # out of memory is a clear answer to a size that the user asked for


class Outcome(NamedTuple):
    """End of a case: ``failure`` is empty if it is a good one."""

    failure: str  # "", code executed, hang, over 2 GB, traceback, wrong result, unclear message, died, no case
    message: str
    output: str
    seconds: float
    megabytes: float


def run_case(call: Call, work: Path, seconds: float = SECONDS, memory: float = MEMORY, sized: bool = False) -> Outcome:
    """Run a case in a process of its own, and judge how it ends.

    Args:
        call: Words of a ``passreid`` command, or a function.
        work: Folder of the case; the process works in it.
        seconds: Time limit.
        memory: Limit of the memory that it adds, in bytes.
        sized: Whether the message that memory is out is a good end.
    """
    log, ending = work.parent / f"{work.name}.log", work.parent / f"{work.name}.json"
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(call, work, log, ending)
    hangs, usage, status = False, None, 0
    while usage is None:
        done, status, rusage = os.wait4(pid, os.WNOHANG)
        if done:
            usage = rusage
        elif time.monotonic() - start > seconds and not hangs:
            hangs = True
            os.killpg(pid, signal.SIGKILL)
        else:
            time.sleep(0.005)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it has started
    took = time.monotonic() - start
    output = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    end: dict[str, Any] = json.loads(ending.read_text(encoding="utf-8")) if ending.is_file() else {}
    grown = max(0, usage.ru_maxrss * 1024 - end.get("begun", 0)) if end else 0
    failure, message = end.get("failure", ""), end.get("message", "")
    if (work / "EXECUTED").exists():
        failure = "code executed"
    elif hangs:
        failure = "hang"
    elif grown > memory or (NO_MEMORY.search(output + message) and not (sized and end.get("said"))):
        failure = "over 2 GB"
    elif not end or "ended" not in end:
        failure, message = "died", f"status {status}"
    for path in (log, ending):
        path.unlink(missing_ok=True)
    return Outcome(failure, message, output, took, grown / 2**20)


def _child(call: Call, work: Path, log: Path, ending: Path) -> None:
    """Body of the process of a case; never returns."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
        for fd, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)):
            os.dup2(os.open(path, flags), fd)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
        os.chdir(work)
        os.environ["PASSREID_CACHE"] = str(work / "cache")
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
        pages, resident = map(int, Path("/proc/self/statm").read_text(encoding="utf-8").split()[:2])
        limit = pages * os.sysconf("SC_PAGESIZE") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)
        end: dict[str, Any] = {"begun": resident * os.sysconf("SC_PAGESIZE")}
        _write(ending, end)
        end |= _judge(call, log, work)
        _write(ending, end | {"ended": True})
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def _judge(call: Call, log: Path, work: Path) -> dict[str, Any]:
    """Run a call; return the failure and the message."""
    try:
        if not isinstance(call, list):
            call()
            return {}
        code = cli.main(call)
        if code == 0 and call[0] in ("convert", "embed"):
            weights.assert_finite(work / "out")
    except SystemExit as e:  # of argparse
        code = e.code if isinstance(e.code, int) else 1
    except AssertionError as e:
        traceback.print_exc()
        own = Path(traceback.extract_tb(e.__traceback__)[-1].filename)
        failure = "wrong result" if own.parent == Path(__file__).parent else "traceback"
        return {"failure": failure, "message": f"{type(e).__name__}: {e}"}
    except (ValueError, OSError) as e:
        if isinstance(call, list):
            traceback.print_exc()
            return {"failure": "traceback", "message": f"{type(e).__name__}: {e}"}
        return _clear(str(e), work)
    except BaseException as e:
        traceback.print_exc()
        return {"failure": "traceback", "message": f"{type(e).__name__}: {e}"}
    sys.stdout.flush()
    sys.stderr.flush()
    text = log.read_text(encoding="utf-8", errors="replace")
    if "Traceback (most recent call last)" in text:
        return {"failure": "traceback", "message": text.rstrip().rpartition("\n")[2]}
    if code not in (0, 1, 2):
        return {"failure": "unclear message", "message": f"exit code {code}"}
    last = text.rstrip("\n").rpartition("\n")[2]
    if code and not last.startswith("passreid") and call[:2] not in (["data", "check"], ["weights", "verify"]):
        return {"failure": "unclear message", "message": f"exit code {code}, and the last line is {last!r}"}
    end = _clear(last, work) if code == 2 else {}
    return end | ({"said": True} if code == 1 and "out of memory: " in last else {})


def _clear(message: str, work: Path) -> dict[str, Any]:
    """Check that a message is a sentence, apart from names that have line breaks themselves."""
    text = message.replace(str(work), "")
    for name in sorted({path.name for path in work.rglob("*\n*")}, key=len, reverse=True):
        text = text.replace(name, "")
    if not text.strip() or "\n" in text or len(message) > MAX_MESSAGE:
        return {"failure": "unclear message", "message": message[:MAX_MESSAGE]}
    return {"message": message}


# ------------------------------------------------------------------------------------------------------------- report


def run_number(kind: str, number: int, seed: int, base: Base, folder: Path) -> tuple[Outcome, str]:
    """Make and run the case of a class, a number and a seed; return its call too."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as parent:
        work = Path(parent, "case")
        work.mkdir()
        try:
            call = CLASSES[kind](Random(f"{kind}/{number}/{seed}"), base, work)
        except Exception:
            return Outcome("no case", traceback.format_exc(), "", 0, 0), ""
        outcome = run_case(call, work, sized=kind in SIZED)
    return outcome, " ".join(call)[:500] if isinstance(call, list) else str(call)


def run_all(jobs: list[tuple[str, int]], seed: int, base: Base, folder: Path) -> Iterator[Any]:
    """Run jobs on all cores; yield class, number, outcome and call of each, until Ctrl-C."""
    left, size = dict.fromkeys(jobs), len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(size, multiprocessing.get_context("fork")) as pool:
        try:
            futures = {pool.submit(run_number, *job, seed, base, folder): job for job in jobs}
            for future in as_completed(futures):
                outcome, call = future.result()
                del left[futures[future]]
                yield *futures[future], outcome, call
        except BrokenProcessPool as e:
            for job in left:
                yield *job, Outcome("died", f"not run: {e}", "", 0, 0), ""
        except KeyboardInterrupt:
            print("interrupted: the figures are those of the cases so far")
            pool.shutdown(cancel_futures=True)


def kill_trainings(kills: int, seed: int, quick: bool) -> dict[str, float]:
    """Figures of ``kill.py``; a run of it that fails counts as one failure."""
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), "--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], stdout=subprocess.PIPE, text=True)
    try:
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        figures = {}
    if done.returncode and not figures.get("failures"):
        figures = {**figures, "cases": figures.get("cases", 1), "failures": 1}
    print(done.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CASES} cases of each class, and no kills")
    parser.add_argument("--cases", type=int, help=f"cases of each class (default: {CASES})")
    parser.add_argument("--kills", type=int, help=f"kills of trainings (default: {KILLS})")
    parser.add_argument("--seed", type=int, default=0, help="of the cases and the kills")
    parser.add_argument("--only", choices=CLASSES, metavar="CLASS", help=f"one class of {', '.join(CLASSES)}")
    parser.add_argument("--case", metavar="CLASS:NUMBER", help="one case, with its output")
    args = parser.parse_args()
    kind, _, number = (args.case or "images:0").rpartition(":")
    if kind not in CLASSES or not number.isdecimal():
        parser.error(f"--case {args.case} is not one of --only, a colon and a number")
    cases = args.cases if args.cases is not None else QUICK_CASES if args.quick else CASES
    kills = args.kills if args.kills is not None else 0 if args.quick or args.only else KILLS

    start = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        base = make_base(folder / "base")
        if args.case:
            outcome, call = run_number(kind, int(number), args.seed, base, folder)
            print(f"{outcome.output}\n{call}\n{outcome._replace(output='')}")
            sys.exit(bool(outcome.failure))
        jobs = [(kind, i) for i in range(cases) for kind in CLASSES if args.only in (None, kind)]
        tally: dict[str, Counter[str]] = {kind: Counter() for kind, _ in jobs}
        seconds, memory, slowest = Counter[str](), Counter[str](), Counter[str]()
        for kind, number, outcome, call in run_all(jobs, args.seed, base, folder):
            tally[kind]["cases"] += 1
            seconds[kind] += outcome.seconds
            slowest[kind] = max(slowest[kind], outcome.seconds)
            memory[kind] = max(memory[kind], outcome.megabytes)
            if outcome.failure:
                tally[kind][outcome.failure] += 1
                print(f'{outcome.failure}: --seed {args.seed} --case "{kind}:{number}"  {call}')
                print(f"    {outcome.message[:300]}", flush=True)
    took = time.monotonic() - start
    shutil.rmtree(folder, ignore_errors=True)
    is_complete = sum(counts["cases"] for counts in tally.values()) == len(jobs)
    killed = kill_trainings(kills, args.seed, args.quick) if kills and is_complete else {}

    total: Counter[str] = sum(tally.values(), Counter())
    failures = {kind: sum(counts.values()) - counts["cases"] for kind, counts in tally.items()}
    rows = [
        (kind, f"{counts['cases']:>6} {failures[kind]:>6} {slowest[kind]:>7.1f} {memory[kind]:>7.0f}")
        for kind, counts in tally.items()
    ]
    if killed:
        rows.append(("kills", f"{killed.get('cases', kills):>6} {killed.get('failures', 0):>6} {'':>15}"))
    rows.append(("all", f"{total['cases']:>6} {sum(failures.values()):>6} {took:>7.0f} {'':>7}"))
    names = {"tracebacks": "traceback", "hangs": "hang", "over_2gb": "over 2 GB", "code_executed": "code executed"}
    figures: dict[str, float | None] = {
        "cases": total["cases"] + killed.get("cases", 0),
        "failures": sum(failures.values()) + killed.get("failures", 0),
        "kills": killed.get("kills", 0),
        "lost": killed.get("lost", 0),
        **{name: total[failure] + killed.get(name, 0) for name, failure in names.items()},
        "skipped": killed.get("skipped", 0),
    }
    title = f"classes: cases, failures, seconds of the longest, MB at most; {common.machine()}"
    common.report(title, rows, figures)
    sys.exit(bool(figures["failures"] or figures["lost"] or not figures["cases"] or not is_complete))


if __name__ == "__main__":
    main()
