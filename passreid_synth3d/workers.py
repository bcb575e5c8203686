"""Jobs in processes that end with the one that started them, at once: at Ctrl-C, after an error, and when it is killed.

Each process has one end of a pipe and nothing comes through it: when the other end closes, whatever closed it, it ends.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Thread

import torch

__all__ = ["one_thread", "run_here", "run_in_processes"]

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_here(work: Callable[[int], int], jobs: Sequence[int], done: Callable[[int], object]) -> None:
    """Do jobs one by one in this process.

    Args:
        work: Does one.
        jobs: What it is given.
        done: Told what it returns.
    """
    with one_thread():
        for job in jobs:
            done(work(job))


@contextmanager
def one_thread() -> Iterator[None]:
    """In here torch computes as in the processes: sums in another order could be other images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_in_processes(
    work: Callable[[int], int], jobs: Sequence[int], workers: int, done: Callable[[int], object]
) -> None:
    """Do jobs in processes of one thread each, in any order.

    Args:
        work: Does one; it can be pickled.
        jobs: What it is given; small, since a pool whose process dies can hang where its queue is full.
        workers: Number of processes.
        done: Told what it returns.

    Raises:
        ChildProcessError: If a process dies.
    """
    context = multiprocessing.get_context("spawn")  # torch and warp do not survive a fork
    end, other_end = context.Pipe(duplex=False)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _begin, (end,))
    try:
        with _inherited():
            futures = [pool.submit(work, job) for job in jobs]
        for future in as_completed(futures):
            done(future.result())
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that draws died; what it wrote stays, and the same command goes on. If memory is short, use "
            'fewer workers; a script has to call from under `if __name__ == "__main__":`'
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # quicker than the pipe, which is not listened to while they import
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        other_end.close()
        end.close()


def _begin(end: Connection) -> None:
    """What a new process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pipe tells
    torch.set_num_threads(1)
    Thread(target=_end_with, args=(end,), daemon=True).start()


def _end_with(end: Connection) -> None:
    end.poll(None)
    os._exit(1)


@contextmanager
def _inherited() -> Iterator[None]:
    """Processes that start in here have one thread for each library, and do not hear Ctrl-C while they import."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
