"""What a drafter is called: `org/name`, `eagle3:PATH`, `max_gram`, `union:[...]`, and so on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redrafter_mlx.config import DrafterOptions
from redrafter_mlx.errors import UserError

HEAD, RECURRENT, MAX_GRAM, MODEL, CASCADE, UNION, AUTO = (
    "head", "recurrent", "max_gram", "model", "cascade", "union", "auto",
)  # fmt: skip

HEADS = (RECURRENT, "medusa", "eagle3", "mtp", "dflash")
"""Kinds of trained draft heads. Which one a bare name means, its files tell."""

POSSIBLE = (
    f"possible: a trained head as PATH, org/name or demo ({', '.join(HEADS)}; also KIND:PATH), "
    "max_gram, model:PATH-OR-REPO, cascade:[A,B,...], union:[A,B,...], auto"
)
"""For messages."""


@dataclass(frozen=True)
class Spec:
    """A drafter that was asked for.

    kind     one of HEADS, HEAD for whichever of them the files hold, or one of the others
    name     where its weights are: of a head or a model
    members  of a union; the levels of a cascade
    """

    kind: str
    name: str = ""
    members: tuple[Spec, ...] = ()

    def __str__(self) -> str:
        inside = f"[{','.join(map(str, self.members))}]" if self.members else self.name
        if self.kind == HEAD:
            return inside
        return f"{self.kind}:{inside}" if inside else self.kind

    def is_same(self, other: Spec) -> bool:
        """Whether both ask for the same; two heads do if they lie in the same place."""
        heads = (HEAD, *HEADS)
        return self == other or (
            self.kind in heads and other.kind in heads and self.name == other.name
        )

    def all(self, kind: str) -> list[Spec]:
        """The parts of this kind, itself included."""
        found = [part for member in self.members for part in member.all(kind)]
        return [self, *found] if self.kind == kind else found


def parse(text: str, options: DrafterOptions) -> Spec:
    """The drafter that `text` asks for.

    Raises UserError for an unknown kind, for drafters that cannot be combined, and for an option
    that none of them can honour.
    """
    spec = _parse(text.strip())
    cascades = spec.all(CASCADE)
    if len(cascades) > 1:
        raise UserError(f"{text} has {len(cascades)} cascades: give one; {POSSIBLE}")
    if cascades:
        cascade_matrix(options.cascade_k, cascades[0])
    else:
        for name in ("cascade_k", "lenience"):
            _refuse_given(options, name, f"{text} is not a cascade")
    if not spec.all(MAX_GRAM) and spec.kind != AUTO:
        for name in ("max_gram_memory", "max_gram_bigrams"):
            _refuse_given(options, name, f"{text} has no max_gram")
    return spec


def _refuse_given(options: DrafterOptions, name: str, why: str) -> None:
    given = getattr(options, name)
    if given != getattr(DrafterOptions, name):
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} {given} has no use: {why}; leave it out")


def _parse(text: str) -> Spec:
    kind, colon, rest = text.partition(":")
    if text in (MAX_GRAM, AUTO):
        return Spec(text)
    if kind in (CASCADE, UNION):
        return _combined(kind, rest, text)
    if kind in (*HEADS, MODEL) and colon:
        if not rest:
            raise UserError(f"{text} names no weights; {POSSIBLE}")
        return Spec(kind, rest)
    if text in (*HEADS, MODEL) or (colon and re.fullmatch(r"\w+", kind) and len(kind) > 1):
        raise UserError(f"{text!r} is not a drafter; {POSSIBLE}")
    return Spec(HEAD, text)


def _combined(kind: str, rest: str, text: str) -> Spec:
    if not (rest.startswith("[") and rest.endswith("]")):
        raise UserError(f"{text!r} must have the form {kind}:[A,B,...]; {POSSIBLE}")
    members = tuple(_parse(part.strip()) for part in _split(rest[1:-1], text))
    if len(members) < 2:
        raise UserError(f"{text} combines {len(members)} drafters: give two or more; {POSSIBLE}")
    for i, member in enumerate(members):
        if any(member.is_same(other) for other in members[:i]):
            raise UserError(f"{text} has {member} twice: leave one out")
        if member.kind in (AUTO, UNION) or (member.kind == kind == CASCADE):
            raise UserError(
                f"{text}: {member.kind} cannot stand in a {kind}; possible there: a trained "
                f"head, max_gram, model:REPO{', cascade:[...]' if kind == UNION else ''}"
            )
        if kind == CASCADE and member.kind in (HEAD, *HEADS) and i > 0:
            raise UserError(
                f"{text}: {member} reads the target's state at the last verified token, so it "
                "cannot write after other levels; put it first"
            )
    return Spec(kind, members=members)


def _split(text: str, whole: str) -> list[str]:
    """The parts of a list, at its own commas only."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:
        raise UserError(f"{whole!r}: brackets do not match; {POSSIBLE}")
    if not all(part.strip() for part in parts):
        raise UserError(f"{whole!r}: a drafter of the list is empty; {POSSIBLE}")
    return parts


def cascade_matrix(given: Any, cascade: Spec) -> list[list[int]]:
    """The K matrix of a cascade: what was given, as lists or JSON text, or the default for None.

    By default the first level drafts 5 tokens for the target, further models 5, Max-Gram 10; a
    model reviews 10 tokens of Max-Gram or 1 of another model at a time.

    Raises UserError if it does not fit the levels.
    """
    n = len(cascade.members)
    kinds = [member.kind for member in cascade.members]
    if given is None:
        most = [10 if kind == MAX_GRAM else 5 for kind in kinds]
        nested = [10 if kind == MAX_GRAM else 1 for kind in kinds]
        below = lambda r: r and kinds[r - 1] == MODEL
        rows = [nested if below(r) else [0] * n for r in range(1, n)]
        return [most] + [[0] * r + row[r:] for r, row in enumerate(rows, start=1)]
    rows = _rows(given)
    shape = f"{n} rows of {n} whole numbers of at least 0, such as {_example(n)}"
    if len(rows) != n or any(len(row) != n for row in rows):
        lengths = ", ".join(str(len(row)) for row in rows)
        raise UserError(
            f"--cascade-k has {len(rows)} rows ({lengths} numbers), but {cascade} has {n} levels: "
            f"it must be {shape}"
        )
    for r, row in enumerate(rows):
        for j, count in enumerate(row):
            if type(count) is not int or not 0 <= count <= 64:
                raise UserError(
                    f"--cascade-k: row {r + 1} has {count!r}: it must be {shape}, none above 64"
                )
            if j < r and count:
                raise UserError(
                    f"--cascade-k: row {r + 1}, column {j + 1} must be 0, not {count}: a level "
                    "drafts for the target and for levels before it only"
                )
        if r and any(row) and kinds[r - 1] != MODEL:
            raise UserError(
                f"--cascade-k: row {r + 1} gives {cascade.members[r - 1]} tokens to review, but "
                "only a model can review; make the row zeros"
            )
    if not any(rows[0]):
        raise UserError("--cascade-k: the first row drafts nothing; give it a number above 0")
    return rows


def _rows(given: Any) -> list[list[Any]]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UserError(f"--cascade-k {given!r} is not JSON: {error}") from error
    if not isinstance(given, Sequence) or not all(isinstance(row, (list, tuple)) for row in given):
        raise UserError(f"--cascade-k must be a list of lists such as {_example(2)}, not {given!r}")
    return [list(row) for row in given]


def _example(n: int) -> str:
    return json.dumps(
        [[0] * r + [5 if r == j == 0 else 10 for j in range(r, n)] for r in range(n)],
        separators=(",", ":"),
    )
