"""python -m redrafter_mlx.generate: what it prints, and how it fails, on a tiny model."""

import importlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import families
from redrafter_mlx.errors import UserError
from redrafter_mlx.stream import generate as generate_text
from support import random_drafter

ROOT = Path(__file__).parents[1]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
MERGES = [("t", "h"), ("th", "e"), ("a", "n")]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "an"]
VOCABULARY = 300  # a few ids more than the tokenizer has
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if mood is defined %}{{ mood }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------
# A tiny model and drafter


def save_tokenizer(path: Path, chat_template: str | None) -> None:
    """A byte-level BPE tokenizer."""
    vocabulary = {token: id for id, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[-1]}
    if chat_template:
        config["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def build(**config):
    """A random Llama and its config.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, "llama:words", {"vocab_size": VOCABULARY} | config)
        return families.build("llama:words"), families.config("llama:words")


def save_target(path: Path, chat_template: str | None = None):
    """A random model that greedily says nothing but letters, so that no text ends by itself."""
    path.mkdir()
    model, config = build()
    spoken = {TOKENS.index("Ġ" if letter == " " else letter) for letter in LETTERS}
    mask = mx.array([[float(id in spoken)] for id in range(VOCABULARY)])
    model.lm_head.weight = model.lm_head.weight * mask
    save_model(path, model)
    save_config(config, path / "config.json")
    save_tokenizer(path, chat_template)
    return model


def save_drafter(path: Path, model) -> None:
    """A random head in the checkpoint layout."""
    path.mkdir()
    drafter = random_drafter(model)
    drafter.head.save_weights(str(path / "model.safetensors"))
    hidden = drafter.head.rnn_u.weight.shape[0]
    config = {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": drafter.d2t.size,
        "hidden_size": hidden,
        "exit_dim": 2 * hidden,
        "rnn": True,
    }
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Models `plain` and `chat` (with a template), a drafter, and `other_*` for other targets."""
    path = tmp_path_factory.mktemp("tiny")
    save_drafter(path / "drafter", save_target(path / "plain"))
    save_target(path / "chat", chat_template=CHAT)
    for name, config in (("hidden", {"hidden_size": 32}), ("vocab", {"vocab_size": 97})):
        save_drafter(path / f"other_{name}", build(**config)[0])
    return path


@pytest.fixture
def command(tiny, capsys):
    """Runs the command in this process: (words) -> exit code, stdout, stderr."""
    main = importlib.import_module("redrafter_mlx.generate").main

    def run(*words, model="plain", prompt="the end"):
        words = [str(word) for word in words]
        given = ["--model", str(tiny / model)] if "--model" not in words else []
        given += ["--prompt", prompt] if prompt is not None else []
        capsys.readouterr()
        try:
            code = main([*given, *words])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def drafted(tiny) -> list[str]:
    """Flags of a short run with the drafter."""
    return ["--drafter", str(tiny / "drafter"), "--max-tokens", "24"]


def start(tiny: Path, *words: str, **how) -> subprocess.Popen:
    """The command in a process of its own, where Ctrl-C is what it is in a terminal."""
    program = [sys.executable, "-m", "redrafter_mlx.generate", "--model", str(tiny / "plain")]
    return subprocess.Popen(
        [*program, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **how,
    )


def refused(result: tuple[int, str, str]) -> str:
    """The one line on stderr of a run that failed before it printed anything."""
    code, out, err = result
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("redrafter_mlx.generate: error: ")
    return line


def result_of(result: tuple[int, str, str]) -> dict:
    """The JSON object of a run that succeeded."""
    code, out, err = result
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    return json.loads(line)


# ---------------------------------------------------------------------------------------------
# What it prints


def test_the_text_is_that_of_the_python_interface(tiny, command, drafted):
    hub = importlib.import_module("redrafter_mlx.loading.hub")
    model, tokenizer = hub.load(str(tiny / "plain"))
    expected = generate_text(model, tokenizer, "the end", max_tokens=24)
    assert len(expected) >= 24
    code, out, err = command(*drafted)
    assert (code, out) == (0, expected + "\n")
    assert "24 tokens" in err
    assert "tokens per round" in err


def test_the_text_is_the_same_without_a_drafter(command, drafted):
    with_drafter = command(*drafted)
    without = command("--no-draft", "--max-tokens", "24")
    assert (with_drafter[0], without[0]) == (0, 0)
    assert with_drafter[1] == without[1] != ""
    assert "24 rounds" in without[2]


def test_json_holds_text_tokens_and_statistics(tiny, command, drafted):
    found = result_of(command(*drafted, "--json", "--budget", "16"))
    assert set(found) == {
        *("model", "drafter", "text", "tokens", "finish_reason", "seed"),
        *("prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps", "rounds"),
        *("tokens_per_round", "mean_nodes", "accepted_at", "draft_seconds", "verify_seconds"),
        *("decode_seconds", "peak_memory", "rule"),
        *("cached_tokens", "drafted_tokens", "accepted_tokens"),
    }
    assert found["model"] == str(tiny / "plain")
    assert found["drafter"] == str(tiny / "drafter")
    assert found["text"] + "\n" == command(*drafted)[1]
    assert "".join(TOKENS[id] for id in found["tokens"]).replace("Ġ", " ") == found["text"]
    assert found["generation_tokens"] == len(found["tokens"]) == 24
    assert found["prompt_tokens"] == len(["the", " ", "e", "n", "d"])
    assert found["finish_reason"] == "length"
    assert found["seed"] is None
    assert found["mean_nodes"] == 16
    assert found["tokens_per_round"] == pytest.approx(24 / found["rounds"], abs=1e-3)


def test_json_of_plain_decoding_has_no_drafter(command):
    found = result_of(command("--no-draft", "--json", "--max-tokens", "3"))
    assert found["drafter"] is None
    assert (found["mean_nodes"], found["accepted_at"]) == (1, [])


def test_drafting_is_the_default_where_the_model_can(command, monkeypatch, caplog):
    words = ["--json", "--max-tokens", "24"]
    plain = result_of(command("--no-draft", *words))
    found = result_of(command(*words))
    assert (found["drafter"], found["text"]) == ("auto", plain["text"])

    def refuse(*args, **kwargs):
        raise UserError("it cannot verify a tree")

    monkeypatch.setattr("redrafter_mlx.loading.drafters.load_drafter", refuse)
    found = result_of(command(*words))
    assert (found["drafter"], found["text"]) == (None, plain["text"])
    assert "plain decoding, because it cannot verify a tree" in caplog.text
    assert "it cannot verify a tree" in refused(command("--drafter", "auto"))
    assert "it cannot verify a tree" in refused(command("--max-gram-memory", "memory.json"))


@pytest.mark.parametrize("temp", ["0", "0.8"])
def test_check_finds_the_text_of_plain_decoding(command, drafted, temp):
    found = result_of(command(*drafted, "--temp", temp, "--check", "--json"))
    assert found["check"] == {
        "identical": True,
        "tokens": len(found["tokens"]),
        **{"position": None, "drafted": None, "plain": None, "margin": None},
    }
    code, _, err = command(*drafted, "--temp", temp, "--check", "--seed", "4")
    assert code == 0
    assert "check: identical (24 tokens)" in err.splitlines()


def test_check_shows_a_difference(command, drafted, monkeypatch):
    """A replay that is forced to another first token."""
    check = importlib.import_module("redrafter_mlx.check")
    compare = check.compare_with_plain
    monkeypatch.setattr(
        check, "compare_with_plain", lambda tokens, plain: compare([0, *tokens[1:]], plain)
    )
    found = result_of(command(*drafted, "--check", "--json"))
    assert found["check"]["position"] == 0
    assert found["check"]["drafted"] == 0
    assert found["check"]["plain"] == found["tokens"][0]
    assert found["check"]["margin"] > 0
    assert "check: differs at generated token 0: 0 with" in command(*drafted, "--check")[2]


def test_a_seed_gives_the_same_text_again_with_and_without_a_drafter(command, drafted):
    def text(*words):
        return result_of(command("--temp", "1", "--max-tokens", "24", "--json", *words))["text"]

    first = text(*drafted, "--seed", "7")
    assert text(*drafted, "--seed", "7") == first
    assert text("--no-draft", "--seed", "7") == first
    assert text(*drafted, "--seed", "7", "--budget", "0", "--beam-width", "2") == first
    assert text(*drafted, "--seed", "8") != first


def test_accepted_drafts_leave_the_text_as_it_is(command, drafted):
    """So hot that the noise decides, which the drafter knows: it is often right."""
    flags = ("--temp", "8", "--seed", "3", "--json", "--budget", "16")
    found = result_of(command(*drafted, *flags, "--check"))
    plain = result_of(command("--no-draft", "--max-tokens", "24", *flags))
    assert found["tokens"] == plain["tokens"]
    assert found["rounds"] < plain["rounds"]
    assert sum(found["accepted_at"]) > 5
    assert found["check"]["position"] is None


def test_a_seed_that_was_drawn_is_told_and_gives_the_text_again(command, drafted):
    found = result_of(command(*drafted, "--temp", "1", "--json"))
    again = result_of(command(*drafted, "--temp", "1", "--json", "--seed", found["seed"]))
    assert again["tokens"] == found["tokens"]
    code, out, err = command(*drafted, "--temp", "1", "--seed", found["seed"])
    assert (code, out) == (0, found["text"] + "\n")
    assert f"seed {found['seed']}" in err


@pytest.mark.parametrize("draft", [True, False])
def test_a_single_token_can_be_asked_for(tiny, command, draft):
    flags = ["--drafter", tiny / "drafter"] if draft else ["--no-draft"]
    found = result_of(command(*flags, "--max-tokens", "1", "--json"))
    assert len(found["tokens"]) == len(found["text"]) == 1
    assert found["finish_reason"] == "length"


def test_the_text_ends_before_a_stop_string(command, drafted):
    text = result_of(command(*drafted, "--json"))["text"]
    stop = text[10:13]
    found = result_of(command(*drafted, "--json", "--stop", "no such words", stop))
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"
    assert command(*drafted, "--stop", stop)[1] == found["text"] + "\n"


def test_the_begin_of_a_stop_string_at_the_very_end_is_text(command, drafted):
    text = result_of(command(*drafted, "--json"))["text"]
    found = result_of(command(*drafted, "--json", "--stop", text[-2:] + "#"))
    assert (found["text"], found["finish_reason"]) == (text, "length")


def test_the_text_ends_at_an_extra_end_token(command, drafted):
    text = result_of(command(*drafted, "--json"))["text"]
    letter = next(letter for letter in text[5:] if letter != " ")
    found = result_of(command(*drafted, "--json", "--extra-eos-token", letter))
    assert found["text"] == text[: text.index(letter)]
    assert found["finish_reason"] == "stop"
    assert found["tokens"][-1] == TOKENS.index(letter)


def test_verbose_chooses_how_much_is_told(command, drafted):
    reports = {v: command(*drafted, "--verbose", v)[2] for v in ("True", "False")}
    assert reports["False"] == ""
    assert "Peak memory" in reports["True"]
    assert "Peak memory" in command(*drafted, "--verbose")[2]


def test_a_prompt_comes_from_standard_input(command, drafted, monkeypatch):
    expected = command(*drafted, prompt="Grüße,\nthe end")[1]
    data = "Grüße,\nthe end".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    assert command(*drafted, prompt="-")[1] == expected != command(*drafted)[1]


def test_escapes_in_a_prompt_mean_line_breaks_and_tabs(command, drafted):
    assert command(*drafted, prompt=r"a\nb\tc")[1] == command(*drafted, prompt="a\nb\tc")[1]


def test_a_chat_template_is_used_unless_told_otherwise(command):
    def answer(*words, model="chat", prompt="the end"):
        flags = ("--no-draft", "--json", "--max-tokens", "8")
        return result_of(command(*flags, *words, model=model, prompt=prompt))["tokens"]

    written = "<|im_start|>user\nthe end<|im_end|>\n<|im_start|>assistant\n"
    assert answer() == answer(model="plain", prompt=written)
    assert answer("--ignore-chat-template") == answer(model="plain") != answer()
    system = "<|im_start|>system\nbe kind<|im_end|>\n"
    assert answer("--system-prompt", "be kind") == answer(model="plain", prompt=system + written)
    begun = answer("--prefill-response", "an")
    assert begun == answer(model="plain", prompt=written + "an")
    config = '{"mood": "thethe"}'
    assert answer("--chat-template-config", config) == answer(
        model="plain", prompt=written + "thethe"
    )


# ---------------------------------------------------------------------------------------------
# What it refuses


BAD_VALUES = [
    ("--max-tokens", "0"),
    ("--max-tokens", "-2"),
    ("--max-tokens", "many"),
    ("--prefill-step-size", "0"),
    ("--stop", ""),
    ("--temp", "-0.1"),
    ("--temp", "nan"),
    ("--temp", "inf"),
    ("--top-p", "1.5"),
    ("--min-p", "-1"),
    ("--min-tokens-to-keep", "0"),
    ("--top-k", "-1"),
    ("--xtc-probability", "2"),
    ("--xtc-threshold", "0.6"),
    ("--xtc-special-tokens", "x"),
    ("--logit-bias", "{"),
    ("--logit-bias", "[]"),
    ("--logit-bias", '{"the": 1}'),
    ("--repetition-penalty", "-1"),
    ("--repetition-context-size", "0"),
    ("--presence-penalty", "x"),
    ("--presence-context-size", "0"),
    ("--frequency-penalty", "x"),
    ("--frequency-context-size", "0"),
    ("--seed", "-1"),
    ("--seed", str(2**64)),
    ("--beam-width", "0"),
    ("--beam-length", "1"),
    ("--budget", "-1"),
    ("--verbose", "maybe"),
    ("--chat-template-config", "{"),
    ("--chat-template-config", "[]"),
]


@pytest.mark.parametrize(("flag", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_with_its_flag(command, flag, value):
    message = refused(command(flag, value))
    assert flag in message
    assert value in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--speed", "9"], "--speed"),
        (["--max-token", "9"], "--max-token"),
        (["--max-kv-size", "64"], "--max-kv-size cannot be honoured"),
        (["--draft-model", "x"], "--draft-model cannot be honoured"),
        (["--max-kv-size=64"], "leave it out"),
        (["--drafter"], "--drafter"),
    ],
    ids=" ".join,
)
def test_an_unknown_flag_is_refused_by_name(command, words, named):
    assert named in refused(command(*words))


def test_a_missing_prompt_is_refused(command):
    assert "--prompt" in refused(command(prompt=None))


def test_a_drafter_and_none_at_once_are_refused(command, drafted):
    message = refused(command("--no-draft", *drafted))
    assert "--no-draft" in message
    assert "--drafter" in message


@pytest.mark.parametrize("flag", ["--model", "--drafter"])
def test_a_path_that_is_not_there_is_refused_by_name(tiny, command, flag):
    message = refused(command(flag, tiny / "nowhere"))
    assert str(tiny / "nowhere") in message


@pytest.fixture
def broken(tiny, tmp_path) -> Path:
    """A copy of the model in `plain` and the drafter in `drafter`, to damage."""
    for name in ("plain", "drafter"):
        shutil.copytree(tiny / name, tmp_path / name)
    return tmp_path


def test_a_model_without_config_is_refused(broken, command):
    (broken / "plain" / "config.json").unlink()
    message = refused(command("--model", broken / "plain"))
    assert str(broken / "plain") in message
    assert "config.json" in message


def test_a_model_of_unknown_type_is_refused(broken, command):
    path = broken / "plain" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "abacus"}))
    message = refused(command("--model", broken / "plain"))
    assert "abacus" in message
    assert str(broken / "plain") in message


