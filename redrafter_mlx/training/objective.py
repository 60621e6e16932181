"""One batch's loss: the head's distributions at n steps from each position against the target's.

The soft-max runs over candidates, not over the whole vocabulary: every token that the target
finds likely anywhere in the batch, and a random sample of all others, weighted so that they stand
for the rest (sampled soft-max). The cost then does not depend on the size of the vocabulary.

Shape letters: B windows, L positions of a window, n steps, C candidates, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.training.loss import Loss
from redrafter_mlx.training.windows import Batch

BEAMS = 4
"""Likeliest tokens of a step that beams of the usual width can go on from."""
Features = Callable[..., mx.array]
"""(head, hidden (B, L, E), tokens (B, L + n), fields of a Past) -> (n·B·L, e): what the head's
output layer reads for the tokens after each position, step after step."""
Output = Callable[[mx.array, mx.array, nn.Module], mx.array]
"""(features (R, e), token ids (C,), head) -> logits (R, C)"""


@dataclass(frozen=True)
class Candidates:
    """What the soft-max of a batch runs over.

    ids      (C,) token ids, distinct; the target's own come first
    bias     (C,) log of how many tokens each one stands for
    teacher  (B, L + n - 1, C) the target's distribution over them
    columns  (B, L + n - 1) place among them of the token that followed; -1 if it is none of them
    """

    ids: mx.array
    bias: mx.array
    teacher: mx.array
    columns: mx.array


def candidates(batch: Batch, allowed: np.ndarray, size: int, seed: list[int]) -> Candidates:
    """Choose `size` candidates for a batch among the token ids `allowed` (D,).

    If the target's likely tokens exceed three quarters of `size`, the least likely are dropped.
    """
    where = batch.weights[..., None] > 0
    probs = np.exp(batch.top_logits.astype(np.float32)) * where
    probs /= np.maximum(probs.sum(axis=-1, keepdims=True), 1e-9)
    largest = max(int(ids.max()) for ids in (allowed, batch.top_ids, batch.tokens))
    highest = np.zeros(largest + 1, np.float32)
    np.maximum.at(highest, batch.top_ids.ravel(), probs.ravel())
    likely = allowed[highest[allowed] > 0]
    size = min(size, len(allowed))
    most = max(size * 3 // 4, size - (len(allowed) - len(likely)))
    if len(likely) > most:
        likely = likely[np.argsort(-highest[likely], kind="stable")[:most]]
    others = np.setdiff1d(allowed, likely, assume_unique=True)
    sampled = np.random.default_rng(seed).choice(others, size - len(likely), replace=False)
    bias = np.zeros(size, np.float32)
    if len(sampled):
        bias[len(likely) :] = np.log(len(others) / len(sampled))
    column = np.full(len(highest), -1)
    column[likely] = np.arange(len(likely))
    return Candidates(
        mx.array(np.concatenate([likely, sampled]).astype(np.int32)),
        mx.array(bias),
        mx.array(_dense(batch.top_ids, probs, column, size)),
        mx.array(column[batch.tokens[:, 1:]].astype(np.int32)),
    )


def _dense(top_ids, probs, column, size: int) -> np.ndarray:
    """(B, M, K) probabilities of ids as (B, M, C), where column[id] >= 0; renormalised."""
    columns = column[top_ids.reshape(-1, top_ids.shape[-1])]
    rows = np.broadcast_to(np.arange(len(columns))[:, None], columns.shape)
    kept = columns >= 0
    dense = np.zeros((len(columns), size), np.float32)
    dense[rows[kept], columns[kept]] = probs.reshape(columns.shape)[kept]
    mass = dense.sum(axis=-1, keepdims=True)
    dense /= np.where(mass > 0, mass, 1)
    return dense.reshape(*top_ids.shape[:2], size)


@dataclass(frozen=True)
class Objective:
    """The loss as a function of arrays, to be differentiated and compiled.

    loss      per row
    steps     n predicted from each position
    decay     weight of a step over that of the one before: it counts only if that was accepted
    features  of a batch, by the kind of head
    output    the output layer
    past      columns of the conversations before short windows that the features need
    lost      weight of a step after a token that the head's own beams would not have kept
    """

    loss: Loss
    steps: int
    decay: float
    features: Features
    output: Output
    past: slice | None = None
    lost: float = 1.0

    def __call__(
        self, head: nn.Module, hidden, tokens, ids, bias, teacher, columns, weights, *past
    ) -> mx.array:
        """The weighted mean loss ().

        hidden (B, L, E), tokens (B, L + n), weights (B, L + n - 1) as in Batch; ids, bias,
        teacher and columns as in Candidates; past, the fields of a Past for a head that looks back
        """
        B, L = hidden.shape[:2]
        features = self.features(head, hidden, tokens, *past)
        logits = self.output(features, ids, head).astype(mx.float32) + bias
        at_step = lambda x: mx.concatenate(
            [x[:, i : i + L].reshape(B * L, *x.shape[2:]) for i in range(self.steps)]
        )
        decay = mx.repeat(self.decay ** mx.arange(self.steps), B * L)
        weights = at_step(weights) * decay
        if self.lost < 1:
            weights = weights * self._reached(logits, at_step(columns))
        losses = self.loss(logits, at_step(teacher))
        return (losses * weights).sum() / mx.maximum(weights.sum(), 1.0)

    def _reached(self, logits: mx.array, columns: mx.array) -> mx.array:
        """(n·B·L,) 1 where the beams would hold the tokens before a step, else `lost`.

        logits   (n·B·L, C)
        columns  (n·B·L,) of the token that followed each step
        """
        logits = mx.stop_gradient(logits)
        own = mx.take_along_axis(logits, mx.maximum(columns, 0)[:, None], axis=-1)
        kept = (columns >= 0) & ((logits > own).sum(axis=-1) < BEAMS)
        kept = mx.cumprod(kept.reshape(self.steps, -1).astype(mx.float32), axis=0)
        before = mx.concatenate([mx.ones_like(kept[:1]), kept[:-1]])
        return mx.where(before.flatten() > 0, 1.0, self.lost)


def tied_output(layer_of: Callable[[mx.array], nn.Module]) -> Output:
    """Logits by rows of the target's own head; `layer_of` makes a layer of token ids (C,)."""
    return lambda features, ids, head: layer_of(ids)(features)


def trained_output(
    d2t: mx.array, vocab_size: int, layer_of: Callable[[nn.Module], nn.Module]
) -> Output:
    """Logits by rows of the head's own output layer, which has one for each of `d2t` (D,).

    layer_of  head -> that layer
    """
    draft_id = mx.zeros(vocab_size, mx.int32)
    draft_id[d2t] = mx.arange(d2t.size, dtype=mx.int32)
    return lambda features, ids, head: features @ layer_of(head).weight[draft_id[ids]].T
