"""Train a draft head for a model, on this machine: python -m redrafter_mlx.train --model ... .

The model writes its own training data, or answers the prompts of --data; a small recurrent head
learns to predict what the model says. Stop it with Ctrl-C at any time and go on with --resume.
"""

from __future__ import annotations

import functools
import math
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from redrafter_mlx import cli
from redrafter_mlx.config import add_flags, flag_name, from_flags
from redrafter_mlx.errors import UserError
from redrafter_mlx.model_flags import add_target_flags, loading
from redrafter_mlx.training.deadline import NEVER, SHARES, Budget, Deadline
from redrafter_mlx.training.options import DataOptions, HeadOptions, TrainingOptions

if TYPE_CHECKING:  # mlx takes a second to import: wrong flags are told before that
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from redrafter_mlx.target.adapter import Target
    from redrafter_mlx.training.data import Progress, Written
    from redrafter_mlx.training.loop import Progress as TrainingProgress
    from redrafter_mlx.training.recipes.recipe import Recipe
    from redrafter_mlx.training.run import TrainingRun

TELL_SECONDS = 0.2
"""Time between two reports of a job that writes data."""


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.train",
        description="Train a draft head for a model, on this machine, from what it says itself.",
        epilog="Ctrl-C stops with everything saved; --resume goes on from there.",
    )
    flag = parser.add_argument
    add_target_flags(parser)
    flag("--output", required=True, type=Path, metavar="DIR", help="directory of the drafter")
    flag(
        "--minutes",
        type=float,
        metavar="N",
        help="time for everything, starting now: "
        + ", ".join(f"{share:.0%} for {stage}" for stage, share in SHARES.items()).replace(
            "%", "%%"
        )
        + " (default: until the data is written and has been read ten times)",
    )
    flag(
        "--start-from",
        metavar="DRAFTER",
        help="train this recurrent head further, in its shape, instead of a new one: demo, a "
        "directory or Hugging Face repo",
    )
    flag(
        "--keep",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="the saved weights are a mean of those that training began with (this share) and the "
        "trained ones, which does better on other texts; of a new head only those of its lookback "
        "(default: 0.5)",
    )
    flag("--resume", action="store_true", help="go on with what is in --output")
    flag("--evaluate", action="store_true", help="only measure the drafter in --output")
    flag("--dry-run", action="store_true", help="only say what it will take: memory, disk, time")
    flag("--dtype", default="float16", choices=["float16", "bfloat16", "float32"],
         help="of the saved weights (default: float16)")  # fmt: skip
    add_flags(parser, DataOptions, HeadOptions, TrainingOptions)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = make_parser()
    parser.set_defaults(command=args)
    return cli.run(_main, parser, args)


def _main(flags: Namespace) -> int:
    budget = Budget(flags.minutes)
    if flags.minutes is not None and not flags.minutes > 0:
        raise UserError(f"--minutes {flags.minutes} must be above 0")
    if not 0 <= flags.keep <= 1:
        raise UserError(f"--keep {flags.keep} is outside its range: 0 to 1")
    options = [from_flags(group, flags) for group in (DataOptions, HeadOptions, TrainingOptions)]
    _check_output(flags)
    from redrafter_mlx.loading import drafters
    from redrafter_mlx.machine.storage import in_use
    from redrafter_mlx.training.recipes import recipe_for
    from redrafter_mlx.training.start import shape_of

    if flags.start_from and options[1].head != "recurrent":
        raise UserError(f"--start-from is for --head recurrent, not {options[1].head}")
    if flags.start_from:
        options[1] = shape_of(flags.start_from, options[1])
    source = Source(
        flags.model,
        flags.revision,
        flags.adapter_path,
        flags.trust_remote_code,
        options[1],
    )
    target = source.target()
    if flags.start_from:
        drafters.load_head_of(target, flags.start_from)
    recipe = recipe_for(target, options[1])
    _refuse_unused(options[1], recipe)
    recipe.config(options[1].draft_vocab, options[2].ahead)  # refuses bad shapes, before hours
    budget.note("loading")
    if flags.dry_run:
        from redrafter_mlx.training.forecast import forecast

        print(forecast(source, options, flags.start_from, budget))
        return 0
    if flags.evaluate:
        return _evaluate(flags, target.model)
    with in_use(flags.output / "training"):
        return _train(flags, source, options, budget)


