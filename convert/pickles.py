"""PyTorch files, read by a loader that cannot run code."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from redrafter_mlx.errors import UserError

from .safetensors import Tensor

NESTED = ("state_dict", "model_state_dict", "model", "drafter", "module")
"""Keys under which training scripts put the tensors."""

_TYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint32": "U32",
}  # fmt: skip


def import_torch(purpose: str) -> ModuleType:
    """torch, or a UserError that says how to get it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{purpose} needs PyTorch, which is not installed: pip install torch"
        ) from error
    return torch


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, .pt or .pth file, by name; mapped into memory where possible.

    Raises UserError if it holds anything but tensors and plain containers: such a file could run
    code, and is not opened further.
    """
    torch = import_torch(f"reading {file.name}")
    mapped = _is_plain_archive(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises whatever the file makes it raise
        raise UserError(_refusal(file, error)) from error
    found = _unwrapped(found)
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file}: holds a {type(found).__name__}, not tensors by name")
    others = [str(n) for n, x in found.items() if not (type(n) is str and torch.is_tensor(x))]
    if others:
        raise UserError(f"{file}: holds things that are not tensors: {', '.join(sorted(others))}")
    return {name: _tensor(torch, file, name, tensor) for name, tensor in found.items()}


def _is_plain_archive(file: Path) -> bool:
    """Whether it is a zip archive, as torch.save has written since 1.6; not a compressed one."""
    packed = []
    try:
        empty, is_archive = not file.stat().st_size, zipfile.is_zipfile(file)
        if is_archive:
            with zipfile.ZipFile(file) as archive:
                packed = [i.filename for i in archive.infolist() if i.compress_type]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except Exception as error:  # zipfile raises many things over a damaged table of contents
        raise UserError(f"{file}: is not a complete PyTorch file: {error}") from error
    if empty:
        raise UserError(f"{file}: is empty; get it again")
    if packed:
        raise UserError(f"{file}: {packed[0]} is compressed, which torch.save never does")
    return is_archive


def _refusal(file: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if found := re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", text):
        name = found[1].rstrip(".")
        return f"{file}: wants to run {name} when it is opened: refused; get the head elsewhere"
    if "weights_only" in text or "Weights only" in text:
        return f"{file}: is damaged, or no PyTorch file of tensors; nothing in it was run"
    reason = text.partition(". ")[0][:200] or type(error).__name__
    return f"{file}: is not a complete PyTorch file: {reason}"


def _unwrapped(found: Any) -> Any:
    """The tensors, from under the key of a training script if there is one."""
    for key in NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            return found[key]
    return found


def _tensor(torch: ModuleType, file: Path, name: str, tensor: Any) -> Tensor:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or kind not in _TYPES:
        raise UserError(f"{file}: {name} is a {tensor.layout} tensor of {kind}, not plain numbers")
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise UserError(
            f"{file}: {name} claims the shape {tuple(tensor.shape)}, its data are {held} bytes"
        )
    bits = tensor.view(torch.int16) if kind == "bfloat16" else tensor

    def rows(start: int, stop: int) -> np.ndarray:
        piece = bits[start:stop] if tensor.dim() else bits.reshape(1)
        array = piece.contiguous().numpy()
        return array.view(np.uint16) if kind == "bfloat16" else array

    return Tensor(name, tuple(tensor.shape), _TYPES[kind], file, rows)
