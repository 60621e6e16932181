"""How often a head's drafts are accepted: writes the experience.json that comes with a head.

    python -m benchmarks.experience --output redrafter_mlx/demo_drafter/experience.json

Training writes this file for its own heads, at temperature 0. This command is for heads that were
trained elsewhere or earlier, and for more temperatures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from redrafter_mlx.config import DraftOptions, SamplingOptions
from redrafter_mlx.machine.storage import write_whole
from redrafter_mlx.measuring.acceptance import experience_from, record
from redrafter_mlx.pricing import experience
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.target.adapter import adapt

from . import prompts as prompt_files
from .machine import Bench, add_prompts, parser

PROMPTS = Path(__file__).parent / "experience.jsonl"
"""Of the same kinds as prompts.jsonl, but none of those: nothing measured may be known before."""


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    add_prompts(made)
    made.add_argument("--drafter", default="demo", help="the head: as --drafter of generate")
    made.add_argument("--temps", type=float, nargs="+", default=[0.0, 1.0], help="temperatures")
    made.set_defaults(prompts=PROMPTS, per_category=99, max_tokens=64)
    flags = made.parse_args(args)
    bench = Bench(flags.model, [flags.drafter])
    full = Setting(DraftOptions.beam_width, DraftOptions.beam_length)
    chosen = prompt_files.read(flags.prompts, flags.per_category)
    found = {}
    target, ends = adapt(bench.model), bench.tokenizer.eos_token_ids
    drafter = bench.drafters[flags.drafter]
    for temp in flags.temps:
        drafts = []
        for seed, prompt in enumerate(chosen):
            print(f"temperature {temp:g}: {prompt.id}", file=sys.stderr)
            sampling = SamplingOptions(temp=temp, seed=seed if temp else None)
            ids = bench.encode(prompt.text)
            drafts += record(target, drafter, ids, flags.max_tokens, full, sampling, ends).drafts
        found[temp] = experience_from(drafts, full)
    text = experience.as_text(found)
    if flags.output:
        write_whole(flags.output, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
