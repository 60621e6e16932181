"""Several drafters' candidates in one tree, priced together by the budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from redrafter_mlx.drafters.protocol import Combined, candidates_of
from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.tree import Candidates, TokenTree, Trie


class UnionDrafter(Combined):
    """Asks each of its drafters and verifies the likeliest of all their candidates.

    What two of them propose is verified once, and counts as likelier for it. The budget decides by
    probability which nodes are worth a row of the pass. A search of width 0 asks only those that
    need none (`needs_no_search`).
    """

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        free = [m for m in self.members if getattr(m, "needs_no_search", False)]
        rest = [m for m in self.members if m not in free]
        ask = lambda m: candidates_of(m, context, budget.width, budget.length)
        parts = [ask(m) for m in free]
        if rest and (not free or budget.search(pooled(parts))):
            parts += [ask(m) for m in rest]
        return budget.tree(pooled(parts))


SHARING = 0.7
"""How much of what two drafters know both know: 1 all of it, 0 none."""
UNNAMED = 0.3
"""Share of a drafter's remaining probability that goes to a token that it does not name."""
OTHERS = 0.6
"""Weight of all tokens that no drafter names."""


def pooled(parts: Sequence[Candidates]) -> Candidates:
    """What several drafters found under the same root; what two of them say counts for more.

    Where only one has children of a node, their probabilities are its. Where k have, each child's
    is the product of what they give it, to the power of k^-SHARING, over the sum of all (a
    logarithmic opinion pool: Genest and Zidek, Statistical Science 1 (1986) 114). So a token that
    one is sure of and another does not name loses, and one that both name gains.
    """
    if len(parts) == 1:
        return parts[0]

    def pool(trie: Trie, places: list[list[int]]) -> None:
        opinions = []
        for part, place in zip(parts, places, strict=True):
            # node -> {its child: log-probability of the step}
            said: dict[int, dict[int, float]] = defaultdict(dict)
            before = np.append(part.logprobs, 0.0)[part.parents]  # the root's lies at -1
            for node, step in zip(place, (part.logprobs - before).tolist(), strict=True):
                said[trie.parents[node]][node] = step
            opinions.append(said)
        for node in range(len(trie.tokens)):  # parents come before their children
            for child, step in _pool([said[node] for said in opinions if node in said]).items():
                trie.logprobs[child] = trie.logprobs[node] + step

    return Candidates.united(parts, pool)


def _pool(opinions: Sequence[dict[int, float]]) -> dict[int, float]:
    """Child -> log-probability of a step to it, from those by each drafter with an opinion."""
    if len(opinions) < 2:
        return opinions[0] if opinions else {}
    children = list({child: None for said in opinions for child in said})
    left = [np.log(max(1 - sum(map(np.exp, said.values())), 1e-3)) for said in opinions]
    logprobs = [
        [said.get(child, np.log(UNNAMED) + rest) for child in children]
        for said, rest in zip(opinions, left, strict=True)
    ]
    weight = len(opinions) ** -SHARING
    scores = weight * np.sum(logprobs, axis=0)
    total = np.logaddexp.reduce([*scores, np.log(OTHERS) + weight * sum(left)])
    return dict(zip(children, (scores - total).tolist(), strict=True))
