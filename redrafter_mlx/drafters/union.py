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
    budget's decision, by their probabilities.
    """

    def __init__(self, members: Sequence[Drafter]):
        self.members = list(members)

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        parts = [candidates_of(m, context, budget.width, budget.length) for m in self.members]
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
