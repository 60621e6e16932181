"""All commands under one name: redrafter-mlx COMMAND ..., or python -m redrafter_mlx COMMAND ..."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

from redrafter_mlx import cli

NAME = "redrafter-mlx"
COMMANDS = {
    "generate": ("generate", "answer one prompt"),
    "chat": ("chat.__main__", "talk with a model in the terminal"),
    "serve": ("server.__main__", "answer OpenAI's and Anthropic's requests over HTTP, with a page"),
    "train": ("train", "teach a draft head what a model says"),
    "convert": ("convert.__main__", "draft heads of other frameworks, and back; GGUF files"),
    "tune": ("tune", "measure in detail what drafting gives on this machine"),
    "doctor": ("doctor", "say in a minute whether drafting helps here"),
    "bench": ("benchmarks", "measure: " + NAME + " bench lists the benchmarks"),
}
BENCHMARKS = {
    "speed": "drafters and budgets against mlx-lm, prompt by prompt",
    "drafters": "drafters and rules against plain decoding",
    "acceptance": "tokens per round by beams and budgets",
    "cost_curve": "what passes over several rows cost",
    "memory": "memory of caches and drafts",
    "long_context": "speeds by the length of the text",
    "first_run": "a process for each answer, nothing known before",
    "heads": "kinds of draft heads, trained and measured beside each other",
    "machines": "what acceptance would give on other machines",
}


def main(args: list[str] | None = None) -> int:
    """Run the command that the first argument names; its exit code."""
    args = sys.argv[1:] if args is None else list(args)
    command = args.pop(0) if args else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"{NAME} {version(NAME)}")
        return 0
    if command not in COMMANDS:
        return _unknown(f"{command!r} is not a command", COMMANDS)
    module = COMMANDS[command][0]
    if command == "bench":
        if not args or args[0] in ("-h", "--help"):
            print(_listed(f"usage: {NAME} bench BENCHMARK ...", BENCHMARKS))
            return 0
        if args[0] not in BENCHMARKS:
            return _unknown(f"{args[0]!r} is not a benchmark", BENCHMARKS)
        command = f"bench {args[0]}"
        module = f"{module}.{args.pop(0)}"
    cli.called_as = sys.argv[0] = f"{NAME} {command}"
    return importlib.import_module(f"redrafter_mlx.{module}").main(args)


def _help() -> str:
    return _listed(
        f"usage: {NAME} [--version] COMMAND ...\n\n"
        "Language models on your own Mac: faster, with the same words.",
        {name: told for name, (_, told) in COMMANDS.items()},
        f"{NAME} COMMAND --help tells more.",
    )


def _listed(head: str, entries: dict[str, str], foot: str = "") -> str:
    width = max(map(len, entries))
    lines = [f"  {name:<{width}}  {told}" for name, told in entries.items()]
    return "\n".join([head, "", *lines, *(["", foot] if foot else [])])


def _unknown(what: str, known: dict) -> int:
    print(f"{NAME}: error: {what}; there are: {', '.join(known)}", file=sys.stderr)
    return cli.USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
