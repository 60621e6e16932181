"""SentencePiece tokenizers of GGUF files, against SentencePiece itself."""

from __future__ import annotations

import io

import mlx.core as mx
import pytest
import sentencepiece

from gguf_writer import TOKENS, Gguf, imported, tiny, tiny_metadata, tiny_tensors
from redrafter_mlx.gguf.file import read_gguf
from redrafter_mlx.gguf.tokenizer import end_token_ids
from redrafter_mlx.loading import hub
from test_gguf_tokenizer import made, random_texts

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
