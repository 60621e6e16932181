"""Jobs side by side: results in order, errors told, nothing left running."""

import os
import time
from functools import partial

import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.jobs import side_by_side


def work(fate: str, job: int, tell):
    tell(f"{job} began")
    if fate == "refuses" and job == 1:
        raise UserError("there is no room")
    if fate == "fails" and job == 1:
        raise ValueError("wrong")
    if fate == "dies" and job == 1:
        os._exit(7)
    if fate != "works":
        time.sleep(600)
    return job, os.getpid(), os.environ.get("OPENBLAS_NUM_THREADS")


def test_results_come_in_order_and_each_job_has_its_share_of_the_threads():
    told = []
    (a, first, threads), (b, second, _) = side_by_side(
        2, partial(work, "works"), lambda job, what: told.append((job, what))
    )
    assert (a, b) == (0, 1)
    assert len({first, second, os.getpid()}) == 3
    assert threads == str(max(1, os.cpu_count() // 2))
    assert sorted(told) == [(0, "0 began"), (1, "1 began")]


def test_one_job_runs_in_this_process():
    told = []
    [(job, process, _)] = side_by_side(1, partial(work, "works"), lambda *x: told.append(x))
    assert (job, process, told) == (0, os.getpid(), [(0, "0 began")])


@pytest.mark.parametrize(
    ("fate", "error", "message"),
    [("refuses", UserError, "there is no room"), ("fails", RuntimeError, "2 of 2 .*ValueError"),
     ("dies", RuntimeError, "exit code 7")],
)  # fmt: skip
def test_one_job_that_cannot_go_on_ends_all(fate, error, message):
    began = time.monotonic()
    with pytest.raises(error, match=message):
        side_by_side(2, partial(work, fate), lambda *told: None)
    assert time.monotonic() - began < 300
