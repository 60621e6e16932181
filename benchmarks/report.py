"""Tables and pictures from the JSON that the benchmarks write.

python -m benchmarks.report   # from benchmarks/results/*.json, into README.md, docs/ and RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from redrafter_mlx.measuring.picture import new_figure

from . import drafters_table
from .headline import command
from .markdown import table
from .ratios import (
    BASE,
    PLAIN,
    at_temperature,
    by,
    category_ratios,
    efficiency,
    ratios,
    tokens_per_round,
)
from .tables import (
    acceptance_tables,
    context_tables,
    cost_tables,
    decay_tables,
    first_run_tables,
    heads_tables,
    hybrid_tables,
    memory_tables,
    policy_tables,
    serving_tables,
)

ROOT = Path(__file__).parent.parent
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
DETAILS = Path(__file__).parent / "RESULTS.md"
RESULTS = Path(__file__).parent / "results"
AUTO = "budget auto"


def speed_tables(result: dict, name: str) -> str:
    """Markdown of a speed benchmark: per method against the bound, and per category.

    name  of the JSON file
    """
    where, settings = result["machine"], result["settings"]
    memory = result["memory"]
    held = memory["target"] + memory["head"] + memory["kv_cache"]
    temps = sorted({run.get("temp", 0.0) for run in result["runs"]})
    lines = [
        f"`{command(result, name)}` at commit {where['commit']}, {where['date']}: {where['chip']}, "
        f"mlx {where['mlx']} on {where['device']}, BLAS {where['blas']}, mlx-lm "
        f"{where['mlx_lm']}, target {settings['model']}. Medians over "
        f"{len(result['costs'])} prompts, with the middle half of them; ratios against mlx-lm on "
        "the same prompt.",
    ]
    for temp in temps:
        part = at_temperature(result, temp)
        lines += ["", "Greedy:" if temp == 0 else f"Temperature {temp:g}:", ""]
        lines += [*_method_table(part), "", *_category_table(part)]
    lines += [
        "",
        f"Peak memory {memory['peak'] / 1e6:.0f} MB at {memory['prompt_tokens']} prompt "
        f"tokens; target + head + KV cache are {held / 1e6:.0f} MB "
        f"({memory['peak'] / held - 1:+.1%}). Texts that differ from plain decoding: "
        f"{'; '.join(result['differences'] or ['none'])}.",
    ]
    return "\n".join(lines)


def _method_table(result: dict) -> list[str]:
    header = "method", "speed ratio", "tokens per round", "of the bound", "draft", "verify", "rest"
    rows = []
    for method, runs in by(result["runs"], "method").items():
        if method == BASE:
            continue
        total = sum(run["decode_seconds"] for run in runs)
        draft, verify = (
            sum(run[f"{k}_seconds"] for run in runs) / total for k in ("draft", "verify")
        )
        reached = efficiency(result, method)
        rows.append([
            method, _middle(ratios(result, method).values()), f"{tokens_per_round(runs):.2f}",
            "" if reached is None else f"{reached:.1%}",
            f"{draft:.1%}", f"{verify:.1%}", f"{1 - draft - verify:.1%}",
        ])  # fmt: skip
    return list(table(header, rows))


def _category_table(result: dict) -> list[str]:
    methods = [m for m in by(result["runs"], "method") if m != BASE]
    rows = []
    means = {method: category_ratios(result, method) for method in methods}
    for category, runs in by(result["runs"], "category").items():
        cells = [category]
        for method in methods:
            own = [run for run in runs if run["method"] == method]
            ratio = means[method].get(category)  # none where every text ended at once
            cells.append("" if ratio is None else f"{ratio:.2f} ({tokens_per_round(own):.2f})")
        rows.append(cells)
    overall = (
        f"{statistics.geometric_mean(means[m].values()):.2f}" if means[m] else "" for m in methods
    )
    lines = list(table(["category", *methods], [*rows, ["geometric mean", *overall]]))
    lines += ["", "Cells: speed ratio, geometric mean over prompts (tokens per round)."]
    for auto in (method for method in methods if method.endswith(AUTO)):
        fixed = [m for m in methods if m != auto and m.startswith(auto.removesuffix(AUTO) + "b")]
        shares = [
            means[auto][category] / max(means[m].get(category, 0.0) for m in [PLAIN, *fixed])
            for category in means[auto]
        ]
        if fixed and shares:
            lines[-1] += (
                f" {auto} reaches {min(shares):.1%} to {max(shares):.1%} of the best fixed budget "
                "of each category, plain decoding included."
            )
    return lines


def _middle(values: Iterable[float]) -> str:
    low, median, high = np.percentile(list(values), [25, 50, 75])
    return f"{median:.3f} ({low:.2f}-{high:.2f})"


def draw_speed(result: dict, path: Path) -> bool:
    """Bars of the speed ratio by category and method, with the spread over prompts, as PNG."""
    temps = sorted({run.get("temp", 0.0) for run in result["runs"]})
    figure = new_figure(11, 3.8 * len(temps))
    if figure is None:
        return False
    rows = figure.subplots(len(temps), 1, squeeze=False)[:, 0]
    for temp, axes in zip(temps, rows, strict=True):
        part = at_temperature(result, temp)
        methods = [m for m in by(part["runs"], "method") if m != BASE]
        categories = list(by(part["runs"], "category"))
        of = {run["prompt"]: run["category"] for run in part["runs"]}
        for i, method in enumerate(methods):
            found = ratios(part, method)
            values = [[r for p, r in found.items() if of[p] == c] for c in categories]
            middle = np.array([statistics.geometric_mean(v) if v else 0.0 for v in values])
            spread = [
                middle - [min(v, default=0.0) for v in values],
                [max(v, default=0.0) for v in values] - middle,
            ]
            place = np.arange(len(categories)) + (i + 0.5) / (len(methods) + 1)
            width = 1 / (len(methods) + 1)
            spread = np.maximum(spread, 0.0)  # of one prompt, rounded
            axes.bar(place, middle, width, yerr=spread, label=method, capsize=2)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(np.arange(len(categories)) + 0.45, categories)
        axes.set_ylabel("speed ratio to mlx-lm")
        axes.set_title("greedy" if temp == 0 else f"temperature {temp:g}")
    rows[0].legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def summary(results: list[tuple[str, dict]]) -> str:
    """Markdown: for each machine a table with a row for each method, and the commands.

    results  (name of the JSON file, document); the name up to its first dot is the machine's
    """
    shown = [(name, result) for name, result in results if result["kind"] in _SUMMARIES]
    machines: dict[str, list[tuple[int, str, dict]]] = {}
    for number, (name, result) in enumerate(shown, start=1):
        machines.setdefault(name.split(".")[0], []).append((number, name, result))
    return "\n\n".join(_summary(machine, runs) for machine, runs in machines.items())


def _summary(machine: str, results: list[tuple[int, str, dict]]) -> str:
    chips = dict.fromkeys(result["machine"]["chip"] for _, _, result in results)
    header = ["", "`--drafter`", "prompts", "speed", "lowest to highest task", "tokens per round"]
    rows, commands = [], []
    for number, name, result in results:
        commands.append(f"{number}. `{command(result, name)}` ({result['machine']['commit']})")
        settings = result["settings"]
        prompts = len({run["prompt"] for run in result["runs"]})
        where = f"{prompts} of {Path(settings['prompts']).stem}, {settings['max_tokens']} tokens"
        for method, speeds, tokens in _SUMMARIES[result["kind"]](result):
            mean, spread = _mean_and_spread(speeds)
            spread = spread if len(speeds) > 1 else ""
            rows.append([number, method, where, mean, spread, f"{tokens:.2f}"])
    lines = [f"{machine}: {', '.join(chips)}", "", *table(header, rows), "", *commands]
    return "\n".join(lines)


def _mean_and_spread(speeds: dict[str, float]) -> tuple[str, str]:
    """Cells: the geometric mean over categories, and the lowest to the highest one."""
    mean = statistics.geometric_mean(speeds.values())
    return f"**{mean:.2f}**", f"{min(speeds.values()):.2f} to {max(speeds.values()):.2f}"


def _speeds(result: dict):
    """(method, speed by category, tokens per round) of a speed benchmark's drafted methods."""
    for temp in sorted({run["temp"] for run in result["runs"]}):
        part = at_temperature(result, temp)
        for method, runs in by(part["runs"], "method").items():
            speeds = category_ratios(part, method)
            if method not in (BASE, PLAIN) and speeds:
                at = f", temperature {temp:g}" if temp else ""
                name = method.removeprefix("drafter ").removesuffix(f", {AUTO}")
                yield name + at, speeds, tokens_per_round(runs)


