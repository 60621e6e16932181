"""The suffix automaton: what it finds, and that no text makes it slow or large."""

import random
import statistics
import sys
import time

import pytest

from redrafter_mlx.drafters.suffixes import SuffixAutomaton


def built(text):
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    return automaton


def found(automaton, ahead=()):
    return [(m.length, m.latest, m.first) for m in automaton.matches(ahead)]


def brute_force(text, ahead=()):
    """(length, latest, first) of every suffix with its own set of earlier places in `text`."""
    whole, matches, seen = [*text, *ahead], [], set()
    for length in range(len(whole), 0, -1):
        suffix = whole[len(whole) - length :]
        last = len(text) - 1 if ahead else len(text) - 2
        ends = tuple(
            end
            for end in range(length - 1, last + 1)
            if whole[end - length + 1 : end + 1] == suffix
        )
        if ends and ends not in seen:
            seen.add(ends)
            matches.append((length, ends[-1], ends[0]))
    return matches


@pytest.mark.parametrize("alphabet", [2, 3, 6])
def test_matches_equal_brute_force(alphabet):
    rng = random.Random(alphabet)
    for _ in range(20):
        text = []
        automaton = SuffixAutomaton()
        for _ in range(40):
            text.append(rng.randrange(alphabet))
            automaton.append(text[-1])
            assert found(automaton) == brute_force(text)[: SuffixAutomaton.STEPS]


@pytest.mark.parametrize("alphabet", [2, 4])
def test_matches_of_tokens_ahead_equal_brute_force(alphabet):
    rng = random.Random(alphabet)
    for _ in range(100):
        text = [rng.randrange(alphabet) for _ in range(25)]
        ahead = [rng.randrange(alphabet + 1) for _ in range(rng.randrange(1, 5))]
        assert found(built(text), ahead) == brute_force(text, ahead)[: SuffixAutomaton.STEPS]


def test_an_example():
    """After a b c a b, the end `a b` stood at 1; `b` ends nowhere else."""
    assert found(built("abcab")) == [(2, 1, 1)]
    assert found(built("abcab"), "c") == [(3, 2, 2)]
    assert found(built("abcab"), "x") == []
    assert found(SuffixAutomaton()) == []
    assert found(SuffixAutomaton(), "a") == []


def test_the_latest_and_the_first_place():
    assert found(built("xaxbxcx")) == [(1, 4, 0)]


def test_one_repeated_token():
    automaton = built([7] * 1000)
    assert found(automaton)[0] == (999, 998, 998)
    assert len(found(automaton)) == SuffixAutomaton.STEPS


def text_of(kind, n):
    rng = random.Random(0)
    return {
        "words": [int(rng.paretovariate(0.7)) % 49152 for _ in range(n)],
        "one token": [7] * n,
        "period": [i % 17 for i in range(n)],
    }[kind]


@pytest.mark.parametrize("kind", ["words", "one token", "period"])
def test_a_lookup_takes_as_long_in_a_long_text_as_in_a_short_one(kind):
    """100 and 100,000 tokens; the median of many, because other programs run too."""
    automatons = {n: built(text_of(kind, n)) for n in (1000, 100_000)}
    seconds = {n: [] for n in automatons}
    for _ in range(300):
        for n, automaton in automatons.items():
            began = time.process_time_ns()
            automaton.matches([3, 7])
            seconds[n].append(time.process_time_ns() - began)
    short, long = (statistics.median(times) for times in seconds.values())
    assert long < 5 * short + 20_000


def test_appending_takes_time_in_proportion_to_the_text():
    def seconds(n):
        text = text_of("one token", n)
        began = time.process_time()
        built(text)
        return time.process_time() - began

    assert min(seconds(40_000) for _ in range(3)) < 30 * min(seconds(4000) for _ in range(3))


@pytest.mark.parametrize("kind", ["words", "one token", "period"])
def test_memory_is_linear(kind):
    """At most two states for each token, as the theory has it, and about 0.5 kB of objects."""
    for n in (1000, 10_000):
        automaton = built(text_of(kind, n))
        assert len(automaton._next) <= 2 * n
        assert sum(map(len, automaton._next)) <= 3 * n
        assert sum(map(sys.getsizeof, automaton._next)) < 600 * n
