"""Speed of drafted decoding against plain decoding, all in one process, interleaved.

    python -m benchmarks.speed                                    # this project's own prompts
    python -m benchmarks.speed --prompts question.jsonl --per-category 2 --output result.json
    python -m benchmarks.speed --drafters demo random --budgets auto 0 8 --temps 0 1
    python -m benchmarks.speed --draft-model PATH                 # also mlx-lm with a draft model

Methods: mlx-lm's stream_generate, without and with a draft model; our loop without a drafter; our
loop with each drafter at each budget, where budget 0 is the paper's: all beams, nothing else. For
each prompt and temperature they run in the order A B C ... and back, and texts that must be equal
are compared. In addition, after the same prompt and half of its answer, bare forward passes of
1 ... N causal rows with mlx-lm's own cache give cost(N), so that a measured speed can be compared
with what is possible:

    bound = tokens x cost(1) / (sum of cost(N) over the rounds + draft seconds)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

import redrafter_mlx
from redrafter_mlx.check import compare_with_plain
from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions, budget_size
from redrafter_mlx.generation import Generation
from redrafter_mlx.pricing.budget import Budget, FixedBudget
from redrafter_mlx.rounds.tree import Candidates, TokenTree

from . import prompts as prompt_files
from .machine import Bench, add_prompts, document, machine, parser, publish, size
from .prompts import Prompt
from .ratios import BASE, PLAIN
from .report import draw_speed, speed_tables

MLX_LM_DRAFT = f"{BASE} with a draft model"
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the bare passes, up to the largest tree; costs between them are interpolated."""


@dataclass(frozen=True)
class Method:
    """One way to generate: its name and, with a drafter of ours, which one and its options."""

    name: str
    drafter: str | None = None
    options: DraftOptions = field(default_factory=DraftOptions)
    budget: Budget | None = None


class UnsharedBeams(FixedBudget):
    """The reference algorithm's passes: a row for each token of each beam, without shared prefixes.

    What is verified is the beams' prefix tree with as many useless rows added as sharing saves: the
    same tokens at the reference's cost.
    """

    def tree(self, candidates: Candidates) -> TokenTree:
        beams, logprobs = candidates.beam_tokens()
        shared = TokenTree.from_beams(beams, logprobs)
        missing = 1 + beams.shape[0] * (beams.shape[1] - 1) - len(shared)
        unused = [id for id in range(missing + len(shared)) if id not in shared.children[0]]
        filler = TokenTree.best(
            candidates.root, unused[:missing], [-1] * missing, [-1e9] * missing, missing + 1
        )
        return shared.merge(filler)


@dataclass
class Run:
    """One method on one prompt.

    rate           tokens per second after the first round, which ended `first_seconds` after the
                   start; so prompt and warm-up are not part of it
    sizes          rounds by nodes of their tree
    """

    prompt: str
    category: str
    method: str
    temp: float
    tokens: int
    rate: float | None
    first_seconds: float
    rounds: int
    draft_seconds: float
    verify_seconds: float
    decode_seconds: float
    sizes: dict[int, int] = field(default_factory=dict)


