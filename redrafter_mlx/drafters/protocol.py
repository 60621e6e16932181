"""What a drafter is. A new drafter is one file beside this one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.round import Context, Step
from redrafter_mlx.rounds.tree import Candidates, TokenTree, Trie


class Drafter(Protocol):
    """Proposes continuations of the pending token; never sees the target's layers.

    readers  how many of its parts read the Trail of a text; 1 if it does not say
    """

    @property
    def readers(self) -> int: ...

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        """A tree rooted at the pending token, no larger than the budget allows."""

    def observe(self, step: Step) -> None:
        """Told after each round what became of the draft."""

    def reset(self) -> None:
        """Told before each prompt: forget the text so far."""

    def fork(self, length: int) -> Drafter:
        """One like it for another text that begins with the same `length` tokens.

        The other keeps what was computed for them; the text itself comes with the Context.
        """


class Unheeding:
    """For drafters that learn nothing from what becomes of their drafts, and keep nothing of a text
    beyond what its transcript tells.
    """

    readers = 0

    def observe(self, step: Step) -> None:
        pass

    def reset(self) -> None:
        pass

    def fork(self, length: int) -> Self:
        return self


def readers_of(drafters: Iterable[Drafter]) -> int:
    """How many of these drafters, or of their parts, read the Trail of a text."""
    return sum(getattr(drafter, "readers", 1) for drafter in drafters)


class Combined:
    """A drafter made of others, its members: what it is told, each of them is told."""

    def __init__(self, members: Sequence[Drafter]):
        self.members = list(members)

    @property
    def readers(self) -> int:
        return readers_of(self.members)

    def observe(self, step: Step) -> None:
        for member in self.members:
            member.observe(step)

    def reset(self) -> None:
        for member in self.members:
            member.reset()

    def fork(self, length: int) -> Self:
        other = copy(self)
        other.members = [member.fork(length) for member in self.members]
        return other

    def save(self) -> None:
        """Let members that remember earlier texts write them to their files."""
        for member in self.members:
            if hasattr(member, "save"):
                member.save()


class NoDrafter(Unheeding):
    """Proposes nothing: plain decoding."""

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        return TokenTree.root()


@dataclass(frozen=True)
class Written:
    """Tokens in a row.

    probs   of each: how likely it is right if those before it are
    shares  of each: with what probability its writer says it; 1 for one that knows no other
    """

    tokens: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def __add__(self, more: Written) -> Written:
        return Written(
            self.tokens + more.tokens, self.probs + more.probs, self.shares + more.shares
        )

    def candidates(self, root: int) -> Candidates:
        """The tokens as a chain after the token `root`."""
        trie = Trie(root)
        for node, (token, prob) in enumerate(zip(self.tokens, self.probs, strict=True)):
            trie.add(node, token, trie.logprobs[node] + math.log(max(prob, 1e-9)))
        return trie.candidates()


class Writer(Protocol):
    """What a drafter must also be able to do to continue other drafters' tokens."""

    def begin(self, context: Context) -> None:
        """A round begins: what the target has verified."""

    def write(self, ahead: Sequence[int], most: int) -> Written:
        """Up to `most` tokens to follow the verified text and `ahead`; none if it has no idea."""


class Reviewer(Writer, Protocol):
    """A writer that can judge the tokens of cheaper ones faster than it writes."""

    def review(self, ahead: Sequence[int], drafted: Written, lenience: float) -> Written:
        """The first tokens of `drafted`, as far as it accepts them, and one of its own."""


def candidates_of(drafter: Drafter, context: Context, width: int, length: int) -> Candidates:
    """Everything that a drafter scores in a search of `width` and `length`.

    Where drafts would be drawn, it is asked for the likeliest instead: mixed with the candidates of
    others its own are no longer draws, and the rule takes each as certain.
    """
    if context.noise is not None and not context.noise.coupled:
        context = replace(context, noise=None)
    budget = _Everything(width, length)
    tree = drafter.propose(context, budget)
    return budget.candidates or Candidates.of(tree)


class _Everything:
    """A budget that keeps everything it is shown."""

    def __init__(self, width: int, length: int):
        self.width, self.length = width, length
        self.candidates: Candidates | None = None

    def plan(self, context: Context) -> bool:
        return True

    def search(self, found: Candidates) -> bool:
        return self.width > 0

    def tree(self, candidates: Candidates) -> TokenTree:
        self.candidates = candidates
        return TokenTree.root(candidates.root)

    def observe(self, tree: TokenTree, step: Step) -> None:
        pass
