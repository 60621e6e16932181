"""Many requests on one model: a queue, turns, and the reuse of earlier texts.

The commands that answer people (chat, server) talk to an `Engine`, one thread of which owns the
device. The same request and seed give the same text, warm or cold, alone or among others.
"""

from redrafter_mlx.engine.engine import Engine, QueueFull, Stopping
from redrafter_mlx.engine.request import DraftedTree, Piece, Request, Ticket, Turn
from redrafter_mlx.engine.served import Served, load_served

__all__ = [
    "DraftedTree",
    "Engine",
    "Piece",
    "QueueFull",
    "Request",
    "Served",
    "Stopping",
    "Ticket",
    "Turn",
    "load_served",
]
