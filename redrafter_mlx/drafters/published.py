"""Heads as others publish them: what a kind of head is, and how one is read from a directory.

A kind says by which tensors and settings it is recognised, what its shape is, and which of its
parameters each tensor is. Everything else, the checks above all, is the same for all and is here.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.drafters.tensors import (
    check_size,
    draft_ids,
    load_weights,
    quantize_like,
    read_json,
    read_tensors,
    write_head,
)
from redrafter_mlx.drafters.text import SharedVocabulary, TextVocabulary
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.target.adapter import Target

Shapes = Mapping[str, tuple[int, ...]]
Experiences = dict[float, Experience]
WRAPPERS = ("", "module.", "model.", "draft_model.", "_orig_mod.")
"""What a training script may have put before every name."""
ROPE_BASE = 10_000.0
"""Base of rotary positions where config.json names none."""


@dataclass(frozen=True)
class Kind:
    """One kind of head.

    name, about  for messages and --help
    recognises   (settings, names of the tensors) -> whether a checkpoint is one
    ours         names -> those of the head's tensors, each with the name of our parameter; the ids
                 of a reduced vocabulary are `d2t`
    config       (where, settings, shapes by our names) -> the head's shape, with the vocab_size of
                 its target and its own draft_vocab_size; raises UserError
    head         shape -> the module, with parameters still to be loaded
    drafter      (target, module, draft ids (D,), experience) -> the drafter; raises UserError if
                 the head is another target's
    outputs      shape -> our modules whose rows are the draft ids, none where the target's output
                 layer is read; None: its vocabulary cannot be reduced
    settings     shape -> keys of config.json that the tensors tell and that a reader may look for
    unused       our names of tensors that are dropped, and why
    inside       whether it lies among the tensors of the target, which are left alone
    ready        (module, weights) -> weights, where the names of a layer's tensors are the target's
                 own to change
    alone        config.json of the target -> that of the head by itself, where it lies inside
    """

    name: str
    about: str
    recognises: Callable[[Mapping[str, Any], Collection[str]], bool]
    ours: Callable[[Collection[str]], dict[str, str]]
    config: Callable[[object, Mapping[str, Any], Shapes], Any]
    head: Callable[[Any], nn.Module]
    drafter: Callable[[Target, nn.Module, np.ndarray, Experiences], Drafter]
    outputs: Callable[[Any], tuple[str, ...] | None] = lambda config: None
    settings: Callable[[Any], dict[str, Any]] = lambda config: {}
    unused: Mapping[str, str] = field(default_factory=lambda: {"t2d": "d2t says the same"})
    inside: bool = False
    ready: Callable[[nn.Module, dict[str, mx.array]], dict[str, mx.array]] = lambda head, weights: (
        weights
    )
    alone: Callable[[Mapping[str, Any]], dict[str, Any]] = dict


def shards_of(kind: Kind, weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    """The files in which a head's tensors lie, each with those that it holds.

    weight_map  of a model.safetensors.index.json: name of a tensor -> file

    Together with `kind.alone`'s config.json these tensors, under the same names, are the head.
    """
    files: dict[str, list[str]] = {}
    for name in sorted(kind.ours(weight_map)):
        files.setdefault(weight_map[name], []).append(name)
    return files


def unwrapped(names: Collection[str], known: Callable[[str], str | None]) -> dict[str, str]:
    """Names to ours, without a wrapper's prefix: the one under which most are `known`.

    known  a name without the prefix -> ours; None if it is not the head's
    """

    def under(prefix: str) -> dict[str, str]:
        inner = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        return {name: ours for name, bare in inner.items() if (ours := known(bare))}

    return max(map(under, WRAPPERS), key=len)


def load_published(
    kind: Kind, path: Path, dtype: mx.Dtype, settings: Mapping[str, Any] | None = None
) -> tuple[nn.Module, np.ndarray]:
    """The head in a directory, and the target's token id of each of its draft ids (D,).

    settings  instead of its config.json

    Weights are cast to `dtype`, the target's, except those that the head does not cast. Raises
    UserError that says what is wrong and where.
    """
    settings = read_json(path / "config.json") if settings is None else settings
    tensors = read_tensors(path, kind.ours if kind.inside else None)
    names = kind.ours(tensors)
    refuse_strangers(kind, path, tensors, names)
    weights = {ours: tensors[theirs] for theirs, ours in names.items()}
    for name in kind.unused.keys() & weights.keys():
        del weights[name]
    offsets = weights.pop("d2t", None)
    packed = {name: x.shape for name, x in weights.items()}
    config, head = built(kind, path, settings, packed)
    weights = kind.ready(head, weights)
    if "quantization" in settings:
        quantize_like(path, head, _by_our_names(settings["quantization"], names), weights)
    load_weights(path, head, weights, dtype)
    read = None if offsets is None else device.read(offsets)[0]
    return head, draft_ids(path, config.vocab_size, config.draft_vocab_size, read)


def _by_our_names(quantization: Any, names: Mapping[str, str]) -> Any:
    """What config.json says about single modules, by our names."""
    if not isinstance(quantization, dict):
        return quantization
    module = lambda name: name.rpartition(".")[0]
    ours = {module(theirs): module(name) for theirs, name in names.items()}
    return {ours.get(key, key): value for key, value in quantization.items()}


def refuse_strangers(
    kind: Kind, where: object, names: Collection[str], known: Mapping[str, str]
) -> None:
    """UserError for tensors that a kind does not know, and for a tensor that is there twice."""
    if strangers := sorted(set(names) - known.keys()):
        shown = ", ".join(strangers[:6]) + ", ..." * (len(strangers) > 6)
        raise UserError(
            f"{where}: holds tensors that no part of the head uses ({kind.name}): {shown}"
        )
    counts = collections.Counter(known.values())
    twice = [theirs for theirs, ours in known.items() if counts[ours] > 1]
    if twice:
        raise UserError(f"{where}: {' and '.join(sorted(twice))} are the same tensor")


def built(
    kind: Kind, where: object, settings: Mapping[str, Any], shapes: Shapes
) -> tuple[Any, nn.Module]:
    """The shape of a head, and its module with parameters still to be loaded.

    shapes  by our names, of packed weights as they are packed; d2t and unused ones left out

    Raises UserError, whatever the settings and the shapes are.
    """
    check_numbers(where, shapes)
    try:
        config = kind.config(where, settings, unpacked_shapes(where, settings, shapes))
        return config, kind.head(config)
    except UserError:
        raise
    except Exception as error:  # from a wrong type to what mlx-lm makes of odd rope settings
        raise UserError(
            f"{where}: config.json and tensors do not make a head of the kind {kind.name}: "
            f"{one_line(error)}"
        ) from error


def check_numbers(where: object, names: Collection[str]) -> None:
    """UserError for a module's number beyond all counts: so many modules would be created."""
    for name in names:
        for part in name.split(".")[:-1]:
            if part.isdecimal() and (len(part) > 6 or int(part) >= len(names)):
                raise UserError(
                    f"{where}: {name[:80]} has a number beyond the {len(names)} tensors there are"
                )


