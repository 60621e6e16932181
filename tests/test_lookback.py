"""Attention from a draft to the text so far: by hand, as it grows, and in generation."""

import mlx.core as mx
import numpy as np
import pytest

from families import build
from redrafter_mlx.drafters.lookback import Lookback, Memory
from redrafter_mlx.drafters.text import TextMemory
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import Trail, Transcript
from redrafter_mlx.target.adapter import adapt
from support import BUDGET, generation, ids, random_drafter, tiny_prompt

HIDDEN, EXIT, HEADS, SIZE, PLACES = 4, 5, 2, 3, 7


@pytest.fixture
def lookback():
    mx.random.seed(0)
    made = Lookback(HIDDEN, EXIT, HEADS, SIZE)
    made.nothing = mx.array([0.3, -0.2])
    made.carry = mx.array([0.5, 0.25])
    return made


def texts(count):
    draw = np.random.default_rng(1)
    return (
        mx.array(draw.normal(size=(count, PLACES, HIDDEN)).astype(np.float32)) for _ in range(3)
    )


def test_two_steps_by_hand(lookback):
    """Rows of two texts, one position each, two beams at each; the second step carries on."""
    context, embedding, values = texts(2)
    memory = Memory(lookback.keys(context, embedding), values, mx.array([7, 4]))
    draw = np.random.default_rng(2)
    here = mx.array(draw.normal(size=(2, HIDDEN)).astype(np.float32))
    tokens, states = (
        [mx.array(draw.normal(size=(4, HIDDEN)).astype(np.float32)) for _ in range(2)]
        for _ in range(2)
    )
    asked, before = lookback.asked(here), None
    likeness = np.zeros((4, HEADS, PLACES))
    w = {name: np.array(layer.weight) for name, layer in lookback.children().items()}
    for token, state in zip(tokens, states, strict=True):
        before = lookback.likeness(asked, token, state, memory, before)
        heard = lookback(before, memory)
        for row in range(4):
            text = row // 2
            query = w["query_context"] @ np.array(here[text])
            query = query + w["query_token"] @ np.array(token[row])
            query = (query + w["query_state"] @ np.array(state[row])).reshape(HEADS, SIZE)
            mixed = []
            for head in range(HEADS):
                carried = np.concatenate([[0], likeness[row, head, :-1]])
                for place in range(PLACES):
                    key = w["key_context"] @ np.array(context[text, place])
                    key = (key + w["key_token"] @ np.array(embedding[text, place])).reshape(
                        HEADS, SIZE
                    )
                    likeness[row, head, place] = query[head] @ key[head] / np.sqrt(SIZE)
                likeness[row, head] += [0.5, 0.25][head] * carried
                seen = likeness[row, head, : [7, 4][text]]
                powers = np.exp([*seen, [0.3, -0.2][head]])
                shares = powers[:-1] / powers.sum()
                mixed.append(shares @ np.array(values[text, : len(seen)]))
            expected = w["out"] @ np.concatenate(mixed)
            np.testing.assert_allclose(np.array(heard[row]), expected, atol=1e-4)


def test_probabilities_and_their_gradient_are_those_of_a_softmax():
    draw = np.random.default_rng(0)
    x = mx.array(draw.normal(size=(3, 9)).astype(np.float32) * 5)
    weights = mx.array(draw.normal(size=(3, 9)).astype(np.float32))
    ours, theirs = (
        mx.value_and_grad(lambda x, f=f: (f(x) * weights).sum())(x)
        for f in (device.probabilities, lambda x: mx.softmax(x, axis=-1))
    )
    assert mx.allclose(ours[0], theirs[0], atol=1e-6)
    assert mx.allclose(ours[1], theirs[1], atol=1e-6)


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 3, 4]])
def test_a_memory_that_grew_is_the_one_made_at_once(pieces):
    """Also where its buffers had to grow."""
    drafter = random_drafter(build("llama"), lookback_heads=2, lookback_size=4)
    tokens = tiny_prompt(12)
    hidden = mx.random.normal((11, drafter.head.config.context_size))
    grown = TextMemory(drafter.head, drafter.embed, drafter.view)
    grown.ROOM = 4
    trail, transcript, done = Trail(), Transcript(tokens[:1]), 0
    for count in pieces:
        trail.add(hidden[done : done + count])
        transcript.extend(tokens[done + 1 : done + count], tokens[done + count])
        done += count
        keys, values, visible = grown.of(transcript, trail)
    assert visible.tolist() == [11]
    assert keys.shape[-1] == values.shape[1] == 16
    before = mx.concatenate([mx.zeros_like(hidden[:1]), hidden[:-1]])
    embedded = drafter.embed(mx.array(tokens))[None]
    expected = drafter.head.lookback.keys(before[None], embedded[:, :-1])
    assert mx.allclose(keys[..., :11], expected, atol=1e-5)
    assert mx.array_equal(values[:, :11], embedded[:, 1:])


