"""Hostile and broken heads: each its one line, exit code 2, and nothing written."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert.layouts import LAYOUTS
from convert_heads import apple_config, apple_tensors, read, run, settings, write_in
from redrafter_mlx.drafters.kinds import KINDS

CONFIG = apple_config()
SIZE = 97 * 64 * 4
KNOWN = ", ".join(dict.fromkeys([*LAYOUTS, *KINDS]))


@pytest.fixture
def head(tmp_path) -> Path:
    """A good head to damage: h 32, e 64, two blocks, 97 ids, float32."""
    return write_in(tmp_path / "head", "apple", CONFIG, apple_tensors(CONFIG))


def weights(head: Path) -> Path:
    return head / "model.safetensors"


def change(**tensors):
    """Sets tensors (`__` stands for the dot); None removes one."""

    def damage(head: Path) -> None:
        changed = read(head) | {name.replace("__", "."): x for name, x in tensors.items()}
        kept = {name: x for name, x in changed.items() if x is not None}
        mx.save_safetensors(str(weights(head)), kept)

    return damage


def configure(**keys):
    """Sets keys of config.json; `...` removes one."""

    def damage(head: Path) -> None:
        changed = settings(head) | keys
        kept = {key: value for key, value in changed.items() if value is not ...}
        (head / "config.json").write_text(json.dumps(kept))

    return damage


def content(data: bytes, name: str = "model.safetensors"):
    return lambda head: (head / name).write_bytes(data)


def cut(length: int):
    return lambda head: weights(head).write_bytes(weights(head).read_bytes()[:length])


def with_header(edit):
    """Rewrites the header as `edit` has it; the data stay where they are."""

    def damage(head: Path) -> None:
        data = weights(head).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        text = edit(json.loads(data[8 : 8 + length]))
        encoded = (text if isinstance(text, str) else json.dumps(text)).encode()
        weights(head).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])

    return damage


def entry(name="lm_head.2.weight", **keys):
    def edit(header: dict) -> dict:
        header[name] |= keys
        return header

    return with_header(edit)


def twice(header: dict) -> str:
    """JSON with a name that occurs twice."""
    text = json.dumps(header)
    return text[:-1] + f', "rnn_u.bias": {json.dumps(header["rnn_u.bias"])}}}'


def move_last(distance: int):
    """Says that the data which come last lie elsewhere."""

    def edit(header: dict) -> dict:
        entries = [each for name, each in header.items() if name != "__metadata__"]
        last = max(entries, key=lambda each: each["data_offsets"])
        last["data_offsets"] = [place + distance for place in last["data_offsets"]]
        return header

    return with_header(edit)


def link_out(head: Path) -> None:
    outside = head.parent / "outside.safetensors"
    weights(head).rename(outside)
    weights(head).symlink_to(outside)


def link_config_out(head: Path) -> None:
    outside = head.parent / "outside.json"
    (head / "config.json").rename(outside)
    (head / "config.json").symlink_to(outside)


def link_through_false_cache(head: Path) -> None:
    """Looks like the Hugging Face cache, but its `blobs` is a link out of it."""
    secret = head.parent / "secret"
    snapshot = head / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    secret.mkdir()
    for name in ("model.safetensors", "config.json"):
        (head / name).rename(secret / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (head / "blobs").symlink_to(secret)


def shards(index=None, again=False):
    """Splits the head in two files, with an index of names to files as `index` changes it."""

    def damage(head: Path) -> None:
        tensors = read(head)
        weights(head).unlink()
        files = ["model-1.safetensors", "model-2.safetensors"]
        place = {name: files[name.startswith("rnn")] for name in tensors}
        for file in files:
            kept = {n: x for n, x in tensors.items() if place[n] == file}
            if again:
                kept["rnn_u.bias"] = tensors["rnn_u.bias"]
            mx.save_safetensors(str(head / file), kept)
        if index is not None:
            index(head, place)
            listed = {"weight_map": place}
            (head / "model.safetensors.index.json").write_text(json.dumps(listed))

    return damage


def drop_second(head: Path, place: dict) -> None:
    (head / "model-2.safetensors").unlink()


def lead_out(head: Path, place: dict) -> None:
    place["rnn_u.bias"] = "../head/model-2.safetensors"


def misplace(head: Path, place: dict) -> None:
    place["rnn_u.bias"] = "model-1.safetensors"


def forget(head: Path, place: dict) -> None:
    del place["rnn_u.bias"]


def nan_at_the_end(name: str, value: float, dtype=mx.float32):
    def damage(head: Path) -> None:
        tensors = read(head)
        array = np.array(tensors[name])
        array.reshape(-1)[-1] = value
        tensors[name] = mx.array(array)
        mx.save_safetensors(str(weights(head)), {n: x.astype(dtype) for n, x in tensors.items()})

    return damage


def packed(**quantization):
    """One packed layer, with settings of its own."""

    def damage(head: Path) -> None:
        names = ("lm_head__2__weight", "lm_head__2__scales", "lm_head__2__biases")
        parts = mx.quantize(read(head)["lm_head.2.weight"], 32, 4)
        change(**dict(zip(names, parts, strict=True)))(head)
        configure(**({"quantization": quantization} if quantization else {}))(head)

    return damage


NOT_COMPLETE = "{file}: is not a complete safetensors file: "
AGAIN = "; get it again"
FULL = "its header claims {n} bytes, the file has {size}"
HOSTILE = {
    "0 bytes": (content(b""), NOT_COMPLETE + "it has 0 bytes" + AGAIN),
    "7 bytes": (content(b"x" * 7), NOT_COMPLETE + "it has 7 bytes" + AGAIN),
    "10 GB header claim": (
        content(struct.pack("<Q", 10 * 2**30) + b"{}" * 50),
        NOT_COMPLETE + "its header claims 10737418240 bytes, the file has 108" + AGAIN,
    ),
    "2**64 - 1 header claim": (
        content(b"\xff" * 100),
        NOT_COMPLETE + f"its header claims {2**64 - 1} bytes, the file has 100" + AGAIN,
    ),
    "header of nothing": (
        content(struct.pack("<Q", 0) + b"x" * 100),
        NOT_COMPLETE + "its header is not JSON" + AGAIN,
    ),
    "header is a list": (
        with_header(lambda header: []),
        NOT_COMPLETE + "its header is not a JSON object" + AGAIN,
    ),
    "header of 100000 brackets": (
        with_header(lambda header: "[" * 100_000),
        NOT_COMPLETE + "its header is not JSON" + AGAIN,
    ),
    "header is not UTF-8": (
        content(struct.pack("<Q", 4) + b"\xff\xfe{}"),
        NOT_COMPLETE + "its header is not JSON" + AGAIN,
    ),
    "truncated by a byte": (
        cut(-1),
        NOT_COMPLETE + "its header describes {size} bytes, it has {size_1}" + AGAIN,
    ),
    "a name twice": (
        with_header(twice),
        NOT_COMPLETE + "its header has rnn_u.bias twice" + AGAIN,
    ),
    "overlapping tensors": (
        move_last(-8),
        NOT_COMPLETE + "the data of {last} overlaps the one before it" + AGAIN,
    ),
    "unused bytes": (
        move_last(8),
        NOT_COMPLETE + "the data of {last} leaves a gap before it" + AGAIN,
    ),
    "unknown type": (
        entry(dtype="X9"),
        NOT_COMPLETE + "lm_head.2.weight has the unknown type 'X9'" + AGAIN,
    ),
    "shape of words": (
        entry(shape="large"),
        NOT_COMPLETE + "lm_head.2.weight has the shape 'large'" + AGAIN,
    ),
    "shape larger than its data": (
        entry(shape=[9700, 64]),
        NOT_COMPLETE + f"lm_head.2.weight has {SIZE} bytes, its shape [9700, 64] needs "
        f"{100 * SIZE}" + AGAIN,
    ),
    "shape beyond any memory": (
        entry(shape=[2**62, 2**62]),
        NOT_COMPLETE + f"lm_head.2.weight has {SIZE} bytes, its shape [{2**62}, {2**62}] needs "
        f"{2**126}" + AGAIN,
    ),
    "negative offset": (
        entry(data_offsets=[-8, SIZE - 8]),
        NOT_COMPLETE + f"lm_head.2.weight lies at [-8, {SIZE - 8}]" + AGAIN,
    ),
    "no offsets": (
        with_header(lambda header: header | {"rnn_u.bias": {"dtype": "F32"}}),
        NOT_COMPLETE + "its header says nothing useful of rnn_u.bias" + AGAIN,
    ),
    "a pickle by that name": (
        content(b"\x80\x02}q\x00."),
        "{file}: is a pickled PyTorch file; rename it to model.pt",
    ),
    "no file": (
        lambda head: weights(head).unlink(),
        "{head}: holds no weights (*.safetensors, pytorch_model*.bin, model.pt)",
    ),
    "a directory by that name": (
        lambda head: (weights(head).unlink(), weights(head).mkdir()),
        "{file}: cannot be read (Is a directory)",
    ),
    "link to nothing": (
        lambda head: (weights(head).unlink(), weights(head).symlink_to("nowhere")),
        "{file}: cannot be read (No such file or directory)",
    ),
    "link out of the directory": (
        link_out,
        "{file}: is a link to {parent}/outside.safetensors, outside {head}; copy the file there",
    ),
    "config.json links out": (
        link_config_out,
        "{head}/config.json: is a link to {parent}/outside.json, outside {head}; copy the file "
        "there",
    ),
    "wrong shape": (
        change(rnn_u__weight=mx.zeros((31, 32))),
        "{head}: rnn_u.weight has shape (31, 32), expected (32, 32)",
    ),
    "transposed": (
        change(lm_head__2__weight=mx.zeros((64, 97))),
        "{head}/config.json: exit_dim is 64, but lm_head.2.weight has shape (64, 97), which makes "
        "it 97: one of them is wrong",
    ),
    "scalar": (
        change(lm_head__2__weight=mx.array(1.0)),
        "{head}: lm_head.2.weight has shape ()",
    ),
    "no rows": (
        change(lm_head__2__weight=mx.zeros((0, 64))),
        "{head}: lm_head.2.weight has shape (0, 64)",
    ),
    "extra": (
        change(rnn_v__weight=mx.zeros((2, 2)), other=mx.zeros(1)),
        "{head}: holds tensors that no part of the head uses (layout apple): other, rnn_v.weight",
    ),
    "missing": (
        change(rnn_w__weight=None, lm_head__0__linear__bias=None),
        "{head}: lacks the tensors lm_head.0.linear.bias, rnn_w.weight",
    ),
    "missing output layer": (
        change(lm_head__2__weight=None),
        "{head}: lacks the tensors lm_head.2.weight",
    ),
    "missing block": (
        change(lm_head__0__linear__weight=None, lm_head__0__linear__bias=None),
        "{head}: lacks the tensors lm_head.1.weight",
    ),
    "another model": (
        lambda head: mx.save_safetensors(
            str(weights(head)), {f"model.layers.{i}.q": mx.zeros(1) for i in range(6)}
        ),
        f"{{head}}: no draft head in any known layout ({KNOWN}); it holds "
        "model.layers.0.q, model.layers.1.q, model.layers.2.q, model.layers.3.q and 2 more",
    ),
    "two names for one tensor": (
        change(input_proj__weight=mx.zeros((2, 2)), input_projs__weight=mx.zeros((2, 2))),
        "{head}: input_projs.weight and input_proj.weight are the same tensor",
    ),
    "NaN": (
        nan_at_the_end("lm_head.2.weight", float("nan")),
        "{file}: lm_head.2.weight holds NaN or infinite values; get the head again",
    ),
    "NaN in bfloat16": (
        nan_at_the_end("rnn_u.bias", float("nan"), mx.bfloat16),
        "{file}: rnn_u.bias holds NaN or infinite values; get the head again",
    ),
    "infinite": (
        nan_at_the_end("rnn_w.weight", float("inf"), mx.float16),
        "{file}: rnn_w.weight holds NaN or infinite values; get the head again",
    ),
    "whole numbers": (
        change(rnn_u__bias=mx.zeros(32, mx.int32)),
        "{head}: rnn_u.bias holds I32, not F32, F16, BF16",
    ),
    "config is not JSON": (
        content(b"{", "config.json"),
        "{head}/config.json: is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    "config is a list": (
        content(b"[1]", "config.json"),
        "{head}/config.json: holds [1], not a JSON object",
    ),
    "config lies about hidden_size": (
        configure(hidden_size=48),
        "{head}/config.json: hidden_size is 48, but rnn_w.weight has shape (32, 32), which makes "
        "it 32: one of them is wrong",
    ),
    "config lies about exit_dim": (
        configure(exit_dim=40),
        "{head}/config.json: exit_dim is 40, but lm_head.2.weight has shape (97, 64), which makes "
        "it 64: one of them is wrong",
    ),
    "config lies about vocab_size": (
        configure(vocab_size=200),
        "{head}/config.json: vocab_size is 200, but lm_head.2.weight has shape (97, 64), which "
        "makes it 97: one of them is wrong",
    ),
    "config lies about rnn": (
        configure(rnn=False),
        "{head}/config.json: rnn is false, but there are rnn_u and rnn_w tensors: one of them is "
        "wrong",
    ),
    "config says rnn without tensors": (
        change(rnn_u__weight=None, rnn_u__bias=None, rnn_w__weight=None),
        "{head}/config.json: rnn is true, but there are no rnn_u and rnn_w tensors: one of them "
        "is wrong",
    ),
    "rnn is a word": (
        configure(rnn="yes"),
        "{head}/config.json: rnn is 'yes', not true or false",
    ),
    "size is a word": (
        configure(hidden_size="32"),
        "{head}/config.json: hidden_size is '32', not a positive number",
    ),
    "reduced vocabulary without ids": (
        configure(vocab_size=200, draft_vocab_size=97),
        "{head}: has a draft_vocab_size but no d2t to say which ids it holds",
    ),
    "draft vocabulary above the target's": (
        configure(vocab_size=90, draft_vocab_size=97),
        "{head}/config.json: draft_vocab_size 97 is above vocab_size 90",
    ),
    "ids beyond the vocabulary": (
        change(d2t=mx.full((97,), 1, mx.int64)),
        "{head}: d2t does not map to distinct ids below 97",
    ),
    "ids are no numbers": (
        change(d2t=mx.full((97,), 0.5)),
        "{head}: d2t holds float32, not whole numbers",
    ),
    "ids of another number": (
        change(d2t=mx.zeros(96, mx.int64)),
        "{head}: d2t has shape (96,), draft_vocab_size is 97",
    ),
    "reduced vocabulary, target's unknown": (
        lambda head: (change(d2t=mx.zeros(97, mx.int64))(head), configure(vocab_size=...)(head)),
        "{head}/config.json: vocab_size is missing, and a reduced vocabulary does not tell it: "
        'write {{"vocab_size": N}} there, N being the target\'s',
    ),
    "packed without settings": (
        packed(),
        "{head}/config.json: quantization None is unusable: group_size and bits of the packed "
        "weights are needed",
    ),
    "packed in groups of nothing": (
        packed(group_size=0, bits=4),
        "{head}/config.json: quantization {{'group_size': 0, 'bits': 4}} is unusable: group_size "
        "is one of (32, 64, 128), bits of (2, 3, 4, 5, 6, 8)",
    ),
    "packed otherwise than it says": (
        packed(group_size=64, bits=4),
        "{head}: lm_head.2.scales has shape (97, 2), expected (97, 1)",
    ),
    "a tensor in two shards": (
        shards(again=True),
        "{head}/model-2.safetensors: holds rnn_u.bias again; model-1.safetensors has it already",
    ),
    "a missing shard": (
        shards(drop_second),
        "{head}/model.safetensors.index.json: names model-2.safetensors, which is missing; get "
        "the head again",
    ),
    "an index that leads out": (
        shards(lead_out),
        "{head}/model.safetensors.index.json: names the file '../head/model-2.safetensors', which "
        "is not beside it",
    ),
    "an index that misplaces": (
        shards(misplace),
        "{head}/model.safetensors.index.json: says that model-1.safetensors holds rnn_u.bias, "
        "which it does not",
    ),
    "an index that forgets": (
        shards(forget),
        "{head}/model.safetensors.index.json: does not list rnn_u.bias, which its files hold",
    ),
    "an index without a map": (
        content(b"{}", "model.safetensors.index.json"),
        "{head}/model.safetensors.index.json: has no weight_map of tensor names to files",
    ),
    "parts of a head with one missing": (
        lambda head: (
            (head / "rank2.safetensors").write_bytes(weights(head).read_bytes()),
            weights(head).rename(head / "rank0.safetensors"),
        ),
        "{head}: its files are not the parts of one head: rank0 to rankN are",
    ),
    "several heads": (
        lambda head: (
            (head / "a.safetensors").write_bytes(b""),
            weights(head).rename(head / "b.safetensors"),
        ),
        "{head}: holds several heads; give one as --input: a.safetensors, b.safetensors",
    ),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_head_is_refused_and_nothing_is_written(damage, message, head, capsys):
    good = weights(head).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    damage(head)
    before = sorted(head.parent.rglob("*"))
    assert run("--input", head, "--output", head.parent / "new" / "out") == 2
    captured = capsys.readouterr()
    size = len(good)
    values = {"head": head, "file": weights(head), "parent": head.parent.resolve(), "last": last}
    shown = message.format(**values, size=size, size_1=size - 1)
    assert captured.err == f"python -m convert: error: {shown}\n"
    assert captured.out == ""
    assert sorted(head.parent.rglob("*")) == before


def test_a_cache_whose_blobs_lie_outside_is_refused(head, capsys):
    link_through_false_cache(head)
    snapshot = head / "snapshots" / "abc"
    assert run("--input", snapshot, "--output", head.parent / "out") == 2
    secret = (head.parent / "secret" / "config.json").resolve()
    assert f"config.json: is a link to {secret}, outside {snapshot}" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float16"])
def test_a_value_too_large_for_the_type_is_refused(dtype, head, capsys):
    change(rnn_u__bias=mx.full((32,), 1e5))(head)
    assert run("--input", head, "--output", head.parent / "out", "--dtype", dtype) == 2
    assert capsys.readouterr().err == (
        f"python -m convert: error: {weights(head)}: rnn_u.bias holds values too large for "
        "float16; use --dtype bfloat16\n"
    )
    assert not (head.parent / "out").exists()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nowhere", "--input 'nowhere' does not exist; give"),
        ("", "--input '' does not exist; give"),
        ("{head}/config.json", "config.json: is not a file of weights; give"),
    ],
)
def test_an_input_that_is_none(name, fault, head, capsys):
    assert run("--input", name.format(head=head), "--output", head.parent / "out") == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1
