"""Reads a recurrent head from a directory: config.json and *.safetensors in Apple's layout.

Extensions of the layout: `draft_vocab_size` with the tensor `d2t` (EAGLE-3's convention: the
target's id of draft id d is d + d2t[d]), and mlx's quantised linear layers with `quantization`
in the config. Shape letters: D draft vocabulary, V vocabulary, h hidden size, e exit size.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from redrafter_mlx import device
from redrafter_mlx.drafters.recurrent import HeadConfig, RecurrentHead
from redrafter_mlx.errors import UserError

MODEL_TYPE = "recurrent_drafting_drafter"
_SAVE_AGAIN = "pickles are never read; save it with safetensors.torch.save_file"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_PICKLE_STARTS = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_LARGEST = 2**30  # of a size: products of two still count in 64 bits, each fits mlx's 32
_UNUSED = {
    "emb_norm.weight": "the reference code loads it and never applies it",
    "t2d": "d2t says the same",
}
_log = logging.getLogger("redrafter_mlx")


def load_head(path: Path, dtype: mx.Dtype) -> tuple[RecurrentHead, mx.array, HeadConfig]:
    """The head in `path`, its d2t as target token ids (D,) int32, and its shape.

    Weights are cast to `dtype`, the target's. Raises UserError that says which file or tensor is
    wrong and how.
    """
    settings = _read_config(path / "config.json")
    tensors = _read_tensors(path)
    for name in _UNUSED.keys() & tensors.keys():
        _log.info("%s: %s is ignored: %s", path, name, _UNUSED[name])
        del tensors[name]
    config = _infer_config(path, settings, tensors)
    d2t = _draft_ids(path, config, tensors.pop("d2t", None))
    head = RecurrentHead(config)
    if "quantization" in settings:
        _quantize_like(path, head, settings["quantization"], tensors)
    _check_tensors(path, head, tensors, dtype)
    is_float = lambda x: mx.issubdtype(x.dtype, mx.floating)
    head.load_weights([(n, x.astype(dtype) if is_float(x) else x) for n, x in tensors.items()])
    mx.eval(head.parameters())
    return head, d2t, config


def _read_config(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a drafter needs it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found != MODEL_TYPE:
        raise UserError(
            f"{path}: model_type is {found!r}, not {MODEL_TYPE!r}: this is not a recurrent draft "
            "head in the reference implementation's layout, the one this package reads"
        )
    return settings


def _read_tensors(path: Path) -> dict[str, mx.array]:
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
        hint = f"; {pickles[0]} is a PyTorch file: {_SAVE_AGAIN}" if pickles else ""
        raise UserError(f"{path}: holds no model*.safetensors{hint}")
    tensors: dict[str, mx.array] = {}
    for file in files:
        if _first_bytes(file) in _PICKLE_STARTS:
            raise UserError(f"{file}: is a pickled PyTorch file: {_SAVE_AGAIN}")
        try:
            found = mx.load(str(file))
            mx.eval(found)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file}: is not a complete safetensors file: {reason}") from error
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(f"{file}: holds {', '.join(twice)} again; one file has it already")
        tensors.update(found)
    return tensors


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(2)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _infer_config(path: Path, settings: dict, tensors: dict[str, mx.array]) -> HeadConfig:
    """The number of blocks comes from the tensor names: one exporter's config has another."""
    sizes = {}
    settings = {"draft_vocab_size": settings.get("vocab_size"), **settings}
    for key in ("vocab_size", "hidden_size", "exit_dim", "draft_vocab_size"):
        value = settings.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise UserError(f"{path / 'config.json'}: {key} is {value!r}, not a positive number")
        sizes[key] = value
    if sizes["draft_vocab_size"] > sizes["vocab_size"]:
        raise UserError(
            f"{path / 'config.json'}: draft_vocab_size {sizes['draft_vocab_size']} is above "
            f"vocab_size {sizes['vocab_size']}"
        )
    if not isinstance(settings.get("rnn", False), bool):
        raise UserError(f"{path / 'config.json'}: rnn is {settings['rnn']!r}, not true or false")
    blocks = [name for name in tensors if re.fullmatch(r"lm_head\.\d+\.linear\.weight", name)]
    return HeadConfig(
        **sizes,
        num_blocks=len(blocks),
        rnn=settings.get("rnn", False),
        tied_output=_tied_output(path, settings),
        fused_layers=_fused_layers(path, settings),
    )