def test_another_text_is_another_memory():
    drafter = random_drafter(build("llama"), lookback_heads=1, lookback_size=4)
    memory = TextMemory(drafter.head, drafter.embed, drafter.view)
    for length in (9, 3):
        trail = Trail()
        trail.add(mx.random.normal((length, drafter.head.config.context_size)))
        _, values, visible = memory.of(Transcript(tiny_prompt(length + 1, seed=length)), trail)
        assert visible.tolist() == [length]
    last = drafter.embed(mx.array(tiny_prompt(4, seed=3)))[1:]
    assert mx.array_equal(values[0, :3], last)


def test_a_head_that_looks_back_hears_the_whole_text():
    """What it says depends on a prompt's first token, which a head without lookback forgets."""
    model = build("llama")
    target = adapt(model)
    for heads in (0, 2):
        drafter = random_drafter(model, lookback_heads=heads)
        drafts = []
        for first in (3, 4):
            context = target.prefill([first, *tiny_prompt(9)], 512)
            steps = drafter.head.steps(mx.ones_like(context.hidden))
            if heads:
                memory = drafter._memory.of(context.transcript, context.trail)
                steps = drafter.head.steps(mx.ones_like(context.hidden), Memory(*memory))
            state = steps.advance(None, drafter.embed(context.pending))
            drafts.append(np.array(steps.logits(state)))
        assert np.allclose(*drafts) == (heads == 0)


def test_plain_rounds_leave_their_trail_too():
    """The memory of a text that was partly decoded without drafts is that of all its tokens."""
    model = build("llama")
    drafter = random_drafter(model, lookback_heads=1)
    run = generation(model, tiny_prompt(5), drafter, max_tokens=40)
    text = tiny_prompt(5) + ids(run)
    memory = drafter._memory
    values = np.array(memory._values[0, : memory._places])
    expected = np.array(drafter.embed(mx.array(text[1 : memory._places + 1])))
    assert memory._places > 20
    np.testing.assert_array_equal(values, expected)


def test_heads_that_look_back_at_different_layers_share_a_model():
    """Each reads its own columns of what is captured, and drafts as it does alone."""
    shapes = {"lookback_heads": 1}, {"lookback_heads": 1, "fused_layers": (1, 0)}
    prompt = tiny_prompt(9)
    alone, together = [], []
    for shape in shapes:
        model = build("llama")
        alone.append(random_drafter(model, **shape))
        alone[-1].context = adapt(model).prefill(prompt, 512)
    model = build("llama")
    together = [random_drafter(model, **shape) for shape in shapes]
    context = adapt(model).prefill(prompt, 512)
    for one, other in zip(alone, together, strict=True):
        assert one.propose(one.context, BUDGET).tokens.tolist() == (
            other.propose(context, BUDGET).tokens.tolist()
        )
        for array, same in zip(one.begin(one.context)[1], other.begin(context)[1], strict=True):
            assert mx.array_equal(array, same)


def test_a_trail_keeps_what_a_reader_has_not_read():
    trail, one, other = Trail(readers=2), object(), object()
    for start in (0, 3):
        trail.add(mx.arange(start, start + 3)[:, None])
    assert trail.since(0, one).shape == (6, 1)
    assert trail.since(2, other)[:, 0].tolist() == [2, 3, 4, 5]
    assert not trail._pieces
    trail.add(mx.array([[6]]))
    assert trail.since(6, one).tolist() == trail.since(6, other).tolist() == [[6]]
    assert trail.since(7, one) is None


def test_sixteen_bits_stay_sixteen_bits():
    model = build("llama", dtype=mx.bfloat16)
    drafter = random_drafter(model, lookback_heads=2)
    drafter.head.set_dtype(mx.bfloat16)
    assert len(ids(generation(model, tiny_prompt(5), drafter))) == 40
    assert {drafter._memory._keys.dtype, drafter._memory._values.dtype} == {mx.bfloat16}
