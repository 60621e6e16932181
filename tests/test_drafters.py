"""The promise for every kind of drafter: the text is that of plain decoding."""

import pytest

from families import build
from redrafter_mlx.check import compare_with_plain
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.cascade import CascadeDrafter
from redrafter_mlx.drafters.max_gram import MaxGramDrafter, Memory, count_bigrams
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.loading import drafters, hub
from support import generation, ids, random_drafter, tiny_prompt

V = 97
BUDGETS = [
    DraftOptions(beam_width=1, beam_length=3, budget=3),
    DraftOptions(beam_width=4, beam_length=5, budget=16),
    DraftOptions(beam_width=3, beam_length=4, budget=0),
]
SAMPLING = [
    {},
    {"temp": 0.8, "seed": 21},
    {"temp": 1.2, "seed": 22, "top_p": 0.9, "frequency_penalty": 0.3},
    {"temp": 0.0, "repetition_penalty": 1.2},
]
KINDS = {
    "max_gram": lambda head, small: MaxGramDrafter(),
    "bigrams": lambda head, small: MaxGramDrafter(bigrams=count_bigrams(list(range(V)) * 2)),
    "memory": lambda head, small: MaxGramDrafter(memory=Memory(None, 60, V)),
    "model": lambda head, small: ModelDrafter(small, V),
    "union": lambda head, small: UnionDrafter([head, MaxGramDrafter()]),
    "cascade": lambda head, small: CascadeDrafter(
        [ModelDrafter(small, V), MaxGramDrafter()], [[5, 10], [0, 10]], 3.0
    ),
    "head cascade": lambda head, small: CascadeDrafter(
        [head, ModelDrafter(small, V), MaxGramDrafter()], [[3, 2, 5], [0, 0, 0], [0, 0, 5]], 1.0
    ),
    "union of a cascade": lambda head, small: UnionDrafter(
        [head, CascadeDrafter([ModelDrafter(small, V), MaxGramDrafter()], [[2, 4], [0, 4]], 1.5)]
    ),
}
name_of = lambda value: "-".join(f"{k}{v}" for k, v in value.items()) or "greedy"


TARGETS = ["llama", "llama:sliding", "deepseek_v2"]


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return build(request.param)


@pytest.fixture(scope="module")
def head(target):
    """One for all tests: its searches are compiled."""
    return random_drafter(target)


@pytest.fixture(scope="module")
def small():
    return build("llama", seed=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", SAMPLING, ids=name_of)
def test_tiny_targets(request, target, head, small, kind, sampling):
    """Each kind, sampling and budget meet on one target."""
    prompt = tiny_prompt(9) * 2
    plain = ids(generation(target, prompt, **sampling))
    drafter = KINDS[kind](head, small)
    named = TARGETS.index(request.node.callspec.params["target"])
    draft = BUDGETS[(named + SAMPLING.index(sampling) + list(KINDS).index(kind)) % len(BUDGETS)]
    assert ids(generation(target, prompt, drafter, draft=draft, **sampling)) == plain


@pytest.mark.parametrize("kind", ["max_gram", "model", "union", "cascade"])
@pytest.mark.parametrize("prompt", [[3], [5] * 300], ids=["one token", "one repeated token"])
def test_prompts_at_the_edge(target, head, small, kind, prompt):
    plain = ids(generation(target, prompt, max_tokens=20))
    drafter = KINDS[kind](head, small)
    assert ids(generation(target, prompt, drafter, max_tokens=20)) == plain


@pytest.mark.parametrize("kind", ["max_gram", "model", "union", "cascade"])
def test_one_drafter_serves_texts_in_turn(target, head, small, kind):
    drafter = KINDS[kind](head, small)
    prompts = tiny_prompt(9), tiny_prompt(14, seed=3)
    plain = [ids(generation(target, prompt, max_tokens=20)) for prompt in prompts]
    one, two = (iter(generation(target, p, drafter, max_tokens=20)) for p in prompts)
    pairs = list(zip(one, two, strict=True))
    assert [[a.id for a, _ in pairs], [b.id for _, b in pairs]] == plain


def test_max_gram_pays_where_the_text_repeats_itself():
    """Greedy text of a tiny model soon runs in circles."""
    model = build("llama", seed=2)
    for layer in model.layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * 0
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * 0
    run = generation(model, tiny_prompt(9), MaxGramDrafter(), max_tokens=200)
    text = ids(run)
    assert text == ids(generation(model, tiny_prompt(9), max_tokens=200))
    assert run.stats.tokens_per_round > 3
    assert run.stats.nodes / run.stats.rounds < 16


# ---------------------------------------------------------------------------------------------
# On the demo target

PROMPTS = {
    "copy": "Repeat this sentence twice: The old lighthouse keeper counted the ships every night.",
    "fresh": "Write a haiku about rain.",
}


@pytest.fixture(scope="module")
def demo(demo_path):
    model, tokenizer = hub.load("demo")
    prompts = {
        name: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        for name, text in PROMPTS.items()
    }
    plain = {name: ids(generation(model, p, max_tokens=24)) for name, p in prompts.items()}
    return model, prompts, plain


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["max_gram", "auto", "cascade:[demo,max_gram]"])
def test_demo_target(demo, name, prompt):
    model, prompts, plain = demo
    drafter = drafters.load_drafter(name, model)
    run = generation(model, prompts[prompt], drafter, max_tokens=24)
    reference = generation(model, prompts[prompt], max_tokens=24)
    text = ids(run)
    assert text == plain[prompt], str(compare_with_plain(text, reference))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_union_needs_no_more_rounds_than_its_members(demo, prompt):
    """With a budget that has room for both."""
    model, prompts, _ = demo
    rounds = {}
    for name in ("demo", "max_gram", "auto"):
        drafter = drafters.load_drafter(name, model)
        draft = DraftOptions(beam_width=2, beam_length=4, budget=24)
        run = generation(model, prompts[prompt], drafter, max_tokens=24, draft=draft)
        ids(run)
        rounds[name] = run.stats.rounds
    assert rounds["auto"] <= min(rounds["demo"], rounds["max_gram"]) + 1
