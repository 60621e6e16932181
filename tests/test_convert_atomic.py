"""The destination: complete or absent, whatever happens; and how much memory it takes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convert_heads import apple_config, apple_tensors, convert, read, run, same_bits, write_in

ROOT = Path(__file__).parents[1]
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
import redrafter_mlx
from convert import __main__, safetensors
write = safetensors.Writer.write
def slowly(self, name, piece):
    write(self, name, piece)
    print("writing", flush=True)
    time.sleep(60)
safetensors.Writer.write = slowly
sys.exit(__main__.main(sys.argv[1:]))
"""
MEASURED = """
import resource, sys
import redrafter_mlx
from convert.__main__ import main
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
    1 if sys.platform == "darwin" else 1024)
small, large, out, *flags = sys.argv[1:]
assert main(["--input", small, "--output", out + "/small", *flags]) == 0
before = peak()
assert main(["--input", large, "--output", out + "/large", *flags]) == 0
print(peak() - before)
"""


@pytest.fixture
def head(tmp_path) -> Path:
    config = apple_config()
    return write_in(tmp_path / "head", "apple", config, apple_tensors(config))


def slow_run(head: Path, output: Path) -> subprocess.Popen:
    """A conversion that hangs in the middle of the weights."""
    command = [sys.executable, "-c", SLOW, "--input", str(head), "--output", str(output)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    return process


def test_ctrl_c_leaves_nothing(head, tmp_path):
    process = slow_run(head, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) != []
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.endswith("interrupted\n")
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_a_killed_run_leaves_nothing_at_the_destination_and_the_next_one_clears_up(head, tmp_path):
    killed = slow_run(head, tmp_path / "out")
    killed.kill()
    killed.communicate(timeout=30)
    running = slow_run(head, tmp_path / "out")
    try:
        left = [path for path in tmp_path.iterdir() if path.name.startswith(".out.tmp-")]
        assert len(left) == 1, "the running one's; that of the killed one is gone"
        assert not (tmp_path / "out").exists()
        convert(head, tmp_path / "out")
        assert left[0].exists(), "a directory at work was removed"
    finally:
        running.kill()
        running.communicate(timeout=30)
    convert(head, tmp_path / "out", "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "out"]
    assert same_bits(read(tmp_path / "out"), read(head))


def refused(capsys, *words) -> str:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("python -m convert: error: ").rstrip("\n")


def test_what_exists_is_not_overwritten(head, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    convert(head, output)  # an empty directory is no loss
    before = (output / "README.md").stat().st_mtime_ns
    words = ("--input", head, "--output", output)
    message = f"--output {output} exists; give another directory, or --force to replace it"
    assert refused(capsys, *words) == message
    assert (output / "README.md").stat().st_mtime_ns == before
    convert(head, output, "--force", "--dtype", "float16")
    assert not same_bits(read(output), read(head))
    (output / "config.json").unlink()
    message = f"--output {output} is not a model, so --force does not replace it"
    assert refused(capsys, *words, "--force") == message


@pytest.mark.parametrize("how", ["itself", "file", "link", "dot"])
def test_destinations_that_cannot_be(how, head, tmp_path, capsys):
    output = {"itself": head, "file": tmp_path / "f", "link": tmp_path / "l", "dot": ""}[how]
    (tmp_path / "f").write_text("")
    (tmp_path / "l").symlink_to(tmp_path / "elsewhere")
    fault = {
        "itself": f"--output {head} is the input; give another directory",
        "file": f"--output {output} exists and is not a directory; give another one",
        "link": f"--output {output} exists and is not a directory; give another one",
        "dot": "--output is empty; give a new directory",
    }[how]
    assert refused(capsys, "--input", head, "--output", output, "--force") == fault
    assert (head / "config.json").exists()


def test_a_failed_replacement_keeps_the_old_head(head, tmp_path, capsys, monkeypatch):
    output = convert(head, tmp_path / "out")

    def full(self, name, piece):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.safetensors.Writer.write", full)
    words = ("--input", head, "--output", output, "--force")
    message = f"--output {output} cannot be written: No space left on device"
    assert refused(capsys, *words) == message
    assert same_bits(read(output), read(head))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_destination_that_is_read_only(head, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    output = closed / "out"
    message = f"--output {output} cannot be written: Permission denied"
    assert refused(capsys, "--input", head, "--output", output) == message


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A head whose output layer has 200 MB."""
    config = apple_config(h=512, e=1024, vocab=49152, n=1)
    path = tmp_path_factory.mktemp("large")
    return write_in(path, "apple", config, apple_tensors(config))


def test_memory_is_bounded_by_a_block_not_by_the_largest_tensor(large, tmp_path):
    """The promise is 1.5 times the largest tensor; working by blocks stays far below."""
    flags = ["--dtype", "bfloat16", "--quantize", "4"]
    small = apple_config(h=64, e=128)
    small = write_in(tmp_path / "small", "apple", small, apple_tensors(small))
    command = [sys.executable, "-c", MEASURED, small, large, tmp_path / "made", *flags]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    largest = 49152 * 1024 * 4
    extra = int(done.stdout.splitlines()[-1])
    assert extra < 0.75 * largest, f"{extra / 1e6:.0f} MB for a tensor of {largest / 1e6:.0f} MB"
