"""How likely a drafted node is to be accepted, learned from what was accepted before."""

from __future__ import annotations

import numpy as np

from redrafter_mlx.tree import Candidates


class Calibration:
    """Accepted against predicted, by depth and by how sure the drafter was.

    A drafter's probability q of a node is scaled by (accepted + K r) / (predicted + K), summed
    over the nodes of its depth and of its q's size (a factor of two), where r is the same ratio
    for the whole depth, which starts from 1. So a cell with little evidence follows its depth, a
    depth with little evidence the drafter. Old rounds fade: texts change.
    """

    BINS = 8
    FADE = 0.98
    """Weight of a round in the next one."""
    PRIOR = 1.0
    """K: the acceptances that a prior is worth."""
    RECENT = 3.0
    """Most acceptances that a cell remembers when it is doubted."""

    def __init__(self, depths: int, predicted=None, accepted=None):
        shape = (depths, self.BINS)
        self.predicted = np.zeros(shape) if predicted is None else np.array(predicted, float)
        self.accepted = np.zeros(shape) if accepted is None else np.array(accepted, float)
        if self.predicted.shape != shape or self.accepted.shape != shape:
            raise ValueError(f"a calibration of {depths} depths needs tables of {shape}")
        self._ratios: np.ndarray | None = None

    def probabilities(self, candidates: Candidates) -> np.ndarray:
        """(M,) probability of each candidate to be accepted; a child's is at most its parent's."""
        if self._ratios is None:
            self._ratios = self._fit()
        cells = self._cells(candidates.logprobs, candidates.depths)
        probs = np.minimum(0.99, np.exp(candidates.logprobs) * self._ratios[cells])
        for depth in range(2, candidates.depths.max(initial=0) + 1):
            here = candidates.depths == depth
            probs[here] = np.minimum(probs[here], probs[candidates.parents[here]])
        return probs

    def observe(self, logprobs: np.ndarray, depths: np.ndarray, accepted: np.ndarray) -> None:
        """The nodes (N,) of a verified tree, without the root, and which of them were accepted."""
        self.predicted *= self.FADE
        self.accepted *= self.FADE
        cells = self._cells(logprobs, depths)
        np.add.at(self.predicted, cells, np.exp(logprobs))
        np.add.at(self.accepted, cells, accepted.astype(float))
        self._ratios = None

    def doubt(self) -> None:
        """Hold what is known less firmly, because the text may have changed."""
        shrink = np.minimum(1.0, self.RECENT / np.maximum(self.predicted, 1e-9))
        self.predicted *= shrink
        self.accepted *= shrink
        self._ratios = None

    def _fit(self) -> np.ndarray:
        k, by_depth = self.PRIOR, {"axis": 1, "keepdims": True}
        depth = (self.accepted.sum(**by_depth) + k) / (self.predicted.sum(**by_depth) + k)
        return (self.accepted + k * depth) / (self.predicted + k)

    def _cells(self, logprobs: np.ndarray, depths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bins = np.clip(-logprobs / np.log(2), 0, self.BINS - 1).astype(int)  # halvings of q
        return np.minimum(depths, len(self.predicted)) - 1, bins
