"""Every kind of head is taught what it does when it drafts, learns, and is kept as published."""

from __future__ import annotations

import json
from copy import copy
from itertools import islice

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from families import build
from redrafter_mlx.drafters import eagle3
from redrafter_mlx.drafters.kinds import recognised
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.drafters.tensors import read_json, tensor_names
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import drafters
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.training.gradients import Crew
from redrafter_mlx.training.initial import output_rows
from redrafter_mlx.training.lockstep import Part, Role, play
from redrafter_mlx.training.loop import Progress, Trainer
from redrafter_mlx.training.options import HeadOptions, TrainingOptions
from redrafter_mlx.training.recipes import RECIPES, recipe_for
from redrafter_mlx.training.replay import greedy_answers, replay
from redrafter_mlx.training.run import gradients_of
from redrafter_mlx.training.shards import shard_path, write_shard
from redrafter_mlx.training.windows import Shards
from support import BUDGET, generation, grammar_model, ids, tiny_prompt

STEPS = 4
KINDS = [
    HeadOptions(fused_layers=(0, 1), lookback_heads=0),
    HeadOptions(no_rnn=True),
    HeadOptions(head="medusa", blocks=1),
    HeadOptions(head="eagle3"),
    HeadOptions(head="eagle3", output_layer="trained"),
    HeadOptions(head="dflash", layers=1),
]
name_of = lambda options: "-".join(
    str(v) for k, v in vars(options).items() if v != getattr(HeadOptions(), k)
)


def random_head(recipe, draft_vocab: int, seed: int = 0):
    head = recipe.empty(recipe.config(draft_vocab, STEPS))
    keys = iter(mx.random.split(mx.random.key(seed), 200))
    head.update_modules({})
    weights = [
        (name, 0.5 * mx.random.normal(x.shape, key=next(keys)) + ("norm" in name))
        for name, x in tree_flatten(head.parameters())
    ]
    head.load_weights(weights)
    return head


