"""What is asked of an engine, and what it answers: plain data, safe in any thread."""

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
    top_logprobs  how many of the likeliest alternatives are wanted with each token, beside its own
                  log-probability; None: no log-probabilities
    marks         positions at which later prompts may diverge from this one, such as the end of the
                  last message
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
    from_draft    whether it was drafted
    logprob       of the target, before penalties; None if not asked for
    top_logprobs  (id, logprob) of the likeliest tokens, if asked for
    """

    text: str
    token: int
    from_draft: bool
    logprob: float | None = None
    top_logprobs: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class DraftedTree:
    """A round's tree: N tokens, the row of each one's parent (-1: none), the accepted rows."""

    tokens: Sequence[int]
    parents: Sequence[int]
    accepted: Sequence[int]


@dataclass(frozen=True)
class Turn:
    """The result of one turn of a request: a chunk of its prompt, or a round.

    pieces         tokens of the answer; none while the prompt is read
    prompt_done    tokens of the prompt that have been read
    stats          counts and speeds so far, as in Stats.as_dict; also plain_tps, if the cost of
                   plain decoding is known here
    tree           of the round
    finish_reason  in the last turn: "stop", "length", "cancelled" or "error"
    error          what went wrong, with "error"
    seed           with which the answer is sampled; None at temperature 0
    note           what the user should know; usually nothing
    kept           tokens of the answer so far whose text stays; later ones may belong to a stop
                   string, and at the end they do
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
    """A request that an engine has accepted. `cancel` ends it within a round, from any thread."""

    def __init__(self, request: Request, deliver: Callable[[Turn], None]):
        self.request, self.deliver = request, deliver
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()
