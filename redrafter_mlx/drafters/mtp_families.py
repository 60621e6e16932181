"""Where MTP heads lie in the checkpoints of each family of models, and how these differ.

A checkpoint may hold several, one for each further depth. Ours are named `depths.0.`, `depths.1.`,
... then; a single one's tensors have no such name before theirs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING


@dataclass(frozen=True)
class Family:
    """Where the head lies in the checkpoints of some model types, and how it computes.

    model_types   mlx-lm's
    place         pattern of what stands before the names of all its tensors
    parts         our names of its modules beside the layer -> theirs
    layer         what stands before the names of the layer's tensors, after `place`. Of several
                  heads either the place has a number, or `{k}` in these names is one
    blocks        how many of an mlx-lm model's layers together are a head's, by its numbers
    renamed       what published names contain -> what mlx-lm's do, where its `sanitize` knows less
    settings      with which all layers of an mlx-lm model are of the head's kind
    hidden_first  whether the hidden state is joined before the embedding
    centred       whether the weights of norms are what they differ from one by
    dropped       what names of tensors begin with that are copies of the target's
    """

    model_types: tuple[str, ...]
    place: str
    parts: Mapping[str, str]
    layer: str = ""
    blocks: int = 1
    renamed: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    hidden_first: bool = False
    centred: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def shares(self) -> tuple[str, ...]:
        """What our names of parts begin with that several heads have in common."""
        numbered = "{k}" in self.layer and "{k}" not in self.parts["norm_hidden"]
        return tuple(f"{name}." for name in self.parts) if numbered else ()


FAMILIES = (
    Family(
        model_types=("qwen3_next", "qwen3_5", "qwen3_5_moe"),
        place=r"(.+\.)?mtp\.|",  # nothing: as mlx-vlm takes it out
        parts={
            "fc": "fc",
            "norm_embedding": "pre_fc_norm_embedding",
            "norm_hidden": "pre_fc_norm_hidden",
            "norm": "norm",
        },
        layer="layers.{k}.",
        settings={"full_attention_interval": 1, "mlp_only_layers": [], "decoder_sparse_step": 1},
        centred=True,
    ),
    Family(  # a layer is two blocks: attention without positions, and experts
        model_types=("nemotron_h",),
        place=r"(.+\.)?mtp\.",
        parts={
            "fc": "layers.0.eh_proj",
            "norm_embedding": "layers.0.enorm",
            "norm_hidden": "layers.0.hnorm",
            "norm": "layers.1.final_layernorm",
        },
        layer="layers.",
        blocks=2,
        renamed={
            "switch_mlp.up_proj.": "switch_mlp.fc1.",
            "switch_mlp.down_proj.": "switch_mlp.fc2.",
        },
        settings={"hybrid_override_pattern": ["*", "E"]},
    ),
    Family(
        model_types=("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        place=r"(.+\.)?layers\.\d+\.",
        parts={
            "fc": "eh_proj",
            "norm_embedding": "enorm",
            "norm_hidden": "hnorm",
            "norm": "shared_head.norm",
        },
        settings={"first_k_dense_replace": 0},
        dropped=("embed_tokens.", "shared_head.head."),
    ),
    Family(
        model_types=("mimo",),
        place=r"(.+\.)?mtp_layers\.\d+\.",
        parts={
            "fc": "input_proj",
            "norm_embedding": "token_layernorm",
            "norm_hidden": "hidden_layernorm",
            "norm": "final_layernorm",
        },
        hidden_first=True,
    ),
    Family(
        model_types=("ernie4_5_moe",),
        place=r"(.+\.)?",
        parts={
            "fc": "mtp_linear_proj.{k}",
            "norm_embedding": "mtp_emb_norm.{k}",
            "norm_hidden": "mtp_hidden_norm.{k}",
        },
        layer="mtp_block.{k}.",
        settings={"moe_layer_end_index": -1},  # a dense layer
    ),
)


@dataclass(frozen=True)
class Found:
    """Heads in a checkpoint: the family, and of each what stands before its names, and its {k}."""

    family: Family
    heads: tuple[tuple[str, int], ...]


def found_in(names: Collection[str]) -> Found | None:
    """The heads whose tensors these are, in the order of the depths that they predict."""
    numbers = lambda place: [int(digits) for digits in re.findall(r"\d+", place)]
    for family in FAMILIES:
        last = r"(?P<k>\d+)".join(map(re.escape, family.parts["norm_hidden"].split("{k}")))
        pattern = re.compile(rf"(?P<place>{family.place}){last}\.weight")
        matches = [found for name in names if (found := pattern.fullmatch(name))]
        heads = {(found["place"], int(found.groupdict().get("k") or 0)) for found in matches}
        if heads:
            ordered = sorted(heads, key=lambda head: (numbers(head[0]), head[1]))
            return Found(family, tuple(_shared(family, names, ordered)))
    return None


def _shared(
    family: Family, names: Collection[str], heads: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """The heads; where only layers are numbered, all that the first one's other parts serve."""
    if "{k}" not in family.layer or "{k}" in family.parts["norm_hidden"]:
        return heads
    place = heads[0][0]
    before, after = map(re.escape, family.layer.split("{k}"))
    layer = re.compile(rf"{re.escape(place)}{before}(\d+){after}")
    numbers = {int(found[1]) for found in map(layer.match, names) if found}
    return [(place, k) for k in sorted(numbers)] or heads


def ours(names: Collection[str]) -> dict[str, str]:
    """Their names of the heads' tensors -> ours."""
    heads, found = found_in(names), {}
    for theirs in names if heads else ():
        if theirs == "d2t":
            found[theirs] = theirs
            continue
        for depth, (place, k) in enumerate(heads.heads):
            if theirs.startswith(place) and (
                our := _our_name(heads.family, theirs[len(place) :], k)
            ):
                found[theirs] = f"depths.{depth}.{our}" if len(heads.heads) > 1 else our
                break
    return found


def _our_name(family: Family, name: str, k: int) -> str | None:
    for ours, theirs in family.parts.items():
        if name.startswith(f"{theirs.format(k=k)}."):
            return ours + name[len(theirs.format(k=k)) :]
    if name.startswith(family.dropped) or name.endswith(".rotary_emb.inv_freq"):
        return None
    layer = family.layer.format(k=k)
    return f"layer.{name[len(layer) :]}" if name.startswith(layer) else None


def text_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model, which those of one that sees nest; speculators', too."""
    nested = (settings.get(key) for key in ("text_config", "transformer_layer_config"))
    return next((text for text in nested if isinstance(text, Mapping)), settings)


def model_type_of(settings: Mapping[str, Any]) -> str:
    told = text_of(settings).get("model_type") or settings.get("model_type") or ""
    told = str(told).removesuffix("_text")
    return MODEL_REMAPPING.get(told, told)


def alone(settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = settings.keys() & {"quantization", "quantization_config", "draft_vocab_size"}
    kept = {key: settings[key] for key in sorted(keys)}
    return {**text_of(settings), **kept, "model_type": model_type_of(settings)}
