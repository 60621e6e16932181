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

from .heads_table import table
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
    lines = [
        "| method | speed ratio | tokens per round | of the bound | draft | verify | rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, runs in by(result["runs"], "method").items():
        if method == BASE:
            continue
        total = sum(run["decode_seconds"] for run in runs)
        draft, verify = (
            sum(run[f"{k}_seconds"] for run in runs) / total for k in ("draft", "verify")
        )
        reached = efficiency(result, method)
        lines.append(
            f"| {method} | {_middle(ratios(result, method).values())} "
            f"| {tokens_per_round(runs):.2f} "
            f"| {'' if reached is None else f'{reached:.1%}'} "
            f"| {draft:.1%} | {verify:.1%} | {1 - draft - verify:.1%} |"
        )
    return lines


def _category_table(result: dict) -> list[str]:
    methods = [m for m in by(result["runs"], "method") if m != BASE]
    lines = [f"| category | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    means = {method: category_ratios(result, method) for method in methods}
    for category, runs in by(result["runs"], "category").items():
        cells = []
        for method in methods:
            own = [run for run in runs if run["method"] == method]
            ratio = means[method].get(category)  # none where every text ended at once
            cells.append("" if ratio is None else f"{ratio:.2f} ({tokens_per_round(own):.2f})")
        lines.append(f"| {category} | {' | '.join(cells)} |")
    cells = [
        f"{statistics.geometric_mean(means[m].values()):.2f}" if means[m] else "" for m in methods
    ]
    lines.append(f"| geometric mean | {' | '.join(cells)} |")
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


def acceptance_tables(result: dict, name: str) -> str:
    """Markdown of an acceptance benchmark: the shapes of trees at equal rows, over all prompts."""
    lines = [headline(result, name)]
    for temp, found in result["temps"].items():
        yields = found["all"]
        budgets = [n for n in ("2", "4", "6", "8", "12", "16", "24", "32") if n in yields["best"]]
        lines += [
            "", "Greedy:" if float(temp) == 0 else f"Temperature {temp}:", "",
            f"| tokens per round at N rows | {' | '.join(budgets)} |",
            f"|---|{'---|' * len(budgets)}",
        ]  # fmt: skip
        for shape, title in (("chain", "one beam"), ("best", "the likeliest nodes")):
            cells = (f"{yields[shape][n]:.2f}" if n in yields[shape] else "" for n in budgets)
            lines.append(f"| {title} | {' | '.join(cells)} |")
        beams = ", ".join(
            f"{setting} {entry['tokens_per_round']:.2f} at {entry['rows']:.1f} rows "
            f"(-{1 - entry['rows'] / entry['rows_unshared']:.0%} by shared prefixes)"
            for setting, entry in yields["beams"].items()
            if setting in result["shown"]
        )
        lines += ["", f"All beams and nothing else: {beams}."]
    return "\n".join(lines)


def cost_tables(result: dict, name: str) -> str:
    """Markdown of a measured cost curve: passes over that of one row."""
    curve = result["curve"]
    lines = [
        headline(result, name), "",
        f"| context | {' | '.join(map(str, curve['rows']))} rows |",
        f"|---|{'---|' * len(curve['rows'])}",
    ]  # fmt: skip
    for context, seconds in zip(curve["contexts"], curve["seconds"], strict=True):
        cells = (f"{s / seconds[0]:.2f}" for s in seconds)
        lines.append(f"| {context} ({1e3 * seconds[0]:.1f} ms) | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{line}" for line in result["complaints"])])


