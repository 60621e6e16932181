"""A whole training run in a directory: data, vocabulary, head, training, what came of it.

OUTPUT/config.json, model.safetensors, experience.json, README.md, training.png     the drafter
OUTPUT/training/data/         what the target wrote (training.data)
OUTPUT/training/checkpoint.safetensors, log.jsonl                  where the run stands
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.config import flag_name
from redrafter_mlx.drafters.beams import BeamDrafter
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import hub
from redrafter_mlx.loading.precision import compute_in_float32
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import write_whole
from redrafter_mlx.measuring.acceptance import experience_from
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.pricing.experience import FILE, as_text
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.gradients import Crew, Gradients
from redrafter_mlx.training.initial import with_lookback
from redrafter_mlx.training.loop import Progress, Trainer
from redrafter_mlx.training.loss import LOSSES
from redrafter_mlx.training.objective import Objective
from redrafter_mlx.training.options import HeadOptions, TrainingOptions
from redrafter_mlx.training.recipes import Recipe, frequent_ids, recipe_for
from redrafter_mlx.training.replay import Answer, drafts_of, greedy_answers, recall, replay
from redrafter_mlx.training.shards import held_out_shards, parts, training_shards
from redrafter_mlx.training.windows import LENGTH, Shards

PASSES = 10
"""Times that training goes through the data when neither time nor steps are given."""
WIDTH, BEAM_LENGTH, BUDGET = 4, 5, 16
"""How drafts are made where progress is measured: the defaults of generation."""
MEASURE_SECONDS, SAVE_SECONDS, TELL_SECONDS = 300.0, 120.0, 20.0
QUICK_TOKENS, ALL_TOKENS = 1500, 20_000
"""Held-out tokens that are replayed during training, and after it."""


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
    start     a head to train further, as `hub.load_head_of` takes it; None: a new one
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
        minutes: float | None = None,
        jobs: int = 1,
        start: str | None = None,
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
            self.head, d2t = hub.load_head_of(target, start)
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
        make = partial(
            make_gradients,
            load,
            places.data,
            head,
            self.config,
            self.vocabulary.ids,
            training,
            seed,
        )
        self._crew = Crew(gradients, make, jobs, training.accumulate)
        depends_on = {**asdict(head), **asdict(training), "seed": seed}
        depends_on["data_tokens"] = self.shards.tokens
        depends_on["start_from"] = start and fingerprint(self.head)
        self.settings = json.loads(json.dumps(depends_on))  # as they will be read back
        self.ids = d2t
        self.drafter = self.recipe.drafter(self.head, d2t)
        self.log: list[dict] = []
        self._minutes = minutes

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
            self._set_out(self._minutes)
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._leave.close()

    @property
    def progress(self) -> Progress:
        return self._trainer.progress

    @property
    def positions_per_step(self) -> int:
        """Positions of one update."""
        return self._options.windows * self._options.accumulate * LENGTH

    @property
    def parameters(self) -> int:
        """How many the head has."""
        return sum(x.size for _, x in tree_flatten(self.head.parameters()))

    def _set_out(self, minutes: float | None) -> None:
        """Go on from the checkpoint, or decide how many steps to take."""
        if self.places.checkpoint.exists():
            self._trainer.restore(self.places.checkpoint, self.settings)
            if self.places.log.exists():
                entries = map(json.loads, self.places.log.read_text().splitlines())
                self.log = [entry for entry in entries if entry["step"] <= self.progress.step]
        elif self._options.steps is None:
            windows = len(self.shards.windows("count"))
            batch = self._options.windows * self._options.accumulate
            steps = PASSES * windows // batch
            if minutes is not None:
                steps = int(60 * minutes / self._trainer.seconds_per_step(self._crew))
            self._trainer.plan(max(1, steps))

    def run(
        self,
        tell: Callable[[Progress, dict], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end; False if `stopped()` ended it before, with a checkpoint written."""
        last = dict.fromkeys(("saved", "measured", "told"), time.monotonic())
        last["seconds"] = self.progress.seconds
        losses: list[float] = []
        self._note(self.measure(QUICK_TOKENS), tell)

        def after(progress: Progress) -> bool:
            losses.append(progress.loss)
            now = time.monotonic()
            due = now - last["measured"] >= MEASURE_SECONDS
            ended = progress.step == progress.steps or stopped()
            if due or ended or now - last["told"] >= TELL_SECONDS:
                entry = {
                    "loss": float(np.mean(losses)),
                    "speed": len(losses)
                    * self.positions_per_step
                    / (progress.seconds - last["seconds"]),
                }
                losses.clear()
                last["seconds"] = progress.seconds
                if due or ended:
                    entry |= self.measure(QUICK_TOKENS)
                    last["measured"] = time.monotonic()
                self._note(entry, tell)
                last["told"] = time.monotonic()
            if now - last["saved"] >= SAVE_SECONDS or ended:
                self._trainer.save(self.places.checkpoint, self.settings)
                last["saved"] = time.monotonic()
            return ended

        self._trainer.run(self._crew, after)
        return self.progress.step == self.progress.steps

    def measure(self, tokens: int) -> dict[str, float]:
        """Tokens per round on held-out greedy answers: of a tree, and of a chain."""
        answers = first_tokens(self.answers, tokens)
        if not answers:
            return {}
        tree = replay(self.drafter, answers, WIDTH, BEAM_LENGTH).tokens_per_round[BUDGET]
        chain = replay(self.drafter, answers, 1, BEAM_LENGTH).tokens_per_round[BUDGET]
        return {"tree": tree, "chain": chain}

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
        """Weights from before training: of a new head those of its lookback, which works as it
        begins; of one that is trained further all.
        """
        weights = tree_flatten(self.head.parameters())
        return {name: w for name, w in weights if not new or name.startswith("lookback.")}

    def blend(self, share: float) -> None:
        """Mix `share` of what the weights began as into the head (WiSE-FT, arXiv 2109.01903): the
        last thing to do, after the last checkpoint.
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


def held_out_answers(directory: Path) -> list[Answer]:
    """The greedy answers of the conversations that are kept from training."""
    return list(greedy_answers(held_out_shards(parts(directory))))


def shape_of(name: str, given: HeadOptions) -> HeadOptions:
    """The options that describe an existing head; UserError where `given` ones say otherwise."""
    c = load_head(hub.resolve_drafter(name), mx.float32)[2]
    output_layer = "tied" if c.tied_output else "trained"
    lookback_heads = c.lookback_heads or given.lookback_heads or 0  # it can learn to look back
    shape = HeadOptions(
        exit_dim=c.exit_dim, blocks=c.num_blocks, no_rnn=not c.rnn, draft_vocab=c.draft_vocab_size,
        output_layer=output_layer, fused_layers=c.fused_layers, lookback_heads=lookback_heads,
    )  # fmt: skip
    for f in fields(HeadOptions):
        wanted, found = getattr(given, f.name), getattr(shape, f.name)
        if wanted not in (f.default, found):
            raise UserError(
                f"{flag_name(f)} {wanted}: the head of --start-from {name} has {found}; leave it "
                "out"
            )
    return shape


def fingerprint(head: nn.Module) -> str:
    """16 hex digits of a head's weights."""
    digest = hashlib.sha256()
    for name, weights in tree_flatten(head.parameters()):
        digest.update(name.encode())
        digest.update(device.read(weights)[0].tobytes())
    return digest.hexdigest()[:16]


