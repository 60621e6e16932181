"""Drafters that search: beam search with a head that reads its own tokens one after another.

Shape letters: P positions, R rows (beams), h hidden size, c what a head reads of the target,
D draft vocabulary, W beam width, L beam length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.beam_search import beam_search, collect
from redrafter_mlx.drafters.drawn import draw, drawn_tree
from redrafter_mlx.drafters.protocol import Unheeding
from redrafter_mlx.drafters.text import OwnVocabulary, TextVocabulary
from redrafter_mlx.machine import device
from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.sampling import Noise, gumbel
from redrafter_mlx.rounds.tree import Candidates, TokenTree

Begun = tuple[mx.array, list[mx.array]]
"""What a head's steps begin from: (P, c) of each position, and its memory of the text before it:
nothing, or arrays of the text and, last, (P,) how much of it each position sees."""


class Steps(Protocol):
    """A head that stands at P positions of a text and drafts on from there.

    Its states have a length, the number of rows, and give those of `state[rows]`.
    """

    def advance(self, state: Any | None, tokens: mx.array) -> Any:
        """After reading token ids (R,) on; the first are the pending ones, with no state before."""

    def outputs(self, state: Any) -> mx.array:
        """(R, ...) what the vocabulary makes logits of."""


class BeamDrafter(Unheeding, ABC):
    """Drafts by beam search.

    vocabulary  the ids that can be proposed, and how they are scored
    experience  what its drafts were worth elsewhere, by temperature
    depths      how many tokens in a row it can predict
    choices     how many different tokens it can score at each place
    """

    depths: float = math.inf
    choices: float = math.inf

    def __init__(
        self,
        vocabulary: OwnVocabulary | TextVocabulary,
        experience: dict[float, Experience] | None = None,
    ):
        self.vocabulary, self.experience = vocabulary, experience or {}
        self._searches: dict[tuple, Callable] = {}

    @abstractmethod
    def begin(self, context: Context) -> Begun:
        """What the steps from a context begin from."""

    @abstractmethod
    def replayed(self, tokens: Sequence[int], hidden: mx.array, first: int) -> Begun:
        """The same for the positions of the tokens from `first` on, of a text known to its end.

        hidden  (T, C) captured before each of its T tokens but the first
        """

    def fork(self, length: int) -> BeamDrafter:
        other = copy(self)
        other.vocabulary = self.vocabulary.fork()
        return other

    @abstractmethod
    def steps(self, begun: mx.array, memory: Sequence[mx.array]) -> Steps:
        """The head at P positions, from the arrays of a Begun; a function that can be compiled."""

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        drawn = context.noise is not None and not context.noise.coupled
        noise = context.noise or Noise.silent()
        shape = budget.width, budget.length, context.noise is not None, drawn
        if shape not in self._searches:
            bare = self.fork(0)  # forks share what is compiled, which must hold nothing of a text
            search = partial(bare.draw if drawn else bare.likeliest, *shape[: 2 if drawn else 3])
            self._searches[shape] = device.ready(search)
        begun, memory = self.begin(context)
        ids, rows = self.vocabulary.of(context.transcript)
        found = self._searches[shape](
            begun,
            context.pending,
            mx.array([context.position], dtype=mx.uint32),
            noise.key,
            noise.temp,
            ids,
            rows,
            memory,
        )
        if drawn:
            root, ids, *found = device.read(context.pending, ids, *found)
            return drawn_tree(int(root[0]), ids, *found, budget)
        root, *found = device.read(context.pending, *found)
        return budget.tree(self.candidates(int(root[0]), *found))

    def likeliest(self, width: int, length: int, coupled: bool, *arrays):
        """What `candidates` takes, from what `search` takes for one position."""
        return self.search(width, length, coupled, *arrays)

    def candidates(self, root: int, *found: np.ndarray) -> Candidates:
        """Everything that was scored after the token `root`, from what `likeliest` found."""
        return collect(root, *(array[0] for array in found))

    def logits(self, steps: Steps, state: Any, rows: dict) -> mx.array:
        """(R, D) float32 of the vocabulary's tokens after R rows."""
        return self.project(steps.outputs(state), rows)

    def project(self, outputs: mx.array, rows: dict) -> mx.array:
        """(R, D) float32 logits of what a head gives (R, ...)."""
        return self.vocabulary.project(outputs, rows).astype(mx.float32)

    def search(
        self, width: int, length: int, coupled: bool,
        begun, root, position, key, temp, ids, rows, memory=(),
    ):  # fmt: skip
        """Beam search from each of P positions, as a function of arrays that can be compiled.

        begun (P, c), root (P,) of each position; position (1,), key (2,), temp () of the noise
        that counts if `coupled`; ids (D,) and rows, the vocabulary's; memory, the rest of
        a Begun. Returns what `beam_search` does.

        Coupled: the target will add known noise to its logits at each position; adding the same
        noise to the head's logits ranks first what the target is likeliest to choose with it.
        """
        length = min(length, 1 + self.depths)
        if coupled:
            noise = known_noise(ids, key, temp, position, length)
        steps = self.steps(begun, memory)

        def score(state: Any, depth: int) -> mx.array:
            logits = self.logits(steps, state, rows)
            if coupled:
                logits = logits + noise[depth - 1]
            return logits - device.logsumexp(logits)

        return beam_search(
            advance=steps.advance,
            score=score,
            token_ids=lambda drafted: ids[drafted],
            root=root,
            width=min(width, ids.size, self.choices),
            length=length,
        )

    def draw(self, width: int, length: int, begun, root, position, key, temp, ids, rows, memory=()):
        """What `drawn.draw` returns, as a function of arrays that can be compiled."""
        steps, state = self.steps(begun, memory), None

        def logits(last: mx.array | None) -> mx.array:
            nonlocal state
            state = steps.advance(state, root if last is None else last)
            return self.logits(steps, state, rows)

        width, length = min(width, ids.size, self.choices), min(length, 1 + self.depths)
        return draw(logits, ids, key, temp, position, width, length)


def known_noise(
    ids: mx.array, key: mx.array, temp: mx.array, position: mx.array, length: int
) -> mx.array:
    """(L-1, D) what the target will add to its logits of `ids` (D,) after `position` (1,)."""
    positions = position + mx.arange(1, length, dtype=mx.uint32)[:, None]
    return temp * gumbel(key, positions, ids.astype(mx.uint32)[None], mx)
