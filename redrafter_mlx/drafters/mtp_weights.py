"""Published weights of an MTP head, as mlx-lm's layers have them: unscaled, stacked, shifted.

Shape letters: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from redrafter_mlx.drafters.mtp_families import Family
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device


@dataclass(frozen=True)
class MTPConfig:
    """The shape of a head, or of several.

    where   for messages
    model   mlx-lm's, of whose layers each head has one, or some blocks; never evaluated
    caches  how many caches a layer takes; more than one as a list
    depths  how many heads there are, each for one further token
    block   rows and columns of FP8 weights that share a scale
    """

    where: object
    family: Family
    model: nn.Module
    caches: int
    vocab_size: int
    draft_vocab_size: int
    block: tuple[int, int]
    depths: int = 1

    def layers(self, depth: int) -> dict[str, nn.Module]:
        """The layer of the head of a depth, or the blocks that it consists of, by our names."""
        count = self.family.blocks
        if count == 1:
            return {"layer": self.model.layers[depth]}
        blocks = self.model.layers[depth * count : (depth + 1) * count]
        return {f"layer.{i}": block for i, block in enumerate(blocks)}

    @property
    def layer(self) -> nn.Module:
        return self.model.layers[0]

    @property
    def first_norm(self) -> nn.RMSNorm:
        return self.layer["input_layernorm" if "input_layernorm" in self.layer else "norm"]

    @property
    def hidden_size(self) -> int:
        return self.first_norm.weight.size


def ready(config: MTPConfig, depth: int, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights of the head of one depth as mlx-lm's layer has them, from the published ones."""
    try:
        weights = _stacked(config.where, _unscaled(weights, config.block))
        norms = {name: x for name, x in weights.items() if name.endswith("norm.weight")}
        norms |= {name: x for name, x in weights.items() if name.startswith("norm_")}
        others = {name: x for name, x in weights.items() if name not in norms}
        if config.family.centred:
            norms = _shifted(norms)
        return norms | _sanitized(config, depth, others)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{config.where}: the tensors of the head do not fit together: {reason}"
        ) from error


def _unscaled(weights: Mapping[str, mx.array], block: tuple[int, int]) -> dict[str, mx.array]:
    """FP8 weights, of which each block has a scale, as numbers."""
    found = {}
    for name, x in weights.items():
        scale = weights.get(f"{name}_scale_inv")
        if scale is not None:
            for axis, size in zip((-2, -1), block, strict=True):
                scale = mx.repeat(scale, size, axis)
            rows, columns = x.shape[-2:]
            scale = scale[..., :rows, :columns].astype(mx.float32)
            x = (mx.from_fp8(x, mx.float32) * scale).astype(mx.bfloat16)
        if not name.endswith("_scale_inv"):
            found[name] = x
    return found


def _stacked(where: object, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Experts as one tensor (E, ...) of each matrix: published one by one, or gate and up fused.

    mlx-lm knows how the target's are published; the head's may be the other way.
    """
    found: dict[str, mx.array] = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, x in weights.items():
        if one := re.fullmatch(r"(.+)\.experts\.(\d+)\.(.+)", name):
            experts.setdefault(f"{one[1]}.switch_mlp.{one[3]}", {})[int(one[2])] = x
        elif name.endswith(".experts.gate_up_proj"):
            place = name.removesuffix("experts.gate_up_proj") + "switch_mlp"
            gate, up = mx.split(x, 2, axis=-2)
            found |= {f"{place}.gate_proj.weight": gate, f"{place}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            found[name.replace(".experts.down_proj", ".switch_mlp.down_proj.weight")] = x
        else:
            found[name] = x
    for name, each in experts.items():
        numbers = sorted(each)
        if numbers[-1] >= len(numbers):
            missing = next(i for i, number in enumerate(numbers) if i != number)
            raise UserError(f"{where}: lacks {name} of expert {missing}")
        found[name] = mx.stack([each[number] for number in numbers])
    return found


def _shifted(norms: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Norms' weights as factors: what is published is what they differ from one by.

    Some that made MLX checkpoints added the one, to all norms or to a part of them, and do not
    say so. Means tell: near one or near zero. Only the two norms before `fc` damp, to means of
    0.3 to 0.5 as factors; they are what the layer's own first norm is.
    """
    means = device.read(*(x.astype(mx.float32).mean() for x in norms.values()))
    is_factor = {name: bool(mean > 0.5) for name, mean in zip(norms, means, strict=True)}
    first = is_factor.get("layer.input_layernorm.weight", False)
    is_factor |= {name: first for name in norms if name.startswith("norm_")}
    return {name: x if is_factor[name] else x + 1 for name, x in norms.items()}


def _sanitized(
    config: MTPConfig, depth: int, weights: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """What the model's own `sanitize` makes of the layer's tensors, such as of `kv_b_proj`."""
    names = {id(module): name for name, module in config.model.named_modules()}
    theirs = {f"{ours}.": f"{names[id(x)]}." for ours, x in config.layers(depth).items()}
    layer, found = {}, {}
    for name, x in weights.items():
        place = next(filter(name.startswith, theirs), None)
        if place is None:
            found[name] = x
            continue
        rest = name.removeprefix(place)
        for part, renamed in config.family.renamed.items():
            rest = rest.replace(part, renamed)
        layer[theirs[place] + rest] = x
    if hasattr(config.model, "sanitize"):
        layer = config.model.sanitize(layer)
    for name, x in layer.items():
        ours, place = next(pair for pair in theirs.items() if name.startswith(pair[1]))
        found[ours + name.removeprefix(place)] = x
    return found
