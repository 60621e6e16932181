"""How large a tree may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.tree import Candidates, TokenTree


class Budget(Protocol):
    """Decides how far a drafter searches and which of its candidates are verified."""

    width: int
    length: int

    def tree(self, candidates: Candidates) -> TokenTree:
        """The tree to verify."""


@dataclass(frozen=True)
class FixedBudget:
    """Always the same size: the `nodes` likeliest of all candidates, or, for 0, just the beams."""

    width: int
    length: int
    nodes: int

    @classmethod
    def from_options(cls, options: DraftOptions) -> FixedBudget:
        return cls(options.beam_width, options.beam_length, options.budget)

    def tree(self, candidates: Candidates) -> TokenTree:
        """The tree to verify."""
        if self.nodes == 0:
            return TokenTree.from_beams(*candidates.beam_tokens())
        c = candidates
        return TokenTree.best(c.root, c.tokens, c.parents, c.logprobs, self.nodes)
