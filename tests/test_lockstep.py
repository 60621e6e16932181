"""Rows played side by side, begun at different times, are what the target says to each alone."""

import mlx.core as mx
import numpy as np
import pytest

from families import build, names
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.lockstep import K, Part, Role, can_stagger, play
from support import generation, ids
from test_families import REFUSED

LENGTHS = ((3, 9), (5, 4), (2, 12), (7, 9), (4, 14), (6, 20))
ALIKE = [
    "llama",
    "llama:dynamic_rope",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "olmo2",
    "deepseek_v3",
    "ministral3",
    "gpt_oss",
]


def target(name="llama"):
    return Target(build(name))


def scripts(vocab=97, lengths=LENGTHS, **part):
    draw = np.random.default_rng(0)
    return [
        [
            Part(Role.USER, tuple(draw.integers(0, vocab, given).tolist())),
            Part(Role.ASSISTANT, limit=written, **part),
        ]
        for given, written in lengths
    ]


def alone(model, tokens):
    """Logits and hidden states of the target's own pass over one conversation."""
    caches = model.empty_caches()
    caches.begin(len(tokens))
    outcome = model.forward(mx.array(tokens)[None], caches)
    return np.array(outcome.logits[0]), np.array(outcome.hidden[0])


@pytest.mark.parametrize("name", ALIKE)
def test_every_row_is_as_it_would_be_alone(name):
    model = target(name)
    staggered = can_stagger(model)
    assert staggered == (name != "gemma2")  # whose attention takes no mask for each row
    played = play(model, iter(scripts()), 3, 40, mx.random.key(0), staggered=staggered)
    assert len(played) == (len(LENGTHS) if staggered else 3)
    for conversation in played:
        tokens, written = conversation.tokens, conversation.roles == Role.ASSISTANT
        logits, hidden = alone(model, tokens)
        near = 2e-3 * (np.abs(hidden) + hidden.std())  # they are kept in 16 bits
        assert (np.abs(hidden - np.array(conversation.hidden)) < near).all()
        follows = np.flatnonzero(written[1:])
        assert (logits[follows].argmax(-1) == tokens[follows + 1]).all()
        top = np.sort(logits[follows], axis=-1)[:, -K:]
        kept = np.sort(np.array(conversation.top_logits[mx.array(follows)]), axis=-1)
        assert np.allclose(kept, top - top[:, -1:], atol=2e-2)


def test_greedy_rows_write_what_plain_decoding_writes():
    model = target("qwen3")
    for conversation in play(model, iter(scripts()), 3, 40, mx.random.key(0)):
        given = int((conversation.roles == Role.USER).sum())
        prompt, text = conversation.tokens[:given].tolist(), conversation.tokens[given:].tolist()
        assert ids(generation(build("qwen3"), prompt, max_tokens=len(text))) == text


COUNT_FROM_THE_FIRST = {"gemma2", "afm7", "gpt_bigcode", "llama4", "recurrent_gemma"}
"""Their masks, positions or states are those of a text that began with the batch."""


@pytest.mark.parametrize("name", sorted(set(names()) - REFUSED.keys()))
def test_all_other_families_can_stagger(name):
    assert can_stagger(target(name)) == (name not in COUNT_FROM_THE_FIRST)


def test_positions_of_a_row_count_from_its_own_start(monkeypatch):
    """A wrong adapter: positions counted from the first column are noticed where they matter."""
    from redrafter_mlx.training import lockstep

    class Wrong(lockstep._Rows):
        def begin(self, count):
            super().begin(count)
            self.positions = self._column

    monkeypatch.setattr(lockstep, "_Rows", Wrong)
    assert not can_stagger(target("ministral3"))


def test_the_same_key_gives_the_same_conversations_and_another_gives_others():
    model = target()
    runs = [
        [
            c.tokens.tolist()
            for c in play(model, iter(scripts(temp=1.0)), 3, 24, mx.random.key(seed))
        ]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_given_tokens_are_taken_in_many_at_once_and_have_no_view():
    steps = []
    model = target()
    given = scripts(lengths=((9, 3), (7, 3)))
    played = play(model, iter(given), 2, 16, mx.random.key(0), lambda done, _: steps.append(done))
    assert steps[0] == 7
    for conversation in played:
        view = np.array(conversation.top_logits).any(-1)
        assert not view[:6].any()
        assert view[6:].all()


def test_columns_end_conversations_and_rows_without_a_script_stay_empty():
    (played,) = play(target(), iter(scripts(lengths=((4, 50),))), 5, 10, mx.random.key(0))
    assert len(played.tokens) == 10
    assert played.number == 0
    assert play(target(), iter([]), 2, 10, mx.random.key(0)) == []


def turn(stop):
    """A user's turn, an answer that `stop` ends, and a mark that follows it."""
    return [
        Part(Role.USER, (5, 6)),
        Part(Role.ASSISTANT, limit=8, stops=frozenset(stop)),
        Part(Role.TEMPLATE, (90, 91)),
        Part(Role.ASSISTANT, limit=2),
    ]


def test_the_templates_mark_stands_for_the_end_that_the_target_chose():
    said = play(target(), iter([turn([])]), 1, 12, mx.random.key(0))[0].tokens.tolist()
    assert len(said) == 10  # at the limit all ends
    for stop, role in (({said[4], 90}, Role.ASSISTANT), ({said[4]}, Role.TEMPLATE)):
        (played,) = play(target(), iter([turn(stop)]), 1, 12, mx.random.key(0))
        end = said.index(said[4])
        assert played.tokens.tolist()[: end + 2] == [*said[:end], 90, 91]
        assert played.roles[end] == role
        assert played.roles[end + 1] == Role.TEMPLATE


def test_a_part_that_goes_on_is_followed_by_the_next_and_ended_by_a_stop():
    warm = Part(Role.USER, limit=3, goes_on=True)
    script = [Part(Role.TEMPLATE, (1,)), warm, Part(Role.ASSISTANT, limit=4)]
    (played,) = play(target(), iter([script]), 1, 20, mx.random.key(0))
    assert played.roles.tolist() == [0, 1, 1, 1, 2, 2, 2, 2]
    stop = frozenset([int(played.tokens[1])])
    script[1] = Part(Role.USER, limit=3, goes_on=True, stops=stop)
    (played,) = play(target(), iter([script]), 1, 20, mx.random.key(0))
    assert played.roles.tolist() == [0, 1]


def test_an_answer_that_goes_round_in_circles_ends_early():
    model = target()
    model.model.lm_head.weight = mx.zeros_like(model.model.lm_head.weight)  # token 0 for ever
    (played,) = play(model, iter(scripts(lengths=((2, 200),))), 1, 250, mx.random.key(0))
    assert 20 < len(played.tokens) < 60


def test_taps_are_kept_beside_the_final_states():
    model = target()
    model.taps = (0, 1)
    (played,) = play(model, iter(scripts(lengths=((2, 4),))), 1, 6, mx.random.key(0))
    assert played.hidden.shape == (6, 3 * model.hidden_size)
