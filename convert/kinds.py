"""Which kind of head a checkpoint holds: a recurrent one, or one that is published otherwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from redrafter_mlx.drafters.checkpoint import MODEL_TYPE
from redrafter_mlx.drafters.kinds import KINDS, recognised
from redrafter_mlx.drafters.published import WRAPPERS, Kind
from redrafter_mlx.errors import UserError

from .layouts import LAYOUTS, MODELOPT, recognise, some

SPECULATORS = "speculators"
NAMES = (*KINDS, SPECULATORS)
"""What --from may say beside the layouts of recurrent heads. `medusa` is both."""


def kind_of(
    where: object, settings: Mapping[str, Any], names: Collection[str], wanted: str | None
) -> Kind | None:
    """The kind of head; None for a recurrent one, or if there is none that is known.

    wanted  what --from says

    A Medusa head has several numbered heads, or config.json says how many. A single one without
    that is taken for a recurrent head that is numbered alike.

    Raises UserError if it is something else than what is wanted.
    """
    kind = _likeliest(settings, names)
    if wanted is None or (kind and wanted in (kind.name, layout_of(kind, settings))):
        return kind
    looks = layout_of(kind, settings) if kind else _recurrent_layout(where, names)
    if wanted in LAYOUTS and kind is None:
        return None  # its reader says the rest
    if looks is None and wanted in KINDS and KINDS[wanted].ours(names):
        return KINDS[wanted]  # a damaged one: its reader says what it lacks
    looks = f"it looks like {looks}: leave --from out" if looks else f"it holds {some(names)}"
    raise UserError(f"{where}: is not in the layout --from {wanted}; {looks}")


def layout_of(kind: Kind, settings: Mapping[str, Any]) -> str:
    """What --from calls a head of this kind."""
    keys = ("speculators_model_type", "transformer_layer_config")
    return SPECULATORS if any(key in settings for key in keys) else kind.name


def _likeliest(settings: Mapping[str, Any], names: Collection[str]) -> Kind | None:
    kind = recognised(settings, names)
    if kind is None or settings.get("model_type") == MODEL_TYPE:
        return None
    if kind.inside:
        return kind
    try:
        recurrent = recognise("", names)
    except UserError:
        return kind
    return kind if len(kind.ours(names)) >= len(recurrent.ours) else None


def _recurrent_layout(where: object, names: Collection[str]) -> str | None:
    try:
        return recognise(where, names).layout.name
    except UserError:
        return None


def beside(kind: Kind, names: Collection[str]) -> set[str]:
    """Names of the target's tensors, which lie in one checkpoint with those of the head.

    Some kinds always lie there. Others may, under a name of their own before all of theirs, as
    Medusa's `medusa_head.` in a model that was trained with it.
    """
    ours = kind.ours(names)
    others = set(names) - ours.keys()
    if kind.inside:
        return others
    starts = {name.removesuffix(bare(kind, name, mine)) for name, mine in ours.items()}
    if len(starts) != 1 or starts & set(WRAPPERS):
        return set()
    return {n for n in others if any(fnmatchcase(n, pattern) for pattern in MODELOPT.beside)}


def bare(kind: Kind, name: str, ours: str) -> str:
    """A tensor's name without what a tool has put before it: the shortest with the same meaning.

    Example: medusa_heads.0.1.weight -> 0.1.weight
    """
    if kind.inside:
        return name
    found, rest = name, name
    while "." in rest:
        rest = rest.partition(".")[2]
        if kind.ours([rest]).get(rest) == ours:
            found = rest
    return found
