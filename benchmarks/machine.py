"""What every benchmark needs: a target with its drafters, and where and with what it ran."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten, tree_map

import redrafter_mlx
from redrafter_mlx.config import budget_size
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.machine import blas, device
from redrafter_mlx.model_flags import encode_message

from . import prompts as prompt_files

RANDOM = "random"


class Bench:
    """A target and its drafters.

    names    as for --drafter; "random" is a useless head: random weights in the shape of the first
    cascade  options of load_drafter for cascades
    """

    def __init__(self, model: str, names: list[str], **cascade):
        self.model, self.tokenizer = redrafter_mlx.load(model)
        self.drafters: dict[str, Drafter] = {}
        for name in names:
            if name != RANDOM:
                more = cascade if "cascade" in name else {}
                self.drafters[name] = redrafter_mlx.load_drafter(
                    name, self.model, tokenizer=self.tokenizer, **more
                )
        if RANDOM in names:
            self.drafters[RANDOM] = self._random()

    def _random(self) -> Drafter:
        shaped = next((n for n, d in self.drafters.items() if hasattr(d, "head")), "demo")
        drafter = redrafter_mlx.load_drafter(shaped, self.model)
        mx.random.seed(0)
        noise = lambda x: (mx.random.normal(x.shape) * mx.std(x)).astype(x.dtype)
        drafter.head.update(tree_map(noise, drafter.head.parameters()))
        mx.eval(drafter.head.parameters())
        return drafter

    def encode(self, text: str) -> list[int]:
        """Token ids of a message, in the chat template if there is one."""
        return encode_message(self.tokenizer, text)

    def filler(self, tokens: int, path: Path = prompt_files.OWN) -> list[int]:
        """A prompt of exactly `tokens` tokens: the file's prompts, repeated if they are too few.

        Repetition is easy to draft: to measure a drafter, give a file that is long enough.
        """
        texts = [p.text for p in prompt_files.read(path, per_category=2**30)]
        random.Random(0).shuffle(texts)
        taken: list[str] = []
        while len(ids := self.encode("\n\n".join(taken))) < tokens:
            taken += texts
        return [*ids[: tokens - 8], *ids[-8:]]  # the last tokens open the answer


def size(module: Any) -> int:
    """Bytes of a module's parameters."""
    return sum(x.nbytes for _, x in tree_flatten(module.parameters()))


def machine() -> dict[str, str]:
    """The machine and the software with which this is measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "chip": device.chip(),
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "blas": str(blas.preload()),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--model", default="demo", help="as generate takes it")
    made.add_argument("--output", type=Path, help="JSON file to write; the picture lies beside it")
    return made


def add_prompts(made: argparse.ArgumentParser) -> None:
    """Flags that choose prompts."""
    add_prompt_file(made)
    made.add_argument("--per-category", type=int, default=2, help="prompts of each category")
    made.add_argument("--max-tokens", type=int, default=96, help="of each answer")


def add_prompt_file(made: argparse.ArgumentParser) -> None:
    """The flag that says where prompts come from."""
    made.add_argument(
        "--prompts", type=Path, default=prompt_files.OWN, help="JSONL in Spec-Bench's form"
    )


def add_contexts(made: argparse.ArgumentParser, contexts: list[int], budgets: list) -> None:
    """Flags of benchmarks that vary the length of the text, with their defaults."""
    add_prompt_file(made)
    flag = made.add_argument
    flag("--drafter", default="demo", help="as --drafter of generate")
    flag("--contexts", type=int, nargs="+", default=contexts, help="tokens before the answer")
    flag("--budgets", type=budget_size, nargs="+", default=budgets, help="as --budget of generate")
    flag("--max-tokens", type=int, default=64, help="of each answer")


def options_of(group: type, given: dict[str, str], **more):
    """The options of `group` among `given`, which are taken out of it, and `more`."""
    fields = {f.name: f for f in dataclasses.fields(group)}
    for name in given.keys() & fields.keys():
        text, kind = given.pop(name), fields[name].metadata["type"]
        more[name] = text == "true" if kind is bool else kind(text)
    return group(**more)


def document(kind: str, flags: argparse.Namespace, where: dict[str, str], **content) -> dict:
    """A benchmark's result as a JSON document."""
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(flags).items()}
    return {"kind": kind, "machine": where, "settings": settings, **content}


def write(result: dict, path: Path | None) -> None:
    """Write a document, if there is a path for it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", file=sys.stderr)


def publish(
    result: dict,
    path: Path | None,
    tables: Callable[[dict, str], str],
    draw: Callable[[dict, Path], bool] | None = None,
) -> None:
    """Write a document and its picture, if there is a path for them, and print its tables.

    tables  (document, name of its file) -> Markdown
    """
    write(result, path)
    print(tables(result, path.name if path else "NAME.json"))
    if path and draw:
        draw(result, path.with_suffix(".png"))
