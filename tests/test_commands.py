"""redrafter-mlx: every command under one name."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from redrafter_mlx import cli
from redrafter_mlx.__main__ import BENCHMARKS, COMMANDS, main


@pytest.fixture(autouse=True)
def called(monkeypatch):
    monkeypatch.setattr(cli, "called_as", "")
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.mark.parametrize("words", [["--help"], []])
def test_it_tells_what_there_is(words, capsys):
    assert main(words) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {name} " in told for name in COMMANDS)


def test_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"redrafter-mlx {version('redrafter-mlx')}\n"


def test_the_benchmarks(capsys):
    assert main(["bench"]) == 0
    assert all(f"\n  {name} " in capsys.readouterr().out for name in [next(iter(BENCHMARKS))])


@pytest.mark.parametrize(
    "words", [[name] for name in COMMANDS if name != "bench"] + [["bench", b] for b in BENCHMARKS]
)
def test_each_calls_itself_what_the_user_called_it(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: redrafter-mlx {' '.join(words)} ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gnerate"], "'gnerate' is not a command; there are: generate, chat, serve"),
        (["bench", "sped"], "'sped' is not a benchmark; there are: speed, drafters"),
    ],
)
def test_wrong_names_are_one_line(words, told, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_wrong_flags_and_exit_codes_are_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "--promt", "x"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("redrafter-mlx generate: error: ")


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "redrafter_mlx", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("redrafter-mlx ")
