"""Train a draft head for a model, on this machine: python -m redrafter_mlx.train --model ... .

The model writes its own training data, or answers the prompts of --data; a small recurrent head
learns to guess what it says. Stop it with Ctrl-C whenever you like and go on with --resume.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from redrafter_mlx import cli
from redrafter_mlx.config import (
    DataOptions,
    HeadOptions,
    TrainingOptions,
    add_flags,
    from_flags,
)
from redrafter_mlx.errors import UserError

if TYPE_CHECKING:  # mlx takes a second to import: wrong flags are told before that
    from redrafter_mlx.training.loop import Progress
    from redrafter_mlx.training.run import Report, TrainingRun

DATA_SHARE = 0.4
"""Of --minutes, what may be spent on data."""


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.train",
        description="Train a draft head for a model, on this machine, from what it says itself.",
        epilog="Ctrl-C stops with everything saved; --resume goes on from there.",
    )
    flag = parser.add_argument
    flag("--model", default="demo", help="demo, a model directory, .gguf file or Hugging Face repo")
    flag("--revision", help="branch, tag or commit of the model's Hugging Face repo")
    flag("--adapter-path", help="a LoRA adapter for the target")
    flag("--trust-remote-code", action="store_true", help="let the tokenizer run its own code")
    flag("--output", required=True, type=Path, metavar="DIR", help="where the drafter is to lie")
    flag(
        "--minutes",
        type=float,
        metavar="N",
        help=f"time for everything: {DATA_SHARE:.0%} of it for data, the rest for training "
        "(default: until the data is there and has been gone through ten times)".replace("%", "%%"),
    )
    flag("--resume", action="store_true", help="go on with what is in --output")
    flag("--evaluate", action="store_true", help="only measure the drafter in --output")
    flag("--dry-run", action="store_true", help="only say what it will take: memory, disk, time")
    flag("--dtype", default="float16", choices=["float16", "bfloat16", "float32"],
         help="of the weights that are written (default: float16)")  # fmt: skip
    add_flags(parser, DataOptions, HeadOptions, TrainingOptions)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = make_parser()
    parser.set_defaults(command=args)
    return cli.run(_main, parser, args)


def _main(flags: Namespace) -> int:
    if flags.minutes is not None and not flags.minutes > 0:
        raise UserError(f"--minutes {flags.minutes} must be above 0")
    options = [from_flags(group, flags) for group in (DataOptions, HeadOptions, TrainingOptions)]
    _check_output(flags)
    from redrafter_mlx import hub
    from redrafter_mlx.storage import in_use
    from redrafter_mlx.target.adapter import adapt
    from redrafter_mlx.training.run import head_config

    model, tokenizer = hub.load(
        flags.model,
        revision=flags.revision,
        adapter_path=flags.adapter_path,
        tokenizer_config={"trust_remote_code": flags.trust_remote_code},
    )[:2]
    target = adapt(model)
    if options[1].fused_layers:
        target.tap(options[1].fused_layers)
    head_config(target, options[1], options[1].draft_vocab)  # refuses what cannot be, before hours
    if flags.dry_run:
        return _foretell(target, options)
    if flags.evaluate:
        return _evaluate(flags, model)
    with in_use(flags.output / "training"):
        return _train(flags, target, tokenizer, options)


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


def _train(flags: Namespace, target, tokenizer, options) -> int:
    from redrafter_mlx.training.run import Places, TrainingRun

    data_options, head_options, training_options = options
    began = time.monotonic()
    _write_data(flags, target, tokenizer, data_options)
    minutes = None
    if flags.minutes is not None:
        spent = (time.monotonic() - began) / 60
        minutes = max(flags.minutes - spent, (1 - DATA_SHARE) * flags.minutes)
    run = TrainingRun(
        target, Places(flags.output), head_options, training_options, data_options.seed, minutes
    )
    _introduce(run)
    with _interrupts() as interrupted:
        whole = run.run(_tell, interrupted)
    run.save(flags.dtype)
    if not whole:
        _say(
            f"stopped after step {run.progress.step:,} of {run.progress.steps:,}; the drafter so "
            f"far is in {flags.output}; go on with --resume"
        )
        return cli.INTERRUPTED
    return _finish(flags, run)


def _write_data(flags: Namespace, target, tokenizer, options: DataOptions) -> None:
    from redrafter_mlx.training.data import write_data
    from redrafter_mlx.training.run import Places

    if flags.minutes is not None and options.data_minutes is None:
        options = replace(options, data_minutes=DATA_SHARE * flags.minutes)
    bar = tqdm(total=options.data_tokens, unit=" tokens", desc="writing data", disable=None)

    def tell(progress: Progress) -> None:
        bar.n = progress.counts.tokens
        bar.set_postfix_str(f"batch {progress.batches + 1}: {progress.share:.0%}", refresh=True)

    try:
        written = write_data(target, tokenizer, Places(flags.output).data, options, tell)
    finally:
        bar.close()
    counts, left_out = written.counts, written.left_out
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


def _introduce(run: TrainingRun) -> None:
    config, vocabulary, progress = run.config, run.vocabulary, run.progress
    output = "rows of the target's own head" if config.tied_output else "rows of its own"
    _say(
        f"head: {run.parameters / 1e6:.2f} M parameters; output: {output}\n"
        f"draft vocabulary: {len(vocabulary.ids):,} of {config.vocab_size:,} ids hold "
        f"{vocabulary.coverage:.1%} of the held-out answers"
        + (f", with the ids of the prompt {vocabulary.with_prompt:.1%}" * config.tied_output)
        + f"\ntraining: {progress.steps:,} steps of {run.positions_per_step:,} positions, "
        f"{run.positions_per_step * progress.steps / run.shards.tokens:.1f} passes over "
        f"{run.shards.tokens:,} tokens" + (f", from step {progress.step:,}" * bool(progress.step))
    )


def _tell(progress: Progress, entry: dict) -> None:
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
    if left == left:
        parts.append(f"{left / 60:.1f} minutes left")
    _say(", ".join(parts))


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the step under way is finished first. Twice stops at once."""
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


