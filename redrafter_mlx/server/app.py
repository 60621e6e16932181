"""The application: its routes, and how a request reaches the engine and is answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from redrafter_mlx.engine import Served
from redrafter_mlx.server.anthropic import count_tokens, plan_message
from redrafter_mlx.server.asking import Asking, too_late
from redrafter_mlx.server.document import document
from redrafter_mlx.server.faults import ApiError, as_api_error, of_validation
from redrafter_mlx.server.guard import Guard
from redrafter_mlx.server.metrics import TYPE, Metrics
from redrafter_mlx.server.models import Models
from redrafter_mlx.server.openai import plan_chat, plan_completion
from redrafter_mlx.server.options import ServerOptions
from redrafter_mlx.server.page import Page
from redrafter_mlx.server.plan import Defaults, Plan
from redrafter_mlx.server.replies import (
    ClientGone,
    read_body,
    send_error,
    send_head,
    send_json,
    shape_of,
    until_gone,
)
from redrafter_mlx.server.responses import plan_response
from redrafter_mlx.server.schemas import ChatRequest, CompletionRequest
from redrafter_mlx.server.schemas_anthropic import CountRequest, MessagesRequest
from redrafter_mlx.server.schemas_responses import ResponsesRequest

BEAT_SECONDS = 5.0
SEND_SECONDS = 60.0
"""How long a client may read nothing at all."""
SLOW_SECONDS = 10.0
"""How long a client has to read the end of its answer once the request's time is up."""
AT_ONCE = 100_000
"""Bytes up to which a body is parsed in the event loop itself, not in a thread."""
_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True)
class Task:
    """A kind of request that the model answers: its schema, its plan, its summary for OpenAPI."""

    schema: type[BaseModel]
    plan: Callable[[Any, Served, Defaults], Plan]
    summary: str


ROUTES = {
    "/v1/chat/completions": Task(ChatRequest, plan_chat, "The next message of a conversation"),
    "/v1/completions": Task(CompletionRequest, plan_completion, "How a text goes on"),
    "/v1/responses": Task(ResponsesRequest, plan_response, "The next items of a conversation"),
    "/v1/messages": Task(MessagesRequest, plan_message, "The next message, for Anthropic's API"),
}
_COUNT = "/v1/messages/count_tokens"


class Server:
    """What the routes share.

    is_stopping  set it, and no more requests are taken
    """

    def __init__(self, models: Models, defaults: Defaults, options: ServerOptions):
        self.models, self.defaults, self.options = models, defaults, options
        self.metrics, self.is_stopping = Metrics(), False
        described = {path: (route.schema, route.summary) for path, route in ROUTES.items()}
        described[_COUNT] = (CountRequest, "How many tokens a prompt has")
        self._document = document(described)

    def app(self) -> Starlette:
        """The ASGI application."""
        posts = [
            Route(path, Answer(self, path, route), methods=["POST"])
            for path, route in ROUTES.items()
        ]
        gets = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
            Route("/v1/models", self._list),
            Route("/v1/models/{id:path}", self._describe),
        ]
        page = Page()
        pages = [Route("/", page.file), Route("/page/{name}", page.file)]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=self.options.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        guard = Middleware(
            Guard,
            options=self.options,
            is_stopping=lambda: self.is_stopping,
            refused=self.count,
        )
        count = Route(_COUNT, Count(self, _COUNT), methods=["POST"])
        return Starlette(
            routes=[*posts, count, *gets, *pages],
            middleware=[cors, guard] if self.options.cors else [guard],
            exception_handlers={HTTPException: _http_error, ApiError: _api_error},
        )

    def count(self, route: str, status: int) -> None:
        """Count a response in the metrics."""
        self.metrics.responses[route, status] += 1

    async def _health(self, request: Request) -> Response:
        engine = self.models.engine
        if self.is_stopping or not engine.is_alive:
            state = "stopping" if self.is_stopping else "loading"
            return JSONResponse({"status": state}, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ok", "model": self.models.name} | engine.status())

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.models.engine), media_type=TYPE)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def _list(self, request: Request) -> Response:
        return JSONResponse(self.models.listed())

    async def _describe(self, request: Request) -> Response:
        return JSONResponse(self.models.described(request.path_params["id"]))


