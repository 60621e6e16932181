"""What a process knows of a target and a drafter: loaded, looked up, learned, and kept."""

from __future__ import annotations

import logging
import time

import numpy as np

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.machine.storage import CACHE_VARIABLE, one_line
from redrafter_mlx.measuring.measure import look_at_drafts, look_at_passes
from redrafter_mlx.measuring.profile import (
    Profile,
    experience_key,
    identify,
    load,
    passes_with_other_drafter,
    update,
)
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.pricing.policy import Policy, Samples
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.target.adapter import Target

_log = logging.getLogger("redrafter_mlx")

LONGER, SHORT = 2, 128
"""Times the longest measured context, of so many tokens at least, beyond which passes are looked at
again."""
DISTURBED = (
    "something else is using this machine: several rows took longer than one after the other "
    "would, so little or nothing is drafted; it will be measured again"
)


class Knowledge:
    """Of one drafter with one target on this machine.

    Costs and what is known of drafts come from the profile that earlier runs left; what is missing
    is measured after the first prompt. Each temperature has a Policy of its own, and begins with
    what is known at the nearest one, of the profile's or the head's own.
    """

    def __init__(self, target: Target, drafter: Drafter):
        self.target, self._drafter = target, drafter
        self._identity = identify(target, drafter)
        stored = load(self._identity)
        self._costs: LiveCosts | None = None
        curve = stored.curve if stored else passes_with_other_drafter(self._identity)
        if curve is not None and not curve.is_disturbed:
            self._costs = LiveCosts(curve)
        self._draft_costs = LiveDraftCosts(stored and stored.drafts)
        self._experiences = stored.experiences if stored else {}
        self._policies: dict[tuple[Setting, float], Policy] = {}
        self._bases: dict[tuple[Setting, float], tuple[Experience | None, int, int]] = {}
        self._is_kept = True  # until that fails

    @property
    def is_first(self) -> bool:
        """Whether nobody has used the two here before."""
        return self._costs is None

    def policy(
        self,
        options: DraftOptions,
        temp: float,
        context: Context,
        tokens: int,
        drafter: Drafter | None = None,
    ) -> Policy:
        """The policy for a text whose prompt was processed; looks at what it costs if need be.

        tokens   that the answer may have
        drafter  the text's own, if it is not the one that this is about
        """
        full, temp = Setting(options.beam_width, options.beam_length), round(temp, 1)
        self._look(full, context, tokens, drafter or self._drafter)
        if (full, temp) not in self._policies:
            self._policies[full, temp] = self._new_policy(full, temp)
        return self._policies[full, temp]

    def keep(self, context: int) -> None:
        """Leave what was learned in the profile, beside what other processes have left there.

        context  tokens of the text so far
        """
        if not self._is_kept or self._costs is None or self._costs.curve.is_disturbed:
            return
        try:
            update(self._identity, lambda stored: self._merged(stored, context))
        except OSError as error:
            self._is_kept = False
            _log.warning(
                "what was learned cannot be kept: %s; set %s to a writable directory",
                one_line(error), CACHE_VARIABLE,
            )  # fmt: skip

    def _look(self, full: Setting, context: Context, tokens: int, drafter: Drafter) -> None:
        """Measure what is not known yet, within about a second, and say so."""
        began, looked_at = time.perf_counter(), []
        if not self._draft_costs.measured:
            settings = [full, Setting(1, full.length), Setting(1, 2)]
            if looks(self._drafter):
                settings.insert(1, Setting(0, full.length))
            self._draft_costs = LiveDraftCosts(look_at_drafts(drafter, context, settings))
            looked_at.append("drafts")
        curve = self._costs.curve if self._costs else None
        if curve is not None and curve.is_disturbed:
            curve = None
        if curve is None or context.position > LONGER * max(curve.contexts[-1], SHORT):
            spent = time.perf_counter() - began
            seconds = look_at_passes(self.target, context, tokens, spent)
            self._costs = LiveCosts(_with_context(curve, context.position, seconds))
            looked_at.append("passes")
        for policy in self._policies.values():
            policy.costs, policy.draft_costs = self._costs, self._draft_costs
        if looked_at:
            spent = time.perf_counter() - began
            _log.info("measured once what %s cost here (%.1f s)", " and ".join(looked_at), spent)
        if self._costs.curve.is_disturbed:
            _log.warning(DISTURBED)

    def _new_policy(self, full: Setting, temp: float) -> Policy:
        known = self._experiences.get(experience_key(full, temp))
        if known is not None:
            self._bases[full, temp] = known, 0, 0
        elif brought := nearest(experience_of(self._drafter), temp):
            known = brought.within(full)
        return Policy(
            full,
            self._costs,
            self._draft_costs,
            known and known.calibration(),
            known.samples if known else (),
            looks(self._drafter),
            searches(self._drafter),
        )

    def _merged(self, stored: Profile | None, context: int) -> Profile:
        experiences = dict(stored.experiences) if stored else {}
        for place, policy in self._policies.items():
            key = experience_key(*place)
            base, rounds, added = self._bases.get(place, (None, 0, 0))
            experiences[key] = merged(experiences.get(key), policy, base, rounds, added)
            self._bases[place] = (
                Experience.of(policy),
                policy.calibration.rounds,
                policy.samples.added,
            )
        is_usable = stored is not None and not stored.curve.is_disturbed
        curve = stored.curve if is_usable else self._costs.curve
        for each in self._costs.curve.contexts:
            is_near = each / LONGER <= context <= LONGER * max(each, SHORT)
            if is_near or each not in curve.contexts:
                curve = curve.with_context(each, self._costs.corrected(each))
        drafts = {**(stored.drafts if stored else {}), **self._draft_costs.corrected()}
        summary = stored.summary if stored else {}
        return Profile(self._identity, curve, drafts, experiences, summary)


