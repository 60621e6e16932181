"""Drafters and rules against plain decoding, in one process, interleaved.

    python -m benchmarks.drafters --drafters demo max_gram "union:[demo,max_gram]"
    python -m benchmarks.drafters --prompts benchmarks/copy_edit.jsonl --drafters max_gram auto
    python -m benchmarks.drafters --drafters demo --rules match rejection typical --temps 0.4 0.8 1
    python -m benchmarks.drafters --lookups

For each prompt plain decoding and every drafter with every rule and temperature run in the order
A B C ... and back. Beside each measured speed the tables show what the literature's formula
predicts (EWIF, where rows of a pass are free), the same with the measured cost of rows, and SWI.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass

from redrafter_mlx.config import (
    AUTO,
    DrafterOptions,
    DraftOptions,
    GenerationOptions,
    SamplingOptions,
    budget_size,
)
from redrafter_mlx.drafters.model import ModelDrafter
from redrafter_mlx.drafters.protocol import Combined, Drafter
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.drafters.suffixes import SuffixAutomaton
from redrafter_mlx.generation import Generation
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.stats import Stats
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.adapter import adapt

from . import prompts as prompt_files
from .drafters_table import tables
from .machine import Bench, add_prompts, document, machine, parser, publish, size
from .markdown import table
from .prompts import Prompt
from .ratios import PLAIN

LENGTHS = (100, 1000, 10_000, 100_000)
"""Lengths of the texts in which lookups are timed."""


@dataclass(frozen=True)
class Method:
    """A drafter (or `plain`) with a rule at a temperature."""

    drafter: str
    rule: str
    temp: float

    def __str__(self) -> str:
        rule = "" if self.rule == "match" else f" {self.rule}"
        lossy = " (lossy)" if self.rule == "typical" else ""
        return f"{self.drafter}{rule}{lossy}" + (f" at {self.temp:g}" if self.temp else "")

    @property
    def baseline(self) -> Method:
        """Plain decoding at the same temperature."""
        return Method(PLAIN, "match", self.temp)


@dataclass
class Run:
    """One method on one prompt.

    rate        tokens per second of decoding, including what a draft model has to read
    draft_runs  (passes, cost by size) of each model that drafted
    """

    prompt: str
    category: str
    method: str
    baseline: str
    tokens: int
    rate: float
    rounds: int
    nodes: int
    accepted_at: list[int]
    draft_seconds: float
    decode_seconds: float
    draft_runs: list[tuple[int, float]]


class DrafterBench(Bench):
    """The target, its drafters, and the methods to compare."""

    def __init__(self, flags: argparse.Namespace):
        cascade = {"cascade_k": flags.cascade_k, "lenience": flags.lenience}
        super().__init__(flags.model, flags.drafters, **cascade)
        self.flags = flags
        self.methods = [Method(PLAIN, "match", temp) for temp in flags.temps]
        for name in flags.drafters:
            self.methods += [Method(name, r, t) for r in flags.rules for t in flags.temps]

    def run(self, method: Method, prompt: Prompt, ids: list[int]) -> tuple[Run, list[int]]:
        run = Generation(
            self.model,
            ids,
            self.drafters.get(method.drafter),
            generation=GenerationOptions(max_tokens=self.flags.max_tokens),
            sampling=SamplingOptions(temp=method.temp, seed=self.flags.seed, rule=method.rule),
            draft=DraftOptions(budget=self.flags.budget),
            eos_token_ids=self.tokenizer.eos_token_ids,
        )
        tokens = [token.id for token in run]
        stats = run.stats
        return Run(
            prompt.id,
            prompt.category,
            str(method),
            str(method.baseline),
            len(tokens),
            stats.generation_tps,
            stats.rounds,
            stats.nodes,
            stats.accepted_at,
            stats.draft_seconds,
            stats.decode_seconds,
            self.draft_runs(self.drafters.get(method.drafter), stats),
        ), tokens

    def draft_runs(self, drafter: Drafter | None, stats: Stats) -> list[tuple[int, float]]:
        """Passes of each model within a drafter, and what one costs by its size."""
        if isinstance(drafter, Combined):
            return [run for part in drafter.members for run in self.draft_runs(part, stats)]
        if isinstance(drafter, ModelDrafter):
            return [(drafter.passes, size(drafter.model) / size(self.model))]
        if isinstance(drafter, RecurrentDrafter):
            steps = stats.rounds * (DraftOptions().beam_length - 1)
            return [(steps, size(drafter.head) / size(self.model))]
        return []  # Max-Gram: free by SWI's measure

    def costs(self, ids: list[int]) -> dict[int, float]:
        """Median seconds of verifying chains of N rows after `ids`, interleaved."""
        target = adapt(self.model)
        context = target.prefill(ids, chunk=512)
        seconds = defaultdict(list)
        for repeat in range(self.flags.cost_repeats):
            rows = self.flags.cost_rows
            for n in rows if repeat % 2 == 0 else rows[::-1]:
                tree = TokenTree.from_beams([[ids[-1]] * n])
                began = time.perf_counter()
                device.read(target.verify(context, tree).logits.argmax(axis=-1))
                seconds[n].append(time.perf_counter() - began)
        return {n: statistics.median(times) for n, times in seconds.items()}


def measure(bench: DrafterBench) -> dict:
    """All runs of all prompts, as the JSON document that the tables are made from."""
    flags = bench.flags
    measured_on = machine()  # first: files may be edited while it runs
    runs, costs, differences = [], [], []
    chosen = prompt_files.read(flags.prompts, flags.per_category)
    for i, prompt in enumerate(chosen):
        ids = bench.encode(prompt.text)
        if i == 0:
            for method in bench.methods:  # warm-up: kernels are compiled, memory is touched
                bench.run(method, prompt, ids)
        texts: dict[Method, list[int]] = {}
        for methods in [bench.methods, bench.methods[::-1]] * flags.repeats:
            for method in methods:
                run, texts[method] = bench.run(method, prompt, ids)
                runs.append(run)
        for method, tokens in texts.items():
            if method.rule == "match" and tokens != texts[method.baseline]:
                differences.append(f"{prompt.id} {method}")
        costs.append(bench.costs(ids))
        print(f"{i + 1}/{len(chosen)} {prompt.category} {prompt.id}", file=sys.stderr)
    return document(
        "drafters",
        flags,
        measured_on,
        differences=differences,
        costs=[{str(n): s for n, s in curve.items()} for curve in costs],
        runs=[asdict(run) for run in runs],
    )


def lookups() -> str:
    """Markdown: Max-Gram's time for adding a token and for a lookup, by the text's length."""
    rows = []
    rng = random.Random(0)
    texts = {
        "like words": lambda n: [int(rng.paretovariate(0.7)) % 49152 for _ in range(n)],
        "one token": lambda n: [7] * n,
    }
    for kind, make in texts.items():
        for n in LENGTHS:
            text, index = make(n), SuffixAutomaton()
            began = time.perf_counter()
            for token in text:
                index.append(token)
            built = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(1000):
                index.matches(text[:1])
            looked_up = time.perf_counter() - began
            rows.append([kind, n, f"{1e6 * built / n:.1f}", f"{1e3 * looked_up:.1f}"])
    return "\n".join(table(["text", "tokens", "microseconds per token", "per lookup"], rows))


def parse(args: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__.split("\n")[0])
    add_prompts(made)
    flag = made.add_argument
    flag(
        "--drafters", nargs="+", default=["demo", "max_gram", "union:[demo,max_gram]"],
        help="as --drafter, and random: a useless one",
    )  # fmt: skip
    flag("--cascade-k", help="K matrix of the cascades among the drafters")
    flag("--lenience", type=float, default=DrafterOptions.lenience, help="of the cascades")
    flag("--rules", nargs="+", default=["match"], help="as --rule")
    flag("--temps", type=float, nargs="+", default=[0.0], help="as --temp")
    flag("--seed", type=int, default=0, help="as --seed")
    flag("--budget", type=budget_size, default=AUTO, help="as --budget of generate")
    flag("--repeats", type=int, default=1, help="there-and-back passes over the methods")
    flag("--cost-rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 32], help="ascending")
    flag("--cost-repeats", type=int, default=10, help="how often each is timed")
    flag("--lookups", action="store_true", help="only time Max-Gram's index")
    return made.parse_args(args)


def main(args: list[str] | None = None) -> int:
    flags = parse(args)
    if flags.lookups:
        print(lookups())
        return 0
    publish(measure(DrafterBench(flags)), flags.output, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
