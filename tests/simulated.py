"""A machine and a drafter on paper: a policy runs on them in milliseconds, with a clock of theirs.

Shape letters: M candidates, N nodes, W beam width, L beam length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from benchmarks.policy import At, Told
from redrafter_mlx.drafters.beam_search import collect
from redrafter_mlx.pricing.budget import AutoBudget, FixedBudget
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.pricing.survey import Survey
from redrafter_mlx.rounds.tree import Candidates, TokenTree


@dataclass
class Machine:
    """What rounds cost: `passes` by rows and context, `drafts` by setting; seconds.

    noise    relative spread of the times
    outlier  how often a round takes five times as long
    compile  extra seconds of the first pass of each size, as kernels cost that are compiled
    vain     extra seconds of a round that drafts and verifies nothing: what a plain one hides
    """

    passes: Callable[[int, int], float]
    drafts: Callable[[Setting], float]
    noise: float = 0.0
    outlier: float = 0.0
    compile: float = 0.0
    vain: float = 0.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    now: float = 0.0
    slow_down: float = 1.0
    _seen: set = field(default_factory=set)

    def spend(self, seconds: float) -> float:
        factor = self.slow_down * (1 + self.noise * self.rng.standard_normal())
        if self.rng.random() < self.outlier:
            factor *= 5
        spent = seconds * max(factor, 0.1)
        self.now += spent
        return spent

    def run(self, rows: int, context: int) -> None:
        seconds = self.passes(rows, context)
        if rows not in self._seen:
            self._seen.add(rows)
            seconds += self.compile
        self.spend(seconds)


@dataclass
class Guesser:
    """A drafter on paper, and what its target says.

    sure   mean probability that it gives the best child; the rest is split geometrically
    truth  its probabilities of the children of a node (W,) -> the true ones
    """

    sure: float
    truth: Callable[[np.ndarray], np.ndarray] = lambda shares: shares
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def draft(self, setting: Setting) -> Candidates:
        """A beam search whose k-th likeliest child always carries the token id k."""
        width, length = setting
        tokens, logprobs, survivors = [], [], []
        live = np.zeros(1)
        for _ in range(1, length):
            best = np.clip(self.rng.normal(self.sure, 0.25, (len(live), 1)), 0.02, 0.98)
            shares = best * (1 - best) ** np.arange(width)
            joint = (live[:, None] + np.log(shares)).ravel()
            tokens.append(np.tile(np.arange(width), len(live)))
            logprobs.append(joint)
            survivors.append(np.argsort(-joint, kind="stable")[:width])
            live = joint[survivors[-1]]
        return collect(0, np.concatenate(tokens), np.concatenate(logprobs), np.stack(survivors))

    def gains(self, candidates: Candidates) -> np.ndarray:
        """(M,) true probabilities of the candidates to be accepted, the likeliest first."""
        probs = np.ones(len(candidates.tokens) + 1)  # the root's lies at -1
        logprobs = np.append(candidates.logprobs, 0.0)
        for parent in np.unique(candidates.parents):
            here = np.flatnonzero(candidates.parents == parent)
            shares = np.exp(logprobs[here] - logprobs[parent])
            probs[here] = probs[parent] * self.truth(shares)
        return probs[np.argsort(-candidates.logprobs, kind="stable")]

    def expected(self, tree: TokenTree) -> float:
        """True mean of the tokens that a round with this tree yields."""
        probs = np.ones(len(tree))
        for row, children in enumerate(tree.children):
            rows = np.array(list(children.values()), int)
            shares = np.exp(tree.logprobs[rows] - tree.logprobs[row])
            probs[rows] = probs[row] * self.truth(shares)
        return float(probs.sum())

    def accepted(self, tree: TokenTree) -> list[int]:
        """The path that the target agrees to."""
        path = [0]
        while True:
            rows = np.array(list(tree.children[path[-1]].values()), int)
            shares = np.exp(tree.logprobs[rows] - tree.logprobs[path[-1]])
            ends = np.cumsum(self.truth(shares))
            child = np.searchsorted(ends, self.rng.random())
            if child == len(rows):
                return path
            path.append(int(rows[child]))


@dataclass
class Log:
    """What happened in each round.

    expected  true mean of the tokens of its tree: rates of it are free of the luck of the draw
    """

    tokens: list[int] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    settings: list[Setting | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def rate(self, first: int = 0) -> float:
        return sum(self.expected[first:]) / sum(self.seconds[first:])

    @property
    def switches(self) -> int:
        """How often it began or ceased to speculate."""
        drafted = [setting is not None for setting in self.settings]
        return sum(a != b for a, b in pairwise(drafted))


def play(
    machine: Machine, guesser: Guesser, budget: FixedBudget | AutoBudget, tokens: int, context=100
) -> Log:
    """One text of `tokens` tokens."""
    log = Log()
    while sum(log.tokens) < tokens:
        began = machine.now
        position = context + sum(log.tokens)
        drafted = budget.plan(At(position))
        setting = Setting(budget.width, budget.length) if drafted else None
        draft_seconds, tree = 0.0, TokenTree.root(0)
        if drafted:
            draft_seconds = machine.spend(machine.drafts(setting))
            tree = budget.tree(guesser.draft(setting))
        machine.run(len(tree), position)
        machine.now += machine.vain * (drafted and len(tree) == 1)
        path = guesser.accepted(tree)
        budget.observe(tree, Told(len(tree), draft_seconds, path, len(tree) > 1))
        log.tokens.append(len(path))
        log.expected.append(guesser.expected(tree))
        log.nodes.append(len(tree))
        log.settings.append(setting)
        log.seconds.append(machine.now - began)
    return log


def answer(
    survey: Survey | None,
    passes: Callable[[int], float],
    drafts: Callable[[Setting], float],
    might_pay: Callable[[list[int]], bool] = lambda rows: True,
) -> list[int]:
    """Tell a survey what its rounds take; returns their rows, from which `might_pay` follows."""
    rows: list[int] = []
    while survey is not None and (rung := survey.next(might_pay(rows))):
        rows.append(rung.rows)
        survey.passed(rung.rows, passes(rung.rows))
        if rung.setting:
            survey.drafted(rung.setting, drafts(rung.setting))
    return rows


def yields(guesser: Guesser, full: Setting, drafts: int = 400) -> dict[Setting, np.ndarray]:
    """(M + 1,) expected tokens per round by budget, from 1 on, of each setting."""
    found = {}
    for width in range(1, full.width + 1):
        for length in range(2, full.length + 1):
            setting = Setting(width, length)
            gains = np.mean([guesser.gains(guesser.draft(setting)) for _ in range(drafts)], axis=0)
            found[setting] = 1 + np.concatenate([[0.0], np.cumsum(gains)])
    return found


def best_fixed(machine: Machine, yields: dict[Setting, np.ndarray]) -> float:
    """Tokens per second of the best of all fixed settings and budgets, or of plain decoding."""
    rates = [1 / machine.passes(1, 100)]
    for setting, tokens in yields.items():
        passes = [machine.passes(rows, 100) for rows in range(1, len(tokens) + 1)]
        rates.append(np.max(tokens / (np.array(passes) + machine.drafts(setting))))
    return max(rates)
