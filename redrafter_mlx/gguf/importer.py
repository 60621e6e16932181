"""Imports a GGUF file as an mlx-lm model directory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.architectures import HEAD, Architecture, architecture_of
from redrafter_mlx.gguf.blocks import GROUP_SIZE, check_tensors, quantised_bits, read_tensor
from redrafter_mlx.gguf.config import model_config
from redrafter_mlx.gguf.file import GgufFile, read_gguf
from redrafter_mlx.gguf.tokenizer import end_token_ids, gguf_tokenizer, tokenizer_config

# Increased whenever importing the same file would give another result. It is part of the names of
# cached models, so that none written by an older version is used.
LAYOUT_VERSION = 2


def import_gguf(source: Path, destination: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a directory that `mlx_lm.load` reads.

    Weights keep the file's quantisation where MLX has an equivalent, in groups of 32 with 16-bit
    scales and biases; `read_tensor` says what is exact and what is rounded. The model computes in
    a single type: float32 if the file is all F32, bfloat16 if it has only F32 and BF16, else
    float16; float32 vectors and matrices are rounded to it.

    Args:
        source: the .gguf file: architecture llama, qwen2, qwen3, gemma3 or phi3; tensors in F32,
            F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q8_K, in any mixture; a byte-level
            BPE or SentencePiece tokenizer.
        destination: an existing directory; receives config.json, model.safetensors,
            tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.

    Raises:
        UserError: the file is damaged, or uses an architecture, a tensor type, a tensor or a
            tokenizer that is not supported; the message names it, and nothing is written.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    file = read_gguf(source)
    config = model_config(file)
    architecture = architecture_of(file)
    check_tensors(file)
    modules = _modules(file, architecture, config)
    biased = _biased(file, architecture, modules)
    config |= _tensor_config(file, modules, biased)
    tokenizer, settings = gguf_tokenizer(file), tokenizer_config(file)
    weights = _weights(file, architecture, modules, biased)
    mx.save_safetensors(str(destination / "model.safetensors"), weights, metadata={"format": "mlx"})
    _write_json(destination / "config.json", config)
    tokenizer.save(str(destination / "tokenizer.json"))
    _write_json(destination / "tokenizer_config.json", settings)
    template = file.metadata.get("tokenizer.chat_template")
    if template and isinstance(template, str):
        (destination / "chat_template.jinja").write_text(template, encoding="utf-8")


def _modules(file: GgufFile, architecture: Architecture, config: dict[str, Any]) -> dict[str, str]:
    """The GGUF modules in this file -> their mlx-lm names; checks their shapes as well."""
    modules = {}
    for module, shape in architecture.modules(config):
        if f"{module}.weight" in file.tensors:
            _check_shapes(file, module, shape)
            modules[module] = architecture.mlx_name(module)
        elif module != HEAD:  # without a head of its own, the model uses the embedding
            raise UserError(f"{file.path}: tensor {module}.weight is missing; get a complete file")
    _check_nothing_is_left(file, architecture, modules)
    return modules


def _check_nothing_is_left(
    file: GgufFile, architecture: Architecture, modules: dict[str, str]
) -> None:
    can_be_biased = frozenset().union(*architecture.biases.values())
    known = {*architecture.rope_tensors, *(f"{module}.weight" for module in modules)}
    known |= {f"{module}.bias" for module in modules if _part(module) in can_be_biased}
    for name in file.tensors:
        if name not in known:
            raise UserError(
                f"{file.path}: tensor {name} has no place in the {architecture.model_type} model "
                "of its metadata (mixture of experts and other variants are not supported): use an "
                "MLX copy of this model"
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


def _biased(
    file: GgufFile, architecture: Architecture, modules: dict[str, str]
) -> dict[str, frozenset[str]]:
    """The groups in `architecture.biases` that need biases: where any member has one, or must."""
    found = {_part(module) for module in modules if f"{module}.bias" in file.tensors}
    return {
        entry: parts
        for entry, parts in architecture.biases.items()
        if parts & found or architecture.always_biased
    }


def _tensor_config(
    file: GgufFile, modules: dict[str, str], biased: dict[str, frozenset[str]]
) -> dict[str, Any]:
    """The part of config.json that depends on which tensors the file has, and on their types."""
    ends = end_token_ids(file)
    config = {
        "tie_word_embeddings": HEAD not in modules,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        **dict.fromkeys(biased, True),
    }
    if quantization := _quantization(file, modules):
        config["quantization"] = quantization
    return config


def _quantization(file: GgufFile, modules: dict[str, str]) -> dict[str, Any] | None:
    """mlx-lm's `quantization` entry: the most common width, and the modules that differ."""
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
    file: GgufFile,
    architecture: Architecture,
    modules: dict[str, str],
    biased: dict[str, frozenset[str]],
) -> dict[str, mx.array]:
    dtype = _dtype({file.tensors[f"{module}.weight"].kind for module in modules})
    parts_with_bias = frozenset().union(*biased.values())
    weights = {}
    for module, name in modules.items():
        tensors = read_tensor(file, f"{module}.weight")
        if _part(module).endswith("norm"):
            tensors["weight"] = tensors["weight"] - architecture.norm_offset
        if _part(module) in parts_with_bias:
            tensors["bias"] = _bias(file, module)
        for parameter, array in tensors.items():
            weights[f"{name}.{parameter}"] = _narrowed(file, module, array, dtype)
    return weights


def _dtype(kinds: set[str]) -> mx.Dtype:
    """The one type to compute in: a single wider vector would widen all activations after it."""
    if kinds == {"F32"}:
        return mx.float32
    return mx.bfloat16 if kinds <= {"F32", "BF16"} else mx.float16


def _bias(file: GgufFile, module: str) -> np.ndarray:
    """A module's bias; zeros if only others in its group have one, as mlx-lm has all or none."""
    name = f"{module}.bias"
    if name in file.tensors:
        return read_tensor(file, name)["weight"]
    return np.zeros(file.tensors[f"{module}.weight"].shape[0], np.float32)


def _narrowed(file: GgufFile, module: str, array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The array, rounded to the model's type if it is float32."""
    if array.dtype != np.float32:
        return mx.array(array)
    largest = float(np.abs(array).max(initial=0))
    if largest > mx.finfo(dtype).max:
        raise UserError(
            f"{file.path}: {module} holds {largest:g}, too large for "
            f"{str(dtype).removeprefix('mlx.core.')}, the type that the file's other tensors call "
            "for; use a file that is all F32"
        )
    return mx.array(array).astype(dtype)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