class Count:
    """A POST route that answers with a count of tokens; the base of those the model answers."""

    schema: type[BaseModel] = CountRequest

    def __init__(self, server: Server, path: str):
        self._server, self._path = server, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(self._server, self._path, scope, send)
        work = gone = None
        try:
            body = await read_body(scope, receive, int(self._server.options.max_body * 1e6))
            work = asyncio.create_task(self._guarded(body, reply))
            gone = asyncio.create_task(until_gone(receive))
            seconds = self._server.options.request_timeout
            await asyncio.wait(
                {work, gone}, timeout=seconds + SLOW_SECONDS, return_when="FIRST_COMPLETED"
            )
            if gone.done() and not work.done():
                raise ClientGone
            if not work.done() and not reply.status:  # it never reached the engine
                work.cancel()
                raise too_late(seconds)
        except ApiError as error:
            await reply.fail(error)
        except ClientGone:
            reply.gone()
        finally:
            for task in filter(None, (work, gone)):
                task.cancel()
            await asyncio.gather(*filter(None, (work, gone)), return_exceptions=True)
            reply.close()

    async def _guarded(self, body: bytes, reply: _Reply) -> None:
        try:
            asked = await _validated(self.schema, body)
            if self._server.options.log_text:
                _log.info("asked: %s", body.decode(errors="replace"))
            await self._answer(asked, reply)
        except ClientGone:
            reply.gone()
        except Exception as error:
            await reply.fail(as_api_error(error))

    async def _answer(self, asked: Any, reply: _Reply) -> None:
        async with self._server.models.use(asked.model) as engine:
            defaults = self._server.defaults
            await reply.json(await asyncio.to_thread(count_tokens, asked, engine.served, defaults))


class Answer(Count):
    """A POST route that the model answers."""

    def __init__(self, server: Server, path: str, route: Task):
        super().__init__(server, path)
        self.schema, self._plan = route.schema, route.plan

    async def _answer(self, asked: Any, reply: _Reply) -> None:
        server = self._server
        async with server.models.use(asked.model) as engine:
            planned = partial(self._plan, asked, engine.served, server.defaults)
            plan = await asyncio.to_thread(planned)
            async with Asking(engine, plan, server.options.request_timeout) as asking:
                reply.writer = plan.writer
                async for found in asking.turns(BEAT_SECONDS):
                    if found is None:
                        events = [plan.writer.beat]
                    else:
                        index, turn = found
                        reply.tokens += len(turn.pieces)
                        events = plan.writer.feed(index, turn)
                        if turn.finish_reason is None and plan.speeches[index].is_enough:
                            asking.enough(index)
                    if plan.stream:
                        await reply.events(events)
            if plan.stream:
                await reply.events(plan.writer.end(), is_last=True)
            else:
                await reply.json(plan.writer.whole())


class _Reply:
    """The reply to one request, and the log line about it."""

    def __init__(self, server: Server, path: str, scope: Scope, send: Send):
        self._server, self._path, self._scope, self._send = server, path, scope, send
        self._began, self.tokens, self.status = time.monotonic(), 0, 0
        self.writer = None

    async def json(self, data: Any) -> None:
        self.status = 200
        if self._server.options.log_text:
            _log.info("answered: %s", data)
        await send_json(self._send, data)

    async def events(self, events: list[str], is_last: bool = False) -> None:
        if not self.status and (events or is_last):
            self.status = 200
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            await send_head(self._send, 200, "text/event-stream; charset=utf-8", headers)
        if events or is_last:
            text = "".join(events)
            if self._server.options.log_text:
                _log.info("answered: %s", text)
            body = text.encode()
            message = {"type": "http.response.body", "body": body, "more_body": not is_last}
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await self._send(message)
            except TimeoutError:  # requests that wait for the model must not wait for this client
                raise ClientGone from None

    async def fail(self, error: ApiError) -> None:
        """Report an error: as the reply, or as its last events if it has begun."""
        if self.status:
            await self.events(self.writer.failed(error) if self.writer else [], is_last=True)
        else:
            await send_error(self._scope, self._send, error)
        self.status = error.status

    def gone(self) -> None:
        self.status = self.status or 499
        self._server.metrics.gone += 1

    def close(self) -> None:
        self._server.count(self._path, self.status)
        spent = time.monotonic() - self._began
        tokens = f"{self.tokens} tokens, " if self.tokens else ""
        _log.info("POST %s %d, %s%.2f s", self._path, self.status, tokens, spent)


async def _validated(schema: type[BaseModel], body: bytes) -> Any:
    if len(body) > AT_ONCE:
        return await asyncio.to_thread(_validated_now, schema, body)
    return _validated_now(schema, body)


def _validated_now(schema: type[BaseModel], body: bytes) -> Any:
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error, body) from None


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(shape_of(request.scope)(error), error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    asked = f"{request.method} {request.url.path[:200]}"
    message = f"{asked}: {error.detail}; GET /openapi.json lists what there is"
    content = shape_of(request.scope)(ApiError(error.status_code, message, "not_found"))
    return JSONResponse(content, error.status_code, error.headers)
