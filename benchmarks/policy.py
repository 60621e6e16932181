"""`--budget auto` against every fixed setting: recorded drafts and a measured curve, no clock.

    python -m redrafter_mlx.tune --drafter auto                # what passes and drafts cost here
    python -m benchmarks.policy --prompts question.jsonl --recording drafts.json

Plain decoding answers the prompts once while the head and Max-Gram draft at each position. What any
setting would have yielded is read off this recording, and a policy is replayed on it in seconds, so
that differences do not drown in the noise of a machine; noise of a known size is added instead.
Costs are those of the latest tune, so one recording can be replayed under many costs.

Shape letters: P positions of a text, N nodes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from redrafter_mlx.config import DraftOptions, SamplingOptions
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.drafters.protocol import Drafter, candidates_of
from redrafter_mlx.drafters.union import UnionDrafter, pooled
from redrafter_mlx.measuring import profile as profiles
from redrafter_mlx.measuring.acceptance import Draft, Recording, record, rounds_of
from redrafter_mlx.measuring.knowledge import experience_of
from redrafter_mlx.pricing.budget import AutoBudget, Budget
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.pricing.policy import MOST_NODES, Policy, settings_within
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.rounds.tree import Candidates, TokenTree
from redrafter_mlx.target.adapter import adapt

from . import prompts as prompt_files
from .machine import Bench, add_prompts, document, machine, parser, publish
from .tables import policy_tables

HEAD, MAX_GRAM, UNION = "head", "max_gram", "union"
FULL = Setting(DraftOptions.beam_width, DraftOptions.beam_length)
Speeds = dict[Setting, np.ndarray]


_TYPES = {"tokens": int, "parents": int, "logprobs": float, "beams": int, "always": bool}


@dataclass
class Text:
    """An answer and what was drafted at each of its tokens.

    context   tokens of the prompt
    head, max_gram  (P,) candidates
    """

    category: str
    context: int
    head: list[Candidates]
    max_gram: list[Candidates]

    def as_dict(self) -> dict:
        """For JSON."""
        drafted = {
            drafter: [{"root": c.root} | {k: getattr(c, k).tolist() for k in _TYPES} for c in found]
            for drafter, found in ((HEAD, self.head), (MAX_GRAM, self.max_gram))
        }
        return {"category": self.category, "context": self.context, **drafted}

    @classmethod
    def from_dict(cls, text: dict) -> Text:
        """What `as_dict` made."""
        head, max_gram = (
            [
                Candidates(each["root"], **{k: np.array(each[k], t) for k, t in _TYPES.items()})
                for each in text[drafter]
            ]
            for drafter in (HEAD, MAX_GRAM)
        )
        return cls(text["category"], text["context"], head, max_gram)

    def tokens_after(self, position: int) -> list[int]:
        """The text from a position on, but its last token."""
        return [c.root for c in self.head[position + 1 :]]

    def draft(self, drafter: str, position: int, setting: Setting) -> Candidates:
        """What a drafter finds at a position within a setting."""
        if drafter == MAX_GRAM or setting.width == 0:
            return self.max_gram[position]
        found = narrowed(self.head[position], setting)
        return found if drafter == HEAD else pooled([found, self.max_gram[position]])

    def recording(self, drafter: str) -> Recording:
        """For reading off what fixed settings would have yielded."""
        drafts = [
            Draft.of(self.draft(drafter, p, FULL), self.tokens_after(p))
            for p in range(len(self.head))
        ]
        return Recording(FULL, drafts)


def narrowed(c: Candidates, setting: Setting) -> Candidates:
    """What a narrower and shorter search would have found."""
    if setting == FULL:
        return c
    kept = np.flatnonzero(c.within(setting.width) & (c.depths < setting.length))
    places = np.full(len(c.tokens) + 1, -1)  # the root's is the last one
    places[kept] = np.arange(len(kept))
    parents = places[c.parents[kept]]
    return Candidates(c.root, c.tokens[kept], parents, c.logprobs[kept], np.array([], int))


class Kept:
    """A drafter whose candidates are kept, with the seconds that they took."""

    def __init__(self, drafter: Drafter):
        self.drafter, self.found, self.seconds = drafter, [], []
        self.observe, self.reset = drafter.observe, drafter.reset

    def propose(self, context: Context, budget: Budget) -> TokenTree:
        began = time.perf_counter()
        found = candidates_of(self.drafter, context, budget.width, budget.length)
        self.seconds.append(time.perf_counter() - began)
        self.found.append(found)
        return budget.tree(found)


@dataclass
class Costs:
    """Seconds of passes, and of drafts of the head and of Max-Gram.

    vain  extra cost of a round that drafts but verifies nothing, as a share of a plain round: the
          host does not prepare the next pass while the device is at work
    """

    curve: CostCurve
    head: LiveDraftCosts
    max_gram: float
    vain: float = 0.0

    def of_draft(self, drafter: str, setting: Setting) -> float:
        return self.max_gram if drafter == MAX_GRAM or not setting.width else self.head.of(setting)


def record_texts(
    bench: Bench, union: UnionDrafter, flags: argparse.Namespace
) -> tuple[list[Text], float]:
    """Texts of plain decoding, with drafts at each token; and the seconds of a Max-Gram draft."""
    target, texts, lookups = adapt(bench.model), [], []
    chosen = prompt_files.read(flags.prompts, flags.per_category)
    for i, prompt in enumerate(chosen, start=1):
        print(f"{i}/{len(chosen)} {prompt.id}", file=sys.stderr)
        ids, parts = bench.encode(prompt.text), [Kept(m) for m in union.members]
        kept, ends = UnionDrafter(parts), bench.tokenizer.eos_token_ids
        record(target, kept, ids, flags.max_tokens, FULL, SamplingOptions(), ends)
        texts.append(Text(prompt.category, len(ids), parts[0].found, parts[1].found))
        lookups += parts[1].seconds
    return texts, statistics.median(lookups)


@dataclass
class Played:
    """A replayed text: seconds of plain decoding and of drafted rounds, and their trees."""

    plain: float
    seconds: float = 0.0
    nodes: list[int] = field(default_factory=list)
    settings: list[Setting | None] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Over plain decoding."""
        return self.plain / self.seconds


