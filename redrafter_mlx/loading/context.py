"""How long a text a model can take, and what is done with a longer prompt."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn

from redrafter_mlx.errors import UserError

NAMES = ("max_position_embeddings", "max_sequence_length", "n_positions")
"""The names that models give it in their config."""


def known_positions(model: nn.Module) -> int | None:
    """Most tokens of prompt and answer that the model can take; None if its config has none."""
    arguments = getattr(model, "args", None)
    for holder in (arguments, getattr(arguments, "text_config", None)):
        known = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        for name in NAMES:
            if isinstance(known.get(name), int) and known[name] > 0:
                return known[name]
    return None


def fitting(prompt: Sequence[int], positions: int | None, truncate: bool) -> list[int]:
    """The prompt, if it leaves room for at least one token of an answer.

    truncate  whether to leave out the middle of one that is too long

    Raises UserError, which counts the tokens, for a prompt that is too long.
    """
    prompt = list(prompt)
    if positions is None or len(prompt) < positions:
        return prompt
    if not truncate:
        raise UserError(
            f"the prompt has {len(prompt):,} tokens, and the model knows {positions:,} positions, "
            "the answer's included: shorten it, or --truncate-prompt leaves out its middle"
        )
    kept = positions - max(1, positions // 8)
    begin = kept // 4  # instructions are usually at the beginning, and the question at the end
    return prompt[:begin] + prompt[len(prompt) - (kept - begin) :]
