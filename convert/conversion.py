"""One conversion: read, check, change, write, verify, rename."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.errors import UserError

from . import storage
from .card import CARD, Facts, card, sha256
from .head import Form, Head, Packing
from .reading import read_head
from .safetensors import Entry, Writer
from .sources import Source, open_source
from .target import Target
from .torch_heads import formula_of
from .vocabulary import Choice, choose, count_ids
from .weights import DTYPES, WORDS, Job, Recipe, fits, jobs

PROGRESS_FROM = 256 * 2**20  # bytes; smaller heads need no bar
_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True)
class Order:
    """What the user asked for; the flags of the command."""

    source: str
    destination: Path
    layout: str | None = None
    source_layout: str | None = None
    revision: str | None = None
    dtype: str | None = None
    packing: Packing | None = None
    unpack: bool = False
    vocabulary: tuple[int | None, Path] | None = None
    target: Target | None = None
    keep_d2t: bool = False
    force: bool = False


@dataclass(frozen=True)
class Result:
    """What was written."""

    head: Head
    facts: Facts


def convert(order: Order, check: Callable[[Head, Path, Recipe], None] | None = None) -> Result:
    """Convert a head; it appears at the destination whole, or not at all.

    check  is called with the source's head and the finished directory before it is renamed; what
           it raises cancels the conversion

    Raises UserError for anything wrong with the source, the options or the destination.
    """
    storage.check_destination(order.destination, order.force)
    source = open_source(order.source, order.revision, order.source_layout)
    storage.check_destination(order.destination, order.force, source.path)
    head = _read(order, source)
    form = head.form(order.layout)
    if check:
        formula_of(head)
    recipe, notes = _recipe(order, head, form)
    notes = [*head.notes, *notes]
    for note in notes:
        _log.info("note: %s", note)
    with storage.build(order.destination, order.force) as directory:
        work = jobs(head, recipe)
        ids = head.draft_ids if recipe.kept is None else head.draft_ids[recipe.kept]
        _write_weights(directory / form.file, form, work, _offsets(ids, head.vocab_size))
        settings = _settings(head, form, ids, work, recipe)
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        made = read_head(open_source(str(directory)))  # what was written must be a head again
        if check:
            check(head, directory, recipe)
        facts = _facts(order, head, form, ids, made, notes)
        (directory / CARD).write_text(card(facts), encoding="utf-8")
    return Result(head, facts)


def _read(order: Order, source: Source) -> Head:
    """The head in the source, for the target if one was given."""
    head = read_head(source, order.source_layout)
    if order.target is None:
        return head
    size = order.target.size("vocab_size")
    if not head.vocab_size and size:  # it reads the target's output layer, of a size unknown
        told = dataclasses.replace(source, settings=source.settings | {"vocab_size": size})
        head = read_head(told, order.source_layout)
    order.target.check_fits(head)
    return head


def _recipe(order: Order, head: Head, form: Form) -> tuple[Recipe, list[str]]:
    """What to make of this head, and notes on it for the user."""
    notes = []
    if order.packing and not form.packed:
        raise UserError(f"--quantize is for --to mlx; {form.layout} has no packed weights")
    if order.packing and head.packing:
        raise UserError(
            f"{head.source.path}: is quantised to {head.packing.bits} bits already, and doing it "
            "twice loses twice: start from the unquantised head, or leave --quantize out"
        )
    if order.unpack and order.packing:
        raise UserError("--dequantize contradicts --quantize: leave one out")
    if order.unpack and not head.packing:
        raise UserError(f"--dequantize: {head.source.path} is not quantised; leave it out")
    unpack = bool(head.packing) and (order.unpack or not form.packed)
    if unpack:
        bits = head.packing.bits
        notes.append(f"the {bits}-bit weights are unpacked; what they lost stays lost")
    if order.packing:
        notes += _packing_notes(head, order.packing)
    kept = None
    if order.vocabulary:
        choice = _choose(order, head)
        order_of_ids = np.argsort(head.draft_ids)
        places = np.searchsorted(head.draft_ids, choice.ids, sorter=order_of_ids)
        kept = order_of_ids[places]
        missing = f"; {choice.missing} more are not in this head" if choice.missing else ""
        notes.append(
            f"draft vocabulary: {len(choice.ids):,} of {head.vocab_size:,} ids, "
            f"{choice.coverage:.2%} of the tokens in {order.vocabulary[1].name}{missing}"
        )
    ids = head.draft_ids if kept is None else head.draft_ids[kept]
    if order.keep_d2t and head.kind != "recurrent":
        raise UserError("--keep-d2t is for recurrent heads; others keep it anyway: leave it out")
    if not form.reduced and _offsets(ids, head.vocab_size) is not None:
        if not order.keep_d2t and not form.loaded:
            raise UserError(
                f"--to {form.layout}: its readers do not know reduced vocabularies, and this head "
                f"proposes {len(ids)} of {head.vocab_size} ids; start from the full head, "
                "or add --keep-d2t if yours reads d2t"
            )
        notes.append("d2t is written although other readers of this layout do not know it")
    dtype = DTYPES[order.dtype] if order.dtype else None
    return Recipe(dtype, order.packing, unpack, kept), notes


def _offsets(ids: np.ndarray, vocab_size: int) -> np.ndarray | None:
    """d2t (D,) int64 for the ids of the output layer's rows; None if these are all ids in order."""
    if np.array_equal(ids, np.arange(vocab_size)):
        return None
    return ids.astype(np.int64) - np.arange(len(ids))


