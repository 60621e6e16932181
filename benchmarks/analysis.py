"""What a drafting method should gain, by the formulas of the literature and by measured costs.

EWIF, the expected walltime improvement factor, and SWI, the standardised walltime improvement, are
those of Cascade Speculative Drafting (arXiv 2312.11462). They assume that a pass over many tokens
costs as much as one over one, which holds on no CPU and on few GPUs: `cost` takes a measured curve
in place of that assumption. All costs are in units of one plain pass of the target.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from redrafter_mlx.rounds.stats import Stats

Cost = Callable[[int], float]
"""Rows of a pass -> its cost, in units of a pass over one row."""


def constant(rows: int) -> float:
    """The literature's assumption: rows are free."""
    return 1.0


def curve(seconds: Mapping[int, float]) -> Cost:
    """The cost of a pass from measured ones, straight between them and beyond the last two.

    seconds  rows -> measured time; 1 row must be among them

    Example: curve({1: 0.1, 16: 0.2})(16) is 2.
    """
    rows = sorted(seconds)
    if len(rows) < 2 or rows[0] != 1:
        raise ValueError(f"a cost curve needs 1 row and another number of rows, not {rows}")

    def cost(n: int) -> float:
        at = min(max(bisect_left(rows, n), 1), len(rows) - 1)
        low, high = rows[at - 1], rows[at]
        slope = (seconds[high] - seconds[low]) / (high - low)
        return (seconds[low] + slope * (n - low)) / seconds[1]

    return cost


def break_even(nodes: int, cost: Cost, draft: float = 0.0) -> float:
    """Tokens per round that drafting must yield to be as fast as plain decoding."""
    return draft + cost(nodes)


def tokens_per_round(alpha: float, k: int) -> float:
    """Expected tokens of a round: k drafted in a row, each accepted with probability alpha."""
    return k + 1.0 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)


def ewif_speculative(alpha: float, c: float, k: int, cost: Cost = constant) -> float:
    """Speculative decoding: k tokens of a draft model whose pass costs c."""
    return tokens_per_round(alpha, k) / (c * k + cost(k + 1))


def ewif_vertical(
    alpha: float,
    inner_alpha: float,
    n: int,
    k: int,
    c_outer: float,
    c_inner: float,
    cost: Cost = constant,
    outer_cost: Cost = constant,
) -> float:
    """A vertical cascade: n steps of a draft model that reviews k tokens of a cheaper one.

    alpha, inner_alpha  acceptance of the draft model by the target, of the cheaper one by it
    c_outer, c_inner    cost of a pass over one row of each
    cost, outer_cost    of the target's and the draft model's passes

    With constant costs it is (1 - a phi^n(a)) / ((1 - a)(1 + n c_outer + n k c_inner)); see `phi`.
    """
    at_least = np.append(inner_alpha ** np.arange(k + 1), 0.0)  # 1, 2, ... tokens of one step
    step = np.append(0.0, at_least[:-1] - at_least[1:])
    sizes = np.array([1.0])
    for _ in range(n):
        sizes = np.convolve(sizes, step)
    gained = sum(p * tokens_per_round(alpha, size) for size, p in enumerate(sizes))
    review = sum(p * cost(size + 1) for size, p in enumerate(sizes))
    return float(gained / (review + n * c_outer * outer_cost(k + 1) + n * k * c_inner))


def phi(x: float, alpha: float, k: int) -> float:
    """Generating function of the tokens of one round of k drafted ones: E[x^tokens]."""
    return 1 + (x - 1) * (1 - (alpha * x) ** (k + 1)) / (1 - alpha * x)


def ewif_horizontal(
    alphas: Sequence[float], costs: Sequence[float], cost: Cost = constant
) -> float:
    """A horizontal cascade: the i-th drafted token has its own acceptance and cost."""
    if len(alphas) != len(costs):
        raise ValueError(f"{len(alphas)} acceptance rates but {len(costs)} costs")
    gained = 1 + float(np.cumprod(alphas).sum())
    return gained / (cost(len(alphas) + 1) + sum(costs))


def swi(tokens: int, rounds: int, drafts: Iterable[tuple[int, float]] = ()) -> float:
    """SWI of a recorded run: its gain if every pass of a model cost the same, however many rows.

    tokens, rounds  of the run (Stats)
    drafts          for each draft model: its passes, and the cost of one over the target's, for
                    example by size
    """
    return tokens / (rounds + sum(passes * c for passes, c in drafts))


def acceptance(stats: Stats) -> list[float]:
    """Of each depth of a run's drafts: how often it stood where the depth before it did."""
    before = [stats.rounds, *stats.accepted_at]
    return [there / up for up, there in zip(before, stats.accepted_at, strict=False) if up]
