"""Import of a Llama-architecture GGUF file into an mlx-lm model directory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from redrafter_mlx.errors import UserError

# Raised whenever an import of the same file would come out different: caches carry it in their
# names, so that nobody keeps a directory written by an older version.
LAYOUT_VERSION = 1

# `mx.load` hands these out unchanged (floats) or in MLX's quantised layout; every other GGUF type
# it silently widens to float16. Keys are llama.cpp's LLAMA_FTYPE numbers (general.file_type).
FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0"}
QUANTIZED_FILE_TYPES = (2, 3, 7)

GROUP_SIZE = 32  # weights per block in Q4_0, Q4_1 and Q8_0
DEFAULT_BITS = 4

# GGUF module -> mlx-lm module.
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PARAMETERS = ("weight", "scales", "biases")

# tokenizer.ggml.token_type
CONTROL, USER_DEFINED = 3, 4


def import_gguf(source: Path, destination: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a directory that `mlx_lm.load` reads.

    Weights keep the quantisation of the file, in MLX's layout: groups of 32 with 16-bit scales
    and biases. Nothing is quantised a second time.

    Args:
        source: the .gguf file; architecture `llama`, byte-level BPE tokenizer.
        destination: an existing directory; receives config.json, model.safetensors,
            tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.

    Raises:
        UserError: the file is damaged, or uses an architecture, a quantisation, a tensor or a
            tokenizer that is not supported; the message names it.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    file = _read(source)
    _check_quantisation(file)
    weights = _weights(file)
    mx.save_safetensors(str(destination / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(destination / "config.json", _config(file, weights))
    _tokenizer(file).save(str(destination / "tokenizer.json"))
    _write_json(destination / "tokenizer_config.json", _tokenizer_config(file))
    if template := file.metadata.get("tokenizer.chat_template"):
        (destination / "chat_template.jinja").write_text(template, encoding="utf-8")


@dataclass(frozen=True)
class _File:
    """A GGUF file in memory: `metadata` holds Python values (a long list stays an mx.array)."""

    path: Path
    tensors: dict[str, mx.array]
    metadata: dict[str, Any]

    def need(self, key: str) -> Any:
        """The metadata value under `key`; UserError if the file lacks it."""
        if key not in self.metadata:
            raise UserError(f"{self.path}: the GGUF metadata has no {key}; get a complete file")
        return self.metadata[key]


def _read(source: Path) -> _File:
    try:
        tensors, metadata = mx.load(str(source), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{source} is not a readable GGUF file ({error}); get it again") from error
    plain = {
        key: value.item() if isinstance(value, mx.array) and value.ndim == 0 else value
        for key, value in metadata.items()
    }
    file = _File(source, tensors, plain)
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{source} holds a {architecture!r} model; only GGUF files of architecture 'llama' "
            "can be imported: use an MLX or Hugging Face copy of this model"
        )
    return file


def _check_quantisation(file: _File) -> None:
    file_type = file.metadata.get("general.file_type")
    if file_type is not None and file_type not in FILE_TYPES:
        raise _unsupported_quantisation(file, f"general.file_type {file_type}")
    if file_type not in QUANTIZED_FILE_TYPES:
        return
    for name, tensor in file.tensors.items():
        # llama.cpp leaves vectors in F32, but a matrix that is not packed had a type of its own
        # (Q6_K, say) which mx.load has already rounded to float16.
        if tensor.ndim == 2 and name.endswith(".weight") and tensor.dtype != mx.uint32:
            raise _unsupported_quantisation(file, f"tensor {name}")


def _unsupported_quantisation(file: _File, where: str) -> UserError:
    supported = ", ".join(FILE_TYPES.values())
    return UserError(
        f"{file.path}: {where} is in a quantisation that cannot be imported unchanged; "
        f"use a file that is all {supported}"
    )


def _weights(file: _File) -> dict[str, mx.array]:
    weights = {_parameter_name(file, name): array for name, array in file.tensors.items()}
    if any(array.dtype == mx.uint32 for array in weights.values()):
        # Norm weights come as F32; next to 16-bit scales they would widen every activation.
        weights = {
            name: array.astype(mx.float16) if array.dtype == mx.float32 else array
            for name, array in weights.items()
        }
    return weights


def _parameter_name(file: _File, name: str) -> str:
    """The mlx-lm name of a GGUF tensor.

    Example: blk.3.attn_q.scales -> model.layers.3.self_attn.q_proj.scales
    """
    module, _, parameter = name.rpartition(".")
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", module):
        target = LAYER_MODULES.get(layer[2])
        target = target and f"model.layers.{layer[1]}.{target}"
    else:
        target = MODULES.get(module)
    if target is None or parameter not in PARAMETERS:
        raise UserError(
            f"{file.path}: tensor {name} is unknown to the Llama import (mixture of experts, "
            "biases and scaled RoPE are not supported): use an MLX copy of this model"
        )
    return f"{target}.{parameter}"


def _config(file: _File, weights: dict[str, mx.array]) -> dict[str, Any]:
    hidden_size = file.need("llama.embedding_length")
    heads = file.need("llama.attention.head_count")
    head_dim = file.metadata.get("llama.attention.key_length", hidden_size // heads)
    _check_rope(file, head_dim)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": file.need("llama.block_count"),
        "intermediate_size": file.need("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.need("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": len(file.need("tokenizer.ggml.tokens")),
        "max_position_embeddings": file.need("llama.context_length"),
        "rope_theta": file.metadata.get("llama.rope.freq_base", 10000.0),
        # llama.cpp rotates neighbouring pairs and its converter has permuted the rows of q and k
        # to suit; MLX calls that order "traditional". Undoing it would mean to repack weights.
        "rope_traditional": True,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "eos_token_id": file.need("tokenizer.ggml.eos_token_id"),
    }
    if quantization := _quantization(weights):
        config["quantization"] = quantization
    return config


def _check_rope(file: _File, head_dim: int) -> None:
    rotated = file.metadata.get("llama.rope.dimension_count", head_dim)
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if rotated != head_dim or scaling != "none":
        raise UserError(
            f"{file.path}: RoPE over {rotated} of {head_dim} dimensions with scaling {scaling!r} "
            "is not supported by the Llama import: use an MLX copy of this model"
        )


def _quantization(weights: dict[str, mx.array]) -> dict[str, Any] | None:
    """mlx-lm's `quantization` entry: the default, and the modules that differ from it."""
    bits = {
        name.removesuffix(".scales"): _bits(weights, name.removesuffix(".scales"))
        for name in weights
        if name.endswith(".scales")
    }
    if not bits:
        return None
    overrides = {
        module: {"group_size": GROUP_SIZE, "bits": width}
        for module, width in sorted(bits.items())
        if width != DEFAULT_BITS
    }
    return {"group_size": GROUP_SIZE, "bits": DEFAULT_BITS, **overrides}


