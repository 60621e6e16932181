"""The converter: every layout there and back, types, packing, vocabularies, cards, the command."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest

from convert.layouts import LAYOUTS
from convert.weights import BLOCK_BYTES
from convert_heads import (
    GOLDEN,
    NAMES,
    apple_config,
    apple_tensors,
    config_in,
    convert,
    read,
    run,
    same_bits,
    settings,
    tensors_in,
    write,
    write_in,
)
from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.errors import UserError
from test_generate_command import save_target

ROOT = Path(__file__).parents[1]
SHAPES = {
    "rnn, full exit": apple_config(),
    "rnn, projected exit": apple_config(e=40, n=1),
    "sum, full exit": apple_config(rnn=False, n=3),
    "sum, projected exit": apple_config(rnn=False, e=40, n=1),
    "no blocks": apple_config(n=0),
}


@pytest.fixture
def head(tmp_path) -> Path:
    """A small head in the reference implementation's layout."""
    config = apple_config()
    return write_in(tmp_path / "head", "apple", config, apple_tensors(config))


def refused(capsys, *words) -> str:
    """The one-line error of a command that has to fail."""
    capsys.readouterr()
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    start = "python -m convert: error: "
    assert captured.err.startswith(start)
    return captured.err[len(start) : -1]


# ---------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("reduced", [False, True], ids=["full vocabulary", "reduced vocabulary"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", NAMES)
def test_every_layout_goes_there_and_back_bit_by_bit(layout, shape, reduced, tmp_path):
    config = SHAPES[shape] | ({"draft_vocab_size": 40} if reduced else {})
    dtype = mx.bfloat16 if reduced else mx.float32
    tensors = apple_tensors(config, dtype)
    source = write_in(tmp_path / "source", layout, config, tensors)
    ours = convert(source, tmp_path / "ours")
    assert same_bits(read(ours), tensors)
    assert config.items() <= settings(ours).items()
    found = load_head(ours, mx.float32)[0].config
    assert (found.num_blocks, found.rnn) == (config["num_draft_layers"], config["rnn"])
    back = convert(ours, tmp_path / "back", "--to", layout, "--keep-d2t")
    assert same_bits(read(back), read(source))
    assert config_in(layout, config).items() <= settings(back).items()


def test_ids_in_another_order_are_kept_even_if_it_is_all_of_them(tmp_path, capsys):
    config = apple_config()
    ids = np.random.default_rng(0).permutation(97)
    tensors = apple_tensors(config) | {"d2t": mx.array(ids - np.arange(97))}
    source = write_in(tmp_path / "source", "apple", config, tensors)
    ours = convert(source, tmp_path / "ours")
    assert same_bits(read(ours), tensors)
    assert load_head(ours, mx.float32)[1].tolist() == ids.tolist()
    assert run("--input", ours, "--output", tmp_path / "out", "--to", "tensorrt-llm") == 2


def test_the_tables_of_the_tests_know_every_layout():
    assert NAMES.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("case", ["full_exit", "projected_exit", "sum_state"])
def test_golden_logits_come_out_of_every_layout(case, layout, tmp_path):
    config = settings(GOLDEN / case)
    source = write_in(tmp_path / "source", layout, config, read_golden(case))
    head, _ = load_head(convert(source, tmp_path / "ours"), mx.float32)
    expected = mx.load(str(GOLDEN / case / "expected.safetensors"))
    got, reference = np.array(head.exit(expected["head_input"])), np.array(expected["head_logits"])
    assert np.abs(got - reference).max() < 1e-5 * np.abs(reference).max()


def read_golden(case: str) -> dict[str, mx.array]:
    return mx.load(str(GOLDEN / case / "model.safetensors"))


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_what_a_training_script_puts_before_the_names_does_not_matter(layout, wrapper, tmp_path):
    config = apple_config()
    tensors = apple_tensors(config)
    theirs = {wrapper + name: x for name, x in tensors_in(layout, tensors, 2).items()}
    source = write(tmp_path / "source", theirs, config_in(layout, config))
    assert same_bits(read(convert(source, tmp_path / "ours")), tensors)


