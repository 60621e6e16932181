"""The first stage of training: the target writes what the head will learn from.

Batches of conversations are played and written one after another, until there are enough tokens,
the time is up or no questions are left. What a batch holds depends only on the target, the options,
its number and the batches before it, so a run that was killed ends with the same files as one that
was not. `data.json` says what a directory was made with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import in_use, one_line
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.deadline import NEVER, Deadline
from redrafter_mlx.training.estimate import share
from redrafter_mlx.training.filters import Sieve, loop_end, stretches
from redrafter_mlx.training.lockstep import Conversation, Role, can_stagger, play
from redrafter_mlx.training.manifest import note_counts, settle
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.scripts import Template
from redrafter_mlx.training.shards import (
    COLUMNS,
    conversations,
    held_out_path,
    map_shard,
    shard_count,
    shard_metadata,
    shard_path,
    write_batch,
)
from redrafter_mlx.training.sources import Given, LeftOut, Own

LEAST = 8
"""Tokens of answers that the first batch has per row, on average, before a deadline may cut it."""
WORTH = 0.5
"""With a deadline, a batch is begun only if there is time for at least this share of it."""


@dataclass(frozen=True)
class Counts:
    """What became of the conversations so far.

    conversations  kept
    tokens         of the target's answers, kept
    near_repeats   left out because their question was much like an earlier one
    loops          cut where an answer began to repeat itself
    unanswered     left out because the columns ended before an answer began
    """

    conversations: int = 0
    tokens: int = 0
    near_repeats: int = 0
    loops: int = 0
    unanswered: int = 0

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Progress:
    """Where the stage stands: what was kept, and the goal in tokens; batches, share of the next."""

    counts: Counts
    goal: int
    batches: int
    share: float
    seconds: float


@dataclass(frozen=True)
class Written:
    """How the stage ended.

    ended      "tokens": there are enough; "time"; "questions": all of --data is answered;
               "repeats": the target only asks what it asked before
    """

    counts: Counts
    batches: int
    ended: str
    left_out: LeftOut


@dataclass(frozen=True)
class _State:
    """After a batch: counts, the next question of --data, and questions still to be answered."""

    counts: Counts = Counts()
    next: int = 0
    again: tuple[int, ...] = ()

    def metadata(self) -> dict[str, str]:
        return {"state": json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def of(cls, path: Path) -> _State:
        try:
            state = json.loads(shard_metadata(path)["state"])
            return cls(Counts(**state["counts"]), state["next"], tuple(state["again"]))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} was not written by this command; delete it") from error


def write_data(
    target: Target,
    tokenizer: TokenizerWrapper,
    directory: Path,
    options: DataOptions,
    progress: Callable[[Progress], None] = lambda progress: None,
    job: int = 0,
    jobs: int = 1,
    until: Deadline = NEVER,
) -> Written:
    """Fill `directory` with conversations of the target, from wherever an earlier run left off.

    target     with the layers to keep in `taps`
    progress   called after every column
    job, jobs  which of several jobs this is: it has its share of the tokens and of the questions,
               and a seed of its own
    until      when to stop: the batch under way is cut there, unless it is the first and holds
               hardly an answer yet

    Otherwise batches are whole: the goal is overshot by less than one, and with `data_minutes` no
    batch but the first is begun that would end later. Raises UserError when the directory is in
    use, was made with another target or other options, or the disk is full.
    """
    with in_use(directory):
        template = Template.of(tokenizer)
        options = share(options, job, jobs)
        if options.data:
            source = Given(template, tokenizer, options, job, jobs)
        else:
            source = Own(template, tokenizer, options)
        rows = settle(directory, target, options, template, source.digest, jobs)
        if isinstance(source, Given):
            source.arrange(rows)
        stage = _Stage(target, directory, options, rows, source, progress, until)
        ended = stage.run()
        return Written(stage.state.counts, stage.batches, ended, source.left_out)


class _Stage:
    """The batches of one directory, one after the other."""

    def __init__(
        self, target, directory: Path, options: DataOptions, rows: int, source, progress, until
    ):
        self._until: Deadline = until
        self._target, self._directory, self._options = target, directory, options
        self._rows, self._source, self._progress = rows, source, progress
        self._staggered = can_stagger(target)
        self._begun = time.monotonic()
        for left_behind in directory.glob(".*.partial*"):
            left_behind.unlink()
        self.batches = shard_count(directory)
        self.state = (
            _State.of(shard_path(directory, self.batches - 1)) if self.batches else _State()
        )
        self._sieve = Sieve()
        if isinstance(source, Own):
            for number in range(self.batches):
                self._remember(shard_path(directory, number))
                if held_out_path(directory, number).exists():
                    self._remember(held_out_path(directory, number))

    def run(self) -> str:
        """Write batches; returns why there are no more of them."""
        took = 0.0
        while self.state.counts.tokens < self._options.data_tokens:
            minutes, begun = self._options.data_minutes, time.monotonic()
            late = minutes is not None and begun - self._begun + took > 60 * minutes
            if self.batches and (late or self._until.left < WORTH * took or self._until.passed):
                return "time"
            if self._source.indices(self.state) == []:
                return "questions"
            kept, state = self._play()
            if not kept:
                return "time" if self._until.passed else "repeats"
            self._write(kept, state)
            took = time.monotonic() - begun
        return "tokens"

    def _play(self) -> tuple[list[Conversation], _State]:
        """The next batch's conversations, filtered, and the state after it."""
        seed = hashlib.sha256(f"{self._options.seed}/{self.batches}".encode()).digest()
        taken = 0

        def counted():
            nonlocal taken
            for script in self._source.scripts(self.batches, self.state):
                taken += 1
                yield script

        played = play(
            self._target, counted(), self._rows, self._options.columns,
            mx.random.key(int.from_bytes(seed[:8], "little")), self._tell, self._staggered,
            self._cuts,
        )  # fmt: skip
        kept, counts = self._filter(played)
        indices = self._source.indices(self.state)
        if indices is None:
            return kept, _State(counts)
        done = {c.number for c in played if _answered(c)}
        again = tuple(indices[i] for i in range(taken) if i not in done)
        taken_anew = taken - min(taken, len(self.state.again))
        left = self.state.again[taken:]  # few rows may not even reach all of them
        return kept, _State(counts, self.state.next + taken_anew, again + left)

    def _cuts(self, answered: int) -> bool:
        """Whether to end the batch here, after so many tokens of answers."""
        return self._until.passed and (self.batches > 0 or answered >= LEAST * self._rows)

    def _filter(self, played: Sequence[Conversation]) -> tuple[list[Conversation], Counts]:
        kept, repeats, loops, unanswered, tokens = [], 0, 0, 0, 0
        for conversation in played:
            if not _answered(conversation):
                unanswered += 1
                continue
            if isinstance(self._source, Own) and not self._sieve.admits(
                _question(conversation.tokens, conversation.roles)
            ):
                repeats += 1
                continue
            end = _loop_end(conversation)
            loops += end is not None
            kept.append(conversation if end is None else _cut(conversation, end))
            tokens += int((kept[-1].roles == Role.ASSISTANT).sum())
        here = Counts(len(kept), tokens, repeats, loops, unanswered)
        return kept, self.state.counts + here

    def _write(self, kept: Sequence[Conversation], state: _State) -> None:
        try:
            write_batch(self._directory, self.batches, kept, state.metadata())
            mx.clear_cache()
            self.batches, self.state = self.batches + 1, state
            note_counts(self._directory, asdict(state.counts))
        except (OSError, RuntimeError) as error:  # MLX reports a full disk as a RuntimeError
            raise UserError(
                f"no data could be written to {self._directory}: {one_line(error)}; "
                f"complete batches: {self.batches}; make room and run again"
            ) from error

    def _remember(self, path: Path) -> None:
        shard = map_shard(path)
        for first, end in conversations(shard):
            question = _question(shard["tokens"][first:end], shard["roles"][first:end])
            self._sieve.remember(question)

    def _tell(self, done: int, total: int) -> None:
        seconds = time.monotonic() - self._begun
        self._progress(
            Progress(
                self.state.counts, self._options.data_tokens, self.batches, done / total, seconds
            )
        )


def _answered(conversation: Conversation) -> bool:
    return bool((conversation.roles == Role.ASSISTANT).any())


def _question(tokens: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """What the user first asks, or how a text begins."""
    first, end = stretches(roles == (Role.USER if Role.USER in roles else Role.ASSISTANT))[0]
    return tokens[first:end][:256]


def _loop_end(conversation: Conversation) -> int | None:
    """Where to cut the first answer that repeats itself; None if none does."""
    for first, last in stretches(conversation.roles == Role.ASSISTANT):
        end = loop_end(conversation.tokens[first:last])
        if end is not None:
            return first + end
    return None


def _cut(conversation: Conversation, end: int) -> Conversation:
    parts = {name: getattr(conversation, name)[:end] for name in COLUMNS}
    return dataclasses.replace(conversation, **parts)