@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_it_is_taught_what_it_does(options):
    """Features of a batch are what the drafter's own steps give, on tokens that came true."""
    target = adapt(build("llama"))
    recipe = recipe_for(target, options)
    vocab = target.vocab_size
    head = random_head(recipe, vocab)
    head.lookback = None if "lookback" not in head else head.lookback
    text = np.array(tiny_prompt(14))
    context = target.empty_caches()
    context.begin(13, certain=True)
    hidden = target.forward(mx.array(text)[None, :-1], context).hidden
    L = 13 - STEPS
    past = ()
    if recipe.past(head) is not None:
        before = mx.concatenate([mx.zeros_like(hidden[:, :1]), hidden[:, :-1]], axis=1)
        past = before[..., recipe.past(head)], mx.array(text)[None], 1 + mx.arange(L)[None]
    found = recipe.features(STEPS)(head, hidden[:, :L], mx.array(text)[None, 1:], *past)
    drafter = recipe.drafter(head, mx.arange(vocab, dtype=mx.int32))
    begun, memory = drafter.replayed(text.tolist(), hidden[0], 1)
    here = [*memory[:-1], *(seen[:L] for seen in memory[-1:])]
    steps, state = drafter.steps(begun[:L], here), None
    for step, features in enumerate(mx.split(found, STEPS)):
        state = steps.advance(state, mx.array(text[1 + step : 1 + step + L]))
        own = steps.outputs(state)
        if options.output_layer == "trained":
            features = head.lm_head(features)
        np.testing.assert_allclose(features, own, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def grammar(tmp_path_factory):
    """(model, directory with two shards of its texts, all layers captured)."""
    model, _ = grammar_model()
    target = adapt(model)
    target.tap((0, 1))
    directory = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for number in range(2):
        scripts = (
            [
                Part(Role.TEMPLATE, tuple(draw.integers(0, target.vocab_size, 2).tolist())),
                Part(Role.ASSISTANT, limit=30),
            ]
            for _ in range(1000)
        )
        played = play(target, scripts, rows=8, columns=128, key=mx.random.key(number))
        write_shard(shard_path(directory, number), played, {})
    return model, directory


@pytest.mark.parametrize("options", KINDS[2:], ids=name_of)
def test_it_learns_a_known_grammar_and_is_kept(options, grammar, tmp_path):
    """And what is written drafts as what was trained, read as any published head is."""
    model, directory = grammar
    target = adapt(model)
    recipe = recipe_for(target, options)
    shards = Shards([shard_path(directory, 1)], recipe.whole)
    steps = 100 if options.head == "medusa" else 60
    training = TrainingOptions(
        steps=steps, windows=8, candidates=64, learning_rate=3e-3, ahead=STEPS, accumulate=1
    )
    recipe.prepare(shards)
    d2t = mx.arange(target.vocab_size, dtype=mx.int32)
    head = recipe.new(recipe.config(target.vocab_size, STEPS), d2t, shards, STEPS, mx.random.key(0))
    answers = list(islice(greedy_answers([shard_path(directory, 0)]), 10))
    rate = lambda drafter: replay(drafter, answers, width=2, length=5).tokens_per_round[16]
    before = rate(recipe.drafter(head, d2t))
    gradients = gradients_of(recipe, head, d2t, shards, training, 0)
    Trainer(gradients, training, Progress(steps)).run(Crew(gradients, None, 1, 1))
    drafter = recipe.drafter(head, d2t)
    found = rate(drafter)
    assert found > 1.5 * before
    recipe.save(tmp_path, head, d2t, mx.float32)
    kind = recognised(read_json(tmp_path / "config.json"), tensor_names(tmp_path))
    assert kind.name == options.head
    read, draft_ids = load_published(kind, tmp_path, mx.float32)
    assert draft_ids.tolist() == d2t.tolist()
    assert sum(x.size for _, x in tree_flatten(read.parameters())) >= sum(
        x.size for _, x in tree_flatten(head.parameters())
    )
    again = drafters.load_drafter(str(tmp_path), model)
    drafts = [
        each.propose(target.prefill(tiny_prompt(9), 512), BUDGET).tokens.tolist()
        for each in (drafter, again)
    ]
    assert drafts[0] == drafts[1]
    plain = ids(generation(model, tiny_prompt(9)))
    assert ids(generation(model, tiny_prompt(9), again)) == plain


def test_an_eagle3_head_is_written_as_others_read_it(tmp_path):
    """Ascending draft ids, rows of its own in their order, and layers that count from 0."""
    target = adapt(build("llama", num_hidden_layers=4))
    recipe = recipe_for(target, HeadOptions(head="eagle3", fused_layers=(2, 1, 2)))
    chosen = mx.array([40, 3, 77, 5], dtype=mx.int32)
    head = random_head(recipe, 4)
    recipe.save(tmp_path, head, chosen, mx.float16)
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    assert (tensors["d2t"] + mx.arange(4)).tolist() == [3, 5, 40, 77]
    assert np.flatnonzero(np.array(tensors["t2d"])).tolist() == [3, 5, 40, 77]
    rows = target.output_layer(mx.array([3, 5, 40, 77])).weight
    np.testing.assert_allclose(tensors["lm_head.weight"], rows, atol=1e-3)
    assert tensors["fc.weight"].dtype == mx.float16
    assert "midlayer.hidden_norm.weight" in tensors
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["draft_vocab_size"] == 4
    assert settings["eagle_aux_hidden_state_layer_ids"] == [2, 3]
    again, _ = load_published(eagle3.KIND, tmp_path, mx.float32)
    assert again.config.reads == (1, 2)
    with pytest.raises(UserError, match="--fused-layers 0"):
        recipe_for(target, HeadOptions(head="eagle3", fused_layers=(0, 2))).config(4, STEPS)


@pytest.mark.parametrize("quantised", [False, True])
def test_rows_of_the_targets_output_layer_come_without_its_bias(quantised):
    layer = nn.Linear(32, 8)
    if quantised:
        layer = nn.QuantizedLinear.from_linear(layer, group_size=32)
    rows = output_rows(lambda ids: copy(layer), mx.arange(8), 32)
    x = mx.random.normal((3, 32), key=mx.random.key(0))
    np.testing.assert_allclose(x @ rows.T + layer.bias, layer(x), atol=1e-5)


def test_recipes_are_all_that_the_flag_offers():
    choices = {f.name: f for f in HeadOptions.__dataclass_fields__.values()}["head"]
    assert set(choices.metadata["flag"]["choices"]) == set(RECIPES)
