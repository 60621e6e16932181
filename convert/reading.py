"""From files to a head, of whatever kind."""

from __future__ import annotations

from .head import Head
from .kinds import kind_of
from .published import read_published
from .recurrent import read_recurrent
from .sources import Source


def read_head(source: Source, wanted: str | None = None) -> Head:
    """The head in a checkpoint.

    wanted  what --from says: the only layout to try

    Raises UserError that names the tensor or the setting that is wrong.
    """
    kind = kind_of(source.path, source.settings, source.tensors, wanted)
    return read_recurrent(source, wanted) if kind is None else read_published(source, kind)
