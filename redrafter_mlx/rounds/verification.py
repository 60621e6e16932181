"""Rules: which path of a verified tree is accepted, and which token follows it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import Context, Outcome, Verdict
from redrafter_mlx.rounds.sampling import Sampler
from redrafter_mlx.rounds.tree import DrawnTree, TokenTree


class Match:
    """The lossless rule: what the target would say anyway is kept.

    At each visited node the sampler chooses the next token from the target's logits, exactly as
    plain decoding would at that position. If a child carries it, the walk descends; if not, it is
    the next pending token. The tree decides how many tokens a round yields, never which.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __call__(self, tree: TokenTree, outcome: Outcome, context: Context) -> Verdict:
        prepared = self.sampler.prepare(outcome.logits)
        if len(tree) == 1 and self.sampler.is_argmax:  # one path, nothing to compare: do not wait
            mx.async_eval(prepared)
            return Verdict([0], prepared, token=None)
        (rows,) = device.read(prepared)
        history = list(context.transcript.tokens)
        path = [0]
        while True:
            token = self.sampler.choose(rows[path[-1]], context.position + len(path), history)
            child = tree.children[path[-1]].get(token)
            if child is None:
                return Verdict(path, mx.array([token], dtype=context.pending.dtype), token)
            path.append(child)
            history.append(token)


class Rejection:
    """Recursive rejection sampling: not the same text as without drafts, but the same distribution.

    At each visited node the children are offered in turn: token x, drawn from q, is accepted with
    probability min(1, p(x)/q(x)); if not, p becomes norm(relu(p - q)), and q loses x. If none is
    accepted, the next token is drawn from what is left of p. (SpecInfer, arXiv 2305.09781; without
    replacement: arXiv 2402.14160.) For a tree whose nodes were not drawn, q(x) = 1. At temperature
    0 the text is the same as without drafts.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __call__(self, tree: TokenTree, outcome: Outcome, context: Context) -> Verdict:
        (rows,) = device.read(outcome.logits.astype(mx.float32))
        history = list(context.transcript.tokens)
        path = [0]
        while True:
            position = context.position + len(path)
            p = self.sampler.distribution(rows[path[-1]], position, history)
            token = self._token(tree, path[-1], p, self.sampler.uniform(position))
            child = tree.children[path[-1]].get(token)
            if child is None:
                return Verdict(path, mx.array([token], dtype=context.pending.dtype), token)
            path.append(child)
            history.append(token)

    def _token(
        self, tree: TokenTree, node: int, p: np.ndarray, uniform: np.random.Generator
    ) -> int:
        """The token after `node`: a child's, or one drawn from what they leave of p (V,)."""
        source = -1
        if isinstance(tree, DrawnTree) and (source := tree.sources[node]) >= 0:
            q = np.zeros_like(p)
            q[tree.ids] = tree.probs[source]
            q /= q.sum()
        for token in tree.children[node]:
            if source < 0:
                q = np.zeros_like(p)
                q[token] = 1.0
            left = np.maximum(p - q, 0.0)
            if uniform.random() * q[token] < p[token] or left.sum() == 0:
                return token
            p = left / left.sum()
            q[token] = 0.0
            q /= q.sum() or 1.0
        total = np.cumsum(p)
        return int(np.searchsorted(total, uniform.random() * total[-1], side="right"))


class Typical:
    """Medusa's typical acceptance (arXiv 2401.10774). LOSSY: not the model's distribution.

    A token x passes if p(x) > min(epsilon, delta * exp(-H(p))); the longest path of such tokens is
    accepted, and the model's own choice follows it. At temperature 0 it is `Match`.
    """

    EPSILON, DELTA = 0.09, 0.3

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __call__(self, tree: TokenTree, outcome: Outcome, context: Context) -> Verdict:
        if self.sampler.options.temp == 0:
            return Match(self.sampler)(tree, outcome, context)
        (rows,) = device.read(outcome.logits.astype(mx.float32))
        before = context.transcript.tokens
        after = lambda path: [*before, *tree.tokens[path[1:]].tolist()]
        longest, waiting = [0], [[0]]
        while waiting:
            path = waiting.pop(0)  # of equally long ones the likeliest comes first
            if len(path) > len(longest):
                longest = path
            children = tree.children[path[-1]]
            if children:
                p = self.sampler.distribution(
                    rows[path[-1]], context.position + len(path), after(path)
                )
                waiting += [
                    [*path, row] for token, row in children.items() if self.passes(p, token)
                ]
        token = self.sampler.choose(
            rows[longest[-1]], context.position + len(longest), after(longest)
        )
        return Verdict(longest, mx.array([token], dtype=context.pending.dtype), token)

    def passes(self, p: np.ndarray, token: int) -> bool:
        """Whether a token is typical of p (V,)."""
        some = p[p > 0]
        entropy = -(some * np.log(some)).sum()
        return p[token] > min(self.EPSILON, self.DELTA * np.exp(-entropy))
