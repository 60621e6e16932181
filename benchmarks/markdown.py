"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def table(header: Sequence[object], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """The lines of a table: its header, and a line for each row's cells as soon as there is one."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    yield line(header)
    yield "|" + "---|" * len(header)
    yield from map(line, rows)
