"""What --dry-run says: what a training run will take, and whether --minutes can be kept.

Everything is done once, as small as possible: columns of a batch are timed in as many processes as
will write data, and a head is set up, trained and evaluated on made-up conversations.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.errors import UserError
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.deadline import Budget, Deadline
from redrafter_mlx.training.estimate import Estimate, choose_jobs, estimate, share
from redrafter_mlx.training.jobs import side_by_side
from redrafter_mlx.training.lockstep import Conversation, K, Role
from redrafter_mlx.training.options import DataOptions, HeadOptions, TrainingOptions
from redrafter_mlx.training.recipes.recipe import Recipe
from redrafter_mlx.training.report import report
from redrafter_mlx.training.run import Places, TrainingRun
from redrafter_mlx.training.shards import part_path, write_batch
from redrafter_mlx.training.windows import LENGTH

FIRST_ANSWERS = 64
"""Columns of a batch after which enough rows answer for it to be cut, as the demo target writes."""
CONVERSATIONS = 32
"""How many are made up."""


@dataclass(frozen=True)
class Rehearsal:
    """What follows the data costs at the least, in seconds.

    setting_out  until the first step: the other processes, the head's first weights, compiling
    step         of training
    report       on one answer, with the usual beams
    memory       bytes
    """

    setting_out: float
    step: float
    report: float
    memory: int


def forecast(
    source: Any,
    options: tuple[DataOptions, HeadOptions, TrainingOptions],
    start: str | None,
    budget: Budget,
) -> str:
    """What the run will take; UserError if --minutes are too few for the least of it.

    source  loads the target, as `train.Source`
    start   a head to train further
    budget  begun when the command was
    """
    data, head, training = options
    loading = budget.elapsed
    jobs = choose_jobs(source.target(), data)
    began = time.monotonic()
    found = side_by_side(jobs, partial(_estimate, source, data, jobs), lambda *told: None)
    loading += max(ready for _, ready in found) - began
    parts = [part for part, _ in found]
    rehearsal = rehearse(source, head, training, data, jobs, start)
    total = lambda name: sum(getattr(part, name) for part in parts)
    positions = training.windows * training.accumulate * LENGTH
    lines = [
        f"data: {jobs} jobs, {total('batches')} batches of {parts[0].rows} x "
        f"{parts[0].columns} tokens, about {total('tokens_per_second'):.0f} tokens of answers "
        f"per second: {max(part.seconds for part in parts) / 60:.0f} minutes, "
        f"{total('disk') / 1e9:.2f} GB on disk, {total('memory') / 1e9:.2f} GB of memory",
        f"training: {rehearsal.memory / 1e9:.2f} GB of memory; {rehearsal.setting_out:.0f} seconds "
        f"to set out, {rehearsal.step:.2f} seconds a step of {positions} positions",
    ]
    if budget.minutes is not None:
        lines.append(_kept(budget, loading, parts, rehearsal))
    return "\n".join(lines)


def _estimate(source: Any, options: DataOptions, jobs: int, job: int, tell) -> tuple:
    """A job's Estimate, and when it was ready to begin."""
    target = source.target()
    ready = time.monotonic()
    return estimate(target, share(options, job, jobs)), ready


def _kept(budget: Budget, loading: float, parts: list[Estimate], rehearsal: Rehearsal) -> str:
    """How --minutes will be spent; UserError if they are too few."""
    whole = 60 * budget.minutes
    first = max(
        min(FIRST_ANSWERS, part.columns) * part.seconds / part.batches / part.columns
        for part in parts
    )
    least = loading + first + rehearsal.setting_out + rehearsal.step + rehearsal.report
    if least > whole:
        raise UserError(
            f"--minutes {budget.minutes:g} cannot be kept: in seconds, loading takes "
            f"{loading:.0f}, data up to the first answers {first:.0f}, setting out and a step "
            f"{rehearsal.setting_out + rehearsal.step:.0f}, the shortest report "
            f"{rehearsal.report:.0f}; give --minutes {math.ceil(least / 30) / 2:g} or more"
        )
    writing = max(first, budget.seconds("data") - loading)
    writing = min(writing, max(part.seconds for part in parts))
    reporting = max(budget.seconds("report"), rehearsal.report)
    steps = (whole - loading - writing - rehearsal.setting_out - reporting) / rehearsal.step
    tokens = writing * sum(part.tokens_per_second for part in parts)
    return (
        f"--minutes {budget.minutes:g}: {loading / 60:.1f} for loading, {writing / 60:.1f} for "
        f"about {tokens:,.0f} tokens of answers, {rehearsal.setting_out / 60:.1f} for setting out, "
        f"the rest for about {max(1, steps):,.0f} steps and up to {reporting / 60:.1f} of report"
    )


def rehearse(
    source: Any,
    head: HeadOptions,
    training: TrainingOptions,
    data: DataOptions,
    jobs: int,
    start: str | None,
) -> Rehearsal:
    """Set up a head, train it and evaluate it on made-up conversations."""
    with TemporaryDirectory() as scratch:
        places = Places(Path(scratch))
        part = part_path(places.data, 0)
        part.mkdir(parents=True)
        target = source.target()
        made_up = _made_up(target, max(2 * LENGTH, data.columns // 2))
        write_batch(part, 0, made_up, {})
        began = time.monotonic()
        now = Deadline(began)
        with TrainingRun(source.target, places, head, training, data.seed, now, jobs, start) as run:
            ready = time.monotonic()
            step = run.seconds_per_step
        ended = time.monotonic()
        report(run.drafter, run.answers, now)
        reported = time.monotonic() - ended
        memory = training_bytes(run.recipe, run.config, training, data.columns)
        return Rehearsal(ready - began, step, reported, memory)


def _made_up(target: Target, length: int) -> list[Conversation]:
    """Conversations of random tokens, marked as what the target would write greedily."""
    draw = np.random.default_rng(0)
    caches = target.empty_caches()
    caches.begin(1, certain=True)
    width = target.forward(mx.zeros((1, 1), mx.int32), caches).hidden.shape[-1]
    k = min(K, target.vocab_size)
    found = []
    for number in range(CONVERSATIONS):
        tokens = draw.integers(0, target.vocab_size, length + 1).astype(np.int32)
        top_ids = draw.integers(0, target.vocab_size, (length, k)).astype(np.int32)
        top_ids[:, 0] = tokens[1:]
        roles = np.full(length, Role.ASSISTANT, np.uint8)
        roles[: length // 4] = Role.USER
        logits = np.tile(-np.arange(k, dtype=np.float16), (length, 1))
        hidden = mx.array(draw.normal(size=(length, width)).astype(np.float16))
        found.append(Conversation(number, tokens[:-1], roles, hidden, top_ids, logits))
    return found


def training_bytes(recipe: Recipe, config: Any, options: TrainingOptions, columns: int) -> int:
    """Memory of training, roughly: the target, the head with its optimiser, one batch.

    columns  tokens of the longest conversation
    """
    size = lambda module: sum(x.size for _, x in tree_flatten(module.parameters()))
    model = sum(x.nbytes for _, x in tree_flatten(recipe.target.model.parameters()))
    head = 4 * size(recipe.empty(config))
    h = recipe.target.hidden_size
    positions = columns if recipe.whole else options.windows * LENGTH
    rows = positions * options.ahead
    numbers = rows * (2 * (recipe.view.width + 6 * h) + 4 * options.candidates)
    looks = 9 if recipe.whole else getattr(config, "lookback_heads", 0)
    numbers += 6 * rows * looks * columns
    return model + 4 * head + 4 * numbers