def test_a_model_without_weights_is_refused(broken, command):
    (broken / "plain" / "model.safetensors").unlink()
    assert str(broken / "plain") in refused(command("--model", broken / "plain"))


@pytest.mark.parametrize(("other", "size"), [("hidden", "hidden_size"), ("vocab", "vocab_size")])
def test_a_drafter_for_another_target_is_refused(tiny, command, other, size):
    message = refused(command("--drafter", tiny / f"other_{other}"))
    assert f"other_{other} was made for another target: its {size}" in message


def test_a_truncated_drafter_is_refused_by_its_file(broken, command):
    path = broken / "drafter" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = refused(command("--drafter", broken / "drafter"))
    assert f"{path}: is not a complete safetensors file" in message


def test_a_pickled_drafter_is_refused_by_its_file(broken, command):
    path = broken / "drafter" / "model.safetensors"
    path.write_bytes(pickle.dumps({"weight": 1}, protocol=2))
    assert f"{path}: is a pickled PyTorch file" in refused(command("--drafter", path.parent))


def test_standard_input_that_is_not_utf_8_is_refused(command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait")))
    message = refused(command("--no-draft", prompt="-"))
    assert "not UTF-8" in message
    assert "byte 3 is 0xe9" in message


def test_an_argument_that_is_not_utf_8_is_refused(command):
    """Python hands on such bytes as lone surrogates."""
    message = refused(command("--no-draft", prompt=os.fsdecode(b"caf\xe9")))
    assert "--prompt" in message


@pytest.mark.parametrize("model", ["plain", "chat"])
def test_an_empty_prompt_is_refused(command, model):
    message = refused(command("--no-draft", "--ignore-chat-template", prompt="", model=model))
    assert "the prompt is empty" in message


@pytest.mark.parametrize(
    "words",
    [
        ["--system-prompt", "be kind"],
        ["--prefill-response", "an"],
        ["--chat-template-config", '{"mood": "x"}'],
    ],
    ids=lambda words: words[0],
)
def test_what_needs_a_chat_template_is_refused_without_one(command, words):
    for result in (command(*words), command(*words, "--ignore-chat-template", model="chat")):
        message = refused(result)
        assert words[0] in message
        assert "chat template" in message


def test_a_chat_template_that_raises_is_told_in_one_line(broken, command):
    template = "{{ raise_exception('no system messages, please') }}"
    save_tokenizer(broken / "plain", template)
    message = refused(command("--model", broken / "plain"))
    assert "no system messages, please" in message


def test_arguments_that_a_chat_template_cannot_take_are_refused(command):
    message = refused(command("--chat-template-config", '{"tokenize": true}', model="chat"))
    assert "--chat-template-config" in message


def test_an_end_token_that_is_no_token_is_refused(command):
    message = refused(command("--no-draft", "--extra-eos-token", "no such token"))
    assert "no such token" in message


@pytest.mark.parametrize("id", [VOCABULARY, 10**30, -1])
def test_a_bias_on_an_id_beyond_the_vocabulary_is_refused(command, id):
    bias = json.dumps({str(id): 1.0})
    message = refused(command("--no-draft", "--max-tokens", "2", "--logit-bias", bias))
    assert "--logit-bias" in message
    assert str(id) in message


def test_debug_hands_on_the_exception(command):
    with pytest.raises(UserError, match="--top-p 7"):
        command("--debug", "--top-p", "7")


# ---------------------------------------------------------------------------------------------
# In a process of its own


def test_a_process_reads_its_input_and_ends_with_0(tiny, command, drafted):
    out, err = start(tiny, "--prompt", "-", *drafted).communicate(b"the end", timeout=60)
    code, expected, _ = command(*drafted)
    assert (out.decode(), code) == (expected, 0)
    assert b"24 tokens" in err


def test_a_process_that_fails_ends_with_2_and_one_line(tiny):
    process = start(tiny, "--prompt", "x", "--drafter", str(tiny / "other_vocab"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    (line,) = err.decode().splitlines()
    assert "vocab_size" in line


def test_debug_shows_the_traceback(tiny):
    process = start(tiny, "--prompt", "x", "--top-p", "7", "--debug")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"BLAS: " in err  # the log's details
    assert b"Traceback" in err
    assert b"--top-p 7" in err


@pytest.mark.parametrize("draft", [True, False])
def test_ctrl_c_ends_the_text_and_leaves_the_statistics(tiny, command, draft):
    flags = ["--drafter", str(tiny / "drafter")] if draft else ["--no-draft"]
    process = start(tiny, "--prompt", "the end", *flags, "--max-tokens", "-1")
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    text = (first + rest).decode()
    assert process.returncode == 130
    assert text.startswith(command(*flags, "--max-tokens", "20")[1].removesuffix("\n"))
    assert text.endswith("\n")
    assert "tokens per round" in err.decode()
    assert b"Traceback" not in err
