"""Jobs in worker processes that exit at once with their parent: at Ctrl-C, after an error, and when it is killed.

Each worker holds one end of a pipe through which nothing is sent; it exits when the parent's end is closed, however the
parent ended.
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
    """Run jobs one after another in this process.

    Args:
        work: Runs one job.
        jobs: Arguments of `work`, one per job.
        done: Called with each result.
    """
    with one_thread():
        for job in jobs:
            done(work(job))


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, as in the workers: another order of summation could change the images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_in_processes(
    work: Callable[[int], int], jobs: Sequence[int], workers: int, done: Callable[[int], object]
) -> None:
    """Run jobs in processes of one thread each, in any order.

    Args:
        work: Runs one job; must be picklable.
        jobs: Arguments of `work`, one per job; small, since a pool with a full queue can hang when a process dies.
        workers: Number of processes.
        done: Called with each result.

    Raises:
        ChildProcessError: If a process dies.
    """
    context = multiprocessing.get_context("spawn")  # torch and warp do not survive a fork
    worker_end, parent_end = context.Pipe(duplex=False)
    unrelated = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _initialise, (worker_end,))
    try:
        with _worker_environment():
            futures = [pool.submit(work, job) for job in jobs]
        for future in as_completed(futures):
            done(future.result())
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that draws died; its images stay, and the same command goes on. If memory is short, use fewer "
            'workers; a script must make the call under `if __name__ == "__main__":`'
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - unrelated:
            process.terminate()  # faster than the pipe, which workers do not watch during their imports
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        parent_end.close()
        worker_end.close()


def _initialise(end: Connection) -> None:
    """Prepare a new worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pipe ends the worker instead
    torch.set_num_threads(1)
    Thread(target=_exit_with_parent, args=(end,), daemon=True).start()


def _exit_with_parent(end: Connection) -> None:
    end.poll(None)  # returns when the parent's end is closed
    os._exit(1)


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Environment for starting workers: one thread for each library, and SIGINT blocked during their imports."""
    previous = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