def unpacked_shapes(where: object, settings: Mapping[str, Any], shapes: Shapes) -> Shapes:
    """The shapes that quantised weights have unpacked; scales and biases left out."""
    packed = [name.removesuffix(".scales") for name in shapes if name.endswith(".scales")]
    if not packed:
        return shapes
    bits = settings.get("quantization", {}).get("bits")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise UserError(
            f"{where}: holds packed weights, but config.json has no usable quantization"
        )
    found = {}
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        if module in packed and parameter == "weight" and len(shape) == 2:
            found[name] = (shape[0], shape[1] * 32 // bits)
        elif module not in packed or parameter == "bias":
            found[name] = shape
    return found


def setting(where: object, settings: Mapping[str, Any], key: str, default: Any = None) -> int:
    """A size of at least 1 in config.json; UserError if there is none or it is invalid."""
    value = settings.get(key)
    return check_size(where, key, default if value is None else value)


def agree(where: object, what: str, given: Any, found: int) -> None:
    """UserError if config.json gives a size that the tensors contradict."""
    if given is not None and given != found:
        raise UserError(f"{where}: {what} is {given!r} in config.json and {found} by the tensors")


def matrix(where: object, shapes: Shapes, name: str) -> tuple[int, int]:
    """Rows and columns of a weight that must be there."""
    shape = shapes.get(name)
    if shape is None:
        raise UserError(f"{where}: lacks the tensors {name}")
    if len(shape) != 2 or math.prod(shape) == 0:
        raise UserError(f"{where}: {name} has shape {tuple(shape)}")
    return shape


def layer_settings(
    where: object, settings: Mapping[str, Any], shapes: Shapes, inputs: int = 1
) -> dict[str, Any]:
    """The fields that mlx-lm's ModelArgs of a head's layers have, whose sizes the tensors tell.

    inputs  hidden states side by side that the first layer's attention reads
    """
    heads = setting(where, settings, "num_attention_heads")
    queries, columns = matrix(where, shapes, "layers.0.self_attn.q_proj.weight")
    keys = matrix(where, shapes, "layers.0.self_attn.k_proj.weight")[0]
    intermediate = matrix(where, shapes, "layers.0.mlp.gate_proj.weight")[0]
    hidden_size, head_dim = columns // inputs, queries // heads
    if queries % heads or keys % head_dim:
        raise UserError(
            f"{where}: {queries} queries and {keys} keys do not divide into "
            f"num_attention_heads {heads} of one size"
        )
    agree(where, "hidden_size", settings.get("hidden_size"), hidden_size)
    agree(where, "intermediate_size", settings.get("intermediate_size"), intermediate)
    theta, scaling = rope_of(where, settings)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": 1,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "vocab_size": 1,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": setting(where, settings, "max_position_embeddings", 2048),
        "tie_word_embeddings": False,
    }