def memory_tables(result: dict, name: str) -> str:
    """Markdown of a memory benchmark."""
    lines = [
        headline(result, name), "",
        "| context | method | peak | target + head + KV cache | more |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for run in result["runs"]:
        held = result["target"] + result["head"] + run["kv_cache"]
        lines.append(
            f"| {run['context']} | {run['method']} | {run['peak'] / 1e6:.0f} MB "
            f"| {held / 1e6:.0f} MB | {run['peak'] / held - 1:+.1%} |"
        )
    return "\n".join(lines)


def context_tables(result: dict, name: str) -> str:
    """Markdown of the benchmark over context lengths: speed over plain decoding."""
    methods = [m for m in result["methods"] if m != PLAIN]
    lines = [
        headline(result, name), "",
        f"| context | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}",
    ]  # fmt: skip
    for context, rates in result["rates"].items():
        plain = statistics.median(rates[PLAIN])
        cells = (f"{statistics.median(rates[m]) / plain:.2f}" for m in methods)
        lines.append(f"| {context} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Cells: speed over our own plain decoding."])


def policy_tables(result: dict, name: str) -> str:
    """Markdown of the replay of recorded drafts: auto beside the best fixed setting."""
    drafters = result["speeds"]
    lines = [
        headline(result, name), "",
        "| | " + " | ".join(f"{d}: auto | best fixed | unseen" for d in drafters) + " |",
        "|---" * (1 + 3 * len(drafters)) + "|",
    ]  # fmt: skip
    for group in next(iter(drafters.values())):
        found = [speeds[group] for speeds in drafters.values()]
        cells = [
            f"{f['auto']:.3f} | {f['best']:.3f} ({f['setting']}) | "
            + (f"{f['unseen']:.3f}" if "unseen" in f else "")  # of one text there are no others
            for f in found
        ]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    notes = (
        "Cells: speed over plain decoding (nodes of beams). Best fixed: the best of all for these "
        "texts, known afterwards. Unseen: in each text the one that is best in the others."
    )
    return "\n".join([*lines, "", notes])


def first_run_tables(result: dict, name: str) -> str:
    """Markdown of runs in processes of their own: auto over plain and over fixed settings."""
    runs = result["runs"]
    plain, first, *others = runs[0]["speeds"]
    ratio = lambda run, method, base=plain: run["speeds"][method] / run["speeds"][base]
    texts = [run for run in runs if run["category"] != "readme"]
    mean = lambda values: statistics.geometric_mean(list(values))
    fixed = [method for method in others if method.startswith("--")]
    lines = [
        headline(result, name), "",
        "| prompt | tokens | " + " | ".join([first, *others]) + " | look |",
        "|---" * (3 + 1 + len(others)) + "|",
    ]  # fmt: skip
    for run in runs:
        cells = " | ".join(f"{ratio(run, method):.2f}" for method in (first, *others))
        lines.append(f"| {run['id']} | {run['tokens']} | {cells} | {run['look_seconds']:.1f} s |")
    means = {method: mean(ratio(run, method) for run in texts) for method in (first, *others)}
    cells = " | ".join(f"**{value:.3f}**" for value in means.values())
    lines += [f"| geometric mean | | {cells} | |", ""]
    differ = [run["id"] for run in runs if run["texts"] > 1]
    lines.append(f"Texts that differ between methods: {', '.join(differ) or 'none'}.")
    if fixed:
        best = max(fixed, key=means.get)
        for method in (first, *(m for m in others if m not in fixed)):
            each = mean(
                ratio(run, method) / max(1.0, *(ratio(run, f) for f in fixed)) for run in texts
            )
            lowest = min(ratio(run, method) for run in texts)
            lines.append(
                f"{method}: {each:.3f} of the best of plain and fixed settings for each text, "
                f"{means[method] / means[best]:.3f} of the best for all ({best}), "
                f"{lowest:.2f} of plain in the slowest text."
            )
    lines.append(
        "Cells: speed over plain decoding. Look: before the first token, not in the speed."
    )
    return "\n".join(lines)


