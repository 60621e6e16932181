"""Attention from a draft to the text before it, so that a head can repeat how the text went on.

A recurrent head knows one hidden state and the tokens it drafted. What a summary, a translation or
an answer from given passages says stands further back, in the prompt. With a lookback each step
also searches the text for similar places and reads which tokens followed there. An extension of the
paper's head.

Shape letters: M texts (1 but in training), S places of a text, P positions drafted from, R rows
(beams), H attention heads, d size of one, h hidden size, e exit size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.machine import device

SIZE = 64
"""Of an attention head, in a new lookback."""


@dataclass(frozen=True)
class Memory:
    """Places of M texts. Place m is the token m, read after the hidden state before it.

    keys     (M, H, d, S) of the places
    values   (M, S, h) embeddings of the tokens that followed: of token m + 1
    visible  (P,) how many of its text's places each position may see: those before its own. As many
             positions for each text, those of one text together
    """

    keys: mx.array
    values: mx.array
    visible: mx.array


class Lookback(nn.Module):
    """H attention heads from a draft's steps to the places of the text.

    A step's likeness to a place is that of query and key, and a share (`carry`) of the likeness
    that the step before had to the place before: a passage that was followed is followed further.
    Besides the places there is an empty one, of likeness `nothing`, for steps without any like.
    """

    def __init__(self, hidden: int, exit_dim: int, heads: int, size: int):
        super().__init__()
        asks = lambda: nn.Linear(hidden, heads * size, bias=False)
        self.key_context, self.key_token = asks(), asks()
        self.query_context, self.query_token, self.query_state = asks(), asks(), asks()
        self.carry = mx.full((heads,), 0.5)
        self.nothing = mx.zeros((heads,))
        self.out = nn.Linear(heads * hidden, exit_dim, bias=False)

    @property
    def heads(self) -> int:
        return self.carry.size

    def keys(self, context: mx.array, embedding: mx.array) -> mx.array:
        """(M, H, d, S) of places: the context (M, S, h) before each token and its embedding."""
        keys = self.key_context(context) + self.key_token(embedding)
        keys = keys.reshape(*keys.shape[:2], self.heads, -1).transpose(0, 2, 3, 1)
        return mx.contiguous(keys)  # once, not in each product of a step

    def asked(self, context: mx.array) -> mx.array:
        """(P, H·d): the context's part (P, h) of the queries, for every step from a position."""
        return self.query_context(context)

    def likeness(
        self,
        asked: mx.array,
        embedding: mx.array,
        state: mx.array,
        memory: Memory,
        before: mx.array | None,
    ) -> mx.array:
        """(R, H, S) of each row to the places.

        asked      (P, H·d) from `asked`
        embedding  (R, h) of the token last read, state (R, h) after it
        before     (R, H, S) of the step before
        """
        texts, rows = len(memory.keys), len(state)
        query = mx.repeat(asked, rows // len(asked), axis=0)
        query = query + self.query_token(embedding) + self.query_state(state)
        query = query.reshape(texts, rows // texts, self.heads, -1).swapaxes(1, 2)
        found = (query / math.sqrt(query.shape[-1])) @ memory.keys
        found = found.swapaxes(1, 2).reshape(rows, self.heads, -1).astype(mx.float32)
        if before is None:
            return found
        return found + self.carry[:, None] * mx.pad(before, [(0, 0), (0, 0), (1, 0)])[..., :-1]

    def __call__(self, likeness: mx.array, memory: Memory) -> mx.array:
        """(R, e): what was heard, from likeness (R, H, S)."""
        rows, heads, places = likeness.shape
        texts = len(memory.values)
        visible = mx.repeat(memory.visible, rows // len(memory.visible))[:, None, None]
        shown = mx.where(mx.arange(places) < visible, likeness, -1e9)
        nothing = mx.broadcast_to(self.nothing[:, None], (rows, heads, 1))
        weights = device.probabilities(mx.concatenate([shown, nothing], axis=-1))[..., :-1]
        weights = weights.astype(memory.values.dtype).reshape(texts, -1, places)
        return self.out((weights @ memory.values).reshape(rows, -1))
