"""A head of any kind, understood and checked; its weights still in their files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.errors import UserError

from .safetensors import Tensor
from .sources import Source

FLOATS = ("F32", "F16", "BF16")
GROUP_SIZES, BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Packing:
    """How mlx packs a quantised layer: `bits` per weight, groups of `group_size` in a row."""

    group_size: int
    bits: int


@dataclass(frozen=True)
class Words:
    """What the card and `inspect` say of a kind of head.

    shape  its sizes, in a sentence
    """

    title: str
    about: str
    shape: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """How a result is written.

    layout    its name
    file      in which the weights are
    theirs    our name of a tensor -> the one in the file
    settings  draft ids (D,), packing -> config.json
    packed    may hold mlx's quantised layers
    reduced   its readers know `draft_vocab_size` and `d2t`
    loaded    whether this package loads it
    """

    layout: str
    file: str
    theirs: Callable[[str], str]
    settings: Callable[[np.ndarray, Packing | None], dict[str, Any]]
    packed: bool
    reduced: bool
    loaded: bool


@dataclass(frozen=True)
class Head(ABC):
    """A head whose every tensor is known, there once, and of the right shape and type.

    layout      as --from calls it
    config      the shape, as its kind has it
    tensors     by our names; d2t and what has no use left out
    draft_ids   (D,) the target's token id of each row of the output layers
    packing     of the quantised layers, None if there are none
    notes       what was left out or is odd, for the user
    parameters  numbers that were trained, packed or not
    outputs     modules whose rows are the draft ids; None: the vocabulary cannot be reduced
    beside      names of the source's tensors that are the target's, not the head's
    """

    source: Source
    layout: str
    config: Any
    tensors: dict[str, Tensor]
    draft_ids: np.ndarray
    packing: Packing | None
    notes: list[str]
    parameters: int
    outputs: tuple[str, ...] | None
    beside: frozenset[str]

    @property
    @abstractmethod
    def kind(self) -> str:
        """What kind of head it is, in a word."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The target's; 0 if the head does not tell."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """The target's."""

    @property
    @abstractmethod
    def words(self) -> Words: ...

    @property
    def files(self) -> list[Path]:
        """Files of the source, less those that hold nothing but the target."""
        tensors = self.source.tensors.values()
        theirs = {t.file for t in tensors if t.name in self.beside}
        ours = {t.file for t in tensors if t.name not in self.beside}
        return [file for file in self.source.files if file in ours or file not in theirs]

    @property
    def step_bytes(self) -> int:
        """Bytes read for every draft step: all weights, of an embedding only a row."""
        return sum(self.bytes_by_part().values())

    @abstractmethod
    def form(self, to: str | None) -> Form:
        """How it is written in the layout `to`, by default in that which this package loads."""

    @abstractmethod
    def may_be_packed(self, name: str) -> bool:
        """Whether a matrix is the weight of a layer that mlx can quantise."""

    @abstractmethod
    def bytes_by_part(self) -> dict[str, int]:
        """What each part adds to `step_bytes`."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What `inspect --json` says of this kind only."""


def packing_of(source: Source, tensors: Mapping[str, Tensor]) -> Packing | None:
    """How the layers are packed, as config.json says; None if none are."""
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


def check_type(where: Path, tensor: Tensor, name: str, packed: bool) -> None:
    """UserError for a tensor that holds something other than weights."""
    if packed and tensor.dtype != "U32":
        raise UserError(f"{where}: {name} holds {tensor.dtype}, not packed integers (U32)")
    if not packed and tensor.dtype not in FLOATS:
        raise UserError(f"{where}: {name} holds {tensor.dtype}, not {', '.join(FLOATS)}")


def offsets_in(where: Path, d2t: Tensor | None) -> np.ndarray | None:
    """The numbers of d2t; UserError for a type that numpy lacks and would mistake for another."""
    if d2t is None:
        return None
    if d2t.dtype == "BF16" or d2t.dtype.startswith("F8"):
        raise UserError(f"{where}: {d2t.name} holds {d2t.dtype}, not whole numbers")
    return d2t.whole()
