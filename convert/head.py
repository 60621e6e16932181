"""A recurrent head in any layout, understood and checked; its weights still in their files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.drafters.checkpoint import (
    UNUSED,
    check_draft_size,
    check_names_and_shapes,
    check_rnn,
    check_size,
    count_blocks,
    draft_ids,
    expected_tensors,
    fused_layers,
    lookback,
    tied_output,
)
from redrafter_mlx.drafters.head import HeadConfig
from redrafter_mlx.errors import UserError

from .layouts import Layout, Recognised, recognise, setting
from .safetensors import Tensor
from .sources import Source

FLOATS = ("F32", "F16", "BF16")
GROUP_SIZES, BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)
_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True)
class Packing:
    """How mlx packs a quantised layer: `bits` per weight, groups of `group_size` in a row."""

    group_size: int
    bits: int


@dataclass(frozen=True)
class Head:
    """A head whose every tensor is known, there once, and of the right shape and type.

    tensors    by our names; d2t and what has no use left out
    draft_ids  (D,) the target's token id of each row of the output layer
    packing    of the quantised layers, None if there are none
    notes      what was left out or is odd, for the user
    """

    source: Source
    layout: Layout
    config: HeadConfig
    tensors: dict[str, Tensor]
    draft_ids: np.ndarray
    packing: Packing | None
    notes: list[str]

    @property
    def output(self) -> str:
        """The module of the output layer."""
        return f"lm_head.{self.config.num_blocks}"

    @property
    def step_bytes(self) -> int:
        """Bytes read for every draft step: all weights; the embedding's one row is the target's."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_head(source: Source, wanted: str | None = None) -> Head:
    """The head in a checkpoint.

    wanted  the only layout to try

    Raises UserError that names the tensor or the setting that is wrong.
    """
    known = recognise(source.path, source.tensors, wanted)
    tensors, notes = _by_our_names(source, known)
    num_blocks = count_blocks(tensors)
    theirs = {ours: name for name, ours in known.ours.items()}
    name_of = lambda name: theirs.get(name) or known.layout.theirs(name, num_blocks)
    offsets, lookup = tensors.pop("d2t", None), tensors.pop("t2d", None)
    for name in sorted(UNUSED.keys() & tensors.keys()):
        del tensors[name]
        notes.append(f"{name_of(name)} is dropped: {UNUSED[name]}")
    if lookup is not None:
        notes.append(f"{name_of('t2d')} is dropped: {UNUSED['t2d']}")
    packing = _packing(source, tensors)
    sizes = _Sizes(source, known.layout, tensors, packing, num_blocks, name_of)
    config = sizes.head_config(offsets, lookup)
    notes += sizes.notes
    packed = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    widths = (packing.group_size, packing.bits) if packing else ()
    expected = expected_tensors(config, packed, *widths)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    shown = {name: name_of(name) for name in expected.keys() | shapes.keys()}
    check_names_and_shapes(
        source.path, {name: tensor.shape for name, tensor in expected.items()}, shapes, shown
    )
    for name, tensor in expected.items():
        _check_kind(source.path, tensors[name], shown[name], tensor.packed)
    sizes = config.vocab_size, config.draft_vocab_size
    ids = draft_ids(source.path, *sizes, None if offsets is None else offsets.whole())
    return Head(source, known.layout, config, tensors, ids, packing, notes)


def _by_our_names(source: Source, known: Recognised) -> tuple[dict[str, Tensor], list[str]]:
    unknown = source.tensors.keys() - known.ours.keys()
    beside = {name for name in unknown if known.layout.belongs_to_target(name)}
    if others := sorted(unknown - beside):
        raise UserError(
            f"{source.path}: holds tensors that no part of the head uses "
            f"(layout {known.layout.name}): {', '.join(others)}"
        )
    tensors: dict[str, Tensor] = {}
    for name, ours in sorted(known.ours.items()):
        if ours in tensors:
            raise UserError(f"{source.path}: {name} and {tensors[ours].name} are the same tensor")
        tensors[ours] = source.tensors[name]
    notes = [f"{len(beside)} tensors of the target beside the head are left out"] if beside else []
    return tensors, notes


def _packing(source: Source, tensors: Mapping[str, Tensor]) -> Packing | None:
    if not any(name.endswith(".scales") for name in tensors):
        return None
    settings = source.settings.get("quantization")
    where = f"{source.config_path}: quantization {settings}"
    if not isinstance(settings, dict):
        raise UserError(
            f"{where} is unusable: group_size and bits of the packed weights are needed"
        )
    group_size, bits = settings.get("group_size"), settings.get("bits")
    if group_size not in GROUP_SIZES or bits not in BITS or True in (group_size, bits):
        raise UserError(f"{where} is unusable: group_size is one of {GROUP_SIZES}, bits of {BITS}")
    return Packing(group_size, bits)


def _check_kind(where: Path, tensor: Tensor, name: str, packed: bool) -> None:
    if packed and tensor.dtype != "U32":
        raise UserError(f"{where}: {name} holds {tensor.dtype}, not packed integers (U32)")
    if not packed and tensor.dtype not in FLOATS:
        raise UserError(f"{where}: {name} holds {tensor.dtype}, not {', '.join(FLOATS)}")


