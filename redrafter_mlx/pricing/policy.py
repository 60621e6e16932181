"""Which tree is worth its price, how far to search for it, and whether to speculate at all.

Tokens per second over a whole text are maximised by taking, in each round, the tree of most
(expected tokens) - rate x (its seconds), where rate is the tokens per second that this yields
(Dinkelbach's rule for ratios). Taking the best ratio of each round alone would verify too little
in good rounds and too much in bad ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.tree import Candidates, TokenTree, likeliest

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


class Survey:
    """What a full search scored, and which of it each narrower or shorter one would have."""

    def __init__(self, candidates: Candidates, settings: list[Setting], full: Setting):
        self.candidates = candidates
        depths, all_of_them = candidates.depths, np.ones(len(candidates.tokens), bool)
        self.found: dict[Setting, np.ndarray] = {}
        for setting in settings:
            found = all_of_them
            if setting.width < full.width:
                found = candidates.within(setting.width)
            if setting.length < full.length:  # else however deep the drafter went
                found = found & (depths < setting.length)
            self.found[setting] = np.flatnonzero(found | candidates.always)


@dataclass
class Rate:
    """Tokens and seconds per round, as a fading average."""

    weight: float
    tokens: float = 0.0
    seconds: float = 0.0
    rounds: int = 0

    def add(self, tokens: float, seconds: float) -> None:
        self.rounds += 1
        share = max(self.weight, 1 / self.rounds)
        self.tokens += share * (tokens - self.tokens)
        self.seconds += share * (seconds - self.seconds)

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Policy:
    """What was learned about one drafter on one target, and what follows from it.

    full         the widest and longest search
    costs        of passes; a Policy of another temperature may share it
    draft_costs  of drafts
    calibration  of node probabilities

    It speculates, or the drafter is parked. Parked rounds decode plainly for a pause; then the
    drafter is on trial for a few. Each trial that fails doubles the next pause, so that a loser
    costs less and less; a success that lasts makes it short again. Speculating pays when it is
    faster than plain decoding by GAIN, and stops when it is slower or drafts for nothing. Of a
    union that finds something without a search only the search is parked, and what needs none is
    never parked for long: an echo may begin anywhere.

    How far to search must be decided before anything was scored: looking at a draft halfway would
    be one more synchronisation. So every SURVEY rounds the full search runs, and what a narrower
    or shorter one would have found is read off it. The best of them serves until the next survey.
    One of no width is no search at all: what other drafters of a union find without one.
    """

    FIRST_PAUSE, LONGEST_PAUSE = 32, 2048
    FIRST_TRIAL, TRIAL, SHORT_TRIAL, EXTENSIONS = 4, 2, 1, 5
    LOSER = 4  # failures in a row after which trials are short
    SURVEY, SURVEYS = 12, 4
    LASTING = 24
    GAIN, LOSS, BETTER = 1.02, 1.0, 0.01
    CHEAP = 0.02  # of a plain round
    IDLE = 6  # drafts in a row of which nothing was worth a pass
    TIMING = 3  # plain rounds that give two times: the first of them is not timed
    REMEMBERED = 8  # drafts
    CLOSE, SOON = 1.1, 32  # below which gain plain rounds are timed again after how many passes

    def __init__(
        self,
        full: Setting,
        costs: LiveCosts | None = None,
        draft_costs: LiveDraftCosts | None = None,
        calibration: Calibration | None = None,
    ):
        self.full = full
        self.costs = costs or LiveCosts()
        self.draft_costs = draft_costs or LiveDraftCosts()
        self.calibration = calibration or Calibration(full.length - 1)
        self._no_search = Setting(0, full.length)
        self.settings = [self._no_search, *settings_within(full)]
        self.setting = full
        self._surveys: deque[Survey] = deque(maxlen=self.SURVEYS)
        self._drafts: deque[tuple[Candidates, Survey | None]] = deque(maxlen=self.REMEMBERED)
        self._expected, self._realised = Rate(0.125), Rate(0.125)
        self._trial, self._extensions = self.FIRST_TRIAL, 0
        self._parked = self._failures = self._drafted = self._idle = self._timing = 0
        self._since_survey = self.SURVEY  # drafts since the last survey, less after a parked search
        self._is_search_parked = False
        self._searches = self._finds_without = False  # whether anything was found so
        self._seconds, self._costs = 0.0, np.zeros(2)  # of the present round, of passes by rows

    @property
    def is_parked(self) -> bool:
        return self._parked > 0

    def begin_text(self) -> None:
        """Another text begins: it may be one that pays, however many did not."""
        self.calibration.begin_text()
        if self._is_search_parked:  # whether or not the rest is too
            self._since_survey = self.SURVEY
            self._forget()
        if self._parked:
            self._try_again()

    def plan(self, context: int) -> Setting | None:
        """How far to search in the next round, after `context` tokens; None: decode plainly."""
        if not self.costs.is_known:
            return None
        if self._parked:
            self._parked -= 1
            if self._parked:
                return None
            self._try_again()
        is_close = self.gain < self.CLOSE and not self._is_cheap
        patience = self.SOON if is_close else self.costs.FORGET
        if self._timing == 0 and self.costs.plain_is_stale(patience):
            self._timing = self.TIMING + 1
        if self._timing:
            self._timing -= 1
            if self._timing:
                return None
        if self._trial and self._is_hopeless(context):
            self._park()
            return None
        return self.full if self._is_survey_due else self.setting

    def choose(self, setting: Setting, candidates: Candidates, context: int) -> TokenTree:
        """The tree to verify of what a search scored."""
        probs = self.calibration.probabilities(candidates)
        costs = self.costs.at(context, min(MOST_NODES, len(probs) + 1))
        if costs is None:  # a drafter that is asked although nothing was planned
            costs = np.arange(len(probs) + 2, dtype=float)
        rate = max(self._expected.per_second, 1 / costs[1])
        least = 2 if self._trial else 1  # a trial that verifies nothing shows nothing
        nodes, tokens, seconds = _best_size(probs, costs, rate, least)
        self._seconds, self._costs = seconds + self.draft_costs.of(setting), costs
        if setting == self.full and self._is_survey_due:
            self._surveys.append(Survey(candidates, self.settings, self.full))
            self._choose_setting(costs, rate)
            self._since_survey, self._is_search_parked = 0, False
            if self.draft_costs.knows(self.setting):  # a survey's own search is no measure
                setting = self.setting
                found = probs[self._surveys[-1].found[setting]]
                _, tokens, seconds = _best_size(found, costs, rate, least)
        if self._trial or self._is_refuted:
            survey = self._surveys[-1] if self._since_survey == 0 else None
            self._drafts.append((candidates, survey))
        self._expected.add(tokens, seconds + self.draft_costs.of(setting))
        self._finds_without |= bool(candidates.always.any())
        self._searches |= not candidates.always.all()
        self._drafted = self._drafted + 1 if setting != self._no_search else 0
        self._since_survey += 1
        self._idle = 0 if nodes > 1 else self._idle + 1
        c, self._verified = candidates, likeliest(probs, nodes)
        self._candidates = c
        return TokenTree.best(c.root, c.tokens, c.parents, c.logprobs, nodes, scores=probs)

    def observe(self, tree: TokenTree, path: list[int]) -> None:
        """A drafted tree was verified and `path` of it, the root included, accepted."""
        if len(tree) > 1:
            accepted = self._candidates.follow(tree.tokens[path[1:]])
            self.calibration.observe(self._candidates, self._verified, accepted)
        self._realised.add(len(path), self._seconds)
        self._judge()

    @property
    def gain(self) -> float:
        """Speed of speculating over plain decoding, as last expected; 0 before the first draft."""
        return self._expected.per_second * self._plain_seconds

    @property
    def _plain_seconds(self) -> float:
        return float(self._costs[1])

    def _choose_setting(self, costs: np.ndarray, rate: float) -> None:
        """The setting that would have served best in the latest surveys, as they look now.

        Not to search at all must have been better in every one of them: an echo in a text makes it
        look so for a while.
        """
        worth = np.array([self._worth(survey, costs, rate) for survey in self._surveys])
        best = 1 + int(np.argmax(worth[:, 1:].sum(axis=0)))
        found_without = any(survey.candidates.always.any() for survey in self._surveys)
        is_vain = len(worth) == self.SURVEYS and bool((worth[:, 0] > worth[:, best]).all())
        if found_without and is_vain:  # else plain rounds, and they are for parking to decide
            self.setting = self._no_search
            return
        present = worth[:, self.settings.index(self.setting)].sum()
        margin = self.BETTER * len(worth)
        if self.setting == self._no_search or worth[:, best].sum() > present + margin:
            self.setting = self.settings[best]

    def _worth(self, survey: Survey, costs: np.ndarray, rate: float) -> list[float]:
        """What each setting would have been worth there, in tokens."""
        probs = self.calibration.probabilities(survey.candidates)
        values = []
        for setting in self.settings:
            _, tokens, seconds = _best_size(probs[survey.found[setting]], costs, rate, 1)
            values.append(tokens - rate * (seconds + self.draft_costs.of(setting)))
        return values

    def _judge(self) -> None:
        """Park the drafter when it does not pay.

        What was expected during a trial is reckoned again at its end, with what came of it, and
        after each round from then on until something is accepted. Even so expectations lag behind a
        text that changed for the better: a trial whose tokens paid goes on for a while although no
        gain is expected yet. What is found without a search at next to no cost is never in the way:
        it is parked only if its trees lose.
        """
        if self._trial == 1 or (self._trial == 0 and self._is_refuted):
            self._expect_again()
        if self.gain >= 1 - self.CHEAP and self._is_cheap:
            self._trial = max(self._trial - 1, 0)
        elif self._trial == 0:
            if self.gain < self.LOSS or self._idle >= self.IDLE:
                self._park()
            elif self._drafted >= self.LASTING and self.setting != self._no_search:
                self._failures = 0
        else:
            self._trial -= 1
            if self._trial == 0 and self.gain < self.GAIN:
                realised = self._realised.per_second * self._plain_seconds
                if realised >= self.GAIN and self._extensions < self.EXTENSIONS:
                    self._extensions += 1
                    self._trial = self.TRIAL
                else:
                    self._park()

    def _expect_again(self) -> None:
        """Of the latest drafts, expect what they look worth now."""
        if self.setting == self._no_search or not self._drafts:
            return
        rate, draft = self._expected.per_second, self.draft_costs.of(self.setting)
        self._expected = Rate(self._expected.weight)
        for candidates, survey in self._drafts:
            probs = self.calibration.probabilities(candidates)
            found = probs[survey.found[self.setting]] if survey else probs
            _, tokens, seconds = _best_size(found, self._costs, rate, 1)
            self._expected.add(tokens, seconds + draft)

    @property
    def _is_refuted(self) -> bool:
        """Whether nothing of what was drafted since it began was accepted."""
        return self._realised.tokens <= 1

    @property
    def _is_survey_due(self) -> bool:
        on_trial = self._trial > 0 and self.setting != self._no_search
        return on_trial or self._since_survey >= self.SURVEY

    @property
    def _is_cheap(self) -> bool:
        if self._searches and self.setting != self._no_search:
            return False
        return self.draft_costs.of(self.setting) < self.CHEAP * self._plain_seconds

    def _is_hopeless(self, context: int) -> bool:
        """Whether passes are so dear here that not even a perfect free draft would pay."""
        costs = self.costs.at(context, MOST_NODES)
        return bool(np.max(np.arange(2, MOST_NODES + 1) * costs[1] / costs[2:]) < self.GAIN)

    def _park(self) -> None:
        """For longer each time a search failed; what is free is soon looked at again."""
        pause = self.FIRST_PAUSE
        if self._searches and self.setting != self._no_search:
            pause = min(pause << self._failures, self.LONGEST_PAUSE)
            self._failures = min(self._failures + 1, 16)
        if self._finds_without and self.setting != self._no_search:
            self.setting, self._is_search_parked = self._no_search, True
            self._since_survey = self.SURVEY - pause
            self._trial = 0
            self._forget()
        else:
            self._parked = pause

    def _try_again(self) -> None:
        self._parked = 0
        self._trial = self.TRIAL if self._failures < self.LOSER else self.SHORT_TRIAL
        self._forget()
        self.calibration.doubt(2.0 ** max(0, self._failures - self.LOSER + 1))

    def _forget(self) -> None:
        """Whatever comes now, it is not what was tried before."""
        self._extensions = self._drafted = self._idle = 0
        self._drafts.clear()
        self._expected, self._realised = Rate(0.125), Rate(0.125)


def _best_size(probs: np.ndarray, costs: np.ndarray, rate: float, least: int):
    """(nodes, expected tokens, seconds) of the tree of most tokens - rate x seconds.

    probs  (M,) of the candidates
    costs  (N + 1,) seconds of a pass by its rows
    least  nodes of the smallest tree allowed
    """
    gains = np.sort(probs)[::-1][: len(costs) - 2]
    tokens = 1 + np.concatenate([[0.0], np.cumsum(gains)])
    seconds = costs[1 : len(tokens) + 1]
    value = tokens - rate * seconds
    best = least - 1 + int(np.argmax(value[least - 1 :])) if len(value) >= least else 0
    return best + 1, float(tokens[best]), float(seconds[best])
