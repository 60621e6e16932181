"""Reads a recurrent head from a directory: config.json and *.safetensors in Apple's layout.

Extensions of the layout: `draft_vocab_size` with the tensor `d2t` (EAGLE-3's convention: the
target's id of draft id d is d + d2t[d]); `tied_output`, the output layer being rows of the target's
own head; `fused_layers` of the target, read beside its final hidden state; `lookback_heads` of
`lookback_size`, which attend to the text so far; and mlx's quantised linear layers with
`quantization` in the config. Shape letters: D draft vocabulary, V vocabulary, h hidden size, e exit
size.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.head import HeadConfig, RecurrentHead
from redrafter_mlx.drafters.tensors import (
    CONVERTER,
    check_draft_size,
    check_size,
    draft_ids,
    load_weights,
    quantize_like,
    read_json,
    read_tensors,
    write_head,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device

MODEL_TYPE = "recurrent_drafting_drafter"
UNUSED = {
    "emb_norm.weight": "the reference code loads it and never applies it",
    "t2d": "d2t says the same",
}
LOOKBACK_NUMBERS = ("lookback.carry", "lookback.nothing")
LOOKBACK_MODULES = (
    "lookback.key_context", "lookback.key_token", "lookback.query_context", "lookback.query_token",
    "lookback.query_state", "lookback.out",
)  # fmt: skip
_log = logging.getLogger("redrafter_mlx")


def load_head(path: Path, dtype: mx.Dtype) -> tuple[RecurrentHead, mx.array]:
    """The head in `path`, and its d2t as target token ids (D,) int32.

    Weights are cast to `dtype`, the target's. Raises UserError that says which file or tensor is
    wrong and how.
    """
    settings = _read_config(path / "config.json")
    tensors = read_tensors(path)
    for name in UNUSED.keys() & tensors.keys():
        _log.info("%s: %s is ignored: %s", path, name, UNUSED[name])
        del tensors[name]
    config = _infer_config(path, settings, tensors)
    offsets = tensors.pop("d2t", None)
    offsets = None if offsets is None else device.read(offsets)[0]
    ids = draft_ids(path, config.vocab_size, config.draft_vocab_size, offsets)
    head = empty_head(path / "config.json", config)
    if "quantization" in settings:
        quantize_like(path, head, settings["quantization"], tensors)
    load_weights(path, head, tensors, dtype)
    return head, mx.array(ids, dtype=mx.int32)


def empty_head(where: object, config: HeadConfig) -> RecurrentHead:
    """A head with parameters still to be loaded; UserError for sizes that no array can have."""
    try:
        return RecurrentHead(config)
    except OverflowError as error:
        raise UserError(f"{where}: its sizes are larger than any array can be: {error}") from error


def own_settings(config: HeadConfig) -> dict[str, Any]:
    """The keys of config.json that only this package knows; none for a head as the paper has it."""
    settings: dict[str, Any] = {}
    if config.tied_output:
        settings["tied_output"] = True
    if config.fused_layers:
        settings["fused_layers"] = list(config.fused_layers)
    if config.lookback_heads:
        settings["lookback_heads"] = config.lookback_heads
        settings["lookback_size"] = config.lookback_size
    return settings


def save_head(path: Path, head: RecurrentHead, ids: mx.array, dtype: mx.Dtype) -> None:
    """Write a head's config.json and model.safetensors into the directory `path`.

    ids    (D,) the target's token id of each draft id
    dtype  of the weights
    """
    config = head.config
    settings = {
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_blocks,
        "rnn": config.rnn,
        "draft_vocab_size": config.draft_vocab_size,
    }
    settings |= own_settings(config)
    tensors = {name: x.astype(dtype) for name, x in tree_flatten(head.parameters())}
    tensors["d2t"] = ids.astype(mx.int64) - mx.arange(ids.size, dtype=mx.int64)
    write_head(path, settings, tensors)


def _read_config(path: Path) -> dict:
    settings = read_json(path)
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found != MODEL_TYPE:
        raise UserError(
            f"{path}: model_type is {found!r}, not {MODEL_TYPE!r}: this is not a recurrent draft "
            f"head in the layout that this package reads; {CONVERTER} reads the others"
        )
    return settings


def check_flag(where: object, key: str, value: Any) -> bool:
    """`value` if it is true or false; UserError otherwise."""
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}, not true or false")
    return value


def count_blocks(names: Iterable[str]) -> int:
    """Residual blocks, by the tensor names: one exporter's config.json gives a wrong number."""
    return sum(bool(re.fullmatch(r"lm_head\.\d+\.linear\.weight", name)) for name in names)


def _infer_config(path: Path, settings: dict, tensors: dict[str, mx.array]) -> HeadConfig:
    where = path / "config.json"
    settings = {"draft_vocab_size": settings.get("vocab_size"), **settings}
    keys = ("vocab_size", "hidden_size", "exit_dim", "draft_vocab_size")
    sizes = {key: check_size(where, key, settings.get(key)) for key in keys}
    check_draft_size(where, sizes["draft_vocab_size"], sizes["vocab_size"])
    return HeadConfig(
        **sizes,
        num_blocks=count_blocks(tensors),
        rnn=check_flag(where, "rnn", settings.get("rnn", False)),
        tied_output=tied_output(where, settings),
        fused_layers=fused_layers(where, settings),
        **lookback(where, settings),
    )


def tied_output(where: object, settings: Mapping[str, Any]) -> bool:
    """Whether config.json says that the output layer is rows of the target's head."""
    tied = check_flag(where, "tied_output", settings.get("tied_output", False))
    exit_dim, hidden_size = settings.get("exit_dim"), settings.get("hidden_size")
    if tied and exit_dim != hidden_size:
        raise UserError(
            f"{where}: a tied output needs an exit_dim of hidden_size {hidden_size}, not {exit_dim}"
        )
    return tied


def fused_layers(where: object, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers of the target that config.json says the head reads beside its hidden state."""
    layers = settings.get("fused_layers", [])
    if not isinstance(layers, list) or not all(type(i) is int and 0 <= i < 1000 for i in layers):
        raise UserError(f"{where}: fused_layers is {layers!r}, not layer numbers")
    return tuple(layers)


def lookback(where: object, settings: Mapping[str, Any]) -> dict[str, int]:
    """How many attention heads, of what size, config.json says look back at the text."""
    if not settings.get("lookback_heads", 0):
        return {}
    keys = ("lookback_heads", "lookback_size")
    return {key: check_size(where, key, settings.get(key)) for key in keys}
