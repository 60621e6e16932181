"""Which cases wait for CI: every test keeps one, and the list names tests that exist."""

from __future__ import annotations

import re

from slow import LIST, kept, slow


def test_every_test_keeps_its_quickest_case_unless_that_takes_too_long():
    assert kept({"a": 9.0, "b": 7.0}, 1.0) == {"b"}
    assert kept({"a": 9.0, "b": 8.5}, 1.0) == set()
    assert kept({"a": 0.4, "b": 0.5, "c": 1.6}, 1.0) == {"a", "b"}


def test_what_does_not_wait_takes_its_share():
    found = {
        "one": {f"one[{i}]": 1.0 + i for i in range(10)},
        "two": {f"two[{i}]": 0.1 for i in range(10)},
        "three": {"three": 44.0},
    }
    left = slow(found, 0.1)
    total = sum(s for cases in found.values() for name, s in cases.items() if name not in left)
    assert 5 <= total <= 10
    assert "three" in left
    assert "one[0]" not in left


def test_the_list_names_tests_that_exist():
    assert LIST.exists()
    sources = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        file, test = re.fullmatch(r"(test_\w+\.py)::(\w+)(?:\[.*\])?", line).groups()
        if file not in sources:
            sources[file] = (LIST.parent / file).read_text(encoding="utf-8")
        assert f"def {test}(" in sources[file], line
