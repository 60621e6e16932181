"""One request while it is being answered: its generation, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.engine.prefixes import UNREAD
from redrafter_mlx.engine.request import DraftedTree, Piece, Request, Ticket, Turn
from redrafter_mlx.engine.served import Served
from redrafter_mlx.generation import Generation, Place
from redrafter_mlx.machine import device
from redrafter_mlx.stream import GenerationResponse, turns_of_text
from redrafter_mlx.target.caches import LayerCaches


class OwnTime:
    """A clock, in seconds, that runs only inside its `with` blocks: a run's own turns."""

    def __init__(self):
        self._spent, self._since = 0.0, None

    def __call__(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._spent + running

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_) -> None:
        self._spent, self._since = self(), None


class Run:
    """A request that takes turns.

    caches   of the first tokens of its prompt, or empty; from now on the run's own
    drafter  which knows the same tokens; None for plain decoding
    alone    whether no other run waits
    """

    def __init__(
        self,
        ticket: Ticket,
        served: Served,
        caches: LayerCaches,
        drafter: Drafter | None,
        alone: Callable[[], bool],
    ):
        request = ticket.request
        self.ticket, self.drafter, self.caches = ticket, drafter, caches
        self._clock = OwnTime()
        marks = [mark - UNREAD for mark in request.marks]
        place = Place(caches, marks, alone, self._clock, served.knowledge(request.drafter))
        self._generation = Generation(
            served.model,
            request.prompt,
            drafter,
            generation=request.generation,
            sampling=request.sampling,
            draft=request.draft,
            eos_token_ids=served.tokenizer.eos_token_ids,
            logits_processors=request.logits_processors,
            place=place,
        )
        self._events = turns_of_text(self._generation, served.tokenizer)
        self._kept, self._stopped_by = 0, None

    @property
    def request(self) -> Request:
        return self.ticket.request

    @property
    def said(self) -> list[int]:
        """The prompt and the answer so far."""
        return self._generation.said

    @property
    def stats(self):
        return self._generation.stats

    def turn(self) -> Turn:
        """A chunk of the prompt, or a round. A turn with a finish reason is the last."""
        pieces, reason = [], None
        with self._clock:
            for event in self._events:
                if event is None:
                    break
                pieces.append(self._piece(event))
                reason = event.finish_reason
                self._kept, self._stopped_by = event.kept, event.stopped_by
                if event.end_of_round:
                    break
        tree = None
        if pieces:
            tree, path = self._generation.tree
            found, path = tree.without_filling(path)
            tokens = found.tokens.tolist()
            tokens[0] = self.said[-len(pieces) - 1]  # not known yet when the pass was built
            tree = DraftedTree(tokens, found.parents.tolist(), path)
        return self._told(pieces, tree, reason)

    def ended(self, reason: str, error: Exception | None = None) -> Turn:
        """The last turn of a run that is cancelled or fails."""
        return self._told([], None, reason, error)

    def _told(self, pieces, tree, reason: str | None, error: Exception | None = None) -> Turn:
        run = self._generation
        stats = run.stats.as_dict()
        if (plain := run.plain_tps) is not None:
            stats["plain_tps"] = round(plain, 3)
        read = min(self.caches.length + 1, len(run.prompt))
        note = run.note if reason else ""
        return Turn(
            pieces, read, stats, tree, reason, error, run.seed, note, self._kept, self._stopped_by
        )

    def close(self) -> None:
        """No more turns."""
        self._events.close()

    def _piece(self, event: GenerationResponse) -> Piece:
        wanted = self.request.top_logprobs
        if wanted is None:
            return Piece(event.text, event.token, event.from_draft)
        (logprobs,) = device.read(event.logprobs.astype(mx.float32))
        likeliest = np.argsort(-logprobs, kind="stable")[:wanted] if wanted else ()
        top = tuple((int(token), float(logprobs[token])) for token in likeliest)
        own = float(logprobs[event.token])
        return Piece(event.text, event.token, event.from_draft, own, top)
