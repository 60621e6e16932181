"""What was measured about a target and a drafter on this machine, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
from filelock import FileLock

from redrafter_mlx.drafters.protocol import Drafter
from redrafter_mlx.machine.storage import cache_directory, one_line, write_whole
from redrafter_mlx.pricing.curve import CostCurve, Setting
from redrafter_mlx.pricing.experience import UNUSABLE, Experience
from redrafter_mlx.target import fingerprint
from redrafter_mlx.target.adapter import Target

FORMAT = 4
_log = logging.getLogger("redrafter_mlx")


@dataclass(frozen=True)
class Profile:
    """Measured costs and acceptance.

    identity     of what they hold for: machine, mlx, BLAS, model, dtype, drafter
    curve        seconds of passes
    drafts       seconds of drafts by setting; empty without a drafter
    experiences  what is known of drafts, by search and temperature (`experience_key`)
    summary      what the measuring command concluded; for people, never read back
    """

    identity: dict[str, str]
    curve: CostCurve
    drafts: dict[Setting, float] = field(default_factory=dict)
    experiences: dict[str, Experience] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with a checksum."""
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "curve": self.curve.as_dict(),
            "drafts": [
                [*setting, float(f"{seconds:.6g}")]
                for setting, seconds in sorted(self.drafts.items())
            ],
            "experiences": {key: each.as_dict() for key, each in sorted(self.experiences.items())},
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
            {key: Experience.from_dict(each) for key, each in content["experiences"].items()},
            content["summary"],
        )


def experience_key(full: Setting, temp: float) -> str:
    """The name under which a profile keeps what it knows of a search at a temperature."""
    return f"{full.width}x{full.length} at {temp:.1f}"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def identify(target: Target, drafter: Drafter | None) -> dict[str, str]:
    """What a measurement of this pair depends on, as text that can be compared."""
    return {
        **fingerprint.conditions(),
        "model": f"{target.name} {fingerprint.of_weights([target.model])}",
        "dtype": str(target.dtype),
        "drafter": "none" if drafter is None else _drafter_name(drafter),
    }


def _drafter_name(drafter: Drafter) -> str:
    return f"{type(drafter).__name__} {fingerprint.of_weights(_modules(drafter))}"


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


def profile_path(identity: dict[str, str]) -> Path:
    """Where the profile of a machine, model and drafter is kept."""
    fixed = [identity[key] for key in ("machine", "device", "model", "dtype", "drafter")]
    name = hashlib.sha256("\n".join(fixed).encode()).hexdigest()[:16]
    return cache_directory() / "profiles" / f"{name}.json"


def save(profile: Profile) -> Path:
    """Write a profile to the user's cache; it appears whole or not at all. OSError if it cannot."""
    return update(profile.identity, lambda stored: profile)


def update(identity: dict[str, str], change: Callable[[Profile | None], Profile]) -> Path:
    """Write what `change` makes of the stored profile; other processes wait meanwhile.

    Raises OSError if it cannot.
    """
    path = profile_path(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        changed = change(load(identity, is_told=False))
        write_whole(path, json.dumps(changed.as_dict(), separators=(",", ":")))
    return path


def load(identity: dict[str, str], is_told: bool = True) -> Profile | None:
    """The stored profile; None if there is none, or if it cannot be used.

    is_told  whether to log why it cannot be used
    """
    path = profile_path(identity)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        profile = Profile.from_dict(content)
        for key, value in identity.items():
            if profile.identity.get(key) != value:
                raise ValueError(f"its {key} is {profile.identity.get(key)}, here it is {value}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UNUSABLE as error:
        if is_told:
            _log.warning("ignored the profile %s and made a new one: %s", path, one_line(error))
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
        except UNUSABLE:
            continue  # whoever uses that drafter is told
    return None
