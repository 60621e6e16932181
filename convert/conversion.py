"""One conversion: read, check, change, write, verify, rename."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redrafter_mlx.drafters.checkpoint import expected_tensors, own_settings
from redrafter_mlx.drafters.head import HeadConfig
from redrafter_mlx.errors import UserError

from . import storage
from .card import CARD, Facts, card, sha256
from .head import Head, Packing, read_head
from .layouts import LAYOUTS, Layout, settings_of
from .safetensors import Entry, Writer
from .sources import open_source
from .target import Target
from .vocabulary import Choice, choose, count_ids
from .weights import DTYPES, Job, Recipe, fits, jobs

PROGRESS_FROM = 256 * 2**20  # bytes; smaller heads need no bar
_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True)
class Order:
    """What the user asked for; the flags of the command."""

    source: str
    destination: Path
    layout: Layout = LAYOUTS["mlx"]
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
    config: HeadConfig
    facts: Facts


def convert(order: Order, check: Callable[[Head, Path, Recipe], None] | None = None) -> Result:
    """Convert a head; it appears at the destination whole, or not at all.

    check  is called with the source's head and the finished directory before it is renamed; what
           it raises cancels the conversion

    Raises UserError for anything wrong with the source, the wishes or the destination.
    """
    storage.check_destination(order.destination, order.force)
    source = open_source(order.source, order.revision)
    storage.check_destination(order.destination, order.force, source.path)
    head = read_head(source, order.source_layout)
    if order.target:
        order.target.check_fits(head.config)
    recipe, notes = _recipe(order, head)
    notes = [*head.notes, *notes]
    for note in notes:
        _log.info("note: %s", note)
    with storage.build(order.destination, order.force) as directory:
        work = jobs(head, recipe)
        ids = head.draft_ids if recipe.kept is None else head.draft_ids[recipe.kept]
        config = dataclasses.replace(head.config, draft_vocab_size=len(ids))
        offsets = _offsets(ids, config.vocab_size)
        _write_weights(directory / order.layout.file, order.layout, config, work, offsets)
        _write_json(directory / "config.json", _settings(order, head, config, work, recipe))
        if check:
            check(head, directory, recipe)
        size = (directory / order.layout.file).stat().st_size
        facts = _facts(order, head, config, work, notes, size)
        (directory / CARD).write_text(card(facts), encoding="utf-8")
    return Result(head, config, facts)


def _recipe(order: Order, head: Head) -> tuple[Recipe, list[str]]:
    """What to make of this head, and what the user should know about it."""
    notes = []
    extensions = ", ".join(own_settings(head.config))
    if extensions and order.layout.name != "mlx":
        raise UserError(
            f"--to {order.layout.name}: {extensions} of {head.source.path} are known to this "
            "package alone; train a head with --output-layer trained, --lookback-heads 0 and "
            "without --fused-layers"
        )
    if order.packing and not order.layout.packed:
        raise UserError(f"--quantize is for --to mlx; {order.layout.name} has no packed weights")
    if order.packing and head.packing:
        raise UserError(
            f"{head.source.path}: is quantised to {head.packing.bits} bits already, and doing it "
            "twice loses twice: start from the unquantised head, or leave --quantize out"
        )
    if order.unpack and order.packing:
        raise UserError("--dequantize contradicts --quantize: leave one out")
    if order.unpack and not head.packing:
        raise UserError(f"--dequantize: {head.source.path} is not quantised; leave it out")
    unpack = bool(head.packing) and (order.unpack or not order.layout.packed)
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
        notes.append(_vocabulary_note(order, head, choice))
    ids = head.draft_ids if kept is None else head.draft_ids[kept]
    if not order.layout.reduced and _offsets(ids, head.config.vocab_size) is not None:
        if not order.keep_d2t:
            raise UserError(
                f"--to {order.layout.name}: its readers know no reduced vocabulary, and this head "
                f"proposes {len(ids)} of {head.config.vocab_size} ids; start from the full head, "
                "or add --keep-d2t if yours reads d2t"
            )
        notes.append("d2t is written although readers of this layout do not know it")
    dtype = DTYPES[order.dtype] if order.dtype else None
    return Recipe(dtype, order.packing, unpack, kept), notes


def _offsets(ids: np.ndarray, vocab_size: int) -> np.ndarray | None:
    """d2t (D,) int64 for the ids of the output layer's rows; None if these are all ids in order."""
    if np.array_equal(ids, np.arange(vocab_size)):
        return None
    return ids.astype(np.int64) - np.arange(len(ids))


