"""Max-Gram: what followed earlier occurrences of the end of the text (arXiv 2312.11462).

No weights and no device: an index of the text (suffixes.py), and how often its guesses were right.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from redrafter_mlx.drafters.protocol import Written
from redrafter_mlx.drafters.suffixes import Match, SuffixAutomaton
from redrafter_mlx.errors import UserError
from redrafter_mlx.pricing.budget import Budget
from redrafter_mlx.rounds.round import Context, Step, Transcript
from redrafter_mlx.rounds.tree import Candidates, TokenTree, Trie

BREAK = -1
"""Stands between two texts of the index; nothing is proposed across it."""


class MaxGramDrafter:
    """Proposes what followed earlier occurrences of the longest suffixes of the text.

    length    most tokens of a continuation
    bigrams   token -> (token, share): what to guess where no suffix occurred before; None: nothing
    memory    of earlier texts, which are searched too; None: of this text alone

    The longest suffix may have been followed by different tokens, and shorter suffixes by others:
    the candidates are a tree of up to `CONTINUATIONS` continuations. Probabilities are measured
    (`HitRates`).
    """

    needs_no_search = True
    readers = 0
    CONTINUATIONS = 4
    LEAST = 0.02  # probability of a path below which it is not proposed

    def __init__(
        self,
        length: int = 24,
        bigrams: Mapping[int, tuple[int, float]] | None = None,
        memory: Memory | None = None,
    ):
        self.length, self.bigrams, self.memory = length, bigrams or {}, memory
        self.rates = HitRates()
        self._new_index()
        self._transcript: Transcript | None = None
        self._seen = 0

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        self.begin(context)
        return budget.tree(self._candidates(context.transcript.tokens[-1]))

    def observe(self, step: Step) -> None:
        pass  # the text tells which guesses were right, also those that were not verified

    def reset(self) -> None:
        if self._transcript is None:
            return
        if self.memory is not None:
            tokens = self._transcript.tokens
            self.memory.add(tokens)
            self._extend([*tokens[self._seen :], BREAK])
        if self.memory is None or len(self._index) > 2 * self.memory.capacity:
            self._new_index()
        self._transcript = None

    def fork(self, length: int) -> MaxGramDrafter:
        other = copy(self)
        other._transcript = None
        other._new_index()
        return other

    def save(self) -> None:
        """Write the memory, with the last text in it, to its file; nothing without a memory."""
        self.reset()
        if self.memory is not None:
            self.memory.save()

    def begin(self, context: Context) -> None:
        """Take in what has been added to the text since the last round."""
        tokens = context.transcript.tokens
        if context.transcript is not self._transcript:
            self.reset()
            self._transcript = context.transcript
            self._extend(tokens)
        else:
            for token in tokens[self._seen :]:
                self._learn(token)
                self._index.append(token)
        self._seen = len(tokens)

    def _new_index(self) -> None:
        """An index of earlier texts alone, if any are remembered."""
        self._index = SuffixAutomaton()
        self._extend(self.memory.tokens() if self.memory else ())

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._index.append(token)

    def write(self, ahead: Sequence[int], most: int) -> Written:
        """Up to `most` tokens after the text and `ahead`: the likeliest continuation."""
        for start, length in self._starts(self._index.matches(ahead)):
            if tokens := self._following(start, most, ahead):
                rates = [self.rates(length + depth) for depth in range(len(tokens))]
                return Written(tokens, rates, [1.0] * len(tokens))
        return self._by_bigrams([*self._index.text[-1:], *ahead][-1], most)

    def _candidates(self, root: int) -> Candidates:
        trie, taken = Trie(root), 0
        rest: dict[int, float] = {}  # of a node with children: the probability that none is right
        for start, length in self._starts(self._index.matches()):
            taken += self._add(trie, rest, self._following(start, self.length), length)
            if taken == self.CONTINUATIONS:
                break
        if taken == 0:
            return self._by_bigrams(root, self.length).candidates(root)
        return trie.candidates(always=range(len(trie.tokens)))

    def _add(self, trie: Trie, rest: dict[int, float], tokens: list[int], length: int) -> bool:
        """Add a continuation of a match of `length` tokens; whether it brought a new node."""
        node, before = 0, len(trie.tokens)
        for depth, token in enumerate(tokens):
            child = trie.child(node, token)
            if child is None:
                hit = self.rates(length + depth, first=node not in rest)
                share = rest.get(node, 1.0) * hit
                logprob = trie.logprobs[node] + math.log(share)
                if logprob < math.log(self.LEAST):
                    break
                rest[node] = rest.get(node, 1.0) - share
                child = trie.add(node, token, logprob)
            node = child
        return len(trie.tokens) > before

    def _learn(self, token: int) -> None:
        """Count whether the guesses for `token` were right, now that it is known."""
        guessed: list[int] = []
        for start, length in self._starts(self._index.matches()):
            guess = self._following(start, 1)
            if not guess or guess[0] in guessed:
                continue
            self.rates.count(length, guess[0] == token, first=not guessed)
            guessed += guess
            if guess[0] == token or len(guessed) == self.CONTINUATIONS:
                return

    def _starts(self, matches: Sequence[Match]) -> Iterator[tuple[int, int]]:
        """Where continuations begin and how much of the text stands before them, best first.

        Of the places of a match the latest comes first; the paper takes the earliest.
        """
        for match in matches:
            yield match.latest + 1, match.length
            if match.first != match.latest:
                yield match.first + 1, match.length

    def _following(self, start: int, most: int, ahead: Sequence[int] = ()) -> list[int]:
        """Up to `most` tokens from an index of the text on, up to a break.

        Beyond the end of the text and `ahead` it repeats what follows `start`.
        """
        text = self._index.text
        tokens = text[start : start + most]
        if len(tokens) < most:
            tokens += ahead[max(0, start - len(text)) :]
            tokens = (tokens * (most // len(tokens) + 1))[:most] if tokens else []
        return tokens[: tokens.index(BREAK)] if BREAK in tokens else tokens

    def _by_bigrams(self, last: int, most: int) -> Written:
        written = Written()
        while len(written.tokens) < most and last in self.bigrams:
            last, share = self.bigrams[last]
            written.tokens.append(last)
            written.probs.append(share)
            written.shares.append(1.0)
        return written


class HitRates:
    """How often a guess is right, by the length of the match it was made from: measured online.

    A call gives the probability of a guess; `first` tells the best match's guess from those that
    hold only if the better ones are wrong. Each starts from what was measured on answers of the
    demo target, and follows what happens with a weight of 1/`WINDOW` for each new guess.
    """

    WINDOW = 40
    FIRST = (0.22, 0.52, 0.61, 0.69, 0.83, 0.89, 0.94)
    OTHER = (0.09, 0.14, 0.25, 0.20, 0.20, 0.20, 0.20)
    """Of matches of 1, 2, 3, 4, 5 to 8, 9 to 16 and more tokens."""

    def __init__(self):
        self._rates = {True: list(self.FIRST), False: list(self.OTHER)}

    def __call__(self, length: int, first: bool = True) -> float:
        return self._rates[first][_kind(length)]

    def count(self, length: int, hit: bool, first: bool) -> None:
        """One guess of a match of `length` tokens was right or wrong."""
        rates, kind = self._rates[first], _kind(length)
        rates[kind] += (min(max(float(hit), 0.01), 0.99) - rates[kind]) / self.WINDOW


def _kind(length: int) -> int:
    return length - 1 if length < 5 else 4 if length <= 8 else 5 if length <= 16 else 6


FORMAT = "redrafter-mlx Max-Gram memory"


@dataclass
class Memory:
    """Texts of earlier requests, the oldest forgotten first.

    path        file that it is saved to; None: it is not saved
    capacity    most tokens
    vocab_size  of the target whose token ids these are
    """

    path: Path | None
    capacity: int
    vocab_size: int
    texts: list[list[int]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, capacity: int, vocab_size: int) -> Memory:
        """The memory that was saved to `path`; empty if there is no such file.

        Raises UserError if the file is damaged, something else, or of another vocabulary.
        """
        memory = cls(path, capacity, vocab_size)
        if path.exists():
            for text in _read(path, vocab_size):
                memory.add(text)
        elif not path.parent.is_dir():
            raise UserError(
                f"--max-gram-memory {path}: there is no directory {path.parent}; make it first"
            )
        return memory

    def add(self, text: Sequence[int]) -> None:
        """Remember one more text; only the end of one that is too long."""
        self.texts.append(list(text[-self.capacity :]))
        excess = sum(map(len, self.texts)) - self.capacity
        while excess > 0:
            excess -= len(self.texts.pop(0))

    def tokens(self) -> list[int]:
        """All texts, a `BREAK` after each."""
        return [token for text in self.texts for token in (*text, BREAK)]

    def save(self) -> None:
        """Write it whole or not at all; nothing without a path."""
        if self.path is None:
            return
        content = {"format": FORMAT, "vocab_size": self.vocab_size, "texts": self.texts}
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_text(json.dumps(content), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            raise UserError(
                f"--max-gram-memory {self.path}: cannot be written ({error.strerror}); give "
                "another path"
            ) from error


def _read(path: Path, vocab_size: int) -> list[list[int]]:
    def unusable(fault: str, way_out: str = "delete it or give another path") -> UserError:
        return UserError(f"--max-gram-memory {path}: {fault}; {way_out}")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unusable(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise unusable("is damaged, or not a memory") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise unusable("is not a memory that Max-Gram has saved")
    if content.get("vocab_size") != vocab_size:
        sizes = f"{content.get('vocab_size')} tokens, the target's {vocab_size}"
        raise unusable(f"its vocabulary has {sizes}", "give each model its own memory")
    texts = content.get("texts")
    is_id = lambda token: type(token) is int and 0 <= token < vocab_size
    if not isinstance(texts, list) or not all(
        isinstance(text, list) and all(map(is_id, text)) for text in texts
    ):
        raise unusable("its texts are not lists of token ids")
    return texts


def count_bigrams(text: Sequence[int]) -> dict[int, tuple[int, float]]:
    """Token -> (the token that follows it most often in `text`, its share of all that follow)."""
    following: dict[int, dict[int, int]] = {}
    for token, after in pairwise(text):
        counts = following.setdefault(token, {})
        counts[after] = counts.get(after, 0) + 1
    return {
        token: max(
            ((after, count / (sum(counts.values()) + 1)) for after, count in counts.items()),
            key=lambda guess: guess[1],
        )
        for token, counts in following.items()
    }
