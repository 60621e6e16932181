"""Tokenizers of GGUF files: byte-level BPE and SentencePiece, against other implementations."""

from __future__ import annotations

import io
import itertools
import json
import random
from pathlib import Path

import mlx.core as mx
import pytest
import regex
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gguf_writer import SPECIAL, TOKENS, TYPES, Gguf, imported, tiny, tiny_metadata, tiny_tensors
from redrafter_mlx import hub
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
# llama

CORPUS = (
    """
The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.
def main(argument):
        return {"key": [1, 22, 333], "other": argument + 1}
Le cœur a ses raisons que la raison ne connaît point; où êtes-vous allés, naïve ingénue?
Съешь же ещё этих мягких французских булок, да выпей чаю. 日本語の文章と日本の本。
aaaa aaaaaaaa bbbb ababab ======== -------- ........ 1000000 2024 3.14159
"""
    * 4
)


def trained(prefix: bool = True, **options: object) -> sentencepiece.SentencePieceProcessor:
    """A small BPE model with the settings of Llama's."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 520,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": prefix,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=model, **(settings | options)
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_gguf(model: sentencepiece.SentencePieceProcessor, **changes: object) -> Gguf:
    """The model as llama.cpp's converter writes it."""
    ids = range(model.get_piece_size())

    def kind(index: int) -> int:
        if model.is_unknown(index):
            return 2
        if model.is_control(index):
            return 3
        return 6 if model.is_byte(index) else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": [float(model.get_score(index)) for index in ids],
        "tokenizer.ggml.token_type": [kind(index) for index in ids],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return Gguf(tiny_metadata(**metadata), tiny_tensors(vocabulary=len(ids)))


@pytest.fixture(scope="module")
def llama() -> sentencepiece.SentencePieceProcessor:
    return trained()


WORDS = ["the", " the", "ing", " raison", "日本", "aaaa", "    ", "  ", "2024", "====", "ж", "▁"]

TEXTS = [
    "",
    " ",
    "   leading spaces",
    "trailing   ",
    "the quick brown fox",
    "1234567890",
    "naïve œuvre 日本語 Съешь 🙂👩‍👩‍👧 \u0301",
    "\x00\x7f\n\t\r\n",
]


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_sentencepieces(tmp_path, prefix):
    model = trained(prefix)
    gguf = sentencepiece_gguf(model, tokenizer__ggml__add_space_prefix=prefix)
    tokenizer = made(tmp_path, gguf)
    for text in [*TEXTS, *random_texts(3000, WORDS)]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " "), repr(text)


def test_without_byte_fallback_the_rest_is_unknown(tmp_path):
    model = trained(byte_fallback=False, vocab_size=300)
    tokenizer = made(tmp_path, sentencepiece_gguf(model))
    for text in ["the 🙂🙂 fox", "ﷺ", *random_texts(300, WORDS)]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text)


def test_the_imported_tokenizer_is_the_same(tmp_path, llama):
    """Through tokenizer.json and transformers, with the beginning of the sequence."""
    model, tokenizer = hub.load(str(imported(tmp_path, sentencepiece_gguf(llama))))
    assert model(mx.array([tokenizer.encode("the fox")])).shape[-1] == llama.get_piece_size()
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert roles == ("<s>", "</s>", "<unk>")
    assert tokenizer.eos_token_ids == {llama.eos_id()}
    for text in [*TEXTS, *random_texts(300, WORDS)]:
        ids = tokenizer.encode(text)
        assert ids == [llama.bos_id(), *llama.encode(text)], repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")
        detokenizer = tokenizer.detokenizer
        for index in ids[1:]:
            detokenizer.add_token(index)
        detokenizer.finalize()
        assert detokenizer.text == text.replace("▁", " ")


def test_special_tokens_are_found_in_text(tmp_path, llama):
    """llama.cpp's rule: the text behind a special token starts anew, with its own space."""
    tokenizer = made(tmp_path, sentencepiece_gguf(llama))
    ids = tokenizer.encode("the fox</s>the dog", add_special_tokens=False).ids
    assert ids == [*llama.encode("the fox"), llama.eos_id(), *llama.encode("the dog")]


def test_bytes_in_words_are_letters(tmp_path):
    """A token <0x41> stands for a byte; no pieces of text make up that token."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*"<0x41>▁", "<0", "x4", "<0x4", "1>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 266 + [-1.0, -2.0, -3.0, -4.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    }
    tokenizer = made(tmp_path, tiny(**changes))
    assert tokenizer.encode("<0x41>A").tokens == ["<s>", "▁", "<0x4", "1>", "<0x41>"]


def test_users_tokens_are_never_split(tmp_path):
    model = trained(user_defined_symbols=["<think>"])
    index = model.piece_to_id("<think>")
    gguf = sentencepiece_gguf(model)
    gguf.metadata["tokenizer.ggml.token_type"][index] = 4
    tokenizer = made(tmp_path, gguf)
    ids = tokenizer.encode("the<think>", add_special_tokens=False).ids
    assert ids == model.encode("the<think>")
    assert ids[-1] == index
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>"


def test_runs_of_spaces_and_line_ends_can_be_tokens(tmp_path):
    """As in Gemma, whose file has the user's tokens as they stand in a text, without U+2581."""
    model = trained(False, user_defined_symbols=["\n", "\n\n", "▁▁", "▁▁▁", "<table>"])
    gguf = sentencepiece_gguf(model, tokenizer__ggml__add_space_prefix=False)
    tokens, types = (gguf.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    for index in range(3, 8):
        tokens[index], types[index] = tokens[index].replace("▁", " "), 4
    tokenizer = made(tmp_path, gguf)
    parts = ["  ", "   ", "\n", "\n\n", "<table>", " the", *WORDS[:-1]]
    for text in ["a    b\n\n\n  <table> x", *random_texts(1000, parts)]:
        text = text.replace("▁", "")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), repr(text)
        assert tokenizer.decode(ids) == text, repr(text)


def test_phi3s_special_tokens_take_white_space_along(tmp_path, llama):
    gguf = sentencepiece_gguf(llama)
    gguf.metadata["tokenizer.ggml.tokens"][-1] = "<|end|>"
    gguf.metadata["tokenizer.ggml.token_type"][-1] = 3
    last = llama.get_piece_size() - 1
    for architecture, plain in (("llama", True), ("phi3", False)):
        gguf.metadata["general.architecture"] = architecture
        ids = made(tmp_path, gguf).encode("fox<|end|>\nthe<s> dog", add_special_tokens=False).ids
        behind = llama.encode("\nthe" if plain else "the")
        assert ids == [*llama.encode("fox"), last, *behind, 1, *llama.encode(" dog")]


@pytest.mark.parametrize(
    ("architecture", "token"), [("gemma3", "<end_of_turn>"), ("phi3", "<|end|>")]
)
def test_the_end_of_a_turn_is_known_by_name(tmp_path, architecture, token):
    metadata = tiny_metadata(general__architecture=architecture)
    metadata["tokenizer.ggml.tokens"] = [*TOKENS[:-1], token]
    file = read_gguf(Gguf(metadata, {}).write(tmp_path / "tiny.gguf"))
    assert end_token_ids(file) == [2, len(TOKENS) - 1]
    metadata["tokenizer.ggml.tokens"] = TOKENS
    assert end_token_ids(read_gguf(Gguf(metadata, {}).write(tmp_path / "tiny.gguf"))) == [2]


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
