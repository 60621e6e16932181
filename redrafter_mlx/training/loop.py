"""The training loop: batches in a fixed order, a compiled step, checkpoints that resume exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from redrafter_mlx import device
from redrafter_mlx.config import TrainingOptions
from redrafter_mlx.drafters.recurrent import RecurrentHead
from redrafter_mlx.errors import UserError
from redrafter_mlx.training.objective import Objective, candidates
from redrafter_mlx.training.windows import Batch, Shards

WARM_UP = 0.02
"""Share of the steps over which the learning rate rises."""
_BETAS = (0.9, 0.98)
PROBES = 6


@dataclass
class Progress:
    """Where a run stands; kept in its checkpoints.

    steps    all that the run will take; decided once, because the learning rate depends on it
    seconds  trained so far, evaluation not counted
    """

    steps: int
    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.step * (self.steps - self.step) if self.step else math.nan


class Trainer:
    """Trains a head on shards.

    head       in float32; changed in place
    objective  the loss of a batch
    shards     training data
    allowed    (D,) token ids the soft-max may run over
    options    batch and learning rate
    progress   how many steps, and how many are done
    seed       of the batches
    """

    def __init__(
        self,
        head: RecurrentHead,
        objective: Objective,
        shards: Shards,
        allowed: np.ndarray,
        options: TrainingOptions,
        progress: Progress,
        seed: int,
    ):
        self.head, self.shards, self.progress = head, shards, progress
        self._objective, self._allowed, self._options = objective, allowed, options
        self._seed = seed
        self.plan(progress.steps)

    def plan(self, steps: int) -> None:
        """Set out to take so many steps: the learning rate rises and falls over them."""
        self.progress.steps = steps
        warm_up = max(1, round(WARM_UP * steps))
        highest = self._options.learning_rate
        rate = optim.join_schedules(
            [
                optim.linear_schedule(0.0, highest, warm_up),
                optim.cosine_decay(highest, max(1, steps - warm_up)),
            ],
            [warm_up],
        )
        self._optimizer = optim.AdamW(rate, betas=list(_BETAS), weight_decay=0.0)
        self._optimizer.init(self.head.trainable_parameters())

    def run(self, stop: Callable[[Progress], bool] = lambda progress: False) -> None:
        """Train to the end, or until `stop(progress)`, asked after each step, is true."""
        done = self.progress
        o = self._options
        batches = self.shards.batches(
            f"{self._seed}", o.windows, self._objective.steps, done.step * o.accumulate
        )
        gradients_of, updated = self._compiled()
        parameters = self.head.trainable_parameters()
        while done.step < done.steps:
            began = time.perf_counter()
            losses, total = [], None
            for part in range(o.accumulate):
                loss, gradients = gradients_of(parameters, *self._arrays(next(batches), part))
                losses.append(loss)
                total = gradients if total is None else tree_map(mx.add, total, gradients)
            parameters = updated(parameters, tree_map(lambda g: g / o.accumulate, total))
            self.head.update(parameters)
            (loss,) = device.read(sum(losses) / o.accumulate)
            mx.eval(parameters, self._optimizer.state)
            done.step += 1
            done.seconds += time.perf_counter() - began
            done.loss = float(loss)
            if not math.isfinite(done.loss):
                raise UserError(
                    f"the loss is {done.loss} at step {done.step}: the training data or the "
                    f"learning rate {o.learning_rate} is unusable; resume with a lower one"
                )
            if stop(done):
                return

    def seconds_per_step(self) -> float:
        """Measured on a few steps that change nothing."""
        gradients_of, _ = self._compiled()
        parameters = self.head.trainable_parameters()
        batches = self.shards.batches("probe", self._options.windows, self._objective.steps)
        times = []
        for batch in islice(batches, PROBES):
            began = time.perf_counter()
            mx.eval(gradients_of(parameters, *self._arrays(batch, 0)))
            times.append(time.perf_counter() - began)
        self.head.update(parameters)
        return float(np.median(times[1:])) * self._options.accumulate

    def _compiled(self):
        """Pure functions: (parameters, batch) -> loss and gradients; and one update."""

        def loss(parameters, *arrays):
            self.head.update(parameters)
            return self._objective(self.head, *arrays)

        def update(parameters, gradients):
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            return self._optimizer.apply_gradients(gradients, parameters)

        state = [self._optimizer.state]
        return (
            mx.compile(mx.value_and_grad(loss)),
            mx.compile(update, inputs=state, outputs=state),
        )

    def _arrays(self, batch: Batch, part: int) -> tuple[mx.array, ...]:
        o = self._options
        seed = [self._seed, self.progress.step, part]
        chosen = candidates(batch, self._allowed, o.candidates, seed)
        return (
            batch.hidden,
            mx.array(batch.tokens),
            chosen.ids,
            chosen.bias,
            chosen.teacher,
            chosen.columns,
            mx.array(batch.weights),
        )

    def save(self, path: Path, settings: dict) -> None:
        """Everything needed to go on, whole or not at all; `settings` must match on resuming."""
        arrays = {f"head.{k}": v for k, v in tree_flatten(self.head.parameters())}
        arrays |= {f"optimizer.{k}": v for k, v in tree_flatten(self._optimizer.state)}
        metadata = {
            "progress": json.dumps(asdict(self.progress)),
            "settings": json.dumps(settings, sort_keys=True),
        }
        partial = path.with_name(f".{path.stem}.partial.safetensors")
        mx.save_safetensors(str(partial), arrays, metadata)
        os.replace(partial, path)

    def restore(self, path: Path, settings: dict) -> None:
        """Go on from what `save` wrote; UserError if it was made with other settings."""
        arrays, metadata = read_checkpoint(path)
        if different := differences(json.loads(metadata["settings"]), settings):
            raise UserError(
                f"{path} was made with other settings: {'; '.join(different)}; give the same "
                "ones, or another --output"
            )
        part = lambda prefix: [
            (name.removeprefix(prefix), x) for name, x in arrays.items() if name.startswith(prefix)
        ]
        self.progress.__dict__.update(json.loads(metadata["progress"]))
        self.plan(self.progress.steps)
        self.head.load_weights(part("head."))
        self._optimizer.state = tree_unflatten(part("optimizer."))


def read_checkpoint(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and metadata of a checkpoint; UserError if it is damaged."""
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        mx.eval(arrays)
        json.loads(metadata["progress"]), json.loads(metadata["settings"])
        return arrays, metadata
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a complete checkpoint: {error}") from error


def differences(before: dict, now: dict) -> list[str]:
    """'name was X, is Y' for every setting that differs."""
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
