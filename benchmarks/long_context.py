"""Speed over plain decoding as the text before it grows.

python -m benchmarks.long_context --contexts 128 1024 8192 --output result.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.generation import Generation
from redrafter_mlx.measuring.picture import new_figure

from .machine import Bench, add_contexts, document, machine, parser, publish
from .tables import context_tables


def rate(bench: Bench, flags: argparse.Namespace, ids: list[int], budget) -> float:
    """Tokens per second after the first round."""
    run = Generation(
        bench.model,
        ids,
        None if budget == "plain" else bench.drafters[flags.drafter],
        generation=GenerationOptions(max_tokens=flags.max_tokens),
        sampling=SamplingOptions(),
        draft=DraftOptions() if budget == "plain" else DraftOptions(budget=budget),
    )
    tokens, first, began = 0, 0, 0.0
    for token in run:
        tokens += 1
        if not first and token.end_of_round:
            first, began = tokens, time.perf_counter()
    return (tokens - first) / (time.perf_counter() - began)


def measure(flags: argparse.Namespace) -> dict:
    """Every method at every length, there and back again."""
    where = machine()
    bench = Bench(flags.model, [flags.drafter])
    budgets = ["plain", *flags.budgets]
    names = {b: b if isinstance(b, str) else f"budget {b}" for b in budgets}
    rates = {}
    for context in flags.contexts:
        ids, found = bench.filler(context, flags.prompts), defaultdict(list)
        rate(bench, flags, ids, budgets[-1])  # warm-up
        for order in [budgets, budgets[::-1]] * flags.repeats:
            for budget in order:
                found[names[budget]].append(rate(bench, flags, ids, budget))
        rates[str(context)] = dict(found)
        print(f"{context} tokens: {dict(found)}", file=sys.stderr)
    return document("long_context", flags, where, methods=list(names.values()), rates=rates)


def draw(result: dict, path: Path) -> bool:
    """Speed over plain decoding by context length, as PNG."""
    figure = new_figure(7, 4)
    if figure is None:
        return False
    axes = figure.subplots()
    contexts = [int(context) for context in result["rates"]]
    for method in result["methods"]:
        values = [
            statistics.median(rates[method]) / statistics.median(rates["plain"])
            for rates in result["rates"].values()
        ]
        axes.plot(contexts, values, marker="o", label=method)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens before the answer")
    axes.set_ylabel("speed over plain decoding")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    add_contexts(made, [128, 512, 2048, 8192], [4, 16, "auto"])
    made.add_argument(
        "--repeats", type=int, default=1, help="there-and-back passes over the methods"
    )
    flags = made.parse_args(args)
    if flags.max_tokens < 16:
        made.error("--max-tokens must be at least 16: the first round is not timed")
    publish(measure(flags), flags.output, context_tables, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
