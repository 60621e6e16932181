"""How many tokens a round yields, for every search and every budget, from one recorded text.

A drafter is asked at each position of a text that plain decoding writes. The lossless rule accepts
what the text says, so the yield of any search and budget can be read off afterwards.

Shape letters: P positions, M candidates, N nodes, W beam width, L beam length (root included).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.decoding import decode
from redrafter_mlx.drafters.protocol import Drafter, candidates_of
from redrafter_mlx.pricing.budget import Budget, FixedBudget
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.pricing.policy import Samples
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.sampling import Sampler
from redrafter_mlx.rounds.tree import Candidates, TokenTree
from redrafter_mlx.rounds.verification import Match
from redrafter_mlx.target.adapter import Target


@dataclass
class Watched:
    """A drafter whose candidates are kept and never verified."""

    drafter: Drafter
    found: list[Candidates] = field(default_factory=list)

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        self.found.append(candidates_of(self.drafter, context, budget.width, budget.length))
        return TokenTree.root()

    def observe(self, step) -> None:
        self.drafter.observe(step)

    def reset(self) -> None:
        self.drafter.reset()


@dataclass(frozen=True)
class Draft:
    """All that a search scored at one position, and which of it would have been accepted.

    candidates  M nodes
    path        (k,) the candidates that the text then followed, from depth 1 on
    """

    candidates: Candidates
    path: list[int]

    @classmethod
    def of(cls, candidates: Candidates, following: Sequence[int]) -> Draft:
        """Candidates and the tokens of the text after their root."""
        return cls(candidates, candidates.follow(following))

    def ranks(self, setting: Setting, full: Setting) -> np.ndarray:
        """(k,) rank of each node of the path among those that the setting would have scored.

        The path ends before the first node that it would not have scored.
        """
        c = self.candidates
        scored = np.ones(len(c.tokens), bool)
        if setting.length < full.length:  # else whatever the drafter gave, however deep
            scored = c.depths < setting.length
        if setting.width < full.width:
            scored = scored & c.within(setting.width)
        order = np.flatnonzero(scored | c.always)
        order = order[np.argsort(-c.logprobs[order], kind="stable")]
        places = {int(node): place for place, node in enumerate(order)}
        ranks = []
        for node in self.path:
            if node not in places:
                break
            ranks.append(places[node])
        return np.maximum.accumulate(np.array(ranks, int))


@dataclass(frozen=True)
class Recording:
    """The drafts at each of the P positions of one text, in order.

    full  the search that was recorded
    """

    full: Setting
    drafts: list[Draft]

    def accepted(self, setting: Setting, most: int) -> np.ndarray:
        """(P, most + 1): drafted tokens that a round at each position accepts, by its budget."""
        counts = np.zeros((len(self.drafts), most + 1), int)
        for draft, row in zip(self.drafts, counts, strict=True):
            for rank in draft.ranks(setting, self.full):
                row[rank + 2 :] += 1
        return counts


def record(
    target: Target,
    drafter: Drafter,
    prompt: Sequence[int],
    tokens: int,
    full: Setting,
    sampling: SamplingOptions,
    ends: Collection[int] = (),
) -> Recording:
    """Decode `tokens` tokens plainly, or until one of `ends`, and draft at each of them."""
    sampler = Sampler(sampling)
    watched = Watched(drafter)
    watched.reset()
    context = target.prefill(prompt, chunk=512, noise=sampler.noise)
    rounds = decode(target, watched, Match(sampler), FixedBudget(*full, nodes=2), context)
    text = []
    for step in islice(rounds, tokens):
        text += step.tokens
        if text[-1] in ends:
            break
    drafter.reset()
    # the draft at position p is rooted at the token before text[p]
    return Recording(full, [Draft.of(c, text[p:]) for p, c in enumerate(watched.found)])


def tokens_per_round(recordings: Sequence[Recording], setting: Setting, most: int) -> np.ndarray:
    """(most + 1,) tokens per round by budget, over all texts; entry 0 means nothing."""
    tokens, rounds = 0, np.zeros(most + 1, int)
    for recording in recordings:
        accepted = recording.accepted(setting, most)
        rounds += rounds_of(accepted)
        tokens += len(accepted)
    return tokens / np.maximum(rounds, 1)


def rounds_of(accepted: np.ndarray) -> np.ndarray:
    """(K,) rounds over a text of P tokens, where one at position p accepts accepted[p, k] tokens.

    As in generation, the round after one that accepts n tokens begins n + 1 positions further on.
    """
    positions, rounds = np.zeros(accepted.shape[1], int), np.zeros(accepted.shape[1], int)
    while (running := np.flatnonzero(positions < len(accepted))).size:
        positions[running] += accepted[positions[running], running] + 1
        rounds[running] += 1
    return rounds


def experience_from(drafts: Sequence[Draft], full: Setting) -> Experience:
    """What is learned of a search from its drafts at many positions.

    It weighs no more than the number of rounds that a process remembers of its own.
    """
    calibration = Calibration(full.length - 1)
    for draft in drafts:
        calibration.count(draft.candidates, draft.path)
    weight = min(1.0, 1 / (1 - Calibration.FADE) / max(len(drafts), 1))
    searched = [draft.candidates for draft in drafts if not draft.candidates.always.any()]
    chosen = np.linspace(0, len(searched) - 1, min(len(searched), Samples.MOST)).astype(int)
    return Experience(
        full,
        weight * calibration.predicted,
        weight * calibration.accepted,
        [searched[i] for i in chosen],
    )


@dataclass(frozen=True)
class Choice:
    """A setting and budget, and what they are expected to give.

    speedup  over plain decoding
    """

    setting: Setting
    nodes: int
    tokens_per_round: float
    speedup: float


def best_choice(
    yields: dict[Setting, np.ndarray],
    curve: CostCurve,
    drafts: dict[Setting, float],
    context: int,
) -> Choice:
    """The fixed setting and budget of at least two nodes that is fastest after `context` tokens.

    yields  (N + 1,) tokens per round by budget, of each setting
    drafts  seconds of a draft of each setting
    """
    choices = []
    for setting, tokens in yields.items():
        costs = curve.at(context, len(tokens) - 1)
        speedups = tokens[2:] * costs[1] / (costs[2:] + drafts[setting])
        nodes = 2 + int(np.argmax(speedups))
        choices.append(Choice(setting, nodes, float(tokens[nodes]), float(speedups[nodes - 2])))
    return max(choices, key=lambda choice: choice.speedup)
