"""--drafter, --rule and their options on the command line, with tiny models."""

import json
import shutil

import pytest

from test_generate_command import (
    TOKENS,
    command,  # noqa: F401
    refused,
    result_of,
    save_target,
    tiny,  # noqa: F401
)

SHORT = ["--max-tokens", "24", "--budget", "16"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model with the same tokenizer, one with other words, and one with another end of text."""
    path = tmp_path_factory.mktemp("small")
    save_target(path / "same")
    for name in ("words", "end"):
        shutil.copytree(path / "same", path / name)
    tokenizer = json.loads((path / "words" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["an"] = vocabulary["an"], vocabulary["the"]
    (path / "words" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((path / "end" / "tokenizer_config.json").read_text())
    config["eos_token"] = TOKENS[0]
    (path / "end" / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_every_kind_of_drafter_gives_the_text_of_plain_decoding(command, tiny, small):  # noqa: F811
    plain = command("--no-draft", *SHORT)[1]
    head = tiny / "drafter"
    for drafter in (
        f"recurrent:{head}",
        "max_gram",
        "auto",
        f"model:{small / 'same'}",
        f"union:[{head},max_gram]",
        f"cascade:[model:{small / 'same'},max_gram]",
        f"cascade:[{head},max_gram]",
    ):
        code, out, err = command("--drafter", drafter, "--check", *SHORT)
        assert (code, out) == (0, plain), drafter
        assert "identical (24 tokens)" in err


def test_a_cascade_with_its_options(command, small):  # noqa: F811
    words = ["--drafter", f"cascade:[model:{small / 'same'},max_gram]", "--cascade-k"]
    words += ["[[3,4],[0,4]]", "--lenience", "3", *SHORT]
    assert command(*words)[1] == command("--no-draft", *SHORT)[1]


def test_the_same_model_as_drafter_is_told(command, tiny, caplog):  # noqa: F811
    code, _, _ = command("--drafter", f"model:{tiny / 'plain'}", *SHORT)
    assert code == 0
    assert "no smaller than the target" in caplog.text


@pytest.mark.parametrize(
    ("name", "named"), [("words", ["token", "'an'", "'the'"]), ("end", ["eos_token", TOKENS[0]])]
)
def test_another_tokenizer_is_refused(command, small, name, named):  # noqa: F811
    message = refused(command("--drafter", f"model:{small / name}"))
    assert all(word in message for word in [*named, str(small / name)])


def test_a_memory_is_kept_from_run_to_run(command, tmp_path):  # noqa: F811
    path = tmp_path / "memory.json"
    words = ["--drafter", "max_gram", "--max-gram-memory", path, "--json", *SHORT]
    first, second = result_of(command(*words)), result_of(command(*words))
    assert first["text"] == second["text"]
    assert second["rounds"] < first["rounds"]
    assert len(json.loads(path.read_text())["texts"]) == 2


def test_a_damaged_memory_is_refused(command, tmp_path):  # noqa: F811
    path = tmp_path / "memory.json"
    path.write_text("{")
    message = refused(command("--drafter", "max_gram", "--max-gram-memory", path))
    assert str(path) in message
    assert path.read_text() == "{"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--drafter", "eagle:x"], ["'eagle:x'", "possible:", "cascade:[A,B,...]"]),
        (["--drafter", "cascade:[max_gram,demo]"], ["put it first"]),
        (["--drafter", "cascade:[model:a/b,max_gram]", "--cascade-k", "[[1]]"], ["2 rows of 2"]),
        (["--drafter", "max_gram", "--lenience", "2"], ["--lenience 2.0 has no use"]),
        (["--drafter", "max_gram", "--lenience", "-1"], ["--lenience -1.0", "at least 1"]),
        (["--no-draft", "--cascade-k", "[[1]]"], ["--cascade-k has no use without a drafter"]),
        (["--no-draft", "--drafter", "max_gram"], ["--no-draft contradicts"]),
        (
            ["--rule", "typical", "--temp", "1", "--check"],
            ["--check", "--rule typical", "--temp 1"],
        ),
        (["--rule", "rejection", "--temp", "1", "--check"], ["--check", "--rule rejection"]),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(command, words, named):  # noqa: F811
    """The model does not even exist."""
    message = refused(command("--model", "./no-such-model", *words))
    assert all(name in message for name in named)


def test_an_unknown_rule_is_refused(command):  # noqa: F811
    code, _, err = command("--rule", "medusa")
    assert code == 2
    assert "--rule" in err
    assert "typical" in err


def test_a_lossy_run_says_so(command, tiny):  # noqa: F811
    words = ["--drafter", tiny / "drafter", "--temp", "0.8", "--seed", "1", *SHORT]
    assert "typical (lossy)" in command(*words, "--rule", "typical")[2]
    assert "typical (lossy)" in command(*words, "--rule", "typical", "--verbose")[2]
    assert result_of(command(*words, "--rule", "typical", "--json"))["rule"] == "typical (lossy)"
    assert "lossy" not in command(*words)[2]
    assert result_of(command(*words, "--rule", "rejection", "--json"))["rule"] == "rejection"