def _packing_notes(head: Head, packing: Packing) -> list[str]:
    matrices = {name: x for name, x in head.tensors.items() if len(x.shape) > 1}
    kept = [name for name in matrices if not head.may_be_packed(name)]
    odd = [n for n, x in matrices.items() if n not in kept and not fits(x.shape, packing)]
    if len(odd) + len(kept) == len(matrices):
        raise UserError(
            f"--group-size {packing.group_size}: no layer of this head divides into such groups; "
            "give --group-size 32"
        )
    notes = []
    if odd:
        notes.append(
            f"not quantised, since rows do not divide into {packing.group_size}: {', '.join(odd)}"
        )
    if kept:
        names = ", ".join(kept[:6]) + f" and {len(kept) - 6} more" * (len(kept) > 6)
        notes.append(f"not quantised, since they are no layers of their own: {names}")
    return notes


def _choose(order: Order, head: Head) -> Choice:
    size, file = order.vocabulary
    if head.outputs is None:
        raise UserError(
            f"--draft-vocab: a head of the kind {head.kind} proposes what its target can say; "
            "leave it out"
        )
    if not head.vocab_size:
        raise UserError(
            f"--draft-vocab: {head.source.path} does not tell the vocab_size of its target: give "
            "--target"
        )
    tokenizer = order.target.tokenizer() if order.target else None
    counts = count_ids(file, head.vocab_size, tokenizer)
    ends = tokenizer.eos_token_ids if tokenizer else ()
    return choose(counts, size, ends, head.draft_ids)


def _write_weights(file: Path, form: Form, work: list[Job], offsets: np.ndarray | None) -> None:
    from tqdm import tqdm

    theirs = form.theirs
    entries = [
        Entry(theirs(entry.name), entry.dtype, entry.shape) for job in work for entry in job.entries
    ]
    if offsets is not None:
        entries.append(Entry(theirs("d2t"), "I64", offsets.shape))
    total = sum(entry.nbytes for entry in entries)
    hidden = not sys.stderr.isatty() or total < PROGRESS_FROM
    with (
        tqdm(
            total=total, desc="write", unit="B", unit_scale=True, leave=False, disable=hidden
        ) as bar,
        Writer(file, entries) as writer,
    ):
        if offsets is not None:
            writer.write(theirs("d2t"), offsets)
        for job in work:
            for arrays in job.blocks():
                for entry, array in zip(job.entries, arrays, strict=True):
                    writer.write(theirs(entry.name), array)
                    bar.update(array.nbytes)


def _settings(
    head: Head, form: Form, ids: np.ndarray, work: list[Job], recipe: Recipe
) -> dict[str, Any]:
    packing = recipe.packing or (None if recipe.unpack else head.packing)
    settings = form.settings(ids, packing)
    types = {WORDS[entry.dtype] for job in work for entry in job.entries if entry.dtype in WORDS}
    if len(types) == 1:
        settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = types.pop()
    return settings


def _facts(
    order: Order, head: Head, form: Form, ids: np.ndarray, made: Head, notes: list[str]
) -> Facts:
    flags = []
    if order.revision:
        flags.append(f"--revision {order.revision}")
    if order.dtype:
        flags.append(f"--dtype {order.dtype}")
    if order.packing:
        flags.append(f"--quantize {order.packing.bits} --group-size {order.packing.group_size}")
    if order.unpack:
        flags.append("--dequantize")
    if order.vocabulary:
        size, file = order.vocabulary
        flags.append(f"--draft-vocab {'' if size is None else f'{size} '}{file.name}")
    return Facts(
        words=head.words,
        hidden_size=head.hidden_size,
        vocab_size=head.vocab_size,
        draft_vocab_size=len(ids),
        form=form,
        source=order.source,
        source_layout=head.layout,
        target=order.target.name if order.target else None,
        base=order.target.repo if order.target else None,
        hashes={file.name: sha256(file) for file in head.files},
        settings=" ".join(flags) or "weights and vocabulary as in the source",
        parameters=made.parameters,
        file_bytes=made.source.files[0].stat().st_size,
        step_bytes=made.step_bytes,
        notes=notes,
    )
