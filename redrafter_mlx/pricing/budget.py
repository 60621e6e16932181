"""How large a tree may be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.pricing.policy import Policy
from redrafter_mlx.pricing.survey import Survey
from redrafter_mlx.rounds.round import Context, Step
from redrafter_mlx.rounds.tree import Candidates, TokenTree

SEVERAL = 16
"""Rounds after which the user is told that drafting does not pay, if one in as many had a tree."""


class Budget(Protocol):
    """Decides how far a drafter searches and which of its candidates are verified."""

    @property
    def width(self) -> int: ...

    @property
    def length(self) -> int: ...

    def plan(self, context: Context) -> bool:
        """Whether to draft in the round that begins. Sets `width` and `length` for it."""

    def search(self, found: Candidates) -> bool:
        """Whether to search for more than `found`, what needed no search. Sets width and length."""

    def tree(self, candidates: Candidates) -> TokenTree:
        """The tree to verify."""

    def observe(self, tree: TokenTree, step: Step) -> None:
        """Called after each round with what was verified and the outcome."""


@dataclass(frozen=True)
class FixedBudget:
    """Always the same size: the `nodes` likeliest of all candidates, or, for 0, just the beams.

    With one node nothing is drafted.
    """

    width: int
    length: int
    nodes: int

    @classmethod
    def from_options(cls, options: DraftOptions) -> FixedBudget:
        return cls(options.beam_width, options.beam_length, int(options.budget))

    def plan(self, context: Context) -> bool:
        return self.nodes != 1

    def search(self, found: Candidates) -> bool:
        return self.width > 0

    def tree(self, candidates: Candidates) -> TokenTree:
        """The tree to verify."""
        if self.nodes == 0:
            return TokenTree.from_beams(*candidates.beam_tokens())
        c = candidates
        return TokenTree.best(c.root, c.tokens, c.parents, c.logprobs, self.nodes)

    def observe(self, tree: TokenTree, step: Step) -> None:
        pass


@dataclass
class _Round:
    """What a budget remembers of a round until its time is known.

    rows  of its tree, if a survey asks for that size, else 0
    """

    position: int
    setting: Setting | None
    began: float
    rows: int = 0
    nodes: int = 1
    draft_seconds: float = 0.0
    is_known: bool = False


@dataclass
class AutoBudget:
    """One text's use of a Policy: tells it what each round cost.

    A round lasts until the next one begins, so that everything is priced: passes, reading, and
    what the caller does with the tokens. The device goes on working while the host reads a plain
    round's token, so a plain round is timed only after another plain one, and a drafted one only if
    it did not wait for the round before it. The first draft of a text is not priced: it may read
    the prompt. A draft of which nothing is verified costs the time by which its round exceeds a
    plain one: its own, and the host's work that a plain round hides, which on a fast device is
    most of it.

    survey      sizes of the first rounds, from which costs will be known; None if they are
    look_again  what to do when known costs are in doubt: another survey, over already if they were
                confirmed, or None if it is too soon
    """

    policy: Policy
    survey: Survey | None = None
    look_again: Callable[[Context], Survey | None] = lambda context: None
    clock: Callable[[], float] = time.perf_counter
    width: int = field(init=False)
    length: int = field(init=False)
    _last: _Round | None = field(default=None, init=False)
    _before: _Round | None = field(default=None, init=False)
    _has_drafted: bool = field(default=False, init=False)
    _rounds: int = field(default=0, init=False)
    _trees: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.width, self.length = self.policy.full
        self.policy.begin_text()

    def plan(self, context: Context) -> bool:
        now = self.clock()
        if self._last is not None:
            self._price(self._last, self._before, now - self._last.began)
        if self.survey is None and self.policy.is_doubtful:
            self.survey = self.look_again(context)
            if self.survey is not None:
                self._last, now = None, self.clock()
        rung = self.survey.next(self.policy.might_pay) if self.survey is not None else None
        if rung is None:
            self.survey = None
            setting, rows = self.policy.plan(context.position), 0
        else:
            rows, setting = rung.rows, rung.setting
            self.policy.pass_round()
        self.width, self.length = setting or self.policy.full
        self._before, self._last = self._last, _Round(context.position, setting, now, rows)
        return setting is not None

    def search(self, found: Candidates) -> bool:
        if self._round.rows:
            return self.width > 0
        setting = self.policy.search(found)
        if setting is not None:
            self.width, self.length = self._round.setting = setting
        return setting is not None

    def tree(self, candidates: Candidates) -> TokenTree:
        """The tree to verify."""
        setting, last = Setting(self.width, self.length), self._round
        tree = self.policy.choose(setting, candidates, last.position, last.rows)
        return tree.filled(last.rows)

    def observe(self, tree: TokenTree, step: Step) -> None:
        last = self._round
        last.nodes, last.draft_seconds = step.nodes, step.draft_seconds
        last.is_known = step.is_known
        if not last.rows:
            self._rounds += 1
            self._trees += step.nodes > 1
            self.policy.costs.untried.count(step.nodes > 1)
            self.policy.draft_costs.untried.count(bool(last.setting and last.setting.width))
        if last.setting is not None:
            self.policy.observe(tree, list(step.verdict.path))

    @property
    def note(self) -> str:
        """What the user should know; empty while drafting pays."""
        if self._rounds < SEVERAL or self._trees * SEVERAL > self._rounds:
            return ""
        return (
            f"drafting does not pay here: {self._trees} of {self._rounds} rounds had a draft worth "
            "verifying; python -m redrafter_mlx.tune measures why"
        )

    @property
    def _round(self) -> _Round:
        assert self._last is not None, "a round begins with plan()"
        return self._last

    def _price(self, last: _Round, before: _Round | None, seconds: float) -> None:
        if last.setting is None:
            if before is not None and before.setting is None:
                self._passed(last, seconds)
        elif not self._has_drafted:
            self._has_drafted = True
        elif last.nodes > 1:
            if last.is_known and (before is None or before.is_known):
                self._drafted(last)
                self._passed(last, seconds - last.draft_seconds)
        elif self.survey is None and before and before.setting and before.is_known == last.is_known:
            costs, drafts = self.policy.costs, self.policy.draft_costs
            plain, alone = float(costs.at(last.position, 1)[1]), seconds - last.draft_seconds
            drafts.observe(last.setting, max(seconds - plain, last.draft_seconds))
            if alone < plain:  # a plain round cannot take longer than that
                costs.observe(1, last.position, alone)

    def _passed(self, last: _Round, seconds: float) -> None:
        if self.survey is not None:
            self.survey.passed(last.nodes, seconds)
        else:
            self.policy.costs.observe(last.nodes, last.position, seconds)

    def _drafted(self, last: _Round) -> None:
        assert last.setting is not None
        sink = self.survey.drafted if self.survey is not None else self.policy.draft_costs.observe
        sink(last.setting, last.draft_seconds)
