"""OpenAI's responses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from redrafter_mlx.engine import Served, Turn
from redrafter_mlx.engine.conversation import REASONING
from redrafter_mlx.server.faults import ApiError
from redrafter_mlx.server.openai import BEAT
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
from redrafter_mlx.server.schemas_responses import (
    FunctionCall,
    FunctionCallOutput,
    Item,
    ReasoningItem,
    ResponsesRequest,
)
from redrafter_mlx.server.speech import Said, Speech
from redrafter_mlx.server.tools import Call, called, new_id, toolbox


def plan_response(asked: ResponsesRequest, served: Served, defaults: Defaults) -> Plan:
    """The plan for a request; ApiError or UserError if it cannot be honoured."""
    if asked.redrafter and asked.redrafter.details:
        refuse_details("only chat completions have them")
    tokenizer = served.tokenizer
    tools = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for tool in asked.tools or ()
    ]
    box = toolbox(tokenizer, tools, asked.tool_choice, asked.parallel_tool_calls)
    effort = asked.reasoning.effort if asked.reasoning else None
    own, given = asked.chat_template_kwargs, asked.input
    template = template_arguments(served, defaults, own, effort, "reasoning.effort")
    messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    messages += [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given)
    prompt = template_prompt(served, messages, box, template)
    wanted = asked.top_logprobs is not None or bool(asked.include)
    top = (asked.top_logprobs or 0) if wanted else None
    most = asked.max_output_tokens
    requests = plan_requests(served, defaults, asked, [prompt], asked.stop, most, top)
    speech = Speech(tokenizer, prompt.channel, box)
    return Plan(requests, [speech], ResponseWriter(served, asked, speech), bool(asked.stream))


def _messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as chat templates take them: an assistant's text and calls become one message."""
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        if isinstance(item, FunctionCallOutput):
            output = text_of(item.output)
            messages.append({"role": "tool", "content": output, "tool_call_id": item.call_id})
        elif isinstance(item, ReasoningItem):
            _answer(messages, "reasoning_content")["reasoning_content"] = text_of(item.content)
        elif isinstance(item, FunctionCall):
            call = called(item.call_id, item.name, item.arguments, f"input[{place}].arguments")
            _answer(messages, "").setdefault("tool_calls", []).append(call)
        elif item.role == "assistant":
            _answer(messages, "content")["content"] = text_of(item.content)
        else:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text_of(item.content)})
    return messages


