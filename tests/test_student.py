"""The few-layer student that benchmarks compare with: what it keeps, what it learns."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_training_data import OWN, target, write

from benchmarks import student as bench
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.training.shards import training_shards
from support import generation, ids, tiny_prompt


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write(directory, data_tokens=600, **OWN)
    return bench.pieces(training_shards([directory]))


def test_it_begins_with_the_outer_layers():
    assert bench.layers_of(4, 30) == [0, 1, 28, 29]
    assert bench.layers_of(3, 30) == [0, 1, 29]
    assert bench.layers_of(1, 2) == [0]


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_a_student_as_large_as_its_teacher_is_refused(layers):
    with pytest.raises(ValueError, match=f"a student cannot have {layers} of 2 layers"):
        bench.make_student(target().model, layers)


def test_only_its_layers_learn_and_they_do(texts):
    teacher = target().model
    student = bench.make_student(teacher, 1)
    outside = lambda: {k: v for k, v in tree_flatten(student.parameters()) if ".layers." not in k}
    before = {k: np.array(v) for k, v in outside().items()}
    batch = next(bench.batches(texts, 4, seed=1))
    first = bench.loss(student, *batch).item()
    bench.train(student, texts, 4, 3e-3, done=lambda step: step / 60)
    assert bench.loss(student, *batch).item() < 0.97 * first
    for name, value in outside().items():
        np.testing.assert_array_equal(np.array(value), before[name])
    assert not {k for k, _ in tree_flatten(student.trainable_parameters()) if ".layers." not in k}


def test_the_loss_is_least_for_the_teacher_itself(texts):
    """Its own distribution, as far as the likeliest tokens tell: nothing comes below that."""
    teacher, batch = target().model, next(bench.batches(texts, 4, seed=1))
    other = target(seed=1).model
    assert bench.loss(teacher, *batch).item() < bench.loss(other, *batch).item()
    assert bench.agreement(teacher, texts) > 0.98 > bench.agreement(other, texts)


def test_it_drafts_and_changes_no_text(texts):
    teacher, prompt = target().model, tiny_prompt(9)
    student = bench.make_student(teacher, 1)
    mx.eval(student.parameters())
    plain = ids(generation(teacher, prompt))
    assert ids(generation(teacher, prompt, ModelDrafter(student, 97))) == plain