class _Sizes:
    """The shape of a head from its tensors, compared with what its config says."""

    def __init__(
        self, source: Source, layout: Layout, tensors: Mapping[str, Tensor],
        packing: Packing | None, num_blocks: int, name_of,
    ):  # fmt: skip
        self._source, self._layout, self._tensors = source, layout, tensors
        self._packing, self._num_blocks, self._name_of = packing, num_blocks, name_of
        self.notes: list[str] = []

    def head_config(self, offsets: Tensor | None, lookup: Tensor | None) -> HeadConfig:
        """All sizes; a setting that the tensors contradict is an error."""
        where, settings = self._source.config_path, self._source.settings
        tied, fused = tied_output(where, settings), fused_layers(where, settings)
        rnn = any(name.startswith("rnn_") for name in self._tensors)
        if tied:  # its rows are the target's: only d2t tells how many there are
            output = "input_proj.weight"
            exit_dim = self._matrix(output)[0]
            draft_size = offsets.shape[0] if offsets else self._setting("vocab_size")
        else:
            output = f"lm_head.{self._num_blocks}.weight"
            draft_size, exit_dim = self._matrix(output)
        evidence, hidden = self._hidden_size(output, len(fused))
        self._check("exit_dim", exit_dim, output)
        self._check("hidden_size", hidden, evidence)
        self._check_rnn(rnn)
        self._check_blocks()
        vocab_size = self._vocab_size(output, draft_size, offsets, lookup)
        sizes = vocab_size, hidden, exit_dim, self._num_blocks, rnn, draft_size
        looks = lookback(where, settings)
        return HeadConfig(*sizes, tied_output=tied, fused_layers=fused, **looks)

    def _matrix(self, name: str) -> tuple[int, int]:
        """Rows and columns of a weight, counted unpacked."""
        if name not in self._tensors:
            raise UserError(f"{self._source.path}: lacks the tensors {self._name_of(name)}")
        shape = self._tensors[name].shape
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{self._source.path}: {self._name_of(name)} has shape {shape}")
        rows, columns = shape
        if self._packing and name.replace(".weight", ".scales") in self._tensors:
            columns = columns * 32 // self._packing.bits
        return check_size(self._source.path, name, rows), columns

    def _hidden_size(self, output: str, fused: int) -> tuple[str, int]:
        """The tensor that tells it, and the size."""
        for name in ("rnn_w.weight", "rnn_u.weight"):
            if name in self._tensors:
                return name, self._matrix(name)[0]
        name = "input_proj.weight" if "input_proj.weight" in self._tensors else output
        return name, self._matrix(name)[1] // (2 + fused)

    def _setting(self, key: str) -> Any:
        found = setting(self._source.settings, self._layout.config.get(key, key))
        return self._source.settings.get(key) if found is None else found

    def _key(self, key: str) -> str:
        theirs = self._layout.config.get(key, key)
        return theirs if setting(self._source.settings, theirs) is not None else key

    def _check(self, key: str, found: int, evidence: str) -> None:
        given = self._setting(key)
        if given is None:
            return
        where = self._source.config_path
        if check_size(where, self._key(key), given) != found:
            shape = self._tensors[evidence].shape
            raise UserError(
                f"{where}: {self._key(key)} is {given}, but {self._name_of(evidence)} has shape "
                f"{shape}, which makes it {found}: one of them is wrong"
            )

    def _check_rnn(self, found: bool) -> None:
        given = self._setting("rnn")
        where = self._source.config_path
        if given is not None and check_rnn(where, given) != found:
            tensors = "there are" if found else "there are no"
            raise UserError(
                f"{where}: {self._key('rnn')} is {str(given).lower()}, but {tensors} rnn_u and "
                "rnn_w tensors: one of them is wrong"
            )

    def _check_blocks(self) -> None:
        given = self._setting("num_draft_layers")
        if given is not None and given != self._num_blocks:
            self.notes.append(
                f"{self._key('num_draft_layers')} is {given} in config.json; the tensors have "
                f"{self._num_blocks} blocks, and they count"
            )

    def _vocab_size(
        self, output: str, draft_size: int, offsets: Tensor | None, lookup: Tensor | None
    ) -> int:
        where, given = self._source.config_path, self._setting("vocab_size")
        if self._setting("draft_vocab_size") is not None:
            self._check("draft_vocab_size", draft_size, output)
        if given is not None:
            vocab_size = check_size(where, self._key("vocab_size"), given)
            if offsets is None and self._setting("draft_vocab_size") is None:
                self._check("vocab_size", draft_size, output)
            check_draft_size(where, draft_size, vocab_size)
            return vocab_size
        if offsets is None:
            return draft_size
        if lookup is None or len(lookup.shape) != 1 or lookup.shape[0] < draft_size:
            raise UserError(
                f"{where}: vocab_size is missing, and a reduced vocabulary does not tell it: write "
                '{"vocab_size": N} there, N being the target\'s'
            )
        return check_size(where, "t2d", lookup.shape[0])
