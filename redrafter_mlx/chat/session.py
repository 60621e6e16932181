"""A chat: takes lines, which are commands or messages, and answers them."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from redrafter_mlx.chat.answers import Answer, Asker, counted
from redrafter_mlx.chat.commands import COMMANDS, KEYS, WITH_ARGUMENT, parse
from redrafter_mlx.chat.conversation import Conversation, Message, load
from redrafter_mlx.chat.screen import Screen
from redrafter_mlx.chat.settings import (
    NONE,
    Settings,
    field_name,
    setting_name,
    shown,
    takes,
    values_of,
)
from redrafter_mlx.chat.terminal import unechoed
from redrafter_mlx.cli import is_text
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading.places import expanded

LEAVE = "Ctrl-D or /quit leaves"
MOST_DEPTHS = 8
"""How many depths of drafts /stats shows; Max-Gram may draft many more."""
SUMMED = ("generation_tokens", "rounds", "decode_seconds", "prompt_tokens", "cached_tokens")
"""The statistics of answers that /stats adds up."""


@dataclass
class Chat:
    """A conversation, its settings, and the means to ask the model.

    model  name of the model, for saved files
    """

    asker: Asker
    screen: Screen
    model: str
    settings: Settings = field(default_factory=Settings)
    conversation: Conversation = field(default_factory=Conversation)
    last: Answer | None = None
    _file: Path | None = None
    _sums: Counter = field(default_factory=Counter)  # of SUMMED, and the number of answers
    _again: int = 0
    _asked: tuple[list[Message], Settings] | None = None  # what `last` answered, if not stopped
    _note: str = ""
    _knows_marks: bool = False

    def talk(self, read: Callable[[], str]) -> None:
        """Take what is typed until the input ends; errors are shown, and the chat goes on."""
        while True:
            try:
                typed = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.screen.note(LEAVE)
                continue
            try:
                if not self.take(typed):
                    return
            except KeyboardInterrupt:  # before the answer began
                self.screen.note("stopped")
            except (UserError, OSError, RuntimeError) as error:
                self.screen.error(" ".join(str(error).split()) or type(error).__name__)

    def answer_all(self, lines: Iterable[str]) -> None:
        """Take lines until they end, an error occurs or Ctrl-C is pressed, even in an answer."""
        for line in lines:
            if not self.take(line):
                return
            if self.last is not None and self.last.interrupted:
                raise KeyboardInterrupt

    def take(self, typed: str) -> bool:
        """One message or command; False if it was the last."""
        if not is_text(typed):
            raise UserError("the message is not UTF-8: set the terminal to UTF-8")
        if not typed.strip():
            return True
        line = parse(typed)
        if line.command is None:
            self._ask(self.conversation.asked(line.text))
        elif line.command == "quit":
            return False
        else:
            getattr(self, f"_{line.command}")(line.text)
        return True

    def complete(self, before: str) -> tuple[list[str], int]:
        """Completions at the cursor, and how many characters before it they replace."""
        word = before.rpartition(" ")[2]
        if before.startswith("/set "):
            parts = before.split(" ")
            if len(parts) == 2:
                known = [f"{setting_name(f.name)} " for f, _ in self.settings]
            else:
                found = [f for f, _ in self.settings if f.name == field_name(parts[1])]
                known = values_of(found[0]) if found and len(parts) == 3 else []
        elif before.startswith("/") and word == before:
            known = [f"/{name}{' ' * (name in WITH_ARGUMENT)}" for name in COMMANDS]
        else:
            known = []
        return [name for name in known if name.startswith(word)], len(word)

    def open(self, path: Path) -> None:
        """Continue a saved chat with its settings; UserError, and no change, if the file is bad."""
        conversation, model, values = load(path)
        try:
            self.settings = self.settings.with_all(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        self.conversation, self._file, self._asked = conversation, path, None
        said = counted(len(conversation.messages), "message")
        other = f", which were with {model}" if model not in ("", self.model) else ""
        self.screen.note(f"{said} from {path}{other}")

    def _ask(self, messages: list[Message], again: int = 0) -> None:
        prompt = self.asker.prompt(self.conversation.with_system(messages))
        self.conversation.messages, self._again, self._asked = messages, again, None
        with unechoed():
            answer = self.asker.ask(prompt, self.settings, again)
        self.last = answer
        self._sums += Counter({name: answer.stats.get(name, 0) for name in SUMMED}, answers=1)
        if answer.is_answer:
            said = {"role": "assistant", "content": answer.text}
            self.conversation.messages = [*messages, said]
        if answer.finish_reason != "cancelled":
            self._asked = self.conversation.with_system(messages), self.settings
        self._tell_of(answer)

    def _tell_of(self, answer: Answer) -> None:
        summary = answer.summary()
        if self.settings.chat.show_drafts and answer.stats.get("generation_tokens"):
            share = sum(answer.stats["accepted_at"]) / answer.stats["generation_tokens"]
            summary += f", {share:.0%} drafted"
            summary += "" if self._knows_marks else f" ({self.screen.legend})"
            self._knows_marks = True
        notes = [summary]
        if answer.finish_reason == "length":
            if answer.room is not None and answer.context >= answer.room:
                notes.append(f"the model knows only {answer.room:,} positions: /undo or /new")
            else:
                most = self.settings.chat.max_tokens
                notes.append(
                    f"the answer was cut at max-tokens {most}: /set max-tokens N, then /retry"
                )
        if not answer.is_answer:
            notes.append("no answer was kept: /retry asks again, a new message replaces this one")
        if answer.note and answer.note != self._note:
            notes.append(answer.note)
        self._note = answer.note or self._note
        self.screen.note("\n".join(notes), gap=True)

    def _help(self, _: str) -> None:
        rows = [(f"/{name} {argument}", text) for name, (argument, text) in COMMANDS.items()]
        self.screen.tell(_table([*rows, ("", ""), *KEYS]))

    def _new(self, _: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        self._file = self._asked = None
        self.screen.note("a new conversation")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text.lower() == NONE else text
        self.screen.tell(f"system: {self.conversation.system or NONE}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            self._list_settings()
            return
        if value.strip():
            self.settings = self.settings.put_text(name, value)
        f, now = self.settings.find(name)
        told = f"{setting_name(f.name)} {shown(now)}"
        if not value.strip():
            told += f" ({f.metadata['help']}; takes {takes(f)}; default {shown(f.default)})"
        self.screen.tell(told)

    def _list_settings(self) -> None:
        """One line for each, with a star at those that differ from their defaults."""
        changed = self.settings.changed()
        rows = [
            (
                f"{'*' if f.name in changed else ' '} {setting_name(f.name)} {shown(value)}",
                f.metadata["help"],
            )
            for f, value in self.settings
        ]
        self.screen.tell(_table(rows, most_lines=1))

    def _retry(self, _: str) -> None:
        messages = self.conversation.asked_again()
        same = self._asked == (self.conversation.with_system(messages), self.settings)
        if same and self.settings.sampling.temp == 0:
            raise UserError("at temp 0 the same words would come again: /set temp 0.7, then /retry")
        self._ask(messages, self._again + 1 if same else 0)

    def _undo(self, _: str) -> None:
        text = " ".join(self.conversation.undo().split())
        self._asked = None
        self.screen.note(f"taken back: {textwrap.shorten(text, 60, placeholder=' ...')}")

    def _save(self, name: str) -> None:
        if not name and self._file is None:
            raise UserError("/save needs the name of a file")
        path = expanded(name) if name else self._file
        self.conversation.save(path, self.model, self.settings.as_dict())
        self._file = path
        said = counted(len(self.conversation.messages), "message")
        self.screen.note(f"{said} saved in {path}")

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load needs the name of a file that /save wrote")
        self.open(expanded(name))

    def _stats(self, _: str) -> None:
        self.screen.tell(_report(self.last, self._sums))


def _report(last: Answer | None, sums: Counter) -> str:
    if last is None:
        return "there is no answer yet"
    room = "" if last.room is None else f" of {last.room:,}"
    tokens, rounds, seconds, prompts, cached = (sums[name] for name in SUMMED)
    speed = tokens / seconds if seconds else 0.0
    each = tokens / rounds if rounds else 0.0
    rows = [
        *_rows_of(last),
        ("context", f"{last.context:,}{room} tokens"),
        ("all answers", f"{sums['answers']:,}: {counted(tokens, 'token')}, {speed:.1f} tokens/s, "
         f"{each:.2f} tokens a round"),
        ("all prompts", f"{prompts:,} tokens, {cached:,} of them cached"),
    ]  # fmt: skip
    return _table(rows)


def _rows_of(last: Answer) -> Iterator[tuple[str, str]]:
    stats = last.stats
    read = f"the rest read at {stats.get('prompt_tps', 0.0):.1f} tokens/s"
    cached = f"{stats.get('cached_tokens', 0):,} of them cached"
    yield "last prompt", f"{stats.get('prompt_tokens', 0):,} tokens, {cached}, {read}"
    yield "last answer", last.summary()
    if stats.get("rounds"):
        yield "rounds", f"{stats['rounds']:,}, {stats['mean_nodes']:.1f} nodes in each"
        depths = stats["accepted_at"]
        shares = " ".join(f"{count / stats['rounds']:.0%}" for count in depths[:MOST_DEPTHS])
        shares += " ..." if len(depths) > MOST_DEPTHS else ""
        yield "accepted", f"{shares or 'nothing'} (of rounds, by depth of the draft token)"
        yield "rule", stats["rule"]
        yield "peak memory", f"{stats['peak_memory']:.2f} GB"
    if last.seed is not None:
        yield "seed", str(last.seed)
    if last.note:
        yield "note", last.note


def _table(rows: Sequence[tuple[str, str]], most_lines: int | None = None) -> str:
    """Two columns, the second as wide as the terminal allows."""
    left = min(max(len(first) for first, _ in rows), 30) + 2
    width = max(shutil.get_terminal_size().columns - left - 1, 30)
    lines = []
    for first, second in rows:
        if len(first) >= left:  # a long list of stop strings, say
            first = f"{first[: left - 5]}...  "
        wrapped = textwrap.wrap(second, width, max_lines=most_lines, placeholder=" ...")
        for head in wrapped or [""]:
            lines.append(f"{first:{left}}{head}".rstrip())
            first = ""
    return "\n".join(lines)
