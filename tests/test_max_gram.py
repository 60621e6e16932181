"""Max-Gram: what it proposes, how sure it is, and what it remembers."""

import json
import math
import time

import mlx.core as mx
import pytest

from redrafter_mlx.drafters.max_gram import (
    BREAK,
    HitRates,
    MaxGramDrafter,
    Memory,
    count_bigrams,
)
from redrafter_mlx.drafters.protocol import candidates_of
from redrafter_mlx.errors import UserError
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.rounds.round import Context, Transcript

BUDGET = FixedBudget(4, 5, 16)
VOCABULARY = 100


def context_of(text) -> Context:
    transcript = text if isinstance(text, Transcript) else Transcript(text)
    tokens = transcript.tokens
    return Context(mx.array(tokens[-1:]), mx.zeros((1, 4)), len(tokens) - 1, transcript, None)


def proposal(drafter, text):
    """The paths it proposes after a text, each with its probability."""
    c = candidates_of(drafter, context_of(text), 4, 5)

    def path(i):
        return () if i < 0 else (*path(c.parents[i]), int(c.tokens[i]))

    assert c.root == context_of(text).transcript.tokens[-1]
    return {path(i): math.exp(c.logprobs[i]) for i in range(len(c.tokens))}


def longest(paths):
    return max(paths, key=len)


def test_it_goes_on_as_the_text_went_on_before():
    paths = proposal(MaxGramDrafter(length=3), [1, 2, 3, 4, 5, 9, 1, 2])
    assert longest(paths) == (3, 4, 5)
    assert set(paths) == {(3,), (3, 4), (3, 4, 5)}


def test_the_longest_match_comes_first_and_shorter_ones_stand_beside_it():
    text = [5, 1, 2, 7, 8, 6, 2, 9, 6, 5, 1, 2]
    paths = proposal(MaxGramDrafter(length=1), text)
    assert set(paths) == {(7,), (9,)}
    assert paths[7,] > paths[9,]
    assert sum(paths.values()) <= 1


def test_the_latest_place_comes_before_the_earliest():
    paths = proposal(MaxGramDrafter(length=1), [1, 2, 3, 7, 1, 2, 9, 8, 1, 2])
    assert set(paths) == {(3,), (9,)}
    assert max(paths, key=paths.get) == (9,)


def test_a_repeated_token_goes_on_for_as_long_as_is_asked():
    assert longest(proposal(MaxGramDrafter(length=6), [4] * 10)) == (4,) * 6
    assert longest(proposal(MaxGramDrafter(length=6), [1, 2] * 5)) == (1, 2, 1, 2, 1, 2)


def test_a_text_without_repetition_gives_the_empty_draft():
    tree = MaxGramDrafter().propose(context_of([1, 2, 3]), BUDGET)
    assert (len(tree), tree.tokens[0]) == (1, 3)
    assert len(MaxGramDrafter().propose(context_of([1]), FixedBudget(4, 5, 0))) == 1


def test_probabilities_fall_along_a_path_and_sum_to_one_at_most():
    drafter = MaxGramDrafter()
    paths = proposal(drafter, [1, 2, 3, 1, 2, 4, 1, 2, 5, 2, 6, 3, 1, 2])
    for path, p in paths.items():
        assert p <= paths.get(path[:-1], 1.0)
        children = [q for other, q in paths.items() if other[:-1] == path]
        assert sum(children) <= p + 1e-9
        assert p >= MaxGramDrafter.LEAST


def test_the_rates_are_learned_from_what_came_true():
    """7 is always followed by 8, after which nothing comes twice."""
    drafter, transcript = MaxGramDrafter(length=1), Transcript([7])
    for novelty in range(100, 160):
        transcript.extend([8, novelty], 7)
        paths = proposal(drafter, transcript)
    assert paths[8,] == drafter.rates(1) > 0.75 > HitRates.FIRST[0]
    assert drafter.rates(2) < 0.15 < HitRates.FIRST[1]
    assert drafter.rates(3) == HitRates.FIRST[2]


def test_rates_stay_between_never_and_always():
    rates = HitRates()
    for _ in range(1000):
        rates.count(3, True, first=True)
        rates.count(20, False, first=False)
    assert 0.98 < rates(3) < 1
    assert 0 < rates(20, first=False) < 0.02
    assert rates(4) == HitRates.FIRST[3]


def test_what_it_writes_after_other_drafters_tokens():
    drafter = MaxGramDrafter()
    drafter.begin(context_of([1, 2, 3, 4, 5, 6, 1]))
    assert drafter.write([], 3).tokens == [2, 3, 4]
    assert drafter.write([2, 3], 3).tokens == [4, 5, 6]
    assert drafter.write([9], 3).tokens == []
    written = drafter.write([3], 9)
    assert written.tokens == [4, 5, 6, 1, 3, 4, 5, 6, 1]
    assert written.shares == [1.0] * 9
    assert all(0 < p < 1 for p in written.probs)


def test_bigrams_are_guessed_where_the_text_gives_no_match():
    bigrams = count_bigrams([7, 8, 7, 8, 7, 9])
    assert bigrams[7] == (8, pytest.approx(0.5))
    drafter = MaxGramDrafter(length=3, bigrams=bigrams)
    assert longest(proposal(drafter, [1, 2, 7])) == (8, 7, 8)
    assert longest(proposal(drafter, [7, 1, 2, 7])) == (1, 2, 7)
    assert proposal(drafter, [1, 2, 3]) == {}
    drafter.begin(context_of([1, 2, 3]))
    assert drafter.write([7], 2).tokens == [8, 7]


