"""The tokenizer of a GGUF file, rebuilt with the `tokenizers` library."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.file import GgufFile
from redrafter_mlx.gguf.metadata import count

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

SPACE = "▁"  # SentencePiece's symbol for a space

# The end of a turn, for architectures whose GGUF files may name only the end of a text.
TURN_ENDS = {"gemma3": "<end_of_turn>", "phi3": "<|end|>"}

# Phi 3's special tokens absorb the white space after them, all but these.
PHI_PLAIN = {"<unk>", "<s>", "<|endoftext|>"}

# ---------------------------------------------------------------------------------------------
# tokenizer.ggml.pre: how text is split into words before merges are applied. Each pattern splits
# the words that the one before it made; the text between two matches is a word too.
# Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_AFTER_DIGITS}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_AFTER_DIGITS}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PATTERNS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    **dict.fromkeys(["gpt-2", "phi-2", "mpt", "olmo"], (_GPT2,)),
    **dict.fromkeys(
        ["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(
        ["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"], (_LLAMA3,)
    ),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2"], (_QWEN2,)),
    **dict.fromkeys(["gpt-4o", "llama4"], (_CASED,)),
    "tekken": (_TEKKEN,),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}

# Those that keep a word whole if the vocabulary has it, whatever the merges say, and that start a
# text with the beginning-of-sequence token unless the file says otherwise.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file.

    Kinds: `gpt2`, byte-level BPE with the splits named by tokenizer.ggml.pre; `llama`,
    SentencePiece BPE with scores. As in llama.cpp, control and user-defined tokens are never
    split, and the space that SentencePiece puts in front of a text also follows each of them.

    Raises:
        UserError: another kind, unknown splits, or contradictory metadata.
    """
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = file.need_text("tokenizer.ggml.model")
    if kind not in kinds:
        raise UserError(
            f"{file.path} has a {kind!r} tokenizer, but only 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece) can be imported: use an MLX copy of this model"
        )
    _check_tokens(file)
    tokenizer = kinds[kind](file)
    if frame := _frame(file):
        tokenizer.post_processor = frame
    tokenizer.add_special_tokens(_added_tokens(file, special=True))
    tokenizer.add_tokens(_added_tokens(file, special=False))
    return tokenizer


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The content of tokenizer_config.json: the tokens with a role, and the context length."""
    roles = {
        "bos_token": "tokenizer.ggml.bos_token_id",
        "eos_token": "tokenizer.ggml.eos_token_id",
        "unk_token": "tokenizer.ggml.unknown_token_id",
        "pad_token": "tokenizer.ggml.padding_token_id",
    }
    tokens = _tokens(file)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": count(file, "context_length"),
        **{role: tokens[_id(file, key)] for role, key in roles.items() if key in file.metadata},
    }


def end_token_ids(file: GgufFile) -> list[int]:
    """The token ids that end a text: end of sequence (always first), of turn, of message."""
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    ids = [_id(file, key) for key in keys if key in file.metadata or key == keys[0]]
    turn = TURN_ENDS.get(file.metadata.get("general.architecture"))
    ids += [index for index, token in enumerate(_tokens(file)) if token == turn]
    return list(dict.fromkeys(ids))


def _id(file: GgufFile, key: str) -> int:
    """The token id under `key`; UserError if the vocabulary has no such token."""
    tokens, index = _tokens(file), file.need(key)
    if type(index) is not int or not 0 <= index < len(tokens):
        raise UserError(f"{file.path}: {key} is {index}, with {len(tokens)} tokens; get it again")
    return index


def _tokens(file: GgufFile) -> list[str]:
    return file.need_list("tokenizer.ggml.tokens", str)


def _check_tokens(file: GgufFile) -> None:
    tokens, types = _tokens(file), file.need_list("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise UserError(
            f"{file.path}: {len(tokens)} tokens, but {len(types)} token types; get the file again"
        )
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise UserError(f"{file.path}: token {token!r} occurs {times} times; get the file again")


def _added_tokens(file: GgufFile, special: bool) -> list[AddedToken]:
    """The tokens that are matched in text before any splitting: special ones, or user-defined."""
    kinds = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
    greedy = (
        file.metadata.get("general.architecture") == "phi3"
        and file.need("tokenizer.ggml.model") == "llama"
    )
    return [
        AddedToken(
            token, special=special, normalized=False, rstrip=greedy and token not in PHI_PLAIN
        )
        for token, kind in _typed_tokens(file)
        if kind in kinds
    ]


def _typed_tokens(file: GgufFile) -> zip[tuple[str, int]]:
    return zip(_tokens(file), file.need("tokenizer.ggml.token_type"), strict=True)


def _frame(file: GgufFile) -> processors.TemplateProcessing | None:
    """Adds the beginning- and end-of-sequence tokens; None if the file wants neither."""
    starts = (
        file.need("tokenizer.ggml.model") == "llama"
        or file.metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    )
    ids = {}
    for role, default in (("bos", starts), ("eos", False)):
        if file.metadata.get(f"tokenizer.ggml.add_{role}_token", default):
            ids[role] = _id(file, f"tokenizer.ggml.{role}_token_id")
    if not ids:
        return None
    tokens = _tokens(file)
    return processors.TemplateProcessing(
        single=[name for name in ("bos", "$A", "eos") if name in ids or name == "$A"],
        special_tokens=[
            {"id": name, "ids": [index], "tokens": [tokens[index]]} for name, index in ids.items()
        ],
    )


# ---------------------------------------------------------------------------------------------
# gpt2


def _byte_level(file: GgufFile) -> Tokenizer:
    tokenizer = Tokenizer(_byte_pair_model(file))
    tokenizer.pre_tokenizer = _pre_tokenizer(file)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_pair_model(file: GgufFile) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(_tokens(file))}
    merges = [tuple(merge.split(" ")) for merge in file.need_list("tokenizer.ggml.merges", str)]
    whole_words = file.need_text("tokenizer.ggml.pre") in WHOLE_WORDS
    try:
        return models.BPE(vocabulary, merges, ignore_merges=whole_words)
    except Exception as error:  # `tokenizers` raises nothing more specific
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{file.path}: the merges do not fit the tokens ({reason}); get the file again"
        ) from error


def _pre_tokenizer(file: GgufFile) -> pre_tokenizers.PreTokenizer:
    name = file.need_text("tokenizer.ggml.pre")
    if name not in PATTERNS:
        raise UserError(
            f"{file.path}: pre-tokenizer {name!r} is not supported (known: "
            f"{', '.join(PATTERNS)}): use an MLX copy of this model"
        )
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


# ---------------------------------------------------------------------------------------------
# llama


def _sentencepiece(file: GgufFile) -> Tokenizer:
    tokens = _tokens(file)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = "tokenizer.ggml.unknown_token_id"
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(file, vocabulary),
            unk_token=tokens[_id(file, unknown) if unknown in file.metadata else 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer


def _merges(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece's scores as a list of merges.

    SentencePiece joins the two neighbours that form the piece with the highest score, so the merges
    are all ways to form a piece from two others, by that piece's score. Bytes, special and
    user-defined tokens are never formed. The order of the ways to form one piece matters only where
    two of them overlap in a text (a + aa, aa + a): going from left to right, SentencePiece forms
    the longer part first, so it comes first here.
    """
    scores = file.need_list("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary):
        raise UserError(
            f"{file.path}: {len(vocabulary)} tokens, but {len(scores)} scores; get the file again"
        )
    normal = {token for token, kind in _typed_tokens(file) if kind == NORMAL}
    ranked = sorted(normal, key=lambda token: (-scores[vocabulary[token]], vocabulary[token]))
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in normal and token[cut:] in normal
    ]
