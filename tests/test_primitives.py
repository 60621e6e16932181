"""What a round evaluates has a kernel on Metal, as far as reading tells (docs/metal.md)."""

import re

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks import primitives
from families import build
from redrafter_mlx.target.adapter import adapt
from support import random_drafter

pytestmark = pytest.mark.usefixtures("compiled")
HAS_KERNEL = {
    "Add", "AddMM", "Arange", "ArgPartition", "ArgReduce", "ArgSort", "AsType", "Compiled",
    "Concatenate", "Cos", "CustomTransforms", "Divide", "Exp", "FloorDivide", "Full", "Gather",
    "GatherAxis", "GreaterEqual", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift", "Less",
    "LessEqual", "Log", "Log1p", "LogSumExp", "Matmul", "Max", "Maximum", "Minimum", "Multiply",
    "Negative", "Pad", "QuantizedMatmul", "Rsqrt", "Select", "Sigmoid", "Sin", "SliceUpdate",
    "Softmax", "Sqrt", "Square", "Subtract", "Sum", "Dequantize", "AffineQuantize", "Quantize",
}  # fmt: skip
"""Operations with a kernel for the types that are used here."""


def unknown(found) -> set[str]:
    names = {
        re.sub(r"^Compiled\w+$", "Compiled", name) for stage in found.values() for name in stage
    }
    return names - primitives.VIEWS - HAS_KERNEL


def stages(model, dtype=None, bits=None):
    if dtype is not None:
        model.set_dtype(dtype)
    if bits is not None:
        fits = lambda _, module: (
            hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        )
        nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)
    target, drafter = adapt(model), random_drafter(model)
    mx.eval(model.parameters(), drafter.head.parameters(), drafter.d2t)
    prompt = list(range(1, 9))
    found = primitives.of_target(target, prompt)
    context = target.prefill(prompt, chunk=8)
    return found | primitives.of_drafts(drafter, context, 2, 3)


@pytest.mark.parametrize("dtype", [None, mx.bfloat16, mx.float16])
def test_every_operation_of_a_round_has_a_kernel(dtype):
    found = stages(build("llama"), dtype)
    assert unknown(found) == set()
    assert {"Matmul", "Softmax"} <= set(found["plain round"])
    assert {"BitwiseXor", "RightShift"} <= set(found["draft 2x3 sampled"])
    assert primitives.launches(found["draft 2x3 compiled"]) < primitives.launches(
        found["draft 2x3"]
    )


def test_of_a_quantised_model_too():
    found = stages(build("llama"), bits=4)
    assert unknown(found) == set()
    assert "QuantizedMatmul" in found["plain round"]


def test_an_operation_without_a_kernel_is_seen():
    matrix = mx.array([[1.0, 2.0], [0.0, 1.0]])
    bad = primitives.operations(mx.linalg.inv(matrix, stream=mx.cpu) + 1)
    assert unknown({"bad": bad}) == {"Inverse"}


def test_the_table_counts_kernels():
    found = {"a": primitives.operations((mx.arange(4.0) * mx.arange(4.0)).reshape(2, 2))}
    assert "| a | 4 | 3 | Arange 2, Multiply 1 |" in primitives.table(found)
