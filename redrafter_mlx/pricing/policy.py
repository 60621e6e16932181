"""Which tree is worth its price, how far to search for it, and whether to draft at all.

Tokens per second over a whole text are maximised by choosing, in each round, what promises most

    (expected tokens) - rate x (its seconds),

where rate is the tokens per second that this yields (Dinkelbach's rule for a ratio). Taking the
best ratio of each round alone would verify too little in good rounds and too much in bad ones.
Plain decoding, a lookup without a search, a search and its tree are weighed by this alone.

Shape letters: I samples, M candidates, N nodes, S settings, W beam width, L beam length.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import UNEVEN, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.rounds.tree import Candidates, TokenTree, likeliest

MOST_NODES = 64
"""Largest tree that is considered."""


def settings_within(full: Setting) -> list[Setting]:
    """The searches that are considered: beams in powers of two, and every length."""
    widths = [2**i for i in range(full.width.bit_length()) if 2**i < full.width]
    return [
        Setting(width, length)
        for width in (*widths, full.width)
        for length in range(2, full.length + 1)
    ]


class Samples:
    """Drafts of the full search, and which of their nodes a narrower or shorter one would find.

    What a search will find is not known before it is made. What it found elsewhere is, and what
    that would be worth now follows from the calibration, the costs and the rate.

    candidates  those that were seen before, oldest first
    """

    MOST = 32

    def __init__(self, full: Setting, candidates: Sequence[Candidates] = ()):
        self.full, self.settings = full, settings_within(full)
        self.candidates: deque[Candidates] = deque(maxlen=self.MOST)
        self.added = 0
        self._found: deque[np.ndarray] = deque(maxlen=self.MOST)
        for each in candidates:
            self.add(each)
        self.added = 0

    def add(self, candidates: Candidates) -> None:
        """Keep what a full search scored."""
        within = {s.width: candidates.within(s.width) for s in self.settings}
        within[self.full.width] = np.ones(len(candidates.tokens), bool)
        deep = {s.length: candidates.depths < s.length for s in self.settings}
        deep[self.full.length] = np.ones(len(candidates.tokens), bool)
        self.candidates.append(candidates)
        self.added += 1
        self._found.append(np.array([within[s.width] & deep[s.length] for s in self.settings]))

    def __len__(self) -> int:
        return len(self.candidates)

    def worth(self, calibration: Calibration, costs: np.ndarray, rate: float) -> np.ndarray:
        """(I, S) tokens - rate x seconds of each sample's best tree, drafted by each search."""
        probs = calibration.probabilities(joined(self.candidates))
        ends = np.cumsum([len(c.tokens) for c in self.candidates])[:-1]
        widest = max(len(c.tokens) for c in self.candidates)
        found = np.zeros((len(self), len(self.settings), widest))
        for row, own, kept in zip(found, np.split(probs, ends), self._found, strict=True):
            row[:, : len(own)] = own * kept
        return _values(found, costs, rate).max(axis=-1)


