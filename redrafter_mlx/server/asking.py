"""Carries a request's turns from the engine's thread to the event loop; neither waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from redrafter_mlx.engine import Engine, Ticket, Turn
from redrafter_mlx.server.faults import ApiError, as_api_error, stopping
from redrafter_mlx.server.plan import Plan

MOST_UNREAD = 2048
"""How many turns may wait for a slow client before its request is cancelled."""


class Asking:
    """The engine's work on one HTTP request; leaving `async with` cancels what is left of it.

    seconds  how long it may take before ApiError is raised
    """

    def __init__(self, engine: Engine, plan: Plan, seconds: float):
        self._engine, self._plan = engine, plan
        self._seconds, self._ends = seconds, time.monotonic() + seconds
        self._queue: asyncio.Queue[tuple[int, Turn]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._enough: set[int] = set()
        self._sent, self._taken = 0, 0  # each is written by one thread only
        self._is_unread = False

    async def __aenter__(self) -> Asking:
        self._loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(self._plan.requests):
                self._tickets.append(self._engine.submit(request, self._deliverer(index)))
        except BaseException:
            self._cancel()
            raise
        return self

    async def __aexit__(self, *_) -> None:
        self._cancel()

    def enough(self, index: int) -> None:
        """Cut a request's answer short; its last turn still comes."""
        self._enough.add(index)
        self._tickets[index].cancel()

    async def turns(self, beat: float) -> AsyncIterator[tuple[int, Turn] | None]:
        """(index of the request, turn) as they come; None whenever `beat` seconds bring nothing.

        Raises ApiError if anything goes wrong with one of the requests.
        """
        running = len(self._plan.requests)
        while running:
            found = await self._next(beat)
            if found is None:
                yield None
                continue
            index, turn = found
            self._taken += 1
            if turn.finish_reason == "error":
                raise as_api_error(turn.error)
            if turn.finish_reason == "cancelled" and index not in self._enough:
                raise self._why_cancelled()
            running -= turn.finish_reason is not None
            yield index, turn

    async def _next(self, beat: float) -> tuple[int, Turn] | None:
        if not self._queue.empty():
            return self._queue.get_nowait()
        left = self._ends - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(beat, left))):
                return await self._queue.get()
        except TimeoutError:
            if time.monotonic() < self._ends:
                return None
            raise too_late(self._seconds) from None

    def _why_cancelled(self) -> ApiError:
        if self._is_unread:
            return ApiError(408, "the answer was not read fast enough", "slow_reader")
        return stopping()

    def _deliverer(self, index: int):
        def deliver(turn: Turn) -> None:  # in the engine's thread
            if not self._plan.details:
                turn = replace(turn, tree=None)
            self._sent += 1
            if self._sent - self._taken > MOST_UNREAD:
                self._is_unread = True
                self._cancel()
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, turn))

        return deliver

    def _cancel(self) -> None:
        for ticket in list(self._tickets):  # the engine's thread may be here while more are added
            ticket.cancel()


def too_late(seconds: float) -> ApiError:
    """The error for a request that has used up its time."""
    message = f"the request took longer than {seconds:g} seconds: ask for less"
    return ApiError(504, message, "timeout")
