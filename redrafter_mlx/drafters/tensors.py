"""Tensors and settings of draft heads in files: read, and checked before anything is computed.

Shape letters: D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device

CONVERTER = "redrafter_mlx.convert"
_CONVERT = f"pickles are never read here; '{CONVERTER} --input {{}} --output DIR' converts it"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_PICKLE_STARTS = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_LARGEST = 2**30  # of a size: it fits mlx's 32 bits, and a product of two fits 64


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a drafter needs it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error


def read_tensors(
    path: Path, wanted: Callable[[Collection[str]], Collection[str]] | None = None
) -> dict[str, mx.array]:
    """The tensors of all safetensors files in a directory; UserError if one is damaged.

    wanted  names in all files -> those to read, where the files may hold more than a head
    """
    files = sorted(path.glob("*.safetensors"))
    if wanted is None:
        files = sorted(path.glob("model*.safetensors")) or files
    if not files:
        pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
        hint = f"; {pickles[0]} is a PyTorch file: {_CONVERT.format(path)}" if pickles else ""
        raise UserError(f"{path}: holds no model*.safetensors{hint}")
    opened = {file: _opened(file) for file in files}
    names = {name for found in opened.values() for name in found}
    names = names if wanted is None else set(wanted(names))
    tensors: dict[str, mx.array] = {}
    for file, found in opened.items():
        found = {name: x for name, x in found.items() if name in names}
        try:
            mx.eval(found)
        except (RuntimeError, ValueError) as error:
            raise _incomplete(file, error) from error
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{file}: holds {', '.join(twice)} again; one file has it already")
        tensors.update(found)
    return tensors


def write_head(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> None:
    """Write model.safetensors, whole or not at all, and then config.json into a directory."""
    partial = path / ".model.partial.safetensors"
    mx.save_safetensors(str(partial), dict(tensors), {"format": "mlx"})
    os.replace(partial, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def tensor_names(path: Path) -> set[str]:
    """Names of all tensors in a directory's safetensors files, which are not read."""
    found: set[str] = set()
    for file in path.glob("*.safetensors"):
        with suppress(RuntimeError, ValueError):  # damaged: reported when it is read
            found |= mx.load(str(file)).keys()
    return found


def _opened(file: Path) -> dict[str, mx.array]:
    """The tensors of one file, none of them read yet."""
    if looks_pickled(_first_bytes(file)):
        raise UserError(f"{file}: is a pickled PyTorch file: {_CONVERT.format(file)}")
    try:
        return mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise _incomplete(file, error) from error


def _incomplete(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: is not a complete safetensors file: {str(error).splitlines()[0]}")


def looks_pickled(start: bytes) -> bool:
    """Whether a file that starts so is PyTorch's, not a safetensors file.

    The length of a safetensors header may begin with the same bytes; its JSON follows.
    """
    return start[:2] in _PICKLE_STARTS and start[8:9] != b"{"


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(9)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def check_size(where: object, key: str, value: Any) -> int:
    """`value` if it is a size that an array can have; UserError names the key and the value."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
        raise UserError(f"{where}: {key} is {value!r}, not a positive number")
    return value


def check_draft_size(where: object, draft_vocab_size: int, vocab_size: int) -> None:
    """A head cannot propose more ids than its target has."""
    if draft_vocab_size > vocab_size:
        raise UserError(
            f"{where}: draft_vocab_size {draft_vocab_size} is above vocab_size {vocab_size}"
        )


def draft_ids(
    where: object, vocab_size: int, draft_vocab_size: int, offsets: np.ndarray | None
) -> np.ndarray:
    """The target's token id of each draft id, (D,) int64.

    offsets  the tensor d2t (D,), or None if the checkpoint has none

    Raises UserError if it is missing, or does not map to distinct ids of the target.
    """
    check_draft_size(where, draft_vocab_size, vocab_size)
    ids = np.arange(draft_vocab_size)
    if offsets is None:
        if draft_vocab_size < vocab_size:
            raise UserError(f"{where}: has a draft_vocab_size but no d2t to say which ids it holds")
        return ids
    if offsets.shape != ids.shape:
        raise UserError(f"{where}: d2t has shape {offsets.shape}, draft_vocab_size is {ids.size}")
    if not np.issubdtype(offsets.dtype, np.integer):
        raise UserError(f"{where}: d2t holds {offsets.dtype}, not whole numbers")
    ids = ids + offsets.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) < len(ids):
        raise UserError(f"{where}: d2t does not map to distinct ids below {vocab_size}")
    return ids


def quantize_like(path: Path, head: nn.Module, settings: dict, tensors: dict) -> None:
    """Quantise the modules of a head whose tensors are quantised.

    settings  group_size and bits; under a module's name, its own if they differ
    """
    packed = lambda name: f"{name}.scales" in tensors
    try:
        nn.quantize(
            head,
            **_packing(settings),
            class_predicate=lambda name, module: (
                packed(name) and (name not in settings or _packing(settings[name]))
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'config.json'}: quantization {settings} is unusable: {error}"
        ) from error


def _packing(settings: dict) -> dict[str, int]:
    found = {key: settings[key] for key in ("group_size", "bits")}
    if any(type(value) is not int for value in found.values()) or found["group_size"] < 1:
        raise ValueError("group_size and bits must be positive whole numbers")
    return found


def load_weights(
    where: object, head: nn.Module, weights: Mapping[str, mx.array], dtype: mx.Dtype
) -> None:
    """Give a head its weights as `dtype`, except those that it does not cast.

    Raises UserError unless they are exactly its parameters, each of its shape and kind, and finite.
    """
    expected = dict(tree_flatten(head.parameters()))
    shapes = {name: x.shape for name, x in weights.items()}
    check_names_and_shapes(where, {n: x.shape for n, x in expected.items()}, shapes)
    is_packed = lambda x: x.dtype == mx.uint32
    for name, like in expected.items():
        found = weights[name]
        if is_packed(found) != is_packed(like) or (
            not is_packed(found) and not mx.issubdtype(found.dtype, mx.floating)
        ):
            kind = "packed integers" if is_packed(like) else "floating-point numbers"
            raise UserError(f"{where}: {name} holds {found.dtype}, not {kind}")
    finite = device.read(*(mx.isfinite(weights[n].astype(dtype)).all() for n in expected))
    if bad := [name for name, ok in zip(expected, finite, strict=True) if not ok]:
        raise UserError(f"{where}: {', '.join(bad)} holds NaN or infinite values as {dtype}")
    casts = getattr(head, "casts", lambda name: True)
    is_cast = lambda name, x: mx.issubdtype(x.dtype, mx.floating) and casts(name)
    head.load_weights([(n, x.astype(dtype) if is_cast(n, x) else x) for n, x in weights.items()])
    device.finish(head.parameters())


def check_names_and_shapes(
    where: object,
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    name_of: Mapping[str, str] | None = None,
) -> None:
    """Exactly the expected names, each with its shape.

    name_of  what the file calls a tensor, where that is not our name
    """
    shown = lambda names: ", ".join((name_of or {}).get(name, name) for name in names)
    if missing := sorted(expected.keys() - shapes.keys()):
        raise UserError(f"{where}: lacks the tensors {shown(missing)}")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise UserError(f"{where}: holds tensors that no part of the head uses: {shown(extra)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"{where}: {shown([name])} has shape {shapes[name]}, expected {shape}")
