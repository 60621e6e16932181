"""The promise: same target, prompt, settings and seed, same text, whatever is drafted."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from families import build
from redrafter_mlx.check import compare_with_plain
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.loading import drafters, hub
from support import ScriptedDrafter, generation, ids, random_drafter, tiny_prompt

BUDGETS = [
    DraftOptions(beam_width=1, beam_length=3, budget=3),
    DraftOptions(beam_width=4, beam_length=5, budget=16),
    DraftOptions(beam_width=3, beam_length=4, budget=0),
    DraftOptions(beam_width=8, beam_length=2, budget=9),
    DraftOptions(),
]
SAMPLING = [
    {},
    {"temp": 0.7, "seed": 11},
    {"temp": 1.0, "seed": 12},
    {"temp": 1.3, "seed": 13, "top_p": 0.9},
    {"temp": 1.0, "seed": 14, "top_k": 7, "min_p": 0.02},
    {"temp": 1.0, "seed": 15, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temp": 0.0, "repetition_penalty": 1.3, "logit_bias": {3: 2.0}},
    {"temp": 0.9, "seed": 16, "presence_penalty": 0.8, "frequency_penalty": 0.4},
]
D2T = np.arange(0, 97, 2)

name_of = lambda value: "-".join(f"{k}{v}" for k, v in value.items()) or "greedy"


TARGETS = ["llama", "exaone4", "deepseek_v2"]


@pytest.fixture(scope="module", params=TARGETS)
def model(request):
    return build(request.param)


@pytest.mark.parametrize("sampling", SAMPLING, ids=name_of)
def test_tiny_targets(request, model, sampling):
    """Each sampling, drafter and budget meet on one target at least."""
    first = TARGETS.index(request.node.callspec.params["model"]) + SAMPLING.index(sampling)
    prompt = tiny_prompt(9)
    plain = ids(generation(model, prompt, **sampling))
    assert len(set(plain)) > 3, "a text this dull would hide differences"
    reduced = random_drafter(model, seed=1, d2t=D2T, rnn=False, exit_dim=24)
    tied = random_drafter(model, seed=2, d2t=D2T[:20], tied_output=True, fused_layers=(0, 1))
    looks_back = random_drafter(model, seed=3, fused_layers=(0, 1), lookback_heads=2)
    for i, drafter in enumerate([random_drafter(model), reduced, tied, looks_back], first):
        for draft in (BUDGETS[i % 5], BUDGETS[(i + 3) % 5]):  # 3 targets: all five of them
            assert ids(generation(model, prompt, drafter, draft=draft, **sampling)) == plain
    for script in ({"right": 3, "wrong": 1, "decoys": True}, {"right": 0, "wrong": 3}):
        drafter = ScriptedDrafter(prompt + plain, **script)
        assert ids(generation(model, prompt, drafter, **sampling)) == plain


@pytest.mark.parametrize("sampling", SAMPLING, ids=name_of)
def test_the_scripted_drafter_is_believed(model, sampling):
    """Sampling settings must not cost accepted tokens: a draft that is right is accepted."""
    prompt = tiny_prompt(9)
    plain = ids(generation(model, prompt, **sampling))
    run = generation(model, prompt, ScriptedDrafter(prompt + plain, right=4), **sampling)
    assert ids(run) == plain
    assert run.stats.rounds == -(-len(plain) // 5)


def test_other_seeds_give_other_texts(model):
    texts = {tuple(ids(generation(model, tiny_prompt(9), temp=1.0, seed=s))) for s in range(5)}
    assert len(texts) == 5


def test_coupled_drafts_are_accepted_far_more_often_than_chance():
    """Even a random head guesses better once it knows the noise that will be added."""
    model = build("llama")
    prompt = tiny_prompt(9)

    run = generation(model, prompt, random_drafter(model), max_tokens=200, temp=1.0, seed=3)
    coupled = len(ids(run)) / run.stats.rounds
    drafter = random_drafter(model)
    propose = drafter.propose
    drafter.propose = lambda context, budget: propose(without_noise(context), budget)
    run = generation(model, prompt, drafter, max_tokens=200, temp=1.0, seed=3)
    uncoupled = len(ids(run)) / run.stats.rounds
    assert coupled > uncoupled + 0.2, (coupled, uncoupled)


def without_noise(context):
    return replace(context, noise=None)


PROMPTS = ["Write a haiku about rain.", "Copy this list: 12, 47, 305, 9, 86."]


@pytest.fixture(scope="module")
def demo(demo_path: Path):
    model, tokenizer = hub.load("demo")
    return model, tokenizer, drafters.load_drafter("demo", model)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("message", "sampling"),
    [*((message, {}) for message in PROMPTS), (PROMPTS[1], SAMPLING[1])],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_demo_target(demo, message, sampling):
    model, tokenizer, drafter = demo
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True
    )
    eos = tokenizer.eos_token_ids
    plain = ids(generation(model, prompt, max_tokens=24, eos=eos, **sampling))
    if not sampling:
        steps = generate_step(mx.array(prompt), model, max_tokens=24)
        for ours, (theirs, _) in zip(plain, steps, strict=False):
            assert ours == theirs
    for draft in (BUDGETS[1], BUDGETS[4]):
        run = generation(model, prompt, drafter, max_tokens=24, eos=eos, draft=draft, **sampling)
        drafted = ids(run)
        reference = generation(model, prompt, max_tokens=24, eos=eos, **sampling)
        assert drafted == plain, str(compare_with_plain(drafted, reference))
