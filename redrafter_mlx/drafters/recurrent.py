"""The recurrent drafter: beam search with a recurrent head (ReDrafter, arXiv 2403.09919).

Shape letters: P positions, R rows (beams), h hidden size, c context size, D draft vocabulary,
W beam width, L beam length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx import device
from redrafter_mlx.budget import Budget
from redrafter_mlx.drafters.beam_search import beam_search, collect
from redrafter_mlx.drafters.drawn import draw, drawn_tree
from redrafter_mlx.drafters.head import RecurrentHead, State, Steps
from redrafter_mlx.drafters.lookback import Memory
from redrafter_mlx.drafters.text import TextMemory, TextVocabulary
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.round import Context, Step, Transcript
from redrafter_mlx.sampling import Noise, gumbel
from redrafter_mlx.tree import TokenTree


class RecurrentDrafter:
    """Drafts by beam search with a RecurrentHead.

    head    the weights
    d2t     (D,) the target's token id of each draft id
    embed   the target's embedding: ids (R,) -> (R, h)
    output  for a head with a tied output: token ids (D,) -> those rows of the target's own head,
            as a linear layer. The vocabulary then is d2t and whatever else the text holds.
    experience  what its drafts were worth elsewhere, by temperature
    """

    def __init__(
        self,
        head: RecurrentHead,
        d2t: mx.array,
        embed: Callable[[mx.array], mx.array],
        output: Callable[[mx.array], nn.Module] | None = None,
        experience: dict[float, Experience] | None = None,
    ):
        self.experience = experience or {}
        self.head, self.d2t, self.embed = head, d2t, embed
        self._vocabulary = TextVocabulary(d2t, head.config.vocab_size, output) if output else None
        self._memory = TextMemory(head, embed) if head.config.lookback_heads else None
        self._searches: dict[tuple, Callable] = {}

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        if context.noise is not None and not context.noise.coupled:
            return self._drawn(context, budget)
        shape = budget.width, budget.length, context.noise is not None
        if shape not in self._searches:
            self._searches[shape] = device.ready(partial(self.search, *shape))
        noise = context.noise or Noise.silent()
        position = mx.array([context.position], dtype=mx.uint32)
        found = self._searches[shape](
            context.hidden,
            context.pending,
            position,
            noise.key,
            noise.temp,
            *self.vocabulary_of(context.transcript),
            self._memory_of(context),
        )
        root, *found = device.read(context.pending, *found)
        return budget.tree(collect(int(root[0]), *(array[0] for array in found)))

    def _drawn(self, context: Context, budget: Budget) -> TokenTree:
        """A tree of draws, for a rule that weighs them against what they were drawn from."""
        shape = budget.width, budget.length, "drawn"
        if shape not in self._searches:
            self._searches[shape] = device.ready(partial(self.draw, budget.width, budget.length))
        d2t, rows = self.vocabulary_of(context.transcript)
        found = self._searches[shape](
            context.hidden,
            context.pending,
            mx.array([context.position], dtype=mx.uint32),
            context.noise.key,
            context.noise.temp,
            d2t,
            rows,
            self._memory_of(context),
        )
        root, ids, *found = device.read(context.pending, d2t, *found)
        return drawn_tree(int(root[0]), ids, *found, budget)

    def observe(self, step: Step) -> None:
        pass

    def reset(self) -> None:
        pass

    def vocabulary_of(self, transcript: Transcript) -> tuple[mx.array, dict]:
        """Token ids (D,) it can propose after a text, and the rows of a tied output for them."""
        return self._vocabulary.of(transcript) if self._vocabulary else (self.d2t, {})

    def _memory_of(self, context: Context) -> list[mx.array]:
        return self._memory.of(context.transcript, context.trail) if self._memory else []

    def logits(self, steps: Steps, state: State, rows: dict) -> mx.array:
        """(R, D) float32 of the vocabulary's tokens after R rows."""
        y = steps.logits(state)
        if self._vocabulary:
            y = self._vocabulary.project(y, rows)
        return y.astype(mx.float32)

    def search(
        self, width: int, length: int, coupled: bool,
        hidden, root, position, key, temp, d2t, rows, memory=(),
    ):  # fmt: skip
        """Beam search from each of P positions, as a function of arrays that can be compiled.

        hidden (P, c), root (P,) of each position; position (1,), key (2,), temp () of the noise
        that is reckoned with if `coupled`; d2t (D,) and rows, the vocabulary of a tied output;
        memory, the fields of a Memory for a head that looks back. Returns what `beam_search` does.

        Coupled: the target will add known noise to its logits at each position; adding the same
        noise to the head's logits ranks first what the target is likeliest to choose with it.
        """
        if coupled:
            positions = position + mx.arange(1, length, dtype=mx.uint32)[:, None]
            noise = temp * gumbel(key, positions, d2t.astype(mx.uint32)[None], mx)
        steps = self.head.steps(hidden, Memory(*memory) if memory else None)

        def score(state: State, depth: int) -> mx.array:
            logits = self.logits(steps, state, rows)
            if coupled:
                logits = logits + noise[depth - 1]
            return logits - device.softmax(logits)[0]

        return beam_search(
            advance=lambda state, tokens: steps.advance(state, self.embed(tokens)),
            score=score,
            token_ids=lambda ids: d2t[ids],
            root=root,
            width=min(width, d2t.size),
            length=length,
        )

    def draw(
        self, width: int, length: int, hidden, root, position, key, temp, d2t, rows, memory=()
    ):
        """What `drawn.draw` returns, as a function of arrays that can be compiled."""
        steps, state = self.head.steps(hidden, Memory(*memory) if memory else None), None

        def logits(last: mx.array | None) -> mx.array:
            nonlocal state
            state = steps.advance(state, self.embed(root if last is None else last))
            return self.logits(steps, state, rows)

        return draw(logits, d2t, key, temp, position, min(width, d2t.size), length)
