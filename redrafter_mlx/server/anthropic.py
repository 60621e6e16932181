"""Anthropic's messages, and the count of their tokens."""

from __future__ import annotations

from typing import Any

from redrafter_mlx.engine import Served, Turn
from redrafter_mlx.engine.conversation import REASONING, Prompt
from redrafter_mlx.server.faults import ApiError, anthropic_shape
from redrafter_mlx.server.plan import (
    Defaults,
    Plan,
    event,
    plan_requests,
    refuse_details,
    template_arguments,
    template_prompt,
    usage_of,
)
from redrafter_mlx.server.schemas import text_of
from redrafter_mlx.server.schemas_anthropic import (
    AssistantTurn,
    Conversation,
    CountRequest,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    UserTurn,
)
from redrafter_mlx.server.speech import Said, Speech
from redrafter_mlx.server.tools import Call, Toolbox, called, new_id, toolbox

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def plan_message(asked: MessagesRequest, served: Served, defaults: Defaults) -> Plan:
    """The plan for a request; ApiError or UserError if it cannot be honoured."""
    if asked.redrafter and asked.redrafter.details:
        refuse_details("only chat completions have them")
    prompt, box = _prompt(asked, served, defaults)
    stop, most = asked.stop_sequences, asked.max_tokens
    requests = plan_requests(served, defaults, asked, [prompt], stop, most)
    speech = Speech(served.tokenizer, prompt.channel, box)
    return Plan(requests, [speech], MessageWriter(served, speech), bool(asked.stream))


def count_tokens(asked: CountRequest, served: Served, defaults: Defaults) -> dict[str, Any]:
    """The number of tokens in the prompt; raises as `plan_message` does."""
    prompt, _ = _prompt(asked, served, defaults, may_be_long=True)
    return {"input_tokens": len(prompt.tokens)}


