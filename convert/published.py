"""A head of one of the published kinds, read as the package itself describes the kind."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.published import Kind, built, refuse_strangers
from redrafter_mlx.drafters.tensors import check_names_and_shapes, draft_ids, quantize_like
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line

from .head import Form, Head, Packing, Words, check_type, offsets_in, packing_of
from .kinds import bare, beside, layout_of
from .safetensors import Tensor
from .sources import Source


@dataclass(frozen=True)
class Published(Head):
    """A head of a kind of drafters/kinds.py.

    about    the kind
    names    our names of tensors to those in the result
    layers   modules that mlx can quantise
    rows     modules of which a step reads a row, such as an embedding
    """

    about: Kind
    names: dict[str, str]
    layers: frozenset[str]
    rows: frozenset[str]

    @property
    def kind(self) -> str:
        return self.about.name

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        for place in (self.config, getattr(self.config, "layer", None)):
            for key in ("target_hidden_size", "hidden_size"):
                if hasattr(place, key):
                    return getattr(place, key)
        raise AttributeError(f"no hidden size in {self.config}")

    @property
    def words(self) -> Words:
        told = [
            _told(key.replace("_", " "), x) for key, x in self._shape().items() if x is not False
        ]
        return Words(
            title=f"{self.kind} draft head",
            about=f"A draft head of the kind {self.kind}: {self.about.about}.",
            shape=", ".join(told),
            tags=(self.kind, "speculative-decoding"),
        )

    def form(self, to: str | None) -> Form:
        if to is not None:
            raise UserError(
                f"--to {to} is for recurrent heads; {self.source.path} is a head of the kind "
                f"{self.kind}, which keeps its layout: leave --to out"
            )
        told = self.about.settings(self.config)
        return Form(
            layout=self.layout,
            file="model.safetensors",
            theirs=self._theirs,
            settings=self._settings,
            packed=True,
            reduced="draft_vocab_size" in {**self.source.settings, **told},
            loaded=True,
        )

    def may_be_packed(self, name: str) -> bool:
        module, _, parameter = name.rpartition(".")
        is_weight = parameter == "weight" and self._theirs(name).endswith(".weight")
        return is_weight and module in self.layers

    def bytes_by_part(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            if name.rpartition(".")[0] not in self.rows:
                part = name.partition(".")[0]
                found[part] = found.get(part, 0) + tensor.nbytes
        return found

    def facts(self) -> dict[str, Any]:
        return {"shape": self._shape()}

    def _theirs(self, name: str) -> str:
        module, _, parameter = name.rpartition(".")
        if name in self.names or f"{module}.weight" not in self.names:
            return self.names.get(name, name)
        return f"{self.names[f'{module}.weight'].removesuffix('.weight')}.{parameter}"

    def _settings(self, ids: np.ndarray, packing: Packing | None) -> dict[str, Any]:
        settings = copy.deepcopy(self.source.settings)
        settings = self.about.alone(settings) if self.about.inside else settings
        settings |= self.about.settings(self.config)
        if settings.get("quantization_config") == settings.pop("quantization", None):
            settings.pop("quantization_config", None)  # mlx-lm writes it twice
        if len(ids) < self.vocab_size or "draft_vocab_size" in settings:
            settings["draft_vocab_size"] = len(ids)
        if packing:
            settings["quantization"] = dataclasses.asdict(packing)
        return settings

    def _shape(self) -> dict[str, Any]:
        """The plain values of the kind's own config."""
        found = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        left_out = ("vocab_size", "draft_vocab_size")
        return {k: x for k, x in found.items() if _is_plain(x) and k not in left_out}


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, bool | int | float | str) for part in parts)


