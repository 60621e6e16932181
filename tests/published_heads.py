"""Random heads in published layouts, for tiny targets."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx.drafters import eagle3, medusa
from redrafter_mlx.target.adapter import Target


def write(path: Path, settings: dict, tensors: dict[str, mx.array]) -> Path:
    """A checkpoint's directory."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    return path


def _random(head, seed: int) -> dict[str, mx.array]:
    keys = iter(mx.random.split(mx.random.key(seed), 200))
    return {
        name: 1 + 0.1 * mx.random.normal(x.shape, key=next(keys))
        if x.ndim == 1 and "norm" in name
        else mx.random.normal(x.shape, key=next(keys)) / x.shape[-1] ** 0.5
        for name, x in tree_flatten(head.parameters())
    }


def write_medusa(path: Path, target: Target, heads: int = 3, seed: int = 0) -> Path:
    """A Medusa head; its output layers are nearly the target's own."""
    config = medusa.MedusaConfig(
        target.vocab_size, target.hidden_size, heads, 1, target.vocab_size, False
    )
    tensors = _random(medusa.MedusaHead(config), seed)
    own = mx.arange(target.vocab_size)
    for name in tensors:
        if name.endswith(".1.weight"):
            tensors[name] = target.output_layer(own).weight + 0.1 * tensors[name]
    settings = {"medusa_num_heads": 2, "medusa_num_layers": 1}  # 2, as the published ones say
    return write(path, settings, {n.removeprefix("heads."): x for n, x in tensors.items()})


def write_eagle3(
    path: Path, target: Target, draft_vocab: int | None = None, seed: int = 0, **settings
) -> Path:
    """An EAGLE-3 head in SafeAILab's layout, with a reduced vocabulary if so many ids are given."""
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": target.vocab_size,
        "draft_vocab_size": draft_vocab or target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        **settings,
    }
    h, v = target.hidden_size, settings["draft_vocab_size"]
    double = {
        f"layers.0.self_attn.{x}_proj.weight": (n, 2 * h) for x, n in (("q", h), ("k", h // 2))
    }
    shapes = {
        **double,
        "fc.weight": (h, 3 * h),
        "lm_head.weight": (v, h),
        "layers.0.mlp.gate_proj.weight": (48, h),
    }
    config = eagle3.KIND.config(path, settings, shapes)
    tensors = _random(eagle3.Eagle3Head(config), seed)
    names = {name: name.replace("layers.0.", "midlayer.") for name in tensors}
    tensors = {names[name]: x for name, x in tensors.items()}
    if draft_vocab:
        ids = np.sort(np.random.default_rng(seed).permutation(target.vocab_size)[:draft_vocab])
        tensors["d2t"] = mx.array(ids - np.arange(draft_vocab))
        tensors["t2d"] = mx.array(np.isin(np.arange(target.vocab_size), ids))
    return write(path, settings, tensors)
