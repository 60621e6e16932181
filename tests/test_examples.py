"""The examples run: what they print is what the page promises."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["generate", "drafter"])
def test_an_example_runs(name, demo_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *_, told = done.stdout.strip().splitlines()
    assert "tokens per round" in told


def test_every_example_compiles_and_says_what_it_is():
    for path in EXAMPLES.glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
