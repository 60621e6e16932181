"""Cascade speculative drafting (arXiv 2312.11462): drafters that draft for each other.

Vertical: a draft model does not write token by token but reviews what cheaper drafters wrote.
Horizontal: the later, less certain tokens of a draft come from cheaper drafters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redrafter_mlx.drafters.protocol import Combined, Drafter, Written, candidates_of
from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.tree import Candidates, TokenTree


class CascadeDrafter(Combined):
    """The paper's recursion over n drafters, the best and dearest first.

    levels    drafters that can continue each other's tokens (protocol.Writer); the first may
              also be one that cannot, such as a recurrent head. A level that can review
              (protocol.Reviewer) may be accelerated by those after it
    k         (n, n): k[r][j] is how many tokens level j adds to a draft for reviewer r. Reviewer 0
              is the target, reviewer r level r-1. Zero where j < r
    lenience  l of the paper, at least 1: among the levels, a token passes review if its writer's
              probability is at most l times the reviewer's. The target itself is never lenient

    One draft for reviewer r: each level j >= r in turn adds tokens until there are
    k[r][r] + ... + k[r][j]. A level with cheaper ones to draft for it adds what it accepts of
    their draft and one token of its own, which may be more than were asked for.

    Example: levels [A, B] and k [[5, 10], [0, 10]]: B drafts 10 tokens, A reviews them, until there
    are 5 or more; then B alone adds tokens until there are 15.
    """

    def __init__(self, levels: Sequence[Drafter], k: Sequence[Sequence[int]], lenience: float):
        super().__init__(levels)
        self.k, self.lenience = k, lenience

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        root = context.transcript.tokens[-1]
        parts, begun = [], Written()
        for level in self.members:
            if hasattr(level, "begin"):
                level.begin(context)
        if not hasattr(self.members[0], "write") and self.k[0][0] > 0:
            found = candidates_of(self.members[0], context, budget.width, 1 + self.k[0][0])
            parts.append(found)
            begun = _best_beam(found)
        parts.append(self._draft(0, [], begun).candidates(root))
        return budget.tree(Candidates.united(parts))

    def _draft(self, reviewer: int, ahead: list[int], drafted: Written) -> Written:
        """A draft for a reviewer, after the verified text and `ahead`, that begins with `drafted`.

        A level ends early when it has nothing to propose.
        """
        goal = 0
        for level in range(reviewer, len(self.members)):
            goal += self.k[reviewer][level]
            while len(drafted.tokens) < goal and hasattr(self.members[level], "write"):
                most = goal - len(drafted.tokens)
                more = self._extend(level, ahead + drafted.tokens, most)
                if not more.tokens:
                    break
                drafted += more
        return drafted

    def _extend(self, level: int, ahead: list[int], most: int) -> Written:
        if level + 1 < len(self.members) and any(self.k[level + 1]):
            cheaper = self._draft(level + 1, ahead, Written())
            return self.members[level].review(ahead, cheaper, self.lenience)
        return self.members[level].write(ahead, most)


def _best_beam(candidates: Candidates) -> Written:
    tokens, logprobs = (rows[0] for rows in candidates.beam_tokens())
    length = int((tokens >= 0).sum())
    probs = np.exp(np.diff(logprobs[:length])).tolist()
    return Written(tokens[1:length].tolist(), probs, probs)
