"""Times of real passes and drafts, taken so that the clock is not fooled.

Every pass takes its tokens from the one before, so none can start early or be left out. All sizes
are visited in turn and back again, over and over: what slows the machine down slows down all of
them, is recognised by that, taken out and reported.

Shape letters: N rows, R repeats, K things measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from redrafter_mlx import device
from redrafter_mlx.budget import FixedBudget
from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.decoding import decode
from redrafter_mlx.drafters.protocol import Drafter, NoDrafter
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.round import Context
from redrafter_mlx.sampling import Sampler
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.tree import TokenTree
from redrafter_mlx.verification import Match

PLAIN_ROUNDS = 3
DRIFT = 0.10
"""Relative change of the machine's speed during a measurement that is worth saying."""


@dataclass(frozen=True)
class Timings:
    """Times (K, R) of K things, measured in R turns, and what they say.

    Each turn measured all of them, so a turn's common factor is the machine's, not theirs.
    """

    seconds: np.ndarray

    @property
    def speeds(self) -> np.ndarray:
        """(R,) how slow the machine was in each turn, 1 in the typical one."""
        typical = np.median(self.seconds, axis=1, keepdims=True)
        return np.median(self.seconds / typical, axis=0)

    @property
    def typical(self) -> np.ndarray:
        """(K,) seconds at the machine's typical speed."""
        return np.median(self.seconds / self.speeds, axis=1)

    @property
    def spread(self) -> float:
        """Half the middle half of a thing's repeats, relative, where it is widest."""
        quarter, middle, rest = np.percentile(self.seconds / self.speeds, [25, 50, 75], axis=1)
        return float(np.max((rest - quarter) / 2 / middle))

    @property
    def drift(self) -> float:
        """How much slower the last third of the turns ran than the first; below 0: faster."""
        third = max(1, len(self.speeds) // 3)
        return float(np.median(self.speeds[-third:]) / np.median(self.speeds[:third]) - 1)

    def complaint(self) -> str | None:
        """One line if the machine did not run evenly."""
        if self.drift > DRIFT:
            return (
                f"the machine slowed down by {self.drift:.0%} while it was measured, as one does "
                "that gets hot: ratios are corrected for that, but measure again when it is cool"
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

    One row is a round of plain decoding, which the device works on while the host prepares the
    next; more rows are a pass as the loop makes it, until its tokens are read.
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
    """Seconds of one pass over a tree, of which nothing is kept; the next one's context."""
    tree = bushy_tree(rows, int(device.read(context.pending)[0][0]), target.vocab_size)
    began = clock()
    outcome = target.verify(context, tree)
    (tokens,) = device.read(mx.argmax(outcome.logits, axis=-1))
    spent = clock() - began
    context.caches.commit([])
    pending = mx.array(tokens[-1:].tolist(), dtype=context.pending.dtype)
    return spent, replace(context, pending=pending)


def bushy_tree(rows: int, root: int, vocab_size: int) -> TokenTree:
    """A tree as drafts have them: two children of each node, the likelier one further down."""
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
    """Time drafts after the tokens `text`, interleaved, reading their nodes included."""
    drafter.reset()
    context = target.prefill(text, chunk=512)
    seconds = np.zeros((len(settings), turns))
    for turn in range(-2, turns):  # kernels are compiled at first
        order = range(len(settings)) if turn % 2 == 0 else range(len(settings))[::-1]
        for k in order:
            width, length = settings[k]
            began = clock()
            tree = drafter.propose(context, FixedBudget(width, length, 16))
            spent = clock() - began
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
