"""Atomic writes, locks and hashes: after an exception, after kill -9, and with several processes."""

import hashlib
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import Timeout

from passreid_models.runtime import (
    atomic_file,
    atomic_folder,
    check_file,
    did_you_mean,
    few,
    lock,
    map_threads,
    not_found,
    sha256,
)
from tests import ROOT

RUNTIME = ROOT / "passreid_models" / "runtime.py"

CHILD = f"""
import importlib.util, itertools, os, signal, sys
spec = importlib.util.spec_from_file_location("runtime", {str(RUNTIME)!r})
runtime = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runtime)

def die_at(step):
    '''Kill this process (-9) just before its file-system operation number ``step``, from 0.'''
    steps = itertools.count()
    def hook(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
"""


def child(code: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD + code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


SERVER = """
for step, path in enumerate(map(str.strip, sys.stdin)):
    pid = os.fork()
    if not pid:
        sys.argv[1:] = [path]
        die_at(step)
        exec(CODE)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def killed_at_every_step(code: str, prepare: Callable[[int], Path]) -> Iterator[tuple[Path, int]]:
    """Run ``code`` in children, each killed one operation later, until one finishes; yield path and exit code.

    They are forked from a process that has imported everything.
    """
    with child(f"CODE = {code!r}\n{SERVER}") as server:
        for step in itertools.count():
            path = prepare(step)
            print(path, file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            yield path, status
            if status == 0:
                server.stdin.close()
                return
            assert status == -9
            assert step < 50


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ------------------------------------------------------------------------------------------------------ atomic_file


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path):
    path = tmp_path / "new folder" / "record.json"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    assert path.read_text() == "old"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(path.parent) == ["record.json"]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_symbolic_link_to_a_file_is_followed(tmp_path, is_there):
    (tmp_path / "shared").mkdir()
    if is_there:
        (tmp_path / "shared" / "record.json").write_text("old")
    (tmp_path / "record.json").symlink_to("shared/record.json")
    with atomic_file(tmp_path / "record.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "record.json").is_symlink()
    assert (tmp_path / "shared" / "record.json").read_text() == "new"
    assert names(tmp_path / "shared") == ["record.json"]


def test_a_place_where_no_file_can_be_is_named_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match=r"folder: name a file"), atomic_file(tmp_path):
        pytest.fail("the work has begun")
    with pytest.raises(NotADirectoryError, match=r"a\.json: .*file is no folder"):
        check_file(tmp_path / "file" / "b" / "a.json")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_file(tmp_path / "new" / "a.json")
    assert names(tmp_path) == ["file"]


def test_a_drive_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(FileNotFoundError, match=f"there is no {os.sep}$"):
        check_file(tmp_path / "a.json")


def test_the_temporary_file_keeps_the_suffix_by_which_writers_choose_a_format(tmp_path):
    with atomic_file(tmp_path / "features.npz") as temporary:
        assert temporary.name == "features.npz"
        temporary.touch()


def test_an_exception_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["record.json"]


def test_a_writer_that_wrote_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass
    assert path.read_text() == "old"
    assert names(tmp_path) == ["record.json"]


def test_a_kill_at_any_step_leaves_the_old_file_or_the_new(tmp_path):
    def prepare(step: int) -> Path:
        path = tmp_path / str(step) / "record.json"
        path.parent.mkdir()
        path.write_text("old")
        return path

    code = "with runtime.atomic_file(sys.argv[1]) as file: file.write_text('new')"
    results = []
    for path, status in killed_at_every_step(code, prepare):
        results.append((path.read_text(), status))
    assert {text for text, _ in results} == {"old", "new"}
    assert results[0] == ("old", -9)
    assert results[-1] == ("new", 0)


# ---------------------------------------------------------------------------------------------------- atomic_folder


def write(folder: Path, text: str = "new") -> None:
    for name in ("a", "b"):
        (folder / name).write_text(text)


def filled(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    write(path, text)
    return path


def content(path: Path) -> list[tuple[str, str]]:
    return [(name, (path / name).read_text()) for name in names(path)]


OLD, NEW = ([("a", text), ("b", text)] for text in ("old", "new"))


def test_a_folder_appears_whole_at_the_end(tmp_path):
    path = tmp_path / "parent" / "model"
    with atomic_folder(path) as new:
        write(new)
        assert not path.exists()
    assert content(path) == NEW
    assert names(path.parent) == ["model"]


def test_an_empty_folder_is_filled(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    with atomic_folder(path) as new:
        write(new)
    assert content(path) == NEW


def test_a_folder_with_content_stays_unless_it_is_to_be_overwritten(tmp_path):
    path = filled(tmp_path / "model", "old")
    with pytest.raises(OSError, match="not empty"), atomic_folder(path) as new:
        write(new)
    assert content(path) == OLD
    assert names(tmp_path) == ["model"]


def test_overwriting_leaves_no_file_of_the_old_folder(tmp_path):
    path = filled(tmp_path / "model", "old")
    (path / "extras").touch()
    with atomic_folder(path, overwrite=True) as new:
        write(new)
    assert content(path) == NEW
    assert names(tmp_path) == ["model"]


def test_overwriting_replaces_the_writers_own_names_alone_if_it_tells_them(tmp_path):
    path = filled(tmp_path / "model", "old")
    (path / "c").write_text("own, and not written again")
    filled(path / "others", "mine")
    with atomic_folder(path, overwrite=True, own=("a", "b", "c")) as new:
        write(new)
    assert content(path / "others") == [("a", "mine"), ("b", "mine")]
    (path / "others").rename(tmp_path / "others")
    assert content(path) == NEW
    assert names(tmp_path) == ["model", "others"]


@pytest.mark.parametrize("target", ["absent", "empty", "filled"])
def test_a_symbolic_link_to_a_folder_is_followed_each_time(tmp_path, target):
    path, link = tmp_path / "elsewhere" / "v3", tmp_path / "latest"
    path.parent.mkdir()
    if target != "absent":
        path.mkdir()
    if target == "filled":
        write(path, "old")
    link.symlink_to(path)
    for text in ("next", "new"):
        with atomic_folder(link, overwrite=True) as new:
            write(new, text)
        assert content(path) == [("a", text), ("b", text)]
    assert link.readlink() == path
    assert (names(tmp_path), names(path.parent)) == (["elsewhere", "latest"], ["v3"])


def test_an_empty_folder_behind_a_link_is_filled_without_overwriting(tmp_path):
    (tmp_path / "v3").mkdir()
    (tmp_path / "latest").symlink_to("v3")
    with atomic_folder(tmp_path / "latest") as new:
        write(new)
    assert content(tmp_path / "v3") == NEW


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "model.pth").write_text("mine")
    folder = atomic_folder(tmp_path / "model.pth", overwrite=True)
    with pytest.raises(FileExistsError, match=r"model\.pth is a file: name a folder"), folder as new:
        write(new)
    assert (tmp_path / "model.pth").read_text() == "mine"
    assert names(tmp_path) == ["model.pth"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_keeps_the_old_folder_and_leaves_no_litter(tmp_path, overwrite):
    path = filled(tmp_path / "model", "old")

    def interrupted() -> None:
        with atomic_folder(path, overwrite) as new:
            (new / "a").write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(path) == OLD
    assert names(tmp_path) == ["model"]


def test_a_kill_at_any_step_leaves_a_whole_folder_the_old_one_maybe_beside_and_loses_nothing_of_others(tmp_path):
    def prepare(step: int) -> Path:
        path = filled(tmp_path / str(step) / "model", "old")
        (path / "c").write_text("mine")
        return path

    code = """
with runtime.atomic_folder(sys.argv[1], overwrite=True, own=("a", "b")) as new:
    for name in ("a", "b"):
        (new / name).write_text("new")
"""
    states = []
    for path, _ in killed_at_every_step(code, prepare):
        beside = path.parent / ".model.old"
        assert content(path if path.exists() else beside)[:2] in (OLD, NEW)
        states.append("beside" if not path.exists() else content(path)[0][1])
        with atomic_folder(path, overwrite=True, own=("a", "b")) as new:  # the remains of a kill are not in the way
            write(new, "next")
        assert content(path) == [("a", "next"), ("b", "next"), ("c", "mine")]
        assert not beside.exists()
    assert [state for state, _ in itertools.groupby(states)] == ["old", "beside", "new"]
    assert states.count("beside") == 1


def test_a_kill_at_any_step_leaves_a_new_folder_whole_or_absent(tmp_path):
    code = """
with runtime.atomic_folder(sys.argv[1]) as new:
    for name in ("a", "b"):
        (new / name).write_text("new")
"""
    for path, _ in killed_at_every_step(code, lambda step: tmp_path / str(step) / "model"):
        assert not path.exists() or content(path) == NEW
    assert path.exists()


# ------------------------------------------------------------------------------------------------------------- lock

HOLD = "lock = runtime.lock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read(); lock.release()"


def test_a_lock_held_by_another_process_is_waited_for(tmp_path):
    path = tmp_path / "cache" / "weights"
    holder = child(HOLD, path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Timeout):
        lock(path).acquire(timeout=0.1)
    with lock(tmp_path / "cache" / "others"):  # the lock of something else is free
        holder.communicate(timeout=600)
    with lock(path).acquire(timeout=600):
        assert not path.exists()  # the lock is beside, the name stays free


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    holder = child(HOLD, tmp_path / "weights")
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate(timeout=600)
    held = lock(tmp_path / "weights")
    with held.acquire(timeout=600):
        assert held.is_locked


def test_processes_take_turns_under_the_lock(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    code = """
from pathlib import Path
path = Path(sys.argv[1])
for _ in range(50):
    with runtime.lock(path):
        path.write_text(str(int(path.read_text()) + 1))
"""
    processes = [child(code, counter) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=600)
    assert counter.read_text() == "150"


# ----------------------------------------------------------------------------------------------------------- sha256


def test_sha256_is_that_of_the_standard_and_of_long_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")  # FIPS 180-2, example 1
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(bytes(range(256)) * 5000)
    assert sha256(str(path)) == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


def test_a_misspelt_word_or_path_names_the_nearest_and_others_none(tmp_path):
    assert did_you_mean("evl", ["embed", "eval", "eva"]) == "; did you mean eval?"
    assert did_you_mean("zzz", ["embed", "eval"]) == ""
    (tmp_path / "persons").mkdir()
    missing = tmp_path / "persns"
    assert str(not_found(missing, "a folder")) == f"{missing}: no such file or folder; did you mean persons?"
    for missing in (tmp_path / "zzz", tmp_path / "nowhere" / "persons"):
        assert str(not_found(missing)) == f"{missing}: no such file or folder"
        assert str(not_found(missing, "a folder", "data")) == "data: no such file or folder; expected a folder"


def test_of_many_labels_the_first_are_named_and_the_others_counted():
    assert (few([], 2), few(["a", "b"], 2), few(["a", "b", "c"], 2)) == ("", "a, b", "a, b and 1 more")
    assert few(["a"] * 1500, 1) == "a and 1,499 more"


def test_threads_give_results_in_order_and_do_not_run_far_ahead_of_them():
    begun: list[int] = []
    results = map_threads(lambda i: begun.append(i) or 2 * i, range(10_000))
    assert next(results) == 0
    assert len(begun) <= 4096
    assert list(results) == list(range(2, 20_000, 2))
    assert sorted(begun) == list(range(10_000))


FREED_MEMORY = """
import resource, sys
import numpy as np
from passreid_models import cli

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.ones(2**26, np.uint8)  # 64 MiB, written to
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = [new_pages() for _ in range(3)][-1]
code = cli.train(["no/such/folder", "--device", "cpu"])
kept = [new_pages() for _ in range(3)][-1]
print(code, returned, kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
@pytest.mark.parametrize(("settings", "is_kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False)])
def test_a_training_command_keeps_freed_memory_unless_the_environment_says_otherwise(settings, is_kept):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    result = subprocess.run(
        [sys.executable, "-c", FREED_MEMORY], env=environment | settings, capture_output=True, text=True, check=True
    )
    code, returned, kept = map(int, result.stdout.split())
    assert code == 2
    assert returned > 16  # in pages of 2 MiB at most
    assert (kept < 16) == is_kept
