"""Markdown tables of the results of each kind of benchmark but speed and drafters."""

from __future__ import annotations

import statistics

from . import heads_table
from .headline import headline
from .markdown import table
from .ratios import BASE, PLAIN, at_temperature, by, ratios, tokens_per_round


def acceptance_tables(result: dict, name: str) -> str:
    """Markdown of an acceptance benchmark: the shapes of trees at equal rows, over all prompts."""
    lines = [headline(result, name)]
    for temp, found in result["temps"].items():
        yields = found["all"]
        budgets = [n for n in ("2", "4", "6", "8", "12", "16", "24", "32") if n in yields["best"]]
        rows = [
            [title, *(f"{yields[shape][n]:.2f}" if n in yields[shape] else "" for n in budgets)]
            for shape, title in (("chain", "one beam"), ("best", "the likeliest nodes"))
        ]
        lines += ["", "Greedy:" if float(temp) == 0 else f"Temperature {temp}:", ""]
        lines += table(["tokens per round at N rows", *budgets], rows)
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
    rows = [
        [f"{context} ({1e3 * seconds[0]:.1f} ms)", *(f"{s / seconds[0]:.2f}" for s in seconds)]
        for context, seconds in zip(curve["contexts"], curve["seconds"], strict=True)
    ]
    *sizes, last = curve["rows"]
    lines = [headline(result, name), "", *table(["context", *sizes, f"{last} rows"], rows)]
    return "\n".join([*lines, *(f"\n{line}" for line in result["complaints"])])


def memory_tables(result: dict, name: str) -> str:
    """Markdown of a memory benchmark."""
    rows = []
    for run in result["runs"]:
        peak, held = run["peak"], result["target"] + result["head"] + run["kv_cache"]
        sizes = f"{peak / 1e6:.0f} MB", f"{held / 1e6:.0f} MB", f"{peak / held - 1:+.1%}"
        rows.append([run["context"], run["method"], *sizes])
    header = ["context", "method", "peak", "target + head + KV cache", "more"]
    return "\n".join([headline(result, name), "", *table(header, rows)])


def context_tables(result: dict, name: str) -> str:
    """Markdown of the benchmark over context lengths: speed over plain decoding."""
    methods = [m for m in result["methods"] if m != PLAIN]
    rows = []
    for context, rates in result["rates"].items():
        plain = statistics.median(rates[PLAIN])
        rows.append([context, *(f"{statistics.median(rates[m]) / plain:.2f}" for m in methods)])
    lines = [headline(result, name), "", *table(["context", *methods], rows)]
    return "\n".join([*lines, "", "Cells: speed over our own plain decoding."])


def policy_tables(result: dict, name: str) -> str:
    """Markdown of the replay of recorded drafts: auto beside the best fixed setting."""
    drafters = result["speeds"]
    header, rows = [""], []
    for drafter in drafters:
        header += [f"{drafter}: auto", "best fixed", "unseen"]
    for group in next(iter(drafters.values())):
        cells = [group]
        for f in (speeds[group] for speeds in drafters.values()):
            cells += [f"{f['auto']:.3f}", f"{f['best']:.3f} ({f['setting']})"]
            cells.append(f"{f['unseen']:.3f}" if "unseen" in f else "")  # one text has no others
        rows.append(cells)
    lines = [headline(result, name), "", *table(header, rows)]
    notes = (
        "Cells: speed over plain decoding (nodes of beams). Best fixed: the best setting for these "
        "texts, known afterwards. Unseen: in each text the setting that is best in the others."
    )
    return "\n".join([*lines, "", notes])


def first_run_tables(result: dict, name: str) -> str:
    """Markdown of runs in processes of their own: auto over plain and over fixed settings."""
    runs = result["runs"]
    plain, first, *others = runs[0]["speeds"]
    # results of commits before 2026-11-29, which measured before the first word
    looks = lambda run: [f"{run['look_seconds']:.1f} s"] if "look_seconds" in run else []
    ratio = lambda run, method, base=plain: run["speeds"][method] / run["speeds"][base]
    texts = [run for run in runs if run["category"] != "readme"]
    mean = statistics.geometric_mean
    fixed = [method for method in others if method.startswith("--")]
    rows = []
    for run in runs:
        cells = (f"{ratio(run, method):.2f}" for method in (first, *others))
        rows.append([run["id"], run["tokens"], *cells, *looks(run)])
    means = {method: mean(ratio(run, method) for run in texts) for method in (first, *others)}
    look = [""] if looks(runs[0]) else []
    rows.append(["geometric mean", "", *(f"**{value:.3f}**" for value in means.values()), *look])
    header = ["prompt", "tokens", first, *others, *(["look"] if look else [])]
    lines = [headline(result, name), "", *table(header, rows), ""]
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
    if "seconds" in runs[0]:
        process = lambda method: mean(
            run["seconds"][plain] / run["seconds"][method] for run in texts
        )
        whole = ", ".join(f"{method} {process(method):.3f}" for method in (first, *others))
        taken = statistics.median(run["seconds"][plain] for run in texts)
        lines.append(
            f"Whole processes, of {taken:.1f} s with plain decoding (median), over it: {whole}."
        )
    lines.append(
        "Cells: speed over plain decoding."
        + " Look: before the first token, not in the speed." * len(look)
    )
    return "\n".join(lines)


