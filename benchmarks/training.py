"""Train heads that differ in one setting on the same data, and compare them on held-out texts.

    python -m redrafter_mlx.train --model demo --output my-drafter ...      # writes the data
    python -m benchmarks.training --data my-drafter/training/data --steps 600 \\
        --variant loss=kl --variant loss=hard --variant "loss=kl lost=0.2"

Every variant starts from the same seed, sees the same batches and takes as many steps. Prints a
Markdown table: training seconds, the loss (of the variant's own kind), tokens per round (beams
4 x 5, budget 16) and top-1 recall by depth on held-out greedy answers, and tokens per round on
those of --texts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from redrafter_mlx.loading import hub
from redrafter_mlx.target.adapter import Target, adapt
from redrafter_mlx.training.options import HeadOptions, TrainingOptions
from redrafter_mlx.training.replay import Answer, greedy_answers, recall, replay
from redrafter_mlx.training.report import BEAM_LENGTH, BUDGET, WIDTH, first_tokens
from redrafter_mlx.training.run import Places, TrainingRun

from .machine import options_of
from .markdown import table

TOKENS = 10_000
"""Held-out tokens that are replayed."""


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--model", default="demo")
    flag("--data", type=Path, required=True, help="training/data of a training run")
    flag("--texts", type=Path, action="append", default=[], metavar="SHARD",
         help="more greedy answers to measure on")  # fmt: skip
    flag("--steps", type=int, default=600)
    flag("--fused-layers", type=int, nargs="*", default=[])
    flag("--seed", type=int, default=0)
    flag("--variant", action="append", required=True, metavar="'NAME=VALUE ...'",
         help="settings of redrafter_mlx.train")  # fmt: skip
    flags = parser.parse_args(args)
    target = adapt(hub.load(flags.model)[0])
    if flags.fused_layers:
        target.tap(flags.fused_layers)
    texts = list(greedy_answers(flags.texts))
    columns = ["variant", "M parameters", "seconds", "loss", "tokens per round", "top-1 by depth"]
    columns += ["on --texts"] * bool(texts)
    for line in table(columns, (row(target, flags, each, texts) for each in flags.variant)):
        print(line, flush=True)
    return 0


def row(target: Target, flags: argparse.Namespace, variant: str, texts: list[Answer]) -> list[str]:
    """Train one variant; its row of the table."""
    given = dict(pair.split("=") for pair in variant.split())
    head = options_of(HeadOptions, given, fused_layers=tuple(flags.fused_layers))
    training = options_of(TrainingOptions, given, steps=flags.steps)
    if given:
        sys.exit(f"--variant {variant}: no such setting: {', '.join(given)}")
    with tempfile.TemporaryDirectory() as scratch:
        places = Places(Path(scratch))
        places.data.parent.mkdir()
        places.data.symlink_to(flags.data.resolve(), target_is_directory=True)
        with TrainingRun(lambda: target, places, head, training, flags.seed) as run:
            run.run(lambda progress, entry: print(entry, file=sys.stderr))
    answers = first_tokens(run.answers, TOKENS)
    rate = lambda some: replay(run.drafter, some, WIDTH, BEAM_LENGTH).tokens_per_round[BUDGET]
    depths = recall(run.drafter, answers, BEAM_LENGTH - 1)[:, 0]
    return [
        variant, f"{run.parameters / 1e6:.2f}", f"{run.progress.seconds:.0f}",
        f"{run.log[-1]['loss']:.3f}", f"{rate(answers):.3f}",
        " ".join(f"{share:.1%}" for share in depths),
        *([f"{rate(texts):.3f}"] if texts else []),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
