"""What an engine serves: a model, its tokenizer and its drafters, loaded in the engine's thread."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.config import DrafterOptions
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.drafters.spec import AUTO, MAX_GRAM
from redrafter_mlx.engine.request import DEFAULT, PLAIN
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import hub
from redrafter_mlx.loading.context import known_positions
from redrafter_mlx.loading.drafters import load_if_possible
from redrafter_mlx.measuring.knowledge import Knowledge, knowledge_of
from redrafter_mlx.target.adapter import Target, adapt

_log = logging.getLogger("redrafter_mlx")


@dataclass
class Served:
    """A model that answers, and its drafters.

    name      by which requests call it
    drafters  by name; all None for a model that cannot verify trees
    context   longest text that the model has positions for, in tokens; None if it does not say
    """

    name: str
    model: nn.Module
    tokenizer: TokenizerWrapper
    drafters: dict[str, Drafter | None] = field(default_factory=dict)
    context: int | None = None

    def __post_init__(self) -> None:
        try:
            self.target: Target = adapt(self.model)
        except UserError as error:
            _log.warning("plain decoding, because %s", error)
            self.target = adapt(self.model, branching=False)
        self.drafters.setdefault(DEFAULT, None)
        self.drafters.setdefault(MAX_GRAM, MaxGramDrafter())
        self.drafters[PLAIN] = None
        if not self.target.branching:
            self.drafters = dict.fromkeys(self.drafters)
        if self.context is None:
            self.context = known_positions(self.model)

    def knowledge(self, name: str) -> Knowledge | None:
        """What is known of a drafter here; shared by all texts that it drafts for."""
        drafter = self.drafters[name]
        return None if drafter is None else knowledge_of(self.target, drafter)


def load_served(
    model: str,
    drafter: str | None = AUTO,
    drafter_options: DrafterOptions | None = None,
    **loading: Any,
) -> Served:
    """Load a model and its drafter by their names, as the generate command does.

    drafter  None: plain decoding

    Raises UserError as `hub.load` and `load_drafter` do; if nobody asked for a drafter (auto) and
    the model cannot verify trees, it decodes plainly and says so.
    """
    options = drafter_options or DrafterOptions()
    loaded, tokenizer = hub.load(model, **loading)
    drafters: dict[str, Drafter | None] = {}
    if drafter is not None:
        is_wanted = drafter != AUTO
        drafters[DEFAULT] = load_if_possible(drafter, loaded, tokenizer, options, is_wanted)
    return Served(model, loaded, tokenizer, drafters)
