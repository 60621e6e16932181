"""Speed of drafted decoding against plain decoding, both sides in one process, interleaved.

    python -m benchmarks.speed                                    # this project's own prompts
    python -m benchmarks.speed --prompts question.jsonl --per-category 2 --output result.json

Methods: mlx-lm's stream_generate, our loop without a drafter, our loop with the drafter at each
budget. For each prompt they run in the order A B C ... and back, and their texts are compared.
Beside them, after the same prompt, bare forward passes of 1 ... N causal rows with mlx-lm's own
cache give cost(N), so that a measured speed can be held against what is possible:

    bound = tokens per round x cost(1) / (cost(N) + draft cost)
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import redrafter_mlx
from benchmarks import prompts as prompt_files
from benchmarks.prompts import Prompt
from benchmarks.report import speed_tables
from redrafter_mlx.check import compare_with_plain
from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.stream import Generation

MLX_LM, PLAIN = "mlx-lm", "plain"


@dataclass
class Run:
    """One method on one prompt. `rate` is in tokens per second after the first round."""

    prompt: str
    category: str
    method: str
    tokens: int
    rate: float
    rounds: int
    draft_seconds: float
    verify_seconds: float
    decode_seconds: float


class Bench:
    """The target, its drafter, and the options that every method shares."""

    def __init__(self, flags: argparse.Namespace):
        self.flags = flags
        self.model, self.tokenizer = redrafter_mlx.load(flags.model)
        self.drafter = redrafter_mlx.load_drafter(flags.drafter, self.model)
        self.methods = [MLX_LM, PLAIN, *(f"budget {n}" for n in flags.budgets)]

    def encode(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def run(self, method: str, prompt: Prompt, ids: list[int]) -> tuple[Run, list[int]]:
        if method == MLX_LM:
            return self._mlx_lm(prompt, ids)
        run = self.generation(method, ids)
        tokens, began, first = [], 0.0, 0
        for token in run:
            tokens.append(token.id)
            if not first and token.end_of_round:
                began, first = time.perf_counter(), len(tokens)
        seconds = time.perf_counter() - began
        stats = run.stats
        return Run(
            prompt.id,
            prompt.category,
            method,
            len(tokens),
            (len(tokens) - first) / seconds,
            stats.rounds,
            stats.draft_seconds,
            stats.verify_seconds,
            stats.decode_seconds,
        ), tokens

    def generation(self, method: str, ids: list[int]) -> Generation:
        plain = method == PLAIN
        return Generation(
            self.model,
            ids,
            None if plain else self.drafter,
            generation=GenerationOptions(max_tokens=self.flags.max_tokens),
            sampling=SamplingOptions(),
            draft=DraftOptions() if plain else DraftOptions(budget=int(method.split()[1])),
            eos_token_ids=self.tokenizer.eos_token_ids,
        )

    def _mlx_lm(self, prompt: Prompt, ids: list[int]) -> tuple[Run, list[int]]:
        tokens, began = [], 0.0
        for response in mlx_lm.stream_generate(
            self.model, self.tokenizer, ids, max_tokens=self.flags.max_tokens
        ):
            tokens.append(response.token)
            began = began or time.perf_counter()
        seconds = time.perf_counter() - began
        rate = (len(tokens) - 1) / seconds
        n = len(tokens)
        return Run(prompt.id, prompt.category, MLX_LM, n, rate, n, 0.0, seconds, seconds), tokens

    def margin(self, tokens: list[int], ids: list[int]) -> str:
        return str(compare_with_plain(tokens, self.generation(PLAIN, ids)))

    def costs(self, ids: list[int]) -> dict[int, float]:
        """Median seconds of bare forward passes of N causal rows after `ids`, interleaved.

        Each pass takes its tokens from the last one's argmax, so none can start early.
        """
        rows = [1, *self.flags.budgets]
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


def measure(bench: Bench, flags: argparse.Namespace) -> dict:
    """All runs of all prompts, as the JSON document that the report is made from."""
    measured_on = machine()  # first: files may be edited while it runs
    runs, costs, differences = [], [], []
    chosen = prompt_files.read(flags.prompts, flags.per_category)
    for i, prompt in enumerate(chosen):
        ids = bench.encode(prompt.text)
        texts = {}
        orders = [bench.methods, bench.methods[::-1]] * flags.repeats
        if i == 0:
            for method in bench.methods:  # warm-up: kernels are compiled, memory is touched
                bench.run(method, prompt, ids)
        for methods in orders:
            for method in methods:
                run, texts[method] = bench.run(method, prompt, ids)
                runs.append(run)
        for method, tokens in texts.items():
            if tokens != texts[PLAIN]:
                differences.append(f"{prompt.id} {method}: {bench.margin(tokens, ids)}")
        costs.append({"prompt": prompt.id, "context": len(ids), "seconds": bench.costs(ids)})
        rates = {m: statistics.median(r.rate for r in runs if _is(r, prompt, m)) for m in texts}
        line = ", ".join(f"{m} {rate:.1f}" for m, rate in rates.items())
        print(f"{i + 1}/{len(chosen)} {prompt.category} {prompt.id}: {line}", file=sys.stderr)
    return {
        "machine": measured_on,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(flags).items()},
        "memory": memory(bench),
        "differences": differences,
        "costs": costs,
        "runs": [asdict(run) for run in runs],
    }


def _is(run: Run, prompt: Prompt, method: str) -> bool:
    return run.prompt == prompt.id and run.method == method


def machine() -> dict[str, str]:
    """Where and with what this was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "chip": mx.device_info().get("device_name", platform.processor()),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "blas": str(redrafter_mlx.blas.preload()),
    }


def memory(bench: Bench) -> dict[str, float]:
    """Peak bytes of one more run of the longest budget, and what it had to hold."""
    longest = max(bench.flags.budgets)
    chosen = prompt_files.read(bench.flags.prompts, bench.flags.per_category)
    ids = max((bench.encode(prompt.text) for prompt in chosen), key=len)
    size = lambda module: sum(x.nbytes for _, x in tree_flatten(module.parameters()))
    run = bench.generation(f"budget {longest}", ids)
    mx.clear_cache()
    mx.reset_peak_memory()
    text = [*ids, *(token.id for token in run)]
    peak = mx.get_peak_memory()
    cache = make_prompt_cache(bench.model)
    mx.eval(bench.model(mx.array([text]), cache=cache)[:, -1])
    return {
        "prompt_tokens": len(ids),
        "peak": peak,
        "target": size(bench.model),
        "head": size(bench.drafter.head),
        "kv_cache": sum(layer.nbytes for layer in cache),
    }


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--model", default="demo")
    flag("--drafter", default="demo")
    flag("--prompts", type=Path, default=prompt_files.OWN, help="JSONL in Spec-Bench's form")
    flag("--per-category", type=int, default=2, help="prompts of each category")
    flag("--max-tokens", type=int, default=96)
    flag("--budgets", type=int, nargs="+", default=[4, 8, 16])
    flag("--repeats", type=int, default=1, help="there-and-back passes over the methods")
    flag("--cost-repeats", type=int, default=10)
    flag("--output", type=Path, help="JSON file to write")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    flags = parse(args)
    result = measure(Bench(flags), flags)
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(speed_tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
