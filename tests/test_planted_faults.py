"""The planted faults can still be planted; `python tests/planted_faults.py` plants them."""

from __future__ import annotations

import pytest

from planted_faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_place_is_there_once(fault):
    assert (ROOT / fault.path).read_text(encoding="utf-8").count(fault.right) == 1
    assert fault.right != fault.wrong
    assert all((ROOT / "tests" / name).exists() for name in fault.first)