def test_texts_in_turn_do_not_mix():
    drafter = MaxGramDrafter(length=2)
    one, two = Transcript([1, 2, 3, 1]), Transcript([1, 5, 6, 1])
    for _ in range(2):
        assert longest(proposal(drafter, one)) == (2, 3)
        assert longest(proposal(drafter, two)) == (5, 6)


# ---------------------------------------------------------------------------------------------
# Memory


def remembering(capacity=50, path=None):
    return MaxGramDrafter(length=3, memory=Memory(path, capacity, VOCABULARY))


def test_a_later_request_finds_what_an_earlier_one_said():
    drafter = remembering()
    drafter.propose(context_of([1, 2, 3, 4, 5]), BUDGET)
    drafter.reset()
    assert longest(proposal(drafter, [8, 9, 2, 3])) == (4, 5)
    forgetful = MaxGramDrafter(length=3)
    forgetful.propose(context_of([1, 2, 3, 4, 5]), BUDGET)
    forgetful.reset()
    assert proposal(forgetful, [8, 9, 2, 3]) == {}


def test_nothing_is_proposed_across_two_texts():
    drafter = remembering()
    for text in ([1, 2, 3], [4, 5, 6]):
        drafter.propose(context_of(text), BUDGET)
        drafter.reset()
    assert longest(proposal(drafter, [9, 2])) == (3,)
    assert all(BREAK not in path for path in proposal(drafter, [9, 2]))


def test_the_memory_is_bounded_and_forgets_the_oldest():
    drafter = remembering(capacity=20)
    for start in range(0, 90, 6):
        drafter.propose(context_of(range(start, start + 6)), BUDGET)
        drafter.reset()
        assert sum(map(len, drafter.memory.texts)) <= 20
        assert len(drafter._index) <= 2 * (20 + 20)
    assert proposal(drafter, [99, 1, 2]) == {}
    assert longest(proposal(drafter, [99, 79, 80])) == (81, 82, 83)


def test_of_a_text_that_is_too_long_the_end_is_kept():
    memory = Memory(None, 5, VOCABULARY)
    memory.add(list(range(12)))
    assert memory.texts == [[7, 8, 9, 10, 11]]


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "memory.json"
    drafter = MaxGramDrafter(length=3, memory=Memory.load(path, 50, VOCABULARY))
    drafter.propose(context_of([1, 2, 3, 4, 5]), BUDGET)
    drafter.save()
    assert [file.name for file in tmp_path.iterdir()] == ["memory.json"]
    again = MaxGramDrafter(length=3, memory=Memory.load(path, 50, VOCABULARY))
    assert again.memory.texts == [[1, 2, 3, 4, 5]]
    assert longest(proposal(again, [8, 2, 3])) == (4, 5)
    MaxGramDrafter().save()  # nothing to save


SAVED = {"format": "redrafter-mlx Max-Gram memory", "vocab_size": VOCABULARY, "texts": [[1, 2]]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        json.dumps(SAVED).encode()[:-5],
        json.dumps([1, 2]).encode(),
        json.dumps(SAVED | {"format": "other"}).encode(),
        json.dumps(SAVED | {"vocab_size": 5}).encode(),
        json.dumps(SAVED | {"texts": "abc"}).encode(),
        json.dumps(SAVED | {"texts": [[1, VOCABULARY]]}).encode(),
        json.dumps(SAVED | {"texts": [[1, -1]]}).encode(),
        json.dumps(SAVED | {"texts": [[True]]}).encode(),
        json.dumps(SAVED | {"texts": [1]}).encode(),
    ],
    ids=range(12),
)
def test_a_damaged_memory_is_refused_in_one_line_and_left_alone(tmp_path, content):
    path = tmp_path / "memory.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Memory.load(path, 50, VOCABULARY)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert path.read_bytes() == content


def test_a_memory_that_cannot_be_kept_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="no directory"):
        Memory.load(tmp_path / "none" / "memory.json", 50, VOCABULARY)
    with pytest.raises(UserError, match="cannot be read"):
        Memory.load(tmp_path, 50, VOCABULARY)


# ---------------------------------------------------------------------------------------------
# Cost


@pytest.mark.parametrize("prompt", ["one token", "numbers"])
def test_long_prompts(prompt):
    """100,000 tokens; then a round of 4 tokens costs no more than after 1,000."""
    text = {"one token": lambda n: [7] * n, "numbers": lambda n: [i * i % 997 for i in range(n)]}
    times = {}
    for n in (1000, 100_000):
        drafter, transcript = MaxGramDrafter(), Transcript(text[prompt](n))
        drafter.propose(context_of(transcript), BUDGET)
        seconds = []
        for i in range(50):
            transcript.extend([7, i % 5, 7], 7)
            at = context_of(transcript)
            began = time.process_time()
            drafter.propose(at, BUDGET)
            seconds.append(time.process_time() - began)
        times[n] = sorted(seconds)[25]
    assert times[100_000] < 5 * times[1000] + 1e-3
