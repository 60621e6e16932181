"""Which tests wait for CI: writes slow.txt from the times of a whole run.

pytest -m "slow or not slow" --junitxml times.xml && python tests/slow.py times.xml

Every test keeps its quickest cases, at least one, as many as fit into so many seconds for each test
that all of them together take `SECONDS` of one process. The other cases are listed in slow.txt:
`pytest` leaves them out, `pytest -m slow` runs them, and CI runs both.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

SECONDS = 270.0
LIST = Path(__file__).parent / "slow.txt"


def times(path: Path) -> dict[str, dict[str, float]]:
    """Seconds of each case of each test: {file::test: {case: seconds}}."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        file = case.get("classname").replace(".", "/").removeprefix("tests/") + ".py"
        name = case.get("name")
        found[f"{file}::{name.split('[')[0]}"][f"{file}::{name}"] = float(case.get("time"))
    return found


def kept(cases: dict[str, float], seconds: float) -> set[str]:
    """The quickest cases that fit, at least one."""
    taken, total = set(), 0.0
    for name, each in sorted(cases.items(), key=lambda entry: entry[1]):
        total += each
        if taken and total > seconds:
            break
        taken.add(name)
    return taken


def slow(found: dict[str, dict[str, float]], seconds: float = SECONDS) -> list[str]:
    """Cases that are left out so that the others take at most so long."""
    low, high = 0.0, seconds
    for _ in range(40):
        middle = (low + high) / 2
        total = sum(cases[name] for cases in found.values() for name in kept(cases, middle))
        low, high = (middle, high) if total <= seconds else (low, middle)
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
