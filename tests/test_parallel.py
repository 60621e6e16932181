"""One model over several processes: the text of one, whoever started them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from test_generate_command import save_drafter, save_target

LAUNCH = Path(sys.executable).parent / "mlx.launch"
GREEDY, SAMPLED = [], ["--temp", "0.8", "--seed", "7"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("split")
    save_drafter(path / "drafter", save_target(path / "plain"))
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def words(tiny, *more) -> list[str]:
    return [
        "-m", "redrafter_mlx.generate", "--model", str(tiny / "plain"), "--prompt", "the end",
        "--max-tokens", "40", "--json", *more,
    ]  # fmt: skip


def start(processes: int, given: list[str]) -> subprocess.Popen:
    places = ["-n", str(processes), "--backend", "ring", "--starting-port", str(free_port())]
    return subprocess.Popen(
        [str(LAUNCH), *places, "--", sys.executable, *given],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


def answer(done: str) -> dict:
    found = [line[line.index("{") :] for line in done.splitlines() if '"tokens"' in line]
    assert len(found) == 1, f"one process speaks: {done}"
    return json.loads(found[0])


@pytest.mark.parametrize(
    ("budget", "sampling"), [("8", GREEDY), ("auto", SAMPLED)], ids=["8-greedy", "auto-sampled"]
)
def test_two_processes_say_what_one_says(tiny, sampling, budget):
    flags = ["--drafter", f"union:[max_gram,{tiny / 'drafter'}]", "--budget", budget, *sampling]
    given = words(tiny, *flags)
    alone = subprocess.run([sys.executable, *given], capture_output=True, text=True, check=True)
    running = start(2, given)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert answer(out)["tokens"] == answer(alone.stdout)["tokens"]


def test_plain_decoding_is_split_too(tiny):
    given = words(tiny, "--no-draft")
    alone = subprocess.run([sys.executable, *given], capture_output=True, text=True, check=True)
    out, err = start(2, given).communicate(timeout=120)
    assert answer(out)["tokens"] == answer(alone.stdout)["tokens"], err


def test_heads_that_cannot_be_split_are_told(tiny):
    running = start(3, words(tiny))
    out, err = running.communicate(timeout=120)
    assert "cannot be split over 3 processes" in out + err


@pytest.fixture
def endless(tiny, tmp_path):
    """Two processes, started without mlx.launch, that write a text without end."""
    hosts = [[f"127.0.0.1:{free_port()}"] for _ in range(2)]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    given = words(tiny, "--stop", "ZZZ")
    given[given.index("40")] = "1000000"
    given.remove("--json")
    running = []
    for rank in range(2):
        places = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
        running.append(
            subprocess.Popen(
                [sys.executable, "-u", *given],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **places},
            )
        )
    assert running[0].stdout.read(1), running[0].stderr.read()  # it has begun to write
    yield running
    for each in running:
        each.kill()
        each.wait()


def test_ctrl_c_ends_all(endless):
    for each in endless:  # as a terminal does
        each.send_signal(signal.SIGINT)
    for each in endless:
        each.communicate(timeout=60)


TELLS_ITS_ID = """
import os, runpy, sys
with open(sys.argv[1] + os.environ["MLX_RANK"], "w") as file:
    file.write(str(os.getpid()))
del sys.argv[1]
runpy.run_module("redrafter_mlx.generate", run_name="__main__")
"""


def test_one_that_is_killed_ends_all(tiny, tmp_path):
    """The launcher sees to it: MLX itself may wait for a peer that has gone."""
    given = words(tiny)[2:]
    given[given.index("40")] = "1000000"
    given.remove("--json")
    running = start(2, ["-u", "-c", TELLS_ITS_ID, f"{tmp_path}/", *given])
    assert running.stdout.read(1), "it writes"
    leader, follower = (int((tmp_path / rank).read_text()) for rank in "01")
    os.kill(follower, signal.SIGKILL)
    said = "".join(running.communicate(timeout=60))
    assert "exited with code -9" in said
    for pid in (leader, follower):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
