"""The chat without a terminal: what lines mean, settings, conversations, files, what is shown."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from redrafter_mlx.chat import settings as settings_module
from redrafter_mlx.chat.answers import Asker
from redrafter_mlx.chat.commands import COMMANDS, Line, goes_on, parse
from redrafter_mlx.chat.conversation import FORMAT, LARGEST, Conversation, load
from redrafter_mlx.chat.screen import DRAFTED, PLAIN, Screen
from redrafter_mlx.chat.session import Chat
from redrafter_mlx.chat.settings import Settings, shown
from redrafter_mlx.chat.terminal import MOST_HISTORY, _history, piped
from redrafter_mlx.config import GROUPS, ChatOptions, GenerationOptions
from redrafter_mlx.engine import Piece, Turn
from redrafter_mlx.engine.request import DEFAULT, Ticket
from redrafter_mlx.engine.request import PLAIN as NO_DRAFTER
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import storage
from test_config import EXAMPLES


def refusal(call, *given, **named) -> str:
    """The one line that a call ends with."""
    with pytest.raises(UserError) as error:
        call(*given, **named)
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------
# Lines


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("hello", Line(None, "hello")),
        ("  hello\n  there ", Line(None, "  hello\n  there ")),
        ("//etc/fstab is a file", Line(None, "/etc/fstab is a file")),
        ("///", Line(None, "//")),
        ("is it /help?", Line(None, "is it /help?")),
        ("/help", Line("help", "")),
        ("/HELP ", Line("help", "")),
        ("/set temp 0.7", Line("set", "temp 0.7")),
        ("/set   temp\t0.7 ", Line("set", "temp\t0.7")),
        ("/save my file.json", Line("save", "my file.json")),
        ("/system Be brief.\nAnd kind.", Line("system", "Be brief.\nAnd kind.")),
    ],
)
def test_what_a_line_means(typed, line):
    assert parse(typed) == line


@pytest.mark.parametrize("typed", ["/", "/ help", "/foo", "/usr/bin/env", "/*\n* a comment\n*/"])
def test_unknown_commands_are_told_with_those_that_exist(typed):
    message = refusal(parse, typed)
    assert all(f"/{name}" in message for name in COMMANDS)
    assert "//" in message


def test_what_follows_a_command_that_takes_nothing_is_told():
    assert "'now'" in refusal(parse, "/quit now")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", False), ("a", False), ("a\\", True), ("a\\\\", False), ("\\", True), ("a\\ ", False)],
)
def test_a_backslash_at_the_end_goes_on(text, expected):
    assert goes_on(text) is expected


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo", ["one", "two"]),
        (b"one\\\ntwo\\\nthree\nfour\n", ["one\ntwo\nthree", "four"]),
        (b"ends in the middle\\\n", ["ends in the middle\n"]),
        (b"\\\n", []),
        (b"x\\\\\ny\n", ["x\\\\", "y"]),
        ("ä\n".encode(), ["ä"]),
    ],
)
def test_a_message_a_line(data, messages):
    assert list(piped(io.BytesIO(data))) == messages


def test_input_that_is_not_utf_8_is_told_with_its_line():
    lines = piped(io.BytesIO(b"fine\nK\xfcche\n"))
    assert next(lines) == "fine"
    message = refusal(next, lines)
    assert "line 2" in message
    assert "0xfc" in message


# ---------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("name", sorted(EXAMPLES))
@pytest.mark.parametrize("named", [str, lambda name: "--" + name.replace("_", "-")])
def test_every_option_of_an_answer_can_be_set_by_its_name_or_its_flags(name, named):
    words, value = EXAMPLES[name]
    text = words[0] if name == "logit_bias" else shlex.join(words)
    found = Settings().put_text(named(name), text)
    assert found.find(name)[1] == value
    assert found.changed() == {name: value}
    assert Settings().put_text(name, shown(value)) == found
    assert found.put_text(name, "default") == Settings()


def test_no_option_of_an_answer_is_left_out():
    known = {f.name for f, _ in Settings()}
    assert known == set(EXAMPLES) | {"show_drafts", "drafter"}
    assert len(GROUPS) == 3


def test_an_answer_may_be_longer_than_those_of_generate():
    assert ChatOptions().max_tokens > GenerationOptions().max_tokens


@pytest.mark.parametrize("word", ["on", "TRUE", "yes"])
def test_switches(word):
    found = Settings().put_text("show-drafts", word)
    assert found.chat.show_drafts is True
    assert found.put_text("show-drafts", "off") == Settings()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("temp", "warm", ["temp takes a number", "'warm'"]),
        ("temp", "-1", ["temp -1", "at least 0"]),
        ("temp", "nan", ["temp", "finite"]),
        ("top-p", "2", ["top-p 2", "0.0 to 1.0"]),
        ("max-tokens", "0", ["max-tokens 0", "-1"]),
        ("max_tokens", "many", ["max-tokens takes a whole number"]),
        ("seed", "1.5", ["seed takes a whole number, or none"]),
        ("budget", "lots", ["budget takes auto or a whole number"]),
        ("budget", "5000", ["budget 5000", "0 to 1024"]),
        ("rule", "none", ["rule takes match, rejection or typical"]),
        ("show-drafts", "maybe", ["show-drafts takes on or off"]),
        ("stop", "'open", ["stop takes words"]),
        ("stop", "''", ["stop", "non-empty"]),
        ("stop", "[1", ["stop takes words"]),
        ("logit-bias", "{", ["logit-bias takes JSON"]),
        ("xtc-special-tokens", "1 x", ["xtc-special-tokens takes whole numbers"]),
        ("kv-bits", "7", ["kv-bits 7"]),
        ("drafter", "medusa", ["drafter takes default, max_gram or none"]),
    ],
)
def test_values_that_are_none_are_told_with_those_that_are(name, text, told):
    message = refusal(Settings().put_text, name, text)
    assert all(part in message for part in told), message
    assert "--" not in message.replace("'--", "")


def test_names_that_are_none_are_told_with_those_that_are():
    message = refusal(Settings().put_text, "tmp", "1")
    assert "'tmp'" in message
    assert all(f.name.replace("_", "-") in message for f, _ in Settings())


@pytest.mark.parametrize("name", ["model", "lenience", "--cache-memory"])
def test_what_only_the_start_can_set_is_told(name):
    assert "start" in refusal(Settings().put_text, name, "1")


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_settings_come_back_from_json(name):
    found = Settings().put(name, EXAMPLES[name][1])
    assert Settings().with_all(json.loads(json.dumps(found.as_dict()))) == found


@pytest.mark.parametrize(
    "values",
    [
        {"temp": "0.7"},
        {"temp": None},
        {"temp": True},
        {"top_p": []},
        {"stop": {"a": 1}},
        {"stop": [[]]},
        {"show_drafts": 1},
        {"rule": ["match"]},
        {"rule": {}},
        {"drafter": 3},
        {"drafter": ["none"]},
        {"budget": "16"},
        {"seed": -1},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"1": "x"}},
        {"logit_bias": [1]},
        {"max_tokens": 10**30, "temp": -1},
        {"beam_width": 1e9},
        {"": 1},
        {"__class__": 1},
    ],
)
def test_bad_settings_of_a_file_are_one_line(values):
    refusal(Settings().with_all, values)


def test_drafters_have_the_names_that_the_engine_gives_them():
    assert {settings_module.DEFAULT, settings_module.NONE} == {DEFAULT, NO_DRAFTER}


# ---------------------------------------------------------------------------------------------
# Conversations and their files


def conversation(*contents: str, system: str = "") -> Conversation:
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation(system, said)


def test_a_message_takes_the_place_of_one_that_was_not_answered():
    assert conversation("a", "b", "c").asked("d") == conversation("a", "b", "d").messages
    assert conversation("a", "b").asked("c") == conversation("a", "b", "c").messages


def test_undo_takes_back_the_last_message_and_what_was_said_to_it():
    said = conversation("a", "b", "c", "d")
    assert said.undo() == "c"
    assert said == conversation("a", "b")
    said = conversation("a", "b", "c")
    assert (said.undo(), said.undo()) == ("c", "a")
    assert "nothing was asked" in refusal(said.undo)


@pytest.mark.parametrize("said", [conversation(), conversation("ä\n/x", "☃\x1b", system="s")])
def test_a_conversation_comes_back_from_its_file(tmp_path, said):
    path = tmp_path / "saved chat.json"
    for _ in range(2):  # over its own file as well
        said.save(path, "demo", {"temp": 0.5})
    assert load(path) == (said, "demo", {"temp": 0.5})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_other_files_are_not_written_over(tmp_path):
    path = tmp_path / "thesis.tex"
    path.write_text("two years of work")
    assert "give another name" in refusal(conversation("a").save, path, "demo", {})
    assert path.read_text() == "two years of work"
    assert "give another name" in refusal(conversation("a").save, tmp_path, "demo", {})
    assert "no directory" in refusal(conversation("a").save, tmp_path / "no" / "x", "demo", {})


def test_a_file_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "chat.json"
    conversation("a").save(path, "demo", {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.Path, "replace", full)
    assert "No space left" in refusal(conversation("b").save, path, "demo", {})
    assert load(path)[0] == conversation("a")
    assert len(list(tmp_path.iterdir())) == 1


MESSAGES = [{"role": "user", "content": "a"}]
HOSTILE = {
    "empty": b"",
    "bytes": bytes(range(256)),
    "half": b'{"redrafter_mlx_chat": 1, "messages": [',
    "deep": b"[" * 100_000,
    "number": b"1" * 10_000,
    "list": b"[]",
    "other": b'{"messages": []}',
    "newer": {FORMAT: 2, "messages": MESSAGES},
    "no messages": {FORMAT: 1},
    "messages": {FORMAT: 1, "messages": "a"},
    "message": {FORMAT: 1, "messages": [["user", "a"]]},
    "role": {FORMAT: 1, "messages": [{"role": "tool", "content": "a"}]},
    "role's type": {FORMAT: 1, "messages": [{"role": {}, "content": "a"}]},
    "late system": {FORMAT: 1, "messages": [*MESSAGES, {"role": "system", "content": "a"}]},
    "twice": {FORMAT: 1, "messages": MESSAGES * 2},
    "content": {FORMAT: 1, "messages": [{"role": "user", "content": ["a"]}]},
    "no content": {FORMAT: 1, "messages": [{"role": "user"}]},
    "more": {FORMAT: 1, "messages": [{"role": "user", "content": "a", "name": "x"}]},
    "surrogate": {FORMAT: 1, "messages": [{"role": "user", "content": "\ud800"}]},
    "model": {FORMAT: 1, "messages": MESSAGES, "model": 7},
    "settings": {FORMAT: 1, "messages": MESSAGES, "settings": []},
    "setting": {FORMAT: 1, "messages": MESSAGES, "settings": {"tmp": 1}},
    "value": {FORMAT: 1, "messages": MESSAGES, "settings": {"top_p": 1, "temp": "hot"}},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_bad_file_is_one_line_and_changes_nothing(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    chat, _ = scripted("x")
    chat.conversation, before = conversation("a", "b"), chat.settings
    assert str(path) in refusal(chat.take, f"/load {path}")
    assert (chat.conversation, chat.settings) == (conversation("a", "b"), before)


@pytest.mark.parametrize("name", ["/dev/zero", "{}", "{}/missing.json", "~nobody-of-that-name/x"])
def test_what_is_no_file_is_not_read(tmp_path, name):
    refusal(scripted("x")[0].take, f"/load {name.format(tmp_path)}")


def test_huge_files_are_not_read(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    assert "64 MiB" in refusal(load, path)


# ---------------------------------------------------------------------------------------------
# What is shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


PIECES = [(DRAFTED, "a"), (DRAFTED, "b"), (PLAIN, "c"), (DRAFTED, ""), (PLAIN, "d")]


def test_drafts_are_green_where_there_is_colour(colours):
    out = Terminal()
    Screen(out, Terminal()).answer(PIECES)
    assert out.getvalue() == "\x1b[32mab\x1b[0mcd"


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb"), ("TERM", "")])
def test_and_in_brackets_where_there_is_none(colours, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    out, err = Terminal(), Terminal()
    screen = Screen(out, err)
    screen.reasoning("\nhm")
    screen.answer(PIECES)
    screen.note("a note")
    screen.error("an error")
    assert out.getvalue() == "[ab]cd\n"
    assert err.getvalue() == "(thinking) hm\n\na note\nan error\n"


def test_nothing_that_is_said_steers_a_terminal(colours):
    out, err = Terminal(), Terminal()
    screen = Screen(out, err)
    screen.answer([(PLAIN, "a\x1b]0;title\x07\r\x9bb\n\tc")])
    screen.error("\x1b[2J")
    assert out.getvalue() == "a␛]0;title␇␍�b\n\tc\n"
    assert err.getvalue() == "\x1b[31m␛[2J\x1b[0m\n"


def test_long_notes_break_between_words(colours, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    err = Terminal()
    Screen(io.StringIO(), err).note(
        "a note of several words\nthat-is-longer-than-any-line-that-there-is"
    )
    expected = "a note of several words\nthat-is-longer-than-any-line-that-there-is"
    assert err.getvalue() == f"\x1b[2m{expected}\x1b[0m\n"
    Screen(io.StringIO(), err).error("word " * 12)
    assert max(map(len, err.getvalue().splitlines()[2:])) <= 30 + len("\x1b[31m")


def test_a_pipe_gets_what_was_said(colours):
    out = io.StringIO()
    Screen(out, io.StringIO()).answer([(PLAIN, "a\x1b\r\n")])
    assert out.getvalue() == "a\x1b\r\n"


def test_whatever_comes_next_begins_a_line(colours):
    both = Terminal()
    screen = Screen(both, both)
    screen.reasoning("so")
    screen.answer([(PLAIN, "it is")])
    screen.end_answer()
    screen.answer([(DRAFTED, "x\n")])
    screen.end_answer()
    screen.note("done")
    faint = "\x1b[2m{}\x1b[0m"
    expected = faint.format("so") + "\n\nit is\n\x1b[32mx\n\x1b[0m" + faint.format("done") + "\n"
    assert both.getvalue() == expected


def test_log_messages_are_notes(colours):
    import logging

    both = io.StringIO()
    screen = Screen(both, both)
    root = logging.getLogger().handlers
    with screen.notes_log():
        screen.answer([(PLAIN, "in the middle")])
        logging.getLogger("redrafter_mlx").warning("of %s", "this")
    assert both.getvalue() == "in the middle\nof this\n"
    assert logging.getLogger().handlers is root


@pytest.mark.parametrize("place", ["pipes", "a file"])
def test_a_note_in_the_middle_breaks_no_line_elsewhere(tmp_path, place):
    """Answers that go into a file stay as they were said, unless the notes go there too."""
    with open(tmp_path / "said", "w+") as file:
        err = os.fdopen(os.dup(file.fileno()), "w") if place == "a file" else io.StringIO()  # 2>&1
        screen = Screen(file, err)
        screen.answer([(PLAIN, "in the ")])
        screen.note("a note")
        screen.answer([(PLAIN, "middle")])
        screen.end_answer()
        screen.note("done")
        notes = "" if place == "a file" else err.getvalue()
        err.close()
    said = (tmp_path / "said").read_text()
    if place == "a file":
        assert said == "in the \na note\nmiddle\ndone\n"
    else:
        assert said == "in the middle\n"
        assert notes == "a note\ndone\n"


# ---------------------------------------------------------------------------------------------
# A chat with a scripted engine


class Letters:
    """A tokenizer of characters, with a template and marks of reasoning."""

    has_chat_template = has_thinking = True
    think_start, think_end = "<think>", "</think>"
    has_tool_calling, structural_markers = False, ()
    response_transitions, response_initial_state = {}, None

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **more):
        if more.get("mood") == "bad":
            raise ValueError("no such mood")
        text = "".join(f"{m['role'][0]}:{m['content']}|" for m in messages)
        return text + ("a:" if add_generation_prompt else "")

    def rfind_think_start(self, tokens):
        return -1

    rfind_think_end = rfind_think_start


class ScriptedEngine:
    """Gives one answer after the other, in rounds of a drafted token and one of its own.

    interrupted  after how many turns somebody presses Ctrl-C; None: never
    """

    is_alive = True

    def __init__(self, *answers, context=None, interrupted=None):
        self.answers, self.requests, self.interrupted = list(answers), [], interrupted
        self.served = SimpleNamespace(tokenizer=Letters(), context=context)

    def submit(self, request, deliver):
        self.requests.append(request)
        ticket = Ticket(request, deliver)
        threading.Thread(target=self._answer, args=(ticket, self.answers.pop(0))).start()
        return ticket

    def _answer(self, ticket, answer):
        request, deliver = ticket.request, ticket.deliver
        if isinstance(answer, Exception):
            deliver(Turn(finish_reason="error", error=answer))
            return
        deliver(Turn(prompt_done=len(request.prompt) - 1))
        seed = request.sampling.seed if request.sampling.temp else None
        most, taken = request.generation.max_tokens, 0
        for turn, text in enumerate(answer[i : i + 2] for i in range(0, len(answer) or 1, 2)):
            if turn == self.interrupted:
                os.kill(os.getpid(), signal.SIGINT)
                assert ticket._cancelled.wait(20)
            if ticket.is_cancelled:
                deliver(Turn(finish_reason="cancelled", stats=self._stats(taken)))
                break
            pieces = [Piece(letter, ord(letter), place == 0) for place, letter in enumerate(text)]
            taken += len(pieces)
            last = "length" if 0 < most <= taken else "stop" if taken == len(answer) else None
            note = "dear passes" if last else ""
            deliver(Turn(pieces, 0, self._stats(taken), None, last, seed=seed, note=note))
            if last:
                break

    def _stats(self, tokens):
        return {
            "generation_tokens": tokens, "generation_tps": 20.0, "tokens_per_round": 2.0,
            "rounds": tokens // 2, "mean_nodes": 3.0, "accepted_at": [tokens // 2],
            "rule": "match", "peak_memory": 1.0, "prompt_tokens": 50, "cached_tokens": 40,
            "prompt_tps": 9.0, "decode_seconds": 0.5,
        }  # fmt: skip

    def prompt(self, place=-1):
        return "".join(map(chr, self.requests[place].prompt))


def scripted(*answers, template=None, **engine):
    """A chat with a scripted engine, and the engine; chat.out and chat.err are what it says."""
    engine = ScriptedEngine(*answers, **engine)
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err)
    chat = Chat(Asker(engine, screen, template or {}), screen, "tiny")
    chat.out, chat.err = out, err
    return chat, engine


def test_a_conversation_is_asked_as_a_whole():
    chat, engine = scripted("one", "two")
    chat.take("/system Be brief.")
    chat.take("a")
    chat.take("//b")
    assert engine.prompt(0) == "s:Be brief.|u:a|a:"
    assert engine.prompt(1) == "s:Be brief.|u:a|a:one|u:/b|a:"
    assert engine.requests[1].marks  # where later prompts may part from it
    assert chat.out.getvalue() == "one\ntwo\n"
    assert "3 tokens, 20.0 tokens/s, 2.00 tokens a round, 40 cached\n" in chat.err.getvalue()
    assert chat.err.getvalue().count("dear passes") == 1  # told once


def test_empty_lines_are_no_messages():
    chat, engine = scripted()
    assert chat.take("")
    assert chat.take(" \n ")
    assert engine.requests == []


def test_drafts_are_marked_when_asked_for():
    chat, _ = scripted("abc", "abc")
    chat.take("/set show-drafts on")
    chat.take("x")
    chat.take("y")
    assert chat.out.getvalue() == "[a]b[c]\n" * 2
    assert chat.err.getvalue().count("33% drafted") == 2
    assert chat.err.getvalue().count("[...]: drafted") == 1
    assert chat.conversation.messages[1]["content"] == "abc"


def test_reasoning_is_set_apart_and_not_kept():
    chat, engine = scripted("<think>hm, so</think>\n\nyes", "no")
    chat.take("/set show-drafts on")
    chat.take("x")
    assert chat.out.getvalue().replace("[", "").replace("]", "") == "yes\n"
    assert "(thinking) hm, so\n\n" in chat.err.getvalue()
    chat.take("y")
    assert engine.prompt() == "u:x|a:yes|u:y|a:"


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said():
    before = signal.getsignal(signal.SIGINT)
    chat, engine = scripted("abcdef", "x", interrupted=2)
    chat.take("a")
    assert signal.getsignal(signal.SIGINT) is before
    assert chat.out.getvalue() == "abcd\n"
    assert "stopped" in chat.err.getvalue()
    chat.take("b")
    assert engine.prompt() == "u:a|a:abcd|u:b|a:"


@pytest.mark.parametrize("interrupted", [0, 2])
def test_ctrl_c_ends_a_pipe(interrupted):
    chat, engine = scripted("abcdef", interrupted=interrupted)
    lines = iter(["a", "never"])
    with pytest.raises(KeyboardInterrupt):
        chat.answer_all(lines)
    assert (len(engine.requests), next(lines)) == (1, "never")


def test_ctrl_c_before_anything_was_said():
    chat, engine = scripted("abcdef", "fine", interrupted=0)
    chat.take("a")
    assert "0 tokens" in chat.err.getvalue()
    assert "/retry" in chat.err.getvalue()
    engine.interrupted = None
    chat.take("/retry")
    assert engine.prompt() == "u:a|a:"
    assert chat.conversation == conversation("a", "fine")


def test_retry_at_temperature_0_is_told_to_be_of_no_use():
    chat, engine = scripted("one", "one")
    assert "nothing was asked" in refusal(chat.take, "/retry")
    chat.take("a")
    assert "/set temp" in refusal(chat.take, "/retry")
    chat.take("/set max-tokens 2")  # anything that is different now
    chat.take("/retry")
    assert engine.prompt() == "u:a|a:"
    assert chat.conversation == conversation("a", "on")
    assert "max-tokens 2" in chat.err.getvalue()


def test_retry_moves_a_given_seed_on():
    chat, engine = scripted("one", "two", "three", "four")
    chat.take("/set temp 1")
    chat.take(f"/set seed {2**64 - 1}")
    chat.take("a")
    chat.take("/retry")
    chat.take("/retry")
    chat.take("b")
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds == [2**64 - 1, 0, 1, 2**64 - 1]
    assert chat.conversation == conversation("a", "three", "b", "four")
    chat.take("/stats")
    assert str(2**64 - 1) in chat.err.getvalue()


def test_new_and_undo():
    chat, engine = scripted("one", "two", "three")
    chat.take("/system S")
    for text in ("a", "b", "/undo", "c"):
        chat.take(text)
    assert engine.prompt() == "s:S|u:a|a:one|u:c|a:"
    assert "taken back: b" in chat.err.getvalue()
    chat.take("/new")
    assert chat.conversation == Conversation("S")
    chat.take("/system none")
    assert chat.conversation == Conversation()


def test_a_full_context_is_told_in_tokens_before_it_begins():
    chat, engine = scripted("a" * 50, "bc", context=30)
    assert "/new" in refusal(chat.take, "x" * 26)  # u:...|a: makes 31 with it
    assert chat.conversation == Conversation()
    chat.take("hello")
    assert engine.requests[-1].generation.max_tokens == 30 - len("u:hello|a:")
    assert "30 of 30 tokens of context" in chat.err.getvalue()
    assert "knows only 30 positions" in chat.err.getvalue()
    message = refusal(chat.take, "more")
    assert "30" in message
    assert "/undo" in message
    chat.take("/undo")
    chat.take("more")
    assert chat.conversation == conversation("more", "bc")


def test_what_the_template_refuses_is_one_line():
    chat, _ = scripted("x", template={"mood": "bad"})
    assert "no such mood" in refusal(chat.take, "a")
    assert chat.conversation == Conversation()


def test_settings_reach_the_request():
    chat, engine = scripted("x")
    for text in ("temp 0.5", "budget 3", "drafter none", "kv-bits 8", "max-tokens -1"):
        chat.take(f"/set {text}")
    chat.take("a")
    (request,) = engine.requests
    assert (request.sampling.temp, request.draft.budget, request.drafter) == (0.5, 3, "none")
    assert (request.generation.kv_bits, request.generation.max_tokens) == (8, -1)


def test_settings_are_shown():
    chat, _ = scripted()
    chat.take("/set top-k 5")
    chat.take("/set")
    lines = chat.err.getvalue().splitlines()
    assert any(line.startswith("* top-k 5 ") for line in lines)
    assert any(line.startswith("  temp 0 ") for line in lines)
    chat.take("/set temp")
    assert "default 0" in chat.err.getvalue().splitlines()[-1]


def test_save_and_load_bring_everything_back(tmp_path):
    path = tmp_path / "chat.json"
    chat, _ = scripted("one")
    chat.take("/system S")
    chat.take("/set temp 0.3")
    chat.take('/set logit-bias {"5": -2}')
    chat.take("a")
    assert "name of a file" in refusal(chat.take, "/save")
    chat.take(f"/save {path}")
    assert path.stat().st_mode & 0o077 == 0, "what was said is the user's own"
    chat.take("/undo")
    chat.take("/save")  # the same one
    other, _ = scripted()
    other.take(f"/load {path}")
    assert (other.conversation, other.settings) == (Conversation("S"), chat.settings)


def test_an_error_of_the_engine_is_told_and_the_chat_goes_on():
    chat, _ = scripted(RuntimeError("out of\nmemory"), KeyError("x"), UserError("no"), "fine")
    typed = iter(["a", "/retry", "/retry", "/nonsense", "/retry", "/quit", "never"])
    chat.talk(lambda: next(typed))
    assert "no answer: out of memory; --debug" in chat.err.getvalue()
    assert "no answer: the key 'x' is missing; --debug" in chat.err.getvalue()
    assert "\nno\n" in chat.err.getvalue()
    assert "/nonsense" in chat.err.getvalue()
    assert chat.out.getvalue() == "fine\n"
    assert next(typed) == "never"


def test_ctrl_c_at_the_prompt_tells_how_to_leave():
    chat, _ = scripted()
    happens = iter([KeyboardInterrupt, EOFError])

    def read():
        raise next(happens)

    chat.talk(read)
    assert "Ctrl-D" in chat.err.getvalue()


def test_ctrl_c_before_an_answer_begins_is_no_reason_to_leave():
    chat, engine = scripted("fine")
    submit, typed = engine.submit, iter(["a", "/retry", "/quit"])

    def interrupted(*given):
        engine.submit = submit
        raise KeyboardInterrupt

    engine.submit = interrupted
    chat.talk(lambda: next(typed))
    assert "stopped" in chat.err.getvalue()
    assert chat.conversation == conversation("a", "fine")


def test_an_engine_that_has_ended_ends_the_wait():
    chat, engine = scripted("x")
    engine.submit = lambda request, deliver: Ticket(request, deliver)
    engine.is_alive = False
    assert "has stopped" in refusal(chat.take, "a")


def test_what_is_not_utf_8_is_not_sent():
    assert "UTF-8" in refusal(scripted()[0].take, "K\udcfcche")


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("/s", ["/system ", "/set ", "/save ", "/stats"]),
        ("/q", ["/quit"]),
        ("/set top", ["top-p ", "top-k "]),
        ("/set rule m", ["match"]),
        ("/set show-drafts ", ["on", "off"]),
        ("/set seed ", ["none"]),
        ("/set bogus ", []),
        ("/set budget auto ", []),
        ("hello /s", []),
        ("", []),
    ],
)
def test_completion(before, words):
    assert scripted()[0].complete(before)[0] == words


# ---------------------------------------------------------------------------------------------
# History


def test_history_is_kept_for_its_owner_alone(tmp_path):
    path = tmp_path / "cache" / "chat_history"
    _history(path).store_string("two\nlines")
    _history(path).store_string("K\udcfcche")
    assert list(_history(path).load_history_strings()) == ["K?che", "two\nlines"]
    assert path.stat().st_mode & 0o077 == 0


def test_the_older_half_of_a_long_history_goes(tmp_path):
    path = tmp_path / "chat_history"
    kept = _history(path)
    for number in range(40):
        kept.store_string(f"{number} " + "x" * (MOST_HISTORY // 32))
    found = [text.split()[0] for text in _history(path).load_history_strings()]
    assert found == [str(number) for number in range(39, 39 - len(found), -1)]
    assert path.stat().st_size <= MOST_HISTORY
    assert path.stat().st_mode & 0o077 == 0


def test_history_does_without_a_place(tmp_path):
    (tmp_path / "file").write_text("")
    kept = _history(Path(tmp_path / "file" / "chat_history"))
    kept.append_string("a")
    assert kept.get_strings() == ["a"]


def test_history_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    kept = _history(tmp_path / "chat_history")
    (tmp_path / "chat_history").unlink()
    (tmp_path / "chat_history").mkdir()
    kept.append_string("a")
    assert kept.get_strings() == ["a"]
