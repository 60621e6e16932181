"""Does a drafter draft as well at the end of a long text as at its beginning?

    python -m benchmarks.decay --drafters demo ./eagle3 max_gram --tokens 2000 --output decay.json

Every drafter drafts the same sampled text, past its end, with a fixed search and budget; tokens a
round are counted for each stretch of it. A head whose cache drifts from what the target has
verified gets worse from stretch to stretch, beside one that keeps none.
"""

from __future__ import annotations

import argparse
import sys

from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.generation import Generation

from .machine import Bench, document, machine, parser, write
from .tables import decay_tables

PROMPT = "Write a long story about a lighthouse keeper who finds a map."
DRAFT = DraftOptions(beam_width=4, beam_length=5, budget=16)
SAMPLING = SamplingOptions(temp=0.8, seed=3)
"""Greedy texts of small models soon repeat themselves, and are then easy to draft."""


def measure(flags: argparse.Namespace) -> dict:
    where, bench = machine(), Bench(flags.model, flags.drafters)
    ids, texts, rows = bench.encode(PROMPT), set(), {}
    for name in flags.drafters:
        run = Generation(
            bench.model,
            ids,
            bench.drafters[name],
            generation=GenerationOptions(max_tokens=flags.tokens),
            sampling=SAMPLING,
            draft=DRAFT,
        )
        tokens, ends = [], []
        for token in run:
            tokens.append(token.id)
            if len(tokens) % flags.stretch == 0:
                ends.append(run.stats.rounds)
                print(f"{name}: {len(tokens)} tokens, {ends[-1]} rounds", file=sys.stderr)
        texts.add(tuple(tokens))
        rounds = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        rows[name] = [flags.stretch / count for count in rounds]
    return document("decay", flags, where, tokens_per_round=rows, same_text=len(texts) == 1)


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    made.add_argument("--drafters", nargs="+", default=["demo"], help="as generate takes them")
    made.add_argument("--tokens", type=int, default=2000, help="of the text")
    made.add_argument("--stretch", type=int, default=250, help="tokens of a stretch")
    flags = made.parse_args(args)
    result = measure(flags)
    write(result, flags.output)
    print(decay_tables(result, flags.output.name if flags.output else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
