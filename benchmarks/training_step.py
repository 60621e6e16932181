"""How much of the machine's matrix-product speed a training step reaches.

    python -m benchmarks.training_step --data my-drafter/training/data

Times the gradients of an update as training computes them, and the matrix products of that
update alone, of the same shapes and with all cores, in turn; prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.head import HeadConfig
from redrafter_mlx.loading import hub
from redrafter_mlx.machine import blas
from redrafter_mlx.target.adapter import Target, adapt
from redrafter_mlx.training.gradients import Crew
from redrafter_mlx.training.options import HeadOptions, TrainingOptions
from redrafter_mlx.training.recipes import recipe_for
from redrafter_mlx.training.run import gradients_of, make_gradients
from redrafter_mlx.training.shards import parts, training_shards
from redrafter_mlx.training.windows import LENGTH, PAST, Shards, frequent_ids

Shape = tuple[int, int, int, int]
"""Products side by side, rows, inner, columns."""


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--model", default="demo")
    flag("--data", type=Path, required=True, help="training/data of a training run")
    flag("--fused-layers", type=int, nargs="*", default=[])
    flag("--jobs", type=int, default=os.cpu_count())
    flag("--repeats", type=int, default=9)
    flags = parser.parse_args(args)
    load = partial(target_of, flags.model, tuple(flags.fused_layers))
    target, options = load(), TrainingOptions()
    shards = Shards(training_shards(parts(flags.data)))
    head_options = HeadOptions(fused_layers=tuple(flags.fused_layers))
    ids = frequent_ids(shards, head_options.draft_vocab, target.vocab_size)
    recipe = recipe_for(target, head_options)
    config = recipe.config(len(ids), options.ahead)
    d2t = mx.array(ids.astype(np.int32))
    head = recipe.new(config, d2t, shards, options.ahead, mx.random.key(0))
    own = gradients_of(recipe, head, d2t, shards, options, 0)
    make = partial(make_gradients, load, flags.data, head_options, config, ids, options, 0)
    shapes = products(config, options, places(shards, options))
    operands = [
        (mx.random.normal((many, rows, inner)), mx.random.normal((many, inner, columns)))
        for many, rows, inner, columns in shapes
    ]
    mx.eval(operands)
    parameters = head.trainable_parameters()
    times: dict[str, list[float]] = {"step": [], "products": []}
    with Crew(own, make, flags.jobs, options.accumulate) as crew:
        for step in range(flags.repeats + 2):  # the first two load the target and compile
            times["step"].append(timed(partial(crew.of, parameters, step)))
            with blas.threads(os.cpu_count() or 1):
                times["products"].append(timed(lambda: [a @ b for a, b in operands]))
    step = statistics.median(times["step"][2:])
    product = options.accumulate * statistics.median(times["products"][2:])
    flops = 2 * options.accumulate * sum(map(math.prod, shapes))
    positions = options.accumulate * options.windows * LENGTH
    print(
        f"step of {positions} positions: {1e3 * step:.0f} ms ({positions / step:.0f} positions/s, "
        f"{flops / step / 1e9:.0f} GFLOP/s), {flags.jobs} processes\n"
        f"its matrix products alone: {1e3 * product:.0f} ms ({flops / product / 1e9:.0f} GFLOP/s)\n"
        f"the step runs at {product / step:.0%} of their speed"
    )
    return 0


@functools.cache
def target_of(model: str, layers: tuple[int, ...]) -> Target:
    """The target, loaded once in each process."""
    target = adapt(hub.load(model)[0])
    if layers:
        target.tap(layers)
    return target


def places(shards: Shards, options: TrainingOptions) -> int:
    """Usual length of the pasts in a batch, rounded up to whole units of PAST."""
    draws = islice(shards.draws("0", options.windows), 50)
    lengths = [max(first - start for _, start, first, _ in windows) for windows in draws]
    return -(-int(statistics.median(lengths) + LENGTH) // PAST) * PAST


def products(config: HeadConfig, options: TrainingOptions, places: int) -> list[Shape]:
    """Every matrix product of a part, forward and backward; pasts are `places` long."""
    h, e, c = config.hidden_size, config.exit_dim, config.context_size
    positions = options.windows * LENGTH
    rows = positions * options.ahead
    layers = [(rows, e, e)] * config.num_blocks + [(rows, h, e)]  # blocks, state's projection
    if config.rnn:
        layers.append((rows, h, h))  # rnn_u
    found = [*layers, (rows, e, options.candidates), (positions, c, e), (rows, h, h)]  # rnn_w last
    for r, i, o in layers:
        found += [(r, o, i), (i, r, o)]  # gradients of inputs and weights
    found += [(rows, options.candidates, e)]  # the output's inputs only: its rows are fixed
    found += [(c, positions, e), (h, rows, h)]  # weights only: the target is fixed
    side_by_side = []
    if heads := config.lookback_heads:
        size, read = config.lookback_size, options.windows * places
        found += 2 * [(read, h, heads * size), (h, read, heads * size)]  # keys
        found += [(positions, h, heads * size), (h, positions, heads * size)]  # context's queries
        found += 2 * [(rows, h, heads * size), (h, rows, heads * size)] + [(rows, heads * size, h)]
        found += [(rows, heads * h, e), (rows, e, heads * h), (heads * h, rows, e)]  # out
        windows, asked = options.windows, rows * heads // options.windows
        side_by_side = [(windows, asked, places, h), (windows, asked, h, places)]  # what is heard
        side_by_side += 2 * [(windows, asked, size, places)] + [(windows, asked, places, size)]
    return [(1, *shape) for shape in found] + side_by_side


def timed(work) -> float:
    began = time.perf_counter()
    mx.eval(work())
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
