"""Tokens per round over beams, lengths and budgets: what each shape of tree yields.

    python -m benchmarks.acceptance --prompts question.jsonl --temps 0 1 --output result.json

The drafter is asked at every position of texts that plain decoding writes, with the widest search;
from this one can read off what narrower and shorter searches, chains, beams alone and the N
likeliest nodes would have yielded. The picture is a heat map of tokens per round by beam width and
length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from redrafter_mlx.config import SamplingOptions
from redrafter_mlx.measuring.acceptance import Draft, Recording, record, rounds_of, tokens_per_round
from redrafter_mlx.measuring.picture import new_figure
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.target.adapter import adapt

from . import prompts as prompt_files
from .machine import Bench, add_prompts, document, machine, parser, publish
from .tables import acceptance_tables

MOST = 64


def beams_only(draft: Draft, setting: Setting) -> np.ndarray:
    """(M,) bool: the candidates on the `setting.width` best beams of `setting.length` tokens."""
    c = draft.candidates
    ends = np.flatnonzero(c.within(setting.width) & (c.depths == setting.length - 1))
    nodes = ends[np.argsort(-c.logprobs[ends], kind="stable")[: setting.width]]
    kept = np.zeros(len(c.tokens), bool)
    while len(nodes):
        kept[nodes] = True
        nodes = np.unique(c.parents[nodes])
        nodes = nodes[nodes >= 0]
    return kept


def of_beams(recordings: Sequence[Recording], setting: Setting) -> dict[str, float]:
    """Tokens per round, and rows, of the paper's tree: all beams with shared prefixes."""
    tokens = rounds = 0
    rows = []
    for recording in recordings:
        accepted = np.zeros((len(recording.drafts), 1), int)
        for draft, count in zip(recording.drafts, accepted, strict=True):
            kept = beams_only(draft, setting)
            rows.append(1 + int(kept.sum()))
            count[0] = np.cumprod(kept[draft.path]).sum()
        tokens += len(accepted)
        rounds += int(rounds_of(accepted)[0])
    return {
        "tokens_per_round": tokens / rounds,
        "rows": float(np.mean(rows)),
        "rows_unshared": 1 + setting.width * (setting.length - 1),
    }


def grid(full: Setting) -> list[Setting]:
    """The beams of the heat map."""
    widths = [w for w in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if w <= full.width]
    return [Setting(w, length) for w in widths for length in range(2, full.length + 1)]


def yields(recordings: Sequence[Recording], full: Setting) -> dict:
    """Tokens per round of every shape of tree."""
    by_budget = lambda setting, most: {
        str(n): float(x)
        for n, x in enumerate(tokens_per_round(recordings, setting, most))
        if n >= 2
    }
    return {
        "tokens": sum(len(recording.drafts) for recording in recordings),
        "chain": by_budget(Setting(1, full.length), full.length),
        "best": by_budget(full, MOST),
        "beams": {f"{s.width}x{s.length}": of_beams(recordings, s) for s in grid(full)},
    }


def measure(flags: argparse.Namespace) -> dict:
    where = machine()
    chosen = prompt_files.read(flags.prompts, flags.per_category)
    bench = Bench(flags.model, [flags.drafter])
    target, drafter = adapt(bench.model), bench.drafters[flags.drafter]
    ends = bench.tokenizer.eos_token_ids
    full = Setting(flags.beam_width, flags.beam_length)
    temps = {}
    for temp in flags.temps:
        recordings: dict[str, list[Recording]] = {}
        for i, prompt in enumerate(chosen):
            print(f"temperature {temp:g}: {i + 1}/{len(chosen)} {prompt.id}", file=sys.stderr)
            ids, sampling = bench.encode(prompt.text), SamplingOptions(temp=temp, seed=0)
            found = record(target, drafter, ids, flags.max_tokens, full, sampling, ends)
            recordings.setdefault(prompt.category, []).append(found)
        everything = [r for group in recordings.values() for r in group]
        temps[f"{temp:g}"] = {
            "all": yields(everything, full),
            **{category: yields(group, full) for category, group in recordings.items()},
        }
    shown = [f"{w}x{full.length}" for w in (2, 4, 8, 16) if w <= full.width]
    return document("acceptance", flags, where, shown=shown, temps=temps)


def draw(result: dict, path: Path) -> bool:
    """Heat maps of tokens per round by beams and length, one for each temperature."""
    figure = new_figure(5 * len(result["temps"]), 4)
    if figure is None:
        return False
    columns = figure.subplots(1, len(result["temps"]), squeeze=False)[0]
    for (temp, found), axes in zip(result["temps"].items(), columns, strict=True):
        beams = {tuple(map(int, k.split("x"))): v for k, v in found["all"]["beams"].items()}
        widths, lengths = (sorted(set(axis)) for axis in zip(*beams, strict=True))
        values = [[beams[w, n]["tokens_per_round"] for n in lengths] for w in widths]
        image = axes.imshow(values, origin="lower", aspect="auto")
        for i, row in enumerate(values):
            for k, value in enumerate(row):
                axes.text(k, i, f"{value:.2f}", ha="center", va="center", fontsize="small")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(widths)), widths)
        axes.set_xlabel("beam length")
        axes.set_ylabel("beam width")
        axes.set_title(f"tokens per round, temperature {temp}")
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
    return True


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    add_prompts(made)
    made.add_argument("--drafter", default="demo", help="as --drafter of generate")
    made.add_argument("--temps", type=float, nargs="+", default=[0.0], help="as --temp of generate")
    made.add_argument("--beam-width", type=int, default=8, help="of the widest search")
    made.add_argument("--beam-length", type=int, default=6, help="of the longest search")
    flags = made.parse_args(args)
    publish(measure(flags), flags.output, acceptance_tables, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
