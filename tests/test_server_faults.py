"""A server whose disk is full, or that is killed while it saves: what is kept, said, answered."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time

import pytest
from test_server_command import chat, end, start, tiny  # noqa: F401

from scripted_engine import wait_until

SEED = int(os.environ.get("REDRAFTER_MLX_KILLS_SEED", "0"))


def files(directory):
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def talk(address, prompts, **more):
    """What is said to each prompt, alone and at temperature 0."""
    replies = [
        chat(address, messages=[{"role": "user", "content": prompt}], **more) for prompt in prompts
    ]
    return [reply.json()["choices"][0]["message"]["content"] for reply in replies]


def saved_by(tiny, directory, prompts, *flags, **how):  # noqa: F811
    """A server answers the prompts and ends: exit code, its log on files, its answers."""
    process, address = start(tiny, "--prompt-cache-dir", str(directory), *flags, **how)
    said = talk(address, prompts)
    process.send_signal(signal.SIGTERM)
    return *end_of(process), said


def end_of(process):
    """The exit code, and the lines of the log about files that are kept."""
    code, log = end(process)
    assert "Traceback" not in log
    return code, [line for line in log.splitlines() if "prefix" in line]


def test_a_full_disk_is_told_and_what_was_kept_stays(tiny, tmp_path):  # noqa: F811
    """When it ends, and when it goes on with another model."""
    directory, other = tmp_path / "texts", tmp_path / "other"
    shutil.copytree(tiny, other)
    assert saved_by(tiny, directory, ["the first"])[:2] == (0, [])
    before = files(directory)
    size = max(path.stat().st_size for path in directory.iterdir())

    process, address = start(
        tiny, "--prompt-cache-dir", str(directory), "--allow-model-switch", str(other)
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    expected = talk(address, ["another one, and longer than the first"])
    assert talk(address, ["another one, and longer than the first"], model=str(other)) == expected
    process.send_signal(signal.SIGTERM)
    code, log = end_of(process)
    assert code == 0
    assert len(log) == 2  # of either model
    assert all("prefixes cannot be saved in" in line for line in log)
    assert files(directory) == before
    assert saved_by(tiny, directory, ["the first"])[:2] == (0, [])


STUCK = """
import os, random, sys, time
import mlx.core as mx
from redrafter_mlx.server.__main__ import main as serve

save, rng = mx.save_safetensors, random.Random(int(os.environ["TURN"]))

def half(path, *what):
    save(path, *what)
    if rng.random() < 0.6:
        os.truncate(path, rng.randrange(os.path.getsize(path)))
        time.sleep(600)

mx.save_safetensors = half
sys.exit(serve())
"""
"""The command, that gets stuck while it writes a file: here a kill finds it for certain."""


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_saves_leaves_what_can_be_read(tiny, tmp_path):  # noqa: F811
    """Six times, in the middle of a file or at any moment: no crash, and never a wrong text."""
    directory, rng = tmp_path / "texts", random.Random(SEED)
    prompts = [f"{word} of the end " * 40 for word in ("one", "two", "three")]
    code, log, expected = saved_by(tiny, tmp_path / "none", prompts)
    assert (code, log) == (0, [])
    torn = warm = 0
    for turn in range(6):
        how = {} if turn % 2 else {"program": ("-c", STUCK), "TURN": str(turn)}
        process, address = start(tiny, "--prompt-cache-dir", str(directory), **how)
        reply = chat(address, messages=[{"role": "user", "content": prompts[0]}]).json()
        warm += reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert [reply["choices"][0]["message"]["content"], *talk(address, prompts[1:])] == expected
        talk(address, [f"{turn} is new" * 20, f"{turn} is new, too" * 20])  # something to save
        process.send_signal(signal.SIGTERM)
        if not turn % 2:
            wait_until(lambda ends=process.poll: unfinished(directory) or ends() is not None)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        code, log = end_of(process)
        assert code in (0, -signal.SIGKILL)
        assert log == []  # what was read was whole
        torn += bool(unfinished(directory))
    assert torn > 1
    assert warm > 1
    code, log, said = saved_by(tiny, directory, prompts)
    assert (code, log, said) == (0, [], expected)
    assert not unfinished(directory)


def unfinished(directory):
    return list(directory.glob(".prefix-*"))
