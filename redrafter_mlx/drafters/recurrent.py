"""The recurrent drafter: beam search with a recurrent head (ReDrafter, arXiv 2403.09919).

Shape letters: P positions, h hidden size, c context size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.drafters.beams import BeamDrafter, Begun
from redrafter_mlx.drafters.head import RecurrentHead, State, Steps
from redrafter_mlx.drafters.lookback import Memory
from redrafter_mlx.drafters.text import OwnVocabulary, TextMemory, TextVocabulary
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.rounds.round import Context, Trail, Transcript, View


@dataclass(frozen=True)
class _Steps:
    """The head's steps, reading token ids."""

    steps: Steps
    embed: Callable[[mx.array], mx.array]

    def advance(self, state: State | None, tokens: mx.array) -> State:
        return self.steps.advance(state, self.embed(tokens))

    def outputs(self, state: State) -> mx.array:
        return self.steps.logits(state)


class RecurrentDrafter(BeamDrafter):
    """Drafts by beam search with a RecurrentHead.

    head    the weights
    d2t     (D,) the target's token id of each draft id
    embed   the target's embedding: ids (R,) -> (R, h)
    output  for a head with a tied output: token ids (D,) -> those rows of the target's own head,
            as a linear layer. The vocabulary then is d2t and whatever else the text holds.
    view    what the head reads of what is captured; by default all it needs stands first
    experience  what its drafts were worth elsewhere, by temperature
    """

    def __init__(
        self,
        head: RecurrentHead,
        d2t: mx.array,
        embed: Callable[[mx.array], mx.array],
        output: Callable[[mx.array], nn.Module] | None = None,
        view: View | None = None,
        experience: dict[float, Experience] | None = None,
    ):
        config = head.config
        own = TextVocabulary(d2t, config.vocab_size, output) if output else OwnVocabulary(d2t)
        super().__init__(own, experience)
        self.head, self.d2t, self.embed = head, d2t, embed
        self.view = view or View(tuple(range(1 + len(config.fused_layers))), config.hidden_size)
        self._memory = self._new_memory() if config.lookback_heads else None

    @property
    def readers(self) -> int:
        return int(self._memory is not None)

    def begin(self, context: Context) -> Begun:
        memory = self._memory.of(context.transcript, context.trail) if self._memory else []
        return self.view(context.hidden), memory

    def fork(self, length: int) -> RecurrentDrafter:
        other = super().fork(length)
        other._memory = self._memory and self._memory.fork(length)
        return other

    def replayed(self, tokens: Sequence[int], hidden: mx.array, first: int) -> Begun:
        begun = self.view(hidden[first - 1 :])
        if not self._memory:
            return begun, []
        trail = Trail()
        trail.add(hidden)
        keys, values, _ = self._new_memory().of(Transcript(tokens), trail)
        return begun, [keys, values, mx.arange(first, len(tokens))]

    def steps(self, begun: mx.array, memory: Sequence[mx.array] = ()) -> _Steps:
        return _Steps(self.head.steps(begun, Memory(*memory) if memory else None), self.embed)

    def _new_memory(self) -> TextMemory:
        return TextMemory(self.head, self.embed, self.view)