def rope_of(where: object, settings: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of rotary positions, for mlx-lm's `initialize_rope`.

    Transformers 5 keeps both in `rope_parameters`; 4 has `rope_theta` beside `rope_scaling`.
    """
    given = settings.get("rope_parameters") or settings.get("rope_scaling")
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where}: its rope settings are {given!r}, not an object")
    given = dict(given or {})
    theta = given.pop("rope_theta", None) or settings.get("rope_theta") or ROPE_BASE
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"{where}: rope_theta is {theta!r}, not a positive number")
    kind = given.get("rope_type", given.get("type", "default"))
    return float(theta), None if kind == "default" else given


def belongs_to(target: Target, hidden_size: int, vocab_size: int) -> None:
    """UserError if a head was made for a target of other sizes."""
    for name, found, needed in (
        ("hidden_size", hidden_size, target.hidden_size),
        ("vocab_size", vocab_size, target.vocab_size),
    ):
        if found != needed:
            raise UserError(
                f"it was made for another target: its {name} is {found}, that of {target.name} is "
                f"{needed}; give a drafter trained for this model"
            )


def targets_vocabulary(target: Target, ids: np.ndarray) -> SharedVocabulary | TextVocabulary:
    """The vocabulary of a head without an output layer, which reads the target's.

    ids  (D,) token ids that it can propose in any text: all of them, or some, and the text's
    """
    if len(ids) == target.vocab_size:
        return SharedVocabulary(mx.arange(target.vocab_size, dtype=mx.int32), target.logits)
    return TextVocabulary(mx.array(ids.astype(np.int32)), target.vocab_size, target.output_layer)


def save_published(
    path: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, mx.array],
    ids: mx.array,
    vocab_size: int,
    dtype: mx.Dtype,
) -> None:
    """Write config.json and model.safetensors of a head into a directory.

    tensors  by the names of its published layout; floating-point ones are written as `dtype`
    ids      (D,) the target's token id of each draft id; d2t is left out where these are all, and
             else config.json says how many they are
    """
    is_float = lambda x: mx.issubdtype(x.dtype, mx.floating)
    kept = {name: x.astype(dtype) if is_float(x) else x for name, x in tensors.items()}
    offsets = ids.astype(mx.int64) - mx.arange(ids.size, dtype=mx.int64)
    if ids.size < vocab_size or device.read(mx.abs(offsets).max())[0]:
        kept["d2t"] = offsets
        settings = {**settings, "draft_vocab_size": ids.size}
    write_head(path, settings, kept)
