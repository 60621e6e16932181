"""python -m redrafter_mlx.chat: from a pipe, in a terminal and in a dumb one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from redrafter_mlx.chat.__main__ import main
from redrafter_mlx.machine.storage import CACHE_VARIABLE
from test_generate_command import CHAT, save_target

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "redrafter_mlx.chat"]
COLOURS = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;[0-9;]+|2)m")

PASTING = "\x1b[?2004h"
"""What a terminal is told when a line is about to be read: to say what is pasted."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Models `chat`, which greedily says letters without end, and `plain`, without a template."""
    path = tmp_path_factory.mktemp("tiny")
    save_target(path / "plain")
    save_target(path / "chat", chat_template=CHAT)
    config = json.loads((path / "chat" / "config.json").read_text())
    config["max_position_embeddings"] = 100_000
    (path / "chat" / "config.json").write_text(json.dumps(config))
    return path


def environment(tiny: Path, **variables: str) -> dict[str, str]:
    """With a cache of its own, so that nobody's history is read or written."""
    mine = {CACHE_VARIABLE: str(tiny / "cache"), "REDRAFTER_MLX_BLAS": "off"}
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return (
        kept
        | {"HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        | mine
        | variables
    )


def start(tiny: Path, *words: str, program=PROGRAM) -> subprocess.Popen:
    """The command with pipes, where Ctrl-C is what it is in a terminal."""
    return subprocess.Popen(
        [*program, "--model", str(tiny / "chat"), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(tiny),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def piped(tiny: Path, text: str, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a chat with these lines."""
    process = start(tiny, *words)
    out, err = process.communicate(text.encode(), timeout=120)
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def terminal(tiny):
    """Starts the command in a terminal and waits for the prompt; it is ended afterwards."""
    started = []

    def spawn(*words, **variables):
        child = pexpect.spawn(
            PROGRAM[0],
            [*PROGRAM[1:], "--model", str(tiny / "chat"), *words],
            cwd=ROOT,
            env=environment(tiny, **variables),
            dimensions=(50, 200),
            timeout=60,
            encoding="utf-8",
        )
        child.seen = ""
        child.prompt = "> " if variables.get("TERM") == "dumb" else PASTING
        started.append(child)
        until(child, "leaves")
        until(child, child.prompt)
        return child

    yield spawn
    for child in started:
        child.close(force=True)


def until(child, text: str) -> str:
    """What the terminal shows up to and with a text."""
    child.expect_exact(text)
    child.seen += child.before + child.after
    return child.before


def ended(child) -> int:
    child.expect(pexpect.EOF)
    child.seen += child.before
    child.wait()
    return child.exitstatus


# ---------------------------------------------------------------------------------------------
# Flags


def refused(*words: str | Path) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--no-draft", "--drafter", "demo"], "--no-draft contradicts --drafter demo"),
        (["--no-draft", "--lenience", "2"], "--lenience has no use"),
        (["--chat-template-config", '{"tools": []}'], "cannot set tools"),
        (["--load", "no-such-file.json"], "no-such-file.json: there is no such file"),
        (["--top-p", "7"], "--top-p 7"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--parallel", "0"], "--parallel 0"),
        (["--prompt", "x"], "--help"),
        (["--system", "K\udcfcche"], "--system is not UTF-8"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_wrong_flags_are_one_line(words, told, capsys):
    assert refused(*words) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.parametrize("words", [["--system", "S"], ["--chat-template-config", '{"a": 1}']])
def test_what_needs_a_chat_template_is_told(tiny, words, capsys):
    assert refused("--model", tiny / "plain", *words) == 2
    assert f"{words[0]} needs a chat template" in capsys.readouterr().err


def test_help_says_why_answers_may_be_longer(capsys):
    assert refused("--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "2048" in told
    assert "Ctrl-C ends an answer" in told


# ---------------------------------------------------------------------------------------------
# From a pipe


def test_the_demo_answers_each_line(demo_path):
    done = subprocess.run(
        [*PROGRAM, "--max-tokens", "12", "--show-drafts"],
        input="Name a colour.\n/stats\nAnd\\\nanother one?\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | {"TERM": "dumb"},
    )
    assert (done.returncode, "\x1b" in done.stdout + done.stderr) == (0, False)
    assert len(done.stdout.splitlines()) >= 2
    assert ">" not in done.stdout
    assert "last prompt" in done.stderr
    assert re.search(r"tokens a round, [1-9]\d* cached", done.stderr)


def test_the_same_words_with_drafts_and_without_them(tiny):
    lines = "/set max-tokens 20\nthe end\n/set drafter none\n/new\nthe end\nand\n"
    code, out, err = piped(tiny, lines)
    first, second, third = out.splitlines()
    assert (code, first) == (0, second)
    assert third != second
    assert err.count("20 tokens, ") == 3


def test_an_error_ends_it_with_one_line(tiny):
    code, out, err = piped(tiny, "/set max-tokens 5\nthe end\n/set temp hot\nnever\n")
    assert code == 2
    assert len(out.splitlines()) == 1
    assert err.splitlines()[-1] == (
        "redrafter_mlx.chat: error: temp takes a number, not 'hot'"
    )  # fmt: skip


def test_settings_of_a_file_give_way_to_flags(tiny, tmp_path):
    path = tmp_path / "saved.json"
    lines = f"/set max-tokens 7\n/set top-k 3\nthe end\n/save {path}\n/quit\nnever\n"
    assert piped(tiny, lines, "--system", "a\\b")[0] == 0
    lines = "/retry\n/set max-tokens\n/set top-k\n/system\n"
    code, out, err = piped(tiny, lines, "--load", str(path), "--max-tokens", "9")
    assert (code, len(out.splitlines())) == (0, 1)
    assert "2 messages from" in err
    assert "9 tokens, " in err
    assert "max-tokens 9 (" in err
    assert "top-k 3 (" in err
    assert "system: a\\b" in err


@pytest.mark.parametrize("when", ["in an answer", "between answers"])
def test_ctrl_c_ends_it_with_130(tiny, when):
    process = start(tiny, "--max-tokens", "-1" if when == "in an answer" else "8")
    process.stdin.write(b"the end\n")
    process.stdin.flush()
    if when == "in an answer":
        assert process.stdout.read(5)
    else:
        assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.splitlines()[-1] == b"redrafter_mlx.chat: interrupted"
    assert out.endswith(b"\n") or when == "between answers"


LOADS_FOR_EVER = """
import sys
import redrafter_mlx.chat.__main__ as command

load = command._served

def loads(*how):
    load(*how)
    print("loading", flush=True)
    while True:
        load(*how)

command._served = loads
sys.exit(command.main(sys.argv[1:]))
"""


def test_ctrl_c_ends_the_loading_of_a_model(tiny):
    process = start(tiny, program=[sys.executable, "-c", LOADS_FOR_EVER])
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == [b"redrafter_mlx.chat: interrupted"]


def test_a_reader_that_goes_away_ends_it(tiny):
    process = start(tiny, "--max-tokens", "-1")
    process.stdin.write(b"the end\n")
    process.stdin.flush()
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=60) == 130
    assert b"Traceback" not in process.stderr.read()
    process.stdin.close()


# ---------------------------------------------------------------------------------------------
# In a terminal


def test_ctrl_c_ends_an_answer_and_not_the_chat(terminal):
    chat = terminal("--max-tokens", "-1", "--show-drafts")
    chat.send("the end\r")
    until(chat, PASTING.replace("h", "l"))
    chat.expect(r"[a-z]{3}")
    chat.sendintr()
    until(chat, "stopped")
    until(chat, chat.prompt)
    chat.sendintr()  # with nothing typed
    until(chat, "Ctrl-D or /quit leaves")
    until(chat, chat.prompt)
    chat.send("half a line")
    until(chat, "line")
    chat.sendintr()  # which only wipes that out
    until(chat, chat.prompt)
    chat.send("/stats\r")
    until(chat, "all answers  1:")
    until(chat, chat.prompt)
    chat.sendeof()
    assert ended(chat) == 0
    assert COLOURS.search(chat.seen)


def test_lines_history_and_completion(terminal, tmp_path):
    chat = terminal("--max-tokens", "4")
    path = tmp_path / "kept.json"
    chat.send("one\x1b\rtwo\\\rthree\r")  # Alt-Enter, and a backslash
    until(chat, "4 tokens")
    chat.send("\x1b[200~four\nfive\x1b[201~\r")  # pasted
    until(chat, "4 tokens")
    chat.send(f"/sav\t{path}\r")
    until(chat, "4 messages saved")
    messages = json.loads(path.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["one\ntwo\nthree", "four\nfive"]
    until(chat, chat.prompt)
    chat.send("/quit\r")
    assert ended(chat) == 0
    again = terminal()
    again.send("\x1b[A\x1b[A")  # the line before the last one
    until(again, "kept.json")


def test_no_color(terminal):
    chat = terminal("--max-tokens", "8", "--show-drafts", NO_COLOR="1")
    chat.send("the end\r")
    until(chat, "8 tokens")
    chat.send("/nonsense\r")
    until(chat, "there is no /nonsense")
    until(chat, chat.prompt)
    chat.sendeof()
    assert ended(chat) == 0
    assert not COLOURS.search(chat.seen)


def test_a_dumb_terminal(terminal):
    chat = terminal("--max-tokens", "-1", TERM="dumb")
    chat.send("the\\\n")
    until(chat, ". ")
    chat.send("end\n")
    until(chat, "end\r\n")
    chat.expect(r"[a-z]{3}")
    chat.sendintr()
    until(chat, "stopped")
    until(chat, chat.prompt)
    chat.sendintr()
    until(chat, "leaves")
    chat.send("/nonsense\n")
    until(chat, "there is no /nonsense")
    until(chat, chat.prompt)
    chat.sendeof()
    assert ended(chat) == 0
    assert chat.seen.endswith("\r\n")
    assert "\x1b" not in chat.seen


def test_a_window_may_change_its_size(terminal):
    chat = terminal("--max-tokens", "300", "--prefill-step-size", "64")
    chat.setwinsize(5, 30)
    chat.send("long " * 300 + "\r")
    until(chat, PASTING.replace("h", "l"))
    until(chat, "prompt:")  # of more than a thousand tokens: it is told how far they are read
    chat.setwinsize(40, 120)
    until(chat, "300 tokens")
    until(chat, chat.prompt)
    chat.sendeof()
    assert ended(chat) == 0
