"""Events, stop strings, limits: what code written for mlx_lm.stream_generate sees."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from families import build
from redrafter_mlx import UserError, generate, stream_generate
from redrafter_mlx import generation as generation_module
from redrafter_mlx.check import compare_with_plain
from redrafter_mlx.loading import drafters, hub
from redrafter_mlx.rounds.verification import Match
from support import accept_everything, generation, ids, random_drafter, tiny_prompt

MESSAGE = "Count from one to five in words."


@pytest.fixture(scope="module")
def demo(demo_path):
    model, tokenizer = hub.load("demo")
    messages = [{"role": "user", "content": MESSAGE}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return model, tokenizer, prompt, drafters.load_drafter("demo", model)


@pytest.fixture(scope="module")
def theirs(demo):
    """mlx-lm's own events, to the end of the text."""
    model, tokenizer, prompt, _ = demo
    return list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=80))


def fields(events):
    return [(e.token, e.text, e.finish_reason) for e in events]


@pytest.mark.parametrize("drafted", [False, True])
def test_events_are_those_of_mlx_lm(demo, theirs, drafted):
    model, tokenizer, prompt, drafter = demo
    ours = list(
        stream_generate(
            model, tokenizer, prompt, max_tokens=80, drafter=drafter if drafted else None, budget=16
        )
    )
    assert fields(ours) == fields(theirs)
    assert theirs[-1].finish_reason == "stop"
    for mine, other in zip(ours[:5], theirs, strict=False):
        np.testing.assert_allclose(np.array(mine.logprobs), np.array(other.logprobs), atol=1e-3)
        assert mine.prompt_tokens == other.prompt_tokens
        assert mine.generation_tokens == other.generation_tokens
        assert mine.prompt_tps > 0
        assert mine.peak_memory > 0
    assert any(event.from_draft for event in ours) == drafted
    assert ours[-1].end_of_round


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6, 7])
def test_max_tokens_cuts_in_the_middle_of_a_path(demo, theirs, max_tokens):
    model, tokenizer, prompt, drafter = demo
    options = {"max_tokens": max_tokens, "drafter": drafter, "budget": 16}
    events = list(stream_generate(model, tokenizer, prompt, **options))
    assert [e.token for e in events] == [e.token for e in theirs[:max_tokens]]
    assert events[-1].finish_reason == "length"
    stats = events[-1].stats
    assert stats.tokens == max_tokens
    assert sum(stats.accepted_at) + stats.rounds >= max_tokens
    assert sum(stats.accepted_at) == sum(e.from_draft for e in events)


def test_no_limit_ends_at_the_end_of_text(demo, theirs):
    model, tokenizer, prompt, drafter = demo
    events = list(stream_generate(model, tokenizer, prompt, max_tokens=-1, drafter=drafter))
    assert fields(events) == fields(theirs)


def test_an_end_token_in_the_middle_of_an_accepted_path_ends_exactly_there():
    from support import ScriptedDrafter

    model, prompt = build("llama"), tiny_prompt(12)
    plain = ids(generation(model, prompt, max_tokens=40))
    drafter = ScriptedDrafter(prompt + plain, right=6)
    end = next(t for i, t in enumerate(plain) if i % 7 in (2, 3, 4) and plain.index(t) == i)
    run = generation(model, prompt, drafter, max_tokens=40, eos={end})
    events = list(run)
    at = plain.index(end)
    assert [e.id for e in events] == plain[: at + 1]
    assert events[-1].finish_reason == "stop"
    assert run.stats.tokens == at + 1
    assert sum(run.stats.accepted_at) == sum(e.from_draft for e in events)


@pytest.mark.parametrize(
    ("stop", "kept"),
    [(["hree"], "T"), (["two", "three"], None), (["nowhere in the text"], None), (["\n"], None)],
)
def test_stop_strings_cut_the_text_before_them(demo, theirs, stop, kept):
    model, tokenizer, prompt, drafter = demo
    whole = "".join(e.text for e in theirs)
    events = list(
        stream_generate(model, tokenizer, prompt, max_tokens=80, drafter=drafter, stop=stop)
    )
    text = "".join(e.text for e in events)
    cuts = [whole.find(s) for s in stop if s in whole]
    assert text == (whole[: min(cuts)] if cuts else whole)
    assert events[-1].finish_reason == "stop"
    if cuts:
        assert len(events) < len(theirs)


