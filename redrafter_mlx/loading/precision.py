"""Models compute in float32 on a CPU, where 16-bit and quantised products use no BLAS."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from redrafter_mlx.machine import device

PARTS = 16
"""Evaluations: a thread that runs Python delays this one after each, by 5 ms."""

QUANTISED = nn.QuantizedLinear | nn.QuantizedEmbedding


def compute_in_float32(model: nn.Module) -> nn.Module:
    """Cast a model to float32 in place, quantised linear and embedding layers included.

    Works by a few layers at a time, so that memory never holds the model twice. The weights of
    linear layers are laid out by columns: with OpenBLAS, products of a few rows are 10 to 25 %
    faster that way.

    Returns:
        The same model.
    """
    kinds = nn.Linear | nn.Embedding | QUANTISED
    left = [named for named in model.named_modules() if isinstance(named[1], kinds)]
    at_once = math.ceil(len(left) / PARTS)
    while left:
        made = []
        for _ in range(min(at_once, len(left))):
            name, layer = left.pop()
            if isinstance(layer, QUANTISED):
                layer = _plain_layer(layer)
                model.update_modules(tree_unflatten([(name, layer)]))
            layer.weight = layer.weight.astype(mx.float32)
            if isinstance(layer, nn.Linear):
                layer.weight = device.by_columns(layer.weight)
            made.append(layer.weight)
        device.finish(made)
    model.set_dtype(mx.float32)
    return model


def _plain_layer(
    layer: nn.QuantizedLinear | nn.QuantizedEmbedding,
) -> nn.Linear | nn.Embedding:
    # Built with a 1x1 weight: the constructor would fill a full matrix with random numbers.
    plain = nn.Embedding(1, 1) if isinstance(layer, nn.QuantizedEmbedding) else nn.Linear(1, 1)
    biases = layer.get("biases")
    if biases is not None:
        biases = biases.astype(mx.float32)
    scales = layer.scales if biases is None else layer.scales.astype(mx.float32)
    plain.weight = mx.dequantize(
        layer.weight, scales, biases, layer.group_size, layer.bits, layer.mode
    )
    if "bias" in layer:
        plain.bias = layer.bias
    else:
        plain.pop("bias", None)
    return plain
