"""What reading a prompt takes: passes, rows, tokens that are encoded, states that are kept."""

from __future__ import annotations

from itertools import pairwise

import pytest

from families import build
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.engine.conversation import prompt_of
from redrafter_mlx.engine.prefixes import common_length
from redrafter_mlx.target.adapter import Target, adapt
from support import generation, ids, random_drafter, tiny_prompt


@pytest.mark.parametrize(
    ("family", "rows"), [("llama", [16, 16, 8]), ("gemma3_text", [16, 5, 11, 2, 6])]
)
def test_chunks_end_at_marks_only_where_a_cache_needs_it(family, rows):
    target = Target(build(family))
    read, caches = [], target.empty_caches()
    for done in target.prefill_by_chunks(tiny_prompt(41), 16, None, caches, marks=(21, 34)):
        read.append(done)
    assert [after - before for before, after in pairwise(read)] == rows


def lookback(model):
    return random_drafter(model, lookback_heads=2, lookback_size=8, tied_output=True)


@pytest.mark.parametrize("made", ["head", "union", "max_gram", "model", "none"])
def test_states_are_kept_for_drafters_that_read_them(made, monkeypatch):
    model = build("llama")
    head = lookback(model)  # for another one all of them would have to be kept
    drafter = {
        "head": head,
        "union": UnionDrafter([MaxGramDrafter(), head]),
        "max_gram": MaxGramDrafter(),
        "model": ModelDrafter(build("llama", seed=1), adapt(model).vocab_size),
        "none": None,
    }[made]
    trails, commit = [], Target.commit

    def watched(self, context, *how):
        trails.append(context.trail)
        return commit(self, context, *how)

    monkeypatch.setattr(Target, "commit", watched)
    ids(generation(model, tiny_prompt(20), drafter, max_tokens=12))
    assert trails
    assert all((trail is not None) == (made in ("head", "union")) for trail in trails)


def dialogue(*contents):
    roles = ["system", *(("user", "assistant") * len(contents))]
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("continued", [False, True])
def test_a_conversation_is_encoded_once(tokenizer, monkeypatch, continued):
    messages = dialogue("Be brief.", *["word " * 200, "answer " * 200] * 3)
    messages = messages if continued else messages[:-1]
    encode, read = tokenizer.encode, []

    def counted(text, **how):
        read.append(len(text))
        return encode(text, **how)

    monkeypatch.setattr(tokenizer._tokenizer, "encode", counted)
    prompt_of(tokenizer, messages, continue_last=continued)
    last = len(messages[-1]["content"]) if continued else 0
    assert sum(read) < max(read) + last + 200


@pytest.mark.parametrize("continued", [False, True])
def test_marks_are_where_other_prompts_part(tokenizer, continued):
    messages = dialogue("Be brief.", "one", "two", "three", "four")
    messages = messages if continued else messages[:-1]
    prompt = prompt_of(tokenizer, messages, continue_last=continued)
    shorter = messages[:-1] if continued else messages
    others = [
        tokenizer.apply_chat_template(some, tokenize=True, add_generation_prompt=False)
        for some in (shorter, dialogue("Be brief.", "?"))
    ]
    expected = sorted(common_length(prompt.tokens, other) for other in others)
    assert list(prompt.marks) == expected
    assert 0 < expected[0] < expected[1] < len(prompt.tokens)
