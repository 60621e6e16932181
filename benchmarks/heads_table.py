"""The table and the picture of `benchmarks.heads`."""

from __future__ import annotations

from pathlib import Path

from redrafter_mlx.measuring.picture import new_figure

from . import markdown


def table(result: dict) -> str:
    """Markdown, the best head first."""
    heads = sorted(result["heads"], key=lambda head: -head["tree"]["16"])
    budgets = list(heads[0]["tree"])
    names = [
        "head", "M parameters", "MB", "MB in memory", "steps", "minutes x processes", "loss",
        "draft, ms", "top-1 by depth",
        *(f"tokens a round at {budget}" for budget in budgets), "chain",
    ]  # fmt: skip
    trained = lambda head: [
        f"{head['parameters'] / 1e6:.2f}", f"{head['bytes'] / 1e6:.1f}",
        f"{head['read_bytes'] / 1e6:.1f}",
        f"{head['steps']:,}", f"{head['seconds'] / 60:.1f} x {head['jobs']}",
        f"{head['loss']:.2f}",
    ]  # fmt: skip
    rows = [
        [
            head["name"], *(trained(head) if "steps" in head else [""] * 6),
            f"{head['draft_ms']:.1f}",
            " ".join(f"{share:.0%}" for share in head.get("recall", ())),
            *(f"{head['tree'][budget]:.2f}" for budget in budgets), f"{head['chain']:.2f}",
        ]
        for head in heads
    ]  # fmt: skip
    lines = [
        *markdown.table(names, rows),
        "",
        f"Replayed on {result['tokens']:,} held-out tokens, beams 4 x 5; a plain pass of the "
        f"target took {result['pass_ms']:.0f} ms beside the drafts.",
    ]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> bool:
    """Tokens per round by budget: lines for heads, dashed ones for others; False if not drawn."""
    figure = new_figure(10, 4.5)
    if figure is None:
        return False
    axes = figure.subplots()
    for head in sorted(result["heads"], key=lambda head: -head["tree"]["16"]):
        budgets = [int(budget) for budget in head["tree"]]
        label = f"{head['name']}, {head['draft_ms']:.0f} ms"
        style = "-" if "kind" in head else "--"
        axes.plot(budgets, list(head["tree"].values()), style, marker="o", label=label)
    axes.set(xlabel="nodes of the tree", ylabel="tokens a round", xscale="log")
    axes.set_xticks(budgets, budgets)
    axes.minorticks_off()
    figure.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
