"""--data: what is read, and what is said about lines that cannot be."""

import json

import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.training.questions import Question, read_questions


def write(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def message(role, content):
    return {"role": role, "content": content}


def test_every_kind_of_line_is_read(tmp_path):
    talk = [
        message("system", "Be brief."),
        message("user", " Hi "),
        message("assistant", "forgotten"),
        message("user", "Why?"),
    ]
    path = write(
        tmp_path,
        "\ufeff" + json.dumps({"messages": talk}),
        "",
        json.dumps({"prompt": "Sing", "answer": 3}),
        json.dumps({"turns": ["a", "b"]}) + "\r",
        json.dumps({"text": "Once upon"}),
        json.dumps("a time"),
    )
    assert read_questions(path) == (
        [
            Question(("Hi", "Why?"), system="Be brief."),
            Question(("Sing",)),
            Question(("a", "b")),
            Question(("Once upon",), is_text=True),
            Question(("a time",), is_text=True),
        ],
        0,
    )


def test_a_text_file_holds_texts_between_empty_lines(tmp_path):
    path = write(tmp_path, "One", "text.", "", " ", "Two.", name="data.txt")
    texts = [Question((text,), is_text=True) for text in ("One\ntext.", "Two.")]
    assert read_questions(path) == (texts, 0)


BROKEN = {
    "not JSON": '{"prompt": ',
    "not UTF-8": b'{"prompt": "\xff"}',
    "neither an object nor a string": "[1]",
    "none of messages": '{"question": "x"}',
    "its content is empty or not a text": '{"prompt": 3}',
    "its content is empty or not a text ": '{"prompt": " "}',
    "its content is empty or not a text  ": '{"messages": [{"role": "user"}]}',
    "turns is not a list": '{"turns": "x"}',
    "messages is not a list": '{"messages": ["x"]}',
    "no user turn": '{"messages": [{"role": "assistant", "content": "x"}]}',
    "role 'tool' is none": '{"messages": [{"role": "tool", "content": "x"}]}',
    "not UTF-8 ": '{"prompt": "\\ud800"}',
    "": "[" * 100_000,
}


@pytest.mark.parametrize(("reason", "line"), BROKEN.items())
def test_a_broken_line_is_named_with_its_reason(tmp_path, reason, line):
    path = write(tmp_path, '{"prompt": "good"}', line)
    with pytest.raises(UserError, match="line 2 cannot be used") as told:
        read_questions(path)
    assert reason.strip() in str(told.value)
    assert "--skip-bad" in str(told.value)
    assert "\n" not in str(told.value)
    assert read_questions(path, skip_bad=True) == ([Question(("good",))], 1)


@pytest.mark.parametrize(
    ("count", "named"),
    [(2, "lines 2 and 3 "), (5, "lines 2, 3, 4, 5 and 6 "), (9, "lines 2, 3, 4, 5, 6 and 4 more ")],
)
def test_many_broken_lines_are_counted(tmp_path, count, named):
    path = write(tmp_path, '{"prompt": "good"}', *["{"] * count)
    with pytest.raises(UserError, match=named):
        read_questions(path)


@pytest.mark.parametrize("content", ["", "\n\n", "{\n{"])
def test_a_file_without_a_usable_line_is_an_error_even_when_bad_ones_are_skipped(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match="no usable line"):
        read_questions(path, skip_bad=True)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_questions(path)
