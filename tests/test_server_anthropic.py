"""Anthropic's own client against a server whose engine is scripted."""

from __future__ import annotations

import anthropic
import pytest

USER = [{"role": "user", "content": "Was ist los? 🙂"}]
WEATHER = {
    "name": "weather",
    "description": "of a town",
    "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Köln"}}</tool_call>'


@pytest.fixture
def ask(served):
    """(answer, request) -> the message, and the prompt that the engine was given."""
    engine, address = served
    client = anthropic.Anthropic(base_url=address, api_key="-", max_retries=0)

    def ask(text, **request):
        engine.script = text if callable(text) else lambda _: text
        request = {"model": "scripted", "messages": USER, "max_tokens": 500} | request
        message = client.messages.create(**request)
        return message, engine.served.tokenizer.decode(engine.requests[-1].prompt)

    def stream(text, **request):
        engine.script = lambda _: text
        request = {"model": "scripted", "messages": USER, "max_tokens": 500} | request
        with client.messages.stream(**request) as stream:
            return list(stream), stream.get_final_message()

    ask.client, ask.engine, ask.stream = client, engine, stream
    return ask


def refused(call) -> anthropic.APIStatusError:
    with pytest.raises(anthropic.APIStatusError) as caught:
        call()
    body = caught.value.body
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return caught.value


def test_a_message(ask):
    message, prompt = ask("Nichts. 🙂🙂", system=[{"type": "text", "text": "Kurz."}])
    assert [block.text for block in message.content] == ["Nichts. 🙂🙂"]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert prompt.startswith("<|im_start|>system\nKurz.<|im_end|>\n<|im_start|>user\nWas ist los?")
    usage, tokens = message.usage, len(ask.engine.requests[-1].prompt)
    assert usage.cache_read_input_tokens == tokens // 2
    assert usage.input_tokens + usage.cache_read_input_tokens == tokens
    assert usage.redrafter["accepted_tokens"] > 0


def test_a_stream_makes_the_same_message(ask):
    events, final = ask.stream("<think>\nHm?</think>\n\nNichts. 🙂")
    message, _ = ask("<think>\nHm?</think>\n\nNichts. 🙂")
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "Hm?"
    dump = lambda one: one.model_dump(exclude={"id", "usage"})
    assert dump(final)["content"] == dump(message)["content"]
    assert final.stop_reason == message.stop_reason
    assert final.usage.output_tokens == message.usage.output_tokens
    assert final.usage.input_tokens == message.usage.input_tokens
    assert events[0].type == "message_start"
    assert events[-1].type == "message_stop"


@pytest.mark.parametrize(
    ("text", "more", "reason", "sequence"),
    [
        ("one two three", {"stop_sequences": ["x", " three", "e t"]}, "stop_sequence", "e t"),
        ("one two three", {"stop_sequences": [" three"]}, "stop_sequence", " three"),
        ("one", {"stop_sequences": ["x"]}, "end_turn", None),
        ("one two three", {"max_tokens": 3}, "max_tokens", None),
    ],
)
def test_why_it_stopped(ask, text, more, reason, sequence):
    ask.engine.script = lambda request: text
    if sequence == "e t":
        more = {"stop_sequences": ["e t", " three"]}
    message, _ = ask(text, **more)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    _, final = ask.stream(text, **more)
    assert (final.stop_reason, final.stop_sequence) == (reason, sequence)


