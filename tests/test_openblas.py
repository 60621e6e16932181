"""The OpenBLAS of a wheel under other names: made once, whole or not at all, tried before use."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import openblas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has a fast BLAS")

LOAD = "from redrafter_mlx import blas; print(blas.preload())"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path))
    return tmp_path


def run(program: str = LOAD, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def expect_wheel(process: subprocess.Popen) -> None:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.strip() == f"scipy-openblas32 {openblas.version()}"


def test_symbols_lose_their_prefix(cache):
    library = ctypes.CDLL(str(openblas.kept(openblas.place())))
    assert hasattr(library, "cblas_sgemm")
    assert not hasattr(library, "scipy_cblas_sgemm")
    assert hasattr(library, "openblas_set_num_threads")


def test_two_first_runs_at_once(cache):
    both = [run(), run()]
    for process in both:
        expect_wheel(process)
    assert sorted(path.name for path in openblas.place().iterdir()) == ["libopenblas.so", "sha256"]


def test_a_damaged_copy_is_made_anew(cache):
    library = openblas.kept(openblas.place())
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    expect_wheel(run())
    assert library.read_bytes() == whole


@pytest.mark.parametrize("cache", ["/proc/nowhere", "~nobody-of-this-name/cache"])
def test_a_cache_that_cannot_be_written_to_is_said_and_no_obstacle(cache):
    process = run(REDRAFTER_MLX_CACHE=cache)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.strip() == f"scipy-openblas32 {openblas.version()}"
    assert "made anew by each process, because" in err
    assert len(err.splitlines()) == 1


def test_a_wheel_without_the_library_leaves_nothing_behind(cache, monkeypatch):
    monkeypatch.setattr(openblas, "MODULE", "json")
    with pytest.raises(UserError, match=r"holds no libscipy_openblas\.so"):
        openblas.kept(openblas.place())
    assert [path.suffix for path in openblas.place().parent.iterdir()] == [".lock"]


def test_a_library_that_computes_nothing_is_refused(cache, monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(openblas, "_original", lambda: broken)
    with pytest.raises(UserError, match="patchelf"):
        openblas.kept(openblas.place())
    with pytest.raises(UserError, match="broken"):
        openblas.seconds(str(broken))


def test_wrong_products_are_noticed(monkeypatch):
    """The trial holds products against what they must be."""
    wrong = openblas._TRIAL.replace("right = K", "right = 2 * K")
    monkeypatch.setattr(openblas, "_TRIAL", wrong)
    with pytest.raises(UserError, match="AssertionError"):
        openblas.seconds(str(Path(openblas.kept(openblas.place()))))
