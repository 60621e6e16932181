"""Who may ask: keys, host names, web pages, and nobody when the server is stopping."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from redrafter_mlx.server.faults import ApiError, stopping
from redrafter_mlx.server.options import LOOPBACK, ServerOptions
from redrafter_mlx.server.replies import send_error

OPEN = ("/", "/health")
"""Routes that need no key, besides the page's own files."""


class Guard:
    """Middleware that turns away whoever may not ask.

    is_stopping  whether the server takes no more requests
    refused      is told of the (route, status) of those that are turned away
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        is_stopping: Callable[[], bool],
        refused: Callable[[str, int], None],
    ):
        self._app, self._options = app, options
        self._is_stopping, self._refused = is_stopping, refused
        self._keys = [key.encode() for key in options.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                self._refused("other", error.status)
                await send_error(scope, send, error)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        # A page of another host may be given a name that leads to this address: the browser then
        # takes it for the same host.
        if self._options.is_local and not self._keys and _name(f"//{host}") not in LOOPBACK:
            raise ApiError(
                403,
                f"this server does not answer under the name {host[:200]!r}: ask 127.0.0.1, or "
                "start it with --api-key",
                "wrong_host",
            )
        if scope["method"] == "POST":
            self._check_origin(headers.get("origin"), host)
        if self._keys and path not in OPEN and not path.startswith("/page/"):
            self._check_key(headers)
        if scope["method"] == "POST" and self._is_stopping():
            raise stopping()

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin is None or "*" in self._options.cors or origin in self._options.cors:
            return
        try:
            is_own = urlsplit(origin).netloc == host
        except ValueError:
            is_own = False
        if not is_own:
            shown = origin[:200]
            message = f"pages of {shown} may not ask: start the server with --cors {shown}"
            raise ApiError(403, message, "wrong_origin")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        given = given.strip()
        # Every key is compared, each in constant time: how long it takes tells nothing.
        found = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if not any(found):
            what = "the API key is wrong" if given else "the API key is missing"
            message = f"{what}: send one of the server's --api-key as Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key")


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
