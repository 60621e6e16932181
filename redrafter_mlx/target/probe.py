"""Is a tree's verification by this model the same as decoding each of its paths alone?

Some models take positions or masks from where no adapter sees them, and would be silently wrong.
Only a trial tells: a 5-node tree against each of its paths, on the loaded weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import cache_directory, one_line, write_whole
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target import fingerprint
from redrafter_mlx.target.rope import takes_offset

if TYPE_CHECKING:
    from redrafter_mlx.target.adapter import Target

TOLERANCE = {mx.float32: 1e-3}
"""Largest accepted |logit difference|, in standard deviations of the logits, by compute dtype."""
LOW_PRECISION_TOLERANCE = 0.1


@dataclass(frozen=True)
class Parity:
    """How exactly a tree's logits are those of its paths alone.

    difference  the largest, in standard deviations of the logits
    allowed     the largest difference that counts as rounding
    logits      the largest difference of logits, as it is
    """

    difference: float
    allowed: float
    logits: float


def parity_of(target: Target) -> Parity:
    """What the probe finds about a target; kept, if its model came from files.

    It is tried again when weights, code or machine are others. Raises UserError as the probe does.
    """
    try:
        path = _kept_at(target)
    except OSError:
        return probe_parity(target)
    with suppress(OSError, ValueError, TypeError):
        kept = Parity(**json.loads(path.read_text(encoding="utf-8")))
        if kept.difference <= kept.allowed:
            return kept
    found = probe_parity(target)
    with suppress(OSError):  # then the next process tries again
        write_whole(path, json.dumps(asdict(found)))
    return found


def _kept_at(target: Target) -> Path:
    """Raises OSError if what is found of this target is not to be kept."""
    model = target.model
    if not hasattr(model, "_redrafter_directory") or not hasattr(model, "args"):
        raise OSError("made in memory, as what computes it may be")
    facts = {
        **fingerprint.conditions(),
        "weights": fingerprint.of_weights([model]),
        "code": fingerprint.of_code(model),
        "config": repr(model.args),
        "dtype": str(target.dtype),
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / "probes" / f"{name}.json"


def probe_parity(target: Target) -> Parity:
    """Compare a 5-node tree with its paths.

    Raises UserError when they differ by more than rounding.
    """
    try:
        difference, logits = differences(target)
    except UserError:
        raise
    except Exception as error:  # whatever a model file raises when it meets a tree
        reason = f"a tree made it fail: {type(error).__name__}: {one_line(error)}"
        raise _refusal(target, reason) from error
    allowed = TOLERANCE.get(target.dtype, LOW_PRECISION_TOLERANCE)
    if not difference <= allowed:
        raise _refusal(
            target,
            "its logits are not finite"
            if math.isnan(difference)
            else f"its tree logits differ from one-path logits by {difference:.2g} deviations "
            f"(allowed: {allowed:g})",
        )
    return Parity(difference, allowed, logits)


def differences(target: Target, prefix: int = 8) -> tuple[float, float]:
    """Largest |tree logit - path logit| over a 5-node tree after `prefix` tokens, in two units.

    In standard deviations of the path logits, and as it is. NaN when logits are not finite.
    A path alone is read as mlx-lm reads a prompt. After the first of the longest paths, which has
    rejected rows before and after it, one more token is read from the tree's caches: they must hold
    what the path alone leaves.
    """
    ids = np.random.default_rng(0).permutation(target.vocab_size)[: prefix + 6]
    prompt, (root, *nodes, last) = ids[: prefix + 1].tolist(), ids[prefix:].tolist()
    tree = TokenTree.best(root, nodes, [-1, -1, 1, 1], [-1.0, -2.0, -3.0, -4.0], budget=5)
    *others, committed = sorted(tree.paths(), key=lambda path: (len(path), -path[-1]))
    context = target.prefill(prompt, chunk=len(prompt))
    outcome = target.verify(context, tree)
    (together,) = _read(outcome.logits)
    context.caches.commit(committed)
    context.caches.begin(1)
    (after,) = _read(target.forward(mx.array([[last]]), context.caches).logits[0])
    worst = largest = 0.0
    for path in (*others, committed):
        tokens, found = tree.tokens[path].tolist(), together[path]
        if path is committed:
            tokens, found = [*tokens, last], np.concatenate([found, after])
        alone = _alone(target, prompt[:-1], tokens)
        if not (np.isfinite(alone).all() and np.isfinite(found).all()):
            return math.nan, math.nan
        apart = float(np.abs(found - alone).max())
        worst, largest = max(worst, apart / float(alone.std())), max(largest, apart)
    return worst, largest


def _alone(target: Target, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """(T, V) logits of T consecutive tokens after a prompt, read with it in one pass."""
    caches, text = target.empty_caches(), [*prompt, *tokens]
    caches.begin(len(text), certain=True)
    return _read(target.forward(mx.array([text]), caches).logits[0, len(prompt) :])[0]


def _read(logits: mx.array) -> tuple[np.ndarray, ...]:
    return device.read(logits.astype(mx.float32))


def _refusal(target: Target, reason: str) -> UserError:
    layers = getattr(target.model, "layers", None) or []
    bare = [i for i, layer in enumerate(layers) if not any(map(takes_offset, layer.modules()))]
    where = f"; layers without a rope module that takes an offset: {bare}" if bare else ""
    return UserError(
        f"{target.name} cannot verify a tree: {reason}{where}; generate with --no-draft"
    )
