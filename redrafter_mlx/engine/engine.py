"""The engine: a queue of requests, a thread that owns the device, and turns."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.generate import wired_limit

from redrafter_mlx.config import EngineOptions
from redrafter_mlx.engine.prefixes import UNREAD, Prefix, Prefixes
from redrafter_mlx.engine.request import Request, Ticket, Turn
from redrafter_mlx.engine.run import Run
from redrafter_mlx.engine.saved import load_prefixes, save_prefixes
from redrafter_mlx.engine.served import Served
from redrafter_mlx.errors import UserError
from redrafter_mlx.generation import quantization
from redrafter_mlx.loading.places import expanded
from redrafter_mlx.machine import device
from redrafter_mlx.target.adapter import STEPS_BACK

_log = logging.getLogger("redrafter_mlx")


class QueueFull(UserError):
    """The queue holds as many requests as it may.

    retry_after  seconds until there may be room
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting already: try again later")
        self.retry_after = retry_after


class Stopping(UserError):
    """The engine takes no more requests."""

    def __init__(self):
        super().__init__("the server is stopping and takes no more requests")


@dataclass
class Totals:
    """What an engine has done since it started; numbers that only grow."""

    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    rounds: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0


class Engine:
    """Answers requests with one model.

    load  returns what is served; called in the engine's thread, to which all its arrays belong

    `start` waits until the model is loaded and raises what loading raised. Running requests take
    turns: a turn is a chunk of a prompt, or a round.
    """

    def __init__(self, load: Callable[[], Served], options: EngineOptions | None = None):
        self._load, self.options = load, options or EngineOptions()
        self.served: Served | None = None
        self.totals = Totals()
        given = self.options.cache_memory
        self.cache_bytes = device.machine_memory() // 4 if given is None else int(given * 1e9)
        self._waiting: deque[Ticket] = deque()
        self._running: deque[Run] = deque()  # in the order of their turns
        self._at_turn: Run | None = None
        self._prefixes = Prefixes()
        self._changed = threading.Condition()
        self._closing, self._failure = False, None
        self._cut_at: float | None = None
        self._token_bytes = 0.0  # most bytes per token of any text so far
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._ready = threading.Event()

    def start(self) -> Engine:
        """Load the model; afterwards requests are answered."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def submit(self, request: Request, deliver: Callable[[Turn], None]) -> Ticket:
        """Accept a request; `deliver` gets each of its turns, in the engine's thread.

        Raises QueueFull, Stopping, and UserError for a request that cannot be honoured.
        """
        if request.drafter not in self.served.drafters:
            known = ", ".join(sorted(self.served.drafters))
            raise UserError(f"drafter {request.drafter!r} is not loaded; there are: {known}")
        if len(request.prompt) == 0:
            raise UserError("the prompt is empty: it must hold at least one token")
        ticket = Ticket(request, deliver)
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise Stopping
            if len(self._waiting) >= self.options.queue:
                raise QueueFull(len(self._waiting), self._seconds_a_request())
            self._waiting.append(ticket)
            self.totals.requests += 1
            self._changed.notify()
        return ticket

    def stop(self, grace: float = 0.0) -> None:
        """Accept no more requests; finish the running ones, cancelling after `grace` seconds."""
        with self._changed:
            self._closing = True
            self._cut_at = time.monotonic() + grace
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._ready.is_set() and self._thread.is_alive() and not self._closing

    def status(self) -> dict[str, Any]:
        """What the engine is doing, in counts; may be called from any thread."""
        return {
            "running": len(self._running) + (self._at_turn is not None),
            "waiting": len(self._waiting),
            "prefixes": len(self._prefixes),
            "prefix_bytes": self._prefixes.nbytes,
        }

    def _seconds_a_request(self) -> float:
        done = max(sum(self.totals.finished.values()), 1)
        return max(1.0, (self.totals.prompt_seconds + self.totals.decode_seconds) / done)

    def _work(self) -> None:
        try:
            self.served = self._load()
            self._load_prefixes()
        except BaseException as error:
            self._failure = error
            self._ready.set()
            return
        self._ready.set()
        with wired_limit(self.served.model):
            while self._admit():
                self._at_turn = self._running.popleft()
                self._turn(self._at_turn)
                self._at_turn = None
            self._save_prefixes()
            self._prefixes = Prefixes()
        device.leave_thread()

    def _load_prefixes(self) -> None:
        if self.options.prompt_cache_dir and self.served.target.branching:
            for prefix in load_prefixes(self._directory, self.served.target):
                self._prefixes.keep(prefix)
            self._prefixes.shrink(self.cache_bytes)

    def _save_prefixes(self) -> None:
        if self.options.prompt_cache_dir and self.served.target.branching:
            try:
                save_prefixes(self._directory, self._prefixes, self.served.target)
            except UserError as error:
                _log.warning("%s", error)

    @property
    def _directory(self) -> Path:
        return expanded(self.options.prompt_cache_dir)

    def _admit(self) -> bool:
        """Begin waiting requests, wait for one if there is nothing to do; False at the end."""
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing and time.monotonic() >= self._cut_at:
                    for ticket in [*self._waiting, *(run.ticket for run in self._running)]:
                        ticket.cancel()
                ticket = None
                if self._waiting and self._has_room(self._waiting[0].request):
                    ticket = self._waiting.popleft()
            if ticket is None:
                return bool(self._running)
            self._begin(ticket)

    def _has_room(self, request: Request) -> bool:
        if not self._running:
            return True
        held = sum(run.caches.nbytes for run in self._running)
        needed = self._token_bytes * len(request.prompt)
        return len(self._running) < self.options.parallel and held + needed <= self.cache_bytes

    def _begin(self, ticket: Ticket) -> None:
        if ticket.is_cancelled:
            self._end(ticket, Turn(finish_reason="cancelled"))
            return
        try:
            self._running.append(self._new_run(ticket))
        except Exception as error:
            self._end(ticket, Turn(finish_reason="error", error=error))

    def _new_run(self, ticket: Ticket) -> Run:
        request, target = ticket.request, self.served.target
        how = quantization(request.generation)
        drafter = self.served.drafters[request.drafter]
        donor, known = None, 0
        if target.branching and how is None:
            donors = [run for run in self._running if run.caches.quantization is None]
            donor, known = self._prefixes.find(request.prompt, donors)
        if donor is None:
            caches = target.empty_caches(how, STEPS_BACK if target.branching else 0)
            fresh = drafter and drafter.fork(0)
            return Run(ticket, self.served, caches, fresh, self._is_alone)
        name = donor.name if isinstance(donor, Prefix) else donor.request.drafter
        like = donor.drafter if name == request.drafter else drafter
        knows = known + 1 if name == request.drafter else 0
        drafter = like and like.fork(knows)
        caches = donor.caches.fork(known)
        if isinstance(donor, Prefix) and 2 * known > donor.caches.length:
            self._prefixes.remove(donor)  # the longer text will be kept instead
        return Run(ticket, self.served, caches, drafter, self._is_alone)

    def _is_alone(self) -> bool:
        return not self._running and not self._waiting

    def _turn(self, run: Run) -> None:
        ticket = run.ticket
        if ticket.is_cancelled:
            turn = run.ended("cancelled")
        else:
            try:
                turn = run.turn()
            except Exception as error:
                _log.debug("a request failed", exc_info=True)
                turn = run.ended("error", error)
        if turn.finish_reason is None:
            self._running.append(run)
            self._deliver(ticket, turn)
            return
        run.close()
        self._keep(run, turn)
        self._end(ticket, turn, run)

    def _keep(self, run: Run, turn: Turn) -> None:
        """Keep the text's caches and drafter for later ones; save what the drafter remembers."""
        if hasattr(run.drafter, "save"):
            run.drafter.save()
        caches = run.caches
        if turn.finish_reason == "error" or not self.served.target.branching:
            return
        if caches.length:
            self._token_bytes = max(self._token_bytes, caches.nbytes / caches.length)
        if caches.quantization is None:
            length = caches.forkable(min(len(run.said) - UNREAD, caches.length))
            if length > 0:
                drafter = run.drafter and run.drafter.fork(length + 1)
                name = run.request.drafter
                self._prefixes.keep(Prefix(run.said, caches.fork(length), drafter, name))
        active = sum(other.caches.nbytes for other in self._running)
        self._prefixes.shrink(max(0, self.cache_bytes - active))

    def _end(self, ticket: Ticket, turn: Turn, run: Run | None = None) -> None:
        totals, reason = self.totals, turn.finish_reason
        totals.finished[reason] = totals.finished.get(reason, 0) + 1
        if run is not None:
            stats = run.stats
            totals.prompt_tokens += stats.prompt_tokens
            totals.cached_tokens += stats.cached_tokens
            totals.tokens += stats.tokens
            totals.rounds += stats.rounds
            totals.drafted_tokens += stats.drafted
            totals.accepted_tokens += sum(stats.accepted_at)
            totals.prompt_seconds += stats.prompt_seconds
            totals.decode_seconds += stats.decode_seconds
        self._deliver(ticket, turn)

    def _deliver(self, ticket: Ticket, turn: Turn) -> None:
        try:
            ticket.deliver(turn)
        except Exception:
            _log.debug("a request's turns are not taken any more", exc_info=True)
            ticket.cancel()
