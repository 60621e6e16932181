"""The result of a training run: how well the head drafts held-out answers.

With a deadline the report is as large as the time allows: one answer after another is tried with
all searches, and a search that there is no time to try on the first answer is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from redrafter_mlx.drafters.beams import BeamDrafter
from redrafter_mlx.machine.storage import write_whole
from redrafter_mlx.measuring.acceptance import Draft, experience_from
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.pricing.experience import FILE, as_text
from redrafter_mlx.training.deadline import NEVER, Deadline
from redrafter_mlx.training.replay import RECALL, Answer, Recaller, Replayer, greedy_answers
from redrafter_mlx.training.shards import held_out_shards, parts

WIDTH, BEAM_LENGTH, BUDGET = 4, 5, 16
"""How drafts are made where progress is measured: the defaults of generation."""
USUAL, CHAIN = (WIDTH, BEAM_LENGTH), (1, BEAM_LENGTH)
SHAPES = (CHAIN, (2, 5), (4, 3), USUAL, (4, 7), (8, 5))
"""(W, L) of the beams that a report compares."""
ALL_TOKENS = 20_000
"""Held-out tokens of a report."""


@dataclass(frozen=True)
class Report:
    """How well a drafter does on held-out greedy answers.

    recall            (depths, k) see `replay.Recaller`; None if there was no time for it
    tokens_per_round  by (W, L), then by budget
    left_out          (W, L) for which there was no time
    drafts            what a search of WIDTH and BEAM_LENGTH scored at each token
    """

    tokens: int
    recall: np.ndarray | None
    tokens_per_round: dict[tuple[int, int], dict[int, float]]
    left_out: Sequence[tuple[int, int]] = ()
    drafts: Sequence[Draft] = field(default=(), repr=False)


def held_out_answers(directory: Path) -> list[Answer]:
    """The greedy answers of the conversations that are held out from training."""
    return list(greedy_answers(held_out_shards(parts(directory))))


def first_tokens(answers: Sequence[Answer], tokens: int) -> list[Answer]:
    """The first answers that together have about so many tokens."""
    chosen, total = [], 0
    for answer in answers:
        if total >= tokens:
            break
        chosen.append(answer)
        total += len(answer.tokens)
    return chosen


def report(drafter: BeamDrafter, answers: Sequence[Answer], until: Deadline = NEVER) -> Report:
    """Replay about ALL_TOKENS held-out tokens with beams of all SHAPES, or as many as time allows.

    The usual beams are tried on one answer in any case.
    """
    trials: dict = {USUAL: Replayer(drafter, *USUAL, keep=True)}
    trials["recall"] = Recaller(drafter, BEAM_LENGTH - 1)
    trials |= {shape: Replayer(drafter, *shape) for shape in SHAPES if shape != USUAL}
    tokens = 0
    for answer in first_tokens(answers, ALL_TOKENS):
        found = _tried(trials, answer, until, first=not tokens)
        if len(found) < len(trials) and tokens:
            break  # an answer counts with all searches or with none
        trials = {name: trials[name] for name in found}
        for name, results in found.items():
            trials[name].add(*results)
        tokens += len(answer.tokens)
    rates = {shape: trials[shape].found.tokens_per_round for shape in SHAPES if shape in trials}
    return Report(
        tokens,
        trials["recall"].found if "recall" in trials else None,
        rates,
        [shape for shape in SHAPES if shape not in trials],
        trials[USUAL].drafts,
    )


def _tried(trials: dict, answer: Answer, until: Deadline, first: bool) -> dict:
    """What trials find in an answer, by name: those that can be begun in time.

    first  each compiles now, so none is begun that would end late if it took as long as the
           slowest so far; but at least one is
    """
    found, slowest = {}, 0.0
    for name, trial in trials.items():
        if until.left <= slowest and (found or not first):
            break
        began = time.monotonic()
        found[name] = trial.of(answer)
        if first:
            slowest = max(slowest, time.monotonic() - began)
    return found


def tokens_per_round(
    drafter: BeamDrafter, answers: Sequence[Answer], until: Deadline = NEVER
) -> tuple[dict[str, float], int]:
    """Tokens per round of a tree and of a chain, and how many of the answers there was time for."""
    trials = {"tree": Replayer(drafter, *USUAL), "chain": Replayer(drafter, *CHAIN)}
    tried = 0
    for answer in answers:
        if tried and until.passed:
            break
        for trial in trials.values():
            trial.add(*trial.of(answer))
        tried += 1
    rates = {name: trial.found.tokens_per_round[BUDGET] for name, trial in trials.items()}
    return rates if tried else {}, tried


def write_experience(directory: Path, found: Report) -> None:
    """Write beside a head what its drafts were worth in held-out greedy answers."""
    if found.drafts:
        experience = experience_from(found.drafts, Setting(*USUAL))
        write_whole(directory / FILE, as_text({0.0: experience}))


def table(found: Report) -> str:
    """The report as Markdown."""
    if not found.tokens:
        return (
            "No greedy answer was kept from training, so there is nothing to measure on: more "
            "--data-tokens, --data-minutes or --minutes would give some."
        )
    lines = [f"On {found.tokens:,} held-out tokens of greedy answers:", ""]
    if found.recall is not None:
        lines += _rows("depth", [f"top-{k}" for k in RECALL])
        for depth, row in enumerate(found.recall, start=1):
            lines.append(f"| {depth} | " + " | ".join(f"{share:.1%}" for share in row) + " |")
        lines.append("")
    budgets = list(next(iter(found.tokens_per_round.values()), {}))
    lines += ["Tokens per round by beams (width x length) and budget:", ""]
    lines += _rows("beams", budgets)
    for (width, length), rates in found.tokens_per_round.items():
        cells = " | ".join(f"{rates[budget]:.2f}" for budget in budgets)
        lines.append(f"| {width} x {length} | {cells} |")
    if found.left_out:
        shapes = ", ".join(f"{width} x {length}" for width, length in found.left_out)
        lines += ["", f"There was no time for {shapes}; --evaluate measures all."]
    return "\n".join(lines)


def _rows(first: str, columns: Sequence) -> list[str]:
    """The first two lines of a table."""
    return [
        f"| {first} | " + " | ".join(map(str, columns)) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
