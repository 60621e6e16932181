"""The training loop: batches in a fixed order, a compiled step, checkpoints that resume exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.gradients import Crew, Gradients
from redrafter_mlx.training.options import TrainingOptions

WARM_UP = 0.02
"""Share of the steps over which the learning rate rises."""
_BETAS = (0.9, 0.98)


@dataclass
class Progress:
    """Where a run stands; kept in its checkpoints.

    steps    that the run takes in all; with a deadline only a forecast until the last one
    seconds  of training so far, without evaluation
    places   of the learning rate schedule, from its beginning to its end
    place    of the next step on it: the steps that are left go through the rest in equal strides,
             of one place each unless their number has changed on the way
    """

    steps: int
    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    places: int = 0
    place: float = 0.0

    @property
    def seconds_left(self) -> float:
        return self.seconds / self.step * (self.steps - self.step) if self.step else math.nan


class Trainer:
    """Trains a head on shards.

    gradients  of its batches; its head is in float32 and is changed in place
    options    batch and learning rate
    progress   how many steps, and how many are done
    """

    def __init__(self, gradients: Gradients, options: TrainingOptions, progress: Progress):
        self.head, self.progress = gradients.head, progress
        self._gradients, self._options = gradients, options
        self.plan(progress.steps)

    def plan(self, steps: int, places: int | None = None) -> None:
        """Plan so many steps: the learning rate rises and falls over them.

        places  of its schedule, by default one for each step
        """
        done = self.progress
        done.steps, done.places, done.place = steps, places or steps, 0.0
        self._optimizer = self._new_optimizer()
        self._optimizer.init(self.head.trainable_parameters())

    def plan_more(self, steps: int, places: int) -> None:
        """After the last step, plan so many more: the learning rate begins anew."""
        state = self._optimizer.state
        self.plan(self.progress.step + steps, places)
        self._optimizer.state = state

    def _new_optimizer(self) -> optim.Optimizer:
        places, highest = self.progress.places, self._options.learning_rate
        warm_up = max(1, round(WARM_UP * places))
        rate = optim.join_schedules(
            [
                optim.linear_schedule(0.0, highest, warm_up),
                optim.cosine_decay(highest, max(1, places - warm_up)),
            ],
            [warm_up],
        )
        return optim.AdamW(rate, betas=list(_BETAS), weight_decay=0.0)

    def run(self, crew: Crew, stop: Callable[[Progress], bool] = lambda progress: False) -> None:
        """Train to the end, or until `stop(progress)`, asked after each step, is true."""
        done = self.progress
        updated = self._compiled_update()
        parameters = self.head.trainable_parameters()
        while done.step < done.steps:
            began = time.perf_counter()
            self._optimizer.state["step"] = mx.array(int(done.place), mx.uint64)
            loss, gradients = crew.of(parameters, done.step)
            parameters = updated(parameters, gradients)
            self.head.update(parameters)
            mx.eval(loss, parameters, self._optimizer.state)
            done.place += (done.places - done.place) / (done.steps - done.step)
            done.step += 1
            done.seconds += time.perf_counter() - began
            done.loss = loss.item()
            if not math.isfinite(done.loss):
                raise UserError(
                    f"the loss is {done.loss} at step {done.step}: the training data or the "
                    f"learning rate {self._options.learning_rate} is unusable; resume with a "
                    "lower one"
                )
            if stop(done):
                return

    def seconds_per_step(self, crew: Crew) -> float:
        """Measured on a step that changes nothing, after one that may have to compile first."""
        parameters = self.head.trainable_parameters()
        for step in (self.progress.step, self.progress.step + 1):
            began = time.perf_counter()
            mx.eval(crew.of(parameters, step))
            seconds = time.perf_counter() - began
        self.head.update(parameters)
        return seconds

    def _compiled_update(self):
        """A pure function: (parameters, gradients) -> parameters."""

        def update(parameters, gradients):
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            return self._optimizer.apply_gradients(gradients, parameters)

        state = [self._optimizer.state]
        return mx.compile(update, inputs=state, outputs=state)

    def save(self, path: Path, settings: dict) -> None:
        """Write everything needed to resume, whole or not at all; `settings` must match then."""
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
        """Resume from what `save` wrote; UserError if it was made with other settings."""
        arrays, metadata = read_checkpoint(path)
        if different := differences(json.loads(metadata["settings"]), settings):
            raise UserError(
                f"{path} was made with other settings: {'; '.join(different)}; give the same "
                "ones, or another --output"
            )
        part = lambda prefix: [
            (name.removeprefix(prefix), x) for name, x in arrays.items() if name.startswith(prefix)
        ]
        there = json.loads(metadata["progress"])
        whole_strides = {"places": there["steps"], "place": float(there["step"])}
        self.progress.__dict__.update(whole_strides | there)  # older files have no places
        self._optimizer = self._new_optimizer()
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
