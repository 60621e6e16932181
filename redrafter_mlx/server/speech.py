"""Takes a model's output apart, turn by turn: reasoning, answer, tool calls, log-probabilities."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.engine import Piece, Turn
from redrafter_mlx.engine.conversation import ANSWER, REASONING, TOOL, Channels
from redrafter_mlx.server.tools import Call, Toolbox

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass
class Said:
    """Text of one channel, and which parts of it were drafted."""

    channel: str
    text: str = ""
    pieces: list[tuple[str, bool]] = field(default_factory=list)


class Speech:
    """One answer.

    channel  the channel it begins in; None: all text is the answer, channel marks included
    toolbox  the tools that the model may call

    logprobs has only tokens whose text is certain to stay. finish_reason, and stopped_by, the stop
    string, are set by the last turn.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        channel: str | None = ANSWER,
        toolbox: Toolbox | None = None,
    ):
        self.tokenizer, self.toolbox = tokenizer, toolbox or Toolbox()
        self.channels = None if channel is None else Channels(tokenizer, channel)
        self._channel = channel or ANSWER
        self._call_text, self._after_mark = "", False
        self.text, self.reasoning, self.calls = "", "", []
        self.logprobs: list[dict[str, Any]] = []
        self.reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.stopped_by: str | None = None
        self.stats: dict[str, Any] = {}
        self.seed: int | None = None
        self.last_token: int | None = None
        self._tokens = 0
        # Tokens whose text a stop string may still cut off: (place in the answer, log-probability).
        self._uncertain: deque[tuple[int, dict[str, Any]]] = deque()

    @property
    def is_enough(self) -> bool:
        """Whether the model need not go on: it has made the only call it may make."""
        return bool(self.calls) and self.toolbox.single

    def hear(self, turn: Turn) -> list[Said | Call]:
        """What a turn brought, in order."""
        heard: list[Said | Call] = []
        self.stats, self.seed = turn.stats or self.stats, turn.seed
        for piece in turn.pieces:
            if self.is_enough:
                break
            self.last_token, place = piece.token, self._tokens
            self._tokens += 1
            before, length = self._channel, len(self.text)
            segments = self.channels.split(piece.text) if self.channels else [(ANSWER, piece.text)]
            self._take(segments, piece.from_draft, heard)
            self.reasoning_tokens += self._channel == REASONING
            is_answer = len(self.text) > length or before == ANSWER == self._channel
            is_end = piece.token in self.tokenizer.eos_token_ids
            if piece.logprob is not None and is_answer and not is_end:
                self._uncertain.append((place, self._logprob(piece)))
        while self._uncertain and self._uncertain[0][0] < turn.kept:
            self.logprobs.append(self._uncertain.popleft()[1])
        if turn.finish_reason:
            self._finish(turn, heard)
        return heard

    def _take(self, segments, drafted: bool, heard: list[Said | Call]) -> None:
        for channel, text in segments:
            channel = channel or self._channel
            if channel != self._channel:
                if self._channel == TOOL:
                    self._end_call(drafted, heard)
                self._channel, self._after_mark = channel, True
            if channel == TOOL:
                self._call_text += text
            else:
                self._say(channel, text, drafted, heard)

    def _say(self, channel: str, text: str, drafted: bool, heard: list[Said | Call]) -> None:
        if self._after_mark:  # blank lines that follow a channel mark belong to it
            text = text.lstrip()
        if not text or self.is_enough:
            return
        self._after_mark = False
        last = heard[-1] if heard else None
        if not isinstance(last, Said) or last.channel != channel:
            last = Said(channel)
            heard.append(last)
        last.text += text
        last.pieces.append((text, drafted))
        if channel == REASONING:
            self.reasoning += text
        else:
            self.text += text

    def _end_call(self, drafted: bool, heard: list[Said | Call], is_whole: bool = True) -> None:
        text, self._call_text = self._call_text, ""
        calls = self.toolbox.calls(self.tokenizer, text) if self.toolbox.tools else []
        if not calls:
            end = self.tokenizer.tool_call_end if is_whole else ""
            self._after_mark = False
            self._say(ANSWER, f"{self.tokenizer.tool_call_start}{text}{end}", drafted, heard)
        if not self.is_enough:
            calls = calls[:1] if self.toolbox.single else calls
            self.calls += calls
            heard += calls

    def _finish(self, turn: Turn, heard: list[Said | Call]) -> None:
        drafted = bool(turn.pieces) and turn.pieces[-1].from_draft
        if self.channels and not self.is_enough:
            self._take(self.channels.finish(), drafted, heard)
            if self._channel == TOOL:
                self._end_call(drafted, heard, is_whole=False)
        self.finish_reason, self.stopped_by = turn.finish_reason, turn.stopped_by
        if self.is_enough or (self.calls and turn.finish_reason != "length"):
            self.finish_reason = "tool_calls"

    def _logprob(self, piece: Piece) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            data = None if "\ufffd" in text else list(text.encode())
            return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}

        top = [entry(token, logprob) for token, logprob in piece.top_logprobs]
        return entry(piece.token, piece.logprob) | {"top_logprobs": top}
