"""A socket, an event loop, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence

import uvicorn

from redrafter_mlx import cli
from redrafter_mlx.engine import Engine
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.server.app import Server
from redrafter_mlx.server.models import Models
from redrafter_mlx.server.options import ServerOptions
from redrafter_mlx.server.plan import Defaults

LAST_SECONDS = 5
"""That replies have to reach their clients after the last request has ended."""


class Uvicorn(uvicorn.Server):
    """Leaves signals alone: they stop the engine first. Prints `told` when clients can connect."""

    told = ""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.told:
            print(self.told, flush=True)

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def bind(options: ServerOptions) -> socket.socket:
    """A socket on which the server will listen; UserError if there cannot be one.

    Clients are refused until it does, so they need not guess whether the model is loaded.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port}: {one_line(error)}; give another port, "
            "or end what listens there"
        ) from error
    listening.setblocking(False)
    return listening


def uvicorn_of(server: Server) -> Uvicorn:
    """An HTTP server that says nothing by itself."""
    config = uvicorn.Config(
        server.app(),
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return Uvicorn(config)


async def serve(
    listening: socket.socket,
    engine: Engine,
    make: Callable[[str], Engine],
    allowed: Sequence[str] | None,
    defaults: Defaults,
    options: ServerOptions,
    told: str,
) -> int:
    """Serve until SIGTERM or Ctrl-C; the exit code.

    engine   that runs already; `make` and `allowed` are as of Models
    told     of the model, for the line at the start
    """
    models = Models(engine, make, allowed)
    server = Server(models, defaults, options)
    http = uvicorn_of(server)
    code, stops = 0, []

    def stop(signal_number: int) -> None:
        nonlocal code
        if signal_number == signal.SIGINT:
            if server.is_stopping:
                os._exit(cli.INTERRUPTED)
            code = cli.INTERRUPTED
        if not server.is_stopping:
            server.begin_stop()
            stops.append(asyncio.ensure_future(_stop(http, models, options.grace)))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    http.told = f"{_address(listening)} serves {told}"
    await http.serve(sockets=[listening])
    await asyncio.gather(*stops)
    return code


async def _stop(http: Uvicorn, models: Models, grace: float) -> None:
    try:
        await models.stop(grace)
    finally:
        http.should_exit = True


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
