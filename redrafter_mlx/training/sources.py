"""What the target is asked for its training data: questions of its own, or those of --data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.filters import Sieve
from redrafter_mlx.training.lockstep import Script
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.questions import Question, read_questions
from redrafter_mlx.training.scripts import (
    Template,
    answered,
    own_conversations,
    own_texts,
    prompt_length,
)

BLOCK = 8
"""Batches' worth of questions that are sorted by length among themselves: rows whose prompts are
alike in length read them many tokens at once."""


class Place(Protocol):
    """Where a stage is in its questions: the next one of --data, and those to be asked again."""

    next: int
    again: tuple[int, ...]


@dataclass(frozen=True)
class LeftOut:
    """What of --data is not used.

    bad_lines   broken ones
    repeated    questions much like an earlier one
    too_long    prompts that leave no room for an answer in a row's columns
    systems     system turns for which the chat template has no place; their questions are used
    """

    bad_lines: int = 0
    repeated: int = 0
    too_long: int = 0
    systems: int = 0


class Own:
    """Questions that the target makes up itself."""

    left_out = LeftOut()
    digest = None

    def __init__(
        self, template: Template | None, tokenizer: TokenizerWrapper, options: DataOptions
    ):
        self._make = lambda seed: (
            own_texts(tokenizer, seed, options.answer_tokens)
            if template is None
            else own_conversations(template, tokenizer, seed, options.answer_tokens)
        )
        self._seed = options.seed

    def indices(self, state: Place) -> Sequence[int] | None:
        return None

    def scripts(self, number: int, state: Place) -> Iterator[Script]:
        return self._make(f"{self._seed}/{number}")


class Given:
    """One job's questions of --data, shuffled, those of alike length near each other."""

    def __init__(
        self, template, tokenizer: TokenizerWrapper, options: DataOptions, job: int, jobs: int
    ):
        questions, bad_lines = read_questions(Path(options.data), options.skip_bad)
        text = json.dumps([dataclasses.astuple(question) for question in questions])
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._script = lambda i: answered(
            template, tokenizer, questions[i], f"{options.seed}/{i}", options.answer_tokens
        )
        room = min(options.answer_tokens, options.columns // 4)
        sieve, repeated, too_long, systems = Sieve(), 0, 0, 0
        self._lengths: dict[int, int] = {}
        for i, question in enumerate(questions):
            length = prompt_length(self._script(i))
            if length > options.columns - room:
                too_long += 1
            elif not sieve.admits(_ids(tokenizer, question)):
                repeated += 1
            else:
                self._lengths[i] = length
                systems += bool(question.system) and not _has_system(template, tokenizer, question)
        if not self._lengths:
            raise UserError(
                f"--data {options.data}: all {len(questions)} prompts are longer than "
                f"{options.columns - room} tokens; raise --columns"
            )
        self._lengths = dict(list(self._lengths.items())[job::jobs])
        self.left_out = LeftOut(bad_lines, repeated, too_long, systems)
        self._seed = options.seed

    def arrange(self, rows: int) -> None:
        """Fix the order for batches of `rows` rows."""
        kept = np.array(list(self._lengths))
        kept = kept[np.random.default_rng(self._seed).permutation(len(kept))]
        size = BLOCK * rows
        blocks = (kept[first : first + size] for first in range(0, len(kept), size))
        self._order = [int(i) for block in blocks for i in sorted(block, key=self._lengths.get)]

    def indices(self, state: Place) -> Sequence[int]:
        """The questions that are left, in order."""
        return [*state.again, *self._order[state.next :]]

    def scripts(self, number: int, state: Place) -> Iterator[Script]:
        return (self._script(i) for i in self.indices(state))


def _has_system(template: Template | None, tokenizer: TokenizerWrapper, question: Question) -> bool:
    return (
        template is not None
        and not question.is_text
        and template.system_opening(tokenizer, question.system) is not None
    )


def _ids(tokenizer: TokenizerWrapper, question: Question) -> list[int]:
    """What two questions are compared by: system and user turns, as token ids."""
    return tokenizer.encode("\n".join((question.system, *question.turns)), add_special_tokens=False)
