"""What a finding about a model depends on, as text that can be compared: weights, code, machine."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import redrafter_mlx
from redrafter_mlx.machine import blas, device

OURS = ("rounds", "target")
"""Parts of this package that take part in verifying a tree."""


def conditions() -> dict[str, str]:
    """The machine, and what computes on it."""
    system = f"{platform.system()} {platform.machine()}"
    return {
        "machine": f"{device.chip()}, {system}, {os.cpu_count()} cores",
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "blas": str(blas.preload()),
    }


def of_weights(modules: Iterable[nn.Module]) -> str:
    """12 hex digits, from the name, shape, type and one corner of each weight."""
    parameters = [entry for module in modules for entry in tree_flatten(module.parameters())]
    corners = [x[(slice(0, 4),) * x.ndim].astype(mx.float32) for _, x in parameters]
    digest = hashlib.sha256()
    values = device.read(*corners) if corners else ()
    for (name, x), corner in zip(parameters, values, strict=True):
        digest.update(f"{name} {x.shape} {x.dtype}".encode())
        digest.update(corner.tobytes())
    return digest.hexdigest()[:12]


def of_code(model: nn.Module) -> str:
    """12 hex digits, from the files whose code computes this model's trees.

    Raises OSError when some of it is in no file, as what a notebook has patched.
    """
    package = Path(redrafter_mlx.__file__).parent
    files = {str(path) for part in OURS for path in (package / part).rglob("*.py")}
    digest = hashlib.sha256(version("mlx-lm").encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}".encode())
        methods = chain.from_iterable(vars(base).values() for base in type(module).__mro__)
        files.update(each.__code__.co_filename for each in methods if hasattr(each, "__code__"))
    for path in sorted(files):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]
