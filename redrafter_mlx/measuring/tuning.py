"""From measurements to a verdict: what to use on this machine, or why not to speculate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice

import numpy as np

from redrafter_mlx.config import DraftOptions, SamplingOptions, TuneOptions
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.measuring.acceptance import (
    Choice,
    Recording,
    best_choice,
    experience_from,
    record,
    tokens_per_round,
)
from redrafter_mlx.measuring.measure import Timings, curve_of, measure_drafts, measure_passes
from redrafter_mlx.measuring.profile import Profile, experience_key, identify
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.pricing.policy import MOST_NODES, settings_within
from redrafter_mlx.target.adapter import Target

ROWS = (*range(1, 17), 18, 20, 24, 28, 32, 33, 40, 48, 56, 64)
"""Sizes that are timed: costs jump where kernels change, mostly below 16."""


@dataclass(frozen=True)
class Tuning:
    """What was measured and what follows from it.

    speedups    context -> (N + 1,) expected speedup by budget, with the best search for each
    verdicts    one line for each context
    complaints  what disturbed the measurement
    """

    profile: Profile
    speedups: dict[int, np.ndarray]
    verdicts: list[str]
    complaints: list[str]


def tune(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    options: TuneOptions,
    draft: DraftOptions,
    ends: Collection[int] = (),
    progress: Callable[[str], None] = lambda what: None,
) -> Tuning:
    """Measure passes, drafts and acceptance.

    prompts  token ids
    ends     tokens that end a text
    Raises UserError for a target that cannot verify trees.
    """
    text = list(islice(cycle(chain.from_iterable(prompts)), options.contexts[-1]))
    rows = [n for n in ROWS if n <= options.rows]
    passes = []
    for context in options.contexts:
        progress(f"passes of 1 to {rows[-1]} rows after {context} tokens")
        passes.append(measure_passes(target, text[:context], rows, options.turns))
    curve = curve_of(options.contexts, rows, passes)
    identity = identify(target, drafter)
    if drafter is None:
        return _without_drafter(Profile(identity, curve), passes)

    full = Setting(draft.beam_width, draft.beam_length)
    settings = settings_within(full)
    progress(f"drafts of up to {full.width} beams of {full.length}")
    drafting = measure_drafts(
        target, drafter, text[: options.contexts[0]], settings, 2 * options.turns
    )
    drafts = dict(zip(settings, drafting.typical.tolist(), strict=True))
    recordings = []
    for i, prompt in enumerate(prompts, start=1):
        progress(f"answer {i} of {len(prompts)}")
        recordings.append(
            record(target, drafter, prompt, options.tokens, full, SamplingOptions(), ends)
        )
    if not any(len(d.candidates.tokens) for r in recordings for d in r.drafts):
        found = _without_drafter(Profile(identity, curve), passes)
        nothing = "the drafter proposed nothing in the answers to these prompts"
        return replace(found, complaints=[*found.complaints, nothing])
    yields = yields_of(recordings, settings)
    speedups = {c: speedup_by_budget(yields, curve, drafts, c) for c in curve.contexts}
    choices = {c: best_choice(yields, curve, drafts, c) for c in curve.contexts}
    known = experience_from([draft for r in recordings for draft in r.drafts], full)
    summary = {
        str(c): {"setting": list(x.setting), "budget": x.nodes, "speedup": round(x.speedup, 4),
                 "tokens_per_round": round(x.tokens_per_round, 4)}
        for c, x in choices.items()
    }  # fmt: skip
    profile = Profile(identity, curve, drafts, {experience_key(full, 0.0): known}, summary)
    verdicts = [verdict(choice, curve, drafts, context) for context, choice in choices.items()]
    return Tuning(profile, speedups, verdicts, _complaints([*passes, drafting]))


def yields_of(
    recordings: Sequence[Recording], settings: Sequence[Setting]
) -> dict[Setting, np.ndarray]:
    """Tokens per round by setting and budget, up to the most candidates that there were."""
    most = max(len(d.candidates.tokens) for r in recordings for d in r.drafts) + 1
    return {
        setting: tokens_per_round(recordings, setting, min(most, MOST_NODES))
        for setting in settings
    }


def speedup_by_budget(
    yields: dict[Setting, np.ndarray],
    curve: CostCurve,
    drafts: dict[Setting, float],
    context: int,
) -> np.ndarray:
    """(N + 1,) expected speedup over plain decoding by budget, with the best search for each."""
    most = len(next(iter(yields.values()))) - 1
    costs = curve.at(context, most)
    costs[0] = np.inf
    each = [tokens / (costs + drafts[setting]) for setting, tokens in yields.items()]
    return costs[1] * np.max(each, axis=0)


def verdict(choice: Choice, curve: CostCurve, drafts: dict[Setting, float], context: int) -> str:
    """What to use after `context` tokens, in one line."""
    costs = curve.at(context, choice.nodes)
    rows, draft = costs[choice.nodes] / costs[1], drafts[choice.setting] / costs[1]
    reason = (
        f"{choice.tokens_per_round:.2f} tokens per round for {rows:.2f} + {draft:.2f} rounds' time "
        "(pass, draft)"
    )
    shape = f"budget {choice.nodes} of {choice.setting.width} x {choice.setting.length} beams"
    if choice.speedup > 1:
        return f"after {context} tokens: use {shape}: {choice.speedup:.2f}x; {reason}"
    return (
        f"after {context} tokens: do not speculate here: at best {choice.speedup:.2f}x ({shape}), "
        f"because it gives {reason}"
    )


def _without_drafter(profile: Profile, passes: Sequence[Timings]) -> Tuning:
    """The verdict without a drafter: what one would have to yield."""
    verdicts = []
    for context, seconds in zip(profile.curve.contexts, profile.curve.seconds, strict=True):
        needed = ", ".join(
            f"{cost / seconds[0]:.2f} at {rows}"
            for rows, cost in zip(profile.curve.rows, seconds, strict=True)
            if rows in (2, 4, 8, 16, 32, 64)
        )
        verdicts.append(
            f"after {context} tokens: to pay, a free drafter must yield more tokens per round "
            f"than {needed} rows"
        )
    return Tuning(profile, {}, verdicts, _complaints(passes))


def _complaints(timings: Sequence[Timings]) -> list[str]:
    return list(dict.fromkeys(line for t in timings if (line := t.complaint())))
