"""`data.json`: what a directory of training data was made with."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.machine.storage import one_line
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.training.estimate import choose_rows
from redrafter_mlx.training.lockstep import K
from redrafter_mlx.training.options import DataOptions
from redrafter_mlx.training.scripts import Template
from redrafter_mlx.training.shards import shard_count

MANIFEST = "data.json"
FORMAT = 1
SAMPLE = 16
"""Values of each weight that go into the target's fingerprint."""


def settle(
    directory: Path,
    target: Target,
    options: DataOptions,
    template: Template | None,
    data: str | None,
    jobs: int,
) -> int:
    """Write the manifest or check it; returns the rows of a batch.

    data  a hash of the questions of --data; None without
    jobs  how many share the work

    Raises UserError that says what differs if the directory was made with something else.
    """
    path = directory / MANIFEST
    try:
        there = json.loads(path.read_text("utf-8")) if path.exists() else None
        rows = options.rows or (there and there["options"]["rows"]) or choose_rows(target, options)
        here = {
            "format": FORMAT,
            "target": fingerprint(target),
            "options": {
                "columns": options.columns, "rows": rows, "answer_tokens": options.answer_tokens,
                "seed": options.seed, "data": data, "likeliest": K, "jobs": jobs,
                "template": _digest(repr(template and _pieces(template))),
            },
        }  # fmt: skip
        if there is not None:
            _compare(directory, there, here)
            return rows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged; give another directory or empty it") from error
    if shard_count(directory):
        raise UserError(f"{directory} holds shards but no {MANIFEST}; give another directory")
    try:
        _write_json(path, here)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    return rows


def _pieces(template: Template) -> tuple:
    return (template.opening, template.reply, template.question, sorted(template.asked))


def _compare(directory: Path, there: dict, here: dict) -> None:
    flat = lambda manifest: (
        {"format": manifest["format"]}
        | {
            f"{group} {name}": value
            for group in ("target", "options")
            for name, value in manifest[group].items()
        }
    )
    old, new = flat(there), flat(here)
    different = [
        f"{name} {old.get(name)} there, {new.get(name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if different:
        raise UserError(
            f"{directory} holds data made with other settings: {'; '.join(different)}; "
            "give the same ones, or another directory"
        )


def fingerprint(target: Target) -> dict[str, str | int | list[int]]:
    """What tells a target from others: its shape, and a hash of some values of every weight."""
    named = sorted(tree_flatten(target.model.parameters()), key=lambda pair: pair[0])
    samples = device.read(*(x.flatten()[:SAMPLE].astype(mx.float32) for _, x in named))
    digest = hashlib.sha256()
    for (name, array), sample in zip(named, samples, strict=True):
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + sample.tobytes())
    return {
        "type": target.name,
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "dtype": str(target.dtype),
        "layers": list(target.taps),
        "weights": digest.hexdigest()[:16],
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def note_counts(directory: Path, counts: dict[str, int]) -> None:
    """Note in the manifest what has been written, for people; the shards hold the same."""
    path = directory / MANIFEST
    _write_json(path, json.loads(path.read_text("utf-8")) | {"counts": counts})


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    os.replace(partial, path)