def _told(key: str, value: Any) -> str:
    if value is True:
        return key
    return f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def read_published(source: Source, kind: Kind) -> Published:
    """The head of this kind in a checkpoint, read as the package will read the result.

    Raises UserError that names the tensor or the setting that is wrong.
    """
    where, known = source.path, kind.ours(source.tensors)
    left_out = beside(kind, source.tensors)
    refuse_strangers(kind, where, source.tensors.keys() - left_out, known)
    tensors = {ours: source.tensors[theirs] for theirs, ours in sorted(known.items())}
    notes = []
    if left_out:
        notes.append(f"{len(left_out)} tensors of the target beside the head are left out")
    for name in sorted(kind.unused.keys() & tensors.keys()):
        notes.append(f"{tensors.pop(name).name} is dropped: {kind.unused[name]}")
    offsets = tensors.pop("d2t", None)
    packing = packing_of(source, tensors)
    if packing:
        _check_packed_alike(source, known, packing)
    for name, tensor in tensors.items():
        packed = name.endswith(".weight") and f"{name.removesuffix('.weight')}.scales" in tensors
        check_type(where, tensor, tensor.name, packed)
        if 0 in tensor.shape:
            raise UserError(f"{where}: {tensor.name} has shape {tensor.shape}")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config, module = built(kind, where, source.settings, shapes)
    parameters = sum(x.size for _, x in tree_flatten(module.parameters()))
    modules = dict(module.named_modules())
    _check(source, kind, module, tensors, packing)
    sizes = config.vocab_size, config.draft_vocab_size
    ids = draft_ids(where, *sizes, offsets_in(where, offsets))
    return Published(
        source=source,
        layout=layout_of(kind, source.settings),
        config=config,
        tensors=tensors,
        draft_ids=ids,
        packing=packing,
        notes=notes,
        parameters=parameters,
        outputs=kind.outputs(config),
        beside=frozenset(left_out),
        about=kind,
        names={ours: bare(kind, theirs, ours) for theirs, ours in known.items()},
        layers=frozenset(name for name, m in modules.items() if hasattr(m, "to_quantized")),
        rows=frozenset(name for name, m in modules.items() if isinstance(m, nn.Embedding)),
    )


def _check_packed_alike(source: Source, known: Mapping[str, str], packing: Packing) -> None:
    """UserError if config.json packs single layers unlike the rest."""
    told = source.settings["quantization"]
    for module in {name.rpartition(".")[0] for name in known}:
        own = told.get(module)
        if isinstance(own, dict) and any(own.get(k) != x for k, x in vars(packing).items()):
            raise UserError(
                f"{source.config_path}: quantization packs {module} unlike the rest: start from "
                "the unquantised head"
            )


def _check(
    source: Source, kind: Kind, module: nn.Module, tensors: Mapping[str, Tensor],
    packing: Packing | None,
) -> None:  # fmt: skip
    """Exactly the tensors that the module needs, each of its shape. Nothing is computed."""
    type_of = lambda tensor: mx.uint32 if tensor.dtype == "U32" else mx.float32
    try:
        empty = {name: mx.zeros(x.shape, type_of(x)) for name, x in tensors.items()}
        ready = kind.ready(module, empty)
        if packing:
            quantize_like(source.config_path.parent, module, source.settings["quantization"], ready)
        expected = {name: x.shape for name, x in tree_flatten(module.parameters())}
        found = {name: x.shape for name, x in ready.items()}
    except UserError:
        raise
    except Exception as error:  # whatever mlx-lm's own renaming of a layer's tensors raises
        raise UserError(
            f"{source.path}: its tensors do not make a head of the kind {kind.name}: "
            f"{one_line(error)}"
        ) from error
    shown = {name: _shown(name, tensors) for name in expected.keys() | found.keys()}
    check_names_and_shapes(source.path, expected, found, shown)


def _shown(name: str, tensors: Mapping[str, Tensor]) -> str:
    """What the file calls a tensor or, for one that is missing, would call it, going by the others.

    Example: layers.0.mlp.up_proj.weight where layers.0.input_layernorm.weight is called
    midlayer.input_layernorm.weight -> midlayer.mlp.up_proj.weight
    """
    if name in tensors:
        return tensors[name].name
    starts = {}
    for ours, tensor in tensors.items():
        pairs = zip(reversed(ours), reversed(tensor.name), strict=False)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        starts[ours[: len(ours) - same]] = tensor.name[: len(tensor.name) - same]
    start = max(filter(name.startswith, starts), key=len, default="")
    return starts.get(start, "") + name[len(start) :]
