"""What depends on the device: the one place where the host waits for it, and how weights lie."""

from __future__ import annotations

import math
import os
import platform
import re
import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path

import mlx.core as mx
import numpy as np

has_failed = False
"""Whether a computation that was waited for has failed: another process may have gone."""


def read(*arrays: mx.array) -> tuple[np.ndarray, ...]:
    """Evaluate `arrays` together and hand them to numpy: one synchronisation, however many.

    On unified memory nothing is copied: the result is a view that keeps its array alive.
    bfloat16 has no numpy type: cast before reading.
    """
    finish(arrays)
    return tuple(np.array(array, copy=False) for array in arrays)


def finish(*arrays) -> None:
    """Compute `arrays`, or trees of them, and wait for them."""
    global has_failed
    try:
        mx.eval(arrays)
    except RuntimeError:
        has_failed = True
        raise


def leave_thread() -> None:
    """Wait for the streams of a thread that ends, and close them.

    Streams left open at exit may abort the process (MLX 0.32.4 on a CPU).
    """
    mx.synchronize()
    mx.clear_streams()


def chip() -> str:
    """Name of the chip; of a processor under Linux with its family and model.

    Virtual machines call theirs just "AMD EPYC", whether it has AVX-512 or not.
    """
    name = str(mx.device_info().get("device_name") or platform.processor() or "unknown")
    cpuinfo = Path("/proc/cpuinfo")
    if mx.default_device() != mx.cpu or not cpuinfo.exists():
        return name
    found = cpuinfo.read_text(encoding="utf-8")
    numbers = re.findall(r"^(?:cpu family|model)\s*:\s*(\d+)$", found, re.MULTILINE)[:2]
    return f"{name} (family {numbers[0]}, model {numbers[1]})" if len(numbers) == 2 else name


def machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def by_columns(weight: mx.array) -> mx.array:
    """The same matrix (D, E), laid out by columns on a CPU.

    `x @ weight.T` of a few rows is 10 to 25 % faster that way with OpenBLAS.
    """
    return mx.contiguous(weight.T).T if mx.default_device() == mx.cpu else weight


PATIENCE = 2.0
"""Seconds to wait for a round before the user is told why it takes long."""


def patience(say: Callable[[], None]) -> threading.Timer:
    """A running timer for work that a GPU may have to compile kernels for; `cancel` it afterwards.

    say  called when it takes longer than PATIENCE; never on a CPU, whose kernels are ready
    """
    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    if mx.default_device() != mx.cpu:
        timer.start()
    return timer


_fuses = ContextVar("fuses", default=False)


def fused(function: Callable) -> Callable:
    """The function as one compiled graph; on a CPU with this module's element-wise forms, fused.

    There a C++ compiler makes each fused kernel when it is first used, which takes half a second:
    for work that runs for minutes.
    """

    def traced(*arguments):
        before = _fuses.set(True)
        try:
            return function(*arguments)
        finally:
            _fuses.reset(before)

    return mx.compile(traced)


def ready(function: Callable) -> Callable:
    """The function, compiled to one graph on Metal only: for what must start at once.

    Compiling a fused kernel takes half a second on a CPU and 3 to 4 seconds on CUDA, and a beam
    search has one to three dozen of them (benchmarks/LOG.md).
    """
    return mx.compile(function) if mx.metal.is_available() else function


def _is_fused_on_cpu() -> bool:
    return _fuses.get() and mx.default_device() == mx.cpu


LEAST_POWER = -64.0
"""Of 2. A million millions of such numbers do not change a float32 of 1."""


def exp(x: mx.array) -> mx.array:
    """e to the power of `x` <= 0, float32; without a gradient.

    On a CPU mlx's own takes 13 to 19 ns for each element, this one 3 ns when fused. The relative
    error is 3e-7, or that of `x` where that is larger: 2**n is set as bits, 2**r with r in
    [-1/2, 1/2] is a Taylor polynomial. What is too small to count beside 1 is 0: shares of a
    soft-max would become denormal numbers, with which products are several times as slow.
    """
    if not _is_fused_on_cpu():
        return mx.exp(x)
    power = x * math.log2(math.e)
    counts = power > LEAST_POWER
    power = mx.maximum(power, LEAST_POWER)
    n = mx.floor(power + 0.5)
    r = power - n
    y = mx.zeros_like(r)
    for k in range(6, -1, -1):
        y = y * r + math.log(2) ** k / math.factorial(k)
    return mx.where(counts, y * ((n.astype(mx.int32) + 127) << 23).view(mx.float32), 0.0)


@mx.custom_function
def softmax(x: mx.array) -> tuple[mx.array, mx.array]:
    """log(sum(exp(x))) (..., 1) and the soft-max (..., D), its gradient, of (..., D) float32.

    Together, because the exponentials are what costs. Only the former can be differentiated.
    """
    if not _is_fused_on_cpu():
        return mx.logsumexp(x, axis=-1, keepdims=True), mx.softmax(x, axis=-1)
    most = x.max(axis=-1, keepdims=True)
    powers = exp(x - most)
    total = powers.sum(axis=-1, keepdims=True)
    return most + mx.log(total), powers / total


@softmax.vjp
def _(x, cotangents, outputs):
    return cotangents[0] * outputs[1]


def logsumexp(x: mx.array) -> mx.array:
    """log(sum(exp(x))) (..., 1) of (..., D) float32, where no gradient is asked for."""
    return softmax(x)[0] if _is_fused_on_cpu() else mx.logsumexp(x, axis=-1, keepdims=True)


@mx.custom_function
def probabilities(x: mx.array) -> mx.array:
    """The soft-max (..., D) of (..., D) float32, to be differentiated."""
    if not _is_fused_on_cpu():
        return mx.softmax(x, axis=-1)
    powers = exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@probabilities.vjp
def _(x, cotangents, outputs):
    weighed = cotangents * outputs
    return weighed - outputs * weighed.sum(axis=-1, keepdims=True)


@mx.custom_function
def _silu(x: mx.array) -> tuple[mx.array, mx.array]:
    power = exp(-mx.abs(x))
    sigmoid = mx.where(x >= 0, 1.0, power) / (1 + power)
    return x * sigmoid, sigmoid


@_silu.vjp
def _(x, cotangents, outputs):
    sigmoid = outputs[1]
    return cotangents[0] * sigmoid * (1 + x * (1 - sigmoid))


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    if _is_fused_on_cpu():
        return _silu(x)[0]
    return x * mx.sigmoid(x)