def _foretell(target, options) -> int:
    from redrafter_mlx.training.estimate import estimate
    from redrafter_mlx.training.run import head_config, training_bytes

    data, head, training = options
    expected = estimate(target, data)
    config = head_config(target, head, head.draft_vocab)
    print(
        f"data: {expected.batches} batches of {expected.rows} x {expected.columns} tokens, about "
        f"{expected.tokens_per_second:.0f} tokens of answers per second: "
        f"{expected.seconds / 60:.0f} minutes, {expected.disk / 1e9:.2f} GB on disk, "
        f"{expected.memory / 1e9:.2f} GB of memory\n"
        f"training: {training_bytes(target, config, training) / 1e9:.2f} GB of memory; its time is "
        "measured and told when the data is there"
    )
    return 0


def _evaluate(flags: Namespace, model) -> int:
    from redrafter_mlx import hub
    from redrafter_mlx.training.run import ALL_TOKENS, Places, held_out_answers, report

    drafter = hub.load_drafter(str(flags.output), model)
    answers = held_out_answers(Places(flags.output).data)
    print(table(report(drafter, answers, ALL_TOKENS)))
    return 0


def _finish(flags: Namespace, run: TrainingRun) -> int:
    from redrafter_mlx.training.card import card
    from redrafter_mlx.training.picture import draw
    from redrafter_mlx.training.run import ALL_TOKENS, report

    found = report(run.drafter, run.answers, ALL_TOKENS)
    shown = table(found)
    words = sys.argv[1:] if flags.command is None else flags.command
    command = shlex.join(["python", "-m", "redrafter_mlx.train", *words])
    drawn = draw(run.log, flags.output / "training.png", f"drafter for {flags.model}")
    (flags.output / "README.md").write_text(
        card(run, flags.model, command, shown, drawn), encoding="utf-8"
    )
    print(shown)
    use = ["redrafter_mlx.generate", "--model", flags.model, "--drafter", str(flags.output)]
    _say(f"the drafter is in {flags.output}; use it with {shlex.join(use)} --prompt ...")
    return 0


def table(found: Report) -> str:
    """The report as Markdown."""
    from redrafter_mlx.training.replay import RECALL

    lines = [
        f"On {found.tokens:,} held-out tokens of greedy answers:",
        "",
        "| depth | " + " | ".join(f"top-{k}" for k in RECALL) + " |",
        "|---" * (len(RECALL) + 1) + "|",
    ]
    for depth, row in enumerate(found.recall, start=1):
        lines.append(f"| {depth} | " + " | ".join(f"{share:.1%}" for share in row) + " |")
    budgets = list(next(iter(found.tokens_per_round.values()), {}))
    lines += [
        "",
        "Tokens per round by beams (width x length) and budget:",
        "",
        "| beams | " + " | ".join(str(budget) for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for (width, length), rates in found.tokens_per_round.items():
        rates = " | ".join(f"{rates[budget]:.2f}" for budget in budgets)
        lines.append(f"| {width} x {length} | {rates} |")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
