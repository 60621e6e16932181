"""What a head is: python -m convert inspect PATH."""

from __future__ import annotations

import math
from typing import Any

from redrafter_mlx.errors import UserError

from .card import megabytes
from .conversion import parameter_count
from .head import Head, read_head
from .layouts import recognise
from .sources import Source, open_source

FAMILIES = {
    (576, 49152): "SmolLM2-135M",
    (960, 49152): "SmolLM2-360M",
    (2048, 49152): "SmolLM2-1.7B",
    (2048, 128256): "Llama-3.2-1B",
    (3072, 128256): "Llama-3.2-3B",
    (4096, 128256): "Llama-3-8B, Llama-3.1-8B",
    (8192, 128256): "Llama-3-70B, Llama-3.1-70B, Llama-3.3-70B",
    (4096, 32000): "Llama-2-7B, Vicuna-7B, Mistral-7B-v0.1",
    (5120, 32000): "Llama-2-13B, Vicuna-13B",
    (4096, 32768): "Mistral-7B-v0.3",
    (1024, 151936): "Qwen3-0.6B",
    (2048, 151936): "Qwen3-1.7B, Qwen2.5-3B",
    (2560, 151936): "Qwen3-4B",
    (4096, 151936): "Qwen3-8B",
    (896, 151936): "Qwen2.5-0.5B",
    (1536, 151936): "Qwen2.5-1.5B",
    (3584, 152064): "Qwen2.5-7B",
}
"""Well-known models by hidden size and vocabulary. Same sizes do not mean same target."""


def describe(name: str, revision: str | None = None) -> dict[str, Any]:
    """Everything that can be said of a checkpoint, as JSON has it; what is wrong under `problem`.

    Raises UserError only if there is nothing to describe.
    """
    from .sources import locate

    path = locate(name, revision)
    try:
        source = open_source(str(path))
    except UserError as error:
        return {"path": str(path), "problem": str(error)}
    found: dict[str, Any] = {"path": str(path), "tensors": _tensors(source)}
    found["files"] = {file.name: file.stat().st_size for file in source.files}
    try:
        found["layout"] = recognise(source.path, source.tensors).layout.name
        head = read_head(source)
    except UserError as error:
        return found | {"problem": str(error)}
    return found | _head(head)


def _tensors(source: Source) -> list[dict[str, Any]]:
    ordered = sorted(source.tensors.items())
    return [
        {"name": name, "shape": list(t.shape), "dtype": t.dtype, "file": t.file.name}
        for name, t in ordered
    ]


def _head(head: Head) -> dict[str, Any]:
    c = head.config
    parts = ("recurrence", "projection", "blocks", "lookback", "output")
    groups: dict[str, int] = dict.fromkeys(parts, 0)
    for name, tensor in head.tensors.items():
        groups[_group(head, name)] += tensor.nbytes
    return {
        "layout": head.layout.name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "exit_dim": c.exit_dim,
        "residual_blocks": c.num_blocks,
        "rnn": c.rnn,
        "draft_vocab_size": c.draft_vocab_size,
        "tied_output": c.tied_output,
        "fused_layers": list(c.fused_layers),
        "lookback_heads": c.lookback_heads,
        "quantization": vars(head.packing) if head.packing else None,
        "dtypes": sorted({t.dtype for t in head.tensors.values()}),
        "parameters": parameter_count(c),
        "bytes_per_draft_step": head.step_bytes,
        "bytes_by_part": groups,
        "same_sizes_as": FAMILIES.get((c.hidden_size, c.vocab_size)),
        "notes": head.notes,
    }


def _group(head: Head, name: str) -> str:
    module = name.rpartition(".")[0]
    if module.startswith("rnn_"):
        return "recurrence"
    if module == "input_proj":
        return "projection"
    if module.startswith("lookback"):
        return "lookback"
    return "output" if module == head.output else "blocks"


def report(found: dict[str, Any]) -> str:
    """The description for people."""
    lines = [f"{found['path']}"]
    if "parameters" in found:
        lines += _summary(found)
    if "tensors" in found:
        lines += ["", *_table(found["tensors"])]
    lines += [f"note: {note}" for note in found.get("notes", [])]
    if "problem" in found:
        lines += ["", f"problem: {found['problem']}"]
    return "\n".join(lines)


def _summary(f: dict[str, Any]) -> list[str]:
    packed = f["quantization"]
    kind = f"{packed['bits']}-bit, groups of {packed['group_size']}" if packed else "not quantised"
    full = f["draft_vocab_size"] == f["vocab_size"]
    share = (
        "" if full else f" ({f['draft_vocab_size'] / f['vocab_size']:.0%} of {f['vocab_size']:,})"
    )
    own = ["rows of the target's own head, and of each text's ids"] * f["tied_output"]
    if f["fused_layers"]:
        own.append(f"also reads layers {', '.join(map(str, f['fused_layers']))}")
    if f["lookback_heads"]:
        own.append(f"looks back at the text with {f['lookback_heads']} attention heads")
    parts = ", ".join(f"{k} {megabytes(v)}" for k, v in f["bytes_by_part"].items() if v)
    known = f"; {f['same_sizes_as']} has these sizes" if f["same_sizes_as"] else ""
    return [
        f"  recurrent draft head   layout {f['layout']}, {kind}, {' '.join(f['dtypes'])}",
        f"  size                   {f['parameters']:,} parameters, "
        f"{megabytes(sum(f['files'].values()))} on disk",
        f"  shape                  hidden {f['hidden_size']:,}, exit {f['exit_dim']:,}, "
        f"{f['residual_blocks']} residual blocks, "
        f"{'recurrent state' if f['rnn'] else 'sum of embeddings'}",
        f"  draft vocabulary       {f['draft_vocab_size']:,} ids{share}",
        *([f"  output                 {'; '.join(own)}"] if own else []),
        f"  read per draft step    {megabytes(f['bytes_per_draft_step'])}: {parts}",
        f"  fits                   targets with hidden_size {f['hidden_size']} and vocab_size "
        f"{f['vocab_size']}{known}",
    ]


def _table(tensors: list[dict[str, Any]]) -> list[str]:
    width = max((len(t["name"]) for t in tensors), default=0)
    return [
        f"  {t['name']:<{width}}  {t['dtype']:<4}  {' x '.join(map(str, t['shape'])):>15}  "
        f"{math.prod(t['shape']):>13,}"
        for t in tensors
    ]
