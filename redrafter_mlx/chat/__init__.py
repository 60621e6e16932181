"""Chat with a model in a terminal: python -m redrafter_mlx.chat."""

from __future__ import annotations


def main(args: list[str] | None = None) -> int:
    """Entry point of the command."""
    from redrafter_mlx.chat.__main__ import main

    return main(args)
