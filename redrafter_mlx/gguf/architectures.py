"""The GGUF architectures that can be imported: each tensor's shape and place in mlx-lm's model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.file import GgufFile

# GGUF module -> mlx-lm module.
EMBEDDING, NORM, HEAD = "token_embd", "output_norm", "output"
MODULES = {EMBEDDING: "model.embed_tokens", NORM: "model.norm", HEAD: "lm_head"}
QKV = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
}
ATTENTION = {**QKV, "attn_output": "self_attn.o_proj"}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture, and the mlx-lm model that it becomes.

    Attributes:
        model_type: mlx-lm's name for it.
        class_name: Hugging Face's name for it.
        parts: modules of a layer, GGUF's name -> mlx-lm's.
        biases: entry of config.json -> the modules that all have a bias if it is true, else none.
        always_biased: mlx-lm's model has these biases whatever config.json says.
        norm_offset: to subtract from the norm weights in the file to get mlx-lm's.
        rope_tensors: tensors with the scaling of positions; config.json takes it up.
        free_head_dim: mlx-lm's model can have heads of another size than hidden_size / heads.
    """

    model_type: str
    class_name: str
    parts: dict[str, str]
    biases: dict[str, frozenset[str]]
    always_biased: bool = False
    norm_offset: int = 0
    rope_tensors: tuple[str, ...] = ()
    free_head_dim: bool = True

    def mlx_name(self, module: str) -> str:
        """blk.3.attn_q -> model.layers.3.self_attn.q_proj"""
        if module in MODULES:
            return MODULES[module]
        _, layer, part = module.split(".")
        return f"model.layers.{layer}.{self.parts[part]}"

    def modules(self, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The modules of a model with this configuration, each with the shape of its weight."""
        hidden, inner, vocabulary, head_dim = (
            config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
        )
        queries = config["num_attention_heads"] * head_dim
        keys = config["num_key_value_heads"] * head_dim
        shapes = {
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_qkv": (queries + 2 * keys, hidden),
            "attn_output": (hidden, queries),
            "attn_q_norm": (head_dim,),
            "attn_k_norm": (head_dim,),
            "ffn_gate": (inner, hidden),
            # Without a module of its own, the gate is stored as the upper half of this one.
            "ffn_up": (inner if "ffn_gate" in self.parts else 2 * inner, hidden),
            "ffn_down": (hidden, inner),
        }
        yield EMBEDDING, (vocabulary, hidden)
        yield NORM, (hidden,)
        yield HEAD, (vocabulary, hidden)
        for layer in range(config["num_hidden_layers"]):
            for part in self.parts:
                yield f"blk.{layer}.{part}", shapes.get(part, (hidden,))


ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        {**NORMS, **ATTENTION, **MLP},
        {"attention_bias": frozenset(ATTENTION), "mlp_bias": frozenset(MLP)},
        rope_tensors=(ROPE_FACTORS,),
    ),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        {**NORMS, **ATTENTION, **MLP},
        {"attention_bias": frozenset(QKV)},
        always_biased=True,
        free_head_dim=False,
    ),
    "qwen3": Architecture(
        "qwen3", "Qwen3ForCausalLM", {**NORMS, **ATTENTION, **QK_NORMS, **MLP}, {}
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
            **ATTENTION,
            **QK_NORMS,
            **MLP,
        },
        {},
        norm_offset=1,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            **NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        {},
        rope_tensors=(LONG_FACTORS, SHORT_FACTORS),
        free_head_dim=False,
    ),
}


def architecture_of(file: GgufFile) -> Architecture:
    """The architecture named in the file's metadata; UserError if it cannot be imported."""
    name = file.need_text("general.architecture")
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file.path} holds a {name!r} model, but only {', '.join(ARCHITECTURES)} can be "
            "imported: use an MLX or Hugging Face copy of this model"
        )
    return ARCHITECTURES[name]
