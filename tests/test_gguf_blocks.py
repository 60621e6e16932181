"""Block formats of GGUF: every bit against a second reading, and against MLX's own reader."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from gguf_writer import (
    BF16,
    BLOCK_TYPES,
    ENCODINGS,
    F16,
    F32,
    Q4_0,
    Q4_1,
    Q8_0,
    BlockType,
    Encoding,
    Gguf,
    foreign,
)
from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf import blocks
from redrafter_mlx.gguf.blocks import LAYOUTS, check_tensors, quantised_bits, read_tensor
from redrafter_mlx.gguf.file import TENSOR_TYPES, GgufFile, read_gguf

ROWS, COLUMNS = 48, 96
BLOCK_BYTES = {"F32": 4, "F16": 2, "Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def random_blocks(encoding: Encoding) -> bytes:
    """ROWS * COLUMNS weights of random bits, the scales finite numbers of any size and sign."""
    rng = np.random.default_rng(encoding.code)
    if encoding in (F32, BF16):
        return encoding.encode(rng.normal(0, 1, ROWS * COLUMNS).astype(np.float32))
    if encoding is F16:
        return finite_halves(rng, ROWS * COLUMNS).tobytes()
    count = ROWS * COLUMNS // 32
    blocks = rng.integers(0, 256, (count, BLOCK_BYTES[encoding.name]), dtype=np.uint8)
    for start in (0, 2) if encoding is Q4_1 else (0,):
        blocks[:, start : start + 2] = finite_halves(rng, count).view(np.uint8).reshape(count, 2)
    return blocks.tobytes()


def finite_halves(rng: np.random.Generator, count: int) -> np.ndarray:
    """Any bit pattern with a magnitude below 256, subnormal numbers and both zeros among them."""
    bits = rng.integers(0, 0x5C00, count, dtype=np.uint16)
    bits[:4] = 0, 1, 0x3FF, 0x400
    return (bits | rng.integers(0, 2, count, dtype=np.uint16) << 15).view(np.float16)


def written(path: Path, encoding: Encoding, data: bytes) -> Path:
    raw = Encoding(encoding.name, encoding.code, lambda weights: data, encoding.decode)
    return Gguf({}, {"x.weight": (raw, np.zeros((ROWS, COLUMNS)))}).write(path / "x.gguf")


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_every_bit_pattern_is_worth_what_numpy_says(tmp_path, encoding):
    data = random_blocks(encoding)
    file = read_gguf(written(tmp_path, encoding, data))
    parts = {name: mx.array(array) for name, array in read_tensor(file, "x.weight").items()}
    actual = parts["weight"].astype(mx.float32)
    if bits := quantised_bits(file, "x.weight"):
        scales, biases = (parts[name].astype(mx.float32) for name in ("scales", "biases"))
        actual = mx.dequantize(parts["weight"], scales, biases, group_size=32, bits=bits)
    expected = encoding.decode(data).reshape(ROWS, COLUMNS)
    assert actual.shape == (ROWS, COLUMNS)
    assert np.array_equal(np.array(actual), expected)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_the_layout_is_that_of_mx_load(tmp_path, encoding):
    path = written(tmp_path, encoding, random_blocks(encoding))
    theirs = mx.load(str(path), format="gguf")
    ours = read_tensor(read_gguf(path), "x.weight")
    assert {f"x.{part}" for part in ours} == theirs.keys()
    for part, array in ours.items():
        other = np.array(theirs[f"x.{part}"])
        assert array.dtype == other.dtype
        assert array.tobytes() == other.tobytes(), part


# ---------------------------------------------------------------------------------------------
# All block types, weight by weight


def made_of(path: Path, block_type: BlockType, data: bytes) -> GgufFile:
    """A file with one tensor of these blocks, a row each."""
    rows = len(data) // block_type.bytes
    raw = Encoding(block_type.name, block_type.code, lambda weights: data, block_type.decode)
    tensors = {"x.weight": (raw, np.zeros((rows, block_type.weights)))}
    return read_gguf(Gguf({}, tensors).write(path / "x.gguf"))


def dequantised(file: GgufFile) -> tuple[np.ndarray, np.ndarray]:
    """The weights as MLX reads them, (rows, columns), and the scale of each, both float32."""
    parts = read_tensor(file, "x.weight")
    assert {name: array.dtype for name, array in parts.items()} == {
        "weight": np.uint32,
        "scales": np.float16,
        "biases": np.float16,
    }
    weight = mx.array(parts["weight"])
    scales, biases = (mx.array(parts[name]).astype(mx.float32) for name in ("scales", "biases"))
    bits = quantised_bits(file, "x.weight")
    values = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
    return np.array(values), np.repeat(np.array(scales), 32, axis=1)


EXACT = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K"}


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_every_weight_is_worth_what_ggml_says(tmp_path, block_type):
    data = block_type.blocks(40)
    actual, scales = dequantised(made_of(tmp_path, block_type, data))
    expected = block_type.decode(data).reshape(actual.shape)
    assert np.abs(expected).max() > 1e-3
    error = np.abs(actual - expected)
    if block_type.name in EXACT:
        assert np.array_equal(actual, expected.astype(np.float32))
    elif block_type.name in {"Q2_K", "Q6_K"}:
        # Half a code, and the code is a 127th of the largest weight or a float16 above it.
        largest = np.repeat(np.abs(expected).reshape(-1, 32).max(axis=1), 32).reshape(error.shape)
        assert (np.abs(scales) <= largest / 127 * (1 + 2**-9) + 2**-23).all()
        assert (error <= np.abs(scales) * 0.5 * (1 + 1e-5)).all()
    else:
        # Scale and bias are rounded to float16, whose smallest step is 2^-24.
        codes = 256 if block_type.name == "Q8_K" else 32
        low = np.repeat(expected.reshape(-1, 32).min(axis=1), 32).reshape(error.shape)
        rounding = 2**-11 * (codes * np.abs(scales) + np.abs(low)) + 2**-25 * (codes + 1)
        assert (error <= rounding * 1.01).all()


@pytest.mark.parametrize("kind", ["Q2_K", "Q6_K"])
def test_values_are_those_of_mx_load(tmp_path, kind):
    """MLX reads some of the types itself, to float16, with code of another author.

    Its Q4_K, as of MLX 0.32.4, gives every second group of 32 weights the scale of the first.
    """
    block_type = next(t for t in BLOCK_TYPES if t.name == kind)
    file = made_of(tmp_path, block_type, block_type.blocks(40))
    actual, scales = dequantised(file)
    theirs = np.array(mx.load(str(file.path), format="gguf")["x.weight"].astype(mx.float32))
    assert (np.abs(actual - theirs) <= np.abs(scales) * 0.55 + 2**-10 * np.abs(theirs)).all()


def test_a_tensor_of_many_chunks_is_whole(tmp_path, monkeypatch):
    block_type = BLOCK_TYPES[-2]
    file = made_of(tmp_path, block_type, block_type.blocks(40))
    whole = read_tensor(file, "x.weight")
    monkeypatch.setattr(blocks, "CHUNK", 7)
    for part, array in read_tensor(file, "x.weight").items():
        assert np.array_equal(array, whole[part]), part


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_reading_takes_little_more_than_what_is_read(tmp_path, monkeypatch, block_type):
    """What comes out, once in chunks and once whole, and between the layouts only a chunk."""
    monkeypatch.setattr(blocks, "CHUNK", 2**9)
    file = made_of(tmp_path, block_type, block_type.blocks(2**21 // block_type.weights))
    tracemalloc.start()
    parts = read_tensor(file, "x.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * sum(array.nbytes for array in parts.values())


def test_bf16_is_exact(tmp_path):
    weights = np.random.default_rng(0).normal(0, 1e3, (8, 64)).astype(np.float32)
    encoded = Gguf({}, {"x.weight": (BF16, weights)})
    read = read_tensor(read_gguf(encoded.write(tmp_path / "x.gguf")), "x.weight")["weight"]
    assert np.array_equal(read, encoded.decoded()["x.weight"])
    assert np.abs(read / weights - 1).max() < 2**-7


@pytest.mark.parametrize("encoding", [Q4_0, Q4_1, Q8_0], ids=lambda encoding: encoding.name)
def test_blocks_hold_the_matrix_they_were_made_of(encoding):
    """The test's own arithmetic: half a step of the coarsest block is the largest error."""
    weights = np.random.default_rng(0).normal(0, 1, (8, 64)).astype(np.float32)
    decoded = encoding.decode(encoding.encode(weights)).reshape(weights.shape)
    steps = 7 if encoding is Q4_0 else 127 if encoding is Q8_0 else 7.5
    assert np.abs(decoded - weights).max() < 0.6 * np.abs(weights).max() / steps