def _packing_notes(head: Head, packing: Packing) -> list[str]:
    matrices = {name: x for name, x in head.tensors.items() if name.endswith(".weight")}
    odd = [name for name, tensor in matrices.items() if not fits(tensor.shape, packing)]
    if len(odd) == len(matrices):
        raise UserError(
            f"--group-size {packing.group_size}: no layer of this head divides into such groups; "
            "give --group-size 32"
        )
    if not odd:
        return []
    names = ", ".join(odd)
    return [f"not quantised, since rows do not divide into {packing.group_size}: {names}"]


def _choose(order: Order, head: Head) -> Choice:
    size, file = order.vocabulary
    tokenizer = order.target.tokenizer() if order.target else None
    counts = count_ids(file, head.config.vocab_size, tokenizer)
    ends = tokenizer.eos_token_ids if tokenizer else ()
    return choose(counts, size, ends, head.draft_ids)


def _vocabulary_note(order: Order, head: Head, choice: Choice) -> str:
    _, file = order.vocabulary
    missing = f"; {choice.missing} more are not in this head" if choice.missing else ""
    return (
        f"draft vocabulary: {len(choice.ids):,} of {head.config.vocab_size:,} ids, "
        f"{choice.coverage:.2%} of the tokens in {file.name}{missing}"
    )


def _write_weights(
    file: Path, layout: Layout, config: HeadConfig, work: list[Job], offsets: np.ndarray | None
) -> None:
    from tqdm import tqdm

    theirs = lambda name: layout.theirs(name, config.num_blocks)
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
    order: Order, head: Head, config: HeadConfig, work: list[Job], recipe: Recipe
) -> dict:
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_blocks,
        "rnn": config.rnn,
        **own_settings(config),
    }
    if config.draft_vocab_size < config.vocab_size:
        values["draft_vocab_size"] = config.draft_vocab_size
    settings = settings_of(order.layout, values)
    packing = recipe.packing or (None if recipe.unpack else head.packing)
    if packing:
        settings["quantization"] = dataclasses.asdict(packing)
    types = {entry.dtype for job in work for entry in job.entries if entry.dtype in DTYPES.values()}
    if len(types) == 1:
        word = {code: word for word, code in DTYPES.items()}[types.pop()]
        settings["dtype"] = word
    return settings


def _facts(
    order: Order, head: Head, config: HeadConfig, work: list[Job], notes: list[str],
    weights_bytes: int,
) -> Facts:  # fmt: skip
    hashes = {file.name: sha256(file) for file in _files(head)}
    step = sum(job.nbytes for job in work)
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
        config=config,
        layout=order.layout.name,
        source=order.source,
        source_layout=head.layout.name,
        target=order.target.name if order.target else None,
        base=order.target.repo if order.target else None,
        hashes=hashes,
        settings=" ".join(flags) or "weights and vocabulary as in the source",
        parameters=parameter_count(config),
        file_bytes=weights_bytes,
        step_bytes=step,
        notes=notes,
    )


def _files(head: Head) -> list[Path]:
    """Files of the source, less the shards that hold nothing but the target."""
    tensors = head.source.tensors.values()
    theirs = {t.file for t in tensors if head.layout.belongs_to_target(t.name)}
    ours = {t.file for t in tensors if not head.layout.belongs_to_target(t.name)}
    return [file for file in head.source.files if file in ours or file not in theirs]


def parameter_count(config: HeadConfig) -> int:
    """Numbers that were trained, packed or not."""
    return sum(math.prod(tensor.shape) for tensor in expected_tensors(config).values())


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
