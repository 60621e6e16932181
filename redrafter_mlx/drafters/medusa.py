"""Medusa: a few heads on one hidden state, each for one of the next tokens (arXiv 2401.10774).

Shape letters: K heads, n residual blocks of each, h hidden size, D draft vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from redrafter_mlx.drafters.beams import Begun
from redrafter_mlx.drafters.head import ResidualBlock
from redrafter_mlx.drafters.parallel import ParallelDrafter
from redrafter_mlx.drafters.published import (
    Experiences,
    Kind,
    Shapes,
    agree,
    belongs_to,
    matrix,
    setting,
    targets_vocabulary,
    unwrapped,
)
from redrafter_mlx.drafters.text import OwnVocabulary
from redrafter_mlx.errors import UserError
from redrafter_mlx.rounds.round import Context, View
from redrafter_mlx.target.adapter import Target


@dataclass(frozen=True)
class MedusaConfig:
    """The shape of a Medusa head; of a `shared` one the output layers are the target's own."""

    vocab_size: int
    hidden_size: int
    heads: int
    blocks: int
    draft_vocab_size: int
    shared: bool


class MedusaHead(nn.Module):
    """K heads. Head k predicts the token k + 2 places after the one of the hidden state."""

    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.heads = [
            [ResidualBlock(h) for _ in range(config.blocks)]
            + [nn.Linear(h, config.draft_vocab_size, bias=False)] * (not config.shared)
            for _ in range(config.heads)
        ]

    def __call__(self, hidden: mx.array, heads: int) -> mx.array:
        """(heads, P, D) logits after P hidden states (P, h); of a shared head (heads, P, h)."""
        found = self.features(hidden, heads)
        if self.config.shared:
            return found
        outputs = (layers[-1] for layers in self.heads)
        return mx.stack([output(y) for output, y in zip(outputs, found, strict=False)])

    def features(self, hidden: mx.array, heads: int) -> mx.array:
        """(heads, P, h): what the output layers read."""
        found = []
        for layers in self.heads[:heads]:
            y = hidden
            for block in layers[: self.config.blocks]:
                y = block(y)
            found.append(y)
        return mx.stack(found)


class MedusaDrafter(ParallelDrafter):
    """Drafts with a MedusaHead; view: the final hidden state."""

    def __init__(self, head: MedusaHead, vocabulary, view: View, experience: Experiences):
        super().__init__(vocabulary, experience)
        self.head, self.view, self.depths = head, view, head.config.heads

    def begin(self, context: Context) -> Begun:
        return self.view(context.hidden), []

    def replayed(self, tokens: Sequence[int], hidden: mx.array, first: int) -> Begun:
        return self.view(hidden[first - 1 :]), []

    def predict(
        self, begun: mx.array, memory: Sequence[mx.array], pending: mx.array, depths: int
    ) -> mx.array:
        return self.head(begun, depths)


def _known(name: str) -> str | None:
    bare = re.sub(r"^(medusa_heads?|heads)\.", "", name)
    if re.fullmatch(r"\d+\.\d+\.(linear\.)?(weight|bias|scales|biases)", bare):
        return f"heads.{bare}"
    return name if name in ("d2t", "t2d") else None


def _ours(names: Collection[str]) -> dict[str, str]:
    return unwrapped(names, _known)


def _recognises(settings: Mapping[str, Any], names: Collection[str]) -> bool:
    firsts = {name for name in _ours(names).values() if name.startswith("heads.0.")}
    return bool(firsts) and (
        "medusa_num_heads" in settings or any("heads.1." in n for n in _ours(names).values())
    )


def _config(where: object, settings: Mapping[str, Any], shapes: Shapes) -> MedusaConfig:
    heads = 1 + max((int(name.split(".")[1]) for name in shapes), default=-1)
    blocks = 1 + max(
        (int(n.split(".")[2]) for n in shapes if re.match(r"heads\.0\.\d+\.linear", n)), default=-1
    )
    if not heads or not blocks:
        raise UserError(f"{where}: holds no Medusa head")
    agree(where, "medusa_num_layers", settings.get("medusa_num_layers"), blocks)
    given = settings.get("medusa_num_heads")
    if given is not None and given != heads and type(given) is not int:
        raise UserError(f"{where}: medusa_num_heads is {given!r}")
    _, hidden_size = matrix(where, shapes, "heads.0.0.linear.weight")
    agree(where, "hidden_size", settings.get("hidden_size"), hidden_size)
    output = f"heads.0.{blocks}.weight"
    shared = output not in shapes
    rows = None if shared else matrix(where, shapes, output)[0]
    if shared and settings.get("vocab_size") is None:
        vocab_size = draft = 0  # the target's, whatever that is
    else:
        vocab_size = setting(where, settings, "vocab_size", rows)
        draft = setting(where, settings, "draft_vocab_size", rows or vocab_size)
    return MedusaConfig(vocab_size, hidden_size, heads, blocks, draft, shared)


def _outputs(config: MedusaConfig) -> tuple[str, ...]:
    return tuple(f"heads.{i}.{config.blocks}" for i in range(config.heads * (not config.shared)))


def _settings(config: MedusaConfig) -> dict[str, Any]:
    sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    return {
        "medusa_num_heads": config.heads,
        "medusa_num_layers": config.blocks,
        **{key: size for key, size in sizes.items() if size},
    }


def _drafter(
    target: Target, head: MedusaHead, ids: np.ndarray, experience: Experiences
) -> MedusaDrafter:
    config = head.config
    belongs_to(target, config.hidden_size, config.vocab_size or target.vocab_size)
    if config.shared:
        known = ids if config.vocab_size else np.arange(target.vocab_size)
        vocabulary = targets_vocabulary(target, known)
    else:
        vocabulary = OwnVocabulary(mx.array(ids.astype(np.int32)))
    return MedusaDrafter(head, vocabulary, target.tap(()), experience)


KIND = Kind(
    name="medusa",
    about="heads for each of the next tokens, on one hidden state (FasterDecoding/medusa-*)",
    recognises=_recognises,
    ours=_ours,
    config=_config,
    head=MedusaHead,
    drafter=_drafter,
    outputs=_outputs,
    settings=_settings,
)
