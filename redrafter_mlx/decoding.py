"""The loop: propose, verify, judge, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.round import Context, Outcome, Step, Verdict
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.adapter import Target

Rule = Callable[[TokenTree, Outcome, Context], Verdict]


def decode(
    target: Target, drafter: Drafter, rule: Rule, budget: Budget, context: Context
) -> Iterator[Step]:
    """Rounds without end; the caller stops asking when the text is finished.

    Plain decoding is the empty draft: a tree of the pending token alone. A round for which the
    budget plans no draft is the same.
    """
    while True:
        drafts = budget.plan(context)
        began = time.perf_counter()
        if drafts:
            # Waits for the plain pass under way, whose time is not the draft's.
            context.transcript.tokens  # noqa: B018
        ready = time.perf_counter()
        tree = drafter.propose(context, budget) if drafts else TokenTree.root()
        if not target.takes(context, tree):
            tree = TokenTree.root()
        drafted = time.perf_counter()
        outcome = target.verify(context, tree)
        verdict = rule(tree, outcome, context)
        verified = time.perf_counter()
        context = target.commit(context, tree, outcome, verdict)
        step = Step(
            accepted=tree.tokens[verdict.path[1:]].tolist(),
            verdict=verdict,
            logits=outcome.logits[verdict.path],
            tree=tree,
            draft_seconds=drafted - ready,
            verify_seconds=verified - drafted + ready - began,
        )
        budget.observe(tree, step)
        drafter.observe(step)
        yield step


def overlap(steps: Iterable[Step], alone: Callable[[], bool] = lambda: True) -> Iterator[Step]:
    """Hand on each step as soon as it can be read without waiting.

    A step that the device is still computing is held back until the next round is under way, so
    that the host builds the next pass meanwhile.

    alone  whether the next round is this text's too; if not, the step is handed on at once, and
           whoever reads it waits
    """
    held = None
    for step in steps:
        if held is not None:
            yield held
        held = None if step.is_known or not alone() else step
        if held is None:
            yield step
    if held is not None:
        yield held
