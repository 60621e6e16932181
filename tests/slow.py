"""Which tests wait for CI: writes slow.txt from the times of a whole run.

pytest -m "slow or not slow" --junitxml times.xml && python tests/slow.py times.xml

Cases that take longer than some time wait, but every test keeps its quickest case if that takes at
most `PATIENCE` times as long. The time is chosen so that the rest takes a `SHARE` of the whole run.
`pytest` runs that, `pytest -m slow` the listed cases, and CI both.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

SHARE, PATIENCE = 0.13, 8.0
LIST = Path(__file__).parent / "slow.txt"


def times(path: Path) -> dict[str, dict[str, float]]:
    """Seconds of each case of each test: {file::test: {case: seconds}}."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        file = case.get("classname").replace(".", "/").removeprefix("tests/") + ".py"
        name = case.get("name")
        found[f"{file}::{name.split('[')[0]}"][f"{file}::{name}"] = float(case.get("time"))
    return found


def kept(cases: dict[str, float], longest: float) -> set[str]:
    """The cases of a test that do not wait."""
    quickest = min(cases, key=cases.get)
    found = {name for name, seconds in cases.items() if seconds <= longest}
    return found or ({quickest} if cases[quickest] <= PATIENCE * longest else set())


def slow(found: dict[str, dict[str, float]], share: float = SHARE) -> list[str]:
    """The cases that wait, so that the others take at most a share of the time of all."""
    whole = sum(sum(cases.values()) for cases in found.values())
    low, high = 0.0, whole
    for _ in range(60):
        middle = (low + high) / 2
        total = sum(cases[name] for cases in found.values() for name in kept(cases, middle))
        low, high = (middle, high) if total <= share * whole else (low, middle)
    names = {name for cases in found.values() for name in cases.keys() - kept(cases, low)}
    return sorted(names)


def main() -> int:
    found = times(Path(sys.argv[1]))
    names = slow(found)
    LIST.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    total = sum(sum(cases.values()) for cases in found.values())
    left = sum(cases.get(name, 0.0) for cases in found.values() for name in names)
    print(f"{len(names)} cases wait for CI: {left:.0f} of {total:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
