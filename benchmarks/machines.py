"""What other machines would give, by calculation: a cost curve and measured acceptance.

    python -m benchmarks.machines acceptance.json                         # published curves
    python -m benchmarks.machines heads.json                              # of benchmarks.heads
    python -m benchmarks.machines acceptance.json --curve "1:1 2:1.03 4:1.47 8:2.69" --draft 0.1
    python -m benchmarks.machines acceptance.json --against speed.json    # how well it predicts

acceptance.json is what benchmarks.acceptance writes. A curve is cost by rows, in rounds of plain
decoding, so that
    speedup(N) = tokens per round(N) / (cost(N) + draft).
Beyond a curve's last row its last slope goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.pricing.curve import CostCurve

from . import markdown
from .ratios import bound, ratios, sizes


@dataclass(frozen=True)
class Machine:
    """A cost curve and where it is from.

    curve  rows of a pass -> its cost, in passes over one row
    draft  cost of a draft, if known; 0 if the curve includes it
    """

    name: str
    curve: dict[int, float]
    source: str
    draft: float | None = None


def tiles(rows: int, limit: int, tile: int) -> dict[int, float]:
    """Cost when a pass is bound by reading weights: once for each tile of rows, up to a limit.

    At the limit a matrix kernel takes over, which reads them once but computes a full tile of its
    own; it is assumed to cost as much as the last size before.
    """
    costs = {n: float(-(-n // tile)) for n in range(1, limit)}
    last = costs[limit - 1]
    return costs | dict.fromkeys(range(limit, rows + 1), last)


PUBLISHED = (
    Machine(
        "M4 Pro, 4-bit",
        {1: 1.0, 2: 1.03, 3: 1.22, 4: 1.47, 6: 2.07, 8: 2.69},
        "measured by others on one matrix, 4096 x 24576",
    ),
    Machine(
        "M3 to M5, 4-bit, at worst",
        tiles(32, 13, 5),
        "MLX's dispatch for large matrices: tiles of 5 rows that re-read the weights, matrix "
        "kernel from 13 rows",
    ),
    Machine(
        "M1 and M2, 4-bit, at worst",
        tiles(32, 6, 1),
        "MLX's dispatch for large matrices: every row re-reads the weights, matrix kernel from 6 "
        "rows",
    ),
    Machine(
        "M3 and later, fp16, at best",
        {1: 1.0, 5: 1.0, 6: 2.0, 16: 2.0},
        "MLX's dispatch: near one row up to 5; beyond that two reads are assumed",
    ),
    Machine(
        "M1 Max, fp16, 7B",
        {1: 1.0, 4: 1.63, 7: 1.83, 10: 1.89, 13: 2.60},
        "ReDrafter's MLX results at L = 4: tokens per step over speedup with 1 to 4 beams; the "
        "draft is in it",
        draft=0.0,
    ),
)


def parse_curve(text: str) -> dict[int, float]:
    """Rows and costs of "1:1 2:1.03 4:1.47"; SystemExit with one line for anything else."""
    try:
        pairs = [pair.split(":") for pair in text.replace(",", " ").split()]
        found = {int(rows): float(cost) for rows, cost in pairs}
        _curve(found)
    except ValueError as error:
        raise SystemExit(
            f'--curve {text!r}: {error}; give rows and costs such as "1:1 2:1.03 4:1.47"'
        ) from error
    return found


def _curve(costs: dict[int, float]) -> CostCurve:
    if not costs or min(costs.values()) <= 0:
        raise ValueError("costs must be above 0")
    rows = sorted(costs)
    return CostCurve([0], rows, [[costs[n] / costs[rows[0]] for n in rows]])


def predict(tokens: dict[int, float], costs: dict[int, float], draft: float) -> tuple[int, float]:
    """(budget, speedup) of the best fixed budget of at least two nodes.

    tokens  per round by budget
    costs   of a pass by rows, one row being 1
    draft   cost of a draft on the same scale
    """
    curve = _curve(costs).at(0, max(tokens))
    speedups = {n: x / (curve[n] + draft) for n, x in tokens.items()}
    best = max(speedups, key=speedups.get)
    return best, speedups[best]


def table(acceptance: dict, machines: list[Machine], draft: float) -> str:
    """Markdown: best budget and speedup by machine, with trees and with a single beam."""
    temp, found = next(iter(acceptance["temps"].items()))
    title = (
        f"Predicted from acceptance at temperature {temp} and a draft of {draft:g} plain rounds:"
    )
    rows = []
    for machine in machines:
        cells = []
        for shape in ("best", "chain"):
            tokens = {int(n): x for n, x in found["all"][shape].items()}
            own = draft if machine.draft is None else machine.draft
            nodes, speedup = predict(tokens, machine.curve, own)
            verdict = f"{speedup:.2f}x at budget {nodes}"
            cells.append(verdict if speedup > 1 else f"do not speculate ({verdict})")
        rows.append([machine.name, *cells, machine.source])
    header = ["machine", "best tree", "best chain", "curve"]
    return "\n".join([title, "", *markdown.table(header, rows)])


def heads_table(result: dict, machines: list[Machine]) -> str:
    """Markdown: best budget and speedup of each head of benchmarks.heads on each machine.

    A draft is assumed to cost as many plain rounds as where it was timed.
    """
    title = "Predicted from replayed acceptance; drafts cost as many plain rounds as where timed:"
    rows = []
    for head in sorted(result["heads"], key=lambda head: -head["tree"]["16"]):
        draft = head["draft_ms"] / result["pass_ms"]
        tokens = {int(n): x for n, x in head["tree"].items()}
        cells = []
        for machine in machines:
            nodes, speedup = predict(tokens, machine.curve, draft)
            cells.append(f"{speedup:.2f}x at {nodes}")
        rows.append([head["name"], f"{draft:.2f}", *cells])
    header = ["head", "draft", *(machine.name for machine in machines)]
    return "\n".join([title, "", *markdown.table(header, rows)])


def against(speed: dict) -> str:
    """How well the same formula predicts what was measured, for each method over all prompts."""
    rows = []
    costs = {cost["prompt"]: cost["seconds"] for cost in speed["costs"]}
    for method in dict.fromkeys(run["method"] for run in speed["runs"]):
        runs = [run for run in speed["runs"] if run["method"] == method and sizes(run)]
        reached = ratios(speed, method)
        predicted = {
            prompt: statistics.median(
                bound(r, costs[prompt]) for r in runs if r["prompt"] == prompt
            )
            for prompt in {run["prompt"] for run in runs} & reached.keys()
        }
        if predicted:
            quotients = [reached[prompt] / value for prompt, value in predicted.items()]
            low, middle, high = np.percentile(quotients, [25, 50, 75])
            rows.append([
                method, f"{statistics.median(predicted.values()):.3f}",
                f"{statistics.median(reached[p] for p in predicted):.3f}",
                f"{middle:.3f} ({low:.2f}-{high:.2f})",
            ])  # fmt: skip
    return "\n".join(
        markdown.table(["method", "predicted", "measured", "measured / predicted"], rows)
    )


def read(path: Path, *kinds: str) -> dict:
    """A benchmark's document; SystemExit with one line when it is of none of these kinds."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["kind"] not in kinds:
            raise ValueError(f"it is of benchmarks.{result['kind']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = " or ".join(f"benchmarks.{kind}" for kind in kinds)
        raise SystemExit(f"{path}: {one_line(error)}; give what {wanted} writes") from error
    return result


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("acceptance", type=Path, help="JSON written by benchmarks.acceptance or heads")
    flag("--curve", help='one of your own: "rows:cost rows:cost ...", starting with 1 row')
    flag("--draft", type=float, default=0.1, help="cost of a draft, in plain rounds")
    flag("--against", type=Path, help="JSON written by benchmarks.speed: compare with it")
    flags = parser.parse_args(args)
    machines = list(PUBLISHED)
    if flags.curve is not None:
        machines = [Machine("yours", parse_curve(flags.curve), "--curve")]
    result = read(flags.acceptance, "acceptance", "heads")
    if result["kind"] == "heads":
        print(heads_table(result, machines))
        return 0
    print(table(result, machines, flags.draft))
    if flags.against:
        print(f"\n{against(read(flags.against, 'speed'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