def gpu_table(result: dict) -> str:
    """Markdown of the benchmark of a GPU: starts, prices and speeds in one table."""
    where, gpu = result["machine"], result["gpu"]
    passes = {int(rows): seconds for rows, seconds in gpu["passes"].items()}
    lines = [
        f"{where['chip']}, mlx {where['mlx']} on {where['device']}, commit {where['commit']}, "
        f"{where['date']}, target {result['settings']['model']}", "",
        "| what | |",
        "|---|---|",
    ]  # fmt: skip
    lines += [
        f"| `{words}`: seconds to the second token, first and second start | "
        f"{' / '.join(f'{seconds:.1f}' for seconds in starts)} |"
        for words, starts in gpu["starts"].items()
    ]
    rows = " / ".join(map(str, passes))
    costs = " / ".join(f"{seconds / passes[1]:.2f}" for seconds in passes.values())
    lines.append(f"| a pass over {rows} rows, over a plain round of {passes[1]:.4f} s | {costs} |")
    share = gpu["draft"] / passes[16]
    lines.append(f"| a full search, over a pass of 16 rows | {share:.2f} |")
    for temp in sorted({run["temp"] for run in result["runs"]}):
        part = at_temperature(result, temp)
        for method in by(part["runs"], "method"):
            if method != BASE:
                mean = statistics.geometric_mean(ratios(part, method).values())
                own = [run for run in part["runs"] if run["method"] == method]
                lines.append(
                    f"| {method}, temperature {temp:g}: speed over mlx-lm (tokens a round) | "
                    f"{mean:.2f} ({tokens_per_round(own):.2f}) |"
                )
    differ = "; ".join(result["differences"]) or "none"
    return "\n".join([*lines, f"| texts that differ from plain decoding | {differ} |"])


