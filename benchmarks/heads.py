"""Heads of every kind trained on the same data: what each costs, and how much is accepted.

    python -m benchmarks.heads data OUTPUT --minutes 10        # what all of them learn from
    python -m benchmarks.heads train OUTPUT --minutes 10 --variant "head=eagle3" ...
    python -m benchmarks.heads measure OUTPUT --output result.json

A variant is a set of settings of redrafter_mlx.train; its head is in OUTPUT/heads/NAME. All are
trained on the same data for the same time (or --steps), and measured by replaying the same held-out
greedy answers: tokens per round at each budget, with a beam search and with a chain. The drafts of
all heads are timed in turn, over and over, beside the target's own pass. `--beside` measures other
drafters on the same answers, such as max_gram, model:student or "union:[HEAD,max_gram]".
`python -m benchmarks.drafters --drafters OUTPUT/heads/...` then measures their speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx

from redrafter_mlx import train
from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.drafters.eagle3 import reads_by_default
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.loading import hub
from redrafter_mlx.loading.drafters import load_drafter
from redrafter_mlx.measuring.acceptance import record, tokens_per_round
from redrafter_mlx.pricing.budget import FixedBudget
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.rounds.round import Verdict
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.adapter import Target, adapt
from redrafter_mlx.training.deadline import NEVER, Deadline
from redrafter_mlx.training.loop import Progress
from redrafter_mlx.training.options import DataOptions, HeadOptions, TrainingOptions
from redrafter_mlx.training.replay import Answer, recall, replay
from redrafter_mlx.training.report import first_tokens, held_out_answers
from redrafter_mlx.training.run import Places, TrainingRun

from .heads_table import draw, table
from .machine import document, machine, options_of, parser, size, write

FULL = Setting(4, 5)
WIDTH, LENGTH = FULL
BUDGETS = (4, 8, 16, 32, 64)
ROUNDS = 24
"""Timed drafts of each head."""
VARIANTS = (
    "head=recurrent lookback_heads=0",
    "head=recurrent",
    "head=recurrent lookback_heads=0 no_rnn=true",
    "head=medusa",
    "head=eagle3",
    "head=dflash",
)


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    made.add_argument("what", choices=["data", "train", "measure"])
    made.add_argument("directory", type=Path, metavar="OUTPUT")
    made.add_argument("--minutes", type=float, default=10.0, help="of data, or for each head")
    made.add_argument("--steps", type=int, help="of each head, instead of minutes")
    made.add_argument("--jobs", type=int, default=2, help="processes")
    made.add_argument("--variant", action="append", metavar="'NAME=VALUE ...'", help="to train")
    made.add_argument(
        "--beside", nargs="+", default=[], metavar="DRAFTER", help="measured with the heads"
    )
    made.add_argument("--tokens", type=int, default=4000, help="held-out tokens that are replayed")
    flags = made.parse_args(args)
    {"data": write_data, "train": train_all, "measure": measure}[flags.what](flags)
    return 0


def source(flags: argparse.Namespace, head: HeadOptions) -> train.Source:
    """The target, with the layers captured that any of the kinds reads."""
    layers = reads_by_default(len(hub.load(flags.model, lazy=True)[0].layers))
    return train.Source(flags.model, None, None, False, head, layers)


def write_data(flags: argparse.Namespace) -> None:
    """Conversations of the target, with everything that any kind of head reads."""
    options = DataOptions(data_minutes=flags.minutes, jobs=flags.jobs)
    train.write_data_of(flags.directory, source(flags, HeadOptions()), options)


def train_all(flags: argparse.Namespace) -> None:
    """Each variant in turn; one whose head exists already is skipped."""
    for variant in flags.variant or VARIANTS:
        places = Places(flags.directory / "heads" / name_of(variant))
        if (places.output / "config.json").exists():
            continue
        places.data.parent.mkdir(parents=True, exist_ok=True)
        if not places.data.is_symlink():
            places.data.symlink_to((flags.directory / "training" / "data").resolve())
        given = dict(pair.split("=") for pair in variant.split())
        head = options_of(HeadOptions, given)
        training = options_of(TrainingOptions, given, steps=flags.steps)
        if given:
            sys.exit(f"--variant {variant}: no such setting: {', '.join(given)}")
        began = time.perf_counter()
        until = NEVER if flags.steps else Deadline.after(60 * flags.minutes)
        load = source(flags, head).target
        with TrainingRun(load, places, head, training, 0, until, flags.jobs) as run:
            run.run(partial(tell, variant))
        run.save("float16")
        facts = {
            "variant": variant,
            "kind": head.head,
            "parameters": run.parameters,
            "steps": run.progress.steps,
            "jobs": flags.jobs,
            "seconds": run.progress.seconds,
            "wall_seconds": time.perf_counter() - began,
            "loss": run.log[-1]["loss"],
            "passes": run.positions_per_step * run.progress.steps / run.shards.tokens,
        }
        (places.output / "facts.json").write_text(json.dumps(facts))


def tell(variant: str, progress: Progress, entry: dict) -> None:
    """A line of progress of a head's training."""
    print(f"{variant}: {entry}", file=sys.stderr, flush=True)


