"""The model card that is written beside a converted head."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .head import Form, Words

CARD = "README.md"


@dataclass(frozen=True)
class Facts:
    """What a card says.

    target    as --target named it; None if it was not given
    base      the target's Hugging Face repo
    hashes    SHA-256 of each source file
    settings  flags that shaped the result
    """

    words: Words
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    form: Form
    source: str
    source_layout: str
    target: str | None
    base: str | None
    hashes: Mapping[str, str]
    settings: str
    parameters: int
    file_bytes: int
    step_bytes: int
    notes: list[str] = field(default_factory=list)


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def megabytes(count: int) -> str:
    """Bytes for people: 12.3 MB; below 100 kB exactly."""
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"


def card(facts: Facts) -> str:
    """The text of README.md, with the front matter that Hugging Face reads."""
    words, known = facts.words, facts.vocab_size
    if facts.draft_vocab_size < known:
        ids = f"{facts.draft_vocab_size:,} of {known:,} ids (`d2t` holds offsets)"
    else:
        ids = f"all {known:,} ids" if known else "the target's"
    vocabulary = f" and a vocabulary of {known:,} ids" if known else ""
    target = facts.target or "not named when the head was converted"
    lines = [
        *_front_matter(facts),
        "",
        f"# {words.title}",
        "",
        f"{words.about} It proposes tokens that its target model then checks, and is of no use "
        "alone.",
        "",
        f"- Target: {target}. It fits models with hidden size {facts.hidden_size:,}{vocabulary}, "
        "and drafts well only for the one it was trained with.",
        f"- Head: {words.shape}; draft vocabulary: {ids}.",
        f"- Size: {facts.parameters:,} parameters, {megabytes(facts.file_bytes)}; each draft step "
        f"reads {megabytes(facts.step_bytes)}.",
        f"- Layout: {facts.form.layout}, converted by redrafter-mlx from {facts.source_layout} "
        f"(`{Path(facts.source).name if Path(facts.source).exists() else facts.source}`).",
        f"- Settings: {facts.settings}.",
        *(f"- {note[0].upper()}{note[1:]}." for note in facts.notes),
        "",
        "| source file | SHA-256 |",
        "|---|---|",
        *(f"| `{name}` | `{digest}` |" for name, digest in facts.hashes.items()),
    ]
    if facts.form.loaded:
        model = facts.base or facts.target or "TARGET"
        lines += ["", "```shell", f"python -m redrafter_mlx.generate --model {model} "
                  '--drafter . --prompt "Why is the sky blue?"', "```"]  # fmt: skip
    return "\n".join(lines) + "\n"


def _front_matter(facts: Facts) -> list[str]:
    tags = ["mlx"] * facts.form.loaded + list(facts.words.tags)
    base = [f"base_model: {facts.base}"] if facts.base else []
    library = "mlx" if facts.form.loaded else "pytorch"
    return [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        *base,
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
