"""What a process knows of a target and a drafter: loaded, measured, learned, and kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial

import numpy as np

from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.machine.storage import CACHE_VARIABLE, one_line
from redrafter_mlx.measuring.measure import time_of_draft, time_of_pass
from redrafter_mlx.measuring.profile import (
    Profile,
    experience_key,
    identify,
    load,
    passes_with_other_drafter,
    update,
)
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import UNEVEN, CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.experience import Experience
from redrafter_mlx.pricing.policy import Policy, Samples
from redrafter_mlx.pricing.survey import Survey, Times
from redrafter_mlx.rounds.round import Context
from redrafter_mlx.target.adapter import Target

_log = logging.getLogger("redrafter_mlx")

LONGER, SHORT = 2, 128
"""What passes cost after a context holds up to LONGER times its tokens, SHORT of them at least."""
SPOT = 8
"""Rows of the tree that stands for all others in a spot check."""
DISTURBED = (
    "something else is using this machine: several rows took longer than one after the other "
    "would, so little or nothing is drafted; it will be measured again"
)


class Knowledge:
    """Of one drafter with one target on this machine.

    Costs and what is known of drafts come from the profile that earlier runs left; what is missing
    is measured in the first rounds. Each temperature has a Policy of its own, and begins with
    what is known at the nearest one, of the profile's or the head's own.

    Other work on the machine makes things take longer, never shorter. So if passes turn out to take
    much less time than was measured, they are measured anew at once; and what is seen while they
    take much more is not kept.
    """

    PAUSE = 8
    """Pause between two surveys, in units of the time that all have taken."""

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
        self._is_kept = True  # False once it could not be written
        self._is_new = False  # whether the curve replaces the profile's
        # under way, by what they are to find out and the context of the first text
        self._surveys: dict[tuple[tuple[Setting, str, tuple[str, ...]], int], Times] = {}
        self._news: list[tuple[int, str]] = []  # to be said once the text is written
        self._looked_at = self._spent = 0.0  # end of the last survey, seconds that all have taken

    @property
    def is_first(self) -> bool:
        """Whether nothing is known yet of what passes cost here."""
        return self._costs is None

    def policy(self, options: DraftOptions, temp: float) -> Policy:
        """The policy for texts at a temperature."""
        full, temp = _full_search(options), round(temp, 1)
        if (full, temp) not in self._policies:
            self._policies[full, temp] = self._new_policy(full, temp)
        return self._policies[full, temp]

    def survey(self, options: DraftOptions, context: Context) -> Survey | None:
        """What a text whose prompt is processed must find out first; None: nothing is missing."""
        curve = self._sound_curve
        missing = [] if self._draft_costs.measured else ["drafts"]
        if curve is None or _is_far_beyond(context.position, curve.contexts[-1]):
            missing.append("passes")
        return self._survey(_full_search(options), "once", missing, context) if missing else None

    def keep(self, context: int) -> None:
        """Store what was learned in the profile, beside what other processes have stored there.

        context  tokens of the text so far
        """
        while self._news:
            _log.log(*self._news.pop(0))
        if not self._is_kept or self._costs is None or self._costs.curve.is_disturbed:
            return
        try:
            update(self._identity, lambda stored: self._merged(stored, context))
            self._is_new = False
        except OSError as error:
            self._is_kept = False
            _log.warning(
                "what was learned cannot be kept: %s; set %s to a writable directory",
                one_line(error), CACHE_VARIABLE,
            )  # fmt: skip

    def look_again(
        self, options: DraftOptions, context: Context, drafter: Drafter
    ) -> Survey | None:
        """What to measure again in the middle of a text whose costs are in doubt.

        A survey that is over says that they were confirmed; None: it is too soon.
        """
        if time.perf_counter() - self._looked_at < self.PAUSE * self._spent:
            return None
        full = _full_search(options)
        if self._costs.is_outdated or self._is_dearer(full, context, drafter):
            return self._survey(full, "again", ["drafts", "passes"], context)
        self._costs.untried.confirm()
        self._draft_costs.untried.confirm()
        return Survey.confirmed()

    def _is_dearer(self, full: Setting, context: Context, drafter: Drafter) -> bool:
        """Whether something untried for long has a known cost far above what it takes now."""
        known = now = 0.0
        if self._costs.untried.is_long:
            rows = min(SPOT, self._costs.curve.rows[-1])
            known += self._costs.at(context.position, rows)[rows]
            now += time_of_pass(self.target, context, rows)
        if self._draft_costs.untried.is_long and searches(self._drafter):
            known += self._draft_costs.of(full)
            now += time_of_draft(self.target, drafter, context, full)
        return known > UNEVEN * now

    @property
    def _sound_curve(self) -> CostCurve | None:
        """What passes cost, unless something disturbed it."""
        curve = self._costs.curve if self._costs else None
        return None if curve is None or curve.is_disturbed else curve

    def _survey(self, full: Setting, often: str, missing: list[str], context: Context) -> Survey:
        """A text's part in finding out what is missing; texts of about its length help it."""
        what = full, often, tuple(missing)
        near = (
            times
            for (other, position), times in self._surveys.items()
            if other == what and not is_far(position, context.position)
        )
        place = what, context.position
        times = next(near, None) or self._surveys.setdefault(place, Times())
        learn = partial(self._learn, often, missing, context.position, self._costs)
        needed = "passes" in missing
        return Survey(full, looks(self._drafter), searches(self._drafter), needed, times, learn)

    def _learn(
        self, often: str, missing: list[str], position: int, known: LiveCosts | None, times: Times
    ) -> None:
        """A survey is over: hand its results to the policies. `known` are the costs before it."""
        self._surveys = {at: each for at, each in self._surveys.items() if each is not times}
        if "drafts" in missing:
            self._draft_costs = LiveDraftCosts(least(self._draft_costs.least(), times.drafts))
        if "passes" in missing:
            is_doubted = often == "again" and self._costs is known
            curve = None if is_doubted else self._sound_curve
            self._costs = LiveCosts(_with_context(curve, position, times.costs))
            self._is_new = self._is_new or is_doubted
        for policy in self._policies.values():
            policy.costs, policy.draft_costs = self._costs, self._draft_costs
        self._looked_at = time.perf_counter()
        self._spent += times.seconds
        what = " and ".join(missing)
        self._news.append(
            (logging.INFO, f"measured {often}, in {times.rounds} rounds, what {what} cost here")
        )
        if self._costs.curve.is_disturbed:
            self._news.append((logging.WARNING, DISTURBED))

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
        summary, drafts = (stored.summary, stored.drafts) if stored else ({}, {})
        if not self._costs.is_troubled:
            drafts = least(drafts, self._believable_drafts(context))
        return Profile(
            self._identity, self._merged_curve(stored, context), drafts, experiences, summary
        )

    def _believable_drafts(self, context: int) -> dict[Setting, float]:
        """Least times of drafts; none if they look so dear that no draft would ever be tried."""
        drafts, plain = self._draft_costs.least(), self._costs.at(context, 1)[1]
        searches = [seconds for setting, seconds in drafts.items() if setting.width]
        is_hopeless = self._draft_costs.is_shunned and max(searches, default=0.0) > plain
        return {} if is_hopeless else drafts

    def _merged_curve(self, stored: Profile | None, context: int) -> CostCurve:
        costs = self._costs
        is_usable = stored is not None and not stored.curve.is_disturbed and not self._is_new
        curve = stored.curve if is_usable else costs.curve
        for each in () if costs.is_outdated or costs.is_troubled else costs.curve.contexts:
            if not is_far(each, context) or each not in curve.contexts:
                curve = curve.with_context(each, costs.corrected(each))
        return curve


