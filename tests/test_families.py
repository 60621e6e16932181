"""Which of mlx-lm's model types can verify a tree: each is tried, none is assumed.

`python tests/test_families.py` writes the outcome into docs/models.md, and a test checks that.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from families import build, names
from redrafter_mlx.errors import UserError
from redrafter_mlx.target.adapter import Target
from redrafter_mlx.target.probe import differences
from support import ScriptedDrafter, generation, ids, tiny_prompt

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
WINDOW = 8  # of the sliding layers; contexts here are longer
TOKENS = 16

REFUSED = {
    "deepseek_v41": "LayerCache",
    "minimax_m3_vl": "differ",
    "phi3small": "not finite",
    "plamo3": "chunk sees further",
}
"""Entries that must be refused, and a word that their reason has to contain."""


@cache
def refusal(name: str) -> str | None:
    """Why a tree is refused on this entry; None if it is verified, beyond its window too."""
    try:
        target = Target(build(name))
    except UserError as error:
        return str(error)
    difference, _ = differences(target, prefix=3 * WINDOW)
    assert difference < 1e-3, f"{name} is silently wrong beyond {WINDOW} tokens: {difference}"
    return None


@pytest.mark.parametrize("name", names())
def test_every_model_type_is_verified_or_refused(name):
    reason = refusal(name)
    if name in REFUSED:
        assert reason is not None
        assert REFUSED[name] in reason
        assert "--no-draft" in reason
    else:
        assert reason is None


@pytest.mark.parametrize("name", sorted(set(names()) - REFUSED.keys()))
def test_trees_leave_the_text_as_mlx_lm_generates_it(name):
    model, prompt = build(name), tiny_prompt(2 * WINDOW)
    plain = ids(generation(model, prompt, max_tokens=TOKENS))
    drafter = ScriptedDrafter(prompt + plain, right=3, wrong=1, decoys=True)
    run = generation(model, prompt, drafter, max_tokens=TOKENS)
    assert ids(run) == plain
    assert run.stats.rounds == TOKENS // 4
    theirs = generate_step(mx.array(prompt), build(name), max_tokens=TOKENS)
    assert plain == [token for token, _ in theirs]


def support_table() -> str:
    """Markdown: every model type of mlx-lm with whether its trees are verified, and if not why."""
    verified, refused = [], {}
    for name in names():
        if reason := refusal(name):
            reason = reason.split("cannot verify a tree: ")[-1].split("cannot be a target: ")[-1]
            reason = re.sub(r"^a tree made it fail: .*?; (?=layers)", "", reason)
            reason = reason.removeprefix("a tree made it fail: ValueError: ")
            reason = re.sub(r" by [\d.]+ deviations.*", "", reason.split("; generate with")[0])
            refused.setdefault(re.sub(r"layer \d+ keeps", "a layer keeps", reason), []).append(name)
        else:
            verified.append(name)
    types = {name.split(":")[0] for name in verified}
    lines = [f"**{len(types)} model types verify trees**: " + ", ".join(sorted(types)) + ".", ""]
    lines += ["| refused at load | because |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(refused.items())]
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def test_the_page_shows_the_outcome():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page, support_table()), "run python tests/test_families.py"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), support_table()), "utf-8")
    print(f"wrote the table into {PAGE}", file=sys.stderr)
