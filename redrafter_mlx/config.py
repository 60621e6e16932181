"""Every option but those of training, with its only default, its help text and its allowed range.

Python keywords and command-line flags are both made from these dataclasses, so they cannot
disagree. Names are mlx_lm.generate's wherever the same thing is meant.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redrafter_mlx.errors import UserError

T = TypeVar("T", bound="Options")


def option(default: Any, help: str, *, low=-math.inf, high=math.inf, type=None, **flag) -> Any:
    """A dataclass field that knows its help text, its closed range and how its flag is parsed."""
    type = type or default.__class__
    meta = {"help": help, "low": low, "high": high, "type": type, "flag": flag}
    return field(default=default, metadata=meta)


def _check_ranges(config: Any) -> None:
    for f in dataclasses.fields(config):
        given = getattr(config, f.name)
        if f.metadata["type"] not in (int, float) or (given is None and f.default is None):
            continue
        is_list = isinstance(f.default, tuple)
        if is_list and not isinstance(given, (list, tuple)):
            raise UserError(f"{flag_name(f)} must be a list of whole numbers, not {given!r}")
        for value in given if is_list else (given,):
            _check_number(flag_name(f), value, f.metadata)


def _check_number(flag: str, value: Any, meta: Mapping[str, Any]) -> None:
    kind, low, high = meta["type"], meta["low"], meta["high"]
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        kind_name = "whole number" if kind is int else "number"
        raise UserError(f"{flag} must be a {kind_name}, not {value!r}")
    if kind is float and not abs(value) <= sys.float_info.max:
        raise UserError(f"{flag} {value} is not a finite number")
    if not low <= value <= high:
        allowed = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{flag} {value} is outside its range: {allowed}")


def flag_name(f: dataclasses.Field) -> str:
    return "--" + f.name.replace("_", "-")


@dataclass(frozen=True)
class Options:
    """Base of the option groups: values are checked when the group is made."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # None: off, as mlx-lm has it
            if isinstance(f.default, tuple) and getattr(self, f.name) is None:
                object.__setattr__(self, f.name, f.default)
        _check_ranges(self)


RULES = ("match", "rejection", "typical")


