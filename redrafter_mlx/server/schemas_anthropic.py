"""What Anthropic's message requests may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from redrafter_mlx.server.schemas import (
    Count,
    Effort,
    Empty,
    Many,
    Off,
    Sampled,
    Schema,
    Seed,
    Stop,
)


class CacheControl(Schema):
    """Where a prompt may be cached. Not read: all prompts are, as far as memory allows."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Schema):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Empty | None = None


class ThinkingBlock(Schema):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Schema):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Schema):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Many[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class UserTurn(Schema):
    role: Literal["user"]
    content: str | Many[UserBlock]


class AssistantTurn(Schema):
    role: Literal["assistant"]
    content: str | Many[AssistantBlock]


class AnthropicTool(Schema):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: CacheControl | None = None
    strict: Off | None = None


class ToolChoice(Schema):
    type: Literal["auto", "none"]
    disable_parallel_tool_use: bool | None = None


class Thinking(Schema):
    type: Literal["adaptive", "disabled"]


class OutputConfig(Schema):
    effort: Effort | None = None


class Metadata(Schema):
    user_id: str | None = None


class Conversation(Schema):
    """The fields that both of Anthropic's requests share: the whole prompt."""

    model: str | None = None
    messages: Annotated[
        Many[Annotated[UserTurn | AssistantTurn, Field(discriminator="role")]],
        Field(min_length=1),
    ]
    system: str | Many[TextBlock] | None = None
    tools: Many[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountRequest(Conversation):
    """POST /v1/messages/count_tokens."""


class MessagesRequest(Conversation, Sampled):
    """POST /v1/messages. seed and chat_template_kwargs are as in OpenAI's chat requests."""

    max_tokens: Count
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_sequences: Annotated[Many[Stop], Field(max_length=64)] | None = None
    seed: Seed | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
