"""A head learns a known grammar; resumed runs equal whole ones; replay equals generation."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from itertools import islice

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.head import HeadConfig
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.errors import UserError
from redrafter_mlx.rounds.round import View
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.training import features
from redrafter_mlx.training.gradients import Crew, Gradients
from redrafter_mlx.training.initial import initial_head
from redrafter_mlx.training.lockstep import Part, Role, play
from redrafter_mlx.training.loop import Progress, Trainer
from redrafter_mlx.training.loss import LOSSES, log_normaliser
from redrafter_mlx.training.objective import (
    Objective,
    candidates,
    tied_output,
    trained_output,
)
from redrafter_mlx.training.options import TrainingOptions
from redrafter_mlx.training.replay import BUDGETS, greedy_answers, replay
from redrafter_mlx.training.shards import shard_path, write_shard
from redrafter_mlx.training.windows import Shards
from support import generation, grammar_model, ids

STEPS = 4


@pytest.fixture(scope="module")
def grammar(tmp_path_factory):
    """(model, rule, directory with two shards of its texts)."""
    model, rule = grammar_model()
    target = adapt(model)
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
        conversations = play(target, scripts, rows=8, columns=128, key=mx.random.key(number))
        write_shard(shard_path(directory, number), conversations, {})
    return model, rule, directory


def untrained(model, shards: Shards, tied: bool, loss: str, steps: int = STEPS):
    target = adapt(model)
    config = HeadConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        exit_dim=target.hidden_size,
        num_blocks=1,
        rnn=True,
        draft_vocab_size=target.vocab_size,
        tied_output=tied,
        lookback_heads=2 if tied else 0,
        lookback_size=16,
    )
    d2t = mx.arange(target.vocab_size)
    batches = list(islice(shards.batches("init", 16, 8), 4))
    head = initial_head(
        config, target.embed, target.output_layer, d2t, batches, steps, mx.random.key(0)
    )
    rows = lambda head: head.lm_head[-1]
    output = (
        tied_output(target.output_layer) if tied else trained_output(d2t, target.vocab_size, rows)
    )
    learns = partial(features.recurrent, target.embed, View((0,), target.hidden_size), steps)
    past = slice(0, target.hidden_size) if tied else None
    return head, Objective(LOSSES[loss], steps, 0.8, learns, output, past)


def gradients_of(model, directory, options: TrainingOptions, tied=True) -> Gradients:
    shards = Shards([shard_path(directory, 1)])
    head, objective = untrained(model, shards, tied, options.loss)
    return Gradients(head, objective, shards, np.arange(adapt(model).vocab_size), options, 0)


def in_another_process(directory, options: TrainingOptions) -> Gradients:
    return gradients_of(grammar_model()[0], directory, options)


def trainer(grammar, options: TrainingOptions, tied=True) -> Trainer:
    model, _, directory = grammar
    gradients = gradients_of(model, directory, options, tied)
    adapt(model).tap((), whole_text=True)
    return Trainer(gradients, options, Progress(options.steps))


def alone(trainer: Trainer) -> Crew:
    """This process computes all gradients."""
    return Crew(trainer._gradients, None, 1, trainer._options.accumulate)


OPTIONS = TrainingOptions(steps=60, windows=8, candidates=64, learning_rate=3e-3, ahead=STEPS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_head_learns_a_known_grammar(grammar, tied, loss):
    model, _, directory = grammar
    run = trainer(grammar, replace(OPTIONS, loss=loss), tied)
    run.run(alone(run))
    target = adapt(model)
    output = target.output_layer if tied else None
    drafter = RecurrentDrafter(run.head, mx.arange(target.vocab_size), target.embed, output)
    answers = list(islice(greedy_answers([shard_path(directory, 0)]), 10))
    found = replay(drafter, answers, width=2, length=STEPS + 1)
    assert found.tokens_per_round[16] >= 0.95 * (STEPS + 1) * 30 / 32  # 30 tokens: 6 full rounds


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("stopped_at", [1, 7])
def test_a_resumed_run_ends_with_the_same_weights(grammar, stopped_at, tmp_path):
    options = replace(OPTIONS, steps=12, accumulate=2)
    whole = trainer(grammar, options)
    whole.run(alone(whole))
    first = trainer(grammar, options)
    first.run(alone(first), lambda progress: progress.step == stopped_at)
    first.save(tmp_path / "checkpoint.safetensors", {"seed": 0})
    second = trainer(grammar, options)
    second.restore(tmp_path / "checkpoint.safetensors", {"seed": 0})
    assert second.progress.step == stopped_at
    second.run(alone(second))
    assert second.progress.loss == whole.progress.loss
    for (name, a), (_, b) in zip(
        tree_flatten(whole.head.parameters()), tree_flatten(second.head.parameters()), strict=True
    ):
        assert (np.array(a) == np.array(b)).all(), name


@pytest.mark.usefixtures("compiled")
def test_the_weights_do_not_depend_on_how_many_processes_compute_them(grammar):
    options = replace(OPTIONS, steps=6, accumulate=3)
    one, two = trainer(grammar, options), trainer(grammar, options)
    one.run(alone(one))
    make = partial(in_another_process, grammar[2], options)
    with Crew(two._gradients, make, 2, options.accumulate) as crew:
        two.run(crew)
    for (name, a), (_, b) in zip(
        tree_flatten(one.head.parameters()), tree_flatten(two.head.parameters()), strict=True
    ):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-5), name
    assert two.progress.loss == pytest.approx(one.progress.loss, rel=1e-4)


def test_a_process_that_ends_is_told(grammar):
    options = replace(OPTIONS, steps=6, accumulate=2)
    run = trainer(grammar, options)
    with (
        Crew(run._gradients, partial(os._exit, 3), 2, options.accumulate) as crew,
        pytest.raises(RuntimeError, match="ended with exit code 3"),
    ):
        run.run(crew)


def test_other_settings_do_not_resume(grammar, tmp_path):
    run = trainer(grammar, OPTIONS)
    run.save(tmp_path / "checkpoint.safetensors", {"seed": 0, "loss": "kl"})
    with pytest.raises(UserError, match="other settings: loss was kl, is hard; give the same"):
        run.restore(tmp_path / "checkpoint.safetensors", {"seed": 0, "loss": "hard"})


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_checkpoint_is_one_line(grammar, tmp_path, damage):
    run = trainer(grammar, OPTIONS)
    path = tmp_path / "checkpoint.safetensors"
    run.save(path, {})
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        trainer(grammar, OPTIONS).restore(path, {})


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("width", "length", "budget"), [(1, 5, 5), (2, 4, 4), (3, 5, 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_replay_counts_the_rounds_of_real_generation(grammar, width, length, budget, tied):
    """Half-trained, so that rounds of every length occur."""
    model, _, directory = grammar
    run = trainer(grammar, replace(OPTIONS, steps=12), tied)
    run.run(alone(run))
    target = adapt(model)
    output = target.output_layer if tied else None
    drafter = RecurrentDrafter(run.head, mx.arange(target.vocab_size), target.embed, output)
    answers = list(islice(greedy_answers([shard_path(directory, 0)]), 6))
    lengths = set()
    for answer in answers:
        found = replay(drafter, [answer], width, length)
        real = generation(
            model,
            answer.prompt.tolist(),
            drafter,
            max_tokens=len(answer.tokens),
            draft=DraftOptions(beam_width=width, beam_length=length, budget=budget),
        )
        assert ids(real) == answer.tokens.tolist()
        # Replay starts with the first token pending, generation with the prompt's last one.
        simulated = found.rounds[BUDGETS.index(budget)]
        assert abs(real.stats.rounds - simulated) <= 1
        lengths.add(real.stats.rounds)
    assert min(lengths) < 30


@pytest.mark.usefixtures("compiled")
def test_the_normaliser_has_the_value_and_gradient_of_logsumexp():
    draw = np.random.default_rng(0)
    logits = mx.array(draw.normal(size=(6, 50)).astype(np.float32) * 8)
    weights = mx.array(draw.normal(size=6).astype(np.float32))
    ours, theirs = (
        mx.compile(mx.value_and_grad(lambda x, f=f: (f(x) * weights).sum()))(logits)
        for f in (log_normaliser, lambda x: mx.logsumexp(x, axis=-1))
    )
    assert mx.allclose(ours[0], theirs[0], rtol=1e-5)
    assert mx.allclose(ours[1], theirs[1], atol=1e-6)


def test_what_follows_a_token_the_beams_lost_weighs_less():
    objective = Objective(LOSSES["kl"], 3, 1.0, None, None, None, lost=0.25)
    logits = mx.array(np.tile(-np.arange(8.0), (6, 1)))  # 3 steps of 2 rows; column 0 is likeliest
    columns = mx.array([0, 5, -1, 3, 0, 0])
    weights = objective._reached(logits, columns)
    assert weights.tolist() == [1, 1, 1, 0.25, 0.25, 0.25]


def test_the_columns_of_candidates_are_those_of_the_tokens_that_came(grammar):
    _, _, directory = grammar
    batch = next(Shards([shard_path(directory, 0)]).batches("x", 4, STEPS))
    chosen = candidates(batch, np.arange(97), 64, [0])
    columns, ids = np.array(chosen.columns), np.array(chosen.ids)
    came = batch.tokens[:, 1:]
    found = columns >= 0
    assert found.mean() > 0.5
    assert (ids[columns[found]] == came[found]).all()