class Policy:
    """What was learned about one drafter on one target, and what follows from it.

    full         the widest and longest search
    costs        of passes; policies of other temperatures may share it; a Survey comes before
                 anything else if they are not known yet
    draft_costs  of drafts
    calibration  of node probabilities
    samples      drafts of the full search
    looks        whether the drafter finds candidates without a search: it is asked for these first
    searches     whether it searches

    Each expectation combines what was seen with a prior, and what was seen fades with every round,
    drafted or not. So a drafter that lost is tried again once so little evidence against it is left
    that the prior outweighs it; the more evidence there was, the later. What searches find does
    not fade: of a text's own samples each counts, of all others together SAMPLES, and a search that
    promises nothing is made now and then, so that a text does not go by those of others alone.
    """

    FADE = 0.98
    """Factor by which the weight of a lookup's gain falls with each later round."""
    EAGER = 1.0
    """Tokens that looking for candidates without a search is assumed to gain at first."""
    SAMPLES, EVERY = 4, 16
    """Samples that a choice needs, and drafts after which one more is taken."""
    TRY = 256
    """Seconds without a search, in units of its own, before one is made that promises nothing: the
    first in a text at once, then so many, twice as many, and so on."""
    LOOK_AGAIN = 8
    """Rounds after which the promise of searches is computed anew."""
    SHARE = 1 / 8
    """Weight of the latest round in the rate."""

    def __init__(
        self,
        full: Setting,
        costs: LiveCosts,
        draft_costs: LiveDraftCosts | None = None,
        calibration: Calibration | None = None,
        samples: Sequence[Candidates] = (),
        looks: bool = False,
        searches: bool = True,
    ):
        self.full, self.costs, self.looks, self.searches = full, costs, looks, searches
        self.draft_costs = draft_costs or LiveDraftCosts()
        self.calibration = calibration or Calibration(full.length - 1)
        self.samples = Samples(full, samples)
        self.no_search = Setting(0, full.length)
        self._since_sample = 0
        self._costs = np.ones(MOST_NODES + 1)
        self._begun = 0  # rounds
        self._might_pay, self._judged_at = True, (-1, -1)
        self.begin_text()

    def begin_text(self) -> None:
        """Another text begins, which may be of another kind."""
        self.calibration.begin_text()
        self._gained = self.EAGER
        self._tokens = self._spent = 0.0  # of a round, in plain rounds; fading averages
        self._rounds = 0
        self._worth: np.ndarray | None = None  # (I, S) of the samples, beyond plain decoding's
        self._weights = np.ones(0)  # how much each sample counts
        self._own = self._tries = 0  # samples of this text; searches made in vain
        self._waited = math.inf  # seconds since the last search

    @property
    def rate(self) -> float:
        """Tokens per second of this text as passes cost now; at least that of plain decoding."""
        gain = self._tokens / self._spent if self._rounds else 1.0
        return max(1.0, gain) / float(self._costs[1])

    @property
    def _plain(self) -> float:
        """Tokens - rate x seconds of a plain round: what the worth of all others is beyond.

        Costs and rate change from round to round, the worth of samples is computed now and then.
        """
        return 1 - self.rate * float(self._costs[1])

    @property
    def is_doubtful(self) -> bool:
        """Whether costs should be measured again.

        That is so if drafts might pay, and passes take much less time than known, or drafts have
        long not been made or verified because of their known cost: a lower one would go unnoticed.
        """
        is_long_ago = self.costs.untried.is_long or (
            self.searches and self.draft_costs.untried.is_long
        )
        return (self.costs.is_outdated or is_long_ago) and self.might_pay

    @property
    def might_pay(self) -> bool:
        """Whether drafting would pay if a tree cost no more than a single row.

        If not, what trees cost is of no interest. Computed anew after every LOOK_AGAIN rounds.
        """
        when = self._begun // self.LOOK_AGAIN, self.samples.added
        if when != self._judged_at and len(self.samples):
            free = np.full(MOST_NODES + 1, 1.0)
            worth = self.samples.worth(self.calibration, free, 0.0)[:, -1]
            self._judged_at, self._might_pay = when, bool(worth.mean() > UNEVEN)
        return self._might_pay

    def pass_round(self) -> None:
        """A round begins: what is known is one round older."""
        self._begun += 1
        self.calibration.pass_round()
        self.draft_costs.pass_round()

    def plan(self, context: int) -> Setting | None:
        """How a round begins after `context` tokens; None: plain decoding.

        A drafter that finds candidates without a search looks for these first.
        """
        self.pass_round()
        self._gained = self.EAGER + self.FADE * (self._gained - self.EAGER)
        self._costs = self.costs.at(context, MOST_NODES)
        is_due = self._rounds % self.LOOK_AGAIN == 0 or self._worth is None
        if is_due and len(self.samples):
            worth = self.samples.worth(self.calibration, self._costs, self.rate)
            self._worth = worth - self._plain
            others = max(len(self.samples) - self._own, 0)
            self._weights = np.ones(len(self.samples))
            self._weights[:others] = min(1.0, self.SAMPLES / max(others, 1))
        if self.looks and self._gained > 0:
            return self.no_search
        setting = self.search(None) if self.searches else None
        if setting is None:
            self._count(1.0, self._costs[1])
            return None
        return self.no_search if self.looks else setting

    def search(self, found: Candidates | None) -> Setting | None:
        """How far to search for more than `found`, what needed no search; None: not at all."""
        nothing = 0.0  # beyond plain decoding
        if found is not None and len(found.tokens):
            probs = self.calibration.probabilities(found)
            nothing = max(nothing, _values(probs, self._costs, self.rate).max() - self._plain)
        if self._worth is None:
            return self.full
        drafts = np.array([self.draft_costs.of(s) for s in self.samples.settings])
        values = np.maximum(self._worth, nothing)
        promised = np.average(values, axis=0, weights=self._weights) - self.rate * drafts
        best = int(np.argmax(promised))
        if promised[best] <= nothing:
            return self.full if self._tries_again(found, drafts[-1]) else None
        is_due = len(self.samples) < self.SAMPLES or self._since_sample >= self.EVERY
        return self.full if is_due else self.samples.settings[best]

    def _tries_again(self, found: Candidates | None, seconds: float) -> bool:
        """Whether to make a search of so many seconds although it promises nothing.

        Not beside what was found already: what the search finds could not be told apart.
        """
        has_found = found is not None and len(found.tokens) > 0
        if has_found or self._waited < self.TRY * 2 ** (self._tries - 1) * seconds:
            return False
        self._tries += 1
        self._worth = None
        return True

    def choose(
        self, setting: Setting, candidates: Candidates, context: int, rows: int = 0
    ) -> TokenTree:
        """The tree to verify, of the candidates found within a setting.

        rows  most nodes of the tree, if not costs shall decide
        """
        c, probs = candidates, self.calibration.probabilities(candidates)
        nodes = rows or self._worthwhile(setting, c, probs)
        if setting.width:
            self._since_sample += 1
            self._waited = 0.0
        if setting == self.full and not c.always.any():
            self.samples.add(c)
            self._own += 1
            self._since_sample = 0
        self._candidates, self._verified = c, likeliest(probs, nodes)
        return TokenTree.best(c.root, c.tokens, c.parents, c.logprobs, nodes, scores=probs)

    def _worthwhile(self, setting: Setting, c: Candidates, probs: np.ndarray) -> int:
        """How many nodes pay; the round is counted as one with as many."""
        values = _values(probs, self._costs, self.rate)
        nodes = 1 + int(np.argmax(values))
        draft = self.draft_costs.of(setting)
        tokens = 1 + np.sort(probs)[::-1][: nodes - 1].sum()
        if self.looks:
            free = _values(probs[c.always], self._costs, self.rate).max()
            self._gained += free - self._plain - self.rate * self.draft_costs.of(self.no_search)
        self._count(tokens, self._costs[nodes] + draft)
        return nodes

    def observe(self, tree: TokenTree, path: list[int]) -> None:
        """A drafted tree was verified and `path` of it, the root included, accepted."""
        if len(tree) > 1:
            accepted = self._candidates.follow(tree.tokens[path[1:]])
            self.calibration.observe(self._candidates, self._verified, accepted)

    def _count(self, tokens: float, seconds: float) -> None:
        self._rounds += 1
        self._waited += seconds
        share = max(self.SHARE, 1 / (1 + self._rounds))
        if self._rounds == 1:
            self._tokens = self._spent = 1.0
        self._tokens += share * (tokens - self._tokens)
        self._spent += share * (seconds / self._costs[1] - self._spent)


def joined(several: Sequence[Candidates]) -> Candidates:
    """Candidates of several drafts in one object, for computing on all of them at once."""
    starts = np.cumsum([0, *(len(c.tokens) for c in several)])
    parents = [
        np.where(c.parents < 0, -1, c.parents + start)
        for c, start in zip(several, starts, strict=False)
    ]
    return Candidates(
        several[0].root,
        np.concatenate([c.tokens for c in several]),
        np.concatenate(parents),
        np.concatenate([c.logprobs for c in several]),
        np.zeros(0, int),
        np.concatenate([c.always for c in several]),
    )


def _values(probs: np.ndarray, costs: np.ndarray, rate: float) -> np.ndarray:
    """(..., N) tokens - rate x seconds of the trees of 1, 2, ... N of the likeliest nodes.

    probs  (..., M) of the candidates
    costs  (N + 1,) seconds of a pass by its rows
    """
    gains = -np.sort(-probs, axis=-1)[..., : len(costs) - 2]
    tokens = np.concatenate([np.ones((*gains.shape[:-1], 1)), gains], axis=-1).cumsum(axis=-1)
    return tokens - rate * costs[1 : tokens.shape[-1] + 1]
