"""Where training starts from: a head that already predicts as well as a linear map can.

A tied head reads out through the target's own head, so an ideal one would reproduce the hidden
state that the target is about to have, and those are in the data. With random recurrent weights
and blocks that do nothing yet, the input projection that comes closest is a least-squares
problem: solved exactly, it saves the first minutes of training.

Shape letters: B windows, L positions of a window, n steps, h hidden size, c context size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.head import HeadConfig, RecurrentHead
from redrafter_mlx.rounds.round import View
from redrafter_mlx.training.windows import Batch

LARGEST_FIT = 6144
"""Most inputs of a projection that is solved for: the cost grows with their cube."""
_PENALTY = 1e-4
TOKEN_LIKENESS, CONTEXT_LIKENESS, CARRY, NOTHING = 20.0, 10.0, 1.0, 14.0
"""A new lookback: likeness of a place with the same token, with the same context, share of the
step before, and likeness of nothing. benchmarks/LOG.md says how they were chosen."""
HEARD = 15.0
"""By how much a token that gets all the attention raises its own logit in a new lookback."""


def initial_head(
    config: HeadConfig,
    embed: Callable[[mx.array], mx.array],
    layer_of: Callable[[mx.array], nn.Module],
    d2t: mx.array,
    batches: Iterable[Batch],
    steps: int,
    key: mx.array,
) -> RecurrentHead:
    """A head in float32, ready for training.

    embed     the target's embedding
    layer_of  token ids (D,) -> those rows of the target's own head, as a linear layer
    d2t       (D,) token ids of the draft vocabulary
    batches   to fit the projection on
    """
    head = RecurrentHead(config)
    h, e = config.hidden_size, config.exit_dim
    keys = mx.random.split(key, 4)
    batches = list(batches)
    if config.lookback_heads:
        start_lookback(head, embed, layer_of, batches[0], keys[3])
    if config.rnn:
        # Inputs of the non-linearity of order one, whatever the scale of the embeddings.
        scale = mx.sqrt((embed(d2t).astype(mx.float32) ** 2).mean()).item()
        head.rnn_w.weight = mx.random.normal((h, h), key=keys[0]) / (scale * math.sqrt(h))
        head.rnn_u.weight = mx.random.normal((h, h), key=keys[1]) * 0.7 / math.sqrt(h)
        head.rnn_u.bias = mx.zeros(h)
    for block in head.lm_head[: config.num_blocks]:
        block.linear.weight, block.linear.bias = mx.zeros((e, e)), mx.zeros(e)
    if config.has_projection:
        inputs = config.context_size + h
        weight = mx.random.normal((e, inputs), key=keys[2]) * 0.02
        shared = min(e, h)
        weight[:shared, :shared] += mx.eye(shared)
        head.input_proj.weight, head.input_proj.bias = weight, mx.zeros(e)
        if e == h and inputs <= LARGEST_FIT:
            _fit_projection(head, embed, batches, steps)
    if not config.tied_output:
        padding = max(0, e - h)
        output = mx.pad(output_rows(layer_of, d2t, h), [(0, 0), (0, padding)])
        head.lm_head[-1].weight = output[:, :e]
    mx.eval(head.parameters())
    return head


def output_rows(
    layer_of: Callable[[mx.array], nn.Module], ids: mx.array, hidden_size: int
) -> mx.array:
    """(D, h) float32 rows of the target's own head for token ids (D,), unpacked, without a bias."""
    layer = layer_of(ids)
    layer.pop("bias", None)
    return layer(mx.eye(hidden_size)).T.astype(mx.float32)


def with_lookback(
    head: RecurrentHead, heads: int, embed, layer_of, batch: Batch, key: mx.array
) -> RecurrentHead:
    """The same head with a new lookback."""
    grown = RecurrentHead(replace(head.config, lookback_heads=heads))
    grown.load_weights(tree_flatten(head.parameters()), strict=False)
    start_lookback(grown, embed, layer_of, batch, key)
    return grown


