"""A whole training run in a directory: data, vocabulary, head, training and measurements.

OUTPUT/config.json, model.safetensors, experience.json, README.md, training.png     the drafter
OUTPUT/training/data/         what the target wrote (training.data)
OUTPUT/training/checkpoint.safetensors, log.jsonl                  where the run stands
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.loading import drafters
from redrafter_mlx.loading.precision import compute_in_float32
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.deadline import NEVER, Deadline
from redrafter_mlx.training.gradients import Crew, Gradients
from redrafter_mlx.training.initial import with_lookback
from redrafter_mlx.training.loop import Progress, Trainer
from redrafter_mlx.training.loss import LOSSES
from redrafter_mlx.training.objective import Objective
from redrafter_mlx.training.options import HeadOptions, TrainingOptions
from redrafter_mlx.training.recipes import recipe_for
from redrafter_mlx.training.recipes.recipe import Recipe
from redrafter_mlx.training.replay import Answer
from redrafter_mlx.training.report import (
    ALL_TOKENS,
    BUDGET,
    CHAIN,
    SHAPES,
    USUAL,
    Report,
    first_tokens,
    held_out_answers,
    tokens_per_round,
)
from redrafter_mlx.training.shards import parts, training_shards
from redrafter_mlx.training.start import fingerprint
from redrafter_mlx.training.windows import LENGTH, Shards, frequent_ids

PASSES = 10
"""Times that training goes through the data when neither time nor steps are given."""
MEASURE_SECONDS, SAVE_SECONDS, TELL_SECONDS = 300.0, 120.0, 20.0
QUICK_TOKENS = 1500
"""Held-out tokens that are replayed during training."""
QUICK_SECONDS = 30.0
"""What a measurement during training may take of a run with a deadline."""
COURSE = 10_000
"""Places of the learning rate schedule where the number of steps is not known beforehand."""
RECENT = 8
"""Steps whose times tell how many more a deadline leaves room for."""


@dataclass(frozen=True)
class Places:
    """Where the parts of a run lie."""

    output: Path

    @property
    def data(self) -> Path:
        return self.output / "training" / "data"

    @property
    def checkpoint(self) -> Path:
        return self.output / "training" / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        return self.output / "training" / "log.jsonl"


@dataclass(frozen=True)
class Vocabulary:
    """The token ids a head can propose in any text.

    ids       (D,)
    coverage  share of the held-out answers' tokens among them; with_prompt: among them or the
              answer's own prompt
    """

    ids: np.ndarray
    coverage: float
    with_prompt: float

    @classmethod
    def measured(cls, ids: np.ndarray, answers: Sequence[Answer], vocab_size: int):
        """The vocabulary of these ids, its coverage measured on the answers."""
        known = np.zeros(vocab_size, bool)
        known[ids] = True
        static, either, total = 0, 0, 0
        for answer in answers:
            inside = known[answer.tokens]
            static += inside.sum()
            either += (inside | np.isin(answer.tokens, answer.prompt)).sum()
            total += len(inside)
        return cls(ids, static / max(total, 1), either / max(total, 1))


class TrainingRun:
    """Training on data that is there: the head, its trainer, and how it is measured.

    load      gives the target, with the layers that the head fuses in `taps`
    jobs      processes that compute gradients; with several, `load` is called in each and must be
              picklable. The weights do not depend on it.
    start     a head to train further, as `drafters.load_head_of` takes it; None: a new one
    until     by when everything, report included, must be done; as many steps as that allows
    reserve   seconds of it that the report may take; less if it turns out to need less
    settings  everything the weights depend on; a checkpoint made with others is refused

    A context: the other processes end with it.
    """

    def __init__(
        self,
        load: Callable[[], Target],
        places: Places,
        head: HeadOptions,
        training: TrainingOptions,
        seed: int,
        until: Deadline = NEVER,
        jobs: int = 1,
        start: str | None = None,
        reserve: float = 0.0,
    ):
        self.target, self.places, self._options = load(), places, training
        target = self.target
        self.recipe = recipe_for(target, head)
        self.shards = Shards(training_shards(parts(places.data)), self.recipe.whole)
        self.recipe.prepare(self.shards)
        self.answers = held_out_answers(places.data)
        if start is None:
            self.head, d2t = self._new_head(head, seed)
        else:
            self.head, d2t = drafters.load_head_of(target, start)
            compute_in_float32(self.head)
        if start and head.lookback_heads and not self.head.config.lookback_heads:
            batch = next(self.shards.batches("fit", 64, 1))
            self.head = with_lookback(
                self.head, head.lookback_heads, target.embed, target.output_layer, batch,
                mx.random.key(seed),
            )  # fmt: skip
        self.config = self.head.config
        self._began_as = self._worth_keeping(new=start is None)
        self.vocabulary = Vocabulary.measured(np.array(d2t), self.answers, target.vocab_size)
        gradients = gradients_of(self.recipe, self.head, d2t, self.shards, training, seed)
        self._trainer = Trainer(gradients, training, Progress(training.steps or 1))
        ids = self.vocabulary.ids
        make = partial(make_gradients, load, places.data, head, self.config, ids, training, seed)
        self._crew = Crew(gradients, make, jobs, training.accumulate)
        depends_on = {**asdict(head), **asdict(training), "seed": seed}
        depends_on["data_tokens"] = self.shards.tokens
        depends_on["start_from"] = start and fingerprint(self.head)
        self.settings = json.loads(json.dumps(depends_on))  # as they will be read back
        self.ids = d2t
        self.drafter = self.recipe.drafter(self.head, d2t)
        self.log: list[dict] = []
        self._until, self._reserve = until, reserve
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._quick = first_tokens(self.answers, QUICK_TOKENS)

    def _new_head(self, options: HeadOptions, seed: int) -> tuple[nn.Module, mx.array]:
        """An untrained head and the token ids (D,) that it can propose."""
        ids = frequent_ids(self.shards, options.draft_vocab, self.target.vocab_size)
        d2t = mx.array(ids.astype(np.int32))
        ahead = self._options.ahead
        config = self.recipe.config(len(ids), ahead)
        return self.recipe.new(config, d2t, self.shards, ahead, mx.random.key(seed)), d2t

    def __enter__(self) -> TrainingRun:
        with ExitStack() as stack:
            stack.enter_context(self._crew)
            self._set_out()
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._leave.close()

    @property
    def progress(self) -> Progress:
        return self._trainer.progress

    @property
    def seconds_per_step(self) -> float:
        """Mean of the latest steps of a run with a deadline; 0 before the first."""
        return sum(self._recent) / max(1, len(self._recent))

    @property
    def positions_per_step(self) -> int:
        """Positions of one update."""
        return self._options.windows * self._options.accumulate * LENGTH

    @property
    def parameters(self) -> int:
        """How many parameters the head has."""
        return sum(x.size for _, x in tree_flatten(self.head.parameters()))

    def _set_out(self) -> None:
        """Resume from the checkpoint, or decide how many steps to take."""
        trainer, given = self._trainer, self._options.steps
        if self.places.checkpoint.exists():
            trainer.restore(self.places.checkpoint, self.settings)
            if self.places.log.exists():
                entries = map(json.loads, self.places.log.read_text().splitlines())
                self.log = [entry for entry in entries if entry["step"] <= self.progress.step]
            finished = self.progress.step == self.progress.steps
            if self._until.bounded and finished and given is None:
                trainer.plan_more(1, COURSE)
        elif given is None and self._until.bounded:
            trainer.plan(1, COURSE)
        elif given is None:
            windows = len(self.shards.windows("count"))
            batch = self._options.windows * self._options.accumulate
            trainer.plan(max(1, PASSES * windows // batch))
        if self._until.bounded and self.progress.step < self.progress.steps:
            self._recent.append(trainer.seconds_per_step(self._crew))
            self.progress.steps = max(self._steps_in_time(), self.progress.step + 1)

    @property
    def _seconds_left(self) -> float:
        """Seconds until the report must begin."""
        return self._until.left - self._reserve

    def _steps_in_time(self) -> int:
        """Steps in all: those done, and as many as there is time for before the report."""
        more = round(self._seconds_left / self.seconds_per_step)
        steps = self.progress.step + max(0, more)
        return min(steps, self._options.steps or steps)

    def run(
        self,
        tell: Callable[[Progress, dict], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end; False if `stopped()` ended it before, with a checkpoint written.

        With a deadline the number of steps is settled anew after each one. Then nothing is measured
        at the end, where the report does so at once, nor at the beginning of a short run.
        """
        last = dict.fromkeys(("saved", "measured", "told"), time.monotonic())
        last["seconds"] = self.progress.seconds
        losses: list[float] = []
        if not self._until.bounded or self._seconds_left > MEASURE_SECONDS:
            self._note(self.measure(), tell)

        def after(progress: Progress) -> bool:
            losses.append(progress.loss)
            if self._until.bounded:
                self._recent.append(progress.seconds - last.get("step", last["seconds"]))
                last["step"] = progress.seconds
                progress.steps = self._steps_in_time()
            now = time.monotonic()
            ended = progress.step == progress.steps or stopped()
            due = now - last["measured"] >= MEASURE_SECONDS
            measures = due or ended
            if self._until.bounded:
                measures = due and not ended and self._seconds_left > QUICK_SECONDS
            if measures or ended or now - last["told"] >= TELL_SECONDS:
                positions = len(losses) * self.positions_per_step
                speed = positions / (progress.seconds - last["seconds"])
                entry = {"loss": float(np.mean(losses)), "speed": speed}
                losses.clear()
                last["seconds"] = progress.seconds
                if measures:
                    entry |= self.measure()
                    last["measured"] = time.monotonic()
                self._note(entry, tell)
                last["told"] = time.monotonic()
            if now - last["saved"] >= SAVE_SECONDS or ended:
                self._trainer.save(self.places.checkpoint, self.settings)
                last["saved"] = time.monotonic()
            return ended

        self._trainer.run(self._crew, after)
        return self.progress.step == self.progress.steps

    def measure(self) -> dict[str, float]:
        """Tokens per round on held-out greedy answers: of a tree, and of a chain.

        With a deadline the first call settles how many answers there is time for and, from how
        long they took, how long the report can take at most.
        """
        if not self._until.bounded:
            return tokens_per_round(self.drafter, self._quick)[0]
        began = time.monotonic()
        limit = Deadline.after(QUICK_SECONDS)
        rates, tried = tokens_per_round(self.drafter, self._quick, limit)
        self._quick = self._quick[:tried]
        tokens = sum(len(answer.tokens) for answer in self._quick)
        searches = (len(SHAPES) + 1) / 2  # of a report, for each of the two here
        whole = searches * (time.monotonic() - began) * ALL_TOKENS / max(tokens, 1)
        self._reserve = min(self._reserve, whole)
        return rates

    def note(self, found: Report) -> None:
        """Log what the report measured, if training did not measure at its end."""
        if self._until.bounded and CHAIN in found.tokens_per_round:
            usual, chain = (found.tokens_per_round[s][BUDGET] for s in (USUAL, CHAIN))
            self._note({"tree": usual, "chain": chain}, lambda progress, entry: None)

    def _note(self, entry: dict, tell: Callable[[Progress, dict], None]) -> None:
        progress = self.progress
        entry = {"step": progress.step, "seconds": round(progress.seconds, 2)} | {
            name: round(value, 4) for name, value in entry.items()
        }
        self.log.append(entry)
        partial = self.places.log.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.log))
        os.replace(partial, self.places.log)
        tell(progress, entry)

    def _worth_keeping(self, new: bool) -> dict[str, mx.array]:
        """Weights from before training: of a new head those of its lookback, which works from the
        start; of a head that is trained further, all.
        """
        weights = tree_flatten(self.head.parameters())
        return {name: w for name, w in weights if not new or name.startswith("lookback.")}

    def blend(self, share: float) -> None:
        """Mix `share` of what the weights began as into the head (WiSE-FT, arXiv 2109.01903): the
        last thing to do, after the last checkpoint is written.
        """
        now = dict(tree_flatten(self.head.parameters()))
        mixed = [
            (name, share * before + (1 - share) * now[name])
            for name, before in self._began_as.items()
        ]
        self.head.load_weights(mixed, strict=False)

    def save(self, dtype: str) -> None:
        """Write the drafter's config.json and model.safetensors."""
        self.recipe.save(self.places.output, self.head, self.ids, getattr(mx, dtype))


def gradients_of(
    recipe: Recipe,
    head: nn.Module,
    d2t: mx.array,
    shards: Shards,
    training: TrainingOptions,
    seed: int,
) -> Gradients:
    """What training a head minimises, and its gradients."""
    objective = Objective(
        LOSSES[training.loss], training.ahead, training.step_decay,
        recipe.features(training.ahead), recipe.output(head, d2t), recipe.past(head),
        training.lost,
    )  # fmt: skip
    allowed = np.arange(recipe.target.vocab_size) if recipe.tied else np.sort(np.array(d2t))
    return Gradients(head, objective, shards, allowed, training, seed)


def make_gradients(
    load: Callable[[], Target],
    data: Path,
    options: HeadOptions,
    config: Any,
    ids: np.ndarray,
    training: TrainingOptions,
    seed: int,
) -> Gradients:
    """The same in another process: `ids` (D,) of the draft vocabulary."""
    recipe = recipe_for(load(), options)
    d2t = mx.array(ids.astype(np.int32))
    shards = Shards(training_shards(parts(data)), recipe.whole)
    recipe.prepare(shards)
    return gradients_of(recipe, recipe.empty(config), d2t, shards, training, seed)
