"""Several drafters' candidates in one tree, priced together by the budget."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter_mlx.budget import Budget
from redrafter_mlx.drafters.protocol import Drafter, candidates_of
from redrafter_mlx.round import Context, Step
from redrafter_mlx.tree import Candidates, TokenTree


class UnionDrafter:
    """Asks each of its drafters and verifies the likeliest of all their candidates.

    Whatever two of them propose is verified once. Which nodes are worth a row of the pass is the
    budget's decision, by their probabilities. A search of no width asks those only that find
    something without one (`needs_no_search`).
    """

    def __init__(self, members: Sequence[Drafter]):
        self.members = list(members)

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        asked = [m for m in self.members if budget.width or getattr(m, "needs_no_search", False)]
        parts = [
            candidates_of(m, context, budget.width, budget.length) for m in asked or self.members
        ]
        return budget.tree(Candidates.merged(parts))

    def observe(self, step: Step) -> None:
        for member in self.members:
            member.observe(step)

    def reset(self) -> None:
        for member in self.members:
            member.reset()

    def save(self) -> None:
        """Let members that remember write what they remember to their files."""
        for member in self.members:
            if hasattr(member, "save"):
                member.save()
