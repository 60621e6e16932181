"""A model distilled from the target: a draft model to compare with, or a hybrid to draft for.

    python -m benchmarks.student --output student --layers 4 --data-minutes 10 --minutes 15
    python -m benchmarks.speed --draft-model student --drafters "model:student" auto
    python -m benchmarks.student --output hybrid --hybrid --data-minutes 10 --minutes 45
    python -m benchmarks.speed --model hybrid --drafters max_gram

The target writes conversations as for training a head. The student keeps the target's embeddings,
head and first and last layers; the layers are trained to give the target's distribution after each
token that it wrote. A hybrid keeps all layers, with gated delta rules for most attentions, see
`benchmarks.hybrid_student`. The result is a model directory that mlx-lm loads.

Shape letters: B rows, T tokens of a row, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import save_config, save_model

import redrafter_mlx
from redrafter_mlx.machine import blas, device
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.training.data import write_data
from redrafter_mlx.training.estimate import choose_jobs
from redrafter_mlx.training.jobs import side_by_side
from redrafter_mlx.training.lockstep import Role
from redrafter_mlx.training.loss import log_normaliser
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.shards import (
    held_out_shards,
    map_shard,
    part_path,
    parts,
    training_shards,
)

from .hybrid_student import hybrid_config, imitation, lessons, make_hybrid, quick

COLUMNS = 256
"""T: longer conversations are cut into pieces of this length."""
STEP = 64
"""Pieces are padded to multiples of this length."""
EVERY = 25
"""Steps between two lines of progress."""
WARM_UP = 50
"""Steps during which the learning rate rises."""
IMITATION = 0.35
"""Share of the time in which a hybrid's new layers learn what the attentions in their place do."""

Rows = tuple[np.ndarray, ...]
"""tokens (B, T), top_ids (B, T, K), top_probs (B, T, K), weights (B, T)."""


class Made(NamedTuple):
    """A student: the model, its configuration, and what it learns before the target's tokens."""

    student: nn.Module
    config: dict[str, Any]
    first: Objective | None


def layers_of(count: int, total: int) -> list[int]:
    """Which layers a student of `count` layers begins with: as many first ones as last ones."""
    first = (count + 1) // 2
    return [*range(first), *range(total - (count - first), total)]


