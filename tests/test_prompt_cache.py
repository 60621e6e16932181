"""prompt_cache=: what mlx-lm left is gone on with, and what we leave mlx-lm goes on with."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import redrafter_mlx
from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.generate import main
from support import ScriptedDrafter, generation, ids, tiny_prompt

MODELS = ["llama", "gemma3_text", "llama4", "qwen3_5", "falcon_h1", "mamba2", "lfm2"]
FIRST, SECOND = tiny_prompt(21), tiny_prompt(9, seed=1)


def theirs(model, prompt, cache, tokens=24, **options):
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens, prompt_cache=cache, **options)
    return [token for token, _ in steps]


def two_turns(model):
    """mlx-lm's answers to FIRST and then SECOND, and its caches between."""
    cache = make_prompt_cache(model)
    first = theirs(model, FIRST, cache)
    return first, theirs(model, SECOND, cache)


def drafter_of(prompt, answer):
    return ScriptedDrafter(prompt + answer, right=3, wrong=1, decoys=True)


class Offset(ScriptedDrafter):
    """Knows the text of a second turn, whose positions begin after the first."""

    def propose(self, context, budget):
        begun = context.position + 1 - len(context.transcript.tokens)
        self.text = [0] * begun + self.text if not self.steps else self.text
        return super().propose(context, budget)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_turns_of_ours_after_turns_of_theirs(name, drafts):
    model = build(name)
    first, second = two_turns(model)
    cache = make_prompt_cache(model)
    assert theirs(model, FIRST, cache) == first
    drafter = Offset(SECOND + second, right=3, wrong=1, decoys=True) if drafts else None
    run = generation(model, SECOND, drafter, max_tokens=24, prompt_cache=cache)
    assert ids(run) == second
    assert run.stats.rounds == (6 if drafts else 24)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_turns_of_theirs_after_turns_of_ours(tmp_path, name, drafts):
    model = build(name)
    first, second = two_turns(model)
    cache = make_prompt_cache(model)
    drafter = drafter_of(FIRST, first) if drafts else None
    assert ids(generation(model, FIRST, drafter, max_tokens=24, prompt_cache=cache)) == first
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    assert theirs(model, SECOND, load_prompt_cache(str(tmp_path / "cache.safetensors"))) == second


@pytest.mark.parametrize("stop", range(1, 9))
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5"])
def test_an_answer_that_ends_within_a_draft_leaves_nothing_more(name, stop):
    model = build(name)
    cache = make_prompt_cache(model)
    first = theirs(model, FIRST, cache, tokens=stop)
    second = theirs(model, SECOND, cache)
    cache = make_prompt_cache(model)
    answer = theirs(model, FIRST, make_prompt_cache(model), tokens=24)
    run = iter(generation(model, FIRST, drafter_of(FIRST, answer), prompt_cache=cache))
    assert [next(run).id for _ in range(stop)] == first
    run.close()
    assert theirs(model, SECOND, cache) == second


def test_a_quantised_cache_goes_on():
    model, kv = build("llama", head_dim=32, hidden_size=128), {"kv_bits": 8, "kv_group_size": 32}
    kv["quantized_kv_start"] = 0
    cache = make_prompt_cache(model)
    first, second = theirs(model, FIRST, cache, **kv), theirs(model, SECOND, cache, **kv)
    cache = make_prompt_cache(model)
    run = generation(model, FIRST, drafter_of(FIRST, first), 24, kv=kv, prompt_cache=cache)
    assert ids(run) == first
    assert cache[0].bits == 8
    drafter = Offset(SECOND + second, right=3, wrong=1, decoys=True)
    run = generation(model, SECOND, drafter, 24, kv=kv, prompt_cache=cache)
    assert ids(run) == second


def test_a_cache_of_another_model_is_told():
    model = build("llama")
    for other, words in (("qwen3_5", "4 layers, the model 2"), ("mamba2", "layer 0 is a Arrays")):
        cache = make_prompt_cache(build(other))
        with pytest.raises(UserError, match=words):
            ids(generation(model, FIRST, drafter_of(FIRST, []), prompt_cache=cache))


@pytest.fixture
def cached(demo_path, tmp_path):
    """A file as `mlx_lm.cache_prompt` writes it: the demo model has read some lines."""
    model, tokenizer = redrafter_mlx.load(str(demo_path))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The ship is called Aurora. "}],
        add_generation_prompt=False, continue_final_message=True,
    )  # fmt: skip
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([text]), cache=cache))
    path = tmp_path / "ship.safetensors"
    save_prompt_cache(str(path), cache, {"model": str(demo_path), "tokenizer_config": "{}"})
    return path


def test_the_command_goes_on_with_a_file(cached, demo_path, capsys):
    words = ["--model", str(demo_path), "--prompt-cache-file", str(cached), "--check", "--json"]
    words += ["--prompt", "What is the ship called?", "--max-tokens", "16", "--budget", "8"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["check"]["identical"]
    assert "Aurora" in said["text"]


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "other model"])
def test_a_file_that_is_none_is_told_in_a_line(cached, demo_path, damage, capsys):
    content, model = cached.read_bytes(), str(demo_path)
    if damage == "cut":
        cached.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        cached.write_text("not a cache")
    elif damage == "missing":
        cached.unlink()
    else:
        model = "org/other"
    words = ["--model", model, "--prompt-cache-file", str(cached), "--prompt", "Hm"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "ship.safetensors" in said
