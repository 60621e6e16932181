"""What every benchmark needs: a target with its drafters, and where and with what it ran."""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten, tree_map

import redrafter_mlx
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.machine import device

from . import prompts as prompt_files

RANDOM = "random"
RESULTS = Path(__file__).parent / "results"


class Bench:
    """A target and its drafters.

    names    as for --drafter; "random" is the first one's shape with random weights: a useless one
    cascade  what load_drafter is told of cascades
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
        """Token ids of a message in the chat template, or as it is where there is none."""
        if not self.tokenizer.has_chat_template:
            return self.tokenizer.encode(text)
        messages = [{"role": "user", "content": text}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    def filler(self, tokens: int, path: Path = prompt_files.OWN) -> list[int]:
        """A prompt of exactly so many tokens: the file's prompts, over again if they are too few.

        What repeats is easy to draft: to measure a drafter, give a file that is long enough.
        """
        texts = [p.text for p in prompt_files.read(path, per_category=2**30)]
        random.Random(0).shuffle(texts)
        taken: list[str] = []
        while len(ids := self.encode("\n\n".join(taken))) < tokens:
            taken += texts
        return [*ids[: tokens - 8], *ids[-8:]]  # the end opens the answer


def size(module: Any) -> int:
    """Bytes of a module's parameters."""
    return sum(x.nbytes for _, x in tree_flatten(module.parameters()))


def machine() -> dict[str, str]:
    """Where and with what this is measured."""
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
        "blas": str(redrafter_mlx.machine.blas.preload()),
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


def document(kind: str, flags: argparse.Namespace, where: dict[str, str], **content) -> dict:
    """The JSON document of a benchmark."""
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(flags).items()}
    return {"kind": kind, "machine": where, "settings": settings, **content}


def write(result: dict, path: Path | None) -> None:
    """Write a document, if it is to be written."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", file=sys.stderr)