KNOWN = [  # one block each: codes 0, 1, 2 ... in the low half, 15, 14 ... in the high one
    (
        Q4_0,
        "0038" + "".join(f"{15 - i:x}{i:x}" for i in range(16)),
        [0.5 * (i - 8) for i in range(16)],
    ),
    (
        Q4_1,
        "003800bc" + "".join(f"{15 - i:x}{i:x}" for i in range(16)),
        [0.5 * i - 1 for i in range(16)],
    ),
    (Q8_0, "0038" + "00017f80ff" + "00" * 27, [0, 0.5, 63.5, -64, -0.5]),
]


@pytest.mark.parametrize(
    ("encoding", "block", "values"), KNOWN, ids=lambda v: getattr(v, "name", "")
)
def test_a_block_by_hand(encoding, block, values):
    decoded = encoding.decode(bytes.fromhex(block))
    assert decoded[: len(values)].tolist() == values
    if encoding is not Q8_0:
        assert decoded[16:].tolist() == values[::-1]


# ---------------------------------------------------------------------------------------------
# Refused


FOREIGN = {code for code, name in TENSOR_TYPES.items() if name not in LAYOUTS}


@pytest.mark.parametrize("code", [*sorted(FOREIGN), 99])
def test_other_types_are_refused_by_name(tmp_path, code):
    file = Gguf({}, {"x.weight": (foreign(code), np.zeros((1, 256)))}).write(tmp_path / "x.gguf")
    with pytest.raises(UserError) as caught:
        check_tensors(read_gguf(file))
    message = str(caught.value)
    assert f"tensor x.weight is {TENSOR_TYPES.get(code, 'type 99')}," in message
    assert "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("code", "name"), [(12, "Q4_K"), (14, "Q6_K"), (20, "IQ4_NL"), (30, "BF16")]
)
def test_the_names_of_types_are_ggmls(code, name):
    assert TENSOR_TYPES[code] == name


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        (F32, np.float32([np.nan])),
        (F16, np.float16([np.inf])),
        (Q4_1, np.float16([1, np.nan])),
        (Q8_0, np.float16([1000])),  # 128 times as much is no float16
        (BF16, np.uint16([0x7F80])),
    ],
    ids=["F32", "F16", "Q4_1", "Q8_0", "BF16"],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path, encoding, data):
    path = written(tmp_path, encoding, data.tobytes() + random_blocks(encoding)[data.nbytes :])
    with pytest.raises(UserError, match=r"x\.weight holds numbers that are not finite"):
        read_tensor(read_gguf(path), "x.weight")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    raw = Encoding("Q8_0", 8, lambda weights: bytes(1000), Q8_0.decode)
    path = Gguf({}, {"x.weight": (raw, np.zeros((2, 48)))}).write(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"shape \(2, 48\), but Q8_0 comes in blocks of 32"):
        check_tensors(read_gguf(path))


