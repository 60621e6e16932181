"""What a drafter is. A new drafter is one file beside this one."""

from __future__ import annotations

from typing import Protocol

from redrafter_mlx.budget import Budget
from redrafter_mlx.round import Context, Step
from redrafter_mlx.tree import TokenTree


class Drafter(Protocol):
    """Proposes continuations of the pending token; never sees the target's layers."""

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        """A tree rooted at the pending token, no larger than the budget allows."""

    def observe(self, step: Step) -> None:
        """Told after each round what became of the draft."""

    def reset(self) -> None:
        """Told before each prompt: forget the text so far."""


class NoDrafter:
    """Proposes nothing: plain decoding."""

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        return TokenTree.root()

    def observe(self, step: Step) -> None:
        pass

    def reset(self) -> None:
        pass
