"""The same work by several processes side by side.

On a CPU MLX runs all but matrix products in one thread, so two processes with one BLAS thread each
write half as many tokens again as one process with two.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from redrafter_mlx.errors import UserError

T = TypeVar("T")
Tell = Callable[[Any], None]
Work = Callable[[int, Tell], T]
"""(number of the job, told of its progress) -> its result; what it holds must be picklable."""

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_TOLD, _DONE, _REFUSED, _FAILED = range(4)


def side_by_side(jobs: int, work: Work, tell: Callable[[int, Any], None]) -> list[T]:
    """The results of `work` of jobs 0 to jobs - 1; one job alone runs in this process.

    tell  called here with a job's number and whatever that job told

    A UserError in one job ends all of them and is raised here; a job that dies raises RuntimeError.
    Jobs end with this process, however it ends.
    """
    if jobs == 1:
        return [work(0, lambda told: tell(0, told))]
    spawn = multiprocessing.get_context("spawn")
    messages = spawn.Queue()
    processes = [
        spawn.Process(target=_run, args=(work, job, os.getpid(), messages), daemon=True)
        for job in range(jobs)
    ]
    results: dict[int, Any] = {}
    try:
        with blas_threads(jobs):
            for process in processes:
                process.start()
        while len(results) < jobs:
            job, kind, what = _next(messages, processes, results)
            if kind == _TOLD:
                tell(job, what)
            elif kind == _DONE:
                results[job] = what
            elif kind == _REFUSED:
                raise UserError(what)
            else:
                raise RuntimeError(f"job {job + 1} of {jobs} failed: {what}")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()
    return [results[job] for job in range(jobs)]


def _run(work: Work, job: int, parent: int, messages) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and ends the jobs

    def tell(told: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)
        messages.put((job, _TOLD, told))

    try:
        result = (job, _DONE, work(job, tell))
    except UserError as error:
        result = (job, _REFUSED, str(error))
    except Exception as error:
        result = (job, _FAILED, f"{type(error).__name__}: {error}")
    messages.put(result)


def _next(messages, processes, results) -> tuple[int, int, Any]:
    """The next message; a job that ended without a last word is a failure."""
    while True:
        dead = [i for i, p in enumerate(processes) if i not in results and not p.is_alive()]
        try:
            return messages.get(timeout=1.0)
        except queue.Empty:
            if dead:
                return dead[0], _FAILED, f"ended with exit code {processes[dead[0]].exitcode}"


@contextmanager
def blas_threads(jobs: int) -> Iterator[None]:
    """Gives each of so many processes started in the block its share of the cores for BLAS."""
    count = max(1, (os.cpu_count() or 1) // jobs)
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
