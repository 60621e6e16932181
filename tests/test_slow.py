"""Which cases wait for CI: every test keeps one, and the list names tests that exist."""

from __future__ import annotations

import re

from slow import LIST, kept, slow


def test_every_test_keeps_its_quickest_case():
    assert kept({"a": 9.0, "b": 7.0}, 1.0) == {"b"}
    assert kept({"a": 0.4, "b": 0.5, "c": 0.6}, 1.0) == {"a", "b"}


def test_the_quickest_cases_fill_the_time():
    found = {
        "one": {f"one[{i}]": 1.0 for i in range(10)},
        "two": {f"two[{i}]": 0.1 for i in range(10)},
        "three": {"three": 4.0},
    }
    left = slow(found, 8.0)
    total = sum(s for cases in found.values() for name, s in cases.items() if name not in left)
    assert 7 <= total <= 8
    assert all(name.startswith("one") for name in left)


def test_the_list_names_tests_that_exist():
    assert LIST.exists()
    sources = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        file, test = re.fullmatch(r"(test_\w+\.py)::(\w+)(?:\[.*\])?", line).groups()
        if file not in sources:
            sources[file] = (LIST.parent / file).read_text(encoding="utf-8")
        assert f"def {test}(" in sources[file], line
