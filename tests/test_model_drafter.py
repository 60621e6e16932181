"""A draft model: its chain, its cache, and which models may draft for which."""

import logging

import mlx.core as mx
import numpy as np
import pytest

import families
from families import build
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.model import ModelDrafter, check_tokenizers, warn_if_larger
from redrafter_mlx.drafters.protocol import Written
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Context, Transcript
from redrafter_mlx.target.adapter import adapt
from support import generation, ids, tiny_prompt

V = 97


@pytest.fixture(scope="module", params=["llama", "llama:sliding", "deepseek_v2"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def other():
    return build("llama", seed=1)


def context_of(tokens, noise=None):
    transcript = tokens if isinstance(tokens, Transcript) else Transcript(tokens)
    tokens = transcript.tokens
    return Context(
        mx.array(tokens[-1:]), mx.zeros((1, 4)), len(tokens) - 1, transcript, None, noise
    )


@pytest.mark.parametrize("sampling", [{}, {"temp": 0.9, "seed": 3}])
@pytest.mark.parametrize("prompt", [9, 400])
def test_the_target_itself_is_always_right(model, sampling, prompt):
    """Also after rows behind a sliding window were dropped, and when the noise is known."""
    prompt = tiny_prompt(prompt)
    drafter = ModelDrafter(model, V)
    draft = DraftOptions(beam_width=2, beam_length=6, budget=0)
    run = generation(model, prompt, drafter, max_tokens=60, draft=draft, **sampling)
    assert ids(run) == ids(generation(model, prompt, max_tokens=60, **sampling))
    assert run.stats.rounds == 10
    assert drafter.passes == 10 * 5


def test_its_cache_holds_what_a_fresh_reading_of_the_text_holds(model, other):
    """After drafts of which most were taken back."""
    drafter = ModelDrafter(other, V)
    tokens = ids(generation(model, tiny_prompt(9), drafter, max_tokens=30))
    drafter.begin(context_of([*tiny_prompt(9), *tokens]))
    drafter.write([5, 6], 1)
    text = [*tiny_prompt(9), *tokens, 5, 6]
    assert drafter._held == text
    fresh = adapt(other).prefill([*text, 0], chunk=len(text)).caches.layers
    for mine, expected in zip(drafter._caches.layers, fresh, strict=True):
        for a, b in zip(mine.keys_and_values(), expected.keys_and_values(), strict=True):
            np.testing.assert_allclose(*device.read(a, b), atol=1e-4)


def test_its_tree_is_a_chain_with_the_next_likeliest_beside_each_token(other):
    drafter, prompt = ModelDrafter(other, V), tiny_prompt(9)
    tree = drafter.propose(context_of(prompt), FixedBudget(3, 4, 64))
    assert len(tree) == 1 + 3 * 3
    chain, text = [], list(prompt)
    for _ in range(3):
        expected = other(mx.array([text]))[0, -1]
        order = np.argsort(-device.read(expected)[0])[:3].tolist()
        node = 0
        for token in chain:
            node = tree.children[node][token]
        assert tree.children[node].keys() == set(order)
        logprobs = expected - mx.logsumexp(expected)
        for token in order:
            own = tree.logprobs[tree.children[node][token]] - tree.logprobs[node]
            assert own == pytest.approx(logprobs[token].item(), abs=1e-3)
        chain.append(order[0])
        text.append(order[0])
    assert all(len(tree.children[row]) in (0, 3) for row in range(len(tree)))


def test_a_text_that_begins_like_the_last_one_is_not_read_again(other, monkeypatch):
    drafter, prompt = ModelDrafter(other, V), tiny_prompt(50)
    read = []
    forward = drafter._target.forward
    monkeypatch.setattr(
        drafter._target,
        "forward",
        lambda ids, caches: read.append(ids.size) or forward(ids, caches),
    )
    drafter.propose(context_of(prompt), FixedBudget(1, 3, 3))
    assert sum(read) == 50 + 1
    read.clear()
    drafter.propose(context_of([*prompt[:40], 1, 2, 3]), FixedBudget(1, 3, 3))
    assert sum(read) == 3 + 1


def test_review(other):
    """What it would say itself passes, then one token of its own."""
    drafter, prompt = ModelDrafter(other, V), tiny_prompt(9)
    drafter.begin(context_of(prompt))
    own = drafter.write([], 5)
    assert own.shares == own.probs
    right, wrong = own.tokens[:2], (own.tokens[2] + 1) % V
    drafted = Written([*right, wrong, 4], [0.5] * 4, [1.0] * 4)
    reviewed = drafter.review([], drafted, lenience=1.0)
    assert reviewed.tokens == own.tokens[:3]
    np.testing.assert_allclose(reviewed.probs, own.probs[:3], atol=1e-4)
    lenient = drafter.review([], drafted, lenience=1e9)
    assert lenient.tokens[:4] == drafted.tokens
    assert len(lenient.tokens) == 5


@pytest.mark.parametrize(("factor", "passes"), [(0.98, False), (1.02, True)])
def test_lenience_is_the_papers_bound(other, factor, passes):
    """A token that the model would not say passes if q <= l * p."""
    drafter, prompt = ModelDrafter(other, V), tiny_prompt(9)
    drafter.begin(context_of(prompt))
    scores = other(mx.array([prompt]))[0, -1]
    probs = device.read(mx.softmax(scores))[0]
    second = int(np.argsort(-probs)[1])
    lenience = factor * 0.9 / probs[second]
    reviewed = drafter.review([], Written([second], [0.9], [0.9]), lenience)
    assert (reviewed.tokens[0] == second) == passes


def test_ids_that_the_target_does_not_know_are_never_proposed(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, "llama:more", {"vocab_size": 300})
        larger = build("llama:more", seed=2)
    prompt = tiny_prompt(9)
    drafter = ModelDrafter(larger, V)
    tree = drafter.propose(context_of(prompt), FixedBudget(16, 6, 64))
    assert tree.tokens.max() < V
    for sampling in ({}, {"temp": 1.0, "seed": 1}, {"temp": 1.0, "seed": 1, "rule": "rejection"}):
        run = generation(model, prompt, ModelDrafter(larger, V), max_tokens=10, **sampling)
        assert all(token < V for token in ids(run))


def test_a_model_that_cannot_branch_is_refused():
    with pytest.raises(UserError, match="cannot branch"):
        ModelDrafter(build("deepseek_v41"), V)


# ---------------------------------------------------------------------------------------------
# Which models may draft for which


class Tokenizer:
    def __init__(self, words, bos_token="<s>", eos_token="</s>"):
        self.words, self.bos_token, self.eos_token = words, bos_token, eos_token

    def get_vocab(self):
        return {word: id for id, word in enumerate(self.words)}


HERE = ["<s>", "</s>", "a", "b"]


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (Tokenizer(["<s>", "</s>", "a", "c"]), ["token 3 is 'c' there and 'b' here"]),
        (Tokenizer(["<s>", "</s>", "b", "a"]), ["token 2 is 'b' there and 'a' here"]),
        (Tokenizer(HERE[:3]), ["token 3 is None there and 'b' here"]),
        (Tokenizer([*HERE, "d"]), ["token 4 is 'd' there and None here"]),
        (Tokenizer(HERE, eos_token="b"), ["eos_token is 'b'", "the target's '</s>'"]),
        (Tokenizer(HERE, bos_token=None), ["bos_token is None", "the target's '<s>'"]),
    ],
    ids=range(6),
)
def test_the_first_difference_of_two_tokenizers_is_named(there, named):
    with pytest.raises(UserError) as caught:
        check_tokenizers(Tokenizer(HERE), there, "org/small")
    message = str(caught.value)
    assert message.startswith("org/small has another tokenizer than the target")
    assert all(name in message for name in named)
    assert "\n" not in message


def test_equal_tokenizers_pass():
    check_tokenizers(Tokenizer(HERE), Tokenizer(HERE), "org/small")


def test_a_draft_model_that_is_no_smaller_is_told(caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, "llama:deep", {"num_hidden_layers": 3})
        deep = build("llama:deep")
    with caplog.at_level(logging.WARNING, "redrafter_mlx"):
        warn_if_larger(deep, build("llama"), "org/small")
        assert not caplog.records
        warn_if_larger(build("llama"), deep, "org/large")
    (record,) = caplog.records
    assert "org/large is no smaller than the target" in record.getMessage()
