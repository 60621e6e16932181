"""Every kind of published head, by name. A new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from redrafter_mlx.drafters import dflash, eagle3, medusa, mtp
from redrafter_mlx.drafters.published import Kind

KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in (dflash, eagle3, medusa, mtp)}


def recognised(settings: Mapping[str, Any], names: Collection[str]) -> Kind | None:
    """The kind of head that a checkpoint holds, by its config.json and its tensors' names."""
    return next((kind for kind in KINDS.values() if kind.recognises(settings, names)), None)


def is_taken_out(names: Collection[str]) -> bool:
    """Whether these tensors are a head that lies inside targets: their config.json is its own."""
    return any(kind.inside and kind.recognises({}, names) for kind in KINDS.values())