def hybrid_tables(result: dict, name: str) -> str:
    """Markdown of the benchmark of a model with recurrent layers."""
    seconds, memory = result["seconds"], result["memory"]
    lines = [
        headline(result, name), "",
        "| rows | mlx-lm's own | chain | tree | commit of a chain | commit of a tree "
        "| memory: mlx-lm's own, chain, tree |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for rows in sorted(result["settings"]["rows"]):
        stock = seconds[f"mlx-lm {rows}"]
        cells = [f"{rows}", f"{1000 * stock:.0f} ms"]
        for kind in ("chain", "tree"):
            own = seconds.get(f"{kind} {rows}")
            cells.append("" if own is None else f"{own / stock:.2f}")
        for kind in ("chain", "tree"):
            own = seconds.get(f"commit of a {kind} {rows}")
            cells.append("" if own is None else f"{own / seconds[f'{kind} {rows}']:.1%}")
        used = [memory.get(f"{kind} {rows}") for kind in ("mlx-lm", "chain", "tree")]
        cells.append(", ".join(f"{x / 1e6:.0f} MB" for x in used if x is not None))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Chain and tree: over the same rows in mlx-lm's own layers. Commit: of the pass."]
    return "\n".join(lines)


def heads_tables(result: dict, name: str) -> str:
    """Markdown of the comparison of heads."""
    return f"{headline(result, name)}\n\n{table(result)}"


FLAGS = (
    "prompts", "per_category", "max_tokens", "repeats", "drafter", "drafters", "draft_model",
    "rules", "budgets", "temps", "contexts", "reference",
    "temp", "useless", "layers", "context",
)  # fmt: skip
"""Of the benchmarks, as far as they have them: those that tables name."""


def command(result: dict, name: str) -> str:
    """What made a result."""
    settings, shown = result["settings"], []
    for flag in FLAGS:
        given = settings.get(flag)
        values = given if isinstance(given, list) else [given]
        if given is True:
            values = []
        elif not given or given == ["match"]:
            continue
        elif flag == "prompts":
            values = [Path(path).name for path in values]
        texts = (f"{x:g}" if isinstance(x, float) else str(x) for x in values)
        shown.append(" ".join((f"--{flag.replace('_', '-')}", *texts)))
    return f"python -m benchmarks.{result['kind']} {' '.join(shown)} --output {name}"


def headline(result: dict, name: str) -> str:
    """The command that made a result, and where it ran."""
    where = result["machine"]
    return (
        f"`{command(result, name)}` at commit {where['commit']}, "
        f"{where['date']}: {where['chip']}, mlx {where['mlx']} on {where['device']}, target "
        f"{result['settings']['model']}."
    )


def summary(results: list[tuple[str, dict]]) -> str:
    """Markdown: for each machine a table with a row for each method, and what made it.

    results  (name of the JSON file, document); what stands before the first dot is the machine's
    """
    shown = [(name, result) for name, result in results if result["kind"] in _SUMMARIES]
    machines: dict[str, list[tuple[int, str, dict]]] = {}
    for number, (name, result) in enumerate(shown, start=1):
        machines.setdefault(name.split(".")[0], []).append((number, name, result))
    return "\n\n".join(_summary(machine, runs) for machine, runs in machines.items())


def _summary(machine: str, results: list[tuple[int, str, dict]]) -> str:
    chips = dict.fromkeys(result["machine"]["chip"] for _, _, result in results)
    lines = [
        f"{machine}: {', '.join(chips)}",
        "",
        "| | `--drafter` | prompts | speed | lowest to highest task | tokens per round |",
        "|---|---|---|---|---|---|",
    ]
    commands = []
    for number, name, result in results:
        commands.append(f"{number}. `{command(result, name)}` ({result['machine']['commit']})")
        settings = result["settings"]
        prompts = len({run["prompt"] for run in result["runs"]})
        where = f"{prompts} of {Path(settings['prompts']).stem}, {settings['max_tokens']} tokens"
        for method, speeds, tokens in _SUMMARIES[result["kind"]](result):
            low, high = min(speeds.values()), max(speeds.values())
            lines.append(
                f"| {number} | {method} | {where} "
                f"| **{statistics.geometric_mean(speeds.values()):.2f}** "
                f"| {f'{low:.2f} to {high:.2f}' if len(speeds) > 1 else ''} | {tokens:.2f} |"
            )
    return "\n".join([*lines, "", *commands])


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
    from .drafters import ratios as drafter_ratios  # it imports this module

    categories = list(by(result["runs"], "category"))
    for method, runs in by(result["runs"], "method").items():
        if not method.startswith(PLAIN):
            speeds = dict(zip(categories, drafter_ratios(result, method, categories), strict=True))
            yield method, speeds, tokens_per_round(runs)


_SUMMARIES = {"speed": _speeds, "drafters": _drafter_speeds}


def drafter_tables(result: dict, name: str) -> str:
    """Markdown of the benchmark of drafters and rules."""
    from .drafters import tables  # it imports this module

    return tables(result, name)


TABLES = {
    "speed": speed_tables,
    "drafters": drafter_tables,
    "acceptance": acceptance_tables,
    "cost_curve": cost_tables,
    "memory": memory_tables,
    "long_context": context_tables,
    "policy": policy_tables,
    "first_run": first_run_tables,
    "hybrid": hybrid_tables,
    "heads": heads_tables,
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
    """Markdown: what the default drafter gives, a row for each run of it."""
    lines = [
        "| machine | prompts | speed | tokens per round |",
        "|---|---|---|---|",
    ]
    for name, result in results:
        if result["kind"] != "speed":
            continue
        settings, machine = result["settings"], result["machine"]["chip"]
        prompts = len({run["prompt"] for run in result["runs"]})
        where = f"{prompts} of {Path(settings['prompts']).stem}, {settings['max_tokens']} tokens"
        for method, speeds, tokens in _speeds(result):
            if method == "auto":
                mean = statistics.geometric_mean(speeds.values())
                cores = name.split(".")[0].split("-")[2]
                lines.append(f"| {machine}, {cores} | {where} | **{mean:.2f}** | {tokens:.2f} |")
    return "\n".join(lines)


def with_tables(page: str, tables: str, what: str = "results") -> str:
    """The page with what stands between its marks replaced."""
    begin, end = (f"<!-- {what}: {which} -->" for which in ("begin", "end"))
    before, rest = page.split(begin)
    return f"{before}{begin}\n{tables}\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """The pages with tables, as the results say."""
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
