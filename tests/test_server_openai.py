"""OpenAI's own client against a server whose engine is scripted."""

from __future__ import annotations

import json
import random

import httpx
import openai
import pytest

from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.server.plan import WHOLE_TEXT, Defaults
from scripted_engine import PLAIN_CHAT, ScriptedEngine, byte_tokenizer, serving

USER = [{"role": "user", "content": "Was ist los? 🙂"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
STATS = {"generation_tps", "tokens_per_round", "rounds", "generation_tokens", "prompt_done",
         "prompt_tokens", "cached_tokens"}  # fmt: skip
CALL = '<tool_call>{"name": "weather", "arguments": {"town": "Köln"}}</tool_call>'


@pytest.fixture
def ask(served):
    """(answer, request) -> the engine's last request and what the client made of the reply."""
    engine, address = served
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)

    def ask(text, **request):
        engine.script = text if callable(text) else lambda _: text
        request = {"model": "scripted", "messages": USER} | request
        reply = client.chat.completions.create(**request)
        reply = list(reply) if request.get("stream") else reply
        return reply, engine.requests[-1]

    ask.client, ask.engine, ask.address = client, engine, address
    return ask


def refused(call) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert "\n" not in caught.value.body["message"]
    return caught.value


def test_an_answer(ask, tokenizer):
    reply, asked = ask("Nichts. 🙂🙂")
    (choice,) = reply.choices
    assert choice.message.content == "Nichts. 🙂🙂"
    assert choice.finish_reason == "stop"
    assert tokenizer.decode(asked.prompt).endswith("🙂<|im_end|>\n<|im_start|>assistant\n")
    assert reply.usage.prompt_tokens == len(asked.prompt)
    assert reply.usage.prompt_tokens_details.cached_tokens == len(asked.prompt) // 2
    assert reply.usage.completion_tokens == len(tokenizer.encode("Nichts. 🙂🙂")) + 1
    ours = reply.usage.redrafter
    assert ours["drafted_tokens"] == ours["accepted_tokens"] > 0
    assert ours["tokens_per_round"] > 1


def test_a_stream_is_the_same_text_and_ends_with_usage(ask):
    chunks, _ = ask("Nichts. 🙂🙂", stream=True, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Nichts. 🙂🙂"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("stop") == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_the_fields_of_sampling_mean_what_they_mean(ask):
    _, asked = ask(
        "x",
        temperature=0.7,
        top_p=0.9,
        seed=-1,
        stop=["a", "b"],
        max_tokens=30,
        max_completion_tokens=20,
        logit_bias={"5": -100},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
                    "redrafter": {"drafter": "none", "budget": 9, "rule": "typical"}},
    )  # fmt: skip
    s = asked.sampling
    assert (s.temp, s.top_p, s.seed, s.top_k, s.min_p) == (0.7, 0.9, 2**64 - 1, 7, 0.1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.5, -0.5, 1.1)
    assert s.presence_context_size == s.frequency_context_size == WHOLE_TEXT
    assert (s.logit_bias, s.rule) == ({5: -100}, "typical")
    assert (asked.generation.max_tokens, asked.generation.stop) == (20, ("a", "b"))
    assert (asked.drafter, asked.draft.budget) == ("none", 9)


def test_top_p_0_is_the_likeliest_token(ask):
    _, asked = ask("x", temperature=1, top_p=0)
    assert (asked.sampling.top_p, asked.sampling.top_k) == (1.0, 1)


def test_without_a_limit_an_answer_has_the_whole_context(ask):
    _, asked = ask("x")
    assert asked.generation.max_tokens == 256  # of Defaults
    _, asked = ask("x", max_tokens=100_000)
    assert asked.generation.max_tokens == 4096 - len(asked.prompt)


def test_several_answers_have_seeds_one_after_the_other(ask):
    script = lambda request: f"seed {request.sampling.seed}"
    reply, _ = ask(script, n=3, seed=40, temperature=1.0)
    assert [c.message.content for c in reply.choices] == ["seed 40", "seed 41", "seed 42"]
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == len(ask.engine.requests[-1].prompt)
    assert reply.usage.redrafter["seeds"] == [40, 41, 42]
    chunks, _ = ask(script, n=3, seed=40, temperature=1.0, stream=True)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["seed 40", "seed 41", "seed 42"]


def test_where_an_answer_stops(ask):
    reply, _ = ask("one two three", stop=" three")
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("one two", "stop")
    reply, _ = ask("one two three", max_tokens=3)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("one", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_a_stop_string_are_not_told(ask, stream):
    """Not with log-probabilities either, though some came rounds before it was known."""
    reply, _ = ask("one two three", stop=[" two thr", " two x"], logprobs=True, stream=stream)
    choices = [chunk.choices[0] for chunk in reply if chunk.choices] if stream else reply.choices
    told = [entry.token for choice in choices for entry in choice.logprobs.content]
    assert told == list("one")
    reply, _ = ask("one two", stop=" two x", logprobs=True)
    assert [entry.token for entry in reply.choices[0].logprobs.content] == list("one two")


def test_logprobs(ask):
    reply, _ = ask("aé", logprobs=True, top_logprobs=2)
    entries = reply.choices[0].logprobs.content
    assert entries[0].token == "a"
    assert entries[0].bytes == [97]
    assert entries[1].bytes is None  # half a letter
    assert [round(top.logprob, 1) for top in entries[0].top_logprobs] == [-0.5, -9999.0]
    assert len(entries) == 3  # the end of the text is not among them
    chunks, _ = ask("aé", logprobs=True, stream=True)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].logprobs]
    shown = [entry.token for choice in choices for entry in choice.logprobs.content]
    assert shown == [entry.token for entry in entries]