def _bits(weights: dict[str, mx.array], module: str) -> int:
    packed = weights[f"{module}.weight"].shape[-1]  # 32-bit words per row
    groups = weights[f"{module}.scales"].shape[-1]
    return packed * 32 // (groups * GROUP_SIZE)


def _tokenizer(file: _File) -> Tokenizer:
    if (kind := file.need("tokenizer.ggml.model")) != "gpt2":
        raise UserError(
            f"{file.path} has a {kind!r} tokenizer; only byte-level BPE ('gpt2') can be "
            "imported: use an MLX copy of this model"
        )
    tokens = file.need("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(_byte_pair_model(file, tokens))
    tokenizer.pre_tokenizer = _pre_tokenizer(file)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added_tokens(file, tokens, CONTROL))
    tokenizer.add_tokens(_added_tokens(file, tokens, USER_DEFINED))
    return tokenizer


def _byte_pair_model(file: _File, tokens: list[str]) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges")]
    try:
        return models.BPE(vocabulary, merges)
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(
            f"{file.path}: the merges do not fit the tokens ({error}); get the file again"
        ) from error


def _pre_tokenizer(file: _File) -> pre_tokenizers.PreTokenizer:
    """What splits text into words before the merges are applied; one recipe per GGUF name."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    recipes = {
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        ),
    }
    name = file.need("tokenizer.ggml.pre")
    if name not in recipes:
        raise UserError(
            f"{file.path}: pre-tokenizer {name!r} is not supported (known: "
            f"{', '.join(recipes)}): use an MLX copy of this model"
        )
    return recipes[name]


def _added_tokens(file: _File, tokens: list[str], token_type: int) -> list[AddedToken]:
    types = file.need("tokenizer.ggml.token_type").tolist()
    if len(types) != len(tokens):
        raise UserError(
            f"{file.path}: {len(tokens)} tokens, but {len(types)} token types; get the file again"
        )
    return [
        AddedToken(token, special=token_type == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind == token_type
    ]


def _tokenizer_config(file: _File) -> dict[str, Any]:
    roles = {
        "bos_token": "tokenizer.ggml.bos_token_id",
        "eos_token": "tokenizer.ggml.eos_token_id",
        "unk_token": "tokenizer.ggml.unknown_token_id",
        "pad_token": "tokenizer.ggml.padding_token_id",
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.need("llama.context_length"),
        **{role: _token(file, key) for role, key in roles.items() if key in file.metadata},
    }


def _token(file: _File, key: str) -> str:
    """The token whose id stands under `key`."""
    tokens, index = file.need("tokenizer.ggml.tokens"), file.need(key)
    if not 0 <= index < len(tokens):
        raise UserError(f"{file.path}: {key} is {index}, with {len(tokens)} tokens; get it again")
    return tokens[index]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