def test_generate_returns_the_text(demo, theirs, capsys):
    model, tokenizer, prompt, drafter = demo
    text = generate(model, tokenizer, prompt, verbose=True, max_tokens=80, drafter=drafter)
    assert text == "".join(e.text for e in theirs)
    out = capsys.readouterr().out
    assert text in out
    assert "tokens per round" in out


def test_text_prompts_are_encoded_as_mlx_lm_does(demo):
    model, tokenizer, _, drafter = demo
    ours = list(stream_generate(model, tokenizer, "Once upon", max_tokens=8, drafter=drafter))
    theirs = list(mlx_lm.stream_generate(model, tokenizer, "Once upon", max_tokens=8))
    assert fields(ours) == fields(theirs)
    array = mx.array(tokenizer.encode("Once upon"))
    assert fields(stream_generate(model, tokenizer, array, max_tokens=8)) == fields(theirs)


def test_a_prompt_of_one_token_and_one_longer_than_a_chunk():
    model = build("llama")
    drafter = random_drafter(model)
    for prompt in (tiny_prompt(1), tiny_prompt(1100)):
        plain = ids(generation(model, prompt, max_tokens=10))
        assert ids(generation(model, prompt, drafter, max_tokens=10)) == plain


def test_progress_counts_the_prompt(demo):
    model, tokenizer, _, _ = demo
    seen = []
    list(
        stream_generate(
            model,
            tokenizer,
            tiny_prompt(50),
            max_tokens=1,
            prefill_step_size=20,
            prompt_progress_callback=lambda done, total: seen.append((done, total)),
        )
    )
    assert seen == [(0, 50), (20, 50), (40, 50), (49, 50)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"temperature": 0.5}, "unknown option temperature="),
        ({"max_kv_size": 64}, "max_kv_size= cannot be honoured"),
        ({"sampler": lambda x: x}, "sampler= cannot be honoured"),
        ({"stop": ""}, "--stop ''"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(demo, options, message):
    model, tokenizer, prompt, _ = demo
    with pytest.raises(UserError, match=message):
        list(stream_generate(model, tokenizer, **{"prompt": prompt, **options}))


def test_a_fresh_seed_is_drawn_and_can_be_repeated():
    model, prompt = build("llama"), tiny_prompt(10)
    run = generation(model, prompt, temp=1.0)
    text = ids(run)
    assert ids(generation(model, prompt, random_drafter(model), temp=1.0, seed=run.seed)) == text
    assert ids(generation(model, prompt, temp=1.0)) != text


def test_check_finds_the_first_difference_and_its_margin(monkeypatch):
    model, prompt = build("llama"), tiny_prompt(10)
    drafter = random_drafter(model)
    right = ids(generation(model, prompt, drafter, max_tokens=20))
    assert str(compare_with_plain(right, generation(model, prompt, max_tokens=20))) == (
        "identical (20 tokens)"
    )
    wrong_rule = lambda sampler: accept_everything(Match(sampler))
    monkeypatch.setitem(generation_module.RULES, "match", wrong_rule)
    wrong = ids(generation(model, prompt, drafter, max_tokens=20))
    monkeypatch.undo()
    comparison = compare_with_plain(wrong, generation(model, prompt, max_tokens=20))
    assert comparison.position is not None
    assert wrong[: comparison.position] == right[: comparison.position]
    assert comparison.drafted == wrong[comparison.position]
    assert comparison.plain == right[comparison.position]
    assert comparison.margin > 0


def test_check_of_a_text_that_goes_on_after_the_plain_one_ended():
    model, prompt = build("llama"), tiny_prompt(10)
    plain = ids(generation(model, prompt, max_tokens=5))
    comparison = compare_with_plain([*plain, 1], generation(model, prompt, max_tokens=5))
    assert (comparison.position, comparison.plain) == (5, None)
