"""The results of the benchmark of drafters and rules, as Markdown."""

from __future__ import annotations

import statistics
from collections import defaultdict

from redrafter_mlx.rounds.stats import Stats

from . import analysis
from .headline import headline
from .markdown import table
from .ratios import PLAIN


def tables(result: dict, name: str) -> str:
    """Markdown: each method against plain decoding, overall and by category.

    name  of the JSON file
    """
    rows = {int(n): [curve[n] for curve in result["costs"]] for n in result["costs"][0]}
    cost = analysis.curve({n: statistics.median(seconds) for n, seconds in rows.items()})
    one_pass = statistics.median(rows[1])
    methods = list(dict.fromkeys(run["method"] for run in result["runs"]))
    categories = list(dict.fromkeys(run["category"] for run in result["runs"]))
    drafted = [m for m in methods if not m.startswith(PLAIN)]
    header = ["method", "speed", "tokens per round", "accepted at depth 1, 2, ...", "EWIF"]
    header += ["EWIF, measured rows", "SWI", "draft per round"]
    by_method = []
    for method in drafted:
        runs = [run for run in result["runs"] if run["method"] == method]
        stats = total(runs)
        draft = stats.draft_seconds / stats.rounds / one_pass
        nodes = max(1, round(stats.nodes / stats.rounds))
        alphas = analysis.acceptance(stats)
        costs = [draft / max(len(alphas), 1)] * len(alphas)
        paid = cost(nodes)  # a tree has more rows than its longest path
        free_rows = analysis.ewif_horizontal(alphas, costs)
        paid_rows = analysis.ewif_horizontal(alphas, costs, lambda rows, paid=paid: paid)
        passes = [tuple(run) for r in runs for run in r["draft_runs"]]
        by_method.append([
            method, f"{statistics.geometric_mean(ratios(result, method, categories)):.2f}",
            f"{stats.tokens_per_round:.2f}", ", ".join(f"{a:.2f}" for a in alphas[:6]),
            f"{free_rows:.2f}", f"{paid_rows:.2f}",
            f"{analysis.swi(stats.tokens, stats.rounds, passes):.2f}",
            f"{1000 * stats.draft_seconds / stats.rounds:.2f} ms",
        ])  # fmt: skip
    by_category = [
        [category, *(f"{ratios(result, method, [category])[0]:.2f}" for method in drafted)]
        for category in categories
    ]
    differences = ", ".join(result["differences"]) or "none"
    lines = [
        headline(result, name), "",
        *table(header, by_method), "",
        *table(["category", *drafted], by_category), "",
        f"Speeds are ratios to plain decoding. Texts that differ: {differences}.",
    ]  # fmt: skip
    return "\n".join(lines)


def total(runs: list[dict]) -> Stats:
    """The counts of several runs together."""
    depths = max((len(run["accepted_at"]) for run in runs), default=0)
    add = lambda name: sum(run[name] for run in runs)
    return Stats(
        tokens=add("tokens"),
        rounds=add("rounds"),
        nodes=add("nodes"),
        draft_seconds=add("draft_seconds"),
        accepted_at=[
            sum(run["accepted_at"][d] for run in runs if d < len(run["accepted_at"]))
            for d in range(depths)
        ],
    )


def ratios(result: dict, method: str, categories: list[str]) -> list[float]:
    """For each category the geometric mean, over its prompts, of the speed over plain decoding."""
    rates = defaultdict(list)
    for run in result["runs"]:
        rates[run["category"], run["prompt"], run["method"]].append(run["rate"])
    baseline = next(run["baseline"] for run in result["runs"] if run["method"] == method)
    return [
        statistics.geometric_mean(
            [
                statistics.median(of_method) / statistics.median(rates[c, prompt, baseline])
                for (c, prompt, name), of_method in rates.items()
                if (c, name) == (category, method)
            ]
        )
        for category in categories
    ]