class At(NamedTuple):
    """The part of a Context that budgets read."""

    position: int


@dataclass
class Told:
    """The part of a Step that budgets read."""

    nodes: int
    draft_seconds: float
    path: list[int]
    is_known: bool = True

    @property
    def verdict(self) -> Told:
        return self


class Paper:
    """A simulated machine, whose costs are constant but for noise.

    noise  relative spread of the times
    """

    def __init__(self, costs: Costs, noise: float, seed: int):
        self.costs, self.noise = costs, noise
        self._random, self.now = np.random.default_rng(seed), 0.0

    def spend(self, seconds: float) -> float:
        spent = seconds * np.exp(self.noise * self._random.standard_normal())
        self.now += spent
        return spent

    def play(self, policy: Policy, text: Text, drafter: str) -> Played:
        """Rounds over one text; tokens drafted beyond its recorded end count as rejected."""
        budget = AutoBudget(policy, clock=lambda: self.now)
        played, position, began = Played(plain_seconds(text, self.costs)), 0, self.now
        while position < len(text.head):
            context = text.context + position
            setting, seconds, tree, path = None, 0.0, TokenTree.root(0), [0]
            if budget.plan(At(context)):
                if drafter == UNION:
                    budget.search(text.max_gram[position])
                setting = Setting(budget.width, budget.length)
                seconds = self.spend(self.costs.of_draft(drafter, setting))
                tree = budget.tree(text.draft(drafter, position, setting))
                nodes = Candidates.of(tree).follow(text.tokens_after(position))
                path = [0, *(node + 1 for node in nodes)]  # rows begin with the root
            vain = 1 + self.costs.vain * (setting is not None and len(tree) == 1)
            self.spend(vain * self.costs.curve.at(context, len(tree))[len(tree)])
            budget.observe(tree, Told(len(tree), seconds, path, len(tree) > 1))
            played.nodes.append(len(tree))
            played.settings.append(setting)
            position += len(path)
        played.seconds = self.now - began
        return played


def plain_seconds(text: Text, costs: Costs) -> float:
    """Seconds of plain decoding of a text."""
    return sum(costs.curve.at(text.context + p, 1)[1] for p in range(len(text.head)))


def fixed_speeds(text: Text, drafter: str, costs: Costs) -> Speeds:
    """(N + 1,) speed over plain decoding by budget, for each setting."""
    recording, plain, speeds = text.recording(drafter), plain_seconds(text, costs), {}
    settings = settings_within(FULL) if drafter != MAX_GRAM else [FULL]
    passes = np.array([costs.curve.at(text.context + p, MOST_NODES) for p in range(len(text.head))])
    for setting in settings:
        counts = recording.accepted(setting, MOST_NODES)
        prices = passes.mean(axis=0) + costs.of_draft(drafter, setting)
        speeds[setting] = plain / (rounds_of(counts) * prices)
        speeds[setting][:2] = 1.0  # no draft at all
    return speeds


def geometric_mean(tables: Sequence[Speeds]) -> Speeds:
    """Geometric mean of the speeds of several texts or tasks."""
    return {s: np.exp(np.mean([np.log(t[s]) for t in tables], axis=0)) for s in tables[0]}


def best(speeds: Speeds) -> tuple[float, int, Setting]:
    """The fastest budget and setting, and their speed."""
    return max((float(x), n, s) for s, xs in speeds.items() for n, x in enumerate(xs))