def test_reasoning_is_apart_from_the_answer(ask):
    reply, _ = ask("<think>\nHm, nichts?\n</think>\n\nNichts.")
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm, nichts?\n", "Nichts.")
    tokens = reply.usage.completion_tokens_details.reasoning_tokens
    assert len("Hm, nichts?\n") <= tokens <= len("<think>\nHm, nichts?\n</think>")
    chunks, _ = ask("<think>\nHm, nichts?\n</think>\n\nNichts.", stream=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == "Hm, nichts?\n"
    assert "".join(delta.content or "" for delta in deltas) == "Nichts."


def test_reasoning_effort_none_and_template_arguments(ask, tokenizer):
    _, asked = ask("x", reasoning_effort="none", extra_body={"chat_template_kwargs": {"mood": "!"}})
    assert tokenizer.decode(asked.prompt).endswith("assistant\n<think></think>!")
    error = refused(lambda: ask("x", reasoning_effort="high"))
    assert (error.status_code, error.body["param"]) == (400, "reasoning_effort")
    template = {"chat_template_kwargs": {"tokenize": True}}
    error = refused(lambda: ask("x", extra_body=template))
    assert error.body["param"] == "chat_template_kwargs.tokenize"


def test_a_tool_is_called(ask, tokenizer):
    reply, asked = ask(f"Moment.\n{CALL}", tools=[WEATHER])
    (choice,) = reply.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Moment.\n"
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "weather",
        {"town": "Köln"},
    )
    assert '"name": "weather"' in tokenizer.decode(asked.prompt)


def test_a_tool_is_called_in_a_stream(ask):
    chunks, _ = ask(f"<think>Hm</think>{CALL}\n{CALL}", tools=[WEATHER], stream=True)
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    assert all(json.loads(call.function.arguments) == {"town": "Köln"} for call in calls)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ""


def test_one_call_is_enough_without_parallel_calls(ask):
    script = f"{CALL}{CALL}" + "x" * 300
    reply, _ = ask(script, tools=[WEATHER], parallel_tool_calls=False)
    assert len(reply.choices[0].message.tool_calls) == 1
    assert reply.choices[0].finish_reason == "tool_calls"
    most = len(ask.engine.served.tokenizer.encode(CALL))
    reply, _ = ask(script, tools=[WEATHER], parallel_tool_calls=False, max_tokens=most)
    assert reply.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "sky", "arguments": {}}</tool_call>',  # nobody gave it
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        "<tool_call>[]</tool_call>",
        '<tool_call>{"name": "weather"',  # cut
    ],
)
def test_what_is_no_call_is_text(ask, text):
    reply, _ = ask(text, tools=[WEATHER])
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content == text
    assert reply.choices[0].finish_reason == "stop"


def test_marks_of_calls_are_text_where_no_tools_are_given(ask):
    reply, _ = ask(CALL)
    assert reply.choices[0].message.content == CALL
    reply, _ = ask(CALL, tools=[WEATHER], tool_choice="none")
    assert reply.choices[0].message.content == CALL
    assert "weather" not in ask.engine.served.tokenizer.decode(ask.engine.requests[-1].prompt)


def test_an_agent_of_ten_turns(ask, tokenizer):
    """What the server says goes back to it, as the client made it of it."""
    messages = [*USER]
    towns = iter(f"Town {number}" for number in range(10))
    script = lambda _: CALL.replace("Köln", next(towns))
    for turn in range(10):
        reply, asked = ask(script, messages=messages, tools=[WEATHER])
        message = reply.choices[0].message
        call = message.tool_calls[0]
        messages.append(message.model_dump() if turn % 2 else message)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{turn} °C"})
    shown = tokenizer.decode(asked.prompt)
    for turn in range(9):
        assert f"[town=Town {turn}]" in shown
        assert f"<|im_start|>tool\n{turn} °C" in shown


