"""OpenAI's chat completions and completions."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from redrafter_mlx.engine import Served, Turn
from redrafter_mlx.engine.conversation import REASONING, Prompt
from redrafter_mlx.server.faults import ApiError, openai_shape
from redrafter_mlx.server.plan import (
    Defaults,
    Plan,
    check_length,
    details_of,
    event,
    plan_requests,
    refuse_details,
    template_arguments,
    template_prompt,
    usage_of,
)
from redrafter_mlx.server.schemas import (
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    Message,
    OpenAISampled,
    ToolMessage,
    text_of,
)
from redrafter_mlx.server.speech import Said, Speech
from redrafter_mlx.server.tools import Call, called, new_id, toolbox

BEAT = ": the answer is still to come\n\n"


def plan_chat(asked: ChatRequest, served: Served, defaults: Defaults) -> Plan:
    """The plan for a chat request; ApiError or UserError if it cannot be honoured."""
    tokenizer = served.tokenizer
    tools = [tool.function.model_dump() for tool in asked.tools or ()]
    box = toolbox(tokenizer, tools, asked.tool_choice, asked.parallel_tool_calls)
    own, effort = asked.chat_template_kwargs, asked.reasoning_effort
    template = template_arguments(served, defaults, own, effort, "reasoning_effort")
    messages = [_templated(message, place) for place, message in enumerate(asked.messages)]
    prompt = template_prompt(served, messages, box, template)
    most = asked.max_tokens
    if asked.max_completion_tokens is not None:
        most = min(most or asked.max_completion_tokens, asked.max_completion_tokens)
    if asked.top_logprobs and not asked.logprobs:
        message = "top_logprobs needs logprobs: set logprobs to true"
        raise ApiError(400, message, "invalid_value", "top_logprobs")
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    requests = plan_requests(served, defaults, asked, [prompt], asked.stop, most, top)
    speeches = [Speech(tokenizer, prompt.channel, box) for _ in requests]
    writer = ChatWriter(served, asked, speeches)
    return Plan(requests, speeches, writer, bool(asked.stream), writer.details)


def plan_completion(asked: CompletionRequest, served: Served, defaults: Defaults) -> Plan:
    """The plan for a completion request; raises as `plan_chat` does."""
    given = asked.prompt
    is_one = isinstance(given, str) or not given or isinstance(given[0], int)
    prompts = [_tokens(served, prompt) for prompt in ([given] if is_one else given)]
    if len(prompts) * (asked.n or 1) > 128:
        raise ApiError(400, "n: these are more than 128 answers", "invalid_value", "n")
    requests = plan_requests(
        served, defaults, asked, prompts, asked.stop, asked.max_tokens, asked.logprobs
    )
    speeches = [Speech(served.tokenizer, None) for _ in requests]
    writer = CompletionWriter(served, asked, speeches)
    return Plan(requests, speeches, writer, bool(asked.stream), writer.details)


def _templated(message: Message, place: int) -> dict[str, Any]:
    """A message as chat templates take it."""
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if message.name is not None:
        made["name"] = message.name
    if isinstance(message, ToolMessage):
        made["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.reasoning_content:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            param = f"messages[{place}].tool_calls[{{}}].function.arguments"
            made["tool_calls"] = [
                called(call.id, call.function.name, call.function.arguments, param.format(number))
                for number, call in enumerate(message.tool_calls)
            ]
    return made


def _tokens(served: Served, prompt: str | Sequence[int]) -> Prompt:
    if isinstance(prompt, str):
        check_length(served, [prompt])
        return Prompt(served.tokenizer.encode(prompt))
    size = served.target.vocab_size
    if beyond := [token for token in prompt if not 0 <= token < size]:
        message = f"prompt: {beyond[0]} is not a token id below {size}"
        raise ApiError(400, message, "invalid_value", "prompt")
    return Prompt(list(prompt))


class _OpenAIWriter:
    """What the writers of both APIs have in common."""

    beat, object, prefix = BEAT, "", ""

    def __init__(self, served: Served, asked: OpenAISampled, speeches: Sequence[Speech]):
        self.speeches, self._asked = speeches, asked
        self.details = bool(asked.redrafter and asked.redrafter.details)
        if self.details and not asked.stream:
            refuse_details("only streamed answers have them: set stream to true")
        self._id, self._created = new_id(self.prefix), int(time.time())
        self._model = served.name
        self._text_of = functools.lru_cache(4096)(lambda token: served.tokenizer.decode([token]))
        self._sent = [0] * len(speeches)  # log-probabilities, for each answer

    def end(self) -> list[str]:
        """The events after the last turn."""
        options = self._asked.stream_options
        wanted = options is not None and options.include_usage
        last = [event(self._object([]) | {"usage": self.usage()})] if wanted else []
        return [*last, "data: [DONE]\n\n"]

    def failed(self, error: ApiError) -> list[str]:
        """The events for an error in mid-stream."""
        return [event(openai_shape(error)), "data: [DONE]\n\n"]

    def usage(self) -> dict[str, Any]:
        """Token counts, each prompt counted once however many answers it has, and our extension."""
        stats = [speech.stats for speech in self.speeches]
        first = stats[:: self._asked.n or 1]
        prompt = sum(one.get("prompt_tokens", 0) for one in first)
        tokens = sum(one.get("generation_tokens", 0) for one in stats)
        reasoning = sum(speech.reasoning_tokens for speech in self.speeches)
        cached = sum(one.get("cached_tokens", 0) for one in first)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
            "redrafter": usage_of(stats, [speech.seed for speech in self.speeches]),
        }

    def _object(self, choices: list[dict[str, Any]], suffix: str = "") -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.object + suffix,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _send_logprobs(self, index: int) -> int:
        """How many log-probabilities of an answer were sent before; all others are sent now."""
        sent, self._sent[index] = self._sent[index], len(self.speeches[index].logprobs)
        return sent


class ChatWriter(_OpenAIWriter):
    """Answers to /v1/chat/completions."""

    object, prefix = "chat.completion", "chatcmpl"

    def __init__(self, *args):
        super().__init__(*args)
        self._begun = set()

    def feed(self, index: int, turn: Turn) -> list[str]:
        """The chunks of a turn."""
        speech = self.speeches[index]
        calls, root = len(speech.calls), speech.last_token
        heard = speech.hear(turn)
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(({"role": "assistant", "content": ""}, None, ()))
        for part in heard:
            if isinstance(part, Said):
                name = "reasoning_content" if part.channel == REASONING else "content"
                chunks.append(({name: part.text}, None, part.pieces))
            else:
                chunks.append(({"tool_calls": [_called(part) | {"index": calls}]}, None, ()))
                calls += 1
        if turn.finish_reason:
            chunks.append(({}, speech.finish_reason, ()))
        if self.details and not (heard or turn.finish_reason):
            chunks.append(({}, None, ()))
        return [
            event(self._chunk(index, turn, *chunk, number == len(chunks), root))
            for number, chunk in enumerate(chunks, start=1)
        ]

    def _chunk(self, index, turn, delta, reason, pieces, is_last, root) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason}
        if self._asked.logprobs and is_last:
            new = self.speeches[index].logprobs[self._send_logprobs(index) :]
            choice["logprobs"] = {"content": new, "refusal": None}
        chunk = self._object([choice], ".chunk")
        if self._asked.stream_options and self._asked.stream_options.include_usage:
            chunk["usage"] = None
        if self.details:
            chunk["redrafter"] = details_of(pieces, turn, self._text_of, is_last, root)
        return chunk

    def whole(self) -> dict[str, Any]:
        """The whole answer, for requests that do not stream."""
        choices = [self._choice(*one) for one in enumerate(self.speeches)]
        return self._object(choices) | {"usage": self.usage()}

    def _choice(self, index: int, speech: Speech) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": speech.text, "refusal": None}
        if speech.reasoning:
            message["reasoning_content"] = speech.reasoning
        if speech.calls:
            message["content"] = speech.text or None
            message["tool_calls"] = [_called(call) for call in speech.calls]
        logprobs = {"content": speech.logprobs, "refusal": None} if self._asked.logprobs else None
        reason = speech.finish_reason
        return {"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs}


class CompletionWriter(_OpenAIWriter):
    """Answers to /v1/completions."""

    object, prefix = "text_completion", "cmpl"

    def feed(self, index: int, turn: Turn) -> list[str]:
        """The chunks of a turn."""
        speech = self.speeches[index]
        root = speech.last_token
        text = "".join(part.text for part in speech.hear(turn))
        if not (text or turn.finish_reason or self.details):
            return []
        chunk = self._object([self._choice(index, text, self._send_logprobs(index))])
        if self.details:
            pieces = [(piece.text, piece.from_draft) for piece in turn.pieces if piece.text]
            chunk["redrafter"] = details_of(pieces, turn, self._text_of, True, root)
        return [event(chunk)]

    def whole(self) -> dict[str, Any]:
        """The whole answer, for requests that do not stream."""
        choices = [self._choice(index, speech.text) for index, speech in enumerate(self.speeches)]
        return self._object(choices) | {"usage": self.usage()}

    def _choice(self, index: int, text: str, sent: int = 0) -> dict[str, Any]:
        """`text`, and the log-probabilities of tokens but the first `sent`."""
        logprobs, speech = None, self.speeches[index]
        if self._asked.logprobs is not None:
            entries = speech.logprobs[sent:]
            ends = list(accumulate(len(entry["token"]) for entry in speech.logprobs))
            tops = [{e["token"]: e["logprob"] for e in one["top_logprobs"]} for one in entries]
            logprobs = {
                "tokens": [entry["token"] for entry in entries],
                "token_logprobs": [entry["logprob"] for entry in entries],
                "top_logprobs": tops,
                "text_offset": [0, *ends][sent : len(ends)],
            }
        reason = speech.finish_reason
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


def _called(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