def start_lookback(head: RecurrentHead, embed, layer_of, batch: Batch, key: mx.array) -> None:
    """Set a lookback to find like tokens in like contexts and make what followed them likelier.

    Queries and keys are the same random projections, which preserve likeness. A tied output reads
    out through the target's head: `out` turns the embedding of a token into its row there, as
    nearly as a linear map can, scaled so that hearing it is worth HEARD.
    """
    lookback, config, hidden_size = head.lookback, head.config, head.config.hidden_size
    asked = config.lookback_heads * config.lookback_size
    seen = {
        "token": (embed(mx.array(batch.tokens)), TOKEN_LIKENESS),
        "context": (head.looked_at(batch.hidden.astype(mx.float32)[..., config.lookback_columns]),
                    CONTEXT_LIKENESS),
    }  # fmt: skip
    for (part, (x, likeness)), k in zip(seen.items(), mx.random.split(key, 2), strict=True):
        length = (x.astype(mx.float32) ** 2).sum(axis=-1).mean()
        scale = mx.sqrt(likeness / length / math.sqrt(config.lookback_size))
        weight = mx.random.normal((asked, x.shape[-1]), key=k) * scale
        lookback[f"key_{part}"].weight = lookback[f"query_{part}"].weight = weight
    lookback.carry = mx.full(lookback.carry.shape, CARRY)
    lookback.nothing = mx.full(lookback.nothing.shape, NOTHING)
    lookback.query_state.weight = mx.zeros((asked, hidden_size))
    lookback.out.weight = mx.zeros_like(lookback.out.weight)
    if config.tied_output:
        ids = mx.array(np.unique(batch.tokens))
        embedded, rows = embed(ids).astype(mx.float32), output_rows(layer_of, ids, hidden_size)
        length = (rows**2).sum(axis=-1).mean()
        said = _solve(embedded.T @ embedded, embedded.T @ rows) * (HEARD / length)
        lookback.out.weight = mx.tile(said.T / config.lookback_heads, (1, config.lookback_heads))
    mx.eval(lookback.parameters())


def _fit_projection(head: RecurrentHead, embed, batches: Iterable[Batch], steps: int) -> None:
    """Least squares from context and state of each step to the hidden state of that step."""
    gram, moment = 0, 0
    for batch in batches:
        length, tokens = batch.hidden.shape[1], mx.array(batch.tokens)
        context = head.normed(batch.hidden.astype(mx.float32))
        hidden = context[..., : head.config.hidden_size]
        embedded = embed(tokens).astype(mx.float32)
        weights = mx.array(batch.weights) > 0
        state = None
        for step in range(steps):
            now = embedded[:, step : step + length]
            state = head.advance(state, now.reshape(-1, now.shape[-1]))
            known = length - step - 1  # positions whose goal lies in the window too
            ones = mx.ones((*context.shape[:-1], 1))
            x = mx.concatenate([context, state.reshape(*now.shape), ones], axis=-1)[:, :known]
            x = (x * weights[:, step : step + known, None]).reshape(-1, x.shape[-1])
            y = hidden[:, step + 1 :].reshape(-1, hidden.shape[-1])
            gram, moment = gram + x.T @ x, moment + x.T @ y
        mx.eval(gram, moment)
    solution = _solve(gram, moment).T
    head.input_proj.weight, head.input_proj.bias = solution[:, :-1], solution[:, -1]


def read_out(batches: Sequence[Batch], size: int) -> mx.array:
    """(h,) the scale of the target's final hidden states, which stand first in what was captured.

    With it as the weight of its last norm, a head reads out through the target's own head as the
    target does.
    """
    hidden = mx.concatenate([b.hidden[..., :size].reshape(-1, size) for b in batches])
    return mx.sqrt((hidden.astype(mx.float32) ** 2).mean(axis=0) + 1e-6)


def fit_reading(batches: Sequence[Batch], view: View, scale: mx.array) -> mx.array | None:
    """(h, c) that maps what a head reads of a token as nearly as it can to the next one's final
    hidden state, over `scale`; None where that is too much to solve for.
    """
    if view.width > LARGEST_FIT:
        return None
    gram, moment = 0, 0
    for batch in batches:
        x = view(batch.hidden).astype(mx.float32)[:, :-1]
        y = batch.hidden[:, 1:, : len(scale)].astype(mx.float32) / scale
        weights = mx.array(batch.weights[:, : x.shape[1], None] > 0)
        x, y = (x * weights).reshape(-1, view.width), y.reshape(-1, len(scale))
        gram, moment = gram + x.T @ x, moment + x.T @ y
        mx.eval(gram, moment)
    return _solve(gram, moment).T


def _solve(gram: mx.array, moment: mx.array) -> mx.array:
    """(h, k) that maps rows x (R, h) as nearly as it can to y (R, k): gram x'x, moment x'y."""
    ridge = _PENALTY * mx.diag(gram).mean() * mx.eye(len(gram))
    return mx.linalg.solve(gram + ridge, moment, stream=mx.cpu)
