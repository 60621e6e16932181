"""What a head is trained to minimise: how far its distribution is from the target's.

Shape letters: R rows (positions x steps), C candidate tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from redrafter_mlx.machine import device

Loss = Callable[[mx.array, mx.array], mx.array]
TOP = 10
"""Tokens that `top_k` counts twice."""


def log_normaliser(logits: mx.array) -> mx.array:
    """log sum exp (R,) of logits (R, C)."""
    return device.softmax(logits)[0][:, 0]


def kl(logits: mx.array, teacher: mx.array) -> mx.array:
    """Cross-entropy (R,) of the target's distribution `teacher` (R, C) under softmax(logits).

    The Kullback-Leibler divergence up to the teacher's entropy, which no head can change.
    """
    return log_normaliser(logits) - (teacher * logits).sum(axis=-1)


def hard(logits: mx.array, teacher: mx.array) -> mx.array:
    """Cross-entropy (R,) of the target's likeliest token alone: the reference code's loss."""
    best = mx.argmax(teacher, axis=-1, keepdims=True)
    return log_normaliser(logits) - mx.take_along_axis(logits, best, axis=-1)[:, 0]


def acceptance(logits: mx.array, teacher: mx.array) -> mx.array:
    """-log of the overlap sum(min(p, q)) (R,): how often a sample would be accepted (LK losses,
    arXiv 2602.23881), mixed with `kl`, which alone has a gradient where nothing overlaps yet.
    """
    probs = mx.softmax(logits, axis=-1)
    overlap = mx.minimum(probs, teacher).sum(axis=-1)
    return 0.5 * kl(logits, teacher) - mx.log(mx.maximum(overlap, 1e-6))


def top_k(logits: mx.array, teacher: mx.array) -> mx.array:
    """`kl`, and once more on the teacher's TOP likeliest tokens alone (HASS, arXiv 2408.15766)."""
    last = -mx.sort(mx.stop_gradient(-teacher), axis=-1)[:, TOP - 1 : TOP]
    of_top = mx.where(teacher >= last, teacher, 0.0)
    normaliser = log_normaliser(logits)
    return (1 + of_top.sum(axis=-1)) * normaliser - ((teacher + of_top) * logits).sum(axis=-1)


LOSSES: dict[str, Loss] = {"kl": kl, "hard": hard, "acceptance": acceptance, "top_k": top_k}
