"""The gradients of an update's parts, computed by this process alone or shared with others.

An update sums over `accumulate` batches, its parts. On a CPU MLX runs all but matrix products in
one thread, so parts go to several processes; each reads its own batches from the shards, and only
weights and gradients pass between them, through shared memory. The result does not depend on how
many processes there are.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from redrafter_mlx.machine import blas, device
from redrafter_mlx.training.jobs import blas_threads
from redrafter_mlx.training.objective import Objective, candidates
from redrafter_mlx.training.options import TrainingOptions
from redrafter_mlx.training.windows import Shards, Window

Parameters = Any
"""A tree of arrays, as `nn.Module.trainable_parameters` gives it."""


class Gradients:
    """Losses and gradients of parts.

    head       only its shape matters: its weights are replaced by those that `of` is given
    objective  the loss of a batch
    shards     training data
    allowed    (D,) token ids the soft-max may run over
    options    sizes of a part
    seed       of the batches and of their candidates
    """

    def __init__(
        self,
        head: nn.Module,
        objective: Objective,
        shards: Shards,
        allowed: np.ndarray,
        options: TrainingOptions,
        seed: int,
    ):
        self.head, self.shards = head, shards
        self._objective, self._allowed, self._options = objective, allowed, options
        self._seed = seed
        self._compiled = device.fused(mx.value_and_grad(self._loss))
        self._batches: Iterator[list[Window]] = iter(())
        self._next = -1

    def of(
        self, parameters: Parameters, step: int, parts: Sequence[int]
    ) -> list[tuple[mx.array, Parameters]]:
        """(loss (), gradients) of these parts of an update, in order; evaluated."""
        found = [self._compiled(parameters, *self._arrays(step, part)) for part in parts]
        mx.eval(found)
        return found

    def _loss(self, parameters: Parameters, *arrays: mx.array) -> mx.array:
        self.head.update(parameters)
        return self._objective(self.head, *arrays)

    def _arrays(self, step: int, part: int) -> tuple[mx.array, ...]:
        o = self._options
        windows = self._windows(step * o.accumulate + part)
        batch = self.shards.batch(windows, self._objective.steps, self._objective.past)
        chosen = candidates(batch, self._allowed, o.candidates, [self._seed, step, part])
        past = batch.past
        return (
            batch.hidden,
            mx.array(batch.tokens),
            chosen.ids,
            chosen.bias,
            chosen.teacher,
            chosen.columns,
            mx.array(batch.weights),
            *((past.hidden, mx.array(past.tokens), mx.array(past.visible)) if past else ()),
        )

    def _windows(self, index: int) -> list[Window]:
        """The windows of a batch; cheap as long as batches are asked for in order."""
        if index < self._next or self._next < 0:
            self._batches = self.shards.draws(
                f"{self._seed}", self.shards.at_once(self._options.windows), index
            )
            self._next = index
        while self._next <= index:
            windows = next(self._batches)
            self._next += 1
        return windows


class Crew:
    """`Gradients` shared by several processes.

    own   this process's
    make  makes the others' in their processes; must be picklable
    jobs  how many processes, this one included
    parts how many an update has

    A context: the other processes end with it, and with this process.
    """

    def __init__(self, own: Gradients, make: Callable[[], Gradients], jobs: int, parts: int):
        self._own, self._parts = own, parts
        jobs = min(jobs, parts)
        self._shares = [range(job, parts, jobs) for job in range(jobs)]
        flat = tree_flatten(own.head.trainable_parameters())
        self._layout = [(name, array.shape) for name, array in flat]
        size = sum(array.size for _, array in flat)
        spawn = multiprocessing.get_context("spawn")
        self._weights = spawn.RawArray(ctypes.c_float, size if jobs > 1 else 0)
        self._gradients = [
            spawn.RawArray(ctypes.c_float, size if jobs > 1 else 0) for _ in range(parts)
        ]
        self._others = []
        self._limited = blas.threads(max(1, (os.cpu_count() or 1) // jobs))
        with blas_threads(jobs):
            for share in self._shares[1:]:
                ours, theirs = spawn.Pipe()
                arguments = make, share, theirs, self._weights, self._gradients
                process = spawn.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._others.append((process, ours))

    def __enter__(self) -> Crew:
        if self._others:
            self._limited.__enter__()
        return self

    def __exit__(self, *_) -> None:
        if self._others:
            self._limited.__exit__(None, None, None)
        for process, _ in self._others:
            process.terminate()
        for process, _ in self._others:
            process.join()

    def of(self, parameters: Parameters, step: int) -> tuple[mx.array, Parameters]:
        """(loss (), gradients) of an update: the means over its parts."""
        if self._others:
            _write(self._weights, parameters)
        for process, connection in self._others:
            _alive(process, connection.send, step)
        own = self._own.of(parameters, step, self._shares[0])
        found = dict(zip(self._shares[0], own, strict=True))
        for share, (process, connection) in zip(self._shares[1:], self._others, strict=True):
            losses = _alive(process, connection.recv)
            for part, loss in zip(share, losses, strict=True):
                found[part] = mx.array(loss), _read(self._gradients[part], self._layout)
        losses, gradients = zip(*(found[part] for part in range(self._parts)), strict=True)
        return _mean(*losses), tree_map(_mean, *gradients)


def _alive(process, ask: Callable, *arguments):
    """What `ask` of a process's connection gives; RuntimeError if the process is gone."""
    try:
        return ask(*arguments)
    except (EOFError, OSError):
        process.join()
        raise RuntimeError(
            f"a process that computes gradients ended with exit code {process.exitcode}"
        ) from None


def _serve(make: Callable[[], Gradients], share: Sequence[int], connection, weights, slots) -> None:
    """Another process: answer each step with the losses of the share, gradients in their slots."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets it too and ends this one
    gradients = make()
    layout = [(n, a.shape) for n, a in tree_flatten(gradients.head.trainable_parameters())]
    while True:
        try:
            step = connection.recv()
        except EOFError:  # the first process is gone
            return
        found = gradients.of(_read(weights, layout), step, share)
        for part, (_, gradient) in zip(share, found, strict=True):
            _write(slots[part], gradient)
        connection.send([float(loss) for loss, _ in found])


def _write(memory, parameters: Parameters) -> None:
    flat, first = np.frombuffer(memory, np.float32), 0
    for array in device.read(*(array for _, array in tree_flatten(parameters))):
        flat[first : first + array.size] = array.ravel()
        first += array.size


def _read(memory, layout: Sequence[tuple[str, tuple[int, ...]]]) -> Parameters:
    flat, first, arrays = np.frombuffer(memory, np.float32), 0, []
    for name, shape in layout:
        size = int(np.prod(shape))
        arrays.append((name, mx.array(flat[first : first + size].reshape(shape))))
        first += size
    return tree_unflatten(arrays)


def _mean(first: mx.array, *others: mx.array) -> mx.array:
    return sum(others, first) / (1 + len(others))