def _prompt(
    asked: Conversation, served: Served, defaults: Defaults, may_be_long: bool = False
) -> tuple[Prompt, Toolbox]:
    """The prompt, and the tools it offers to the model."""
    tokenizer, choice = served.tokenizer, asked.tool_choice
    tools = [
        {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
        for tool in asked.tools or ()
    ]
    parallel = False if choice and choice.disable_parallel_tool_use else None
    box = toolbox(tokenizer, tools, choice.type if choice else None, parallel)
    effort = asked.output_config.effort if asked.output_config else None
    own, thinking = asked.chat_template_kwargs, asked.thinking and asked.thinking.type == "adaptive"
    template = template_arguments(served, defaults, own, effort, "output_config.effort", thinking)
    messages = []
    if asked.system:
        messages.append({"role": "system", "content": text_of(asked.system)})
    names: dict[str, str] = {}
    for place, turn in enumerate(asked.messages):
        messages += _user(turn, names) if turn.role == "user" else [_assistant(turn, names, place)]
    begun = messages[-1]["role"] == "assistant"
    if begun and "tool_calls" in messages[-1]:
        message = f"messages[{len(asked.messages) - 1}]: the results of its tools are missing"
        raise ApiError(400, message, "invalid_value", "messages")
    return template_prompt(served, messages, box, template, begun, may_be_long), box


def _user(turn: UserTurn, names: dict[str, str]) -> list[dict[str, Any]]:
    """A user's turn as chat templates take it, with each tool result as a message of its own.

    names  of the tools that were called, by the id of the call
    """
    if isinstance(turn.content, str):
        return [{"role": "user", "content": turn.content}]
    messages: list[dict[str, Any]] = []
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            text = ("Error: " if block.is_error else "") + text_of(block.content)
            made = {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}
            if block.tool_use_id in names:
                made["name"] = names[block.tool_use_id]
            messages.append(made)
        elif messages and messages[-1]["role"] == "user":
            messages[-1]["content"] += block.text
        else:
            messages.append({"role": "user", "content": block.text})
    return messages or [{"role": "user", "content": ""}]


def _assistant(turn: AssistantTurn, names: dict[str, str], place: int) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": ""}
    if isinstance(turn.content, str):
        return made | {"content": turn.content}
    for number, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            made["content"] += block.text
        elif isinstance(block, ThinkingBlock):
            made["reasoning_content"] = made.get("reasoning_content", "") + block.thinking
        else:
            names[block.id] = block.name
            param = f"messages[{place}].content[{number}].input"
            call = called(block.id, block.name, block.input, param)
            made.setdefault("tool_calls", []).append(call)
    return made


class MessageWriter:
    """Answers to /v1/messages: one content block after another."""

    beat = event({"type": "ping"}, "ping")

    def __init__(self, served: Served, speech: Speech):
        self.speech, self._model, self._id = speech, served.name, new_id("msg")
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None  # channel of the block that is not finished yet
        self._begun = False

    def feed(self, index: int, turn: Turn) -> list[str]:
        """The events of a turn."""
        heard, events = self.speech.hear(turn), []
        if not self._begun:
            self._begun = True
            usage = self._usage() | {"output_tokens": 0}
            message = self._object([]) | {"stop_reason": None, "usage": usage}
            events.append(event({"type": "message_start", "message": message}, "message_start"))
        for part in heard:
            events += self._call(part) if isinstance(part, Call) else self._say(part)
        return events

    def end(self) -> list[str]:
        """The events after the last turn."""
        delta = {"stop_reason": self._reason, "stop_sequence": self.speech.stopped_by}
        data = {"type": "message_delta", "delta": delta, "usage": self._usage()}
        stop = event({"type": "message_stop"}, "message_stop")
        return [*self._close(), event(data, "message_delta"), stop]

    def failed(self, error: ApiError) -> list[str]:
        """The events for an error in mid-stream."""
        return [event(anthropic_shape(error), "error")]

    def whole(self) -> dict[str, Any]:
        """The whole answer, for requests that do not stream."""
        return self._object(self._blocks)

    @property
    def _reason(self) -> str | None:
        if self.speech.stopped_by is not None and self.speech.finish_reason == "stop":
            return "stop_sequence"
        return _REASONS.get(self.speech.finish_reason)

    def _say(self, said: Said) -> list[str]:
        is_thinking = said.channel == REASONING
        kind = "thinking" if is_thinking else "text"
        events = []
        if self._open != said.channel:
            block = {"type": kind, kind: ""} | ({"signature": ""} if is_thinking else {})
            events = [*self._close(), self._start(block)]
            self._open = said.channel
        self._blocks[-1][kind] += said.text
        return [*events, self._delta({"type": f"{kind}_delta", kind: said.text})]

    def _call(self, call: Call) -> list[str]:
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        events = [*self._close(), self._start(block)]
        events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        block["input"] = call.input
        return [*events, self._stop()]

    def _close(self) -> list[str]:
        was, self._open = self._open, None
        return [] if was is None else [self._stop()]

    def _start(self, block: dict[str, Any]) -> str:
        self._blocks.append(block)
        data = {"type": "content_block_start", "index": self._at, "content_block": block}
        return event(data, "content_block_start")

    def _delta(self, delta: dict[str, Any]) -> str:
        data = {"type": "content_block_delta", "index": self._at, "delta": delta}
        return event(data, "content_block_delta")

    def _stop(self) -> str:
        return event({"type": "content_block_stop", "index": self._at}, "content_block_stop")

    @property
    def _at(self) -> int:
        return len(self._blocks) - 1

    def _object(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._reason,
            "stop_sequence": self.speech.stopped_by,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        """This API counts the cached tokens of a prompt apart from those that had to be read."""
        stats = self.speech.stats
        cached = stats.get("cached_tokens", 0)
        return {
            "input_tokens": stats.get("prompt_tokens", 0) - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": stats.get("generation_tokens", 0),
            "redrafter": usage_of([stats], [self.speech.seed]),
        }
