"""Who may send requests: checks of keys, host names and web pages, and whether it is stopping."""

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
    """Middleware that turns away requests that are not allowed.

    is_stopping  whether the server takes no more requests
    refused      called with the route and status of each request turned away
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
        # DNS rebinding: another site's host name may be pointed at this address, and browsers then
        # take its pages for ours.
        if self._options.is_local and not self._keys and _name(f"//{host}") not in LOOPBACK:
            raise ApiError(
                403,
                f"this server does not answer to the name {host[:200]!r}: use 127.0.0.1, or start "
                "the server with --api-key",
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
        if origin.partition("://")[2] != host:
            shown = origin[:200]
            message = f"pages of {shown} are not allowed: start the server with --cors {shown}"
            raise ApiError(403, message, "wrong_origin")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        given = given.strip()
        # Every key is compared, each in constant time, so that timing reveals nothing.
        found = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if not any(found):
            what = "the API key is wrong" if given else "the API key is missing"
            message = f"{what}: send one of the server's keys as Authorization: Bearer KEY"
            raise ApiError(401, message, "invalid_api_key")


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