class SpeedBench(Bench):
    """The methods on one target."""

    def __init__(self, flags: argparse.Namespace):
        super().__init__(flags.model, flags.drafters)
        self.flags = flags
        self.draft_model = None
        if flags.draft_model:  # prepared as the target is: in float32 on a CPU
            self.draft_model = redrafter_mlx.load(flags.draft_model)[0]
        self.methods = [Method(BASE), Method(PLAIN), *self._drafted()]
        if self.draft_model is not None:
            self.methods.insert(1, Method(MLX_LM_DRAFT))

    def _drafted(self) -> Iterator[Method]:
        flags = self.flags
        for drafter in self.drafters:
            prefix = f"drafter {drafter}, "
            beams = f"beams {flags.beam_width}x{flags.beam_length}"
            if flags.reference:
                name = f"{prefix}{beams} unshared"
                shape = flags.beam_width, flags.beam_length
                yield Method(name, drafter, budget=UnsharedBeams(*shape, nodes=0))
            for budget in flags.budgets:
                name = f"budget {budget}" if budget else beams
                options = DraftOptions(flags.beam_width, flags.beam_length, budget)
                yield Method(prefix + name, drafter, options)

    def run(self, method: Method, prompt: Prompt, ids: list[int], temp: float):
        """(Run, token ids)."""
        if method.name in (BASE, MLX_LM_DRAFT):
            return self._mlx_lm(method, prompt, ids, temp)
        run = self.generation(method, ids, temp)
        tokens, began, first = [], time.perf_counter(), 0
        first_at = began
        for token in run:
            tokens.append(token.id)
            if not first and token.end_of_round:
                first_at, first = time.perf_counter(), len(tokens)
        seconds = time.perf_counter() - first_at
        stats = run.stats
        return Run(
            prompt.id,
            prompt.category,
            method.name,
            temp,
            len(tokens),
            (len(tokens) - first) / seconds if len(tokens) > first else None,
            first_at - began,
            stats.rounds,
            stats.draft_seconds,
            stats.verify_seconds,
            stats.decode_seconds,
            dict(sorted(stats.sizes.items())),
        ), tokens

    def generation(self, method: Method, ids: list[int], temp: float) -> Generation:
        return Generation(
            self.model,
            ids,
            self.drafters[method.drafter] if method.drafter else None,
            generation=GenerationOptions(max_tokens=self.flags.max_tokens),
            sampling=SamplingOptions(temp=temp, seed=0),
            draft=method.options,
            eos_token_ids=self.tokenizer.eos_token_ids,
            budget=method.budget,
        )

    def _mlx_lm(self, method: Method, prompt: Prompt, ids: list[int], temp: float):
        more = {}
        if method.name == MLX_LM_DRAFT:
            more = {"draft_model": self.draft_model, "num_draft_tokens": self.flags.draft_tokens}
        mx.random.seed(0)
        tokens, rounds, began = [], 0, time.perf_counter()
        first_at = began
        for response in mlx_lm.stream_generate(
            self.model, self.tokenizer, ids, max_tokens=self.flags.max_tokens,
            sampler=make_sampler(temp), **more,
        ):  # fmt: skip
            tokens.append(response.token)
            rounds += not response.from_draft
            if len(tokens) == 1:
                first_at = time.perf_counter()
        seconds = time.perf_counter() - first_at
        n = len(tokens)
        rate = (n - 1) / seconds if n > 1 else None
        return Run(
            prompt.id, prompt.category, method.name, temp, n, rate, first_at - began, rounds, 0.0,
            seconds, seconds,
        ), tokens  # fmt: skip

    def margin(self, tokens: list[int], ids: list[int], temp: float) -> str:
        return str(compare_with_plain(tokens, self.generation(Method(PLAIN), ids, temp)))

    def costs(self, ids: list[int], most: int) -> dict[int, float]:
        """Median seconds of bare forward passes of N causal rows after `ids`, interleaved.

        Each pass takes its tokens from the argmax of the one before, so none can start early.
        """
        rows = [n for n in SIZES if n <= most or n == 1]
        if most > rows[-1]:
            rows.append(most)
        cache = make_prompt_cache(self.model)
        token = mx.argmax(self.model(mx.array([ids]), cache=cache)[:, -1], axis=-1)
        mx.eval(token)
        seconds = defaultdict(list)
        for repeat in range(self.flags.cost_repeats):
            for n in rows if repeat % 2 == 0 else rows[::-1]:
                began = time.perf_counter()
                logits = self.model(mx.broadcast_to(token[None], (1, n)), cache=cache)
                token = mx.argmax(logits, axis=-1)[0, -1:]
                mx.eval(token)
                seconds[n].append(time.perf_counter() - began)
                trim_prompt_cache(cache, n)
        return {n: statistics.median(times) for n, times in seconds.items()}


