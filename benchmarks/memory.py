"""Peak memory of generation, with and without a drafter, against what it has to hold.

python -m benchmarks.memory --contexts 128 2048 --output result.json
"""

from __future__ import annotations

import argparse
import sys

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.generation import Generation

from .machine import Bench, add_contexts, document, machine, parser, publish, size
from .tables import memory_tables


def measure(flags: argparse.Namespace) -> dict:
    where = machine()
    bench = Bench(flags.model, [flags.drafter])
    drafter = bench.drafters[flags.drafter]
    runs = []
    for context in flags.contexts:
        ids = bench.filler(context, flags.prompts)
        for budget in [None, *flags.budgets]:
            run = Generation(
                bench.model,
                ids,
                None if budget is None else drafter,
                generation=GenerationOptions(max_tokens=flags.max_tokens),
                sampling=SamplingOptions(),
                draft=DraftOptions() if budget is None else DraftOptions(budget=budget),
            )
            mx.clear_cache()
            mx.reset_peak_memory()
            tokens = [token.id for token in run]
            peak = mx.get_peak_memory()
            method = "plain" if budget is None else f"budget {budget}"
            kept = _cache_bytes(bench, len(ids) + len(tokens))
            runs.append({"context": context, "method": method, "peak": peak, "kv_cache": kept})
    head = size(drafter.head) if hasattr(drafter, "head") else 0
    return document("memory", flags, where, target=size(bench.model), head=head, runs=runs)


def _cache_bytes(bench: Bench, tokens: int) -> int:
    """Bytes of mlx-lm's own cache of a text."""
    cache = make_prompt_cache(bench.model)
    for start in range(0, tokens, 512):
        ids = mx.zeros((1, min(512, tokens - start)), mx.int32)
        mx.eval(bench.model(ids, cache=cache)[:, -1])
    return sum(layer.nbytes for layer in cache)


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    add_contexts(made, [128, 2048], [16, "auto"])
    flags = made.parse_args(args)
    publish(measure(flags), flags.output, memory_tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
