"""The GGUF reader: what it finds, and damaged headers."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from gguf_writer import F16, F32, Q4_0, Gguf, tiny
from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.file import TensorInfo, read_gguf

METADATA = {
    "text": "naïve 🙂",
    "yes": True,
    "count": 7,
    "ratio": 0.5,
    "words": ["a", "", "▁b"],
    "numbers": [1, -2],
    "scores": [0.25, -1.0],
}


@pytest.mark.parametrize("version", [2, 3])
def test_what_was_written_is_read(tmp_path, version):
    tensors = {"a": (Q4_0, np.ones((3, 64), np.float32)), "b": (F32, np.ones(5, np.float32))}
    file = read_gguf(Gguf(METADATA, tensors, version).write(tmp_path / "x.gguf"))
    assert file.metadata == METADATA
    start = file.tensors["a"].start
    assert start % 32 == 0
    assert file.tensors == {
        "a": TensorInfo((3, 64), "Q4_0", start),
        "b": TensorInfo((5,), "F32", start + 128),  # 6 blocks of 18 bytes, padded
    }
    assert file.content[start + 128 :].tobytes() == np.ones(5, "<f4").tobytes() + bytes(12)


def test_all_kinds_of_numbers(tmp_path):
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
    formats[12] = "d"
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(formats))
    for kind, code in formats.items():
        data += struct.pack(f"<QcI{code}", 1, code.encode(), kind, 1)
    (tmp_path / "x.gguf").write_bytes(data)
    assert read_gguf(tmp_path / "x.gguf").metadata == dict.fromkeys(formats.values(), 1)


def test_alignment_is_the_files(tmp_path):
    gguf = Gguf({"general.alignment": 64}, {"a": (F16, np.ones(4, np.float32))})
    file = read_gguf(gguf.write(tmp_path / "x.gguf"))
    assert file.tensors["a"].start % 64 == 0


def header(tensors: int, values: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


NAME = struct.pack("<Q", 1) + b"x"

DAMAGED = {
    "nothing": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "10 GB of values": header(0, 10**10),
    "10 GB of tensors": header(10**10, 0),
    "a string of 10 GB": header(0, 1, struct.pack("<Q", 10**10) + b"x"),
    "an array of 10 GB": header(0, 1, NAME + struct.pack("<IIQ", 9, 4, 10**10)),
    "more than any integer": header(0, 1, NAME + struct.pack("<IIQ", 9, 12, 2**64 - 1)),
    "an array of arrays": header(0, 1, NAME + struct.pack("<IIQ", 9, 9, 1) + bytes(12)),
    "an unknown kind": header(0, 1, NAME + struct.pack("<I", 77)),
    "text that is none": header(0, 1, NAME + struct.pack("<IQ", 8, 1) + b"\xff"),
    "4 billion dimensions": header(1, 0, NAME + struct.pack("<I", 2**32 - 1)),
    "5 dimensions": header(1, 0, NAME + struct.pack("<I5QIQ", 5, *[1] * 5, 0, 0)),
    "the same tensor twice": header(2, 0, (NAME + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2),
    "alignment 0": header(
        0, 1, struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0)
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_headers_are_refused(tmp_path, what):
    path = tmp_path / "bad.gguf"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(UserError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.gguf"):
        read_gguf(tmp_path / "none.gguf")


def test_cutting_anywhere_in_the_header_is_refused(tmp_path):
    source = tiny().write(tmp_path / "cut.gguf")
    whole = source.read_bytes()
    end = min(info.start for info in read_gguf(source).tensors.values()) - 32
    for size in range(0, end, 97):
        source.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            read_gguf(source)
