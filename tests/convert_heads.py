"""Heads in every layout for tests, with the names written out, and a runner for the command."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from convert.__main__ import main

GOLDEN = Path(__file__).parent / "fixtures" / "golden"

# prefix, residual block i, output layer after n blocks, projection
NAMES = {
    "apple": ("", "lm_head.{i}.linear", "lm_head.{n}", "input_proj"),
    "mlx": ("", "lm_head.{i}.linear", "lm_head.{n}", "input_proj"),
    "lm-heads": ("", "lm_heads.{i}.linear", "lm_heads.{n}", "input_projs"),
    "medusa": ("", "0.{i}.linear", "0.{n}", "input_proj"),
    "tensorrt-llm": ("drafter.", "layers.{i}.linear", "lm_head", "input_proj"),
    "modelopt": ("drafter.", "lm_head.{i}.linear", "lm_head.{n}", "input_proj"),
}


def apple_config(*, h=32, e=64, n=2, rnn=True, vocab=97, draft=None) -> dict:
    """The settings of a head in the reference implementation's words."""
    config = {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": vocab,
        "hidden_size": h,
        "exit_dim": e,
        "num_draft_layers": n,
        "rnn": rnn,
    }
    return config | ({"draft_vocab_size": draft} if draft else {})


def config_in(layout: str, config: dict) -> dict:
    """Those settings as another layout writes them."""
    h, e, n, rnn = (config[k] for k in ("hidden_size", "exit_dim", "num_draft_layers", "rnn"))
    other = {"draft_vocab_size": config["draft_vocab_size"]} if "draft_vocab_size" in config else {}
    if layout == "tensorrt-llm":
        return other | {
            "architecture": "ReDrafterForCausalLM",
            "vocab_size": config["vocab_size"],
            "redrafter_hidden_size": h,
            "redrafter_exit_dim": e,
            "redrafter_num_layers": n,
            "redrafter_is_rnn": rnn,
        }
    if layout == "modelopt":
        inner = {"hidden_size": h, "exit_dim": e, "num_draft_layers": n, "rnn": rnn}
        return other | {"vocab_size": config["vocab_size"], "redrafter": inner}
    return config


def apple_tensors(config: dict, dtype=mx.float32, seed=0) -> dict[str, mx.array]:
    """Random weights of a head in the reference implementation's names."""
    h, e, n = config["hidden_size"], config["exit_dim"], config["num_draft_layers"]
    draft = config.get("draft_vocab_size", config["vocab_size"])
    shapes = {f"lm_head.{i}.linear.{p}": s for i in range(n) for p, s in linear(e, e)}
    shapes[f"lm_head.{n}.weight"] = (draft, e)
    if e != 2 * h:
        shapes |= {f"input_proj.{p}": s for p, s in linear(e, 2 * h)}
    if config["rnn"]:
        shapes |= {f"rnn_u.{p}": s for p, s in linear(h, h)} | {"rnn_w.weight": (h, h)}
    rng = np.random.default_rng(seed)
    found = {
        name: mx.array(rng.standard_normal(shape, np.float32) / 4).astype(dtype)
        for name, shape in shapes.items()
    }
    if draft < config["vocab_size"]:
        ids = np.sort(rng.choice(config["vocab_size"], draft, replace=False))
        found["d2t"] = mx.array(ids - np.arange(draft))
    return found


def linear(rows: int, columns: int):
    return (("weight", (rows, columns)), ("bias", (rows,)))


def tensors_in(layout: str, tensors: dict, n: int) -> dict:
    """Tensors by the reference implementation's names, renamed."""
    prefix, block, output, projection = NAMES[layout]
    modules = {f"lm_head.{i}.linear": block.format(i=i) for i in range(n)}
    modules |= {f"lm_head.{n}": output.format(n=n), "input_proj": projection}
    renamed = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        renamed[prefix + ".".join(filter(None, (modules.get(module, module), parameter)))] = tensor
    return renamed


def write(path: Path, tensors: dict, config: dict | None, file="model.safetensors") -> Path:
    """A checkpoint directory."""
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path / file), tensors)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def write_in(path: Path, layout: str, config: dict, tensors: dict) -> Path:
    """A head in a layout, from the reference implementation's names."""
    n = config["num_draft_layers"]
    file = "rank0.safetensors" if layout == "tensorrt-llm" else "model.safetensors"
    return write(path, tensors_in(layout, tensors, n), config_in(layout, config), file)


def read(path: Path) -> dict[str, mx.array]:
    """All tensors of a directory."""
    found = {}
    for file in path.glob("*.safetensors"):
        found |= mx.load(str(file))
    mx.eval(found)
    return found


def same_bits(a: dict, b: dict) -> bool:
    """Equal names, types and bits."""
    bits = lambda x: np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and np.array_equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def settings(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def run(*words) -> int:
    """The command in this process; its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def convert(source: Path, output: Path, *words) -> Path:
    """A conversion that has to succeed."""
    assert run("--input", source, "--output", output, *words) == 0
    return output
