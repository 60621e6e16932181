"""What writing training data costs, before it starts: memory, disk and time.

Shape letters: R rows, S columns so far.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx.utils import tree_flatten

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.target.cache import BLOCK
from redrafter_mlx.target.state import StateCache
from redrafter_mlx.training.lockstep import CHUNK, K, Probe
from redrafter_mlx.training.options import DataOptions

ANSWERS = 0.6
"""Share of all tokens that are answers and are kept: three batches (64 rows of 512 columns) of the
demo target's own conversations gave 0.58 to 0.62 with loops cut, near-repeats not yet left out."""
MOST_ROWS = {mx.cpu: 64, mx.gpu: 128}
MOST_JOBS = 4
VIEW = 5 + 6 * K
"""Bytes that a shard takes for each token beside its hidden states."""


@dataclass(frozen=True)
class Estimate:
    """What writing the data will take one job.

    rows, columns  of a batch
    batches        how many of them
    memory, disk   bytes
    seconds        of the whole stage; tokens_per_second counts tokens of answers
    """

    rows: int
    columns: int
    batches: int
    memory: int
    disk: int
    seconds: float
    tokens_per_second: float


def estimate(target: Target, options: DataOptions) -> Estimate:
    """Measure a few columns, half-way through a batch, and extrapolate to the whole stage."""
    rows = choose_rows(target, options)
    probe = Probe(target, rows, options.columns // 2)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        probe.step()
        seconds.append(time.perf_counter() - start)
    column = min(seconds[1:])
    batches = -(-options.data_tokens // max(1, int(ANSWERS * rows * options.columns)))
    if options.data_minutes is not None:
        in_time = int(60 * options.data_minutes / (options.columns * column))
        batches = max(1, min(batches, in_time))
    return Estimate(
        rows,
        options.columns,
        batches,
        memory=memory_needed(target, rows, options.columns),
        disk=batches * rows * options.columns * (2 * probe.hidden_size + VIEW),
        seconds=batches * options.columns * column,
        tokens_per_second=ANSWERS * rows / column,
    )


def share(options: DataOptions, job: int, jobs: int) -> DataOptions:
    """The options of one of several jobs: its share of tokens and memory, and a seed of its own."""
    return replace(
        options,
        seed=(options.seed + (job << 32)) % 2**64,
        data_tokens=-(-options.data_tokens // jobs),
        memory=memory_allowed(options) / 1e9 / jobs,
    )


def choose_jobs(target: Target, options: DataOptions) -> int:
    """Processes that write side by side: as asked for, or as the device and memory make useful."""
    if options.jobs:
        return options.jobs
    if mx.default_device() == mx.gpu:
        return 1
    fit = int(memory_allowed(options) // memory_needed(target, MOST_ROWS[mx.cpu], options.columns))
    return max(1, min(MOST_JOBS, os.cpu_count() or 1, fit))


def choose_rows(target: Target, options: DataOptions) -> int:
    """Rows of a batch: as asked for, or as many as memory, the goal and the device make useful.

    Raises UserError when they do not fit into --memory.
    """
    allowed = memory_allowed(options)
    base = memory_needed(target, 0, options.columns)
    each = memory_needed(target, 1, options.columns) - base
    fit = int((allowed - base) // each)
    if fit < (options.rows or 1):
        needed = (base + each * (options.rows or 1)) / 1e9
        raise UserError(
            f"{options.rows or 1} rows of {options.columns} columns need {needed:.2f} GB, more "
            f"than --memory {allowed / 1e9:.2f}; raise it or lower --rows or --columns"
        )
    if options.rows:
        return options.rows
    useful = -(-options.data_tokens // max(1, int(ANSWERS * options.columns)))
    most = MOST_ROWS[mx.gpu if mx.default_device() == mx.gpu else mx.cpu]
    return max(1, min(fit, most, useful))


def memory_allowed(options: DataOptions) -> float:
    """Bytes of --memory, or half of what the machine has."""
    if options.memory is not None:
        return options.memory * 1e9
    return device.machine_memory() / 2


def memory_needed(target: Target, rows: int, columns: int) -> int:
    """Bytes at the peak of a batch, an upper bound: weights, keys and values, views, activations.

    The sizes of keys and values, and of states, are those of one token's pass, so any attention
    and any recurrence is counted.
    """
    weights = sum(array.nbytes for _, array in tree_flatten(target.model.parameters()))
    probe = Probe(target, 1, 0)
    stored = 0
    for cache in probe.caches.branching:
        if isinstance(cache, StateCache):
            stored += 2 * cache.nbytes  # before and after a pass, whatever the columns
            continue
        kept = columns if cache.window is None else min(columns, cache.window + BLOCK)
        stored += cache.nbytes // BLOCK * -(-kept // BLOCK) * BLOCK
    views = 3 * columns * (2 * probe.hidden_size + VIEW)  # pieces, joined, and in files
    args = getattr(target.model, "args", None)
    heads = getattr(args, "num_attention_heads", None) or 32
    width = max(target.hidden_size, getattr(args, "intermediate_size", None) or 0)
    chunk = CHUNK * 4 * (2 * heads * columns + 8 * width)
    logits = 4 * 4 * target.vocab_size
    return weights + rows * (stored + views + max(chunk, logits))
