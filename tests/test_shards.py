"""Shards: what is written is read back, whole files only, and damage is named."""

import json

import mlx.core as mx
import numpy as np
import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.training import shards
from redrafter_mlx.training.lockstep import Conversation, K
from redrafter_mlx.training.shards import (
    held_out_path,
    held_out_shards,
    map_shard,
    shard_count,
    shard_metadata,
    shard_path,
    training_shards,
    write_batch,
    write_shard,
)

E = 8


def conversation(length, seed=0, dtype=mx.float16):
    draw = np.random.default_rng(seed)
    return Conversation(
        seed,
        draw.integers(0, 97, length).astype(np.int32),
        draw.integers(0, 3, length).astype(np.uint8),
        mx.array(draw.normal(size=(length, E))).astype(dtype),
        mx.array(draw.integers(0, 97, (length, K)).astype(np.int32)),
        mx.array(-draw.random((length, K))).astype(mx.float16),
    )


def several(count, length=5):
    return [conversation(length + seed, seed) for seed in range(count)]


def test_what_is_written_is_read_back(tmp_path):
    path = shard_path(tmp_path, 0)
    said = several(3)
    write_shard(path, said, {"state": "x"})
    arrays = map_shard(path)
    assert arrays["starts"].tolist() == [0, 5, 11]
    for name in ("tokens", "roles", "hidden", "top_ids", "top_logits"):
        expected = np.concatenate([np.array(getattr(c, name)) for c in said])
        assert (arrays[name] == expected).all()
        assert arrays[name].dtype == expected.dtype
    assert shard_metadata(path) == {"state": "x"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_bfloat16_states_are_mapped_as_bits(tmp_path):
    path = shard_path(tmp_path, 0)
    said = conversation(5, dtype=mx.bfloat16)
    write_shard(path, [said], {})
    bits = mx.array(map_shard(path)["hidden"]).view(mx.bfloat16)
    assert mx.array_equal(bits, said.hidden)


def test_one_conversation_of_sixteen_is_held_out(tmp_path):
    for number, count in enumerate((1, 2, 34)):
        write_batch(tmp_path, number, several(count), {})
    counts = lambda paths: [len(map_shard(path)["starts"]) for path in paths]
    assert counts(training_shards([tmp_path])) == [1, 1, 31]
    assert counts(held_out_shards([tmp_path])) == [1, 3]
    assert shard_count(tmp_path) == 3
    held_out = map_shard(held_out_path(tmp_path, 2))["tokens"].tolist()
    assert held_out == [t for i in (1, 17, 33) for t in several(34)[i].tokens.tolist()]


def test_a_batch_counts_once_its_last_file_is_there(tmp_path, monkeypatch):
    write_batch(tmp_path, 0, several(2), {})

    def full(path, arrays, metadata):
        if "shard" in path:
            raise RuntimeError("no space left")
        return save(path, arrays, metadata)

    save = mx.save_safetensors
    monkeypatch.setattr(shards.mx, "save_safetensors", full)
    with pytest.raises(RuntimeError):
        write_batch(tmp_path, 1, several(2), {})
    assert shard_count(tmp_path) == len(held_out_shards([tmp_path])) == 1


def test_a_file_that_was_silently_cut_short_does_not_count(tmp_path, monkeypatch):
    def short(path, arrays, metadata):
        with open(path, "wb") as file:
            file.write(b"0" * 100)

    monkeypatch.setattr(shards.mx, "save_safetensors", short)
    with pytest.raises(OSError, match="cut short"):
        write_shard(shard_path(tmp_path, 0), several(2), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 4, 20, 300, -1])
def test_a_truncated_shard_is_named(tmp_path, size):
    path = shard_path(tmp_path, 0)
    write_shard(path, several(3), {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"shard-00000.* is not a complete shard") as told:
        map_shard(path)
    assert "delete it" in str(told.value)
    with pytest.raises(UserError):
        shard_metadata(path)


def test_foreign_files_are_named(tmp_path):
    path = shard_path(tmp_path, 0)
    whole = {"tokens": mx.zeros(4, mx.int32), "roles": mx.zeros(4, mx.uint8)}
    whole["hidden"] = mx.zeros((4, E), mx.float16)
    whole["top_ids"] = mx.zeros((4, K), mx.int32)
    whole["top_logits"] = mx.zeros((4, K), mx.float16)
    whole["starts"] = mx.zeros(1, mx.int32)
    mx.save_safetensors(str(path), whole)
    assert len(map_shard(path)["tokens"]) == 4
    for change in (
        {"roles": None},
        {"roles": mx.zeros(3, mx.uint8)},
        {"starts": mx.zeros(0, mx.int32)},
        {"hidden": mx.zeros((4, E), mx.float32)},
    ):
        arrays = {name: x for name, x in (whole | change).items() if x is not None}
        mx.save_safetensors(str(path), arrays)
        with pytest.raises(UserError, match="is not a complete shard"):
            map_shard(path)
    header = json.dumps([1, 2]).encode()
    for content in (b"GGUF" * 50, len(header).to_bytes(8, "little") + header):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a complete shard"):
            map_shard(path)


def test_a_shard_is_one_open_file(tmp_path):
    """A run of hours has hundreds of shards, and macOS lets a process open 256 files."""
    write_shard(tmp_path / "shard.safetensors", several(1), {})
    mapped = map_shard(tmp_path / "shard.safetensors")
    files = {id(array.base) for array in mapped.values()}
    assert len(mapped) == 6
    assert len(files) == 1