def measure(bench: SpeedBench, flags: argparse.Namespace) -> dict:
    """All runs of all prompts, as the JSON document that the report is made from."""
    where = machine()  # first: files may be edited while it runs
    runs, costs, differences = [], [], []
    chosen = prompt_files.read(flags.prompts, flags.per_category)
    for i, prompt in enumerate(chosen):
        ids = bench.encode(prompt.text)
        if i == 0:
            for temp in flags.temps:  # warm-up: kernels are compiled, memory is touched
                for method in bench.methods:
                    bench.run(method, prompt, ids, temp)
        largest = 1
        for temp in flags.temps:
            texts = {}
            for methods in [bench.methods, bench.methods[::-1]] * flags.repeats:
                for method in methods:
                    time.sleep(flags.cool_down)
                    run, texts[method.name] = bench.run(method, prompt, ids, temp)
                    runs.append(run)
                    largest = max([largest, *run.sizes])
            for name, tokens in texts.items():
                ours = name not in (BASE, MLX_LM_DRAFT) or temp == 0
                if ours and tokens != texts[PLAIN]:
                    margin = bench.margin(tokens, ids, temp)
                    differences.append(f"{prompt.id} {name} at temperature {temp:g}: {margin}")
        middle = [*ids, *texts[PLAIN][: len(texts[PLAIN]) // 2]]
        costs.append(
            {"prompt": prompt.id, "context": len(middle), "seconds": bench.costs(middle, largest)}
        )
        mine = [run for run in runs if run.prompt == prompt.id and run.temp == flags.temps[0]]
        line = ", ".join(
            f"{m.name} {statistics.median([r.rate or 0.0 for r in mine if r.method == m.name]):.1f}"
            for m in bench.methods
        )
        print(f"{i + 1}/{len(chosen)} {prompt.category} {prompt.id}: {line}", file=sys.stderr)
    return document(
        "speed",
        flags,
        where,
        memory=memory(bench),
        differences=differences,
        costs=costs,
        runs=[asdict(run) for run in runs],
    )


def memory(bench: SpeedBench) -> dict[str, float]:
    """Peak bytes of one more run of the last method on the longest prompt, and what it held."""
    chosen = prompt_files.read(bench.flags.prompts, bench.flags.per_category)
    ids = max((bench.encode(prompt.text) for prompt in chosen), key=len)
    method = bench.methods[-1]
    run = bench.generation(method, ids, temp=0.0)
    mx.clear_cache()
    mx.reset_peak_memory()
    text = [*ids, *(token.id for token in run)]
    peak = mx.get_peak_memory()
    cache = make_prompt_cache(bench.model)
    mx.eval(bench.model(mx.array([text]), cache=cache)[:, -1])
    members = [m for d in bench.drafters.values() for m in getattr(d, "members", [d])]
    heads = [member.head for member in members if hasattr(member, "head")]
    return {
        "prompt_tokens": len(ids),
        "peak": peak,
        "target": size(bench.model),
        "head": sum(map(size, heads)),
        "kv_cache": sum(layer.nbytes for layer in cache),
    }


def parse(args: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__.split("\n")[0])
    add_prompts(made)
    flag = made.add_argument
    flag("--drafters", nargs="+", default=["demo"], help="as --drafter, and random: a useless one")
    flag("--budgets", type=budget_size, nargs="+", default=[4, 8, 16, 0, "auto"],
         help="as --budget of generate")  # fmt: skip
    flag("--beam-width", type=int, default=DraftOptions.beam_width, help="as of generate")
    flag("--beam-length", type=int, default=DraftOptions.beam_length, help="as of generate")
    flag("--reference", action="store_true", help="also beams whose prefixes are not shared")
    flag("--temps", type=float, nargs="+", default=[0.0], help="as --temp")
    flag("--draft-model", help="a smaller model for mlx-lm's own speculative decoding")
    flag("--draft-tokens", type=int, default=3, help="that it drafts each round")
    flag("--repeats", type=int, default=1, help="there-and-back passes over the methods")
    flag("--cost-repeats", type=int, default=10, help="how often each bare pass is timed")
    flag("--cool-down", type=float, default=0.0, help="seconds to wait before each run")
    return made.parse_args(args)


def main(args: list[str] | None = None) -> int:
    flags = parse(args)
    prompt_files.read(flags.prompts, flags.per_category)  # before minutes of loading
    publish(measure(SpeedBench(flags), flags), flags.output, speed_tables, draw_speed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
