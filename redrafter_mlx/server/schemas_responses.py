"""What OpenAI's Responses requests may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from redrafter_mlx.server.schemas import (
    Count,
    Effort,
    Empty,
    Many,
    Off,
    OpenAIConversation,
    Schema,
    TextFormat,
)

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Schema):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Empty | None = None
    logprobs: Many[Any] | None = None


class InputMessage(Schema):
    """A message from either side, including those of the server's own answers."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[InputText]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Schema):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutput(Schema):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Many[InputText]
    id: str | None = None
    status: Status | None = None


class ReasoningText(Schema):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Schema):
    """Reasoning from an earlier answer of the server."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Empty | None = None
    content: Many[ReasoningText] | None = None
    encrypted_content: None = None
    status: Status | None = None


def _kind(item: Any) -> str:
    """The item's type; messages may leave it out."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Schema):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Off | None = None


class Reasoning(Schema):
    effort: Effort | None = None
    summary: None = None
    generate_summary: None = None


class TextOptions(Schema):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesStreamOptions(Schema):
    include_obfuscation: Off | None = None


class ResponsesRequest(OpenAIConversation):
    """POST /v1/responses. seed and stop are as in chat requests."""

    input: str | Annotated[Many[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Many[FunctionTool] | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    include: Many[Literal["message.output_text.logprobs"]] | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[str, str] | None = None
    background: Off | None = None
    truncation: Literal["disabled"] | None = None
