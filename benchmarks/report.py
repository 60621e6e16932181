"""Tables and pictures from the JSON that the benchmarks write.

python -m benchmarks.report benchmarks/results/NAME.json            # rewrites README.md's tables
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- speed tables: begin -->", "<!-- speed tables: end -->"


def speed_tables(result: dict) -> str:
    """Markdown of a speed benchmark: per method against the bound, and per category."""
    machine, settings = result["machine"], result["settings"]
    command = (
        f"python -m benchmarks.speed --prompts {Path(settings['prompts']).name} --per-category "
        f"{settings['per_category']} --max-tokens {settings['max_tokens']} "
        f"--repeats {settings['repeats']} --output NAME.json"
    )
    memory = result["memory"]
    held = memory["target"] + memory["head"] + memory["kv_cache"]
    differences = result["differences"] or ["none"]
    return "\n".join(
        [
            f"`{command}` at commit {machine['commit']}, {machine['date']}: {machine['chip']}, "
            f"mlx {machine['mlx']} on {machine['device']}, BLAS {machine['blas']}, mlx-lm "
            f"{machine['mlx_lm']}, target {settings['model']}, greedy. Medians over "
            f"{len(result['costs'])} prompts; ratios against mlx-lm on the same prompt.",
            "",
            *_method_table(result),
            "",
            *_category_table(result),
            "",
            f"Peak memory {memory['peak'] / 1e6:.0f} MB at {memory['prompt_tokens']} prompt "
            f"tokens; target + head + KV cache are {held / 1e6:.0f} MB "
            f"({memory['peak'] / held - 1:+.1%}). Texts that differ from plain decoding: "
            f"{'; '.join(differences)}.",
        ]
    )


def _method_table(result: dict) -> list[str]:
    lines = [
        "| method | speed ratio | tokens per round | of the bound | draft | verify | rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in _by(result["runs"], "method").items():
        if method == "mlx-lm":
            continue
        total = sum(run["decode_seconds"] for run in runs)
        draft, verify = (
            sum(run[f"{k}_seconds"] for run in runs) / total for k in ("draft", "verify")
        )
        reached = efficiency(result, method)
        lines.append(
            f"| {method} | {statistics.median(ratios(result, method).values()):.3f} "
            f"| {tokens_per_round(runs):.2f} "
            f"| {'' if reached is None else f'{reached:.1%}'} "
            f"| {draft:.1%} | {verify:.1%} | {1 - draft - verify:.1%} |"
        )
    return lines


def _category_table(result: dict) -> list[str]:
    methods = [m for m in _by(result["runs"], "method") if m != "mlx-lm"]
    lines = [f"| category | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    for category, runs in _by(result["runs"], "category").items():
        prompts = {run["prompt"] for run in runs}
        cells = []
        for method in methods:
            found = [r for p, r in ratios(result, method).items() if p in prompts]
            own = [run for run in runs if run["method"] == method]
            cells.append(f"{statistics.median(found):.2f} ({tokens_per_round(own):.2f})")
        lines.append(f"| {category} | {' | '.join(cells)} |")
    lines.append("")
    lines.append("Cells: speed ratio (tokens per round).")
    return lines


def ratios(result: dict, method: str) -> dict[str, float]:
    """Prompt id -> median rate of the method over mlx-lm's."""
    rates = defaultdict(lambda: defaultdict(list))
    for run in result["runs"]:
        rates[run["prompt"]][run["method"]].append(run["rate"])
    median = statistics.median
    return {p: median(r[method]) / median(r["mlx-lm"]) for p, r in rates.items()}


def efficiency(result: dict, method: str) -> float | None:
    """Median over prompts of the measured speed ratio over its bound; None without a drafter."""
    if not method.startswith("budget"):
        return None
    nodes = method.split()[1]
    reached = ratios(result, method)
    shares = []
    for cost in result["costs"]:
        runs = [
            run
            for run in result["runs"]
            if run["method"] == method and run["prompt"] == cost["prompt"]
        ]
        seconds = {str(n): t for n, t in cost["seconds"].items()}
        draft = statistics.median(run["draft_seconds"] / run["rounds"] for run in runs)
        bound = tokens_per_round(runs) * seconds["1"] / (seconds[nodes] + draft)
        shares.append(reached[cost["prompt"]] / bound)
    return statistics.median(shares)


def tokens_per_round(runs: list[dict]) -> float:
    return sum(run["tokens"] for run in runs) / sum(run["rounds"] for run in runs)


def _by(runs: list[dict], key: str) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for run in runs:
        groups[run[key]].append(run)
    return groups


def with_tables(readme: str, tables: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON written by benchmarks.speed")
    flags = parser.parse_args(args)
    tables = speed_tables(json.loads(flags.result.read_text(encoding="utf-8")))
    readme = README.read_text(encoding="utf-8")
    README.write_text(with_tables(readme, tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
