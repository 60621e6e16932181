"""The Responses API by OpenAI's own client, and the shapes that Open WebUI sends."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    "strict": False,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Köln"}}</tool_call>'
EVERYTHING = f"<think>\nHm?</think>\n\nMoment. 🙂 {CALL} Gut."


@pytest.fixture
def ask(served):
    """(answer, request) -> the response (or its events), and the prompt of the engine."""
    engine, address = served
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)

    def ask(said, **request):
        engine.script = lambda _: said
        reply = client.responses.create(**({"model": "scripted", "input": "Hallo?"} | request))
        reply = list(reply) if request.get("stream") else reply
        return reply, engine.served.tokenizer.decode(engine.requests[-1].prompt)

    ask.client, ask.engine, ask.address = client, engine, address
    return ask


def test_a_response(ask):
    reply, prompt = ask("Ja. 🙂", instructions="Kurz.", max_output_tokens=50)
    assert (reply.output_text, reply.status) == ("Ja. 🙂", "completed")
    assert prompt.startswith("<|im_start|>system\nKurz.<|im_end|>\n<|im_start|>user\nHallo?")
    usage = reply.usage
    assert usage.input_tokens == len(ask.engine.requests[-1].prompt)
    assert usage.input_tokens_details.cached_tokens == usage.input_tokens // 2
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert reply.store is False


def test_a_response_that_is_cut(ask):
    reply, _ = ask("one two three", max_output_tokens=3)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events, _ = ask("one two three", max_output_tokens=3, stream=True)
    assert events[-1].type == "response.incomplete"


def contents(response):
    """Items without their ids."""
    return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]


def test_items_and_their_events(ask):
    reply, _ = ask(EVERYTHING, tools=[WEATHER])
    assert [item.type for item in reply.output] == [
        "reasoning", "message", "function_call", "message",
    ]  # fmt: skip
    assert reply.output[0].content[0].text == "Hm?"
    assert json.loads(reply.output[2].arguments) == {"town": "Köln"}
    events, _ = ask(EVERYTHING, tools=[WEATHER], stream=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert contents(events[-1].response) == contents(reply)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in events[-1].response.output]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == "Moment. 🙂 Gut."
    with ask.client.responses.stream(
        model="scripted", input="Hallo?", tools=[WEATHER]
    ) as stream:  # the client puts the events together by itself
        stream.until_done()
        assert contents(stream.get_final_response())[0] == contents(reply)[0]


def test_logprobs_are_of_the_message(ask):
    reply, _ = ask("<think>a</think>bc", top_logprobs=1, include=["message.output_text.logprobs"])
    entries = reply.output[1].content[0].logprobs
    assert [entry.token for entry in entries] == ["b", "c"]


def test_what_was_answered_goes_back(ask):
    given = [{"role": "user", "content": [{"type": "input_text", "text": "Wetter?"}]}]
    for turn in range(3):
        reply, _ = ask(f"<think>Hm</think>Moment.{CALL}", input=given, tools=[WEATHER])
        given += [item.model_dump(exclude_none=True) for item in reply.output]
        call = reply.output[-1]
        output = {"type": "function_call_output", "call_id": call.call_id, "output": f"{turn} °C"}
        given.append(output)
    _, prompt = ask("x", input=given, tools=[WEATHER])
    turn = '<think>Hm</think>Moment.<tool_call>{"name": "weather", "arguments": [town=Köln]}'
    assert prompt.count(f"<|im_start|>assistant\n{turn}") == 3
    assert "<|im_start|>tool\n2 °C" in prompt


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_an_error(ask, field, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask("x", **field)
    assert caught.value.body["param"] == param


def test_what_open_webui_sends(ask):
    """The models first; then a chat with the fields that its settings have; then a title."""
    engine, url = ask.engine, f"{ask.address}/v1"
    headers = {"Authorization": "Bearer none", "X-OpenWebUI-User-Name": "A"}
    listed = httpx.get(f"{url}/models", headers=headers).json()
    assert [model["id"] for model in listed["data"]] == ["scripted"]
    engine.script = lambda _: "<think>Hm</think>Hallo!"
    chat = {
        "stream": True,
        "model": "scripted",
        "messages": [
            {"role": "system", "content": "Kurz."},
            {"role": "user", "content": [{"type": "text", "text": "Hallo"}]},
        ],
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 128,
        "seed": 42,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "logit_bias": {"5": -5},
        "stop": ["###"],
        "response_format": {"type": "text"},
    }
    reply = httpx.post(f"{url}/chat/completions", json=chat, headers=headers)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, done = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    deltas = [c["delta"] for chunk in map(json.loads, chunks) for c in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hallo!"
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm"
    assert json.loads(chunks[-1])["usage"]["completion_tokens"] > 0
    title = {
        "model": "scripted",
        "messages": [{"role": "user", "content": "### Task:\nA title"}],
        "stream": False,
        "max_completion_tokens": 1000,
    }
    reply = httpx.post(f"{url}/chat/completions", json=title, headers=headers).json()
    assert reply["choices"][0]["message"]["content"] == "Hallo!"
