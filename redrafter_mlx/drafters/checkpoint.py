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
_PICKLES = ("*.bin", "*.pt", "*.pth")
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
    _check_tensors(path, head, tensors)
    is_float = lambda x: mx.issubdtype(x.dtype, mx.floating)
    head.load_weights([(n, x.astype(dtype) if is_float(x) else x) for n, x in tensors.items()])
    mx.eval(head.parameters())
    return head, d2t, config


def _read_config(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a drafter needs it") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found != MODEL_TYPE:
        raise UserError(
            f"{path}: model_type is {found!r}, not {MODEL_TYPE!r}: this is not a recurrent draft "
            "head in the layout of this package; convert it with python -m convert"
        )
    return settings


def _read_tensors(path: Path) -> dict[str, mx.array]:
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
        hint = f"; {pickles[0]} is a PyTorch file: python -m convert" if pickles else ""
        raise UserError(f"{path}: holds no model*.safetensors{hint}")
    tensors: dict[str, mx.array] = {}
    for file in files:
        if file.open("rb").read(2) in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise UserError(
                f"{file}: is a pickled PyTorch file, not safetensors: python -m convert"
            )
        try:
            tensors.update(mx.load(str(file)))
            mx.eval(tensors)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file}: is not a complete safetensors file: {reason}") from error
    return tensors


def _infer_config(path: Path, settings: dict, tensors: dict[str, mx.array]) -> HeadConfig:
    """The number of blocks comes from the tensor names: one exporter's config has another."""
    sizes = {}
    for key in ("vocab_size", "hidden_size", "exit_dim"):
        value = settings.get(key)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path / 'config.json'}: {key} is {value!r}, not a positive number")
        sizes[key] = value
    blocks = [name for name in tensors if re.fullmatch(r"lm_head\.\d+\.linear\.weight", name)]
    return HeadConfig(
        **sizes,
        num_blocks=len(blocks),
        rnn=bool(settings.get("rnn", False)),
        draft_vocab_size=settings.get("draft_vocab_size") or sizes["vocab_size"],
    )


def _draft_ids(path: Path, config: HeadConfig, offsets: mx.array | None) -> mx.array:
    ids = mx.arange(config.draft_vocab_size, dtype=mx.int32)
    if offsets is None:
        return ids
    if offsets.shape != ids.shape:
        raise UserError(f"{path}: d2t has shape {offsets.shape}, draft_vocab_size is {ids.size}")
    (ids,) = device.read(ids + offsets.astype(mx.int32))
    if ids.min() < 0 or ids.max() >= config.vocab_size or len(set(ids.tolist())) < len(ids):
        raise UserError(f"{path}: d2t does not map to distinct ids below {config.vocab_size}")
    return mx.array(ids)


def _quantize_like(path: Path, head: RecurrentHead, settings: dict, tensors: dict) -> None:
    try:
        nn.quantize(
            head,
            group_size=settings["group_size"],
            bits=settings["bits"],
            class_predicate=lambda name, module: f"{name}.scales" in tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'config.json'}: quantization {settings} is unusable: {error}"
        ) from error


def _check_tensors(path: Path, head: RecurrentHead, tensors: dict[str, mx.array]) -> None:
    """Exactly the expected names, each with its shape, and finite."""
    expected = {name: parameter.shape for name, parameter in tree_flatten(head.parameters())}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"{path}: lacks the tensors {', '.join(missing)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"{path}: holds tensors that no part of the head uses: {', '.join(extra)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{path}: {name} has shape {tensors[name].shape}, expected {shape}")
    finite = device.read(*(mx.isfinite(tensors[name]).all() for name in expected))
    if bad := [name for name, ok in zip(expected, finite, strict=True) if not ok]:
        raise UserError(f"{path}: {', '.join(bad)} holds NaN or infinite values")
