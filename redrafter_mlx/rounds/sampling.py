"""Which token the target says next, as a pure function of logits, settings, seed and position.

The randomness of position p is Gumbel noise on every token's logit, a function of
(seed, p, token id) alone. Adding it and taking the maximum draws exactly from the soft-max
(Gumbel-max), and the draw cannot depend on what was drafted, verified or rejected before.
Noise is counter-based (Threefry-2x32, 13 rounds: Salmon et al., SC 2011), so it is computed for
just the candidates that can still win, and by a drafter for its own ids only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx
import numpy as np

from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.errors import UserError

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_HIGHEST_NOISE = -math.log(-math.log1p(-(2.0**-24)))
_LOWEST_NOISE = -math.log(-math.log1p(-(1 - 2.0**-24)))
_XTC_COUNTER = 2**32 - 1  # no token has this id
_DRAFT_SALT = 0x9E3779B9


def threefry(key, counter, xp: ModuleType = np):
    """Threefry-2x32 with 13 rounds, element by element.

    key, counter  pairs of uint32 arrays of `xp` (numpy or mlx.core) that broadcast
    Returns a pair of uint32 arrays.
    """
    word = lambda value: xp.array(value, dtype=xp.uint32)
    keys = (*key, key[0] ^ key[1] ^ word(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for r in range(13):
        left = _ROTATIONS[r % 8]
        x = x + y
        y = (y << word(left)) | (y >> word(32 - left))
        y = y ^ x
        if r % 4 == 3:
            injection = r // 4 + 1
            x = x + keys[injection % 3]
            y = y + keys[(injection + 1) % 3] + word(injection)
    return x, y


def seed_key(seed: int) -> np.ndarray:
    """(2,) uint32: the Threefry key of a 64-bit seed."""
    return np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)


def gumbel(key, positions, ids, xp: ModuleType = np):
    """Standard Gumbel noise of tokens at positions.

    key        (2,) uint32
    positions  uint32, broadcasts with ids
    ids        uint32 token ids
    Returns float32 in [-2.82, 16.64]: 23 random bits, more of them where the noise is high.
    """
    bits, _ = threefry((key[0:1], key[1:2]), (positions, ids), xp)
    uniform = ((bits >> xp.array(9, dtype=xp.uint32)).astype(xp.float32) + 0.5) * 2.0**-23
    return -xp.log(-xp.log1p(-uniform))


@dataclass(frozen=True)
class Noise:
    """Noise for a drafter at temperatures above 0.

    key      (2,) uint32
    temp     () float32: temperature, which scales the noise
    coupled  True: the target's logits get the same noise, so the drafter should rank by it.
             False: the target's noise is independent; draw the draft with this one, without
             replacement
    """

    key: mx.array
    temp: mx.array
    coupled: bool = True

    @classmethod
    def silent(cls) -> Noise:
        """No noise: temperature 0."""
        return cls(mx.zeros(2, mx.uint32), mx.array(0.0))


class Sampler:
    """Chooses tokens from the target's logits.

    options     temperature, filters, penalties, seed
    processors  further callables (tokens, logits (1, V)) -> logits of mlx-lm's form; each costs
                a synchronisation for every token
    """

    def __init__(
        self,
        options: SamplingOptions,
        processors: Sequence[Callable[[mx.array, mx.array], mx.array]] = (),
    ):
        self.options = options
        self.key = seed_key(options.seed or 0)
        self._processors = list(processors)
        self._penalties = _penalties(options)

    @property
    def is_argmax(self) -> bool:
        """Whether a choice is the plain argmax of the logits, which the device can compute."""
        return self.options.temp == 0 and not self._penalties and not self._processors

    @property
    def noise(self) -> Noise | None:
        """The noise that drafts are made with; None: drafts are just the likeliest tokens."""
        rule, temp = self.options.rule, mx.array(self.options.temp)
        if self.options.temp == 0 or rule == "typical":
            return None
        if rule == "match":
            return Noise(mx.array(self.key), temp)
        return Noise(mx.array(self.key ^ np.uint32(_DRAFT_SALT)), temp, coupled=False)

    def prepare(self, logits: mx.array) -> mx.array:
        """(N, V) logits -> what `choose` needs of them on the host: (N,) ids or (N, V) float32."""
        return mx.argmax(logits, axis=-1) if self.is_argmax else logits.astype(mx.float32)

    def choose(self, prepared: np.ndarray, position: int, history: Sequence[int]) -> int:
        """The token at `position`, after `history`, from one row that `prepare` made."""
        if self.is_argmax:
            return int(prepared)
        ids, scores = self.scores(prepared, position, history)
        return int(ids[np.argmax(scores)])

    def scores(
        self, logits: np.ndarray, position: int, history: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates and the scores by which they compete, in units of logits.

        logits    (V,) float32 of the one row
        position  of the token to choose
        history   every token before it
        Returns (ids (K,), scores (K,)): processed logits + temperature x noise; the highest wins.
        """
        logits = self._process(logits, history)
        temp = self.options.temp
        if temp == 0:
            return np.arange(len(logits)), logits
        ids = self._filter(logits, position)
        at = np.array([position], np.uint32)
        return ids, logits[ids] + temp * gumbel(self.key, at, ids.astype(np.uint32))

    def distribution(self, logits: np.ndarray, position: int, history: Sequence[int]) -> np.ndarray:
        """(V,) float64 probabilities of the token at `position`; arguments as of `scores`.

        `choose` draws from it, but for tokens so unlikely that no noise could let them win.
        """
        logits = self._process(logits, history)
        probs = np.zeros(len(logits))
        if self.options.temp == 0:
            probs[np.argmax(logits)] = 1.0
            return probs
        ids = self._filter(logits, position)
        weights = np.exp((logits[ids] - logits[ids].max()) / self.options.temp, dtype=np.float64)
        probs[ids] = weights / weights.sum()
        return probs

    def uniform(self, position: int) -> np.random.Generator:
        """Random numbers for deciding about one position, independent of all noise."""
        counter = np.array([0, 0, 0, position], np.uint64)
        return np.random.Generator(np.random.Philox(key=self.options.seed or 0, counter=counter))

    def _process(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        for penalise in self._penalties:
            logits = penalise(logits.copy(), history)
        for processor in self._processors:
            row = processor(mx.array(list(history)), mx.array(logits)[None])
            logits = np.array(row[0].astype(mx.float32))
        return logits

    def _filter(self, logits: np.ndarray, position: int) -> np.ndarray:
        """Ids (K,) that may be sampled: mlx-lm's filters in mlx-lm's order, before temperature."""
        o = self.options
        top = logits.max()
        if o.xtc_probability > 0:
            ids = np.arange(len(logits))
        else:  # below this a token loses to the top one under any noise
            reach = o.temp * (_HIGHEST_NOISE - _LOWEST_NOISE)
            ids = np.flatnonzero(logits >= top - reach)
        if 0 < o.top_p < 1:
            ids = _top_p(logits, ids, o.top_p)
        if o.min_p > 0:
            ids = _min_p(logits, ids, o.min_p, o.min_tokens_to_keep)
        if o.xtc_probability > 0 and self._xtc_applies(position):
            ids = _xtc(logits, ids, o.xtc_threshold, o.xtc_special_tokens)
        if 0 < o.top_k < len(ids):
            ids = ids[np.argpartition(-logits[ids], o.top_k - 1)[: o.top_k]]
        return ids

    def _xtc_applies(self, position: int) -> bool:
        counter = np.array([position], np.uint32), np.array([_XTC_COUNTER], np.uint32)
        bits, _ = threefry((self.key[0:1], self.key[1:2]), counter)
        return int(bits[0]) * 2.0**-32 < self.options.xtc_probability


def _top_p(logits: np.ndarray, ids: np.ndarray, top_p: float) -> np.ndarray:
    """The likeliest tokens up to and including the one that reaches `top_p` of all mass."""
    top = logits.max()
    needed = top_p * np.exp(logits - top, dtype=np.float64).sum()
    for kept in (ids, np.arange(len(logits))):
        descending = kept[np.argsort(-logits[kept], kind="stable")]
        mass = np.cumsum(np.exp(logits[descending] - top, dtype=np.float64))
        if mass[-1] >= needed:
            break
    return descending[: np.searchsorted(mass, needed) + 1]


def _min_p(logits: np.ndarray, ids: np.ndarray, min_p: float, least: int) -> np.ndarray:
    kept = ids[logits[ids] >= logits.max() + math.log(min_p)]
    if len(kept) >= least:
        return kept
    return ids[np.argsort(-logits[ids], kind="stable")[:least]]


def _xtc(
    logits: np.ndarray, ids: np.ndarray, threshold: float, special: Sequence[int]
) -> np.ndarray:
    """Drop every candidate above the threshold but the least likely of them."""
    weights = np.exp(logits[ids] - logits[ids].max(), dtype=np.float64)
    probs = weights / weights.sum()
    candidates = probs > threshold
    if not candidates.any():
        return ids
    dropped = probs > probs[candidates].min()
    return ids[~dropped | np.isin(ids, special)]


def _penalties(o: SamplingOptions) -> list[Callable[[np.ndarray, Sequence[int]], np.ndarray]]:
    """The options that add to or scale logits, in mlx-lm's order; each may write its argument."""

    def bias(logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        biases = o.logit_bias or {}
        if beyond := [token for token in biases if not 0 <= token < len(logits)]:
            raise UserError(f"--logit-bias: {beyond[0]} is not a token id below {len(logits)}")
        np.add.at(logits, list(biases.keys()), list(biases.values()))
        return logits

    def repetition(logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        recent = list(set(history[-o.repetition_context_size :]))
        chosen = logits[recent]
        scale = np.float32(o.repetition_penalty)
        logits[recent] = np.where(chosen < 0, chosen * scale, chosen / scale)
        return logits

    def presence(logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        logits[list(set(history[-o.presence_context_size :]))] -= o.presence_penalty
        return logits

    def frequency(logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        np.subtract.at(logits, history[-o.frequency_context_size :], o.frequency_penalty or 0.0)
        return logits

    active = [
        (bias, o.logit_bias),
        (repetition, o.repetition_penalty),
        (presence, o.presence_penalty),
        (frequency, o.frequency_penalty),
    ]
    return [penalise for penalise, value in active if value]
