"""Which model answers, and how requests switch to another."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redrafter_mlx.engine import Engine
from redrafter_mlx.errors import UserError
from redrafter_mlx.server.faults import ApiError, stopping

_REPO = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+")


class Models:
    """One engine at a time.

    engine   the first one, already running
    make     makes an engine for another model's name, not yet started
    allowed  names that requests may switch to; empty: any Hugging Face repo; None: no switching
    """

    def __init__(
        self, engine: Engine, make: Callable[[str], Engine], allowed: Sequence[str] | None
    ):
        self.engine, self._make, self._allowed = engine, make, allowed
        self.name = self._first = engine.served.name
        self._failure: Exception | None = None
        self._created = int(time.time())
        self._turn = asyncio.Lock()  # its holder may change the model
        self._users, self._is_free = 0, asyncio.Event()
        self._is_free.set()
        self._ends = False

    @property
    def names(self) -> list[str]:
        """Models that requests may name; where that is any repo, those named so far."""
        others = [] if self._allowed is None else [self._first, *self._allowed]
        return list(dict.fromkeys([self.name, *others]))

    def check(self, name: str | None) -> None:
        """Raise ApiError for a model that requests may not name."""
        if name is None or name in self.names:
            return
        way_out = f"there is {', '.join(self.names)}"
        if self._allowed is None:
            way_out += "; start the server with --allow-model-switch for others"
        elif not self._allowed and _REPO.fullmatch(name) and not Path(name).exists():
            return
        shown = name if len(name) < 200 else f"{name[:200]}..."
        raise ApiError(404, f"model {shown!r} is not served: {way_out}", "model_not_found", "model")

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Engine]:
        """The engine of a model, which stays loaded while the block runs.

        Another model is loaded as soon as all users of the present one have finished; later
        requests wait. Raises ApiError if it is not allowed, UserError if it cannot be loaded.
        """
        self.check(name)
        async with self._turn:
            if name is not None and name != self.name:
                await self._change(name)
            self._users += 1
            self._is_free.clear()
            engine = self.engine
        try:
            yield engine
        finally:
            self._users -= 1
            if not self._users:
                self._is_free.set()

    async def stop(self, grace: float) -> None:
        """Take no more requests; let running ones finish for `grace` seconds, then cut them off."""
        self._ends = True
        engine = self.engine
        await asyncio.to_thread(engine.stop, grace)
        if self.engine is not engine:  # a switch was under way
            await asyncio.to_thread(self.engine.stop)

    async def _change(self, name: str) -> None:
        await self._is_free.wait()
        if self._ends:
            raise stopping()
        old = self.engine
        change = asyncio.ensure_future(asyncio.to_thread(self._exchange, old, name))
        try:
            await asyncio.shield(change)
        finally:  # even if its client has gone: the thread cannot be stopped
            self.engine = await change
            self.name = self.engine.served.name
        if self.name != name:
            raise UserError(f"model {name!r} cannot be loaded: {self._failure}")

    def _exchange(self, old: Engine, name: str) -> Engine:
        """The engine of another model; of the old one again if that cannot be loaded."""
        old.stop(math.inf)
        old_name = old.served.name
        old.served = None  # memory may not hold both models
        try:
            return self._make(name).start()
        except Exception as error:
            self._failure = error
            return self._make(old_name).start()

    def listed(self) -> dict[str, Any]:
        """The list of models; one object that suits both APIs."""
        models = [self.described(name) for name in self.names]
        first, last = models[0]["id"], models[-1]["id"]
        page = {"has_more": False, "first_id": first, "last_id": last}
        return {"object": "list", "data": models} | page

    def described(self, name: str) -> dict[str, Any]:
        """A model's description; one object that suits both APIs."""
        self.check(name)
        served = self.engine.served
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._created))
        about: dict[str, Any] = {"loaded": served is not None and served.name == name}
        if about["loaded"]:
            about |= {"context": served.context, "drafters": sorted(served.drafters)}
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "redrafter-mlx",
            "type": "model",
            "display_name": name,
            "created_at": made,
            "redrafter": about,
        }
