"""Reading of bodies, within limits, and sending of replies, in the shape of each API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from redrafter_mlx.server.faults import ApiError, anthropic_shape, openai_shape
from redrafter_mlx.server.tools import new_id

BODY_SECONDS = 30.0
"""Most seconds between two pieces of a body."""


class ClientGone(Exception):
    """The client has hung up."""


def shape_of(scope: Scope):
    """The function that shapes errors for the API that a request belongs to."""
    return anthropic_shape if scope["path"].startswith("/v1/messages") else openai_shape


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """A request's body; ApiError if it is larger than `most` bytes or stops arriving."""
    declared = Headers(scope=scope).get("content-length", "0")
    if declared.isdigit() and int(declared[:19]) > most:
        raise _too_large(most)
    parts, size = [], 0
    while True:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                message = await receive()
        except TimeoutError:
            error = f"nothing of the body arrived for {BODY_SECONDS:g} seconds: send it again"
            raise ApiError(408, error, "timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body"):
            return b"".join(parts)


def _too_large(most: int) -> ApiError:
    message = f"the request is larger than {most / 1e6:g} MB: send less, or raise --max-body"
    return ApiError(413, message, "request_too_large")


async def until_gone(receive: Receive) -> None:
    """Wait until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(
    send: Send, data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """Reply with JSON."""
    body = json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    more = {"content-length": str(len(body)), **(headers or {})}
    await send_head(send, status, "application/json", more)
    await send({"type": "http.response.body", "body": body})


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    """Reply with an error."""
    headers = dict(error.headers)
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    await send_json(send, shape_of(scope)(error), error.status, headers)


async def send_head(send: Send, status: int, media: str, headers: Mapping[str, str]) -> None:
    """Begin a reply: status and headers, with an id by which both APIs name the request."""
    id = new_id("req")
    given = {"content-type": media, "x-request-id": id, "request-id": id, **headers}
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
