"""Is it any use here, and is all well? python -m redrafter_mlx.doctor --model M

Says what the machine is, whether the model can be speculated with and how exactly, what passes and
drafts cost, and compares plain decoding with the drafter on three prompts. Exit code 0 if all texts
are the same up to ties, 1 if not.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redrafter_mlx import cli
from redrafter_mlx.config import DraftOptions, add_flags, from_flags
from redrafter_mlx.drafters.spec import AUTO
from redrafter_mlx.errors import UserError
from redrafter_mlx.model_flags import add_target_flags, encode_message, loading

if TYPE_CHECKING:  # mlx takes a second to import: wrong flags are told before that
    from redrafter_mlx.diagnosis import Answer, Check

DIFFERS = 1
"""Exit code when texts differ by more than a tie."""
FORMAT = 1
_log = logging.getLogger("redrafter_mlx")


def make_parser() -> cli.Parser:
    """The command's flags; those of the option groups come from config.py."""
    parser = cli.Parser(
        prog="redrafter_mlx.doctor",
        description="Say what this machine is, and whether speculation is any use on it: "
        "the same words, and faster?",
    )
    flag = parser.add_argument
    add_target_flags(parser)
    flag("--drafter", default=AUTO, help="any that generate takes (default: auto)")
    flag("--tokens", type=int, default=48, help="most tokens of each answer (default: 48)")
    flag(
        "--json", type=Path, metavar="FILE", help="write the report there, to attach it to an issue"
    )
    add_flags(parser, DraftOptions)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    return cli.run(_main, make_parser(), args)


def _main(flags: Namespace) -> int:
    options = from_flags(DraftOptions, flags)
    if flags.tokens < 1:
        raise UserError(f"--tokens {flags.tokens}: give 1 or more")
    if flags.json and not flags.json.parent.is_dir():
        raise UserError(f"--json {flags.json}: no such directory {flags.json.parent}")
    report: dict[str, Any] = {"format": FORMAT}
    try:
        code = _examine(flags, options, report)
    finally:
        if flags.json and "machine" in report:
            _write(flags.json, report)
    return code


def _examine(flags: Namespace, options: DraftOptions, report: dict[str, Any]) -> int:
    """Fill the report and print it section by section; the exit code."""
    from redrafter_mlx import diagnosis
    from redrafter_mlx.loading import drafters, hub
    from redrafter_mlx.target.adapter import adapt

    began = time.perf_counter()
    report["machine"] = diagnosis.machine()
    _section("Machine", _machine_lines(report["machine"]))
    checks = list(diagnosis.machine_checks())
    report["checks"] = [check.as_dict() for check in checks]
    _section("Checks", _check_lines(checks))

    _log.info("loading %s", flags.model)
    model, tokenizer = hub.load(flags.model, **loading(flags))
    facts = report["model"] = diagnosis.describe(model, flags.model)
    drafter = None
    if facts["trees"]:
        drafter = drafters.load_drafter(flags.drafter, model, tokenizer=tokenizer)
        facts["drafters"] = diagnosis.drafters_for(model)
    _section("Model", _model_lines(facts))

    ids = [encode_message(tokenizer, prompt) for prompt in diagnosis.PROMPTS]
    if drafter is not None:
        _log.info("timing passes of 1 to 64 rows, and drafts")
        passes = diagnosis.passes(adapt(model), ids[-1])
        drafts = diagnosis.drafts(adapt(model), drafter, ids[-1], options)
        report["milliseconds"] = {
            "after": len(ids[-1]),
            "passes": {str(rows): round(1e3 * x, 3) for rows, x in passes.items()},
            "drafts": {f"{w}x{length}": round(1e3 * x, 3) for (w, length), x in drafts.items()},
        }
        _section("Costs", _cost_lines(report["milliseconds"]))
    progress, ends = partial(_log.info, "%s"), tokenizer.eos_token_ids
    found = list(diagnosis.answers(model, drafter, ids, flags.tokens, ends, progress))
    tie = diagnosis.tie(adapt(model)) if facts["trees"] else 0.0
    unlike = [answer for answer in found if not answer.is_same(tie)]
    report["answers"] = [vars(answer) for answer in found]
    report["tie"] = tie
    _section("Answers", _answer_lines(found, tie))
    report["peak_memory_gb"] = diagnosis.peak_memory()
    report["seconds"] = round(time.perf_counter() - began, 1)
    is_quiet = all(check.is_fine for check in checks if check.name == "quiet")
    report["verdict"] = diagnosis.verdict(flags.drafter, facts, found, unlike, is_quiet)
    print(f"\n{report['verdict']}")
    return DIFFERS if unlike else 0


