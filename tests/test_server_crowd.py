"""Many requests, eight at a time, in conversations: each is answered as if it had come alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from families import build
from redrafter_mlx.config import EngineOptions
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.engine import Engine, Served
from scripted_engine import CHAT, byte_tokenizer, serving, wait_until
from support import random_drafter

CLIENTS, TURNS = 8, 3
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Opens the reasoning itself, and leaves that of earlier turns out: prompts part before answers."""


@dataclass(frozen=True)
class Told:
    """What came of a request."""

    body: dict
    message: dict
    reason: str
    cached: int


def engine_of(family, tokenizer, **options):
    """Its drafters are a head that looks back, united with Max-Gram; Max-Gram; and none."""

    def load():
        model = build(family, vocab_size=len(tokenizer), max_position_embeddings=8192)
        head = random_drafter(model, lookback_heads=2, lookback_size=8, tied_output=True)
        return Served("tiny", model, tokenizer, {"default": UnionDrafter([head, MaxGramDrafter()])})

    return Engine(load, EngineOptions(**options))


def ask(address, body) -> Told:
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    cached = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Told(body, choice["message"], choice["finish_reason"], cached)


def give_up(address, body) -> None:
    """Ask for a long answer and go away in the middle of it."""
    body = body | {"max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=120) as reply:
        lines = reply.iter_lines()
        for _ in range(4):
            next(lines, None)


def converse(address, number, ends_reasoning) -> list[Told]:
    """A conversation of some turns; now and then somebody gives up."""
    rng, told = random.Random(number), []
    messages = [{"role": "system", "content": "Be brief. " * (1 + 5 * (number % 3))}]
    for turn in range(TURNS):
        words = rng.choice([1, 4, 20, 60])
        messages.append({"role": "user", "content": f"{turn} of the end " * words})
        body = {
            "messages": list(messages),
            "max_tokens": rng.choice([1, 7, 20, 40]),
            "temperature": rng.choice([0, 0.5, 1.0]),
            "seed": rng.randrange(2**32),
            "logit_bias": {str(ends_reasoning): 4},
            "redrafter": {
                "drafter": rng.choice(["default", "max_gram", "none"]),
                "budget": rng.choice(["auto", 6]),
            },
        }
        if rng.random() < 0.4:
            give_up(address, body)
        told.append(ask(address, body))
        said = {name: told[-1].message.get(name) for name in ("content", "reasoning_content")}
        messages.append({"role": "assistant", **{k: v for k, v in said.items() if v}})
        messages[-1].setdefault("content", "")
    return told


@pytest.mark.parametrize(
    ("family", "thinks"),
    [("llama", False), ("gemma3_text", True), ("qwen3_5", True)],
)  # gemma's has windows, qwen's recurrent layers
def test_each_of_many_conversations_is_what_it_is_alone(family, thinks, tmp_path):
    template = THINKING if thinks else CHAT
    tokenizer = byte_tokenizer(tmp_path, template)
    ends = tokenizer.convert_tokens_to_ids("</think>")
    engine = engine_of(family, tokenizer, parallel=CLIENTS, queue=64).start()
    with serving(engine) as (address, _), ThreadPoolExecutor(CLIENTS) as pool:
        found = pool.map(lambda number: converse(address, number, ends), range(CLIENTS))
        told = [each for several in found for each in several]
        wait_until(lambda: engine.status()["running"] == 0)
        finished = dict(engine.totals.finished)
    assert len(told) == CLIENTS * TURNS
    assert finished["cancelled"] > 5
    assert sum(each.cached > 0 for each in told) >= CLIENTS * (TURNS - 1)
    thoughts = [bool(each.message.get("reasoning_content")) for each in told]
    if template is THINKING:
        assert sum(thoughts) > 5
        assert any(each.message["content"] for each in told)

    alone = engine_of(family, tokenizer, parallel=1, cache_memory=0).start()
    with serving(alone) as (address, _):
        for each in told:
            again = ask(address, each.body)
            assert again.cached == 0
            assert (again.message, again.reason) == (each.message, each.reason), each.body
