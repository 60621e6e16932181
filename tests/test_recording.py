"""The animated picture: every word at its place and time, and well-formed."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.recording import COLUMNS, Take, Word, placed, svg

TEXT = ["Cats", " purr", " <loud", "ly>", ".\n", "Dogs", " & wolves", " do not."] + [" word"] * 30


def words():
    return [Word(0.1 * i, text, i % 2 == 1) for i, text in enumerate(TEXT)]


def test_the_text_is_all_there_and_within_its_lines():
    lines: dict[int, str] = {}
    for _, text, line, column in placed(words()):
        assert len(lines.get(line, "")) == column
        lines[line] = lines.get(line, "") + text
        assert len(lines[line].rstrip()) <= COLUMNS
    said = " ".join(text.strip() for _, text in sorted(lines.items()))
    assert said.split() == "".join(TEXT).split()


def test_words_that_tokens_divide_are_not_broken():
    found = {text: line for _, text, line, _ in placed([*words()[:3], words()[3]])}
    assert found[" <loud"] == found["ly>"]


def test_a_picture():
    takes = [Take("plain", words(), "1 token/s"), Take("fast", words()[:9], "2 tokens/s")]
    root = ElementTree.fromstring(svg(takes, "a note & more"))
    space = "{http://www.w3.org/2000/svg}"
    shown = [e for e in root.iter(f"{space}text") if e.get("class") in ("own", "drafted")]
    assert len(shown) == sum(bool(t.strip()) for w in takes for _, t, _, _ in placed(w.words))
    marks = list(root.iter(f"{space}rect"))
    assert sum(mark.get("class") == "mark" for mark in marks) == sum(
        e.get("class") == "drafted" for e in shown
    )
    times = [float(a.get("keyTimes").split(";")[1]) for a in root.iter(f"{space}animate")]
    assert min(times) == 0
    assert max(times) < 1
