"""A draft model to compare with: a few of the target's own layers, taught by the target.

    python -m benchmarks.student --output student --layers 4 --data-minutes 10 --minutes 15
    python -m benchmarks.speed --draft-model student --drafters "model:student" auto

The target writes conversations as for training a head. The student keeps its embeddings, its head
and its first and last layers; the layers are trained to give the distribution that the target had
after each token of its own. What comes out is a model directory that mlx-lm loads.

Shape letters: B rows, T tokens of a row, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.utils import save_config, save_model

import redrafter_mlx
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.training.data import write_data
from redrafter_mlx.training.lockstep import Role
from redrafter_mlx.training.loss import log_normaliser
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.shards import held_out_shards, map_shard, training_shards

COLUMNS = 256
"""T: longer conversations are cut into pieces of it."""
EVERY = 25
"""Steps between two lines of progress."""
WARM_UP = 50
"""Steps in which the learning rate rises."""

Rows = tuple[np.ndarray, ...]
"""tokens (B, T), top_ids (B, T, K), top_probs (B, T, K), weights (B, T)."""


def layers_of(count: int, total: int) -> list[int]:
    """Which layers a student of `count` layers begins with: as many first ones as last ones."""
    first = (count + 1) // 2
    return [*range(first), *range(total - (count - first), total)]


def of_fewer_layers(config: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The configuration of a model of the chosen layers; what is listed by layer is cut, too."""
    total = config["num_hidden_layers"]
    cut = lambda v: [v[i] for i in chosen] if isinstance(v, list) and len(v) == total else v
    return {k: cut(v) for k, v in config.items()} | {"num_hidden_layers": len(chosen)}


def make_student(model: nn.Module, layers: int) -> nn.Module:
    """A model of some of the target's layers; of its weights only theirs are to be trained.

    Raises ValueError for a model that is not built of `model.layers`, or has too few.
    """
    chosen = layers_of(layers, len(model.layers))
    if not 0 < layers < len(model.layers) or len(set(chosen)) != layers:
        raise ValueError(f"a student of {layers} of {len(model.layers)} layers is none")
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
    """Conversations in pieces of at most COLUMNS tokens; a piece's rows are padded with zeros."""
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
    pad = lambda x: np.pad(x, [(0, COLUMNS - len(x)), *[(0, 0)] * (x.ndim - 1)])
    return tuple(map(pad, (part("tokens"), part("top_ids"), probs, weights)))


def batches(found: list[Rows], rows: int, seed: int) -> Iterator[list[mx.array]]:
    """Batches without end, shuffled anew in each round through the data."""
    shuffle = np.random.default_rng(seed)
    while True:
        order = shuffle.permutation(len(found))
        for at in range(0, max(len(order) - rows + 1, 1), rows):
            some = [found[i] for i in order[at : at + rows]]
            yield [mx.array(np.stack(part)) for part in zip(*some, strict=True)]


def loss(student: nn.Module, tokens, top_ids, probs, weights) -> mx.array:
    """Cross-entropy of the target's distributions, as far as its likeliest tokens tell them."""
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


def train(
    student: nn.Module,
    found: list[Rows],
    rows: int,
    rate: float,
    done: Callable[[int], float],
) -> None:
    """Train until done(steps so far) is 1; with its share done the learning rate falls."""
    optimizer = optim.AdamW(learning_rate=rate, weight_decay=0.01)
    step_of = nn.value_and_grad(student, loss)
    sofar = []
    for step, batch in enumerate(batches(found, rows, seed=0)):
        share = done(step)
        if share >= 1:
            return
        warm = min(1.0, (step + 1) / WARM_UP)
        optimizer.learning_rate = rate * warm * (0.05 + 0.95 * (1 + np.cos(np.pi * share)) / 2)
        value, gradients = step_of(student, *batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(student, gradients)
        mx.eval(student.parameters(), optimizer.state, value)
        sofar.append(value.item())
        if len(sofar) == EVERY:
            print(f"step {step + 1}: loss {np.mean(sofar):.3f}, {share:.0%}", file=sys.stderr)
            sofar.clear()


def main(args: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = made.add_argument
    flag("--model", default="demo", help="the target, as generate takes it")
    flag("--output", type=Path, required=True, help="directory of the student")
    flag("--data", type=Path, help="where the target's texts are kept (default: OUTPUT/data)")
    flag("--layers", type=int, default=4, help="of the student")
    flag("--data-minutes", type=float, default=10.0, help="time for writing texts")
    flag("--minutes", type=float, default=15.0, help="time for training")
    flag("--rows", type=int, default=2, help=f"pieces of {COLUMNS} tokens in a step")
    flag("--learning-rate", type=float, default=1e-3, help="the highest")
    flags = made.parse_args(args)
    model, tokenizer, config = redrafter_mlx.load(flags.model, return_config=True)
    student = make_student(model, flags.layers)  # before minutes of writing
    data = flags.data or flags.output / "data"
    options = DataOptions(data_minutes=flags.data_minutes, data_tokens=10**9)
    data.mkdir(parents=True, exist_ok=True)
    written = write_data(adapt(model), tokenizer, data, options)
    print(f"{written.counts.tokens:,} tokens of answers", file=sys.stderr)
    held_out = pieces(held_out_shards([data]))
    print(f"agrees with the target's choice: {agreement(student, held_out):.1%}", file=sys.stderr)
    began, found = time.monotonic(), pieces(training_shards([data]))
    done = lambda step: (time.monotonic() - began) / (60 * flags.minutes)
    train(student, found, flags.rows, flags.learning_rate, done)
    print(f"agrees with the target's choice: {agreement(student, held_out):.1%}")
    save_model(flags.output, student)
    config = of_fewer_layers(config, layers_of(flags.layers, len(model.layers)))
    save_config(config, flags.output / "config.json")
    tokenizer.save_pretrained(flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
