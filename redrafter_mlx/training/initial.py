"""Where training starts from: a head that already predicts as well as a linear map can.

A tied head reads out through the target's own head, so an ideal one would reproduce the hidden
state that the target is about to have, and those are in the data. With random recurrent weights
and blocks that do nothing yet, the input projection that comes closest is a least-squares
problem: solved exactly, it saves the first minutes of training.

Shape letters: B windows, L positions of a window, n steps, h hidden size, c context size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.drafters.recurrent import HeadConfig, RecurrentHead
from redrafter_mlx.training.windows import Batch

LARGEST_FIT = 6144
"""Most inputs of a projection that is solved for: the cost grows with their cube."""
_PENALTY = 1e-4


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
    keys = mx.random.split(key, 3)
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
        layer = layer_of(d2t)
        layer.pop("bias", None)
        output = layer(mx.eye(h)).T.astype(mx.float32)  # also of quantised rows
        padding = max(0, e - h)
        head.lm_head[-1].weight = mx.pad(output, [(0, 0), (0, padding)])[:, :e]
    mx.eval(head.parameters())
    return head


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
    ridge = _PENALTY * mx.diag(gram).mean() * mx.eye(len(gram))
    solution = mx.linalg.solve(gram + ridge, moment, stream=mx.cpu).T
    head.input_proj.weight, head.input_proj.bias = solution[:, :-1], solution[:, -1]
