"""One answer: a request to the engine, shown turn by turn as it arrives."""

from __future__ import annotations

import dataclasses
import queue
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from redrafter_mlx.chat.conversation import Message
from redrafter_mlx.chat.screen import DRAFTED, PLAIN, Screen
from redrafter_mlx.chat.settings import Settings
from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.engine.conversation import ANSWER, Channels, Prompt, prompt_of
from redrafter_mlx.engine.engine import Engine
from redrafter_mlx.engine.request import Request, Ticket, Turn
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.model_flags import PromptProgress

MOST_SEED = SamplingOptions.__dataclass_fields__["seed"].metadata["high"]


@dataclass
class Answer:
    """What the model said, and what it took.

    reasoning      that led to the answer; not part of the text
    finish_reason  "stop", "length" or "cancelled"
    interrupted    whether Ctrl-C was pressed; the answer may have been complete by then
    stats          as from Stats.as_dict
    note           what the user should know; usually nothing
    context        tokens of the conversation, this answer included
    room           most tokens that the conversation may have; None: no limit is known
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    interrupted: bool = False
    stats: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    note: str = ""
    context: int = 0
    room: int | None = None

    @property
    def is_answer(self) -> bool:
        """Whether there is an answer: some text, or none because the model ended at once."""
        return bool(self.text) or self.finish_reason == "stop"

    def summary(self) -> str:
        """One line about its length and speed."""
        stats = self.stats
        tokens = stats.get("generation_tokens", 0)
        parts = [counted(tokens, "token")]
        if tokens:
            parts += [
                f"{stats['generation_tps']:.1f} tokens/s",
                f"{stats['tokens_per_round']:.2f} tokens a round",
            ]
        if stats.get("cached_tokens"):
            parts.append(f"{stats['cached_tokens']:,} cached")
        if self.room is not None and self.context > 0.8 * self.room:
            parts.append(f"{self.context:,} of {self.room:,} tokens of context")
        if self.finish_reason == "cancelled":
            parts.append("stopped")
        return ", ".join(parts)


class Asker:
    """Asks an engine's model.

    template  further arguments for the chat template
    """

    def __init__(self, engine: Engine, screen: Screen, template: Mapping[str, Any]):
        self._engine, self._screen, self._template = engine, screen, template

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The prompt for a conversation.

        Raises UserError if the template refuses it, or if it leaves no room for an answer.
        """
        prompt = prompt_of(self._engine.served.tokenizer, messages, **self._template)
        size, most = len(prompt.tokens), self._engine.served.context
        if most is not None and size >= most:
            raise UserError(
                f"the conversation has {size:,} tokens with this message, and the model knows "
                f"{most:,} positions: /undo takes back the last exchange, /new starts a new one"
            )
        return prompt

    def ask(self, prompt: Prompt, settings: Settings, again: int = 0) -> Answer:
        """Have the prompt answered, showing the answer as it comes; Ctrl-C stops it.

        again  how many times it was answered before: added to the seed, if there is one

        Raises UserError, also for anything that goes wrong in the engine.
        """
        room = self._engine.served.context
        request = _request(prompt, settings, room, again)
        answer = Answer(room=room, seed=settings.sampling.seed)
        channels = Channels(self._engine.served.tokenizer, prompt.channel)
        turns: queue.SimpleQueue[Turn] = queue.SimpleQueue()
        progress = PromptProgress()
        stop = _Stop()
        try:
            with stop.at_ctrl_c():
                stop.ticket = self._engine.submit(request, turns.put)
                for turn in self._turns(turns, stop):
                    if turn.pieces or turn.finish_reason:
                        progress.close()
                    elif turn.prompt_done < len(prompt.tokens) - 1:
                        progress(turn.prompt_done, len(prompt.tokens))
                    self._show(answer, channels, turn, settings.chat.show_drafts)
                answer.interrupted = stop.is_wanted
        finally:
            stop()  # the engine must not go on after an error
            progress.close()
            self._screen.end_answer()
        answer.context = len(prompt.tokens) + answer.stats.get("generation_tokens", 0)
        if isinstance(turn.error, UserError):
            raise turn.error
        if turn.error is not None:
            reason = one_line(turn.error)
            raise UserError(f"no answer: {reason}; --debug shows where") from turn.error
        return answer

    def _turns(self, turns: queue.SimpleQueue[Turn], stop: _Stop) -> Iterator[Turn]:
        while True:
            if stop.is_wanted:
                stop()
            try:
                turn = turns.get(timeout=1.0)
            except queue.Empty:
                if not self._engine.is_alive:
                    raise UserError("the engine has stopped: start the chat again") from None
                continue
            yield turn
            if turn.finish_reason is not None:
                return

    def _show(self, answer: Answer, channels: Channels, turn: Turn, show_drafts: bool) -> None:
        answer.stats = turn.stats or answer.stats
        answer.finish_reason, answer.note = turn.finish_reason or "", turn.note
        answer.seed = turn.seed if turn.pieces else answer.seed
        said: list[tuple[str, str]] = []
        for piece in turn.pieces:
            style = DRAFTED if show_drafts and piece.from_draft else PLAIN
            for channel, text in channels.split(piece.text):
                self._take(answer, channel, text, style, said)
        if turn.finish_reason is not None:
            for channel, text in channels.finish():
                self._take(answer, channel, text, PLAIN, said)
        if said:
            self._screen.answer(said)

    def _take(self, answer: Answer, channel: str, text: str, style: str, said: list) -> None:
        if channel != ANSWER:
            if said:
                self._screen.answer(said)
                said.clear()
            if text:
                answer.reasoning += text
                self._screen.reasoning(text)
            return
        if answer.reasoning and not answer.text:
            text = text.lstrip("\n")  # blank lines between the reasoning and the answer
        if text:
            answer.text += text
            said.append((style, text))


def _request(prompt: Prompt, settings: Settings, room: int | None, again: int) -> Request:
    generation, sampling = settings.chat, settings.sampling
    if room is not None:
        left, wanted = room - len(prompt.tokens), generation.max_tokens
        generation = dataclasses.replace(
            generation, max_tokens=left if wanted < 0 else min(left, wanted)
        )
    if sampling.seed is not None and again:
        sampling = dataclasses.replace(sampling, seed=(sampling.seed + again) % (MOST_SEED + 1))
    return Request(
        prompt.tokens,
        generation,
        sampling,
        settings.draft,
        settings.drafting.drafter,
        marks=prompt.marks,
    )


class _Stop:
    """Calling it cancels the request, if one has been made by then."""

    def __init__(self):
        self.ticket: Ticket | None = None
        self.is_wanted = False

    def __call__(self, *_) -> None:
        self.is_wanted = True
        # A second Ctrl-C may interrupt the first one's `cancel`, whose lock it would wait for.
        if self.ticket is not None and not self.ticket.is_cancelled:
            self.ticket.cancel()

    @contextmanager
    def at_ctrl_c(self) -> Iterator[None]:
        """While the block runs, Ctrl-C calls this instead of raising KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def counted(number: int, noun: str) -> str:
    """The number with its noun: 1 token, 2 tokens."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