@dataclass(frozen=True)
class SamplingOptions(Options):
    """How the next token is chosen from the target's logits; mlx-lm's meanings and order."""

    temp: float = option(0.0, "sampling temperature; 0 takes the likeliest token", low=0.0)
    top_p: float = option(
        1.0,
        "sample from the likeliest tokens up to this probability (0, 1: off)",
        low=0.0,
        high=1.0,
    )
    min_p: float = option(
        0.0, "drop tokens less likely than this share of the likeliest", low=0.0, high=1.0
    )
    min_tokens_to_keep: int = option(1, "fewest tokens that --min-p leaves", low=1)
    top_k: int = option(0, "sample from the K likeliest tokens (0: off)", low=0)
    xtc_probability: float = option(
        0.0, "how often XTC removes the likeliest tokens", low=0.0, high=1.0
    )
    xtc_threshold: float = option(
        0.1, "probability above which a token counts as a candidate of XTC", low=0.0, high=0.5
    )
    xtc_special_tokens: tuple[int, ...] = option(
        (), "token ids that XTC never removes", type=int, nargs="*", metavar="ID"
    )
    logit_bias: dict[int, float] | None = option(
        None, "JSON object of token id to added logit", type=dict, metavar="JSON"
    )
    repetition_penalty: float | None = option(
        None,
        "divide the logits of recent tokens by this (negative logits: multiply)",
        low=0.0,
        type=float,
    )
    repetition_context_size: int = option(20, "recent tokens for --repetition-penalty", low=1)
    presence_penalty: float | None = option(
        None, "subtract this from the logits of recent tokens", type=float
    )
    presence_context_size: int = option(20, "recent tokens for --presence-penalty", low=1)
    frequency_penalty: float | None = option(
        None, "subtract this from a logit for each recent occurrence", type=float
    )
    frequency_context_size: int = option(20, "recent tokens for --frequency-penalty", low=1)
    seed: int | None = option(
        None,
        "same seed, same text, with any drafter or none (default: a fresh one)",
        low=0,
        high=2**64 - 1,
        type=int,
    )
    rule: str = option(
        "match",
        "how drafts are verified: match (the same text as without drafts), rejection (the same "
        "distribution) or typical (lossy: not the model's own texts)",
        type=str,
        choices=RULES,
        metavar="RULE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in RULES:
            raise UserError(f"--rule must be one of {', '.join(RULES)}, not {self.rule!r}")
        if self.logit_bias is not None and not _is_bias(self.logit_bias):
            raise UserError(
                f"--logit-bias must map token ids to numbers, not be {self.logit_bias!r}"
            )


def _is_bias(given: Any) -> bool:
    return isinstance(given, Mapping) and all(
        isinstance(token, int) and isinstance(value, (int, float)) and not math.isnan(value)
        for token, value in given.items()
    )


AUTO = "auto"
MOST_BUDGET = 1024


def budget_size(text: str) -> str | int:
    """A flag's type: auto, or a number of nodes."""
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is neither {AUTO} nor a whole number") from None


@dataclass(frozen=True)
class DraftOptions(Options):
    """How much is drafted each round."""

    beam_width: int = option(4, "most beams that the drafter keeps", low=1, high=64)
    beam_length: int = option(
        5, "most tokens of a beam, the pending token included", low=2, high=64
    )
    budget: str | int = option(
        AUTO,
        "nodes of the verified tree, the pending token included: auto takes what pays at the "
        "measured cost of this machine, N the likeliest N, 0 all beams and nothing else (the "
        "paper's setting)",
        type=budget_size,
        metavar="N",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget == AUTO and isinstance(self.budget, str):
            return
        if isinstance(self.budget, bool) or not isinstance(self.budget, int):
            raise UserError(f"--budget must be {AUTO} or a whole number, not {self.budget!r}")
        if not 0 <= self.budget <= MOST_BUDGET:
            raise UserError(
                f"--budget {self.budget} is outside its range: 0 to {MOST_BUDGET}, or {AUTO}"
            )


KV_BITS, KV_GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class GenerationOptions(Options):
    """When to stop, and how the prompt is read."""

    max_tokens: int = option(256, "most tokens to generate (-1: no limit)", low=-1)
    prefill_step_size: int = option(512, "prompt tokens processed at a time", low=1)
    stop: tuple[str, ...] = option(
        (), "end before any of these strings", type=str, nargs="+", metavar="TEXT"
    )
    kv_bits: int | None = option(
        None, "bits of keys and values in the KV cache (default: not quantised)", type=int,
        low=2, high=8,
    )  # fmt: skip
    kv_group_size: int = option(
        64, "keys or values that share a scale, with --kv-bits", low=32, high=128
    )
    quantized_kv_start: int = option(
        5000, "tokens from which on the KV cache is quantised, with --kv-bits", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens == 0:
            raise UserError("--max-tokens 0 generates nothing; use -1 for no limit")
        if self.kv_bits not in (None, *KV_BITS):
            raise UserError(f"--kv-bits {self.kv_bits}: mlx quantises to {KV_BITS} bits")
        if self.kv_group_size not in KV_GROUP_SIZES:
            raise UserError(
                f"--kv-group-size {self.kv_group_size}: mlx takes groups of {KV_GROUP_SIZES}"
            )
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, (list, tuple)) or not all(
            isinstance(text, str) for text in self.stop
        ):
            raise UserError(f"--stop must be strings, not {self.stop!r}")
        if "" in self.stop:
            raise UserError("--stop '' would end every text at once; give a non-empty string")


@dataclass(frozen=True)
class ChatOptions(GenerationOptions):
    """When to stop, how the prompt is read, and how answers are shown."""

    max_tokens: int = option(
        2048,
        "most tokens of an answer (-1: no limit); more than generate's, as Ctrl-C ends an answer",
        low=-1,
    )
    show_drafts: bool = option(False, "mark the text that was drafted and accepted")


@dataclass(frozen=True)
class EngineOptions(Options):
    """How many requests are answered at a time, and what is kept between them."""

    parallel: int = option(8, "most requests answered side by side, round by round", low=1)
    queue: int = option(32, "most requests that wait for their turn", low=0)
    cache_memory: float | None = option(
        None,
        "most memory for KV caches, those kept for later prompts included, in GB "
        "(default: a quarter of the machine's)",
        low=0.0,
        type=float,
    )
    prompt_cache_dir: str | None = option(
        None,
        "directory in which KV caches are kept from one start to the next",
        type=str,
        metavar="DIR",
    )


@dataclass(frozen=True)
class TuneOptions(Options):
    """How costs and acceptance are measured."""

    contexts: tuple[int, ...] = option(
        (128, 512, 2048),
        "tokens before the passes that are timed, ascending",
        low=16,
        high=2**20,
        type=int,
        nargs="+",
        metavar="TOKENS",
    )
    rows: int = option(64, "most rows of a pass", low=2, high=64)
    turns: int = option(7, "how often each size is timed", low=3, high=1000)
    tokens: int = option(96, "most tokens of each answer that acceptance is read off", low=8)
    prompts: str | None = option(
        None, "text file of prompts, one a line (default: four of its own)", type=str,
        metavar="FILE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contexts or list(self.contexts) != sorted(set(self.contexts)):
            raise UserError(f"--contexts must ascend, not be {list(self.contexts)}")


@dataclass(frozen=True)
class DrafterOptions(Options):
    """Settings of drafters; see --drafter."""

    cascade_k: Any = option(
        None,
        "K matrix of a cascade: tokens that level j drafts for reviewer r, which is the target in "
        "row 1 and level r-1 in row r; JSON, such as [[5,10],[0,10]]",
        type=str,
        metavar="JSON",
    )
    lenience: float = option(
        1.0, "how leniently a cascade's levels review each other; never changes the text", low=1.0
    )
    max_gram_memory: str | None = option(
        None, "file in which Max-Gram remembers earlier texts", type=str, metavar="FILE"
    )
    max_gram_memory_tokens: int = option(65536, "most tokens that are remembered", low=1)
    max_gram_bigrams: str | None = option(
        None,
        "text file from which Max-Gram guesses where the text itself gives no match",
        type=str,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_gram_memory", "max_gram_bigrams"):
            if not isinstance(getattr(self, name), str | None):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be the path of a file, not {getattr(self, name)!r}")


GROUPS = (GenerationOptions, SamplingOptions, DraftOptions)

NOT_HONOURED = {
    "sampler": "a sampler draws its own randomness, so the text would depend on the draft; "
    "pass temp=, top_p=, top_k=, min_p=, xtc_* and seed= instead",
    "draft_model": "use drafter=load_drafter('model:PATH-OR-REPO', model, tokenizer=tokenizer)",
    "num_draft_tokens": "use beam_length= and budget=",
    "max_kv_size": "a rotating KV cache cannot be rolled back; leave it out",
    "prompt_cache_file": "load it with mlx_lm.models.cache.load_prompt_cache, pass prompt_cache=",
    "input_embeddings": "only token prompts are supported",
    "image": "only text prompts are supported",
    "quantize_activations": "not supported; leave it out",
}
"""Options of mlx_lm.generate that a path through a tree cannot honour, and what to do instead."""


def parse_keywords(keywords: dict[str, Any], *groups: type) -> list[Any]:
    """Sort keyword arguments into option groups; an unknown one is an error, never dropped."""
    fields = {f.name: group for group in groups for f in dataclasses.fields(group)}
    for name in keywords:
        if name in NOT_HONOURED:
            raise UserError(f"{name}= cannot be honoured: {NOT_HONOURED[name]}")
        if name not in fields:
            raise UserError(f"unknown option {name}=; known: {', '.join(sorted(fields))}")
    return [
        group(**{name: value for name, value in keywords.items() if fields[name] is group})
        for group in groups
    ]


def add_flags(parser: ArgumentParser, *groups: type) -> None:
    """Give `parser` one flag for each option of the groups."""
    for group in groups:
        section = parser.add_argument_group(
            (group.__doc__ or "").split(".")[0].split(";")[0].lower()
        )
        for f in dataclasses.fields(group):
            shown = "" if f.default in (None, ()) else f" (default: {f.default})"
            if f.metadata["type"] is bool:
                section.add_argument(flag_name(f), action="store_true", help=f.metadata["help"])
                continue
            section.add_argument(
                flag_name(f),
                type=token_biases if f.metadata["type"] is dict else f.metadata["type"],
                default=f.default,
                help=(f.metadata["help"] + shown).replace("%", "%%"),
                **f.metadata["flag"],
            )


def token_biases(text: str) -> dict[int, float]:
    """A flag's type: a JSON object of token ids and numbers."""
    try:
        return {int(token): float(bias) for token, bias in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ArgumentTypeError(
            f'{text!r} is not a JSON object of token ids and numbers such as {{"42": -1.5}}'
        ) from error


def from_flags(group: type[T], flags: Namespace) -> T:
    """The option group that the parsed flags describe."""
    values = {f.name: getattr(flags, f.name) for f in dataclasses.fields(group)}
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