def _tied_output(path: Path, settings: dict) -> bool:
    tied = settings.get("tied_output", False)
    if not isinstance(tied, bool):
        raise UserError(f"{path / 'config.json'}: tied_output is {tied!r}, not true or false")
    if tied and settings["exit_dim"] != settings["hidden_size"]:
        raise UserError(
            f"{path / 'config.json'}: a tied output needs an exit_dim of hidden_size "
            f"{settings['hidden_size']}, not {settings['exit_dim']}"
        )
    return tied


def _fused_layers(path: Path, settings: dict) -> tuple[int, ...]:
    layers = settings.get("fused_layers", [])
    if not isinstance(layers, list) or not all(type(i) is int and 0 <= i < 1000 for i in layers):
        raise UserError(f"{path / 'config.json'}: fused_layers is {layers!r}, not layer numbers")
    return tuple(layers)


def _draft_ids(path: Path, config: HeadConfig, offsets: mx.array | None) -> mx.array:
    ids = mx.arange(config.draft_vocab_size, dtype=mx.int32)
    if offsets is None:
        if config.draft_vocab_size < config.vocab_size:
            raise UserError(f"{path}: has a draft_vocab_size but no d2t to say which ids it holds")
        return ids
    if offsets.shape != ids.shape:
        raise UserError(f"{path}: d2t has shape {offsets.shape}, draft_vocab_size is {ids.size}")
    if not mx.issubdtype(offsets.dtype, mx.integer):
        raise UserError(f"{path}: d2t holds {offsets.dtype}, not whole numbers")
    (ids,) = device.read(ids.astype(mx.int64) + offsets.astype(mx.int64))
    if ids.min() < 0 or ids.max() >= config.vocab_size or len(set(ids.tolist())) < len(ids):
        raise UserError(f"{path}: d2t does not map to distinct ids below {config.vocab_size}")
    return mx.array(ids, dtype=mx.int32)


def _quantize_like(path: Path, head: RecurrentHead, settings: dict, tensors: dict) -> None:
    try:
        group_size, bits = settings["group_size"], settings["bits"]
        if type(group_size) is not int or type(bits) is not int or group_size < 1:
            raise ValueError("group_size and bits must be positive whole numbers")
        nn.quantize(
            head,
            group_size=group_size,
            bits=bits,
            class_predicate=lambda name, module: f"{name}.scales" in tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'config.json'}: quantization {settings} is unusable: {error}"
        ) from error


def _check_tensors(
    path: Path, head: RecurrentHead, tensors: dict[str, mx.array], dtype: mx.Dtype
) -> None:
    """Exactly the expected names, each with its shape, and finite."""
    expected = {name: parameter.shape for name, parameter in tree_flatten(head.parameters())}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"{path}: lacks the tensors {', '.join(missing)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{path}: holds tensors that no part of the head uses: {', '.join(extra)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {tensors[name].shape}, expected {shape}")
    for name, parameter in tree_flatten(head.parameters()):
        found, packed = tensors[name].dtype, parameter.dtype == mx.uint32
        if found != mx.uint32 if packed else not mx.issubdtype(found, mx.floating):
            kind = "packed integers" if packed else "floating-point numbers"
            raise UserError(f"{path}: {name} holds {found}, not {kind}")
    finite = device.read(*(mx.isfinite(tensors[name].astype(dtype)).all() for name in expected))
    if bad := [name for name, ok in zip(expected, finite, strict=True) if not ok]:
        raise UserError(f"{path}: {', '.join(bad)} holds NaN or infinite values as {dtype}")
