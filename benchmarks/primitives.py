"""Which of MLX's operations a round consists of, and how many: the cost on a launch-bound device.

    python -m benchmarks.primitives

Graphs are built but not evaluated, so the result is the same on any machine, with one exception: on
a CPU mlx expands rope, norms and attention into several operations where a GPU has a kernel for
each. An operation that only renames its input (a slice, a reshape) launches nothing.
"""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from functools import partial

import mlx.core as mx
import numpy as np

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.recurrent import RecurrentDrafter
from redrafter_mlx.measuring.measure import bushy_tree
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.sampling import Noise
from redrafter_mlx.target.adapter import Target, adapt

from . import markdown
from .machine import Bench, parser

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Depends", "ExpandDims", "Flatten",
    "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
"""Operations that launch no kernel, or only rarely."""
ROWS = 16


def operations(*outputs: mx.array) -> Counter[str]:
    """How often each operation occurs in the graph of arrays not evaluated yet."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    return Counter(re.findall(r'label ="(\w+)"', dot.getvalue()))


def launches(found: Counter[str]) -> int:
    """How many of the operations launch a kernel."""
    return sum(count for name, count in found.items() if name not in VIEWS)


def of_target(target: Target, prompt: list[int]) -> dict[str, Counter[str]]:
    """Operations of a chunk of a prompt, a plain round, a tree's pass, and its commit."""
    found, caches = {}, target.empty_caches()
    caches.begin(len(prompt))
    hidden = target.forward(mx.array(prompt)[None], caches).hidden
    found[f"prefill of {len(prompt)} tokens"] = operations(hidden, *_arrays(caches.state))
    context = target.prefill(prompt, chunk=len(prompt))
    for rows in (1, ROWS):
        tree = bushy_tree(rows, prompt[-1], target.vocab_size)
        outcome = target.verify(context, tree)
        chosen = mx.argmax(outcome.logits, axis=-1)
        found["plain round" if rows == 1 else f"pass over a tree of {rows}"] = operations(chosen)
        mx.eval(chosen, outcome.hidden, context.caches.state)
        if rows == 1:
            context.caches.commit([])
    path = next(path for path in tree.paths() if path != list(range(len(path))))
    context.caches.commit(path)
    found["commit of a path that must move"] = operations(*_arrays(context.caches.state))
    return found


def of_drafts(
    drafter: RecurrentDrafter, context: Context, width: int, length: int
) -> dict[str, Counter[str]]:
    """Operations of a search, greedy and coupled to the sampling noise, plain and compiled."""
    found = {}
    for coupled in (False, True):
        for is_compiled in (False, True):
            search = partial(drafter.search, width, length, coupled)
            noise = Noise(mx.array(np.array([1, 2], np.uint32)), mx.array(1.0))
            begun, memory = drafter.begin(context)
            arrays = (mx.compile(search) if is_compiled else search)(
                begun,
                context.pending,
                mx.array([context.position], dtype=mx.uint32),
                noise.key,
                noise.temp,
                *drafter.vocabulary.of(context.transcript),
                memory,
            )
            words = ["draft", f"{width}x{length}", *["sampled"] * coupled]
            found[" ".join([*words, *["compiled"] * is_compiled])] = operations(*arrays)
    return found


def _arrays(state) -> list[mx.array]:
    return [x for entry in state for x in (entry if isinstance(entry, (list, tuple)) else [entry])]


def table(found: dict[str, Counter[str]]) -> str:
    """Markdown: operations of each stage, and which of them launch kernels."""
    rows = []
    for stage, counts in found.items():
        shown = Counter()
        for name, count in counts.items():
            if name not in VIEWS:
                shown[re.sub(r"^Compiled\w+$", "Compiled", name)] += count
        which = ", ".join(f"{name} {count}" for name, count in shown.most_common())
        rows.append([stage, counts.total(), launches(counts), which])
    header = ["stage", "operations", "launch a kernel", "which"]
    return "\n".join(markdown.table(header, rows))


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    made.add_argument("--drafter", default="demo", help="a recurrent head: as for generate")
    flags = made.parse_args(args)
    bench = Bench(flags.model, [flags.drafter])
    target, drafter = adapt(bench.model), bench.drafters[flags.drafter]
    prompt = bench.filler(32)
    context = target.prefill(prompt, chunk=32)
    found = of_target(target, prompt)
    full = DraftOptions.beam_width, DraftOptions.beam_length
    for shape in ((1, 2), (1, full[1]), full):
        found |= of_drafts(drafter, context, *shape)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
