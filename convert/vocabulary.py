"""The draft vocabulary: the token ids that a head may propose, chosen by how often they occur."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redrafter_mlx.errors import UserError

TEXT_KEYS = ("text", "content", "prompt", "response", "completion", "turns", "messages",
             "conversations", "value")  # fmt: skip
"""Where texts stand in a line of a .jsonl file."""

_COUNT = re.compile(r"\s*(\d+)[\s,:]+(\d+)\s*")


@dataclass(frozen=True)
class Choice:
    """Ids chosen from counts.

    ids       (D,) ascending
    coverage  share of the counted tokens that have one of them
    missing   how many wanted ids the head's own reduced vocabulary lacks
    """

    ids: np.ndarray
    coverage: float
    missing: int


def parse_flag(words: list[str]) -> tuple[int | None, Path]:
    """--draft-vocab [N] FILE: how many ids, None for all that occur, and where they are counted."""
    numbers = [word for word in words if word.isdecimal()]
    files = [word for word in words if not word.isdecimal()]
    shown = f"--draft-vocab {' '.join(words)}"
    if len(numbers) > 1 or len(files) > 1:
        raise UserError(f"{shown}: give one number, one file, or both")
    if not files:
        raise UserError(
            f"{shown} does not say where the likeliest ids are counted: give a text or a file of "
            f"token counts too, as in --draft-vocab {words[0]} text.txt"
        )
    size = int(numbers[0]) if numbers else None
    if size == 0:
        raise UserError(f"{shown}: a vocabulary of no ids proposes nothing")
    from redrafter_mlx.loading import places

    file = places.expanded(files[0])
    if not file.is_file():
        raise UserError(f"--draft-vocab {files[0]}: no such file")
    return size, file


def count_ids(file: Path, vocab_size: int, tokenizer: Any | None) -> np.ndarray:
    """How often each token id occurs, (V,) int64.

    file       token counts: a JSON object {"id": count}, or lines `id count`; else a text, or
               JSON lines with texts under one of TEXT_KEYS
    tokenizer  the target's; needed for texts only
    """
    content = _read(file)
    pairs = _pairs(file, content)
    if pairs is not None:
        return _tally(file, pairs, vocab_size)
    if tokenizer is None:
        raise UserError(
            f"--draft-vocab {file} is a text, which only the target's tokenizer can count: give "
            "--target, or a file of token counts"
        )
    counts = np.zeros(vocab_size, np.int64)
    for text in _texts(file, content):
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int64)
        if len(ids) and ids.max() >= vocab_size:
            raise UserError(
                f"--target's tokenizer has the id {ids.max()}, the head's vocab_size is "
                f"{vocab_size}: it was made for another target"
            )
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def choose(counts: np.ndarray, size: int | None, always: Iterable[int], held: np.ndarray) -> Choice:
    """The `size` likeliest ids among those that the head holds.

    size    None: all that occur
    always  ids that are kept in any case, such as those that end a text
    held    (D,) the ids of the head as it is

    Ties go to the smaller id. Example: counts [5, 0, 7, 7], size 2, always (0,) -> ids [0, 2]
    """
    total = int(counts.sum())
    if not total:
        raise UserError("--draft-vocab: the file holds no tokens")
    first = np.zeros(len(counts), bool)
    first[[i for i in always if 0 <= i < len(counts)]] = True
    order = np.lexsort((np.arange(len(counts)), -counts, ~first))
    wanted = order[(counts[order] > 0) | first[order]]
    holds = np.isin(wanted, held)
    missing = int((~holds[: size or len(wanted)]).sum())
    chosen = wanted[holds][:size]
    if size is not None and len(chosen) < size:
        raise UserError(
            f"--draft-vocab {size}: only {len(chosen)} different ids of this head occur in the "
            "file; give a smaller number or a longer text"
        )
    if not len(chosen):
        raise UserError("--draft-vocab: no id in the file is one that this head proposes")
    return Choice(np.sort(chosen), float(counts[chosen].sum() / total), missing)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--draft-vocab {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--draft-vocab {file}: is not UTF-8 text (byte {error.start}); convert it, for "
            "example with iconv -t UTF-8"
        ) from error


def _pairs(file: Path, content: str) -> list[tuple[int, int]] | None:
    """Ids and counts, or None if the file is a text."""
    if file.suffix == ".json":
        try:
            found = json.loads(content)
            return [(int(token), count) for token, count in found.items()]
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f'--draft-vocab {file}: is not a JSON object of token counts {{"id": count}}'
            ) from error
    lines = [line for line in content.splitlines() if line.strip()]
    matches = [_COUNT.fullmatch(line) for line in lines]
    if lines and all(matches):
        return [(int(match[1]), int(match[2])) for match in matches]
    return None


def _tally(file: Path, pairs: list[tuple[int, int]], vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for token, count in pairs:
        if type(count) is not int or not 0 <= count < 2**53:
            raise UserError(f"--draft-vocab {file}: the count of id {token} is {count!r}")
        if not 0 <= token < vocab_size:
            raise UserError(
                f"--draft-vocab {file}: has the id {token}, the head's vocab_size is {vocab_size}"
            )
        counts[token] += count
    return counts


def _texts(file: Path, content: str) -> Iterator[str]:
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield from _strings(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"--draft-vocab {file}: line {number} is not JSON") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key in TEXT_KEYS:
            if key in value:
                yield from _strings(value[key])