def test_reasoning_that_is_sent_back_reaches_the_template(ask, tokenizer):
    messages = [*USER, {"role": "assistant", "content": "b", "reasoning_content": "a"}, *USER]
    _, asked = ask("x", messages=messages)
    assert "assistant\n<think>a</think>b<|im_end|>" in tokenizer.decode(asked.prompt)


@pytest.mark.parametrize(
    ("field", "param", "word"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:"}}]}]},
         "messages[0].content[0].type", "text only"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0]", "robot"),
        ({"messages": [*USER, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
         "messages[1].tool_calls[0].function.arguments", "JSON"),
        ({"temperature": 3}, "temperature", "2"),
        ({"n": 0}, "n", "1"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"stop": ""}, "stop", "1 character"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "the"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice", "made to call"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
         "tool_choice", "made to call"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "constrained"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
         "response_format.type", "constrained"),
        ({"store": True}, "store", "keeps no answers"),
        ({"service_tier": "flex"}, "service_tier", "one tier"),
        ({"functions": []}, "functions", "tools"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "text only"),
        ({"extra_body": {"colour": "red"}}, "colour", "leave colour out"),
        ({"extra_body": {"redrafter": {"drafter": "x"}}}, "redrafter.drafter", "max_gram"),
        ({"extra_body": {"redrafter": {"details": True}}}, "redrafter.details", "stream"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_an_error(ask, field, param, word):
    error = refused(lambda: ask("x", **field))
    assert error.status_code == 400
    assert error.body["param"] == param
    assert word in error.body["message"]


def test_fields_that_ask_for_nothing_are_taken(ask):
    reply, _ = ask(
        "x", store=False, user="u", metadata={"a": "b"}, service_tier="auto", n=1,
        response_format={"type": "text"}, parallel_tool_calls=True, modalities=["text"],
        prompt_cache_key="k", safety_identifier="s",
    )  # fmt: skip
    assert reply.choices[0].message.content == "x"


def test_another_model_is_not_found(ask):
    error = refused(lambda: ask("x", model="gpt-5"))
    assert (error.status_code, error.body["code"]) == (404, "model_not_found")
    assert "--allow-model-switch" in error.body["message"]


def test_a_prompt_beyond_the_context_is_told_in_tokens(ask):
    submitted = len(ask.engine.requests)
    for length, told in ((5000, "has 50"), (200_000, "has about 200000 tokens")):
        long = [{"role": "user", "content": "a" * length}]
        error = refused(lambda long=long: ask("x", messages=long))
        assert (error.status_code, error.body["code"]) == (400, "context_length_exceeded")
        assert "4096" in error.body["message"]
        assert told in error.body["message"]
    error = refused(lambda: ask.client.completions.create(model="scripted", prompt="a" * 200_000))
    assert error.body["code"] == "context_length_exceeded"
    assert len(ask.engine.requests) == submitted


def test_an_error_of_the_engine(ask):
    from redrafter_mlx.errors import UserError

    error = refused(lambda: ask(lambda _: UserError("no")))
    assert (error.status_code, error.body["message"]) == (400, "no")
    error = refused(lambda: ask(lambda _: RuntimeError("out of memory\nlong story")))
    assert (error.status_code, error.body["type"]) == (500, "server_error")


def test_models(ask):
    (model,) = ask.client.models.list().data
    assert (model.id, model.object) == ("scripted", "model")
    assert ask.client.models.retrieve("scripted").redrafter["context"] == 4096
    error = refused(lambda: ask.client.models.retrieve("a/b"))
    assert error.status_code == 404


def test_completions(ask, tokenizer):
    ask.engine.script = lambda request: f"<think>{len(request.prompt)}"
    create = ask.client.completions.create
    reply = create(model="scripted", prompt="Es war", logprobs=1)
    assert reply.choices[0].text == "<think>6"
    assert tokenizer.decode(ask.engine.requests[-1].prompt) == "Es war"
    assert reply.choices[0].logprobs.tokens == ["<think>", "6"]
    assert reply.choices[0].logprobs.text_offset == [0, 7]
    reply = create(model="scripted", prompt=[[1, 2], [3]], n=2)
    assert [c.text[-1] for c in reply.choices] == ["2", "2", "1", "1"]
    assert reply.usage.prompt_tokens == 3
    chunks = list(create(model="scripted", prompt="Es", stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "<think>2"
    assert chunks[-1].choices[0].finish_reason == "stop"
    for prompt in ([100_000], [-1], [], ""):
        error = refused(lambda prompt=prompt: create(model="scripted", prompt=prompt))
        assert error.status_code == 400
    error = refused(lambda: create(model="scripted", prompt="a", echo=True))
    assert error.body["param"] == "echo"


def test_offsets_in_a_stream_are_those_of_the_whole_text(ask):
    """Also where text is held back that may become a stop sequence, and in other scripts."""
    ask.engine.script = lambda request: "Aha! Größe \N{SNOWMAN} haha <think>not haste."
    flags = {"model": "scripted", "prompt": "Es", "logprobs": 1, "stop": ["hahaha", "haste"]}
    whole = ask.client.completions.create(**flags).choices[0]
    chunks = [chunk.choices[0] for chunk in ask.client.completions.create(**flags, stream=True)]
    offsets = [at for chunk in chunks if chunk.logprobs for at in chunk.logprobs.text_offset]
    tokens = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert (tokens, offsets) == (whole.logprobs.tokens, whole.logprobs.text_offset)
    assert offsets == sorted(offsets)
    assert len(chunks) > 3


def details_of(address, **request):
    body = {"messages": USER, "stream": True, "redrafter": {"details": True}} | request
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=30) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if "data: {" in line]
    return [json.loads(line) for line in lines]


def test_details_tell_who_wrote_what(ask):
    """What the page depends on."""
    ask.engine.script = lambda _: "<think>Hm.</think>\nNichts. 🙂"
    chunks = details_of(ask.address)
    text = ""
    for chunk in chunks:
        delta, ours = chunk["choices"][0]["delta"], chunk["redrafter"]
        said = (delta.get("content") or "") + delta.get("reasoning_content", "")
        assert "".join(piece["text"] for piece in ours["pieces"]) == said
        text += said
        assert ours["stats"].keys() >= STATS
    assert text == "Hm.Nichts. 🙂"
    drafted = {p["drafted"] for chunk in chunks for p in chunk["redrafter"]["pieces"]}
    assert drafted == {True, False}
    trees = [c["redrafter"]["tree"] for c in chunks if c["redrafter"]["tree"]]
    rounds = chunks[-1]["redrafter"]["stats"]["rounds"]
    assert len(trees) == rounds  # one a round
    assert trees[0]["parents"] == [-1, 0, 1]
    assert trees[0]["accepted"] == [0, 1, 2]
    assert trees[0]["tokens"][0] == "<think>"
    assert chunks[0]["redrafter"]["stats"]["prompt_done"] == 1


def test_a_model_without_tools_or_template(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, PLAIN_CHAT, ["<|im_end|>"])
    with serving(ScriptedEngine(tokenizer, lambda _: "x")) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        create = lambda **more: client.chat.completions.create(
            model="scripted", messages=USER, **more
        )
        error = refused(lambda: create(tools=[WEATHER]))
        assert (error.status_code, error.body["param"]) == (400, "tools")
        assert create(tools=[WEATHER], tool_choice="none").choices[0].message.content == "x"
        assert create(reasoning_effort="none").choices[0].message.content == "x"


def test_the_servers_defaults_hold_where_a_request_says_nothing(tokenizer):
    engine = ScriptedEngine(tokenizer, lambda _: "x")
    sampling = SamplingOptions(temp=0.6, seed=3, min_p=0.2)
    defaults = Defaults(sampling=sampling, template={"mood": "?"})
    with serving(engine, defaults=defaults) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        client.chat.completions.create(model="scripted", messages=USER, seed=4)
    assert tokenizer.decode(engine.requests[-1].prompt).endswith("assistant\n?")
    asked = engine.requests[-1].sampling
    assert (asked.temp, asked.seed, asked.min_p) == (0.6, 4, 0.2)


def test_texts_cut_anywhere_are_put_together_again(ask):
    """Whatever the rounds are, streams and whole answers say the same."""
    rng = random.Random(0)
    pieces = ["<think>", "</think>", CALL, "<tool", "_call>", "é🙂", " ", "\n", "abc", "<", "</"]
    for _ in range(30):
        text = "".join(rng.choices(pieces, k=rng.randrange(8)))
        ask.engine.step = rng.randrange(1, 9)
        whole = ask(text, tools=[WEATHER])[0].choices[0]
        chunks = ask(text, tools=[WEATHER], stream=True)[0]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(d.content or "" for d in deltas) == (whole.message.content or "")
        reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        assert reasoning == (getattr(whole.message, "reasoning_content", None) or "")
        calls = [call.function for d in deltas for call in d.tool_calls or ()]
        wholes = [call.function for call in whole.message.tool_calls or ()]
        assert [c.arguments for c in calls] == [c.arguments for c in wholes]
        assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    ask.engine.step = 3
