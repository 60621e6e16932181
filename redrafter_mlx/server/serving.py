"""The server's socket and event loop, and how they are shut down."""

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
"""How long replies may take to reach their clients once the last request has ended."""


class Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`, which stops the engine first.

    greeting  is printed as soon as clients can connect
    """

    greeting = ""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.greeting:
            print(self.greeting, flush=True)

    @contextlib.contextmanager
    def capture_signals(self):
        yield


def bind(options: ServerOptions) -> socket.socket:
    """The socket on which the server will listen; UserError if it cannot be had.

    It refuses connections until then, so clients need not guess whether the model is loaded.
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
            "or stop what is listening there"
        ) from error
    listening.setblocking(False)
    return listening


def uvicorn_of(server: Server) -> Uvicorn:
    """An HTTP server that logs nothing of its own."""
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
    description: str,
) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code.

    engine         one that is running; `make` and `allowed` are those of Models
    description    of the model and its drafter, for the line printed at the start
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
            server.is_stopping = True
            stops.append(asyncio.ensure_future(_stop(http, models, options.grace)))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    http.greeting = f"{_address(listening)} serves {description}"
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