def is_far(one: int, other: int) -> bool:
    """Whether passes after these two contexts may differ in what they cost."""
    return _is_far_beyond(one, other) or _is_far_beyond(other, one)


def _is_far_beyond(longer: int, shorter: int) -> bool:
    return longer > LONGER * max(shorter, SHORT)


def knowledge_of(target: Target, drafter: Drafter) -> Knowledge:
    """What this process knows of them; kept with the drafter."""
    known = getattr(drafter, "_redrafter_knowledge", None)
    if known is None or known.target is not target:
        known = drafter._redrafter_knowledge = Knowledge(target, drafter)
    return known


def least(*known: Mapping[Setting, float]) -> dict[Setting, float]:
    """The least known seconds of each setting."""
    settings = {setting for each in known for setting in each}
    return {s: min(each[s] for each in known if s in each) for s in settings}


def _full_search(options: DraftOptions) -> Setting:
    return Setting(options.beam_width, options.beam_length)


def _with_context(curve: CostCurve | None, context: int, seconds: dict[int, float]) -> CostCurve:
    if curve is not None:
        return curve.with_context(context, seconds)
    rows = sorted(seconds)
    return CostCurve([context], rows, [[seconds[n] for n in rows]])


def looks(drafter: Drafter) -> bool:
    """Whether a drafter, or one of a union, finds candidates without a search."""
    return any(map(_needs_no_search, getattr(drafter, "members", [drafter])))


def searches(drafter: Drafter) -> bool:
    """Whether a drafter, or one of a union, searches."""
    return not all(map(_needs_no_search, getattr(drafter, "members", [drafter])))


def _needs_no_search(drafter: Drafter) -> bool:
    return getattr(drafter, "needs_no_search", False)


def experience_of(drafter: Drafter) -> dict[float, Experience]:
    """By temperature, what came with a drafter, or with the first of its members that has it."""
    own = getattr(drafter, "experience", None)
    if own:
        return own
    members = getattr(drafter, "members", getattr(drafter, "levels", ()))
    return next(filter(None, map(experience_of, members)), {})


def nearest(known: dict[float, Experience], temp: float) -> Experience | None:
    """What is known at a temperature, or may be concluded from the nearest one."""
    if not known:
        return None
    found = min(known, key=lambda each: abs(each - temp))
    return known[found] if round(found, 1) == temp else known[found].at_another_temperature()


def merged(
    stored: Experience | None, policy: Policy, base: Experience | None, rounds: int, added: int
) -> Experience:
    """What is stored, and what a policy has learned since it started from `base`.

    base           what was stored when this process last read or wrote it
    rounds, added  rounds that the policy had seen, and samples it had taken, at that time
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
