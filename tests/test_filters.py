"""Loops and near-duplicates: what is found, and what must not be."""

import numpy as np
import pytest

from redrafter_mlx.training import filters
from redrafter_mlx.training.filters import LOOP, PERIODS, Sieve, loop_end


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 49152, count).tolist()


@pytest.mark.parametrize("period", [1, 2, 7, 40, PERIODS])
def test_a_loop_is_cut_after_it_was_said_twice(period):
    start, loop = tokens(10), tokens(period, seed=1)
    said = start + loop * (LOOP + 3)
    assert loop_end(said) == 10 + 2 * period
    assert loop_end(said[: 10 + 2 * period]) is None
    assert loop_end(np.array(said, np.int32)) == 10 + 2 * period


def test_what_is_said_twice_or_shortly_repeated_is_no_loop():
    assert loop_end(tokens(300)) is None
    assert loop_end(tokens(50) * 2) is None
    assert loop_end([*tokens(30), *[7] * LOOP, *tokens(30, 1)]) is None
    assert loop_end([]) is None
    assert loop_end([1]) is None


def test_the_first_of_several_loops_counts():
    first, second = [1, 2, 3] * 20, [5] * 40
    assert loop_end(tokens(5) + first + tokens(5) + second) == 11


def test_questions_that_differ_are_admitted():
    sieve = Sieve()
    assert all(sieve.admits(tokens(20, seed)) for seed in range(500))


def test_near_duplicates_are_not():
    sieve, found = Sieve(), 0
    for seed in range(200):
        question = tokens(60, seed)
        assert sieve.admits(question)
        assert not sieve.admits(question)
        found += not sieve.admits([*question[:57], 1, 2, 3])
    assert found > 180  # 55 of 61 3-grams are shared: 0.99 each by the rule


def test_half_alike_is_not_alike():
    sieve = Sieve()
    kept = 0
    for seed in range(200):
        question = tokens(40, seed)
        sieve.admits(question)
        kept += sieve.admits(question[:20] + tokens(20, seed + 1000))
    assert kept > 180


@pytest.mark.parametrize("question", [[], [3], [3, 4]])
def test_short_questions_are_compared_whole(question):
    sieve = Sieve()
    assert sieve.admits([9, 9])
    assert sieve.admits(question)
    assert not sieve.admits(question)


def test_memory_does_not_depend_on_the_order(monkeypatch):
    monkeypatch.setattr(filters, "SLOTS", 64)  # full: slots are overwritten
    questions = [tokens(10, seed) for seed in range(200)]
    sieves = []
    for order in (questions, questions[::-1]):
        sieve = Sieve()
        for question in order:
            sieve.remember(question)
        sieves.append([sieve.admits(question) for question in questions])
    assert sieves[0] == sieves[1]
    assert len(set(sieves[0])) == 2
