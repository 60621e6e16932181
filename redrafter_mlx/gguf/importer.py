"""Import of a Llama-architecture GGUF file into an mlx-lm model directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.blocks import GROUP_SIZE, check_tensor, quantised_bits, read_tensor
from redrafter_mlx.gguf.config import ROPE_FACTORS, llama_config
from redrafter_mlx.gguf.file import GgufFile, read_gguf
from redrafter_mlx.gguf.tokenizer import end_token_ids, gguf_tokenizer, tokenizer_config

# Raised whenever an import of the same file would come out different: caches carry it in their
# names, so that nobody keeps a directory written by an older version.
LAYOUT_VERSION = 2

# GGUF module -> mlx-lm module.
EMBEDDING, HEAD = "token_embd", "output"
MODULES = {EMBEDDING: "model.embed_tokens", "output_norm": "model.norm", HEAD: "lm_head"}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def import_gguf(source: Path, destination: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a directory that `mlx_lm.load` reads.

    Weights keep the quantisation of the file, in MLX's layout: groups of 32 with 16-bit scales
    and biases. Nothing is quantised a second time. Next to 16-bit or quantised matrices, float32
    vectors and matrices are rounded to float16, so that the model computes in one type.

    Args:
        source: the .gguf file: architecture `llama`; tensors in F32, F16, Q4_0, Q4_1 and Q8_0, in
            any mixture; a byte-level BPE or SentencePiece tokenizer.
        destination: an existing directory; receives config.json, model.safetensors,
            tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.

    Raises:
        UserError: the file is damaged, or uses an architecture, a tensor type, a tensor or a
            tokenizer that is not supported; the message names it. Nothing is written then.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    file = read_gguf(source)
    config = llama_config(file)
    modules = _modules(file, config)
    config |= _tensor_config(file, modules)
    tokenizer, settings = gguf_tokenizer(file), tokenizer_config(file)
    weights = _weights(file, config, modules)
    mx.save_safetensors(str(destination / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(destination / "config.json", config)
    tokenizer.save(str(destination / "tokenizer.json"))
    _write_json(destination / "tokenizer_config.json", settings)
    template = file.metadata.get("tokenizer.chat_template")
    if template and isinstance(template, str):
        (destination / "chat_template.jinja").write_text(template, encoding="utf-8")


def _modules(file: GgufFile, config: dict[str, Any]) -> dict[str, str]:
    """GGUF modules of this file and their mlx-lm names; all tensors are checked on the way.

    Example: blk.3.attn_q -> model.layers.3.self_attn.q_proj
    """
    for name in file.tensors:
        check_tensor(file, name)
    modules = {}
    for module, shape in _expected(config):
        if f"{module}.weight" in file.tensors:
            _check_shapes(file, module, shape)
            modules[module] = _mlx_name(module)
        elif module != HEAD:  # without it the embedding serves
            raise UserError(f"{file.path}: tensor {module}.weight is missing; get a complete file")
    _check_nothing_is_left(file, modules)
    return modules


def _expected(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Modules of a Llama of this configuration, each with its weight's shape."""
    hidden, inner, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    yield EMBEDDING, (vocabulary, hidden)
    yield "output_norm", (hidden,)
    yield HEAD, (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        for part, shape in layer.items():
            yield f"blk.{index}.{part}", shape


def _check_nothing_is_left(file: GgufFile, modules: dict[str, str]) -> None:
    known = {ROPE_FACTORS} | {f"{module}.weight" for module in modules}
    known |= {f"{module}.bias" for module in modules if _part(module) in ATTENTION | MLP}
    for name in file.tensors:
        if name not in known:
            raise UserError(
                f"{file.path}: tensor {name} has no place in the Llama of its metadata (mixture "
                "of experts and other variants are not supported): use an MLX copy of this model"
            )


def _check_shapes(file: GgufFile, module: str, shape: tuple[int, ...]) -> None:
    for parameter, expected in (("weight", shape), ("bias", shape[:1])):
        name = f"{module}.{parameter}"
        if name not in file.tensors:
            continue
        found = file.tensors[name].shape
        if found != expected:
            raise UserError(
                f"{file.path}: tensor {name} has shape {found}, the metadata says {expected}; "
                "get the file again"
            )
        if len(found) == 1 and quantised_bits(file, name):
            raise UserError(
                f"{file.path}: tensor {name} is a vector in {file.tensors[name].kind}, which "
                "mlx-lm cannot hold; use a file that has its vectors in F32"
            )


def _part(module: str) -> str:
    return module.rpartition(".")[2]


def _mlx_name(module: str) -> str:
    if module in MODULES:
        return MODULES[module]
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{(ATTENTION | MLP | NORMS)[part]}"


def _tensor_config(file: GgufFile, modules: dict[str, str]) -> dict[str, Any]:
    """The part of config.json that depends on which tensors there are and on their types."""
    ends = end_token_ids(file)
    config = {
        "tie_word_embeddings": HEAD not in modules,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }
    biased = {_part(module) for module in modules if f"{module}.bias" in file.tensors}
    if biased & ATTENTION.keys():
        config["attention_bias"] = True
    if biased & MLP.keys():
        config["mlp_bias"] = True
    if quantization := _quantization(file, modules):
        config["quantization"] = quantization
    return config


def _quantization(file: GgufFile, modules: dict[str, str]) -> dict[str, Any] | None:
    """mlx-lm's `quantization` entry: the commonest width, and the modules that differ from it."""
    widths = {
        name: bits
        for module, name in modules.items()
        if (bits := quantised_bits(file, f"{module}.weight"))
    }
    if not widths:
        return None
    default = Counter(widths.values()).most_common(1)[0][0]
    overrides = {
        name: {"group_size": GROUP_SIZE, "bits": bits}
        for name, bits in sorted(widths.items())
        if bits != default
    }
    return {"group_size": GROUP_SIZE, "bits": default, **overrides}


def _weights(
    file: GgufFile, config: dict[str, Any], modules: dict[str, str]
) -> dict[str, mx.array]:
    # A single float32 vector would widen every activation behind it.
    wide = all(file.tensors[f"{module}.weight"].kind == "F32" for module in modules)
    weights = {}
    for module, name in modules.items():
        tensors = read_tensor(file, f"{module}.weight") | _bias(file, config, module)
        for parameter, array in tensors.items():
            weights[f"{name}.{parameter}"] = mx.array(
                array if wide else _narrowed(file, module, array)
            )
    return weights


def _bias(file: GgufFile, config: dict[str, Any], module: str) -> dict[str, np.ndarray]:
    """A module's bias; zeros where only its neighbours have one: mlx-lm has all or none."""
    name = f"{module}.bias"
    if name in file.tensors:
        return {"bias": read_tensor(file, name)["weight"]}
    part = _part(module)
    if (part in ATTENTION and config.get("attention_bias")) or (
        part in MLP and config.get("mlp_bias")
    ):
        return {"bias": np.zeros(file.tensors[f"{module}.weight"].shape[0], np.float32)}
    return {}


def _narrowed(file: GgufFile, module: str, array: np.ndarray) -> np.ndarray:
    """The array with float32 rounded to float16."""
    if array.dtype != np.float32:
        return array
    largest = float(np.abs(array).max(initial=0))
    if largest > float(np.finfo(np.float16).max):
        raise UserError(
            f"{file.path}: {module} holds {largest:g}, too large for float16 next to tensors of "
            "16 or fewer bits; use a file that is all F32"
        )
    return array.astype(np.float16)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
