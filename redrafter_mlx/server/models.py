"""Which model answers, and the change to another."""

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

    engine   the first one, which runs already; name is of its model
    make     makes an engine for another name, not yet started
    allowed  names that requests may change to; empty: any Hugging Face repo; None: no change
    """

    def __init__(
        self,
        engine: Engine,
        make: Callable[[str], Engine] | None = None,
        allowed: Sequence[str] | None = None,
    ):
        self.engine, self._make, self._allowed = engine, make, allowed
        self.name = self._first = engine.served.name
        self._failure: Exception | None = None
        self._created = int(time.time())
        self._turn = asyncio.Lock()  # who has it may change the model
        self._users, self._is_free = 0, asyncio.Event()
        self._is_free.set()
        self._ends = False

    @property
    def names(self) -> list[str]:
        """Models that requests may name; of those that any repo may be, the ones known by now."""
        return list(
            dict.fromkeys([self.name, *([self._first, *self._allowed] if self._allows else [])])
        )

    @property
    def _allows(self) -> bool:
        return self._allowed is not None

    def check(self, name: str | None) -> None:
        """Raise ApiError for a model that requests may not name."""
        if name is None or name in self.names:
            return
        is_repo = _REPO.fullmatch(name) and not Path(name).exists()
        if self._allowed is not None and not self._allowed and is_repo:
            return
        way_out = f"there is {', '.join(self.names)}"
        if not self._allows:
            way_out += "; start the server with --allow-model-switch for others"
        shown = name if len(name) < 200 else f"{name[:200]}..."
        raise ApiError(404, f"model {shown!r} is not served: {way_out}", "model_not_found", "model")

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Engine]:
        """The engine of a model, which stays as long as somebody uses it.

        Another model is loaded when all who use the present one have finished; later requests
        wait. Raises ApiError if it may not be, UserError if it cannot be loaded.
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
        """Take no more requests; end when those that run are answered, or cut after `grace`."""
        self._ends = True
        engine = self.engine
        await asyncio.to_thread(engine.stop, grace)
        if self.engine is not engine:  # it was being changed
            await asyncio.to_thread(self.engine.stop)

    async def _change(self, name: str) -> None:
        await self._is_free.wait()
        if self._ends:
            raise stopping()
        old = self.engine
        change = asyncio.ensure_future(asyncio.to_thread(self._exchange, old, name))
        try:
            await asyncio.shield(change)
        finally:  # its client may have gone: the model is loaded all the same
            self.engine = await change
            self.name = self.engine.served.name
        if self.name != name:
            raise UserError(f"model {name!r} cannot be loaded: {self._failure}")

    def _exchange(self, old: Engine, name: str) -> Engine:
        """The engine of another model; that of the old one if it cannot be loaded."""
        old.stop(math.inf)
        old_name = old.served.name
        old.served = None  # two models need not fit into memory
        try:
            return self._make(name).start()
        except Exception as error:
            self._failure = error
            return self._make(old_name).start()

    def listed(self) -> dict[str, Any]:
        """The models, as both APIs list them."""
        models = [self.described(name) for name in self.names]
        first, last = models[0]["id"], models[-1]["id"]
        page = {"has_more": False, "first_id": first, "last_id": last}
        return {"object": "list", "data": models} | page

    def described(self, name: str) -> dict[str, Any]:
        """A model, as both APIs describe it."""
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