def test_the_prefix_of_a_layout_is_optional_when_no_target_is_beside(tmp_path):
    config = apple_config()
    tensors = apple_tensors(config)
    theirs = tensors_in("tensorrt-llm", tensors, 2)
    bare = {name.removeprefix("drafter."): x for name, x in theirs.items()}
    source = write(tmp_path / "source", bare, config_in("tensorrt-llm", config))
    assert same_bits(read(convert(source, tmp_path / "ours")), tensors)


@pytest.mark.parametrize(
    ("layout", "target"),
    [
        ("tensorrt-llm", ["transformer.ln_f.weight", "lm_head.weight"]),
        ("modelopt", ["model.norm.weight", "lm_head.weight"]),
    ],
)
def test_the_target_beside_the_head_is_left_out_and_told(layout, target, tmp_path, caplog):
    config = apple_config()
    tensors = apple_tensors(config)
    theirs = tensors_in(layout, tensors, 2) | {name: mx.ones(3) for name in target}
    source = write(tmp_path / "source", theirs, config_in(layout, config))
    caplog.set_level("INFO", logger="redrafter_mlx")
    assert same_bits(read(convert(source, tmp_path / "ours")), tensors)
    assert "2 tensors of the target beside the head are left out" in caplog.text


def test_of_a_sharded_target_only_the_heads_file_is_named_in_the_card(tmp_path):
    config = apple_config()
    tensors = apple_tensors(config)
    theirs = tensors_in("modelopt", tensors, 2)
    files = {
        "model-1.safetensors": {"model.norm.weight": mx.ones(3)},
        "model-2.safetensors": theirs,
    }
    place = {name: file for file, held in files.items() for name in held}
    source = write(
        tmp_path / "source", theirs, config_in("modelopt", config), "model-2.safetensors"
    )
    write(source, files["model-1.safetensors"], None, "model-1.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    ours = convert(source, tmp_path / "ours")
    assert same_bits(read(ours), tensors)
    hashed = re.findall(
        r"^\| `(\S+)` \| `[0-9a-f]{64}` \|$", (ours / "README.md").read_text(), re.M
    )
    assert sorted(hashed) == ["config.json", "model-2.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["emb_norm.weight", "t2d"])
def test_a_tensor_without_a_use_is_dropped_and_told(head, name, tmp_path, caplog):
    write(head, read(head) | {name: mx.ones(32)}, None)
    caplog.set_level("INFO", logger="redrafter_mlx")
    ours = convert(head, tmp_path / "ours")
    assert name not in read(ours)
    assert f"note: {name} is dropped: " in caplog.text
    assert f"{name} is dropped".lower() in (ours / "README.md").read_text().lower()


def test_the_number_of_blocks_comes_from_the_names(head, tmp_path, caplog):
    (head / "config.json").write_text(json.dumps(settings(head) | {"num_draft_layers": 5}))
    caplog.set_level("INFO", logger="redrafter_mlx")
    ours = convert(head, tmp_path / "ours")
    assert settings(ours)["num_draft_layers"] == 2
    assert "num_draft_layers is 5 in config.json; the tensors have 2 blocks" in caplog.text


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_config_the_shapes_tell_everything(layout, shape, tmp_path):
    config = SHAPES[shape]
    tensors = apple_tensors(config)
    n = config["num_draft_layers"]
    source = write(tmp_path / "source", tensors_in(layout, tensors, n), None)
    ours = convert(source / "model.safetensors", tmp_path / "ours")
    assert config.items() <= settings(ours).items()


# ---------------------------------------------------------------------------------------------
# Sources


def test_a_head_in_shards_with_an_index(head, tmp_path):
    tensors = read(head)
    (head / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(tensors)
    place = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        mx.save_safetensors(str(head / file), {n: tensors[n] for n in names if place[n] == file})
    (head / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    assert same_bits(read(convert(head, tmp_path / "indexed")), tensors)
    (head / "model.safetensors.index.json").unlink()
    assert same_bits(read(convert(head, tmp_path / "without")), tensors)


@pytest.mark.parametrize("ranks", [2, 11])
def test_a_head_that_was_split_over_gpus_is_joined(ranks, tmp_path, monkeypatch):
    """The target's matrices beside it are split along other axes, and are no concern of ours."""
    monkeypatch.setattr("convert.weights.BLOCK_BYTES", 2**12)
    config = apple_config(h=44, e=88, vocab=110)
    tensors = apple_tensors(config, mx.bfloat16)
    theirs = tensors_in("tensorrt-llm", tensors, 2)
    source = tmp_path / "source"
    for rank in range(ranks):
        part = {name: mx.contiguous(mx.split(x, ranks)[rank]) for name, x in theirs.items()}
        part["lm_head.weight"] = mx.ones((3, 1 + rank))
        write(source, part, config_in("tensorrt-llm", config), f"rank{rank}.safetensors")
    assert same_bits(read(convert(source, tmp_path / "ours")), tensors)


def test_links_of_the_hugging_face_cache_are_followed(head, tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in head.iterdir():
        file.rename(repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert same_bits(read(convert(snapshot, tmp_path / "ours")), read(snapshot))


def test_a_repo_is_downloaded_at_its_revision(head, tmp_path, monkeypatch):
    from redrafter_mlx.loading import places

    asked = []
    fetch = lambda name, revision, allow_patterns: (asked.append((name, revision)), head)[1]
    monkeypatch.setattr(places, "snapshot_download", fetch)
    ours = tmp_path / "ours"
    assert run("--input", "org/name", "--revision", "v2", "--output", ours) == 0
    assert set(asked) == {("org/name", "v2")}
    assert "`org/name`" in (ours / "README.md").read_text()
    assert "--revision v2" in (ours / "README.md").read_text()


def test_paths_may_have_spaces_and_letters_of_any_kind(head, tmp_path):
    moved = head.rename(tmp_path / "Köpfe, zwei ✂")
    assert same_bits(read(convert(moved, tmp_path / "aus gabe/é/头")), read(moved))


# ---------------------------------------------------------------------------------------------
# Types and packing


@pytest.mark.parametrize("source", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_every_type_becomes_every_other_as_mlx_rounds(source, wanted, tmp_path):
    config = apple_config()
    tensors = apple_tensors(config, source)
    path = write_in(tmp_path / "head", "apple", config, tensors)
    ours = convert(path, tmp_path / "ours", "--dtype", wanted)
    dtype = getattr(mx, wanted)
    assert same_bits(read(ours), {name: x.astype(dtype) for name, x in tensors.items()})
    assert settings(ours)["dtype"] == wanted


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_packing_is_that_of_mlx(bits, group_size, tmp_path, caplog):
    """Rows of 32 do not divide into groups of 64: those layers stay as they are, and it is said."""
    config = apple_config(h=32, e=64)
    tensors = apple_tensors(config, mx.float16)
    path = write_in(tmp_path / "head", "apple", config, tensors)
    caplog.set_level("INFO", logger="redrafter_mlx")
    ours = convert(path, tmp_path / "ours", "--quantize", bits, "--group-size", group_size)
    expected = dict(tensors)
    for name in [n for n in tensors if n.endswith(".weight") and tensors[n].shape[1] >= group_size]:
        module = name.removesuffix(".weight")
        names = [name, f"{module}.scales", f"{module}.biases"]
        expected |= dict(zip(names, mx.quantize(tensors[name], group_size, bits), strict=True))
    assert same_bits(read(ours), expected)
    assert settings(ours)["quantization"] == {"group_size": group_size, "bits": bits}
    assert ("not quantised" in caplog.text) == (group_size == 64)
    load_head(ours, mx.float32)


@pytest.mark.parametrize("to", [["--dequantize"], ["--to", "apple"], ["--to", "tensorrt-llm"]])
def test_an_export_unpacks_and_says_so(to, head, tmp_path, caplog):
    packed = convert(head, tmp_path / "packed", "--quantize", "8", "--group-size", "32")
    caplog.set_level("INFO", logger="redrafter_mlx")
    plain = convert(packed, tmp_path / "plain", *to)
    assert "the 8-bit weights are unpacked" in caplog.text
    assert "quantization" not in settings(plain)
    again = read(convert(plain, tmp_path / "again"))
    original, found = read(head), read(packed)
    for name in original:
        module = name.removesuffix(".weight")
        if f"{module}.scales" in found:
            parts = [found[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
            assert np.array_equal(again[name], mx.dequantize(*parts, 32, 8))
        else:
            assert np.array_equal(again[name], original[name])


def test_packed_layers_are_copied_as_they_are(head, tmp_path):
    packed = convert(head, tmp_path / "packed", "--quantize", "4", "--group-size", "32")
    assert same_bits(read(convert(packed, tmp_path / "copy")), read(packed))
    half = convert(packed, tmp_path / "half", "--dtype", "float16")
    load_head(half, mx.float32)
    assert {x.dtype for x in read(half).values()} == {mx.uint32, mx.float16}


def test_a_tensor_of_several_blocks_is_put_together_rightly(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.weights.BLOCK_BYTES", BLOCK_BYTES // 2**12)
    config = apple_config(draft=40)
    tensors = apple_tensors(config, mx.float16)
    path = write_in(tmp_path / "head", "apple", config, tensors)
    assert same_bits(read(convert(path, tmp_path / "same")), tensors)
    cast = read(convert(path, tmp_path / "cast", "--dtype", "bfloat16"))
    floats = {n: x.astype(mx.bfloat16) for n, x in tensors.items() if n != "d2t"}
    assert same_bits(cast, floats | {"d2t": tensors["d2t"]})


# ---------------------------------------------------------------------------------------------
# The draft vocabulary


def ids_of(path: Path) -> list[int]:
    offsets = np.array(read(path)["d2t"])
    return (offsets + np.arange(len(offsets))).tolist()


@pytest.mark.parametrize("form", ["object", "lines"])
def test_the_likeliest_ids_of_a_token_count_are_kept(form, head, tmp_path, caplog):
    counts = {7: 50, 3: 30, 90: 15, 4: 4, 96: 1}
    file = tmp_path / ("counts.json" if form == "object" else "counts.txt")
    lines = "\n".join(f"{token} {count}" for token, count in counts.items())
    file.write_text(json.dumps(counts) if form == "object" else lines)
    caplog.set_level("INFO", logger="redrafter_mlx")
    ours = convert(head, tmp_path / "ours", "--draft-vocab", "3", file)
    assert ids_of(ours) == [3, 7, 90]
    assert read(ours)["d2t"].dtype == mx.int64
    assert settings(ours)["draft_vocab_size"] == 3
    assert np.array_equal(
        read(ours)["lm_head.2.weight"], read(head)["lm_head.2.weight"][[3, 7, 90]]
    )
    assert f"draft vocabulary: 3 of 97 ids, 95.00% of the tokens in {file.name}" in caplog.text
    assert load_head(ours, mx.float32)[1].tolist() == [3, 7, 90]
    every = convert(head, tmp_path / "every", "--draft-vocab", file)
    assert ids_of(every) == [3, 4, 7, 90, 96]


def test_a_reduced_vocabulary_is_reduced_further(head, tmp_path, caplog):
    """Unsorted, packed, and without one of the ids that are asked for."""
    held = [40, 3, 90, 7, 12]
    tensors = read(head)
    offsets = mx.array(np.array(held) - np.arange(5))
    output = tensors["lm_head.2.weight"][mx.array(held)]
    write(head, tensors | {"lm_head.2.weight": output, "d2t": offsets}, apple_config(draft=5))
    packed = convert(head, tmp_path / "packed", "--quantize", "8", "--group-size", "32")
    (tmp_path / "counts.json").write_text(json.dumps({90: 9, 50: 8, 3: 7, 40: 6, 7: 5}))
    caplog.set_level("INFO", logger="redrafter_mlx")
    ours = convert(packed, tmp_path / "ours", "--draft-vocab", "3", tmp_path / "counts.json")
    assert ids_of(ours) == [3, 40, 90]
    assert "62.86% of the tokens in counts.json; 1 more are not in this head" in caplog.text
    rows = [held.index(i) for i in (3, 40, 90)]
    for part in ("weight", "scales", "biases"):
        name = f"lm_head.2.{part}"
        assert np.array_equal(read(ours)[name], read(packed)[name][mx.array(rows)])


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl"])
def test_a_text_is_counted_with_the_targets_tokenizer(suffix, tmp_path):
    target = tmp_path / "target"
    save_target(target)
    config = apple_config(h=64, e=128, vocab=300)
    head = write_in(tmp_path / "head", "apple", config, apple_tensors(config))
    text = "the the the an b"
    file = tmp_path / f"text{suffix}"
    message = {"id": 9, "messages": [{"role": "user", "content": text}]}
    file.write_text(json.dumps(message) if suffix == ".jsonl" else text)
    hidden = settings(target)["hidden_size"]
    config = apple_config(h=hidden, e=2 * hidden, vocab=300)
    head = write_in(tmp_path / "head", "apple", config, apple_tensors(config))
    words = ("--draft-vocab", "3", file, "--target", target)
    ours = convert(head, tmp_path / "ours", *words)
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(target)
    the, space = tokenizer.encode("the")[0], tokenizer.encode(" ")[0]
    assert ids_of(ours) == sorted([the, space, *tokenizer.eos_token_ids])


@pytest.mark.parametrize(
    ("words", "content", "fault"),
    [
        (["3"], "", "--draft-vocab 3 does not say where the likeliest ids are counted: give a text "
         "or a file of token counts too, as in --draft-vocab 3 text.txt"),
        (["0", "{file}"], "1 2", "--draft-vocab 0 {file}: a vocabulary of no ids proposes nothing"),
        (["3", "4"], "", "--draft-vocab 3 4: give one number, one file, or both"),
        (["no.txt"], "", "--draft-vocab no.txt: no such file"),
        (["{file}"], "some words", "--draft-vocab {file} is a text, which only the target's "
         "tokenizer can count: give --target, or a file of token counts"),
        (["{file}"], "97 2", "--draft-vocab {file}: has the id 97, the head's vocab_size is 97"),
        (["3", "{file}"], "1 5\n2 5", "--draft-vocab 3: only 2 different ids of this head occur in "
         "the file; give a smaller number or a longer text"),
        (["{file}"], "1 0", "--draft-vocab: the file holds no tokens"),
        (["{file}"], b"\xff\xfe", "--draft-vocab {file}: is not UTF-8 text (byte 0); convert it, "
         "for example with iconv -t UTF-8"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_cannot_be_chosen(words, content, fault, head, tmp_path, capsys):
    file = tmp_path / "counts.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = [word.format(file=file) for word in words]
    output = tmp_path / "ours"
    found = refused(capsys, "--input", head, "--output", output, "--draft-vocab", *words)
    assert found == fault.format(file=file)
    assert not output.exists()


@pytest.mark.parametrize("layout", ["lm-heads", "medusa", "tensorrt-llm", "modelopt"])
def test_a_reduced_vocabulary_is_not_exported_where_nobody_reads_it(layout, tmp_path, capsys):
    config = apple_config(draft=40)
    head = write_in(tmp_path / "head", "apple", config, apple_tensors(config))
    found = refused(capsys, "--input", head, "--output", tmp_path / "out", "--to", layout)
    assert found == (
        f"--to {layout}: its readers do not know reduced vocabularies, and this head proposes 40 "
        "of 97 ids; start from the full head, or add --keep-d2t if yours reads d2t"
    )


# ---------------------------------------------------------------------------------------------
# The target, the card, upload


def test_a_target_of_other_sizes_is_refused(head, tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"hidden_size": 48, "vocab_size": 97}))
    words = ("--input", head, "--output", tmp_path / "ours", "--target", target)
    assert refused(capsys, *words) == (
        f"--target {target} has hidden_size 48, the head was made for 32: it belongs to another "
        "target"
    )


def test_the_card_names_source_target_and_settings(head, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"hidden_size": 32, "vocab_size": 97}))
    words = ("--target", target, "--quantize", "4", "--group-size", "32", "--dtype", "float16")
    card = (convert(head, tmp_path / "ours", *words) / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: mlx\n" in front
    assert "- speculative-decoding\n" in front
    assert f"- Target: {target}." in card
    assert "--dtype float16 --quantize 4 --group-size 32" in card
    for file in ("config.json", "model.safetensors"):
        digest = hashlib.sha256((head / file).read_bytes()).hexdigest()
        assert f"| `{file}` | `{digest}` |" in card


class FakeHub:
    """Stands in for huggingface_hub.HfApi."""

    calls: ClassVar[list] = []
    error: ClassVar[Exception | None] = None

    def __init__(self):
        if self.error and not self.calls:
            self.whoami = self.fail

    def fail(self, *_, **__):
        raise self.error

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, names))


@pytest.fixture
def fake_hub(monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    return FakeHub


@pytest.mark.parametrize("public", [False, True])
def test_upload_makes_a_private_repo_unless_told(public, head, tmp_path, fake_hub, capsys):
    convert(head, tmp_path / "ours", "--upload", "me/head", *(["--public"] if public else []))
    files = ["README.md", "config.json", "model.safetensors"]
    create = ("create", "me/head", not public, True)
    assert fake_hub.calls == ["whoami", create, ("upload", "me/head", files)]
    assert "uploaded to https://hub/me/head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("a\nb"), "it cannot be reached"),
        (PermissionError("token expired"), "token expired"),
    ],
)
def test_upload_without_access_is_told_before_the_work(
    error, reason, head, tmp_path, fake_hub, capsys, monkeypatch
):
    monkeypatch.setattr(fake_hub, "error", error)
    words = ("--input", head, "--output", tmp_path / "ours", "--upload", "me/head")
    assert refused(capsys, *words) == (
        f"--upload me/head: Hugging Face does not know you: {reason}; run 'hf auth login' with a "
        "token that may write, or leave --upload out"
    )
    assert not (tmp_path / "ours").exists()


def test_upload_that_fails_leaves_the_head(head, tmp_path, fake_hub, capsys, monkeypatch):
    def fail(self, **_):
        raise ConnectionError("gone")

    monkeypatch.setattr(fake_hub, "upload_folder", fail)
    ours = tmp_path / "ours"
    assert run("--input", head, "--output", ours, "--upload", "me/head") == 2
    error = capsys.readouterr().err
    assert f"--upload me/head failed: it cannot be reached; the head is in {ours}" in error
    assert same_bits(read(ours), read(head))


def test_upload_offline_is_one_line(head, tmp_path):
    """The real client, told to stay offline."""
    command = [sys.executable, "-m", "convert", "--input", head, "--output", tmp_path / "ours"]
    done = subprocess.run(
        [*map(str, command), "--upload", "me/head"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_x"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "python -m convert: error: --upload me/head: Hugging Face does not know you: "
        "HF_HUB_OFFLINE is set; run 'hf auth login' with a token that may write, or leave "
        "--upload out\n"
    )


# ---------------------------------------------------------------------------------------------
# Other commands


def test_inspect_tells_what_a_head_is(head, tmp_path, capsys):
    packed = convert(head, tmp_path / "packed", "--quantize", "4", "--group-size", "32")
    capsys.readouterr()
    assert run("inspect", packed, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    tensors = read(packed)
    assert found["bytes_per_draft_step"] == sum(x.nbytes for x in tensors.values())
    assert sum(found["bytes_by_part"].values()) == found["bytes_per_draft_step"]
    assert found["parameters"] == sum(x.size for x in read(head).values())
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == {
        name: x.shape for name, x in tensors.items()
    }
    assert (found["layout"], found["quantization"]) == ("mlx", {"group_size": 32, "bits": 4})
    assert run("inspect", packed) == 0
    text = capsys.readouterr().out
    assert "targets with hidden_size 32 and vocab_size 97" in text
    assert "4-bit, groups of 32" in text


@pytest.mark.parametrize("layout", NAMES)
def test_inspect_knows_every_layout(layout, tmp_path, capsys):
    config = apple_config()
    path = write_in(tmp_path / "head", layout, config, apple_tensors(config))
    assert run("inspect", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == ("apple" if layout == "mlx" else layout)
    assert found["residual_blocks"] == 2


def test_inspect_names_a_well_known_family(capsys):
    assert run("inspect", ROOT / "redrafter_mlx" / "demo_drafter") == 0
    assert "SmolLM2-135M has these sizes" in capsys.readouterr().out


def test_inspect_of_a_damaged_head_says_what_is_wrong(head, capsys):
    tensors = read(head)
    del tensors["rnn_w.weight"]
    write(head, tensors, None)
    assert run("inspect", head) == 2
    found = capsys.readouterr().out
    assert f"problem: {head}: lacks the tensors rnn_w.weight" in found
    assert "lm_head.0.linear.weight" in found
    (head / "model.safetensors").write_bytes(b"")
    assert run("inspect", head, "--json") == 2
    assert "is not a complete safetensors file" in json.loads(capsys.readouterr().out)["problem"]


def test_target_hands_over_to_mlx_lm(monkeypatch, capsys):
    """Theirs is the help text, and a failing download is theirs to tell."""
    monkeypatch.setattr(sys, "argv", ["before"])
    assert run("target", "--help") == 0
    found = capsys.readouterr().out
    assert "--hf-path" in found
    assert found.startswith("usage: mlx_lm.convert")


def test_a_gguf_file_becomes_a_directory(tmp_path, capsys):
    from gguf_writer import tiny
    from redrafter_mlx import load

    file = tiny().write(tmp_path / "tiny.gguf")
    assert run("gguf", file, tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors"}
    model, _ = load(str(tmp_path / "out"))
    assert model.layers
    assert run("gguf", file, tmp_path / "out") == 2
    file.write_bytes(file.read_bytes()[:200])
    capsys.readouterr()
    assert run("gguf", file, tmp_path / "other") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.gguf"]


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "the following arguments are required: --input, --output"),
        (["--quantise", "4"], "unrecognized arguments: --quantise 4; see --help"),
        (["--quantize", "3"], "argument --quantize: invalid choice: 3 (choose from 4, 8)"),
        (["--group-size", "32"], "--group-size 32 does nothing without --quantize"),
        (["--public"], "--public does nothing without --upload"),
        (["--upload", "head"], "--upload 'head' is not a repo name; give org/name"),
        (["--dequantize"], "--dequantize: {head} is not quantised; leave it out"),
        (["--to", "apple", "--quantize", "4"], "--quantize is for --to mlx; apple has no packed "
         "weights"),
        (["--from", "medusa"], "{head}: is not in the layout --from medusa; it looks like apple: "
         "leave --from out"),
        (["--quantize", "4", "--group-size", "128"], "--group-size 128: no layer of this head "
         "divides into such groups; give --group-size 32"),
        (["--revision", "main"], "--revision main is for Hugging Face repos; {head} is a path"),
    ],
)  # fmt: skip
def test_wrong_flags_are_told_in_one_line(words, fault, head, tmp_path, capsys):
    given = ["--input", head, "--output", tmp_path / "out"] if words else []
    assert refused(capsys, *given, *words) == fault.format(head=head)
    assert not (tmp_path / "out").exists()


def test_quantising_twice_is_refused(head, tmp_path, capsys):
    packed = convert(head, tmp_path / "packed", "--quantize", "4", "--group-size", "32")
    words = ("--input", packed, "--output", tmp_path / "out", "--quantize", "8")
    assert refused(capsys, *words) == (
        f"{packed}: is quantised to 4 bits already, and doing it twice loses twice: start from the "
        "unquantised head, or leave --quantize out"
    )


def test_the_last_line_says_what_was_made(head, tmp_path, capsys):
    capsys.readouterr()
    convert(head, tmp_path / "out", "--dtype", "float16")
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: apple -> mlx, 16,608 parameters, "
        "66,432 bytes -> 33,216 bytes per draft step\n"
    )


def test_the_help_is_there_without_torch_and_names_every_layout(capsys):
    assert run("--help") == 0
    found = capsys.readouterr().out
    assert all(f"{name}:" in found for name in LAYOUTS)


def test_every_package_of_the_project_is_in_the_wheel_and_no_other():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setup = project["tool"]["setuptools"]
    inside = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "redrafter_mlx").rglob("__init__.py")
    }
    beside = {"redrafter_mlx.convert": "convert", "redrafter_mlx.benchmarks": "benchmarks"}
    data = {name for name, files in setup["package-data"].items() if files == ["*"]}
    assert data == {"redrafter_mlx.demo_drafter", "redrafter_mlx.server.page"}
    assert set(setup["packages"]) == inside | beside.keys() | data
    assert beside.items() <= setup["package-dir"].items()
    script = project["project"]["scripts"]["redrafter_mlx.convert"]
    assert script == "redrafter_mlx.convert.__main__:main"


def test_imports_inside_the_package_are_relative():
    """It goes by two names: convert in a clone, redrafter_mlx.convert where it is installed."""
    for path in (ROOT / "convert").glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) (redrafter_mlx\.)?convert\b", text, re.M), path


def test_user_errors_are_those_of_the_package():
    from convert import sources

    assert sources.UserError is UserError
