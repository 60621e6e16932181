"""Times of real passes and drafts, taken so that the clock is not fooled.

Every pass takes its tokens from the one before, so none can start early or be left out. All sizes
are visited in turn and back again, over and over: whatever slows the machine down slows all of them
down, so it can be recognised, taken out and reported.

Shape letters: N rows, R repeats, K things measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.decoding import decode
from redrafter_mlx.drafters.protocol import Drafter, NoDrafter
from redrafter_mlx.machine import device
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.sampling import Sampler
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.rounds.verification import Match
from redrafter_mlx.target.adapter import Target

PLAIN_ROUNDS = 3
DRIFT = 0.10
"""Relative change of the machine's speed during a measurement that is worth reporting."""


@dataclass(frozen=True)
class Timings:
    """Times (K, R) of K things, measured in R turns.

    Each turn measures all of them, so a factor common to a turn is the machine's, not theirs.
    """

    seconds: np.ndarray

    @property
    def speeds(self) -> np.ndarray:
        """(R,) how slow the machine was in each turn, relative to the typical one."""
        typical = np.median(self.seconds, axis=1, keepdims=True)
        return np.median(self.seconds / typical, axis=0)

    @property
    def typical(self) -> np.ndarray:
        """(K,) seconds at the machine's typical speed."""
        return np.median(self.seconds / self.speeds, axis=1)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median, of the thing where that is largest."""
        quarter, middle, rest = np.percentile(self.seconds / self.speeds, [25, 50, 75], axis=1)
        return float(np.max((rest - quarter) / 2 / middle))

    @property
    def drift(self) -> float:
        """How much slower the last third of the turns ran than the first; below 0: faster."""
        third = max(1, len(self.speeds) // 3)
        return float(np.median(self.speeds[-third:]) / np.median(self.speeds[:third]) - 1)

    def complaint(self) -> str | None:
        """One line if the machine did not run evenly, else None."""
        if self.drift > DRIFT:
            return (
                f"the machine slowed down by {self.drift:.0%} while it was measured, as if it got "
                "hot: ratios are corrected for that, but measure again when it is cool"
            )
        if self.drift < -DRIFT or self.spread > DRIFT:
            return (
                f"the machine did not run evenly (drift {self.drift:+.0%}, repeats differ by up to "
                f"{self.spread:.0%}): end what else is running and measure again"
            )
        return None


def measure_passes(
    target: Target,
    text: Sequence[int],
    rows: Sequence[int],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time passes over trees of 1, ... N rows after the tokens `text`, interleaved.

    One row is a round of plain decoding, during which the host prepares the next one; more rows are
    a pass as the loop makes it, until its tokens are read.
    """
    context = target.prefill(text, chunk=512)
    seconds = np.zeros((len(rows), turns))
    for turn in range(-1, turns):  # the first one warms up
        order = range(len(rows)) if turn % 2 == 0 else range(len(rows))[::-1]
        for k in order:
            if rows[k] == 1:
                spent, context = _plain_round(target, context, clock)
            else:
                spent, context = _tree_pass(target, context, rows[k], clock)
            if turn >= 0:
                seconds[k, turn] = spent
    return Timings(seconds)


def _plain_round(target: Target, context: Context, clock) -> tuple[float, Context]:
    """Median seconds of a few rounds of plain decoding, and the context after them."""
    rule = Match(Sampler(SamplingOptions()))
    rounds = decode(target, NoDrafter(), rule, FixedBudget(1, 2, 1), context)
    step, times = next(rounds), []
    for _ in range(PLAIN_ROUNDS):
        began = clock()
        following = next(rounds)
        step.tokens  # noqa: B018  waits for the device
        times.append(clock() - began)
        step = following
    pending = mx.array(step.tokens[-1:], dtype=context.pending.dtype)
    position = context.position + PLAIN_ROUNDS + 1
    return statistics.median(times), replace(context, pending=pending, position=position)


def _tree_pass(target: Target, context: Context, rows: int, clock) -> tuple[float, Context]:
    """Seconds of one pass over a tree, of which nothing is committed; the next one's context."""
    tree = bushy_tree(rows, int(device.read(context.pending)[0][0]), target.vocab_size)
    began = clock()
    outcome = target.verify(context, tree)
    (tokens,) = device.read(mx.argmax(outcome.logits, axis=-1))
    spent = clock() - began
    context.caches.commit([])
    pending = mx.array(tokens[-1:].tolist(), dtype=context.pending.dtype)
    return spent, replace(context, pending=pending)


def bushy_tree(rows: int, root: int, vocab_size: int) -> TokenTree:
    """A tree shaped like drafts: two children of each node, and deeper below the likelier one."""
    nodes = np.arange(rows - 1)
    parents = (nodes - 2) // 2
    tokens = (root + 1 + nodes) % vocab_size
    return TokenTree.best(root, tokens, np.maximum(parents, -1), -1.0 - nodes, budget=rows)


def measure_drafts(
    target: Target,
    drafter: Drafter,
    text: Sequence[int],
    settings: Sequence[Setting],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time drafts after the tokens `text`, interleaved, each after a pass, until read."""
    drafter.reset()
    context = target.prefill(text, chunk=512)
    seconds = np.zeros((len(settings), turns))
    for turn in range(-2, turns):  # kernels are compiled at first
        order = range(len(settings)) if turn % 2 == 0 else range(len(settings))[::-1]
        for k in order:
            spent, tree = _draft_after_pass(target, drafter, context, settings[k], clock)
            pending = mx.array(tree.tokens[-1:].tolist(), dtype=context.pending.dtype)
            context.transcript.extend((), pending)
            context = replace(context, pending=pending)
            if turn >= 0:
                seconds[k, turn] = spent
    drafter.reset()
    return Timings(seconds)


def curve_of(contexts: Sequence[int], rows: Sequence[int], timings: Sequence[Timings]) -> CostCurve:
    """The curve of measurements at each context length."""
    return CostCurve(list(contexts), list(rows), [t.typical.tolist() for t in timings])


def time_of_draft(
    target: Target,
    drafter: Drafter,
    context: Context,
    setting: Setting,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a draft, the lesser of two after one that may read the text."""
    draft = lambda: _draft_after_pass(target, drafter, context, setting, clock)[0]
    return min([draft() for _ in range(3)][1:])


def _draft_after_pass(
    target: Target, drafter: Drafter, context: Context, setting: Setting, clock
) -> tuple[float, TokenTree]:
    """Seconds of a draft and what it proposes.

    As in a round, it comes after a pass, whose weights have taken the place of the head's in the
    device's caches: one draft after another would take less time than any does in use.
    """
    outcome = target.verify(context, TokenTree.root())
    device.read(mx.argmax(outcome.logits, axis=-1))
    context.caches.commit([])
    began = clock()
    tree = drafter.propose(context, FixedBudget(*setting, 16))
    return clock() - began, tree


def time_of_pass(
    target: Target, context: Context, rows: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a pass over a tree, the lesser of two; nothing is committed."""
    return min(_tree_pass(target, context, rows, clock)[0] for _ in range(2))
