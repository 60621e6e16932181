"""Kernels of our own where mlx's are slow on a CPU: the same values and gradients."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from families import build
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import CACHE_VARIABLE
from support import generation, random_drafter, tiny_prompt

pytestmark = pytest.mark.usefixtures("compiled")
X = np.concatenate([np.linspace(-100, 100, 4001), [-1e30, -0.0, 0.0, 1e4]]).astype(np.float32)


def with_gradient(function):
    return device.fused(mx.value_and_grad(lambda x: function(x).sum()))


def test_powers_of_e():
    x = X[X <= 0]
    ours = np.array(device.fused(device.exp)(mx.array(x)))
    true = np.exp(x.astype(float))
    counts = true > 2.0**device.LEAST_POWER
    error = np.abs(ours[counts] / true[counts] - 1)
    assert (error < 3e-7 + 1e-7 * np.abs(x[counts])).all()  # `x` itself is rounded
    assert (ours[~counts] == 0).all()


def test_what_is_masked_is_no_denormal_number():
    """Products are several times as slow with these."""
    x = mx.array(np.array([[0.0, -1.0, 3.0, -50.0, -1e9, -1e9]], np.float32))
    probs = np.array(device.fused(device.probabilities)(x))
    assert (probs[0, -3:] == 0).all()
    np.testing.assert_allclose(probs, mx.softmax(x, axis=-1), atol=1e-7)


def test_silu():
    value, gradient = with_gradient(device.silu)(mx.array(X[:4001]))
    expected, slope = with_gradient(nn.silu)(mx.array(X[:4001]))
    assert mx.allclose(value, expected, rtol=1e-6)
    assert mx.allclose(gradient, slope, atol=1e-6)
    assert mx.allclose(device.silu(mx.array(X)), nn.silu(mx.array(X)), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 50)])
def test_softmax(shape):
    draw = np.random.default_rng(0)
    x = mx.array(draw.normal(size=shape).astype(np.float32) * 30)
    value, gradient = with_gradient(lambda x: device.softmax(x)[0])(x)
    expected, probs = with_gradient(lambda x: mx.logsumexp(x, axis=-1))(x)
    assert mx.allclose(value, expected, rtol=1e-6)
    assert mx.allclose(gradient, probs, atol=1e-6)
    assert mx.allclose(device.softmax(x)[1], mx.softmax(x, axis=-1), atol=1e-6)


DRAFT = """if True:
    import sys
    from families import build
    from support import generation, random_drafter, tiny_prompt
    model = build("llama")
    drafter = random_drafter(model) if "draft" in sys.argv else None
    list(generation(model, tiny_prompt(), drafter, max_tokens=12))
"""


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="kernels are files elsewhere on a GPU")
def test_drafting_makes_no_kernels_on_a_cpu(tmp_path):
    """Each one takes a C++ compiler half a second in front of a first answer."""
    made = {}
    for name in ("plain", "draft"):
        scratch = tmp_path / name
        scratch.mkdir()
        environment = os.environ | {
            "TMPDIR": str(scratch),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())]),
        }
        subprocess.run([sys.executable, "-c", DRAFT, name], env=environment, check=True)
        made[name] = {path.name for path in scratch.rglob("*.so")}
    assert made["plain"], "MLX keeps its kernels somewhere else now"
    assert made["draft"] == made["plain"]


def test_waiting_for_a_gpus_kernels_is_explained_after_a_while(monkeypatch):
    """A GPU cannot be had here: what is there is told to be one."""
    said = threading.Event()
    monkeypatch.setattr(device, "PATIENCE", 0.01)
    timer = device.patience(said.set)
    assert not said.wait(0.1), "on a CPU kernels are ready"
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    timer = device.patience(said.set)
    timer.cancel()
    assert not said.wait(0.1), "what came in time needs no word"
    timer = device.patience(said.set)
    assert said.wait(2)
    timer.cancel()


def test_the_first_run_on_a_gpu_says_why_it_waits(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    model = build("llama")
    drafter = random_drafter(model)
    run, later = (
        generation(model, tiny_prompt(6), drafter, 60, draft=DraftOptions()) for _ in "12"
    )
    with caplog.at_level(logging.INFO, "redrafter_mlx"):
        run._say_first_use()
        assert "compiled for this GPU" in caplog.text
        caplog.clear()
        run._say_first_use()
        assert caplog.text == "", "once is enough"
        list(run)
        caplog.clear()
        later._say_first_use()
        assert caplog.text == "", "costs are known, so kernels are there"
