"""Tokens per round of every kind of drafter, to the round, on a text that it knows by heart.

A drafter that is fed the wrong states, tokens or positions says the same text in more rounds, and
no test of texts sees it. So a random head is given an output layer that knows which token followed
each of its own states when it read the text at once. After each commit, of any length and from any
rows of a tree, its states have to be those again, or the rounds are more than were counted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from families import build
from published_heads import write_eagle3, write_medusa
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.cascade import CascadeDrafter
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.engine.prefixes import UNREAD
from redrafter_mlx.loading.drafters import load_drafter
from redrafter_mlx.rounds.round import Context, Trail, Transcript
from redrafter_mlx.target.adapter import adapt
from support import generation, grammar_model, ids, random_drafter, tiny_prompt
from test_heads_dflash import VARIANTS, drafter_for
from test_heads_mtp import drafter_of

V, TOKENS, LENGTH = 97, 48, 5
DRAFT = DraftOptions(beam_width=3, beam_length=LENGTH, budget=16)
HARD = frozenset({3, 4, 11, 14, 21, 22, 30, 33, 37, 41})
OTHERS = frozenset({3, 6, 13, 14, 19, 30, 36, 40, 45})


def second(place: int) -> bool:
    return place % 5 == 2


class ByHeart:
    """An output layer (R, h) -> (R, V): what followed a state of which the token's place is known.

    features  (M, h) states
    places    (M,) of the tokens after them, counted from the text's first on
    text      its tokens
    hard      places at which it is wrong. At `second` ones the right token is its second choice, so
              what is accepted does not lie in a tree's first rows
    """

    def __init__(self, features: mx.array, places, text, hard):
        scores = np.zeros((len(places), V), np.float32)
        for row, place in zip(scores, places, strict=True):
            right = text[place]
            if place in hard:
                row[right], row[(right + 1) % V] = -100, 100
            else:
                row[right], row[(right + 1) % V] = 100, 102 if second(place) else 0
        self._features, self._scores = features, mx.array(scores)
        self._near = 1e-6 * (features**2).sum(axis=-1)

    def __call__(self, states: mx.array) -> mx.array:
        flat = states.reshape(-1, states.shape[-1])
        apart = ((flat[:, None] - self._features) ** 2).sum(axis=-1)
        nearest = mx.argmin(apart, axis=-1)
        known = mx.min(apart, axis=-1) < self._near[nearest]
        return (self._scores[nearest] * known[:, None]).reshape(*states.shape[:-1], V)


def states_of(target, text) -> mx.array:
    """(T, C) captured at each token of a text that is read at once."""
    caches = target.empty_caches()
    caches.begin(len(text), certain=True)
    return target.forward(mx.array([text]), caches).hidden[0]


def learn(drafter, model, text, first: int, hard) -> None:
    """Let a head know what follows each position from the `first` on, and each draft from there."""
    begun, memory = drafter.replayed(text, states_of(adapt(model), text[:-1]), first)
    steps, state, features, places = drafter.steps(begun, memory), None, [], []
    for depth in range(int(min(LENGTH - 1, drafter.depths))):
        read = np.minimum(np.arange(first, len(text)) + depth, len(text) - 1)
        state = steps.advance(state, mx.array(text)[mx.array(read)])
        features.append(steps.outputs(state)[: len(text) - first - 1 - depth])
        places += range(first + 1 + depth, len(text))
    output = ByHeart(mx.concatenate(features), places, text, hard)
    drafter.project = lambda outputs, rows: output(outputs)


def right_of(place: int, hard, depths: float, ends=lambda place: False) -> int:
    """How many tokens from a place on a draft of so many has right; at `ends` it ends."""
    right = 0
    while right < depths and place + right not in hard:
        right += 1
        if ends(place + right - 1):
            break
    return right


def rounds_of(start: int, *members) -> int:
    """How many rounds TOKENS tokens take from a place on, if the best draft counts.

    members  of each drafter what `right_of` takes
    """
    place, rounds = start, 0
    while place < start + TOKENS:
        place += 1 + max(right_of(place, *member) for member in members)
        rounds += 1
    return rounds


@cache
def told(family: str):
    """A target, a prompt, and the whole text."""
    model, prompt = build(family), tiny_prompt(9)
    return model, prompt, prompt + ids(generation(model, prompt, max_tokens=TOKENS))


def after(prompt, places) -> frozenset:
    return frozenset(len(prompt) + place for place in places)


def check(model, prompt, text, drafter, expected: int) -> None:
    run = generation(model, prompt, drafter, max_tokens=TOKENS, draft=DRAFT)
    assert prompt + ids(run) == text
    assert run.stats.rounds == expected
    assert TOKENS / expected > 1.5, "so few that a fault could hardly lower it"


LOOKS = {"lookback_heads": 2, "lookback_size": 8, "fused_layers": (0, 1)}
KINDS = {
    "recurrent": lambda model, path: random_drafter(model),
    "recurrent, fused": lambda model, path: random_drafter(model, fused_layers=(0, 1)),
    "recurrent, lookback": lambda model, path: random_drafter(model, **LOOKS),
    "medusa": lambda model, path: load_drafter(str(write_medusa(path, adapt(model))), model),
    "eagle3": lambda model, path: load_drafter(str(write_eagle3(path, adapt(model))), model),
    **{name: lambda model, path, name=name: drafter_for(model, name) for name in VARIANTS},
}
CASES = [(kind, family) for family in ("llama", "qwen3_5") for kind in KINDS]
KINDS |= {
    f"mtp of {name}": lambda model, path, name=name: drafter_of(model, path, name)
    for name in ("qwen3_5", "deepseek_v3")
}
CASES += [("mtp of qwen3_5", "qwen3_5"), ("mtp of deepseek_v3", "deepseek_v3")]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_head(kind, family, tmp_path):
    model, prompt, text = told(family)
    drafter, hard = KINDS[kind](model, tmp_path / "head"), after(prompt, HARD)
    learn(drafter, model, text, len(prompt) - 1, hard)
    depths = min(drafter.depths, LENGTH - 1)
    check(model, prompt, text, drafter, rounds_of(len(prompt), (hard, depths)))


def context_of(text, states, start: int = 0) -> Context:
    """What a drafter is shown of a text of which the target has processed all but the last token.

    start  tokens at its beginning that were processed for another text
    """
    trail = Trail(start=start)
    trail.add(states[start:])
    pending, position = mx.array(text[-1:]), len(text) - 1
    return Context(pending, states[-1:], position, Transcript(text), None, None, trail)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_drafts_as_one_that_has_read_the_text_itself(kind, tmp_path):
    """It is shown the other text from `UNREAD` tokens before the place where they part."""
    model = build(kind.removeprefix("mtp of ") if kind.startswith("mtp") else "llama")
    target, same, parted = adapt(model), tiny_prompt(20), 14
    drafter = KINDS[kind](model, tmp_path / "head")
    other = same[:parted] + tiny_prompt(9, seed=1)
    assert same[parted] != other[parted]
    drafter.begin(context_of(same, states_of(target, same[:-1])))
    known = parted - UNREAD
    states = states_of(target, other[:-1])
    forked = drafter.fork(known + 1).begin(context_of(other, states, start=known))
    fresh = drafter.replayed(other, states, len(other) - 1)
    for a, b in zip(
        *(drafted(drafter, begun, other[-1:]) for begun in (forked, fresh)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def drafted(drafter, begun, pending) -> list[np.ndarray]:
    """What a head makes of the pending token and two more."""
    steps, state, found = drafter.steps(*begun), None, []
    for token in (*pending, 5, 6):
        state = steps.advance(state, mx.array([token]))
        found.append(np.array(steps.outputs(state)))
    return found


def test_a_union_is_as_good_as_the_better_of_its_members_at_each_place():
    model, prompt, text = told("llama")
    members = random_drafter(model, **LOOKS), drafter_for(model, "dflash")
    hards = after(prompt, HARD), after(prompt, OTHERS)
    for member, hard in zip(members, hards, strict=True):
        learn(member, model, text, len(prompt) - 1, hard)
    expected = rounds_of(len(prompt), *((hard, LENGTH - 1) for hard in hards))
    check(model, prompt, text, UnionDrafter(members), expected)


def draft_model(family: str, text, hard) -> ModelDrafter:
    """Another model than the target, which knows the text."""
    drafter = ModelDrafter(build(family, seed=1), V)
    forward = drafter._target.forward
    output = ByHeart(states_of(drafter._target, text[:-1]), range(1, len(text)), text, hard)

    def knowing(ids, caches):
        outcome = forward(ids, caches)
        return replace(outcome, logits=output(outcome.hidden))

    drafter._target.forward = knowing
    return drafter


@pytest.mark.parametrize("family", ["llama", "llama:sliding", "qwen3_5"])
def test_a_draft_model(family):
    """Its draft is a chain: it ends where the right token is its second choice."""
    model, prompt, text = told("llama")
    hard = after(prompt, HARD)
    drafter = draft_model(family, text, hard)
    expected = rounds_of(len(prompt), (hard, LENGTH - 1, second))
    check(model, prompt, text, drafter, expected)


def repeated():
    """A target that goes through its tokens in one order, told so with a few errors.

    Returns it, the prompt, the whole text, and the places at which Max-Gram has to be wrong: those
    of the errors, and those after them, because the token before them it has never seen.
    """
    model, rule = grammar_model()
    chain = [0]
    for _ in range(TOKENS):
        chain.append(int(rule[chain[-1]]))
    others = [token for token in range(V) if token not in chain]
    given = list(chain)
    for place in ERRORS:
        given[place] = others.pop()
    prompt = [*given, chain[0]]
    wrong = after(prompt, [place - 1 for place in ERRORS] + list(ERRORS))
    return model, prompt, prompt + chain[1:], wrong


ERRORS = (4, 9, 10, 21, 30, 38)


def test_max_gram():
    model, prompt, text, wrong = repeated()
    check(model, prompt, text, MaxGramDrafter(), rounds_of(len(prompt), (wrong, 15)))


def test_a_cascade_of_a_model_and_max_gram():
    """The model writes two tokens, and Max-Gram two after them."""
    model, prompt, text, wrong = repeated()
    hard = after(prompt, HARD)
    drafter = CascadeDrafter(
        [draft_model("llama", text, hard), MaxGramDrafter()], [[2, 2], [0, 0]], 1.0
    )
    place, rounds = len(prompt), 0
    while place < len(text):
        ends = right_of(place, hard | {p for p in range(len(text)) if second(p)}, 2)
        if ends == 2:
            ends += right_of(place + 2, wrong, 2)
        place, rounds = place + ends + 1, rounds + 1
    check(model, prompt, text, drafter, rounds)