def _drafter_speeds(result: dict):
    """The same of a benchmark of drafters and rules."""
    categories = list(by(result["runs"], "category"))
    for method, runs in by(result["runs"], "method").items():
        if not method.startswith(PLAIN):
            speeds = dict(
                zip(categories, drafters_table.ratios(result, method, categories), strict=True)
            )
            yield method, speeds, tokens_per_round(runs)


_SUMMARIES = {"speed": _speeds, "drafters": _drafter_speeds}


TABLES = {
    "speed": speed_tables,
    "drafters": drafters_table.tables,
    "acceptance": acceptance_tables,
    "cost_curve": cost_tables,
    "memory": memory_tables,
    "long_context": context_tables,
    "policy": policy_tables,
    "first_run": first_run_tables,
    "hybrid": hybrid_tables,
    "heads": heads_tables,
    "decay": decay_tables,
    "serving": serving_tables,
}
"""By the `kind` of a document."""


def read(directory: Path) -> list[tuple[str, dict]]:
    """(file name, document) of all results: by machine, by kind, the main result first."""
    paths, kinds = directory.glob("*.json"), list(TABLES)
    results = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def place(name: str, result: dict):
        return name.split(".")[0], kinds.index(result["kind"]), name.count("."), name

    return sorted(results, key=lambda entry: place(*entry))


