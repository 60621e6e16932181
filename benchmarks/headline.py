"""How a result was made: the command, and where it ran."""

from __future__ import annotations

from pathlib import Path

FLAGS = (
    "prompts", "per_category", "max_tokens", "repeats", "drafter", "drafters", "draft_model",
    "rules", "budgets", "temps", "contexts", "reference",
    "temp", "useless", "layers", "context", "clients", "requests", "history",
)  # fmt: skip
"""The flags of benchmarks that tables name, as far as each has them."""
POSITIONAL = "what", "directory"


def command(result: dict, name: str) -> str:
    """The command that made a result."""
    settings = result["settings"]
    shown = [settings[word] for word in POSITIONAL if word in settings]
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
    return " ".join((f"python -m benchmarks.{result['kind']}", *shown, "--output", name))


def headline(result: dict, name: str) -> str:
    """The command that made a result, and where it ran."""
    where = result["machine"]
    return (
        f"`{command(result, name)}` at commit {where['commit']}, "
        f"{where['date']}: {where['chip']}, mlx {where['mlx']} on {where['device']}, target "
        f"{result['settings']['model']}."
    )
