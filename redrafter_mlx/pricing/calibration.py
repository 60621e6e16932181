"""How likely a drafted node is to be accepted, learned from what was accepted before."""

from __future__ import annotations

import numpy as np

from redrafter_mlx.tree import Candidates, TokenTree


class Calibration:
    """Accepted against predicted: slowly by depth and by how sure the drafter was, fast by text.

    Slowly: a drafter's probability q of a node is scaled by (accepted + K r) / (predicted + K),
    summed over the nodes of its depth and of its q's size (a factor of two), where r is the same
    ratio for the whole depth, which starts from 1. So a cell with little evidence follows its
    depth, a depth with little evidence the drafter.

    Fast: texts differ in how predictable they are, and a few rounds show it. The chance of each
    step from an accepted node to a child is scaled by one more such ratio, of the latest rounds.

    predicted, accepted  (depths, BINS) sums of the slow part
    """

    BINS = 8
    FADE = 0.995
    """Weight of a round in the next one, in the slow part."""
    PRIOR = 3.0
    """K: the acceptances that a prior is worth."""
    DOUBTED = 1.0
    """What a cell is predicted to have accepted, at most, once it is doubted."""
    TEXT_FADE, TEXT_PRIOR = 0.95, 4.0
    """The same of the fast part."""
    TEXT_RANGE = 0.1, 4.0
    """Least and largest ratio of the fast part."""

    def __init__(self, depths: int, predicted=None, accepted=None):
        shape = (depths, self.BINS)
        self.predicted = np.zeros(shape) if predicted is None else np.array(predicted, float)
        self.accepted = np.zeros(shape) if accepted is None else np.array(accepted, float)
        if self.predicted.shape != shape or self.accepted.shape != shape:
            raise ValueError(f"a calibration of {depths} depths needs tables of {shape}")
        self._ratios: np.ndarray | None = None
        self._text = np.zeros(2)  # predicted and accepted steps of the latest rounds

    def probabilities(self, candidates: Candidates) -> np.ndarray:
        """(M,) probability of each candidate to be accepted; a child's is at most its parent's."""
        c = candidates
        return self._probabilities(c.logprobs, c.depths, c.parents, self.text_ratio)

    @property
    def text_ratio(self) -> float:
        """How much likelier steps are accepted in this text than in others."""
        predicted, accepted = self._text + self.TEXT_PRIOR
        return float(np.clip(accepted / predicted, *self.TEXT_RANGE))

    def observe(self, tree: TokenTree, path: list[int]) -> None:
        """A tree was verified, and its rows `path`, the root's first, were accepted."""
        logprobs, depths, parents = tree.logprobs[1:], tree.depths[1:], tree.parents[1:] - 1
        accepted = np.isin(np.arange(1, len(tree)), path)
        offered = np.isin(parents + 1, path)
        probs = self._probabilities(logprobs, depths, parents, 1.0)
        steps = probs / np.append(probs, 1.0)[parents]  # the root's lies at -1
        self._text *= self.TEXT_FADE
        self._text += steps[offered].sum(), accepted.sum()
        self.count(logprobs, depths, accepted)

    def count(self, logprobs: np.ndarray, depths: np.ndarray, accepted: np.ndarray) -> None:
        """One round's nodes (N,) for the slow part, and which of them were accepted."""
        self.predicted *= self.FADE
        self.accepted *= self.FADE
        cells = self._cells(logprobs, depths)
        np.add.at(self.predicted, cells, np.exp(logprobs))
        np.add.at(self.accepted, cells, accepted.astype(float))
        self._ratios = None

    def begin_text(self) -> None:
        """What is known of the text holds no more."""
        self._text[:] = 0.0

    def doubt(self) -> None:
        """Hold what is known less firmly, because drafts did not pay and may do so now."""
        shrink = np.minimum(1.0, self.DOUBTED / np.maximum(self.predicted, 1e-9))
        self.predicted *= shrink
        self.accepted *= shrink
        self._ratios = None
        self.begin_text()

    def _probabilities(self, logprobs, depths, parents, ratio: float) -> np.ndarray:
        if self._ratios is None:
            self._ratios = self._fit()
        probs = np.minimum(0.99, np.exp(logprobs) * self._ratios[self._cells(logprobs, depths)])
        above, scaled = np.append(probs, 1.0), np.append(probs, 1.0)
        for depth in range(1, depths.max(initial=0) + 1):
            here = np.flatnonzero(depths == depth)
            parent = parents[here]
            above[here] = np.minimum(above[here], above[parent])
            step = np.minimum(ratio * above[here] / above[parent], 0.99)
            scaled[here] = scaled[parent] * step
        return scaled[:-1]

    def _fit(self) -> np.ndarray:
        k, by_depth = self.PRIOR, {"axis": 1, "keepdims": True}
        depth = (self.accepted.sum(**by_depth) + k) / (self.predicted.sum(**by_depth) + k)
        return (self.accepted + k * depth) / (self.predicted + k)

    def _cells(self, logprobs: np.ndarray, depths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bins = np.clip(-logprobs / np.log(2), 0, self.BINS - 1).astype(int)  # halvings of q
        return np.minimum(depths, len(self.predicted)) - 1, bins