def _refuse_unused(options: HeadOptions, recipe: Recipe) -> None:
    """UserError for an option of another kind of head."""
    for f in fields(HeadOptions):
        if f.name not in ("head", *recipe.takes) and getattr(options, f.name) != f.default:
            raise UserError(f"{flag_name(f)} has no use for --head {recipe.name}: leave it out")


def _check_output(flags: Namespace) -> None:
    begun = (flags.output / "training").is_dir()
    if flags.evaluate:
        if not begun:
            raise UserError(f"--evaluate: {flags.output} holds no training run")
    elif flags.resume and not begun:
        raise UserError(f"--resume: {flags.output} holds no training run; leave --resume out")
    elif not flags.resume and flags.output.exists() and any(flags.output.iterdir()):
        way_out = "give --resume to go on with it, or" if begun else "give"
        raise UserError(f"--output {flags.output} is not empty; {way_out} another directory")


@dataclass(frozen=True)
class Source:
    """Where the target comes from; what `head` and `layers` read of it is kept as data."""

    name: str
    revision: str | None
    adapter_path: str | None
    trust_remote_code: bool
    head: HeadOptions
    layers: tuple[int, ...] = ()

    def load(self) -> tuple[Target, TokenizerWrapper]:
        """The target and its tokenizer, loaded once in each process."""
        return _loaded(self)

    def target(self) -> Target:
        """The target alone."""
        return self.load()[0]


@functools.cache
def _loaded(source: Source) -> tuple[Target, TokenizerWrapper]:
    from redrafter_mlx.loading import hub
    from redrafter_mlx.target.adapter import adapt
    from redrafter_mlx.training.recipes import RECIPES

    model, tokenizer = hub.load(source.name, **loading(source))
    target = adapt(model)
    layers = RECIPES[source.head.head].reads(len(model.layers), source.head)
    target.tap((*source.layers, *layers))
    return target, tokenizer


def _train(flags: Namespace, source: Source, options, budget: Budget) -> int:
    from redrafter_mlx.training.run import Places, TrainingRun

    data_options, head_options, training_options = options
    places = Places(flags.output)
    begun = places.checkpoint.exists()  # it was made with the data that there is
    until = Deadline.after(0) if begun else budget.by("data")
    if begun:
        _say("training has begun: it goes on with the data it began with")
    jobs = write_data_of(flags.output, source, data_options, until)
    budget.note("data")
    with TrainingRun(
        source.target, places, head_options, training_options, data_options.seed,
        budget.end, jobs, flags.start_from, budget.seconds("report"),
    ) as run:  # fmt: skip
        _introduce(run)
        with _interrupts() as interrupted:
            whole = run.run(_tell, interrupted)
    run.blend(flags.keep)
    run.save(flags.dtype)
    budget.note("training")
    if not whole:
        _say(
            f"stopped after step {run.progress.step:,} of {run.progress.steps:,}; the drafter so "
            f"far is in {flags.output}; go on with --resume"
        )
        return cli.INTERRUPTED
    return _finish(flags, run, budget)


def write_data_of(
    output: Path, source: Source, options: DataOptions, until: Deadline = NEVER
) -> int:
    """Write what a head of the target learns from; the number of jobs that wrote it."""
    from redrafter_mlx.training.data import Counts
    from redrafter_mlx.training.estimate import choose_jobs
    from redrafter_mlx.training.jobs import side_by_side
    from redrafter_mlx.training.run import Places
    from redrafter_mlx.training.shards import parts

    directory = Places(output).data
    there = len(parts(directory))
    jobs = options.jobs or there or choose_jobs(source.target(), options)
    if there > jobs:
        raise UserError(f"--jobs {jobs}: {directory} was written by {there} jobs; give that number")
    bar = tqdm(total=options.data_tokens, unit=" tokens", desc="writing data", disable=None)
    standing: dict[int, Progress] = {}

    def tell(job: int, progress: Progress) -> None:
        before = standing.get(job)
        standing[job] = progress
        bar.n = sum(p.counts.tokens for p in standing.values())
        if bar.disable and before and progress.batches > before.batches:  # not a terminal
            _say(f"writing data: {bar.n:,} of {options.data_tokens:,} tokens")
        at = ", ".join(f"{p.batches + 1}: {p.share:.0%}" for _, p in sorted(standing.items()))
        bar.set_postfix_str(f"batch {at}", refresh=True)

    try:
        written = side_by_side(
            jobs, partial(_write_part, source, directory, options, jobs, until), tell
        )
    finally:
        bar.close()
    counts, left_out = sum((part.counts for part in written), Counts()), written[0].left_out
    _say(
        f"data: {counts.tokens:,} tokens of answers in {counts.conversations:,} conversations; "
        f"left out: {counts.near_repeats:,} near repeats, {counts.unanswered:,} without an answer; "
        f"{counts.loops:,} cut where they went round in circles"
    )
    if any(astuple(left_out)):
        _say(
            f"--data: {left_out.bad_lines} broken lines, {left_out.repeated} repeated and "
            f"{left_out.too_long} too long prompts left out; {left_out.systems} system turns for "
            "which the chat template has no place"
        )
    return jobs


