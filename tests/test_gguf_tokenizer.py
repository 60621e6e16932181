"""Byte-level BPE tokenizers of GGUF files, against other implementations; those refused."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gguf_writer import SPECIAL, TOKENS, TYPES, Gguf, imported, tiny, tiny_metadata, tiny_tensors
from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.file import read_gguf
from redrafter_mlx.gguf.tokenizer import PATTERNS, end_token_ids, gguf_tokenizer, tokenizer_config

ALPHABETS = [
    "abc XYZ \n\t'",
    "0189 ٣½²Ⅷ",
    "éüñßĳΩжЖ",
    "日本한글ไทย",
    "🙂🇫🇷👩",
    '(){}[];=+-*/\\"#_<|>',
]


def random_texts(count: int, words: list[str] = ()) -> list[str]:
    """Strings of letters from everywhere, with some whole words and runs among them."""
    rng = random.Random(0)

    def part() -> str:
        if words and rng.random() < 0.3:
            return rng.choice(words)
        return rng.choice(rng.choice(ALPHABETS)) * (rng.randint(2, 9) if rng.random() < 0.1 else 1)

    return ["".join(part() for _ in range(rng.randint(0, 40))) for _ in range(count)]


def made(tmp_path: Path, gguf: Gguf) -> Tokenizer:
    return gguf_tokenizer(read_gguf(gguf.write(tmp_path / "tiny.gguf")))


# ---------------------------------------------------------------------------------------------
# The demo's tokenizer

CHATML_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# Ids from the merges in the demo's GGUF file, applied by hand-written code.
KNOWN_IDS = [
    ("", []),
    ("The capital of France is Paris.", [504, 3575, 282, 4649, 314, 7042, 30]),
    ("In 2024, 12 users", [788, 216, 34, 32, 34, 36, 28, 216, 33, 34, 3629]),
    ("naïve café — Ærøskøbing", [3546, 46494, 37366, 1841, 44741, 98, 21817, 5746, 21817, 7519]),
    ("日本語", [23274, 115, 40993, 179, 120, 248]),
    ("🙂 emoji", [10813, 38887, 649, 33777]),
    (
        "def f(x):\n    return x ** 2\n",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198],
    ),
    ("  leading and   runs \t\n\n of ", [216, 2899, 284, 256, 7313, 216, 197, 1116, 282, 216]),
    ("it's we'll I'd", [269, 506, 392, 3060, 339, 6737]),
    ("١٢ ½ Ⅷ ²", [164, 111, 164, 112, 216, 16738, 216, 173, 223, 117, 216, 19133]),
    ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
]


@pytest.fixture(scope="module")
def demo_tokenizer(demo_path):
    return AutoTokenizer.from_pretrained(demo_path)


@pytest.mark.parametrize(("text", "ids"), KNOWN_IDS)
def test_known_ids_and_back(demo_tokenizer, text, ids):
    assert demo_tokenizer.encode(text) == ids
    assert demo_tokenizer.decode(ids) == text


class ReferenceBpe:
    """Byte-level BPE by the book: split, then merge the pair of the lowest rank until none is."""

    WORDS = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, directory: Path):
        model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        self.ids = model["vocab"]
        self.ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
        kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
        moved = [byte for byte in range(256) if byte not in kept]
        self.letters = {byte: chr(byte) for byte in kept}
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(moved)}

    def encode(self, text: str) -> list[int]:
        pieces = regex.split(r"(\p{N})", text)
        words = [word for piece in pieces for word in self.WORDS.findall(piece)]
        return [self.ids[part] for word in words for part in self._merge(word)]

    def _merge(self, word: str) -> list[str]:
        parts = [self.letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(
                range(len(parts) - 1),
                key=lambda i: self.ranks.get((parts[i], parts[i + 1]), len(self.ranks)),
            )
            if (parts[best], parts[best + 1]) not in self.ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return parts


def test_random_text_agrees_with_a_reference_bpe(demo_path):
    reference = ReferenceBpe(demo_path)
    tokenizer = Tokenizer.from_file(str(demo_path / "tokenizer.json"))
    for text in random_texts(3000):
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids) == text


def test_special_tokens(demo_tokenizer):
    assert demo_tokenizer.eos_token == "<|im_end|>"
    assert demo_tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"
    assert len(demo_tokenizer) == 49152


@pytest.mark.parametrize(
    ("messages", "system"),
    [
        ([{"role": "user", "content": "Hi"}], CHATML_SYSTEM),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "Be brief.",
        ),
    ],
)
def test_chat_template(demo_tokenizer, messages, system):
    text = demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# ---------------------------------------------------------------------------------------------
# gpt2


def test_a_file_without_chat_template_gets_none(tmp_path):
    destination = imported(tmp_path, tiny())
    assert AutoTokenizer.from_pretrained(destination).chat_template is None


def test_digits_and_words_are_split_before_the_merges(tmp_path):
    destination = imported(tmp_path, tiny())
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert tokenizer.tokenize("hell12 ٣٣") == ["hell", "1", "2", "Ġ", "Ù", "£", "Ù", "£"]
    assert tokenizer.tokenize("e! he") == ["e", "!", "Ġ", "he"]


def test_control_and_user_defined_tokens_are_never_split(tmp_path):
    destination = imported(tmp_path, tiny())
    tokenizer = AutoTokenizer.from_pretrained(destination)
    ids = tokenizer.encode("hell<think><|im_end|>")
    assert ids == [TOKENS.index("hell"), TOKENS.index("<think>"), TOKENS.index("<|im_end|>")]
    # Only control tokens are special: text the user defined is text.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hell<think>"


SPLITS = [
    ("gpt-2", "It's  1234", ["It", "'s", " ", " 1234"]),
    ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
    ("smollm", "It's 12\n\nX", ["It", "'s", " ", "1", "2", "\n", "\n", "X"]),
    (
        "llama-bpe",
        "I'LL (pay) 12345!\n\nNow",
        ["I", "'LL", " (", "pay", ")", " ", "123", "45", "!\n\n", "Now"],
    ),
    ("qwen2", "We've 12  x", ["We", "'ve", " ", "1", "2", " ", " x"]),
    (
        *("gpt-4o", "fooBar's BAZ'LL 12345/\n"),
        ["foo", "Bar's", " BAZ'LL", " ", "123", "45", "/\n"],
    ),
    ("tekken", "fooBar BAZ9/", ["foo", "Bar", " BAZ", "9", "/"]),
    ("deepseek-coder", "f(x)\n 12", ["f", "(", "x", ")", "\n", " ", "1", "2"]),
]


@pytest.mark.parametrize(("name", "text", "words"), SPLITS, ids=[name for name, *_ in SPLITS])
def test_words_by_hand(tmp_path, name, text, words):
    tokenizer = made(tmp_path, tiny(tokenizer__ggml__pre=name))
    split = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == words


@pytest.mark.parametrize("name", PATTERNS)
def test_splits_agree_with_another_regex_engine(tmp_path, name):
    """Words of random text: matches of each pattern, and what lies between them, in turn."""
    pre_tokenizer = made(tmp_path, tiny(tokenizer__ggml__pre=name)).pre_tokenizer
    for text in random_texts(300, ["I'll", "WE'RE", " the", "Foo", "\r\n", "don't"]):
        words = [text] if text else []
        for pattern in PATTERNS[name]:
            words = [part for word in words for part in split(pattern, word)]
        got = [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]
        assert got == words, repr(text)


def split(pattern: str, text: str) -> list[str]:
    ends = [0]
    for match in regex.finditer(pattern, text):
        ends += match.span()
    ends.append(len(text))
    return [text[a:b] for a, b in itertools.pairwise(ends) if a < b]


def test_llama3_takes_a_word_of_the_vocabulary_whole(tmp_path):
    whole = [*TOKENS, "xyz"]
    changes = {"tokenizer.ggml.tokens": whole, "tokenizer.ggml.token_type": [*TYPES, 1]}
    for name, tokens in (("llama-bpe", ["<|im_start|>", "xyz"]), ("qwen2", ["x", "y", "z"])):
        gguf = Gguf(tiny_metadata(**changes, tokenizer__ggml__pre=name), tiny_tensors())
        assert made(tmp_path, gguf).encode("xyz").tokens == tokens


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True])
def test_beginning_and_end_are_added_as_the_file_says(tmp_path, pre, bos, eos):
    changes = {"tokenizer__ggml__add_bos_token": bos, "tokenizer__ggml__add_eos_token": eos}
    directory = imported(tmp_path, tiny(tokenizer__ggml__pre=pre, **changes))
    starts = bos if bos is not None else pre == "llama-bpe"
    expected = [*([1] if starts else []), TOKENS.index("he"), *([2] if eos else [])]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.encode("he") == expected
    assert tokenizer.encode("he", add_special_tokens=False) == [TOKENS.index("he")]
    assert tokenizer.decode(expected, skip_special_tokens=True) == "he"


def test_all_ways_to_end_a_text_are_known(tmp_path):
    changes = {"tokenizer__ggml__eot_token_id": 0, "tokenizer__ggml__eom_token_id": 2}
    directory = imported(tmp_path, tiny(**changes))
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == [2, 0]


# ---------------------------------------------------------------------------------------------
# Refused


def refused(tmp_path: Path, gguf: Gguf) -> str:
    file = read_gguf(gguf.write(tmp_path / "tiny.gguf"))
    with pytest.raises(UserError) as caught:
        (gguf_tokenizer(file), tokenizer_config(file), end_token_ids(file))
    message = str(caught.value)
    assert "tiny.gguf" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "t5"}, "'t5' tokenizer"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"pre": "unheard-of"}, "'unheard-of'"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"pre": ["smollm"]}, "tokenizer.ggml.pre must be a string"),
        ({"eos_token_id": 9999}, "9999"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id"),
        ({"bos_token_id": 9999}, "9999"),
        ({"token_type": TYPES[:-1]}, f"{len(TYPES) - 1} token types"),
        ({"token_type": None}, "tokenizer.ggml.token_type"),
        ({"merges": ["h e", "hell o"]}, "merges"),
        ({"merges": ["h e l"]}, "merges"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"tokens": [*TOKENS[:-1], "he"]}, "'he'"),
        ({"tokens": 7}, "tokenizer.ggml.tokens"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [0.5]}, "1 scores"),
    ],
)
def test_an_unsupported_tokenizer_is_refused_by_name(tmp_path, changes, named):
    metadata = tiny_metadata(**{f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    assert named in refused(tmp_path, Gguf(metadata, {}))


def test_special_tokens_of_the_tiny_file_are_its_first(tmp_path):
    tokenizer = made(tmp_path, tiny())
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
