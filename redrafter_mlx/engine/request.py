"""What is asked of an engine, and what it answers: plain data, for any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.sample_utils import LogitsProcessor

from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions

DEFAULT, PLAIN = "default", "none"
"""Names of drafters: the one that the engine was started with, and no drafter."""


@dataclass(frozen=True)
class Request:
    """One prompt to be answered.

    prompt        token ids, the whole conversation
    drafter       name of one of the engine's drafters
    top_logprobs  how many of the likeliest tokens are wanted with each token and its own
                  log-probability; None: neither
    marks         places of the prompt at which later prompts may part from it: where the last
                  message ends and the model's turn begins
    """

    prompt: Sequence[int]
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    draft: DraftOptions = field(default_factory=DraftOptions)
    drafter: str = DEFAULT
    top_logprobs: int | None = None
    marks: Sequence[int] = ()
    logits_processors: Sequence[LogitsProcessor] = ()


@dataclass(frozen=True)
class Piece:
    """One token of an answer.

    text          newly decoded; may be empty
    from_draft    whether it had been drafted
    logprob       of the target, before penalties; None if it was not asked for
    top_logprobs  (id, logprob) of the likeliest tokens, if asked for
    """

    text: str
    token: int
    from_draft: bool
    logprob: float | None = None
    top_logprobs: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class DraftedTree:
    """The tree of a round: N tokens, the row of each one's parent (-1: none), the rows accepted."""

    tokens: Sequence[int]
    parents: Sequence[int]
    accepted: Sequence[int]


@dataclass(frozen=True)
class Turn:
    """What one turn of a request brought: a chunk of its prompt, or a round.

    pieces         tokens of the answer; none while the prompt is read
    prompt_done    tokens of the prompt that are read
    stats          counts and speeds so far, as Stats.as_dict has them; plain_tps beside them, if it
                   is known what plain decoding costs here
    tree           of the round
    finish_reason  of the last turn: "stop", "length", "cancelled" or "error"
    error          what went wrong, if that is it
    seed           that the answer is sampled with; None at temperature 0
    note           what the user should know; mostly nothing
    kept           tokens of the answer so far whose text stays; what follows them may belong to a
                   stop string, at the end it does
    stopped_by     the stop string that ended the answer
    """

    pieces: Sequence[Piece] = ()
    prompt_done: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    tree: DraftedTree | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    seed: int | None = None
    note: str = ""
    kept: int = 0
    stopped_by: str | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class Ticket:
    """A request that an engine has taken. `cancel` ends it within one round, from any thread."""

    def __init__(self, request: Request, deliver: Callable[[Turn], None]):
        self.request, self.deliver = request, deliver
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()