def _answer(messages: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The assistant message that an item belongs to; a new one if the last has its `key` already.

    key  the part of the message that the item fills; empty for calls, of which there may be many
    """
    last = messages[-1] if messages else {"role": ""}
    if last["role"] != "assistant" or last.get(key) or (key and "tool_calls" in last):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    return last


class ResponseWriter:
    """Answers to /v1/responses: one output item after another."""

    beat = BEAT

    def __init__(self, served: Served, asked: ResponsesRequest, speech: Speech):
        self.speech, self._asked, self._model = speech, asked, served.name
        self._id, self._created = new_id("resp"), int(time.time())
        self._sequence, self._begun = 0, False
        self._items: list[dict[str, Any]] = []
        self._open: str | None = None  # channel of the item that is not finished yet
        self._shown = 0

    def feed(self, index: int, turn: Turn) -> list[str]:
        """The events of a turn."""
        events = []
        if not self._begun:
            self._begun = True
            for name in ("created", "in_progress"):
                events.append(self._event(f"response.{name}", response=self._object("in_progress")))
        for part in self.speech.hear(turn):
            if isinstance(part, Call):
                events += self._close() + self._call(part)
            else:
                events += self._say(part)
        return events

    def end(self) -> list[str]:
        """The events after the last turn."""
        events, status = self._close(), self._status
        return [*events, self._event(f"response.{status}", response=self._object(status))]

    def failed(self, error: ApiError) -> list[str]:
        """The events for an error in mid-stream."""
        code = error.code or "server_error"
        failure = {"code": "server_error", "message": error.message}
        return [
            self._event("error", code=code, message=error.message, param=error.param),
            self._event("response.failed", response=self._object("failed", failure)),
        ]

    def whole(self) -> dict[str, Any]:
        """The whole answer, for requests that do not stream."""
        self._close()
        return self._object(self._status)

    @property
    def _status(self) -> str:
        return "incomplete" if self.speech.finish_reason == "length" else "completed"

    def _event(self, kind: str, **data: Any) -> str:
        number, self._sequence = self._sequence, self._sequence + 1
        return event({"type": kind, "sequence_number": number, **data}, kind)

    def _say(self, said: Said) -> list[str]:
        events = []
        if self._open != said.channel:
            events += self._close() + self._begin(said.channel)
        item = self._items[-1]
        item["content"][0]["text"] += said.text
        more, kind = {}, "response.reasoning_text.delta"
        if said.channel != REASONING:
            more, kind = {"logprobs": self._new_logprobs(item)}, "response.output_text.delta"
        return [*events, self._event(kind, **self._place(), delta=said.text, **more)]

    def _new_logprobs(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        """The log-probabilities that are new since the last call; `item` gets them as well."""
        new = [_bytes_known(entry) for entry in self.speech.logprobs[self._shown :]]
        self._shown += len(new)
        item["content"][0]["logprobs"] += new
        return new

    def _begin(self, channel: str) -> list[str]:
        self._open = channel
        if channel == REASONING:
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item = {"id": new_id("rs"), "type": "reasoning", "summary": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": new_id("msg"), "type": "message", "role": "assistant"}
        self._items.append({**item, "status": "in_progress", "content": []})
        events = [self._added()]
        self._items[-1]["content"].append(part)
        return [*events, self._event("response.content_part.added", **self._place(), part=part)]

    def _close(self) -> list[str]:
        """Finish the open item, if there is one."""
        if self._open is None:
            return []
        item, part = self._items[-1], self._items[-1]["content"][0]
        kind, more = "response.reasoning_text.done", {}
        if self._open != REASONING:
            self._new_logprobs(item)
            kind, more = "response.output_text.done", {"logprobs": part["logprobs"]}
        self._open = None
        item["status"] = self._status
        return [
            self._event(kind, **self._place(), text=part["text"], **more),
            self._event("response.content_part.done", **self._place(), part=part),
            self._event("response.output_item.done", output_index=self._at, item=item),
        ]

    def _call(self, call: Call) -> list[str]:
        item = {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._items.append(item)
        kind, where = "response.function_call_arguments", self._place()
        del where["content_index"]
        events = [self._added(), self._event(f"{kind}.delta", **where, delta=call.arguments)]
        item |= {"arguments": call.arguments, "status": "completed"}
        done = self._event(f"{kind}.done", **where, arguments=call.arguments, name=call.name)
        closed = self._event("response.output_item.done", output_index=self._at, item=item)
        return [*events, done, closed]

    @property
    def _at(self) -> int:
        return len(self._items) - 1

    def _added(self) -> str:
        item = self._items[-1]
        return self._event("response.output_item.added", output_index=self._at, item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": self._at, "content_index": 0}

    def _object(self, status: str, failure: dict[str, Any] | None = None) -> dict[str, Any]:
        asked, is_done = self._asked, status in ("completed", "incomplete")
        tools = [tool.model_dump() | {"strict": False} for tool in asked.tools or ()]
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": failure,
            "incomplete_details": reason,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": asked.reasoning.effort if asked.reasoning else None,
                "summary": None,
            },
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": tools,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_done else None,
            "user": asked.user,
        }

    def _usage(self) -> dict[str, Any]:
        stats = self.speech.stats
        prompt, tokens = stats.get("prompt_tokens", 0), stats.get("generation_tokens", 0)
        cached = stats.get("cached_tokens", 0)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": tokens,
            "output_tokens_details": {"reasoning_tokens": self.speech.reasoning_tokens},
            "total_tokens": prompt + tokens,
            "redrafter": usage_of([stats], [self.speech.seed]),
        }


def _bytes_known(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with an empty list for unknown bytes: this API allows no null there."""
    top = [_bytes_known(other) for other in entry.get("top_logprobs", ())]
    known = {**entry, "bytes": entry["bytes"] or []}
    return known | ({"top_logprobs": top} if "top_logprobs" in entry else {})
