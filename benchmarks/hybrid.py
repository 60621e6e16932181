"""What trees cost on a model with recurrent layers, compared with mlx-lm's own layers.

    python -m benchmarks.hybrid --output NAME.hybrid.json
    python -m benchmarks.hybrid --layers 4 --turns 3

The model has the shape of Qwen3.5-0.8B (gated delta rule, every fourth layer attention) and random
weights: costs do not depend on them. After the same prompt, in turn: N consecutive rows through
mlx-lm's layers and caches; a chain and a tree of N rows through ours, any of which may be rejected;
and the commit of half of the longest path, until it is in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx.measuring.measure import bushy_tree
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.adapter import Target

from .machine import document, machine, parser, publish
from .tables import hybrid_tables

SHAPE = {
    "model_type": "qwen3_5_text",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "vocab_size": 248320,
    "tie_word_embeddings": True,
}
"""Of Qwen3.5-0.8B: huggingface.co/Qwen/Qwen3.5-0.8B, config.json."""


def build(layers: int) -> qwen3_5.TextModel:
    """A model of the shape with random weights, float32."""
    model = qwen3_5.TextModel(
        qwen3_5.TextModelArgs.from_dict({**SHAPE, "num_hidden_layers": layers})
    )
    draw = np.random.default_rng(0)
    noise = lambda x: (
        mx.array(0.02 * draw.standard_normal(x.shape, np.float32)) if x.ndim > 1 else x
    )
    model.update(tree_map(noise, model.parameters()))
    mx.eval(model.parameters())
    return model


def trees(rows: int, vocab_size: int) -> dict[str, TokenTree]:
    return {
        "chain": TokenTree.from_beams([range(7, 7 + rows)]),
        "tree": bushy_tree(rows, 7, vocab_size),
    }


def measure(flags: argparse.Namespace) -> dict:
    where = machine()
    model = build(flags.layers)
    prompt = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], flags.context).tolist()
    stock = make_prompt_cache(model)
    mx.eval(model(mx.array([prompt[:-1]]), cache=stock), [cache.state for cache in stock])
    states = [list(getattr(cache, "cache", ())) for cache in stock]
    target = Target(model)
    context = target.prefill(prompt, chunk=len(prompt))
    seconds, memory = defaultdict(list), {}

    def timed(name: str, run) -> None:
        mx.reset_peak_memory()
        before, began = mx.get_active_memory(), time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - began)
        memory[name] = mx.get_peak_memory() - before

    def theirs(ids) -> None:
        mx.eval(model(ids, cache=stock))
        for cache, state in zip(stock, states, strict=True):
            if state:
                cache.cache = list(state)
            else:
                cache.trim(ids.size)

    def ours(tree) -> None:
        mx.eval(target.verify(context, tree).logits)

    for turn in range(-1, flags.turns):
        if turn == 0:
            seconds.clear()  # the first turn warmed up
        for rows in flags.rows if turn % 2 else flags.rows[::-1]:
            ids = mx.array([prompt[:rows]])
            timed(f"mlx-lm {rows}", lambda ids=ids: theirs(ids))
            for kind, tree in trees(rows, SHAPE["vocab_size"]).items():
                if rows == 1 and kind == "tree":
                    continue
                fresh = [(cache, dict(vars(cache))) for cache in context.caches.branching]
                timed(f"{kind} {rows}", lambda tree=tree: ours(tree))
                if rows > 1:
                    path = max(tree.paths(), key=len)
                    part = path[: max(1, len(path) // 2)]

                    def commit(part=part) -> None:
                        context.caches.commit(part)
                        mx.eval(context.caches.state)

                    timed(f"commit of a {kind} {rows}", commit)
                for cache, state in fresh:  # as if nothing had been kept
                    vars(cache).update(state)
        print(f"turn {turn + 1} of {flags.turns}", file=sys.stderr)
    return document(
        "hybrid",
        flags,
        where,
        seconds={name: statistics.median(times) for name, times in seconds.items()},
        memory=memory,
    )


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    made.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="of the model")
    made.add_argument("--context", type=int, default=128, help="tokens before the passes")
    made.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of a pass")
    made.add_argument("--turns", type=int, default=5, help="how often each is timed")
    flags = made.parse_args(args)
    publish(measure(flags), flags.output, hybrid_tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
