"""What the trainer knows about a kind of head: how it is created, trained, evaluated and saved.

Shape letters: D draft vocabulary, h hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters.beams import BeamDrafter
from redrafter_mlx.drafters.published import targets_vocabulary
from redrafter_mlx.drafters.text import OwnVocabulary, TextVocabulary
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import View
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.initial import output_rows
from redrafter_mlx.training.objective import Features, Output, tied_output, trained_output
from redrafter_mlx.training.options import HeadOptions
from redrafter_mlx.training.windows import Batch, Shards

FIT_BATCHES = 24
"""Batches that show a head before training what its inputs look like."""


class Recipe(ABC):
    """One kind of head for one target.

    name         of the kind
    about        what a model card calls such a head
    empty        a head of a shape, with parameters still to be set
    whole        whether it is trained on whole conversations
    reads_final  whether it reads the target's final hidden state
    takes        names of the HeadOptions that mean something to it
    """

    name: str
    about: str
    empty: Callable[[Any], nn.Module]
    whole = False
    reads_final = True
    takes: tuple[str, ...]

    def __init__(self, target: Target, options: HeadOptions):
        self.target, self.options = target, options
        layers = self.reads(len(target.model.layers), options)
        self.view: View = target.tap(layers, final=self.reads_final)

    @classmethod
    def reads(cls, layers: int, options: HeadOptions) -> tuple[int, ...]:
        """Those of a target's so many layers whose outputs the head reads."""
        return tuple(options.fused_layers)

    @property
    def tied(self) -> bool:
        """Whether it is trained with rows of the target's own output layer."""
        return self.options.output_layer == "tied"

    def prepare(self, shards: Shards) -> None:  # noqa: B027
        """Learn from the data what the head's inputs look like."""

    @abstractmethod
    def config(self, draft_vocab_size: int, ahead: int) -> Any:
        """The shape that the options ask for; UserError if they do not fit together.

        ahead  tokens that a position predicts
        """

    def new(self, config: Any, ids: mx.array, shards: Shards, ahead: int, key: mx.array):
        """An untrained head in float32 that proposes the token ids (D,)."""
        mx.random.seed(int(mx.random.randint(0, 2**30, key=key)))
        head = self.empty(config)
        device.finish(head.parameters())
        return head

    def past(self, head: nn.Module) -> slice | None:
        """Columns that it also reads of the text before short windows; None: none."""
        return None

    @abstractmethod
    def features(self, steps: int) -> Features:
        """What its output layer reads of a batch."""

    def output(self, head: nn.Module, ids: mx.array) -> Output:
        """Its output layer in training; ids (D,) of its draft vocabulary."""
        if self.tied:
            return tied_output(self.target.output_layer)
        return trained_output(ids, self.target.vocab_size, lambda head: head.lm_head)

    @abstractmethod
    def drafter(self, head: nn.Module, ids: mx.array) -> BeamDrafter:
        """A drafter with the head's current weights."""

    @abstractmethod
    def save(self, path: Path, head: nn.Module, ids: mx.array, dtype: mx.Dtype) -> None:
        """Write config.json and model.safetensors into the directory."""

    def _some(self, shards: Shards, ahead: int) -> list[Batch]:
        """A few batches to begin with."""
        return list(islice(shards.batches("fit", 4 if self.whole else 64, ahead), FIT_BATCHES))

    def _vocabulary(self, ids: mx.array) -> OwnVocabulary | TextVocabulary:
        if not self.tied:
            return OwnVocabulary(ids)
        return targets_vocabulary(self.target, np.array(ids))

    def _rows(self, ids: mx.array) -> mx.array:
        """(D, h) of the target's own output layer."""
        return output_rows(self.target.output_layer, ids, self.target.hidden_size)