def name_of(variant: str) -> str:
    """A directory's name for a variant."""
    return variant.replace("head=", "").replace(" ", "-").replace("=", "-")


def measure(flags: argparse.Namespace) -> None:
    """Every trained head: tokens per round, recall, bytes, and milliseconds of a draft."""
    model, tokenizer = hub.load(flags.model)[:2]
    target = adapt(model)
    target.tap(reads_by_default(len(model.layers)))
    answers = first_tokens(held_out_answers(Places(flags.directory).data), flags.tokens)
    heads = sorted(path.parent for path in (flags.directory / "heads").glob("*/facts.json"))
    if not heads:
        sys.exit(f"{flags.directory}: no head was trained there yet")
    drafters = {path.name: load_drafter(str(path), model) for path in heads}
    others = {name: load_drafter(name, model, tokenizer=tokenizer) for name in flags.beside}
    times = draft_times(target, answers[0], {**drafters, **others})
    rows = []
    for path in heads:
        drafter, facts = drafters[path.name], json.loads((path / "facts.json").read_text())
        found = replay(drafter, answers, WIDTH, LENGTH).tokens_per_round
        chain = replay(drafter, answers, 1, LENGTH).tokens_per_round
        row = facts | {
            "name": path.name,
            "bytes": (path / "model.safetensors").stat().st_size,
            "read_bytes": size(drafter.head),
            "draft_ms": 1e3 * statistics.median(times[path.name]),
            "recall": recall(drafter, answers, LENGTH - 1)[:, 0].tolist(),
            "tree": {str(b): found[b] for b in BUDGETS},
            "chain": chain[max(b for b in chain if b <= 16)],
        }
        rows.append(row)
        print(f"{path.name}: {row['tree']}, draft {row['draft_ms']:.1f} ms", file=sys.stderr)
    for name, drafter in others.items():
        row = {"name": name, "draft_ms": 1e3 * statistics.median(times[name])}
        rows.append(row | recorded(target, drafter, answers))
        print(f"{name}: {rows[-1]}", file=sys.stderr)
    result = document("heads", flags, machine(), heads=rows,
                      tokens=sum(len(a.tokens) for a in answers),
                      pass_ms=1e3 * statistics.median(times["target"]))  # fmt: skip
    write(result, flags.output)
    if flags.output:
        draw(result, flags.output.with_suffix(".png"))
    print(table(result))


def recorded(target: Target, drafter: Drafter, answers: list[Answer]) -> dict:
    """Tokens per round of any drafter: the answers are decoded again from their first token on."""
    recordings = [
        record(target, drafter, [*answer.prompt.tolist(), int(answer.tokens[0])],
               len(answer.tokens) - 1, FULL, SamplingOptions())
        for answer in answers
        if len(answer.tokens) > 1
    ]  # fmt: skip
    found = tokens_per_round(recordings, FULL, max(BUDGETS))
    chain = tokens_per_round(recordings, Setting(1, LENGTH), LENGTH)
    return {"tree": {str(b): float(found[b]) for b in BUDGETS}, "chain": float(chain[-1])}


def draft_times(target: Target, answer: Answer, drafters: dict) -> dict[str, list[float]]:
    """Seconds of drafts, in rounds of plain decoding, and of the target's passes."""
    times: dict[str, list[float]] = {name: [] for name in (*drafters, "target")}
    budget = FixedBudget(WIDTH, LENGTH, 16)
    context = target.prefill([*answer.prompt.tolist(), *answer.tokens[:32].tolist()], 512)
    for _ in range(ROUNDS + 2):  # the first two read the text and make room
        for name, drafter in drafters.items():
            began = time.perf_counter()
            drafter.propose(context, budget)
            times[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        outcome = target.verify(context, TokenTree.root())
        best = mx.argmax(outcome.logits[-1:], axis=-1)
        verdict = Verdict([0], best, best.item())
        times["target"].append(time.perf_counter() - began)
        context = target.commit(context, TokenTree.root(), outcome, verdict)
    return {name: found[2:] for name, found in times.items()}


if __name__ == "__main__":
    sys.exit(main())
