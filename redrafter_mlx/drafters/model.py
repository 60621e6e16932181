"""A smaller language model as the drafter: any mlx-lm model with the target's tokenizer.

Shape letters: V the target's vocabulary, W beam width, L beam length.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.beam_search import top_k
from redrafter_mlx.drafters.drawn import draw, drawn_tree
from redrafter_mlx.drafters.protocol import Written
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.round import Context, Step, Transcript
from redrafter_mlx.rounds.sampling import Noise, gumbel
from redrafter_mlx.rounds.tree import Candidates, TokenTree
from redrafter_mlx.target.adapter import adapt
from redrafter_mlx.target.caches import LayerCaches

CHUNK = 512
"""Tokens of a new text that are read at a time."""

FEW = 16
"""Tokens that are read along with those whose logits are wanted."""

STEPS_BACK = 8
"""Latest passes whose states are kept, in a model with recurrent layers."""

_log = logging.getLogger("redrafter_mlx")


class ModelDrafter:
    """Drafts with a language model of its own, and reviews what cheaper drafters write.

    model       of mlx-lm; it must be able to branch, as a target must
    vocab_size  V of the target; ids of the model beyond it are never proposed

    Its tree is a chain, the model's choices, with the next likeliest tokens beside each. Its KV
    cache follows the verified text: rejected tokens are rolled back, and tokens that it did not
    write are read, at first a whole prompt. `passes` counts its forward passes over a text.
    """

    readers = 0

    def __init__(self, model: nn.Module, vocab_size: int):
        self.model = model
        self._target = adapt(model)
        self._vocab_size = min(vocab_size, self._target.vocab_size)
        self._caches = self._new_caches()
        self._held: list[int] = []  # tokens in the caches
        self._verified = 0  # how many of them are the text's
        self._transcript: Transcript | None = None
        self._noise: Noise | None = None
        self.passes = 0

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        self.begin(context)
        width = min(budget.width, self._vocab_size)
        if context.noise is not None and not context.noise.coupled:
            return self._drawn(context, budget, width)
        place = len(self._tokens)
        tokens, logprobs, chosen = [], [], []
        logits = self._logits([], 1)
        for depth in range(budget.length - 1):
            if depth:
                logits = self._forward(chosen[-1])
            ids, own = top_k(self._scores(logits, place + depth), width)
            best = mx.argmax(own, axis=-1, keepdims=True)
            chosen.append(mx.take_along_axis(ids, best, axis=-1)[0])
            tokens.append(ids[0])
            logprobs.append(own[0])
        read = device.read(mx.stack(tokens), mx.stack(logprobs), mx.concatenate(chosen))
        self._held += read[2][:-1].tolist()
        return budget.tree(_caterpillar(self._tokens[-1], *read))

    def _drawn(self, context: Context, budget: Budget, width: int) -> TokenTree:
        """A tree of draws, for a rule that weighs them against what they were drawn from."""
        ids = mx.arange(self._vocab_size)
        tokens, logprobs = draw(
            lambda last: self._logits([], 1) if last is None else self._forward(last),
            ids,
            context.noise.key,
            context.noise.temp,
            mx.array([context.position], dtype=mx.uint32),
            width,
            budget.length,
        )
        ids, tokens, logprobs = device.read(ids, tokens, logprobs)
        self._held += tokens[:-1, 0].tolist()
        return drawn_tree(self._tokens[-1], ids, tokens, logprobs, budget)

    def observe(self, step: Step) -> None:
        pass

    def reset(self) -> None:
        self.passes = 0

    def fork(self, length: int) -> ModelDrafter:
        other = copy(self)
        known = self._caches.restorable(min(length, len(self._held)))
        other._caches = self._caches.fork(known) if known > 0 else self._new_caches()
        other._held, other._transcript = self._held[: max(known, 0)], None
        return other

    def begin(self, context: Context) -> None:
        """Find out how much of the text the caches already hold."""
        if context.transcript is not self._transcript:
            self._transcript, self._verified = context.transcript, 0
        self._tokens, noise = context.transcript.tokens, context.noise
        self._noise = noise if noise is not None and noise.coupled else None
        most = min(len(self._held), len(self._tokens) - 1)
        while self._verified < most and self._held[self._verified] == self._tokens[self._verified]:
            self._verified += 1

    def write(self, ahead: Sequence[int], most: int) -> Written:
        """`most` tokens after the text and `ahead`."""
        place = len(self._tokens) + len(ahead)
        tokens, logprobs = [], []
        logits = self._logits(ahead, 1)
        for i in range(most):
            if i:
                logits = self._forward(tokens[-1])
            scores = self._scores(logits, place + i)
            tokens.append(mx.argmax(scores, axis=-1))
            logprobs.append(mx.max(scores, axis=-1))
        tokens, logprobs = device.read(mx.concatenate(tokens), mx.concatenate(logprobs))
        self._held += tokens[:-1].tolist()
        probs = np.exp(logprobs).tolist()
        return Written(tokens.tolist(), probs, probs)

    def review(self, ahead: Sequence[int], drafted: Written, lenience: float) -> Written:
        """Tokens of `drafted` up to the first that it rejects, and its own choice there.

        A token passes if it is the model's choice or if the writer's probability of it is at most
        `lenience` times the model's (arXiv 2312.11462).
        """
        rows = len(drafted.tokens) + 1
        logits = self._logits([*ahead, *drafted.tokens], rows)
        scores = self._scores(logits, len(self._tokens) + len(ahead))
        ids = mx.array([*drafted.tokens, 0])[:, None]
        choices, best, of_drafted = device.read(
            mx.argmax(scores, axis=-1),
            mx.max(scores, axis=-1),
            mx.take_along_axis(scores, ids, axis=-1)[:, 0],
        )
        probs = np.exp(of_drafted)
        passed = 0
        for token, share in zip(drafted.tokens, drafted.shares, strict=True):
            if token != choices[passed] and share > lenience * probs[passed]:
                break
            passed += 1
        probs = [*probs[:passed].tolist(), float(np.exp(best[passed]))]
        return Written([*drafted.tokens[:passed], int(choices[passed])], probs, probs)

    def _logits(self, ahead: Sequence[int], rows: int) -> mx.array:
        """(rows, V) after each of the last `rows` tokens of the text and `ahead`."""
        wanted = [*self._tokens[self._verified :], *ahead]
        held = self._held[self._verified :]
        most = min(len(held), len(wanted) - rows)
        common = next((i for i in range(most) if held[i] != wanted[i]), most)
        length = self._verified + common
        if not self._caches.rewind(length):
            self._caches, length = self._new_caches(), 0
            wanted, common = [*self._tokens, *ahead], 0
        del self._held[length:]
        missing = wanted[common:]
        self._held += missing
        if len(missing) > rows + FEW:
            self._target.read(missing[:-rows], self._caches, CHUNK)
            missing = missing[-rows:]
        return self._forward(mx.array(missing))[-rows:]

    def _new_caches(self) -> LayerCaches:
        return self._target.empty_caches(steps_back=STEPS_BACK)

    def _forward(self, tokens: mx.array) -> mx.array:
        """(N, V) logits after each of N further tokens, which the caches hold then."""
        self.passes += 1
        self._caches.begin(tokens.size, certain=True)
        logits = self._target.forward(tokens[None], self._caches).logits[0]
        self._caches.commit(range(tokens.size))
        return logits[:, : self._vocab_size].astype(mx.float32)

    def _scores(self, logits: mx.array, place: int) -> mx.array:
        """(N, V) log-probabilities of the tokens at N positions from `place` on.

        The target's noise is added where it is known.
        """
        if self._noise is not None:
            positions = mx.arange(place, place + len(logits), dtype=mx.uint32)[:, None]
            ids = mx.arange(logits.shape[1], dtype=mx.uint32)[None]
            logits = logits + self._noise.temp * gumbel(self._noise.key, positions, ids, mx)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _caterpillar(
    root: int, tokens: np.ndarray, logprobs: np.ndarray, chosen: np.ndarray
) -> Candidates:
    """A chain of chosen tokens with the other likely ones beside each.

    tokens, logprobs  (L-1, W) of each depth, given the tokens chosen before
    chosen            (L-1,)
    """
    depths, width = tokens.shape
    at = (tokens == chosen[:, None]).argmax(axis=1)
    spine = np.arange(depths) * width + at
    before = np.concatenate([[0.0], np.cumsum(logprobs[np.arange(depths), at])[:-1]])
    return Candidates(
        root=root,
        tokens=tokens.reshape(-1),
        parents=np.repeat(np.concatenate([[-1], spine[:-1]]), width),
        logprobs=(before[:, None] + logprobs).reshape(-1),
        beams=spine[-1:],
    )


def check_tokenizers(target: Any, draft: Any, name: str) -> None:
    """UserError that names the first difference if two tokenizers disagree; `name` of the draft."""
    words = {id: word for word, id in target.get_vocab().items()}
    others = {id: word for word, id in draft.get_vocab().items()}
    if words != others:
        first = min(i for i in words.keys() | others.keys() if words.get(i) != others.get(i))
        raise UserError(
            f"{name} has another tokenizer than the target: token {first} is "
            f"{others.get(first)!r} there and {words.get(first)!r} here; take a model of the "
            "target's family"
        )
    for what in ("bos_token", "eos_token", "unk_token"):
        one, other = getattr(target, what, None), getattr(draft, what, None)
        if one != other:
            raise UserError(
                f"{name} has another tokenizer than the target: its {what} is {other!r}, the "
                f"target's {one!r}; take a model of the target's family"
            )


def warn_if_larger(target: nn.Module, draft: nn.Module, name: str) -> None:
    """Say so when a draft model is no smaller than the target."""
    size = lambda model: sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    if size(draft) >= size(target):
        _log.warning(
            "%s is no smaller than the target (%.0f and %.0f MB): drafting will not pay",
            name,
            size(draft) / 1e6,
            size(target) / 1e6,
        )
