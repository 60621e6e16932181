"""What was measured about a target and a drafter on this machine, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from redrafter_mlx import blas, device
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.pricing.calibration import Calibration
from redrafter_mlx.pricing.curve import CostCurve, LiveCosts, LiveDraftCosts, Setting
from redrafter_mlx.pricing.policy import Policy
from redrafter_mlx.storage import cache_directory, one_line, write_whole
from redrafter_mlx.target.adapter import Target

FORMAT = 3
_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True)
class Profile:
    """Measured costs and acceptance.

    identity     of what they hold for: machine, mlx, BLAS, model, dtype, drafter
    curve        seconds of passes
    drafts       seconds of drafts by setting; empty without a drafter
    predicted, accepted  sums by source, depth and size of probability, as Calibration holds them
    summary      what the measuring command had to say; nobody's input
    """

    identity: dict[str, str]
    curve: CostCurve
    drafts: dict[Setting, float] = field(default_factory=dict)
    predicted: list[list[list[float]]] = field(default_factory=list)
    accepted: list[list[list[float]]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with a checksum."""
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "curve": self.curve.as_dict(),
            "drafts": [[*setting, seconds] for setting, seconds in sorted(self.drafts.items())],
            "predicted": self.predicted,
            "accepted": self.accepted,
            "summary": self.summary,
        }
        return {**content, "checksum": _checksum(content)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Profile:
        """Raises ValueError, KeyError or TypeError when it is not what `as_dict` made."""
        content = dict(content)
        checksum = content.pop("checksum")
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, this version writes {FORMAT}")
        if checksum != _checksum(content):
            raise ValueError("it was edited or damaged: its checksum is wrong")
        return cls(
            content["identity"],
            CostCurve(**content["curve"]),
            {Setting(w, length): seconds for w, length, seconds in content["drafts"]},
            content["predicted"],
            content["accepted"],
            content["summary"],
        )

    def calibration(self, depths: int) -> Calibration | None:
        """What it knows of acceptance, for searches of as many depths."""
        if not self.predicted:
            return None
        rows = np.minimum(np.arange(depths), len(self.predicted[0]) - 1)
        return Calibration(
            depths, np.array(self.predicted)[:, rows], np.array(self.accepted)[:, rows]
        )


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identify(target: Target, drafter: Drafter | None) -> dict[str, str]:
    """What a measurement of this pair depends on, as words that can be compared."""
    system = f"{platform.system()} {platform.machine()}"
    return {
        "machine": f"{device.chip()}, {system}, {os.cpu_count()} cores",
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "blas": str(blas.preload()),
        "model": f"{target.name} {_fingerprint([target.model])}",
        "dtype": str(target.dtype),
        "drafter": "none" if drafter is None else _drafter_name(drafter),
    }


def _drafter_name(drafter: Drafter) -> str:
    return f"{type(drafter).__name__} {_fingerprint(_modules(drafter))}"


def _modules(thing: Any) -> Iterator[nn.Module]:
    """The networks of a drafter, and those of the drafters that it is made of."""
    if isinstance(thing, nn.Module):
        yield thing
    elif isinstance(thing, Target):
        yield thing.model
    elif isinstance(thing, (list, tuple)):
        for entry in thing:
            yield from _modules(entry)
    elif hasattr(thing, "propose"):
        for _, value in sorted(vars(thing).items()):
            yield from _modules(value)


def _fingerprint(modules: Any) -> str:
    """12 hex digits of names, shapes, types and a corner of each weight."""
    parameters = [entry for module in modules for entry in tree_flatten(module.parameters())]
    corners = [x[(slice(0, 4),) * x.ndim].astype(mx.float32) for _, x in parameters]
    digest = hashlib.sha256()
    values = device.read(*corners) if corners else ()
    for (name, x), corner in zip(parameters, values, strict=True):
        digest.update(f"{name} {x.shape} {x.dtype}".encode())
        digest.update(corner.tobytes())
    return digest.hexdigest()[:12]


def profile_path(identity: dict[str, str]) -> Path:
    """Where the profile of a machine, model and drafter is kept."""
    fixed = [identity[key] for key in ("machine", "device", "model", "dtype", "drafter")]
    name = hashlib.sha256("\n".join(fixed).encode()).hexdigest()[:16]
    return cache_directory() / "profiles" / f"{name}.json"


def save(profile: Profile) -> Path:
    """Write a profile to the user's cache; it appears whole or not at all. OSError if it cannot."""
    path = profile_path(profile.identity)
    write_whole(path, json.dumps(profile.as_dict(), indent=1))
    return path


def load(identity: dict[str, str]) -> Profile | None:
    """The stored profile; None without one, and with one line when it cannot be used."""
    path = profile_path(identity)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        profile = Profile.from_dict(content)
        for key, value in identity.items():
            if profile.identity.get(key) != value:
                raise ValueError(f"its {key} is {profile.identity.get(key)}, here it is {value}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.warning(
            "ignored the profile %s: %s; costs are measured as it goes, "
            "python -m redrafter_mlx.tune makes a new profile",
            path,
            one_line(error),
        )
        return None
    return profile


def passes_with_other_drafter(identity: dict[str, str]) -> CostCurve | None:
    """The newest curve that was measured here for the same model: no drafter changes passes."""
    paths = profile_path(identity).parent.glob("*.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found = Profile.from_dict(json.loads(path.read_text(encoding="utf-8")))
            if found.identity | {"drafter": identity["drafter"]} == identity:
                return found.curve
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # whoever uses that drafter is told
    return None


def policy_for(target: Target, drafter: Drafter, options: DraftOptions, temp: float) -> Policy:
    """What is known about a drafter: of earlier texts of this process, else of a stored profile.

    Without one of this drafter, another drafter's still tells what passes cost. It is kept with the
    drafter. Each temperature has a Policy of its own; they share the costs.
    """
    known = vars(drafter).setdefault("_redrafter_policies", {})
    if "profile" not in known:
        identity = identify(target, drafter)
        known["profile"] = load(identity)
        curve = known["profile"].curve if known["profile"] else passes_with_other_drafter(identity)
        known["costs"] = LiveCosts(curve)
    full = Setting(options.beam_width, options.beam_length)
    key = (*full, round(temp, 1))
    if key not in known:
        profile: Profile | None = known["profile"]
        known[key] = Policy(
            full,
            known["costs"],
            LiveDraftCosts(profile and profile.drafts),
            profile and profile.calibration(full.length - 1),
        )
    return known[key]