def first_tokens(answers: Sequence[Answer], tokens: int) -> list[Answer]:
    """The first answers that together have about so many tokens."""
    chosen, total = [], 0
    for answer in answers:
        if total >= tokens:
            break
        chosen.append(answer)
        total += len(answer.tokens)
    return chosen


@dataclass(frozen=True)
class Report:
    """How well a drafter does on held-out greedy answers.

    recall            (depths, k) see `replay.recall`
    tokens_per_round  by (W, L), then by budget
    """

    tokens: int
    recall: np.ndarray
    tokens_per_round: dict[tuple[int, int], dict[int, float]]


SHAPES = ((1, 5), (2, 5), (4, 3), (4, 5), (4, 7), (8, 5))


def report(drafter: BeamDrafter, answers: Sequence[Answer], tokens: int) -> Report:
    """Replay about so many held-out tokens with beams of all SHAPES."""
    answers = first_tokens(answers, tokens)
    return Report(
        sum(len(answer.tokens) for answer in answers),
        recall(drafter, answers, BEAM_LENGTH - 1),
        {shape: replay(drafter, answers, *shape).tokens_per_round for shape in SHAPES},
    )


def write_experience(directory: Path, drafter: BeamDrafter, answers: Sequence[Answer]) -> None:
    """Leave beside a head what its drafts were worth in held-out greedy answers."""
    answers = first_tokens(answers, ALL_TOKENS)
    drafts = list(drafts_of(drafter, answers, WIDTH, BEAM_LENGTH))
    if drafts:
        found = experience_from(drafts, Setting(WIDTH, BEAM_LENGTH))
        write_whole(directory / FILE, as_text({0.0: found}))


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
