"""Block formats of GGUF: every bit against NumPy, and against MLX's own reader."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from gguf_writer import ENCODINGS, F16, F32, Q4_0, Q4_1, Q8_0, Encoding, Gguf, foreign
from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.blocks import check_tensors, quantised_bits, read_tensor
from redrafter_mlx.gguf.file import TENSOR_TYPES, read_gguf

ROWS, COLUMNS = 48, 96
BLOCK_BYTES = {"F32": 4, "F16": 2, "Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def random_blocks(encoding: Encoding) -> bytes:
    """ROWS * COLUMNS weights of random bits, the scales finite numbers of any size and sign."""
    rng = np.random.default_rng(encoding.code)
    if encoding is F32:
        return rng.normal(0, 1, ROWS * COLUMNS).astype(np.float32).tobytes()
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


@pytest.mark.parametrize("code", [*sorted(TENSOR_TYPES.keys() - {0, 1, 2, 3, 8}), 99])
def test_other_types_are_refused_by_name(tmp_path, code):
    file = Gguf({}, {"x.weight": (foreign(code), np.zeros((1, 256)))}).write(tmp_path / "x.gguf")
    with pytest.raises(UserError) as caught:
        check_tensors(read_gguf(file))
    message = str(caught.value)
    assert f"tensor x.weight is {TENSOR_TYPES.get(code, 'type 99')}," in message
    assert "F32, F16, Q4_0, Q4_1, Q8_0" in message
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
    ],
    ids=["F32", "F16", "Q4_1", "Q8_0"],
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
