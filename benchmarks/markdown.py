"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[object], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table: its header, and a line for each row's cells."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(header), "|" + "---|" * len(header), *map(line, rows)]
