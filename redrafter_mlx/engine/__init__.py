"""Many requests on one model: a queue, turns, and what earlier texts left of use.

The commands that answer people (chat, server) speak to an `Engine`; one thread of it owns the
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
