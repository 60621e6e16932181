"""Kernels of our own where mlx's are slow on a CPU: the same values and gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from redrafter_mlx import device

X = np.concatenate([np.linspace(-100, 100, 4001), [-1e30, -0.0, 0.0, 1e4]]).astype(np.float32)


def compiled(function):
    return device.fused(mx.value_and_grad(lambda x: function(x).sum()))


def test_powers_of_e():
    x = X[X <= 0]
    ours = np.array(device.fused(device.exp)(mx.array(x)))
    true = np.exp(x.astype(float))
    large = true > 1e-37
    error = np.abs(ours[large] / true[large] - 1)
    assert (error < 3e-7 + 1e-7 * np.abs(x[large])).all()  # `x` itself is rounded
    assert (ours[~large] < 2e-37).all()


def test_silu():
    value, gradient = compiled(device.silu)(mx.array(X[:4001]))
    expected, slope = compiled(nn.silu)(mx.array(X[:4001]))
    assert mx.allclose(value, expected, rtol=1e-6)
    assert mx.allclose(gradient, slope, atol=1e-6)
    assert mx.allclose(device.silu(mx.array(X)), nn.silu(mx.array(X)), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 50)])
def test_softmax(shape):
    draw = np.random.default_rng(0)
    x = mx.array(draw.normal(size=shape).astype(np.float32) * 30)
    value, gradient = compiled(lambda x: device.softmax(x)[0])(x)
    expected, probs = compiled(lambda x: mx.logsumexp(x, axis=-1))(x)
    assert mx.allclose(value, expected, rtol=1e-6)
    assert mx.allclose(gradient, probs, atol=1e-6)
    assert mx.allclose(device.softmax(x)[1], mx.softmax(x, axis=-1), atol=1e-6)
