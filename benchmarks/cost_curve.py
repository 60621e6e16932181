"""What a pass over N rows costs at several context lengths.

    python -m benchmarks.cost_curve --contexts 50 200 800 1600 --output result.json

Passes are those of the loop: a tree with its mask, positions and cache, until its tokens are read;
one row is a round of plain decoding. See redrafter_mlx/measuring/measure.py for the method.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

from redrafter_mlx.measuring.measure import curve_of, measure_passes
from redrafter_mlx.measuring.picture import draw
from redrafter_mlx.pricing.curve import CostCurve
from redrafter_mlx.target.adapter import adapt

from .machine import Bench, document, machine, parser, publish
from .tables import cost_tables


def measure(flags: argparse.Namespace) -> dict:
    where = machine()
    bench = Bench(flags.model, [])
    passes = []
    for context in flags.contexts:
        print(f"{context} tokens", file=sys.stderr)
        text = bench.filler(context)
        passes.append(measure_passes(adapt(bench.model), text, flags.rows, flags.turns))
    return document(
        "cost_curve",
        flags,
        where,
        curve=curve_of(flags.contexts, flags.rows, passes).as_dict(),
        spread=[round(found.spread, 4) for found in passes],
        drift=[round(found.drift, 4) for found in passes],
        complaints=list(dict.fromkeys(filter(None, (found.complaint() for found in passes)))),
    )


def draw_curve(result: dict, path: Path) -> bool:
    """The picture of a cost curve, as PNG."""
    return draw(CostCurve(**result["curve"]), {}, path, result["settings"]["model"])


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    made.add_argument(
        "--contexts", type=int, nargs="+", default=[128, 512, 2048], help="tokens before the answer"
    )
    rows = list(chain(range(1, 17), (20, 24, 32, 48, 64)))
    made.add_argument("--rows", type=int, nargs="+", default=rows, help="ascending, 1 first")
    made.add_argument("--turns", type=int, default=9, help="how often each size is timed")
    flags = made.parse_args(args)
    publish(measure(flags), flags.output, cost_tables, draw_curve)
    return 0


if __name__ == "__main__":
    sys.exit(main())