def knowledge_of(target: Target, drafter: Drafter) -> Knowledge:
    """What this process knows of them; kept with the drafter."""
    known = getattr(drafter, "_redrafter_knowledge", None)
    if known is None or known.target is not target:
        known = drafter._redrafter_knowledge = Knowledge(target, drafter)
    return known


def _with_context(curve: CostCurve | None, context: int, seconds: dict[int, float]) -> CostCurve:
    if curve is not None:
        return curve.with_context(context, seconds)
    rows = sorted(seconds)
    return CostCurve([context], rows, [[seconds[n] for n in rows]])


def looks(drafter: Drafter) -> bool:
    """Whether a drafter, or one of a union, finds something without a search."""
    return any(map(_needs_no_search, getattr(drafter, "members", [drafter])))


def searches(drafter: Drafter) -> bool:
    """Whether a drafter, or one of a union, searches."""
    return not all(map(_needs_no_search, getattr(drafter, "members", [drafter])))


def _needs_no_search(drafter: Drafter) -> bool:
    return getattr(drafter, "needs_no_search", False)


def experience_of(drafter: Drafter) -> dict[float, Experience]:
    """What a drafter, or the first of its members that does, brings of its own, by temperature."""
    own = getattr(drafter, "experience", None)
    if own:
        return own
    members = getattr(drafter, "members", getattr(drafter, "levels", ()))
    return next(filter(None, map(experience_of, members)), {})


def nearest(known: dict[float, Experience], temp: float) -> Experience | None:
    """What is known at a temperature, or what the nearest one tells of it."""
    if not known:
        return None
    found = min(known, key=lambda each: abs(each - temp))
    return known[found] if round(found, 1) == temp else known[found].at_another_temperature()


def merged(
    stored: Experience | None, policy: Policy, base: Experience | None, rounds: int, added: int
) -> Experience:
    """What is stored, and what a policy has learned since it had `base` to go on.

    base           what was stored when this process last read or wrote it
    rounds, added  that the policy had seen, and samples that it had taken, then
    """
    mine = Experience.of(policy)
    if stored is None or base is None or stored.predicted.shape != mine.predicted.shape:
        return mine
    faded = Calibration.FADE ** (policy.calibration.rounds - rounds)
    sums = [
        np.maximum(now + faded * (theirs - before), 0)
        for now, theirs, before in (
            (mine.predicted, stored.predicted, base.predicted),
            (mine.accepted, stored.accepted, base.accepted),
        )
    ]
    new = policy.samples.added - added
    samples = [*stored.samples, *mine.samples[len(mine.samples) - new :]][-Samples.MOST :]
    return Experience(mine.full, *sums, samples)
