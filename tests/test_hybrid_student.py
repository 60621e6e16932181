"""The hybrid that benchmarks make of a target: what it keeps, what it learns, that it loads."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk
from mlx_lm.utils import load_model, save_config, save_model
from test_training_data import OWN, target, write

from benchmarks import hybrid_student as bench
from benchmarks import student
from redrafter_mlx.machine import device
from redrafter_mlx.training.shards import training_shards
from support import ScriptedDrafter, generation, ids, tiny_prompt

ALL = [0, 1]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write(directory, data_tokens=600, **OWN)
    found = student.pieces(training_shards([directory]))
    return [piece for piece in found if len(piece[0]) <= student.STEP]  # one length to compile for


@pytest.fixture
def every_second(monkeypatch):
    """Of two layers one is a gated delta rule."""
    monkeypatch.setattr(bench, "EVERY", 2)


def hybrid(teacher):
    made = bench.make_hybrid(teacher, ALL)
    assert [layer.is_linear for layer in made.layers] == [True, False]
    return made


@pytest.mark.parametrize("length", [1, 31, 32, 70])
def test_whole_texts_in_chunks_are_what_one_token_after_the_other_gives(length):
    draw = np.random.default_rng(length)
    some = lambda *shape: mx.array(draw.standard_normal(shape, np.float32))
    q, k, v, weights = (some(2, length, 3, 8) for _ in range(4))
    q, k = normalize_qk(q, mx.concatenate([k[:, :1]] * length, axis=1), inv_scale=8**-0.5, eps=1e-6)
    inputs = (q, k, v, some(2, length, 3), some(2, length, 3), some(3), some(3))

    def of(function):
        total = lambda *x: (function(*x, use_kernel=False)[0] * weights).sum()
        return mx.value_and_grad(total, argnums=range(len(inputs)))(*inputs)

    (value, gradients), (wanted, wanted_gradients) = map(
        of, (bench.gated_delta_update, gated_delta_update)
    )
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-4)
    for got, there in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(np.array(got), np.array(there), rtol=1e-3, atol=1e-4)


def test_only_a_llama_can_become_a_hybrid():
    with pytest.raises(ValueError, match="plain Llama"):
        bench.make_hybrid(target("gemma3_text").model, ALL)


def test_attentions_that_stay_are_the_teachers(every_second):
    teacher = target().model
    made, x = hybrid(teacher), mx.random.normal((2, 9, teacher.args.hidden_size))
    wanted = np.array(teacher.model.layers[1].self_attn(x, "causal"))
    got = np.array(made.layers[1].self_attn(x, "causal"))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_delta_rules_alone_learn_and_what_is_written_loads(every_second, texts, tmp_path):
    teacher = target().model
    made = hybrid(teacher)
    outside = lambda: {k: v for k, v in tree_flatten(made.parameters()) if "linear_attn" not in k}
    before = {k: np.array(v) for k, v in outside().items()}
    batch = next(student.batches(texts, 4, seed=1))
    asked = device.fused(partial(bench.lessons, teacher, ALL))
    first = student.Objective(bench.imitation, lambda tokens, *_: asked(tokens))
    done = lambda step: step / 40
    with bench.quick():
        for objective, share in ((first, 0.8), (student.Objective(), 1.0)):
            off = lambda objective=objective: objective.of(made, *objective.view(*batch)).item()
            at_first = off()
            student.train(made, texts, 4, 3e-3, done, objective)
            assert off() < share * at_first
    for name, value in outside().items():
        np.testing.assert_array_equal(np.array(value), before[name])
    save_model(tmp_path, made)
    save_config(bench.hybrid_config(teacher.args, 2), tmp_path / "config.json")
    loaded, prompt = load_model(tmp_path)[0], mx.array([tiny_prompt(9)])
    np.testing.assert_array_equal(np.array(loaded(prompt)), np.array(made(prompt)))


def test_drafts_change_no_text_of_it(every_second):
    made, prompt = hybrid(target().model), tiny_prompt(9)
    plain = ids(generation(made, prompt))
    drafter = ScriptedDrafter([*prompt, *plain], right=3, wrong=1, decoys=True)
    assert ids(generation(made, prompt, drafter)) == plain
