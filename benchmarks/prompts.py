"""Prompts to measure with: a JSONL file in Spec-Bench's form, or this project's own few."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

OWN = Path(__file__).parent / "prompts.jsonl"
MORE = Path(__file__).parent / "more_prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """One message to answer."""

    id: str
    category: str
    text: str


def read(path: Path, per_category: int) -> list[Prompt]:
    """Prompts spread evenly over each category of the file; only the first turn of each is used.

    path  JSONL with `category` and `turns` (github.com/hemingkx/Spec-Bench: question.jsonl), and
          an id as `id` or `question_id`

    Exits with one line when there are none.
    """
    categories = defaultdict(list)
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            entry = json.loads(line)
            name = str(entry.get("id", entry.get("question_id", number)))
            prompt = Prompt(name, entry["category"], entry["turns"][0])
            categories[prompt.category].append(prompt)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(
            f"--prompts {path}: {reason}; it must hold lines such as "
            '{"id": "1", "category": "qa", "turns": ["Why?"]}'
        ) from error
    if not categories:
        raise SystemExit(f"--prompts {path} holds no prompts")
    chosen = []
    for prompts in categories.values():
        step = max(1, len(prompts) // per_category)
        chosen += prompts[::step][:per_category]
    return chosen