def _write(path: Path, report: dict[str, Any]) -> None:
    from redrafter_mlx.machine.storage import one_line, write_whole

    try:
        write_whole(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {one_line(error)}") from error


def _section(title: str, lines: Iterable[str]) -> None:
    print(f"\n{title}", *(f"  {line}" for line in lines), sep="\n", flush=True)


def _machine_lines(facts: dict[str, Any]) -> list[str]:
    memory = f"{facts['memory_gb']} GB"
    if facts["working_set_gb"]:
        memory += f", {facts['working_set_gb']} GB of it for one program on the GPU"
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found)
    rows = {
        "chip": f"{facts['chip']}, {facts['cores']} cores",
        "memory": memory,
        "system": f"{facts['system']}, Python {facts['python']}",
        "MLX device": f"{facts['device']}, BLAS {facts['blas']}",
        "versions": versions,
    }
    return _aligned(rows)


def _check_lines(checks: Iterable[Check]) -> list[str]:
    lines = []
    for check in checks:
        word = "ok  " if check.is_fine else "FAIL"
        lines.append(f"{word} {check.name:10} {check.found}")
        if not check.is_fine:
            lines.append(f"     {'':10} -> {check.advice}")
    return lines


def _model_lines(facts: dict[str, Any]) -> list[str]:
    counted = lambda counts: ", ".join(f"{n} {name}" for name, n in counts.items())
    rows = {
        "name": f"{facts['name']} ({facts['type']}), {facts['gigabytes']} GB",
        "weights": counted(facts["dtypes"]),
        "caches": counted(facts["caches"]),
    }
    if facts["trees"]:
        rows["trees"] = (
            f"verified; largest difference from one path {facts['difference']:.1e} deviations of "
            f"the logits, {facts['allowed']:.0e} allowed"
        )
        rows["drafters"] = ", ".join(facts["drafters"])
    else:
        rows["trees"] = f"refused: {facts['refused']}"
    return _aligned(rows)


def _cost_lines(costs: dict[str, Any]) -> list[str]:
    plain = costs["passes"]["1"]
    table = lambda names, times: [
        "".join(f"{name:>8}" for name in names),
        "".join(f"{x:8.1f}" for x in times) + "  ms",
        "".join(f"{x / plain:8.2f}" for x in times) + "  of a plain round",
    ]
    passes, drafts = costs["passes"], costs["drafts"]
    return [
        f"a pass over so many rows, after {costs['after']} tokens:",
        *table(passes, passes.values()),
        "a draft of so many beams x tokens:",
        *table(drafts, drafts.values()),
    ]


def _answer_lines(found: Iterable[Answer], tie: float) -> list[str]:
    lines = [f"{'tokens':>6} {'plain/s':>9} {'drafted/s':>10} {'ratio':>6} {'per round':>10}  text"]
    for answer in found:
        if not answer.drafted:
            lines.append(f"{answer.tokens:6} {answer.plain:9.1f}")
            continue
        ratio = answer.drafted / answer.plain
        same = "the same"
        if answer.position is not None:
            kind = "a tie" if answer.is_same(tie) else f"not a tie, below {tie:.2g}"
            same = f"parts at token {answer.position}, margin {answer.margin}: {kind}"
        lines.append(
            f"{answer.tokens:6} {answer.plain:9.1f} {answer.drafted:10.1f} {ratio:6.2f} "
            f"{answer.tokens_per_round:10.2f}  {same}"
        )
    return lines


def _aligned(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"{name:{width}}  {value}" for name, value in rows.items()]


if __name__ == "__main__":
    sys.exit(main())