def test_tools_there_and_back(ask):
    messages = [*USER]
    for turn in range(3):
        if turn % 2:
            _, reply = ask.stream(f"Moment. {CALL}{CALL}", tools=[WEATHER], messages=messages)
        else:
            reply, _ = ask(f"Moment. {CALL}{CALL}", tools=[WEATHER], messages=messages)
        assert [block.type for block in reply.content] == ["text", "tool_use", "tool_use"]
        assert reply.content[1].input == {"town": "Köln"}
        assert reply.stop_reason == "tool_use"
        results = [
            {"type": "tool_result", "tool_use_id": reply.content[1].id, "content": f"{turn} °C"},
            {
                "type": "tool_result",
                "tool_use_id": reply.content[2].id,
                "content": [{"type": "text", "text": "no sky"}],
                "is_error": True,
            },
            {"type": "text", "text": "Und?", "cache_control": {"type": "ephemeral"}},
        ]
        messages += [
            {"role": "assistant", "content": reply.content},
            {"role": "user", "content": results},
        ]
    _, prompt = ask("x", tools=[WEATHER], messages=messages)
    assert prompt.count("[town=Köln]") == 6
    for turn in range(3):
        assert f"<|im_start|>tool\n{turn} °C<|im_end|>\n<|im_start|>tool\nError: no sky" in prompt
    assert prompt.endswith("<|im_start|>user\nUnd?<|im_end|>\n<|im_start|>assistant\n")
    assert '"parameters": {"type": "object"' in prompt


def test_one_tool_at_a_time(ask):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    reply, _ = ask(f"{CALL}{CALL}", tools=[WEATHER], tool_choice=choice)
    assert [block.type for block in reply.content] == ["tool_use"]


def test_thinking_goes_back_and_can_be_turned_off(ask):
    reply, _ = ask("<think>a</think>b")
    messages = [*USER, {"role": "assistant", "content": reply.content}, *USER]
    _, prompt = ask("x", messages=messages, thinking={"type": "disabled"})
    assert "assistant\n<think>a</think>b<|im_end|>" in prompt
    assert prompt.endswith("assistant\n<think></think>")
    _, prompt = ask("x", thinking={"type": "adaptive"})
    assert prompt.endswith("assistant\n")


def test_the_beginning_of_an_answer_is_gone_on_with(ask):
    messages = [*USER, {"role": "assistant", "content": "Nichts, ab"}]
    message, prompt = ask("er", messages=messages)
    assert prompt.endswith("<|im_start|>assistant\nNichts, ab")
    assert message.content[0].text == "er"


def test_tokens_are_counted(ask):
    request = {"messages": USER, "system": "Kurz.", "tools": [WEATHER]}
    counted = ask.client.messages.count_tokens(model="scripted", **request)
    ask("x", **request)
    assert counted.input_tokens == len(ask.engine.requests[-1].prompt)


def test_what_an_editor_sends(ask):
    """Cache marks, a user's id, beta headers and query."""
    message, _ = ask(
        "x",
        system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        tools=[WEATHER | {"cache_control": {"type": "ephemeral"}}],
        metadata={"user_id": "u"},
        extra_body={"temperature": 1, "top_k": 5},
        extra_query={"beta": "true"},
        extra_headers={"anthropic-beta": "x-2025-01-01"},
    )
    assert message.content[0].text == "x"
    assert [model.id for model in ask.client.models.list()] == ["scripted"]


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "reasoning cannot be bounded"),
        ({"tools": [WEATHER], "tool_choice": {"type": "any"}}, "made to call"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}}, "made to call"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "text only"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
         "text only"),
        ({"messages": [*USER, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}, "results"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"output_config": {"effort": "high"}}, "effort"),
        ({"extra_body": {"redrafter": {"details": True}}}, "details"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "4096"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_an_error(ask, field, word):
    error = refused(lambda: ask("x", **field))
    assert error.status_code == 400
    assert error.body["error"]["type"] == "invalid_request_error"
    assert word in error.body["error"]["message"]


def test_an_error_in_the_midst_of_a_stream(ask):
    ask.engine.script = lambda _: RuntimeError("out of memory")
    with pytest.raises(anthropic.APIStatusError, match="out of memory"):
        ask.client.messages.create(model="scripted", messages=USER, max_tokens=5)
    error = refused(lambda: ask("x", model="claude"))
    assert error.status_code == 404
    assert error.body["error"]["type"] == "not_found_error"