def _write_part(
    source: Source,
    directory: Path,
    options: DataOptions,
    jobs: int,
    until: Deadline,
    job: int,
    tell,
) -> Written:
    from redrafter_mlx.training.data import write_data
    from redrafter_mlx.training.shards import part_path

    told = 0.0

    def now_and_then(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            tell(progress)

    part = part_path(directory, job)
    return write_data(*source.load(), part, options, now_and_then, job, jobs, until)


def _introduce(run: TrainingRun) -> None:
    config, vocabulary, progress = run.config, run.vocabulary, run.progress
    output = "rows of the target's own head" if run.recipe.tied else "rows of its own"
    _say(
        f"head: {run.recipe.name}, {run.parameters / 1e6:.2f} M parameters; output: {output}\n"
        f"draft vocabulary: {len(vocabulary.ids):,} of {config.vocab_size:,} ids hold "
        f"{vocabulary.coverage:.1%} of the held-out answers"
        + (f", with the ids of the prompt {vocabulary.with_prompt:.1%}" * run.recipe.tied)
        + f"\ntraining: {progress.steps:,} steps of {run.positions_per_step:,} positions, "
        f"{run.positions_per_step * progress.steps / run.shards.tokens:.1f} passes over "
        f"{run.shards.tokens:,} tokens" + (f", from step {progress.step:,}" * bool(progress.step))
    )


def _tell(progress: TrainingProgress, entry: dict) -> None:
    left = progress.seconds_left
    parts = [f"step {progress.step:,}/{progress.steps:,}"]
    if "loss" in entry:
        parts.append(f"loss {entry['loss']:.3f}")
    if "speed" in entry:
        parts.append(f"{entry['speed']:,.0f} positions/s")
    if "tree" in entry:
        parts.append(
            f"held out: {entry['tree']:.2f} tokens per round (tree), {entry['chain']:.2f} (chain)"
        )
    if not math.isnan(left):
        parts.append(f"{left / 60:.1f} minutes left")
    _say(", ".join(parts))


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the step under way is finished. A second one stops at once."""
    pressed = []

    def note(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        _say("finishing this step (Ctrl-C again: stop at once)")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluate(flags: Namespace, model) -> int:
    from redrafter_mlx.loading import drafters
    from redrafter_mlx.training.report import held_out_answers, report, table, write_experience
    from redrafter_mlx.training.run import Places

    drafter = drafters.load_drafter(str(flags.output), model)
    found = report(drafter, held_out_answers(Places(flags.output).data))
    print(table(found))
    write_experience(flags.output, found)
    return 0


def _finish(flags: Namespace, run: TrainingRun, budget: Budget) -> int:
    from redrafter_mlx.training.card import card
    from redrafter_mlx.training.picture import draw
    from redrafter_mlx.training.report import report, table, write_experience

    # the picture first: the report uses up the time that is left
    drawn = draw(run.log, flags.output / "training.png", f"drafter for {flags.model}")
    found = report(run.drafter, run.answers, budget.end)
    write_experience(flags.output, found)
    run.note(found)
    words = sys.argv[1:] if flags.command is None else flags.command
    command = shlex.join(["python", "-m", "redrafter_mlx.train", *words])
    budget.note("report")
    shown = f"{table(found)}\n\n{budget}"
    (flags.output / "README.md").write_text(
        card(run, flags.model, command, shown, drawn), encoding="utf-8"
    )
    print(shown)
    drafter = f"union:[{flags.output},max_gram]"
    use = ["python", "-m", "redrafter_mlx.generate", "--model", flags.model, "--drafter", drafter]
    _say(f"the drafter is in {flags.output}; use it with {shlex.join(use)} --prompt ...")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