def gpu_table(result: dict) -> str:
    """Markdown of the benchmark of a GPU: starts, prices and speeds in one table."""
    where, gpu = result["machine"], result["gpu"]
    passes = {int(rows): seconds for rows, seconds in gpu["passes"].items()}
    title = (
        f"{where['chip']}, mlx {where['mlx']} on {where['device']}, commit {where['commit']}, "
        f"{where['date']}, target {result['settings']['model']}"
    )
    rows = [
        [
            f"`{words}`: seconds to the second token, first and second start",
            " / ".join(f"{seconds:.1f}" for seconds in starts),
        ]
        for words, starts in gpu["starts"].items()
    ]
    sizes = " / ".join(map(str, passes))
    costs = " / ".join(f"{seconds / passes[1]:.2f}" for seconds in passes.values())
    rows.append([f"a pass over {sizes} rows, over a plain round of {passes[1]:.4f} s", costs])
    rows.append(["a full search, over a pass of 16 rows", f"{gpu['draft'] / passes[16]:.2f}"])
    for temp in sorted({run["temp"] for run in result["runs"]}):
        part = at_temperature(result, temp)
        for method in by(part["runs"], "method"):
            if method != BASE:
                mean = statistics.geometric_mean(ratios(part, method).values())
                own = [run for run in part["runs"] if run["method"] == method]
                what = f"{method}, temperature {temp:g}: speed over mlx-lm (tokens a round)"
                rows.append([what, f"{mean:.2f} ({tokens_per_round(own):.2f})"])
    differ = "; ".join(result["differences"]) or "none"
    rows.append(["texts that differ from plain decoding", differ])
    return "\n".join([title, "", *table(["what", ""], rows)])


def hybrid_tables(result: dict, name: str) -> str:
    """Markdown of the benchmark of a model with recurrent layers."""
    seconds, memory = result["seconds"], result["memory"]
    header = ["rows", "mlx-lm's own", "chain", "tree", "commit of a chain", "commit of a tree"]
    header.append("memory: mlx-lm's own, chain, tree")
    lines = []
    for rows in sorted(result["settings"]["rows"]):
        stock = seconds[f"mlx-lm {rows}"]
        cells = [rows, f"{1000 * stock:.0f} ms"]
        for kind in ("chain", "tree"):
            own = seconds.get(f"{kind} {rows}")
            cells.append("" if own is None else f"{own / stock:.2f}")
        for kind in ("chain", "tree"):
            own = seconds.get(f"commit of a {kind} {rows}")
            cells.append("" if own is None else f"{own / seconds[f'{kind} {rows}']:.1%}")
        used = [memory.get(f"{kind} {rows}") for kind in ("mlx-lm", "chain", "tree")]
        cells.append(", ".join(f"{x / 1e6:.0f} MB" for x in used if x is not None))
        lines.append(cells)
    note = "Chain and tree: over the same rows in mlx-lm's own layers. Commit: of the pass."
    return "\n".join([headline(result, name), "", *table(header, lines), "", note])


def heads_tables(result: dict, name: str) -> str:
    """Markdown of the comparison of heads."""
    return f"{headline(result, name)}\n\n{heads_table.table(result)}"


def decay_tables(result: dict, name: str) -> str:
    """Markdown of tokens a round along a long text."""
    stretch, rows = result["settings"]["stretch"], result["tokens_per_round"]
    ends = [stretch * number for number in range(1, 1 + max(map(len, rows.values())))]
    lines = [
        headline(result, name), "",
        f"| tokens a round up to token | {' | '.join(f'{end:,}' for end in ends)} |",
        f"|---|{'---|' * len(ends)}",
        *(f"| {name} | {' | '.join(f'{x:.2f}' for x in row)} |" for name, row in rows.items()),
        "", f"{'The same text' if result['same_text'] else 'OTHER TEXTS'} with all of them.",
    ]  # fmt: skip
    return "\n".join(lines)


def serving_tables(result: dict, name: str) -> str:
    """Markdown of the benchmark of servers."""
    loads = [
        [
            row["clients"], row["server"], f"{row['tokens'] / row['seconds']:.1f}",
            f"{row['first_word']:.2f} s", f"{row['last_word']:.2f} s",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    follow_ups = [
        [server, *(f"{each[when]['first']:.2f} s" for when in ("cold", "warm"))]
        for server, each in result["follow_up"].items()
    ]
    lines = [
        headline(result, name), "",
        *table(["clients", "server", "tokens/s", "first word", "whole answer"], loads), "",
        *table(["after a long history", "first word, cold", "warm"], follow_ups), "",
        f"Answers that differ from those alone: {result['other texts']}.",
    ]  # fmt: skip
    return "\n".join(lines)