def beside_fixed(auto: Sequence[float], fixed: Sequence[Speeds]) -> dict[str, float | str]:
    """Speed of auto on some texts, and of the best fixed setting for them.

    The best setting is known only afterwards, and among hundreds one is lucky with a few texts. So
    `unseen` is the speed, in each text, of the setting that is best in the others.
    """
    speed, nodes, setting = best(geometric_mean(fixed))
    shape = f"{nodes} of {setting.width}x{setting.length}" if nodes > 1 else "plain"
    result = {"auto": statistics.geometric_mean(auto), "best": speed, "setting": shape}
    if len(fixed) > 1:
        of_others = [best(geometric_mean([*fixed[:i], *fixed[i + 1 :]])) for i in range(len(fixed))]
        unseen = [float(own[s][n]) for own, (_, n, s) in zip(fixed, of_others, strict=True)]
        result["unseen"] = statistics.geometric_mean(unseen)
    return result


CONTEXTS = 128, 512
"""Prompt lengths in tokens that separate the groups compared: short, medium and long prompts."""


def compare(
    texts: Sequence[Text],
    costs: Costs,
    known: Experience | None,
    flags: argparse.Namespace,
    drafter: str,
) -> dict[str, dict]:
    """Speed of auto and of the best fixed setting: by task, by length of prompt, and for all."""
    auto: list[list[float]] = [[] for _ in texts]
    shuffle = np.random.default_rng(flags.seed)
    for order in range(flags.orders):
        policy = new_policy(costs, known, drafter)
        paper = Paper(costs, flags.noise, seed=order)
        for i in shuffle.permutation(len(texts)):
            if flags.each:
                policy = new_policy(costs, known, drafter)
            auto[i].append(paper.play(policy, texts[i], drafter).speed)
    speeds = [statistics.geometric_mean(each) for each in auto]
    fixed = [fixed_speeds(text, drafter, costs) for text in texts]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        groups[text.category].append(i)
    for i, text in enumerate(texts):
        longer = [least for least in CONTEXTS if text.context >= least]
        groups[f"prompts from {longer[-1] if longer else 0} tokens on"].append(i)
    groups["all"] = list(range(len(texts)))
    return {
        name: beside_fixed([speeds[i] for i in group], [fixed[i] for i in group])
        for name, group in groups.items()
    }


def new_policy(costs: Costs, known: Experience | None, drafter: str) -> Policy:
    """A policy as a process begins with it: measured costs, and what is known of the drafts."""
    drafts = {Setting(0, FULL.length): costs.max_gram, **costs.head.measured}
    return Policy(
        FULL,
        LiveCosts(costs.curve),
        LiveDraftCosts(drafts),
        known and known.calibration(),
        known.samples if known else (),
        looks=drafter != HEAD,
        searches=drafter != MAX_GRAM,
    )


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    add_prompts(made)
    flag = made.add_argument
    flag("--drafter", default="demo", help="the head: as --drafter of generate")
    flag("--recording", type=Path, help="file of drafts: read if it is there, else made")
    flag("--noise", type=float, default=0.04, help="relative spread of times")
    flag("--vain", type=float, default=0.04,
         help="share of a plain round that a draft costs of which nothing is verified")  # fmt: skip
    flag("--orders", type=int, default=4, help="times that the texts are shuffled and played")
    flag("--seed", type=int, default=0, help="of the shuffles")
    flag("--each", action="store_true", help="a process for each text: nothing is known of others")
    flag("--nothing-known", action="store_true", help="not even what the head brings with it")
    flags = made.parse_args(args)
    where = machine()
    bench = Bench(flags.model, [flags.drafter])
    union = UnionDrafter([bench.drafters[flags.drafter], MaxGramDrafter()])
    known = profiles.load(profiles.identify(adapt(bench.model), union))
    if known is None:
        raise SystemExit("run python -m redrafter_mlx.tune --drafter auto first")
    if flags.recording and flags.recording.exists():
        kept = json.loads(flags.recording.read_text(encoding="utf-8"))
        texts, lookup = [Text.from_dict(text) for text in kept["texts"]], kept["lookup"]
    else:
        texts, lookup = record_texts(bench, union, flags)
        if flags.recording:
            kept = {"texts": [text.as_dict() for text in texts], "lookup": lookup}
            flags.recording.write_text(json.dumps(kept), encoding="utf-8")
    searches = LiveDraftCosts({s: x for s, x in known.drafts.items() if s.width})
    costs = Costs(known.curve, searches, lookup, flags.vain)
    brought = None if flags.nothing_known else experience_of(union).get(0.0)
    results = {d: compare(texts, costs, brought, flags, d) for d in (HEAD, MAX_GRAM, UNION)}
    publish(document("policy", flags, where, speeds=results), flags.output, policy_tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
