"""What does speculation give on this machine? python -m redrafter_mlx.tune --model M --drafter D

Measures what passes and drafts cost and how many drafted tokens are accepted, says which budget
pays, and keeps the profile in the user's cache, where --budget auto finds it.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from redrafter_mlx import cli
from redrafter_mlx.config import AUTO, DraftOptions, TuneOptions, add_flags, from_flags
from redrafter_mlx.errors import UserError
from redrafter_mlx.model_flags import add_target_flags, encode_message, loading

if TYPE_CHECKING:  # mlx takes a second to import: wrong flags are told before that
    from redrafter_mlx.measuring.tuning import Tuning

NONE = "none"
_log = logging.getLogger("redrafter_mlx")

PROMPTS = (
    "Explain to a curious child why the sea is salty.",
    "Write a Python function that returns the n-th prime number, with a short docstring.",
    "Repeat this list in alphabetical order: pear, apple, fig, cherry, lemon, banana.",
    "A train leaves at 9:40 and travels 150 km at 60 km/h. When does it arrive, and why?",
)
"""What is answered when no --prompts are given: talk, code, copying, reasoning."""


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.tune",
        description="Measure what speculation costs and gives on this machine.",
    )
    flag = parser.add_argument
    add_target_flags(parser)
    flag(
        "--drafter",
        default=AUTO,
        help="any that generate takes, or none: measure passes only (default: auto)",
    )
    flag("--picture", type=Path, metavar="PNG", help="where to draw what was measured")
    flag("--json", action="store_true", help="print the profile as one JSON object")
    add_flags(parser, TuneOptions, DraftOptions)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    return cli.run(_main, make_parser(), args)


def _main(flags: Namespace) -> int:
    options, draft = from_flags(TuneOptions, flags), from_flags(DraftOptions, flags)
    if draft.budget != AUTO:
        raise UserError(f"--budget {draft.budget}: finding the budget is what this command does")
    prompts = read_prompts(options.prompts) if options.prompts else PROMPTS
    if flags.picture and not flags.picture.parent.is_dir():
        raise UserError(f"--picture {flags.picture}: no such directory {flags.picture.parent}")

    from redrafter_mlx.loading import drafters, hub
    from redrafter_mlx.measuring.picture import draw
    from redrafter_mlx.measuring.profile import save
    from redrafter_mlx.measuring.tuning import tune
    from redrafter_mlx.target.adapter import adapt

    model, tokenizer = hub.load(flags.model, **loading(flags))
    name = flags.drafter
    drafter = None if name == NONE else drafters.load_drafter(name, model, tokenizer=tokenizer)
    ids = [encode_message(tokenizer, prompt) for prompt in prompts]
    progress, ends = partial(_log.info, "%s"), tokenizer.eos_token_ids
    found = tune(adapt(model), drafter, ids, options, draft, ends, progress)
    if flags.json:
        print(json.dumps(found.profile.as_dict(), ensure_ascii=False))
    else:
        print(report(found))
    try:
        _log.info("kept as %s", save(found.profile))
    except OSError as error:
        _log.warning(
            "the profile cannot be kept: %s; set REDRAFTER_MLX_CACHE to a writable directory", error
        )
    if flags.picture:
        title = f"{flags.model} with drafter {name}"
        try:
            draw(found.profile.curve, found.speedups, flags.picture, title)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {flags.picture} cannot be written: {error}") from error
    return 0


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line; UserError when there are none."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}; give a text file") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompts; write one on each line")
    return prompts


def report(found: Tuning) -> str:
    """The measurement in words and a table."""
    curve = found.profile.curve
    lines = ["milliseconds of a pass, by its rows and the tokens before it:", ""]
    lines.append("rows " + "".join(f"{context:>9}" for context in curve.contexts))
    for k, rows in enumerate(curve.rows):
        cells = "".join(f"{1e3 * seconds[k]:9.2f}" for seconds in curve.seconds)
        lines.append(f"{rows:4} {cells}")
    if found.profile.drafts:
        lines += ["", "milliseconds of a draft, by beams and their tokens:", ""]
        lines += [
            f"{width:4} x {length}: {1e3 * seconds:7.2f}"
            for (width, length), seconds in sorted(found.profile.drafts.items())
        ]
    lines += ["", *found.complaints, *found.verdicts]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
