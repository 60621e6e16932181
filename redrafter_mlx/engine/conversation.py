"""Messages become a prompt, and what a model says is told apart: reasoning, answer, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.engine.prefixes import common_length
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line

ANSWER, REASONING, TOOL = "normal", "reasoning", "tool"
"""Channels of a model's output, by mlx-lm's names."""


@dataclass(frozen=True)
class Prompt:
    """A conversation as its model reads it.

    tokens   ids
    marks    where the system prompt ends, and where the model's turn begins: other prompts may
             diverge from this one there
    channel  in which the answer begins: a template may have opened the reasoning
    """

    tokens: list[int]
    marks: tuple[int, ...] = ()
    channel: str = ANSWER


def prompt_of(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_last: bool = False,
    **template: Any,
) -> Prompt:
    """The prompt of a conversation, by the tokenizer's chat template.

    messages       of role and content, as the template takes them
    continue_last  whether the last message is the beginning of the answer
    template       more arguments of the template

    Without a template the contents follow each other, with a blank line between them.
    Raises UserError if the template fails.
    """
    if not tokenizer.has_chat_template:
        if tools:
            raise UserError("this model has no chat template, so it cannot be given tools")
        text = "\n\n".join(str(message["content"]) for message in messages)
        return Prompt(tokenizer.encode(text))
    more = {"tools": list(tools)} if tools else {}
    more |= template

    def rendered(some: Sequence[Mapping[str, Any]], **how: bool) -> str:
        return tokenizer.apply_chat_template(list(some), tokenize=False, **how, **more)

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    ends = {"add_generation_prompt": not continue_last, "continue_final_message": continue_last}
    try:
        text = rendered(messages, **ends)
        tokens = encoded(text)
    except Exception as error:  # a template may raise anything
        raise UserError(f"the model's chat template refuses this: {one_line(error)}") from error
    others = _others(rendered, messages, continue_last)
    marks = {_parting(encoded, text, tokens, other) for other in others}
    inside = tuple(sorted(mark for mark in marks if 0 < mark < len(tokens)))
    return Prompt(tokens, inside, _first_channel(tokenizer, tokens, continue_last))


def _others(
    rendered: Callable[..., str], messages: Sequence[Mapping[str, Any]], continue_last: bool
) -> Iterator[str]:
    """Prompts that share a beginning with later ones: no turn of the model; the system prompt."""
    system = [message for message in messages if message["role"] == "system"]
    user = {"role": "user", "content": "?"}
    for some in (messages[:-1] if continue_last else messages, [*system, user]):
        try:
            yield rendered(some, add_generation_prompt=False)
        except Exception:  # not every template takes every conversation; then there is no mark
            continue


def _parting(
    encoded: Callable[[str], list[int]], text: str, tokens: Sequence[int], other: str
) -> int:
    """How many tokens a text shares with the beginning of another one.

    If the text only adds the model's turn to the other, the tokens of that turn are counted, which
    saves encoding the whole conversation again.
    """
    if text.startswith(other):
        added = encoded(text[len(other) :])
        if added and tokens[-len(added) :] == added:
            return len(tokens) - len(added)
    return common_length(tokens, encoded(other))


def _first_channel(tokenizer: TokenizerWrapper, tokens: Sequence[int], continued: bool) -> str:
    named = getattr(tokenizer, "response_initial_state", None)
    if named or not tokenizer.has_thinking or continued:
        return named or ANSWER
    is_open = tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens)
    return REASONING if is_open else ANSWER


class Channels:
    """Splits text into channels as it arrives. The marks of channels are not part of any text."""

    def __init__(self, tokenizer: TokenizerWrapper, channel: str = ANSWER):
        self._machine = make_text_state_machine(tokenizer)
        self._state = self._machine.make_state(channel)

    def split(self, text: str) -> list[tuple[str, str]]:
        """(channel, text) of all that is certain by now; pieces between channels may be empty.

        A tool call is complete once its channel is followed by another piece.
        """
        self._state, pieces = self._machine.split(self._state, text)
        return [(channel, piece) for channel, piece in pieces]

    def finish(self) -> list[tuple[str, str]]:
        """The text that was held back because it could have begun a mark."""
        self._state, text, channel = self._machine.flush(self._state)
        return [(channel, text)] if text else []
