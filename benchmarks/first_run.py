"""What the user of a single question sees: a process for each answer, nothing known before.

    python -m benchmarks.first_run --output first_run.json
    python -m benchmarks.first_run --useless --fixed --output useless.json

For each prompt `generate` runs in processes of its own, in turn: plain decoding, --budget auto with
an empty temporary directory and a cache directory that holds only the model's conversion and the
BLAS, auto once more with what that left, and fixed settings. Speeds are tokens per second of
decoding, as the command prints them, over those of plain decoding of the same prompt, which runs
twice, first and last. Beside them the seconds of whole processes, from the command to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from redrafter_mlx.drafters.checkpoint import save_head
from redrafter_mlx.machine.storage import CACHE_VARIABLE, cache_directory

from . import prompts as prompt_files
from .machine import RANDOM, Bench, document, machine, parser, publish, write
from .tables import first_run_tables

PLAIN, FIRST, SECOND = "plain", "auto", "auto, second run"
FIXED = (
    "--budget 4",
    "--budget 8",
    "--budget 16",
    "--budget 32",
    "--budget 8 --beam-width 2 --beam-length 3",
    "--budget 16 --beam-width 2 --beam-length 4",
)
"""Settings that a user might find by trial."""
README = "Why is the sky blue?"


class Machine:
    """The caller's machine, with nothing learned on it yet."""

    def __init__(self, root: Path):
        self.cache, self.temporary = root / "cache", root / "tmp"
        self.cache.mkdir()
        for kept in ("models", "blas"):
            if (cache_directory() / kept).exists():
                (self.cache / kept).symlink_to(cache_directory() / kept)

    def run(self, words: Sequence[str]) -> dict:
        """The output of `generate --json`, and the `seconds` that it took."""
        self.temporary.mkdir(exist_ok=True)
        places = {CACHE_VARIABLE: str(self.cache), "TMPDIR": str(self.temporary)}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "redrafter_mlx.generate", "--json", *words],
            capture_output=True, text=True, env={**os.environ, **places}, check=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        shutil.rmtree(self.temporary)
        if done.returncode:
            raise SystemExit(f"generate {' '.join(words)} failed: {done.stderr.strip()}")
        return {**json.loads(done.stdout), "seconds": seconds}

    def forget(self) -> None:
        """Delete what is known of costs, drafts and the model's trees."""
        for known in ("profiles", "probes"):
            shutil.rmtree(self.cache / known, ignore_errors=True)


def useless_head(model: str, directory: Path) -> str:
    """A head of the demo head's shape and random weights, as --drafter takes it."""
    head = Bench(model, [RANDOM]).drafters[RANDOM]
    directory.mkdir()
    save_head(directory, head.head, head.d2t, mx.float32)
    return str(directory)


def measure(here: Machine, prompt: str, flags: argparse.Namespace) -> dict:
    """All runs of one prompt."""
    words = ["--model", flags.model, "--prompt", prompt, "--max-tokens", str(flags.max_tokens)]
    words += ["--temp", str(flags.temp), "--seed", "0"] if flags.temp else []
    drafted = [*words, "--drafter", flags.drafter]
    here.forget()
    runs = {PLAIN: [here.run([*words, "--no-draft"])]}
    runs[FIRST] = [here.run(drafted)]
    runs[SECOND] = [here.run(drafted)]
    for setting in flags.fixed:
        runs[setting] = [here.run([*drafted, *setting.split()])]
    runs[PLAIN].append(here.run([*words, "--no-draft"]))
    texts = {tuple(run["tokens"]) for each in runs.values() for run in each}
    return {
        "tokens": len(runs[PLAIN][0]["tokens"]),
        "texts": len(texts),
        "speeds": {
            method: statistics.mean(run["generation_tps"] for run in each)
            for method, each in runs.items()
        },
        "seconds": {
            method: statistics.mean(run["seconds"] for run in each) for method, each in runs.items()
        },
        "tokens_per_round": {
            method: each[0]["tokens_per_round"] for method, each in runs.items() if method != PLAIN
        },
        "mean_nodes": runs[FIRST][0]["mean_nodes"],
    }


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    flag = made.add_argument
    own = [prompt_files.OWN, prompt_files.MORE]
    flag("--prompts", type=Path, nargs="+", default=own, help="JSONL files in Spec-Bench's form")
    flag("--per-category", type=int, default=99, help="prompts of each category of each file")
    flag("--max-tokens", type=int, default=128, help="of each answer")
    flag("--drafter", default="auto", help="as generate takes it")
    flag("--temp", type=float, default=0.0, help="temperature")
    flag("--useless", action="store_true", help="a head of random weights for a drafter")
    flag("--fixed", nargs="*", default=FIXED, help="settings to compare with")
    flags = made.parse_args(args)
    where = machine()
    chosen = [prompt_files.Prompt("readme", "readme", README)]
    for path in flags.prompts:
        chosen += prompt_files.read(path, flags.per_category)
    with tempfile.TemporaryDirectory() as root:
        here = Machine(Path(root))
        if flags.useless:
            flags.drafter = useless_head(flags.model, Path(root) / "head")
        shown = argparse.Namespace(**vars(flags))
        shown.prompts = [path.name for path in flags.prompts]
        shown.drafter = RANDOM if flags.useless else flags.drafter
        result = document("first_run", shown, where, runs=[])
        for i, prompt in enumerate(chosen, start=1):
            found = measure(here, prompt.text, flags)
            result["runs"].append({"id": prompt.id, "category": prompt.category, **found})
            write(result, flags.output)  # so far, in case of an interruption
            ratio = found["speeds"][FIRST] / found["speeds"][PLAIN]
            print(f"{i}/{len(chosen)} {prompt.id}: {ratio:.2f}", file=sys.stderr, flush=True)
    publish(result, flags.output, first_run_tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
