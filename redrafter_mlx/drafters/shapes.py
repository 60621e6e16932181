"""Settings that config.json files of attention heads share with those of language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redrafter_mlx.errors import UserError

PLAIN = 10_000.0
"""Base of rotary positions where config.json names none."""


def rope_of(where: object, settings: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of rotary positions, for mlx-lm's `initialize_rope`.

    Transformers 5 keeps both in `rope_parameters`, 4 has `rope_theta` beside `rope_scaling`.
    """
    given = settings.get("rope_parameters") or settings.get("rope_scaling")
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where}: its rope settings are {given!r}, not an object")
    given = dict(given or {})
    theta = given.pop("rope_theta", None) or settings.get("rope_theta") or PLAIN
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise UserError(f"{where}: rope_theta is {theta!r}, not a positive number")
    kind = given.get("rope_type", given.get("type", "default"))
    return float(theta), None if kind == "default" else given
