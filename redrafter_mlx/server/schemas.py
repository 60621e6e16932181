"""What OpenAI's chat and completion requests may hold; also the source of /openapi.json.

A field that can be honoured only in part allows only those values, and a field that is not listed
is an error. Some fields are accepted and not read: they ask for nothing that this server would do
differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from redrafter_mlx.config import MOST_BUDGET

MOST_CHOICES, MOST_TOP_LOGPROBS = 128, 20

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first mistake is the only one reported: there may be a million."""


class Schema(BaseModel):
    """An object in a request; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _off(value: bool) -> bool:
    if value:
        raise PydanticCustomError("literal_error", "Input should be false")
    return value


Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]
Empty = tuple[()]
Stop = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Extension(Schema):
    """How the answer is drafted. Only `rule` can change the text.

    details  whether streamed chunks say which pieces were drafted, and show the round's tree and
             speeds
    """

    drafter: str | None = None
    budget: Annotated[int, Field(ge=0, le=MOST_BUDGET)] | Literal["auto"] | None = None
    beam_width: Annotated[int, Field(ge=1, le=64)] | None = None
    beam_length: Annotated[int, Field(ge=2, le=64)] | None = None
    rule: Literal["match", "rejection", "typical"] | None = None
    details: bool | None = None


class Sampled(Schema):
    """The sampling fields of all requests."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    redrafter: Extension | None = None


class OpenAIRequest(Sampled):
    """The fields of all OpenAI requests."""

    seed: Seed | None = None
    stop: Stop | Annotated[Many[Stop], Field(max_length=16)] | None = None
    user: str | None = None


class OpenAIConversation(OpenAIRequest):
    """The fields of OpenAI's conversational requests; chat_template_kwargs is our addition."""

    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: Off | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    safety_identifier: str | None = None


class StreamOptions(Schema):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class OpenAISampled(OpenAIRequest):
    """The fields that OpenAI's two older requests share."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repetition_context_size: Count | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(OpenAISampled):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[Many[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Many[int]
        | Annotated[Many[Many[int]], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Off | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None


class TextPart(Schema):
    type: Literal["text"]
    text: str


Content = str | Many[TextPart]


def text_of(content: str | Sequence[Any] | None) -> str:
    """The text of a message's content, whose parts each have a `text`."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class SystemMessage(Schema):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Schema):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Schema):
    name: str
    arguments: str


class ToolCall(Schema):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class AssistantMessage(Schema):
    """reasoning_content is the field of that name in the server's earlier answer."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: Empty | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Schema):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Schema):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Off | None = None


class Tool(Schema):
    type: Literal["function"]
    function: Function


class TextFormat(Schema):
    type: Literal["text"]


class ChatRequest(OpenAISampled, OpenAIConversation):
    """POST /v1/chat/completions."""

    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    tools: Many[Tool] | None = None
    response_format: TextFormat | None = None
    reasoning_effort: Effort | None = None
    modalities: Many[Literal["text"]] | None = None
    metadata: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None
