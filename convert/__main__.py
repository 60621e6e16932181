"""Convert draft heads between frameworks, from the command line."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from redrafter_mlx import cli
from redrafter_mlx.errors import UserError

PROG = "redrafter_mlx.convert" if __package__ != "convert" else "python -m convert"
DESCRIPTION = (
    "Convert a draft head for this package: a recurrent one from any known layout to any other, "
    "or one of another kind, which keeps its layout."
)
EXAMPLES = f"""
examples:
  {PROG} --input ./redrafter-vicuna-7b --output ./head-mlx --quantize 4 --dtype float16
  {PROG} --input org/name --revision main --output ./head-mlx --verify
  {PROG} --input ./head-mlx --output ./head-pt --to apple
  {PROG} --input ./head --output ./small --draft-vocab 8192 corpus.txt --target org/model

other commands:
  {PROG} inspect PATH            what a head is, its sizes, for which targets it fits
  {PROG} gguf FILE.gguf OUTPUT   a GGUF file as a model directory
  {PROG} target ...              a target model, by mlx-lm's own converter
"""


def make_parser() -> cli.Parser:
    """The flags of the conversion itself."""
    from redrafter_mlx.drafters.kinds import KINDS

    from .kinds import NAMES
    from .layouts import LAYOUTS

    lines = lambda found: "\n".join(f"  {each.name + ':':<14}{each.about}" for each in found)
    listed = f"{lines(LAYOUTS.values())}\n\nother kinds of heads:\n{lines(KINDS.values())}"
    parser = cli.Parser(
        prog=PROG,
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\nlayouts of recurrent heads:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--input", required=True, metavar="HEAD", help="a directory, a file of weights "
         "(.safetensors, .bin, .pt) or a Hugging Face repo as org/name")  # fmt: skip
    flag("--output", required=True, metavar="DIR", help="a new directory")
    flag("--force", action="store_true", help="replace a head that is in --output")
    flag("--revision", help="branch, tag or commit of a Hugging Face repo")
    flag("--from", dest="source_layout", choices=dict.fromkeys([*LAYOUTS, *NAMES]),
         metavar="LAYOUT", help="layout or kind of the input (default: recognised by its tensors "
         "and config.json); speculators: eagle3 in the layout of that library")  # fmt: skip
    flag("--to", choices=LAYOUTS, metavar="LAYOUT", help="layout of the output, of recurrent heads "
         "only (default: mlx)")  # fmt: skip
    flag("--dtype", choices=("float32", "float16", "bfloat16"), help="type of the weights, or of "
         "the scales of quantised ones (default: as they are)")  # fmt: skip
    flag("--quantize", type=int, choices=(4, 8), help="bits per weight")
    flag("--group-size", type=int, choices=(32, 64, 128), help="weights that share a scale "
         "(with --quantize; default: 64)")  # fmt: skip
    flag("--dequantize", action="store_true", help="unpack quantised weights (layouts other than "
         "mlx always do)")  # fmt: skip
    flag("--draft-vocab", nargs="+", metavar="N|FILE", help="propose only the N likeliest ids of "
         "FILE, or without N all that occur in it: a text (.txt, .md, .jsonl; needs --target) or "
         'token counts ({"id": count} or lines "id count")')  # fmt: skip
    flag("--keep-d2t", action="store_true", help="export a reduced vocabulary to a layout whose "
         "readers do not know it")  # fmt: skip
    flag("--target", "--tokenizer", metavar="MODEL", help="the head's target: demo, a directory or "
         "a Hugging Face repo; for its tokenizer, its sizes and the model card")  # fmt: skip
    flag("--verify", action="store_true", help="run the input in PyTorch and the output in MLX and "
         "print the largest difference")  # fmt: skip
    flag("--upload", metavar="REPO", help="send the result to this Hugging Face repo")
    flag("--public", action="store_true", help="make a new --upload repo public")
    return parser


def run_conversion(flags: Namespace) -> int:
    """Convert as the flags say; the exit code."""
    if flags.group_size and not flags.quantize:
        raise UserError(f"--group-size {flags.group_size} does nothing without --quantize")
    if flags.public and not flags.upload:
        raise UserError("--public does nothing without --upload")
    from .vocabulary import parse_flag

    vocabulary = parse_flag(flags.draft_vocab) if flags.draft_vocab else None

    from . import conversion, upload
    from .card import megabytes
    from .head import Packing
    from .storage import check_destination
    from .target import find_target

    destination = output_path(flags.output)
    check_destination(destination, flags.force)
    if flags.verify:
        from .pickles import import_torch

        import_torch("--verify")
    if flags.upload:
        upload.check_access(flags.upload)
    order = conversion.Order(
        source=flags.input,
        destination=destination,
        layout=flags.to,
        source_layout=flags.source_layout,
        revision=flags.revision,
        dtype=flags.dtype,
        packing=Packing(flags.group_size or 64, flags.quantize) if flags.quantize else None,
        unpack=flags.dequantize,
        vocabulary=vocabulary,
        target=find_target(flags.target) if flags.target else None,
        keep_d2t=flags.keep_d2t,
        force=flags.force,
    )
    result = conversion.convert(order, _print_comparison if flags.verify else None)
    facts = result.facts
    print(
        f"{destination}: {result.head.layout} -> {facts.form.layout}, "
        f"{facts.parameters:,} parameters, "
        f"{megabytes(result.head.step_bytes)} -> {megabytes(facts.step_bytes)} per draft step"
    )
    if flags.upload:
        print(f"uploaded to {upload.upload(destination, flags.upload, flags.public)}")
    return 0


def _print_comparison(head, directory: Path, recipe) -> None:
    from .verify import verify

    print(f"verify: {verify(head, directory, recipe)}", flush=True)


def output_path(name: str) -> Path:
    """The absolute path of an --output."""
    from redrafter_mlx.loading import places

    if not name:
        raise UserError("--output is empty; give a new directory")
    return Path(os.path.abspath(places.expanded(name)))


def inspect_parser() -> cli.Parser:
    parser = cli.Parser(
        prog=f"{PROG} inspect",
        description="Say what a head is: layout, tensors, sizes, bytes per draft step, and for "
        "which targets it fits. Damaged ones too; then the exit code is 2. Weights are not read.",
    )
    parser.add_argument("path", help="a directory, a file of weights or a Hugging Face repo")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face repo")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run_inspect(flags: Namespace) -> int:
    """Describe a head; code 2 if something is wrong with it."""
    from . import report

    found = report.describe(flags.path, flags.revision)
    print(json.dumps(found, ensure_ascii=False) if flags.json else report.report(found))
    return cli.USAGE_ERROR if "problem" in found else 0


def gguf_parser() -> cli.Parser:
    parser = cli.Parser(
        prog=f"{PROG} gguf",
        description="Convert a GGUF file (llama, qwen2, qwen3, gemma3, phi3; F32 to Q8_K) to a "
        "model directory that mlx-lm loads. Q2_K and Q6_K become 8 bits, all else keeps its codes.",
    )
    parser.add_argument("file", help="the .gguf file")
    parser.add_argument("output", help="a new directory")
    parser.add_argument("--force", action="store_true", help="replace a model that is in OUTPUT")
    return parser


def run_gguf(flags: Namespace) -> int:
    """Convert a GGUF file; it appears whole or not at all."""
    from redrafter_mlx.gguf.importer import import_gguf
    from redrafter_mlx.loading import places
    from redrafter_mlx.machine.storage import one_line

    from . import storage
    from .card import megabytes

    file, destination = places.expanded(flags.file), output_path(flags.output)
    if not file.is_file():
        raise UserError(f"{flags.file}: no such file; give a .gguf file")
    storage.check_destination(destination, flags.force)
    with storage.build(destination, flags.force) as directory:
        try:
            import_gguf(file, directory)
        except RuntimeError as error:  # MLX reports a full disk like this
            raise UserError(f"OUTPUT {destination} cannot be written: {one_line(error)}") from error
    size = (destination / "model.safetensors").stat().st_size
    run = f"python -m redrafter_mlx.generate --model {shlex.quote(str(destination))}"
    print(f"{destination}: {megabytes(size)}; run it with {run} --prompt ...")
    return 0


def run_target(args: list[str]) -> int:
    """Hand over to mlx-lm's own converter, flags and all."""
    from mlx_lm.convert import main as convert_target

    sys.argv = ["mlx_lm.convert", *args]
    convert_target()
    return 0


COMMANDS = {"inspect": (run_inspect, inspect_parser), "gguf": (run_gguf, gguf_parser)}


def main(args: list[str] | None = None) -> int:
    """Entry point of the command."""
    args = sys.argv[1:] if args is None else args
    first = args[0] if args else ""
    if first == "target":
        return run_target(args[1:])
    if first in COMMANDS:
        command, parser = COMMANDS[first]
        return cli.run(command, parser(), args[1:])
    return cli.run(run_conversion, make_parser(), args)


if __name__ == "__main__":
    sys.exit(main())
