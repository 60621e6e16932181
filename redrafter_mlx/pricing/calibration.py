"""How likely a drafted node is to be accepted, learned from what was accepted before."""

from __future__ import annotations

from functools import partial

import numpy as np

from redrafter_mlx.rounds.tree import Candidates


class Calibration:
    """Accepted over predicted: a slow part by depth and drafter's probability, a fast one by text.

    Slow: a drafter's probability q of a node is scaled by (accepted + K r) / (predicted + K),
    summed over the nodes of its depth whose q is in the same bin (a factor of two wide), where r is
    the same ratio for the whole depth, with a prior of 1. So a bin with little evidence follows its
    depth, and a depth with little evidence follows the drafter.

    Fast: texts differ in how predictable they are, and a few rounds show it. The probability of
    each step from an accepted node to a child is scaled by one more such ratio, of the latest
    rounds. A ratio above 1 scales its odds instead, or a long chain of likely steps would become
    certain.

    Candidates from a search and those found without one (`Candidates.always`) count apart: they
    come from different drafters, and one may be useless where the other is not.

    predicted, accepted  (2, depths, BINS) sums of the slow part: with a search, without
    rounds               since it was made
    """

    BINS = 8
    FADE = 0.999
    """Factor by which a round's weight falls with each later round, in the slow part."""
    PRIOR = 3.0
    """K: the acceptances that a prior is worth."""
    TEXT_FADE, TEXT_PRIOR = 0.99, 2.0
    """FADE and PRIOR of the fast part."""
    TEXT_RANGE = 0.1, 4.0
    """Least and largest ratio of the fast part."""
    SUREST = 0.99
    """Highest probability of a step."""

    def __init__(self, depths: int, predicted=None, accepted=None):
        shape = (2, depths, self.BINS)
        self.predicted = np.zeros(shape) if predicted is None else np.array(predicted, float)
        self.accepted = np.zeros(shape) if accepted is None else np.array(accepted, float)
        if self.predicted.shape != shape or self.accepted.shape != shape:
            raise ValueError(f"a calibration of {depths} depths needs tables of {shape}")
        self.rounds = 0
        self._ratios: np.ndarray | None = None
        self._latest: tuple[Candidates, np.ndarray] | None = None
        self._text = np.zeros((2, 2))  # predicted and accepted steps of the latest rounds

    def probabilities(self, candidates: Candidates) -> np.ndarray:
        """(M,) probability that each candidate is accepted; a child's is at most its parent's."""
        c, steps = candidates, self._steps_of(candidates)
        likelier = self.text_ratios[c.always.astype(int)] * steps
        steps = np.minimum(likelier / np.maximum(1.0, 1 - steps + likelier), self.SUREST)
        probs = np.append(steps, 1.0)  # the root's lies at -1
        for here in c.levels[1:]:
            probs[here] *= probs[c.parents[here]]
        return probs[:-1]

    @property
    def text_ratios(self) -> np.ndarray:
        """(2,) how much likelier steps are accepted in this text than in others."""
        predicted, accepted = self._text + self.TEXT_PRIOR
        return np.clip(accepted / predicted, *self.TEXT_RANGE)

    def observe(self, candidates: Candidates, verified: np.ndarray, path: list[int]) -> None:
        """Learn from a round: the candidates verified, and the accepted path below the root."""
        c, parents = candidates, candidates.parents[verified]
        steps = self._steps_of(c)[verified]
        offered, accepted = np.isin(parents, [-1, *path]), np.isin(verified, path)
        source = c.always[verified].astype(int)
        np.add.at(self._text[0], source[offered], steps[offered])
        np.add.at(self._text[1], source[accepted], 1.0)
        self.count(c, path, verified)

    def count(
        self, candidates: Candidates, path: list[int], verified: np.ndarray | None = None
    ) -> None:
        """One round for the slow part: which of the verified candidates (or all) were accepted."""
        if verified is None:
            verified = np.arange(len(candidates.tokens))
        cells = tuple(axis[verified] for axis in self._cells(candidates))
        np.add.at(self.predicted, cells, np.exp(candidates.logprobs[verified]))
        np.add.at(self.accepted, cells, np.isin(verified, path).astype(float))
        self._ratios = self._latest = None

    def begin_text(self) -> None:
        """Forget what is known of the last text."""
        self._text[:] = 0.0

    def doubt(self) -> None:
        """Let what is known weigh no more, at each depth, than the prior."""
        weight = self.predicted.sum(axis=-1, keepdims=True)
        shrink = np.minimum(1.0, self.PRIOR / np.maximum(weight, 1e-9))
        self.predicted, self.accepted = shrink * self.predicted, shrink * self.accepted
        self._ratios = self._latest = None

    def pass_round(self) -> None:
        """A round begins: what is known of this text and of all texts weighs a little less."""
        self.rounds += 1
        self._text *= self.TEXT_FADE
        self.predicted *= self.FADE
        self.accepted *= self.FADE
        self._ratios = self._latest = None

    def _steps_of(self, candidates: Candidates) -> np.ndarray:
        """(M,) probability of each one's last step, from the slow part alone."""
        if self._ratios is None:
            self._ratios = self._fit()
        if self._latest is not None and self._latest[0] is candidates:
            return self._latest[1]
        c = candidates
        probs = np.append(np.exp(c.logprobs) * self._ratios[self._cells(c)], 1.0)
        for here in c.levels:
            probs[here] = np.minimum(probs[here], probs[c.parents[here]])
        steps = probs[:-1] / np.maximum(probs[c.parents], 1e-30)
        self._latest = c, np.minimum(steps, self.SUREST)
        return self._latest[1]

    def _fit(self) -> np.ndarray:
        k, by_depth = self.PRIOR, partial(np.sum, axis=-1, keepdims=True)
        depth = (by_depth(self.accepted) + k) / (by_depth(self.predicted) + k)
        return (self.accepted + k * depth) / (self.predicted + k)

    def _cells(self, candidates: Candidates) -> tuple[np.ndarray, ...]:
        c, depths = candidates, self.predicted.shape[1]
        bins = np.clip(-c.logprobs / np.log(2), 0, self.BINS - 1).astype(int)  # halvings of q
        return c.always.astype(int), np.minimum(c.depths, depths) - 1, bins
