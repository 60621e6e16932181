"""Ratios to mlx-lm, means and bounds, from the runs of a speed benchmark."""

from __future__ import annotations

import statistics
from collections import defaultdict

import numpy as np

BASE, PLAIN = "mlx-lm", "plain"
"""The baseline of all ratios, and our own loop without a drafter."""


def at_temperature(result: dict, temp: float) -> dict:
    """The same document with the runs at one temperature."""
    runs = [run for run in result["runs"] if run.get("temp", 0.0) == temp]
    return {**result, "runs": runs}


def by(runs: list[dict], key: str) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for run in runs:
        groups[run[key]].append(run)
    return groups


def ratios(result: dict, method: str) -> dict[str, float]:
    """Prompt id -> median rate of the method over mlx-lm's; only where both decoded something."""
    rates = defaultdict(lambda: defaultdict(list))
    for run in result["runs"]:
        if run["rate"]:
            rates[run["prompt"]][run["method"]].append(run["rate"])
    median = statistics.median
    return {
        prompt: median(r[method]) / median(r[BASE])
        for prompt, r in rates.items()
        if r[method] and r[BASE]
    }


def category_ratios(result: dict, method: str) -> dict[str, float]:
    """Category -> geometric mean of its prompts' speed ratios."""
    category = {run["prompt"]: run["category"] for run in result["runs"]}
    found = defaultdict(list)
    for prompt, ratio in ratios(result, method).items():
        found[category[prompt]].append(ratio)
    return {name: statistics.geometric_mean(values) for name, values in found.items()}


def efficiency(result: dict, method: str) -> float | None:
    """Measured speed ratio over its bound, the median over prompts; None without a drafter."""
    shares, reached = [], ratios(result, method)
    for cost in result["costs"]:
        runs = [
            run
            for run in result["runs"]
            if run["method"] == method and run["prompt"] == cost["prompt"] and sizes(run)
        ]
        if runs and cost["prompt"] in reached:
            bounds = [bound(run, cost["seconds"]) for run in runs]
            shares.append(reached[cost["prompt"]] / statistics.median(bounds))
    return statistics.median(shares) if shares else None


def bound(run: dict, seconds: dict[str, float] | dict[int, float]) -> float:
    """The highest speed ratio that the run's rounds allow, if only passes and drafts took time."""
    measured = {int(n): s for n, s in seconds.items()}  # JSON makes strings of numbers
    rows = sorted(measured)
    costs = [measured[n] for n in rows]
    passes = sum(
        rounds * float(np.interp(nodes, rows, costs)) for nodes, rounds in sizes(run).items()
    )
    return run["tokens"] * costs[0] / (passes + run["draft_seconds"])


def sizes(run: dict) -> dict[int, int]:
    """Rounds of a run by the nodes of their tree; none where no tree was verified."""
    found = {int(nodes): rounds for nodes, rounds in run["sizes"].items()}
    return found if max(found, default=1) > 1 else {}


def tokens_per_round(runs: list[dict]) -> float:
    return sum(run["tokens"] for run in runs) / sum(run["rounds"] for run in runs)
