"""What each kind of head makes of a batch: features for the n tokens after every position.

Every kind is trained on what it will do when it drafts: go on from its own states, given the tokens
that actually followed.

Shape letters: B windows, L positions of a window, n steps, E captured columns, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from redrafter_mlx.drafters.attention import DraftKeys, memory_of
from redrafter_mlx.drafters.block import BlockHead
from redrafter_mlx.drafters.eagle3 import Eagle3Head
from redrafter_mlx.drafters.head import RecurrentHead
from redrafter_mlx.drafters.lookback import Memory
from redrafter_mlx.drafters.medusa import MedusaHead
from redrafter_mlx.rounds.round import View

Embed = Callable[[mx.array], mx.array]


def recurrent(
    embed: Embed, view: View, steps: int, head: RecurrentHead, hidden, tokens, *past
) -> mx.array:
    """For a RecurrentHead: its state after 1, 2, ... tokens."""
    B, L = hidden.shape[:2]
    embedded = embed(tokens[:, : L + steps - 1])
    memory = _looked_at(head, embed, *past) if past else None
    stepping = head.steps(view(hidden).reshape(B * L, -1).astype(mx.float32), memory)
    state, found = None, []
    for i in range(steps):
        state = stepping.advance(state, embedded[:, i : i + L].reshape(B * L, -1))
        found.append(stepping.features(state))
    return mx.concatenate(found)


def _looked_at(head: RecurrentHead, embed: Embed, hidden, tokens, visible) -> Memory:
    embedded = embed(tokens)
    context = head.looked_at(hidden.astype(mx.float32))
    keys = head.lookback.keys(context, embedded[:, :-1])
    return Memory(keys, embedded[:, 1:], visible.flatten())


def medusa(view: View, steps: int, head: MedusaHead, hidden, tokens) -> mx.array:
    """For a MedusaHead: its heads, each for one step (arXiv 2401.10774, Medusa-1)."""
    given = view(hidden).reshape(-1, view.width).astype(mx.float32)
    found = head.features(given, steps)
    return found.reshape(-1, found.shape[-1])


def eagle3(embed: Embed, view: View, steps: int, head: Eagle3Head, hidden, tokens) -> mx.array:
    """For an Eagle3Head: training-time test (arXiv 2503.01840), whole texts at once.

    In the first step a position reads the target's layers, in each later one what the head itself
    computed there the step before. It attends to the first step's places up to its own, and to its
    own place alone of the later steps: this is what a draft from there would see.
    """
    L = hidden.shape[1]
    embedded = embed(tokens[:, : L + steps - 1]).astype(mx.float32)
    state, found = head.read(view(hidden).astype(mx.float32)), []
    caches = [DraftKeys() for _ in range(head.caches)]
    places = mx.arange(L)
    mask = places[None] <= places[:, None]
    for i in range(steps):
        for cache in caches:
            cache.offset = i
        state = head(embedded[:, i : i + L], state, mask, caches)
        found.append(head.normed(state).reshape(-1, state.shape[-1]))
        mask = mx.concatenate([mask, mx.eye(L, dtype=mx.bool_)], axis=1)
    return mx.concatenate(found)


def dflash(embed: Embed, view: View, steps: int, head: BlockHead, hidden, tokens) -> mx.array:
    """For a BlockHead: a block of masks after every position, each seeing the text before it."""
    config, L = head.config, hidden.shape[1]
    first = 0 if config.next_token else 1
    given = view(hidden).astype(mx.float32)
    masks = mx.full((L, config.block_size - 1), config.mask_token_id, tokens.dtype)
    found = []
    for text, pending in zip(given, tokens[:, :L], strict=True):
        kept = [DraftKeys() for _ in head.layers]
        head.take_in(text, kept)
        block = embed(mx.concatenate([pending[:, None], masks], axis=1)).astype(mx.float32)
        blocks = head(block * config.embedding_scale, memory_of(kept, 1 + mx.arange(L)))
        found.append(blocks[:, first : first + steps].swapaxes(0, 1))
    return mx.stack(found, axis=1).reshape(-1, found[0].shape[-1])
