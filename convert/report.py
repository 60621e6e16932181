"""What a head is: python -m convert inspect PATH."""

from __future__ import annotations

import math
from typing import Any

from redrafter_mlx.errors import UserError

from .card import megabytes
from .head import Head
from .kinds import kind_of, layout_of
from .layouts import recognise
from .reading import read_head
from .sources import Source, locate, open_source

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
    path = locate(name, revision)
    try:
        source = open_source(str(path))
    except UserError as error:
        return {"path": str(path), "problem": str(error)}
    found: dict[str, Any] = {"path": str(path), "tensors": _tensors(source)}
    found["files"] = {file.name: file.stat().st_size for file in source.files}
    try:
        found |= _recognised(source)
        head = read_head(source)
    except UserError as error:
        return found | {"problem": str(error)}
    return found | _head(head)


def _recognised(source: Source) -> dict[str, str]:
    kind = kind_of(source.path, source.settings, source.tensors, None)
    if kind is None:
        layout = recognise(source.path, source.tensors).layout.name
        return {"kind": "recurrent", "layout": layout}
    return {"kind": kind.name, "layout": layout_of(kind, source.settings)}


def _tensors(source: Source) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(t.shape), "dtype": t.dtype, "file": t.file.name}
        for name, t in sorted(source.tensors.items())
    ]


def _head(head: Head) -> dict[str, Any]:
    return {
        "vocab_size": head.vocab_size,
        "hidden_size": head.hidden_size,
        "draft_vocab_size": len(head.draft_ids),
        **head.facts(),
        "described": head.words.shape,
        "quantization": vars(head.packing) if head.packing else None,
        "dtypes": sorted({t.dtype for t in head.tensors.values()}),
        "parameters": head.parameters,
        "bytes_per_draft_step": head.step_bytes,
        "bytes_by_part": head.bytes_by_part(),
        "same_sizes_as": FAMILIES.get((head.hidden_size, head.vocab_size)),
        "notes": head.notes,
    }


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
    own = ["rows of the target's own head, and of each text's ids"] * f.get("tied_output", False)
    if f.get("fused_layers"):
        own.append(f"also reads layers {', '.join(map(str, f['fused_layers']))}")
    if f.get("lookback_heads"):
        own.append(f"looks back at the text with {f['lookback_heads']} attention heads")
    parts = ", ".join(f"{k} {megabytes(v)}" for k, v in f["bytes_by_part"].items() if v)
    known = f"; {f['same_sizes_as']} has these sizes" if f["same_sizes_as"] else ""
    vocabulary = f" and vocab_size {f['vocab_size']}" if f["vocab_size"] else ""
    return [
        f"  {f['kind'] + ' draft head':<22} layout {f['layout']}, {kind}, {' '.join(f['dtypes'])}",
        f"  size                   {f['parameters']:,} parameters, "
        f"{megabytes(sum(f['files'].values()))} on disk",
        f"  shape                  {f['described']}",
        f"  draft vocabulary       {_vocabulary(f['draft_vocab_size'], f['vocab_size'])}",
        *([f"  output                 {'; '.join(own)}"] if own else []),
        f"  read per draft step    {megabytes(f['bytes_per_draft_step'])}: {parts}",
        f"  fits                   targets with hidden_size {f['hidden_size']}{vocabulary}{known}",
    ]


def _vocabulary(drafted: int, known: int) -> str:
    if not known:
        return "the target's"
    share = "" if drafted == known else f" ({drafted / known:.0%} of {known:,})"
    return f"{drafted:,} ids{share}"


def _table(tensors: list[dict[str, Any]]) -> list[str]:
    width = max((len(t["name"]) for t in tensors), default=0)
    return [
        f"  {t['name']:<{width}}  {t['dtype']:<4}  {' x '.join(map(str, t['shape'])):>15}  "
        f"{math.prod(t['shape']):>13,}"
        for t in tensors
    ]
