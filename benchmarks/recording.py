"""An animated SVG of the same answer with and without drafts, at the speed of each.

python -m benchmarks.recording --prompt "Why is the sky blue?" --output docs/same-answer.svg

Both run in one process, in turn, `--repeats` times; the picture shows the run with the median time
of each. It is animated in every browser, and shows both whole texts where animation is off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from redrafter_mlx import stream_generate
from redrafter_mlx.machine.storage import write_whole

from .machine import Bench, machine, parser

COLUMNS, CHARACTER, LINE = 54, 7.83, 20.0
"""Characters per line, and a character's width and line height in pixels, at 13 pixels."""
MARGIN, HEAD, FOOT, GAP = 16, 44, 40, 20
PAUSE = 2.5
"""Seconds between the end and the next start."""


@dataclass(frozen=True)
class Word:
    """A token's text, when it came, and whether it had been drafted."""

    seconds: float
    text: str
    drafted: bool


@dataclass(frozen=True)
class Take:
    """One answer as it came. `told` is the caption below it."""

    title: str
    words: Sequence[Word]
    told: str

    @property
    def seconds(self) -> float:
        return self.words[-1].seconds


def record(bench: Bench, prompt: Sequence[int], drafter, title: str, tokens: int) -> Take:
    """Generate, and note when each token came, counted from the first."""
    words, began = [], None
    events = stream_generate(
        bench.model, bench.tokenizer, prompt, drafter=drafter, max_tokens=tokens
    )
    for event in events:
        now = time.perf_counter()
        began = now if began is None else began
        words.append(Word(now - began, event.text, event.from_draft))
    stats = event.stats
    told = f"{stats.generation_tps:.1f} tokens/s, {stats.tokens_per_round:.2f} tokens a round"
    return Take(title, words, told)


def placed(words: Sequence[Word]) -> Iterator[tuple[Word, str, int, int]]:
    """(word, text, line, column) of each piece, with lines broken where words end."""
    line = column = 0
    for index, word in enumerate(words):
        ahead = word.text
        for later in words[index + 1 :]:  # the rest of a word of several tokens
            if later.text[:1].isspace():
                break
            ahead += later.text
        if column and column + len(ahead.split("\n")[0].rstrip()) > COLUMNS:
            line, column = line + 1, 0
        for number, part in enumerate(word.text.split("\n")):
            if number:
                line, column = line + 1, 0
            part = part.lstrip() if column == 0 else part
            for start in range(0, len(part), COLUMNS):
                piece = part[start : start + COLUMNS]
                yield word, piece, line, column
                column += len(piece)


def svg(takes: Sequence[Take], note: str) -> str:
    """The picture: takes side by side that start together, and again after the last one ends."""
    whole = max(take.seconds for take in takes) + PAUSE
    pieces = [list(placed(take.words)) for take in takes]
    lines = 1 + max(line for piece in pieces for _, _, line, _ in piece)
    width = 2 * MARGIN + COLUMNS * CHARACTER
    height = HEAD + lines * LINE + FOOT
    total = len(takes) * width + (len(takes) - 1) * GAP
    parts = [_STYLE]
    for number, (take, piece) in enumerate(zip(takes, pieces, strict=True)):
        left = number * (width + GAP)
        parts.append(f'<g transform="translate({left:.0f} 0)">')
        parts.append(f'<rect class="panel" width="{width:.0f}" height="{height:.0f}" rx="10"/>')
        parts.append(f'<text class="title" x="{MARGIN}" y="28">{escape(take.title)}</text>')
        for word, text, line, column in piece:
            x, y = MARGIN + column * CHARACTER, HEAD + (line + 0.7) * LINE
            parts.append(_piece(word, text, x, y, whole))
        parts.append(
            f'<text class="told" x="{MARGIN}" y="{height - 16:.0f}">{escape(take.told)}'
            f"{_appearing(take.seconds, whole)}</text></g>"
        )
    about = escape(note)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:.0f} {height + 26:.0f}" '
        f'role="img" aria-label="{about}">{"".join(parts)}'
        f'<text class="note" x="{MARGIN}" y="{height + 18:.0f}">{about}</text></svg>\n'
    )


_STYLE = """<style>
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre }
.panel { fill: #16181d } .title { fill: #9aa3b2; font-weight: 600 } .told { fill: #9aa3b2 }
.own { fill: #e6e9ef } .drafted { fill: #8ee6a8 } .mark { fill: #1f3a2a }
.note { fill: #808895; font-size: 10.5px }
</style>
"""


def _piece(word: Word, text: str, x: float, y: float, whole: float) -> str:
    appearing = _appearing(word.seconds, whole)
    size = len(text) * CHARACTER
    mark = ""
    if word.drafted and text.strip():
        mark = (
            f'<rect class="mark" x="{x:.1f}" y="{y - 14:.1f}" width="{size:.1f}" height="18">'
            f"{appearing}</rect>"
        )
    kind = "drafted" if word.drafted else "own"
    return (
        f'{mark}<text class="{kind}" x="{x:.1f}" y="{y:.1f}" textLength="{size:.1f}">'
        f"{escape(text)}{appearing}</text>"
        if text.strip()
        else mark
    )


def _appearing(seconds: float, whole: float) -> str:
    at = min(seconds / whole, 0.999)
    return (
        f'<animate attributeName="opacity" values="0;1;1" keyTimes="0;{at:.4f};1" '
        f'dur="{whole:.2f}s" calcMode="discrete" repeatCount="indefinite"/>'
    )


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    made.add_argument("--prompt", default="Why is the sky blue?", help="the message")
    made.add_argument("--max-tokens", type=int, default=120)
    made.add_argument("--repeats", type=int, default=3)
    flags = made.parse_args(args)
    bench = Bench(flags.model, ["auto"])
    prompt = bench.encode(flags.prompt)
    ways = {"without drafts": None, "with redrafter-mlx": bench.drafters["auto"]}
    found: dict[str, list[Take]] = {title: [] for title in ways}
    for _ in range(flags.repeats + 1):
        for title, drafter in ways.items():
            found[title].append(record(bench, prompt, drafter, title, flags.max_tokens))
    middle = lambda each: sorted(each[1:], key=lambda take: take.seconds)[flags.repeats // 2]
    takes = [middle(each) for each in found.values()]
    texts = {"".join(word.text for word in take.words) for take in takes}
    if len(texts) > 1:
        sys.exit("the two texts differ: no picture of the same answer can be made")
    where = machine()
    note = (
        f"The same answer of {flags.model}, as it came; shaded: drafted and accepted. "
        f"{where['chip']}, middle of {flags.repeats} runs, {where['date']}"
    )
    write_whole(Path(flags.output or "same-answer.svg"), svg(takes, note))
    for take in takes:
        print(f"{take.title}: {take.told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