NUMBERS = [(t, at, "<e") for t in BLOCK_TYPES for at in t.halves]
NUMBERS += [(t, at, "<f") for t in BLOCK_TYPES for at in t.singles]


@pytest.mark.parametrize(("block_type", "at", "code"), NUMBERS, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_blocks_that_are_not_finite_are_refused(tmp_path, block_type, at, code, bad):
    """In any float of any block; the codes are 1 and the small scales not 0, so that it counts."""
    data = bytearray(b"\x11" * block_type.bytes * 3)
    for start in range(0, len(data), block_type.bytes):
        for other in block_type.halves:
            struct.pack_into("<e", data, start + other, 0.5)
        for other in block_type.singles:
            struct.pack_into("<f", data, start + other, 0.5)
    read_tensor(made_of(tmp_path, block_type, bytes(data)), "x.weight")
    struct.pack_into(code, data, block_type.bytes + at, bad)
    with pytest.raises(UserError, match=r"x\.weight holds numbers that are not finite"):
        read_tensor(made_of(tmp_path, block_type, bytes(data)), "x.weight")


@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_a_tensor_that_ends_behind_the_file_is_refused(tmp_path, block_type):
    file = made_of(tmp_path, block_type, block_type.blocks(3))
    end = file.tensors["x.weight"].start + 3 * block_type.bytes
    whole = file.path.read_bytes()
    for cut in (end - 1, end - block_type.bytes, file.tensors["x.weight"].start):
        file.path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"ends at byte {end}, the file at {cut}"):
            check_tensors(read_gguf(file.path))
        with pytest.raises(UserError, match=f"ends at byte {end}, the file at {cut}"):
            read_tensor(read_gguf(file.path), "x.weight")


@pytest.mark.parametrize(
    "shape", [(2**63, 256), (2**40, 2**40, 256), (2**64 - 1, 2**64 - 256), (0, 256), (256, 0), ()]
)
@pytest.mark.parametrize("block_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_sizes_that_cannot_be_are_refused(tmp_path, block_type, shape):
    """No size is computed in fewer bits than it needs, and nothing is set aside for it."""
    infos = struct.pack("<Q", 1) + b"x" + struct.pack("<I", len(shape))
    infos += struct.pack(f"<{len(shape)}QIQ", *shape[::-1], block_type.code, 0)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + infos + bytes(4096))
    with pytest.raises(UserError, match=r"get the file again") as caught:
        check_tensors(read_gguf(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [0, 96, 2**64 - 32])
def test_tensors_that_share_bytes_are_refused(tmp_path, start):
    """Else a small file could hold any number of large tensors."""
    infos = b""
    for name, at in ((b"x", 0), (b"y", start)):
        infos += struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, 32, 0, at)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + infos + bytes(4096))
    wrong = "y ends at byte" if start > 96 else "tensors x and y share bytes"
    with pytest.raises(UserError, match=wrong):
        check_tensors(read_gguf(path))
