"""Requests that schemathesis makes from the server's own description: none may break it.

    REDRAFTER_MLX_FUZZ=200 python -m pytest -n 0 tests/test_server_fuzz.py

makes so many for each route, right ones and wrong ones, instead of a few: 2,000 in all.
"""

from __future__ import annotations

import json
import os
import random

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import InvalidSchema
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from redrafter_mlx.errors import UserError
from redrafter_mlx.server import schemas
from redrafter_mlx.server.app import ROUTES
from scripted_engine import ScriptedEngine, serving

EXAMPLES = int(os.environ.get("REDRAFTER_MLX_FUZZ", "12"))
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
SAID = [
    "Ja.",
    "<think>Hm</think>\nJa. 🙂",
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "<tool_call>",
    "",
    UserError("this cannot be"),
]


@pytest.fixture(scope="module")
def address(tokenizer):
    """A server whose engine says this and that."""
    rng = random.Random(0)
    with serving(ScriptedEngine(tokenizer, lambda _: rng.choice(SAID))) as (address, _):
        yield address


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", [*ROUTES, "/v1/messages/count_tokens"])
def test_no_request_breaks_the_server(address, path, mode):
    """Right ones and wrong ones."""
    api = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operation = api[path]["POST"]

    @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        case.call_and_validate(checks=CHECKS, timeout=30)
        asked.append(case)

    asked = []
    try:
        ask()
    except InvalidSchema:  # of its own makings: now and then it asks too much of itself
        assert len(asked) > 10


def test_the_description_is_made_of_the_schemas(address):
    described = httpx.get(f"{address}/openapi.json").json()
    defined = described["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest"):
        assert defined[name]["additionalProperties"] is False
    assert set(defined["ChatRequest"]["properties"]) == set(schemas.ChatRequest.model_fields)
    assert set(described["paths"]) >= {"/v1/chat/completions", "/v1/messages/count_tokens"}


def mutated(value, rng):
    """A request with something else in one place."""
    other = [None, -1, 1e308, True, "", "\u0000é", [], {}, [[]], {"type": "text"}, 2**70, "auto"]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return value | {key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(value[place], rng), *value[place + 1 :]]
    return rng.choice(other)


FULL = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "t", "tool_call_id": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "stop": ["a"], "logit_bias": {"5": 1.0}, "logprobs": True, "top_logprobs": 2, "n": 2,
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 1.0, "seed": 1,
        "chat_template_kwargs": {"mood": "x"}, "reasoning_effort": "none",
        "redrafter": {"details": True, "budget": "auto", "rule": "match"},
    },
    "/v1/completions": {"prompt": [[5, 6], [7]], "logprobs": 1, "n": 2, "max_tokens": 5},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "o"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "stream": True, "text": {"format": {"type": "text"}}, "top_logprobs": 1,
    },
    "/v1/messages": {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "r"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "max_tokens": 9,
        "stream": True, "thinking": {"type": "adaptive"}, "stop_sequences": ["a"],
    },
}  # fmt: skip


@pytest.mark.parametrize("path", FULL)
def test_requests_that_are_nearly_right(address, path):
    """What they have wrong lies deep, where schemathesis seldom comes."""
    rng, statuses = random.Random(1), set()
    with httpx.Client(base_url=address, timeout=30) as client:
        for _ in range(5 * EXAMPLES):
            body = json.dumps(mutated(FULL[path], rng))
            reply = client.post(path, content=body)
            assert reply.status_code in (200, 400, 404), body
            statuses.add(reply.status_code)
    assert {200, 400} <= statuses