def of_fewer_layers(config: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The configuration of a model of the chosen layers; lists with an entry per layer are cut."""
    total = config["num_hidden_layers"]
    cut = lambda v: [v[i] for i in chosen] if isinstance(v, list) and len(v) == total else v
    return {k: cut(v) for k, v in config.items()} | {"num_hidden_layers": len(chosen)}


def make_student(model: nn.Module, layers: int) -> nn.Module:
    """A model of some of the target's layers, which alone are to be trained.

    Raises ValueError for a model that is not built of `model.layers`, or has too few.
    """
    chosen = layers_of(layers, len(model.layers))
    if not 0 < layers < len(model.layers) or len(set(chosen)) != layers:
        raise ValueError(f"a student cannot have {layers} of {len(model.layers)} layers")
    student = type(model)(type(model.args)(**of_fewer_layers(vars(model.args), chosen)))
    for name, part in model.model.items():
        if name != "layers" and isinstance(part, nn.Module):
            student.model[name].update(part.parameters())
    if "lm_head" in model:
        student.lm_head.update(model.lm_head.parameters())
    for own, i in zip(student.model.layers, chosen, strict=True):
        own.update(model.model.layers[i].parameters())
    student.freeze()
    for layer in student.model.layers:
        layer.unfreeze()
    return student


def pieces(paths: list[Path]) -> list[Rows]:
    """Conversations in pieces of at most COLUMNS tokens."""
    found = []
    for file in map(map_shard, paths):
        starts = [*file["starts"].tolist(), len(file["tokens"])]
        for begin, end in pairwise(starts):
            for first in range(begin, end - 8, COLUMNS):
                found.append(_piece(file, first, min(first + COLUMNS, end - 1)))
    return found


def _piece(file: dict[str, np.ndarray], first: int, last: int) -> Rows:
    part = lambda name: np.asarray(file[name][first:last])
    logits = part("top_logits").astype(np.float32)
    probs = np.exp(logits)
    probs /= probs.sum(axis=-1, keepdims=True)
    is_seen = (logits != 0).any(axis=-1)
    is_written = np.asarray(file["roles"][first + 1 : last + 1]) != Role.TEMPLATE
    weights = (is_seen & is_written).astype(np.float32)
    return part("tokens"), part("top_ids"), probs, weights


def batches(found: list[Rows], rows: int, seed: int) -> Iterator[list[mx.array]]:
    """Endless batches, shuffled anew in each epoch; padded with zeros to one of few lengths.

    rows  of COLUMNS tokens; a batch has proportionally more of shorter pieces
    """
    shuffle, alike = np.random.default_rng(seed), defaultdict(list)
    for piece in found:
        alike[-(-len(piece[0]) // STEP) * STEP].append(piece)
    while True:
        cut = []
        for columns, some in alike.items():
            order, count = shuffle.permutation(len(some)), max(1, rows * COLUMNS // columns)
            starts = range(0, len(order), count)
            cut += [(columns, [some[i] for i in order[at : at + count]]) for at in starts]
        for i in shuffle.permutation(len(cut)):
            columns, some = cut[i]
            pad = lambda x, to=columns: np.pad(x, [(0, to - len(x)), *[(0, 0)] * (x.ndim - 1)])
            yield [mx.array(np.stack(list(map(pad, part)))) for part in zip(*some, strict=True)]


def loss(student: nn.Module, tokens, top_ids, probs, weights) -> mx.array:
    """Cross-entropy to the target's distributions over its likeliest tokens."""
    logits = student(tokens).astype(mx.float32)
    rows = logits.reshape(-1, logits.shape[-1])
    normaliser = log_normaliser(rows).reshape(weights.shape)
    agreed = (probs * mx.take_along_axis(logits, top_ids, axis=-1)).sum(axis=-1)
    return (weights * (normaliser - agreed)).sum() / weights.sum()


def agreement(student: nn.Module, found: list[Rows]) -> float:
    """How often the student's choice is the target's, where the target writes."""
    same = total = 0.0
    for tokens, top_ids, probs, weights in found:
        chosen = np.array(mx.argmax(student(mx.array(tokens[None]))[0], axis=-1))
        best = np.take_along_axis(top_ids, probs.argmax(axis=-1)[:, None], axis=-1)[:, 0]
        same, total = same + float(weights @ (chosen == best)), total + float(weights.sum())
    return same / total


@dataclass(frozen=True)
class Objective:
    """What training minimises.

    view  batch -> what `of` needs of it, such as the target's outputs; without a gradient
    of    (student, *view) -> ()
    """

    of: Callable[..., mx.array] = loss
    view: Callable[..., tuple[mx.array, ...]] = lambda *batch: batch


def train(
    student: nn.Module,
    found: list[Rows],
    rows: int,
    rate: float,
    done: Callable[[int], float],
    objective: Objective = Objective(),
) -> None:
    """Train until done(steps so far) reaches 1; the learning rate falls as it grows."""
    optimizer = optim.AdamW(learning_rate=rate, weight_decay=0.01)
    gradients_of = Gradients(student, objective)
    sofar = []
    for step, batch in enumerate(batches(found, rows, seed=0)):
        share = done(step)
        if share >= 1:
            return
        warm = min(1.0, (step + 1) / WARM_UP)
        optimizer.learning_rate = rate * warm * (0.05 + 0.95 * (1 + np.cos(np.pi * share)) / 2)
        value, gradients = gradients_of(batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(student, gradients)
        mx.eval(student.parameters(), optimizer.state, value)
        sofar.append(value.item())
        if len(sofar) == EVERY:
            print(f"step {step + 1}: loss {np.mean(sofar):.3f}, {share:.0%}", file=sys.stderr)
            sofar.clear()


class Gradients:
    """Losses and gradients of batches; on a CPU each core computes those of some rows.

    There MLX runs all of a stream but matrix products in one thread.
    """

    def __init__(self, student: nn.Module, objective: Objective):
        self._student, self._objective = student, objective
        cores = (os.cpu_count() or 1) if mx.default_device() == mx.cpu else 1
        self._streams = [mx.new_stream(mx.default_device()) for _ in range(cores)]
        self._compiled = device.fused(mx.value_and_grad(self._loss))

    def __call__(self, batch: list[mx.array]) -> tuple[mx.array, Any]:
        """Loss () and gradients of a batch: means over cores."""
        parameters, found = self._student.trainable_parameters(), []
        share = -(-len(batch[0]) // len(self._streams))
        with blas.threads(max(1, (os.cpu_count() or 1) // len(self._streams))):
            for stream, first in zip(self._streams, range(0, len(batch[0]), share), strict=False):
                with mx.stream(stream):
                    view = self._objective.view(*(x[first : first + share] for x in batch))
                    found.append(self._compiled(parameters, *view))
                    mx.async_eval(found[-1])
            mx.eval(found)
        self._student.update(parameters)  # compiling has left traced ones in their place
        return tree_map(lambda *each: sum(each) / len(each), found[0], *found[1:])

    def _loss(self, parameters: Any, *view: mx.array) -> mx.array:
        self._student.update(parameters)
        return self._objective.of(self._student, *view)


def distil(
    student: nn.Module, found: list[Rows], flags: argparse.Namespace, first: Objective | None
) -> None:
    """Train for --minutes; for the first part of it with the objective `first`, if given."""
    stages = [(first, IMITATION), (Objective(), 1 - IMITATION)] if first else [(Objective(), 1.0)]
    for objective, share in stages:
        began, seconds = time.monotonic(), 60 * flags.minutes * share
        done = lambda step, began=began, seconds=seconds: (time.monotonic() - began) / seconds
        train(student, found, flags.rows, flags.learning_rate, done, objective)


def write_texts(name: str, model: nn.Module, directory: Path, minutes: float) -> None:
    """Let the target write for so many minutes, in addition to what it wrote there before.

    name  by which each process loads the model
    """
    options = DataOptions(data_minutes=minutes, data_tokens=10**9)
    directory.mkdir(parents=True, exist_ok=True)
    jobs = len(parts(directory)) or choose_jobs(adapt(model), options)
    write = partial(_write_part, name, directory, options, jobs)
    written = side_by_side(jobs, write, lambda job, told: None)
    print(f"{sum(written):,} tokens of answers", file=sys.stderr)


def _write_part(name: str, directory: Path, options: DataOptions, jobs: int, job: int, tell) -> int:
    model, tokenizer = redrafter_mlx.load(name)[:2]
    part = part_path(directory, job)
    return write_data(adapt(model), tokenizer, part, options, job=job, jobs=jobs).counts.tokens


def make(model: nn.Module, config: dict[str, Any], flags: argparse.Namespace) -> Made:
    """The student that the flags ask for, untrained or as --start-from has it."""
    total = len(model.layers)
    chosen = layers_of(flags.layers or (total if flags.hybrid else 4), total)
    first = None
    if flags.hybrid:
        student = make_hybrid(model, chosen)
        ends = {name: config[name] for name in ("eos_token_id",) if name in config}
        config = hybrid_config(model.args, len(chosen)) | ends
        asked = device.fused(partial(lessons, model, chosen))
        first = Objective(imitation, lambda tokens, *_: asked(tokens))
    else:
        student, config = make_student(model, len(chosen)), of_fewer_layers(config, chosen)
    if flags.start_from:
        student.load_weights(str(flags.start_from / "model.safetensors"))
        first = None
    return Made(student, config, first)


def main(args: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = made.add_argument
    flag("--model", default="demo", help="the target, as generate takes it")
    flag("--output", type=Path, required=True, help="directory of the student")
    flag("--data", type=Path, help="where the target's texts are kept (default: OUTPUT/data)")
    flag("--hybrid", action="store_true", help="gated delta rules for three of four attentions")
    flag("--layers", type=int, help="of the student (default: 4, of a hybrid all)")
    flag("--start-from", type=Path, help="directory of a student to train further")
    flag(
        "--data-minutes", type=float, default=10.0, help="time for writing texts, 0: they are there"
    )
    flag("--minutes", type=float, default=15.0, help="time for training")
    flag("--rows", type=int, default=2, help=f"pieces of {COLUMNS} tokens in a step")
    flag("--learning-rate", type=float, default=1e-3, help="the highest")
    flags = made.parse_args(args)
    model, tokenizer, config = redrafter_mlx.load(flags.model, return_config=True)
    student, config, first = make(model, config, flags)  # before minutes of writing
    data = flags.data or flags.output / "data"
    if flags.data_minutes:
        write_texts(flags.model, model, data, flags.data_minutes)
    held_out, found = (pieces(of(parts(data))) for of in (held_out_shards, training_shards))
    if not found:
        made.error(f"there are no texts in {data}")
    with quick() if flags.hybrid else nullcontext():
        print(f"agrees with the target's choice: {agreement(student, held_out):.1%}")
        distil(student, found, flags, first)
        print(f"agrees with the target's choice: {agreement(student, held_out):.1%}")
    save_model(flags.output, student)
    save_config(config, flags.output / "config.json")
    tokenizer.save_pretrained(flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