def details(results: list[tuple[str, dict]]) -> str:
    """Markdown: the tables of all results."""
    return "\n\n".join(f"## {name}\n\n{TABLES[r['kind']](r, name)}" for name, r in results)


def short(results: list[tuple[str, dict]]) -> str:
    """Markdown: speeds of the default drafter, from the largest run of each machine and model."""
    largest: dict[tuple[str, str], tuple[int, list[str]]] = {}
    for name, result in results:
        if result["kind"] != "speed":
            continue
        settings, prefix = result["settings"], name.split(".")[0]
        prompts = len({run["prompt"] for run in result["runs"]})
        for method, speeds, tokens in _speeds(result):
            if method == "auto" and prompts > largest.get((prefix, settings["model"]), (0,))[0]:
                where = f"{result['machine']['chip']}, {prefix.split('-')[2]}"
                asked = f"{prompts} of {Path(settings['prompts']).stem}"
                asked += f", {settings['max_tokens']} tokens"
                row = [where, settings["model"], asked, *_mean_and_spread(speeds), f"{tokens:.2f}"]
                largest[prefix, settings["model"]] = prompts, row
    header = ["machine", "model", "prompts", "speed", "by task", "tokens per round"]
    return "\n".join(table(header, (row for _, row in largest.values())))


def with_tables(page: str, tables: str, what: str = "results") -> str:
    """The page, with the text between its marks replaced."""
    begin, end = (f"<!-- {what}: {which} -->" for which in ("begin", "end"))
    before, rest = page.split(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """The pages that have tables, made from the results."""
    results = read(RESULTS)
    text = lambda page: page.read_text(encoding="utf-8")
    return {
        README: with_tables(text(README), short(results), "short results"),
        PERFORMANCE: with_tables(text(PERFORMANCE), summary(results)),
        DETAILS: with_tables(text(DETAILS), details(results)),
    }


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args(args)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
