"""Drafter checkpoints: every layout that must load, and damage that must be refused by name."""

import json
import logging
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from redrafter_mlx.drafters.checkpoint import load_head
from redrafter_mlx.drafters.head import HeadConfig
from redrafter_mlx.errors import UserError

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
FULL = GOLDEN / "full_exit"  # hidden size 32, vocabulary 97, exit 64, two blocks
OUTPUT = "lm_head.2.weight"
DRAFT_IDS = sorted(np.random.default_rng(0).choice(97, 40, replace=False).tolist())


@pytest.fixture
def path(tmp_path) -> Path:
    """A copy of a good head to change."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FULL / name, tmp_path / name)
    return tmp_path


def change_config(path: Path, **keys) -> None:
    """Set keys of config.json; a value of `...` removes the key."""
    config = json.loads((path / "config.json").read_text()) | keys
    kept = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


def tensors_of(path: Path) -> dict[str, mx.array]:
    tensors = mx.load(str(path / "model.safetensors"))
    mx.eval(tensors)  # before the file is written anew
    return tensors


def change_tensors(path: Path, *removed: str, **changed: mx.array) -> None:
    """Remove and set tensors; in keywords `__` stands for the dot."""
    tensors = tensors_of(path)
    for name in removed:
        del tensors[name]
    tensors |= {name.replace("__", "."): value for name, value in changed.items()}
    mx.save_safetensors(str(path / "model.safetensors"), tensors)


def reduce_vocabulary(path: Path, ids=DRAFT_IDS) -> None:
    """Keep the output rows of `ids`; d2t holds the offset of each from its place."""
    output = tensors_of(path)[OUTPUT]
    offsets = mx.array(np.array(ids) - np.arange(len(ids)))
    change_tensors(path, d2t=offsets, lm_head__2__weight=output[mx.array(ids)])
    change_config(path, draft_vocab_size=len(ids))


def quantize_file(path: Path, bits: int, group_size: int = 32) -> nn.Module:
    """Quantise every layer of the head in the file; the quantised head."""
    head, _ = load_head(path, mx.float32)
    nn.quantize(head, group_size=group_size, bits=bits)
    head.save_weights(str(path / "model.safetensors"))
    change_config(path, quantization={"group_size": group_size, "bits": bits})
    return head


def logits(head) -> np.ndarray:
    expected = mx.load(str(FULL / "expected.safetensors"))
    return np.array(head.exit(expected["head_input"]).astype(mx.float32))


def golden_logits() -> np.ndarray:
    return np.array(mx.load(str(FULL / "expected.safetensors"))["head_logits"])


def refused(path: Path, dtype: mx.Dtype = mx.float32) -> str:
    """The one-line message with which the head is refused."""
    with pytest.raises(UserError) as caught:
        load_head(path, dtype)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------
# What loads


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("full_exit", HeadConfig(97, 32, 64, num_blocks=2, rnn=True, draft_vocab_size=97)),
        ("projected_exit", HeadConfig(131, 24, 40, num_blocks=1, rnn=True, draft_vocab_size=131)),
        ("sum_state", HeadConfig(97, 32, 64, num_blocks=3, rnn=False, draft_vocab_size=97)),
    ],
)
def test_a_head_in_the_layout_of_the_reference_loads(case, config):
    head, d2t = load_head(GOLDEN / case, mx.float32)
    assert head.config == config
    assert d2t.tolist() == list(range(config.vocab_size))
    assert d2t.dtype == mx.int32
    saved = mx.load(str(GOLDEN / case / "model.safetensors"))
    loaded = dict(tree_flatten(head.parameters()))
    assert loaded.keys() == saved.keys()
    assert all(mx.array_equal(loaded[name], saved[name]).item() for name in saved)


def test_the_number_of_blocks_comes_from_the_tensors(path):
    change_config(path, num_draft_layers=7)
    head, _ = load_head(path, mx.float32)
    assert head.config.num_blocks == 2
    np.testing.assert_allclose(logits(head), golden_logits(), rtol=1e-4, atol=1e-3)


def test_a_reduced_vocabulary_gives_the_logits_of_its_own_ids(path):
    reduce_vocabulary(path)
    head, d2t = load_head(path, mx.float32)
    assert (head.config.draft_vocab_size, head.config.vocab_size) == (40, 97)
    assert d2t.tolist() == DRAFT_IDS
    assert d2t.dtype == mx.int32
    np.testing.assert_allclose(logits(head), golden_logits()[:, DRAFT_IDS], rtol=1e-4, atol=1e-3)


def test_a_reduced_vocabulary_need_not_be_sorted(path):
    ids = DRAFT_IDS[::-1]
    reduce_vocabulary(path, ids)
    head, d2t = load_head(path, mx.float32)
    assert d2t.tolist() == ids
    np.testing.assert_allclose(logits(head), golden_logits()[:, ids], rtol=1e-4, atol=1e-3)


def test_a_head_in_two_files_loads_as_one(path):
    tensors = sorted(tensors_of(path).items())
    (path / "model.safetensors").unlink()
    for number, part in enumerate((tensors[:3], tensors[3:]), start=1):
        mx.save_safetensors(str(path / f"model-0000{number}-of-00002.safetensors"), dict(part))
    head, _ = load_head(path, mx.float32)
    np.testing.assert_allclose(logits(head), golden_logits(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["emb_norm.weight", "t2d"])
def test_a_tensor_that_has_no_use_is_ignored_and_told(path, name, caplog):
    change_tensors(path, **{name: mx.ones(97)})
    with caplog.at_level(logging.INFO, logger="redrafter_mlx"):
        head, _ = load_head(path, mx.float32)
    assert f"{name} is ignored" in caplog.text
    np.testing.assert_allclose(logits(head), golden_logits(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_gives_the_logits_of_its_dequantised_weights(path, bits):
    quantised = quantize_file(path, bits)
    head, _ = load_head(path, mx.float32)
    assert isinstance(head.lm_head[0].linear, nn.QuantizedLinear)
    assert head.lm_head[-1].bits == bits
    plain, _ = load_head(FULL, mx.float32)
    weights = dict(tree_flatten(plain.parameters()))
    for name, layer in quantised.named_modules():
        if isinstance(layer, nn.QuantizedLinear):
            packed = layer.weight, layer.scales, layer.biases
            weights[f"{name}.weight"] = mx.dequantize(*packed, layer.group_size, bits)
    plain.load_weights(list(weights.items()))
    np.testing.assert_allclose(logits(head), logits(plain), rtol=1e-4, atol=1e-3)
    error = np.abs(logits(head) - golden_logits()).max() / np.abs(golden_logits()).max()
    assert 0 < error < (0.02 if bits == 8 else 0.3)


def test_only_the_layers_with_scales_are_quantised(path):
    output = tensors_of(path)[OUTPUT]
    names = ("lm_head.2.weight", "lm_head.2.scales", "lm_head.2.biases")
    change_tensors(path, **dict(zip(names, mx.quantize(output, 32, 8), strict=True)))
    change_config(path, quantization={"group_size": 32, "bits": 8})
    head, _ = load_head(path, mx.float32)
    assert isinstance(head.lm_head[-1], nn.QuantizedLinear)
    assert isinstance(head.lm_head[0].linear, nn.Linear)
    assert np.abs(logits(head) - golden_logits()).max() < 0.02 * np.abs(golden_logits()).max()


@pytest.mark.parametrize(("dtype", "digits"), [(mx.float16, 2e-3), (mx.bfloat16, 2e-2)])
def test_weights_are_cast_to_the_type_of_the_target(path, dtype, digits):
    head, d2t = load_head(path, dtype)
    assert {value.dtype for _, value in tree_flatten(head.parameters())} == {dtype}
    assert d2t.dtype == mx.int32
    scale = np.abs(golden_logits()).max()
    inputs = mx.load(str(FULL / "expected.safetensors"))["head_input"].astype(dtype)
    got = np.array(head.exit(inputs).astype(mx.float32))
    assert np.abs(got - golden_logits()).max() < digits * scale


def test_packed_weights_are_not_cast(path):
    quantize_file(path, 4)
    head, _ = load_head(path, mx.bfloat16)
    layer = head.lm_head[-1]
    assert (layer.weight.dtype, layer.scales.dtype) == (mx.uint32, mx.bfloat16)


# ---------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1]", "model_type is None"),
        (b"3", "model_type is None"),
        (b"{}", "model_type is None"),
        (b'{"model_type": "llama"}', "model_type is 'llama'"),
        pytest.param(b"[" * 100_000, "is not JSON", id="100000 brackets"),
    ],
)
def test_a_config_that_is_not_that_of_a_head_is_refused(path, content, fault):
    (path / "config.json").unlink()
    if content is not None:
        (path / "config.json").write_bytes(content)
    message = refused(path)
    assert str(path / "config.json") in message
    assert fault in message


@pytest.mark.parametrize("value", [..., None, 0, -1, "32", 32.0, []], ids=repr)
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "exit_dim"])
def test_a_size_that_is_no_positive_number_is_refused(path, key, value):
    change_config(path, **{key: value})
    message = refused(path)
    assert f"config.json: {key} is {None if value is ... else value!r}" in message


@pytest.mark.parametrize("value", [-1, "32", 32.0, [40]], ids=repr)
def test_a_draft_vocabulary_that_is_no_positive_number_is_refused(path, value):
    change_config(path, draft_vocab_size=value)
    assert f"draft_vocab_size is {value!r}" in refused(path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tied_output": "yes"}, "tied_output is 'yes', not true or false"),
        ({"tied_output": True}, "a tied output needs an exit_dim of hidden_size 32, not 64"),
        ({"fused_layers": 3}, "fused_layers is 3, not layer numbers"),
        ({"fused_layers": [1, True]}, "fused_layers is [1, True], not layer numbers"),
        ({"fused_layers": [-1]}, "fused_layers is [-1], not layer numbers"),
        ({"fused_layers": [1]}, "lacks the tensors input_proj.bias, input_proj.weight"),
    ],
)
def test_extensions_that_cannot_be_are_refused(path, changes, fault):
    change_config(path, **changes)
    assert fault in refused(path)


@pytest.mark.parametrize("value", [2**31, 10**30], ids=["2**31", "10**30"])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "exit_dim", "draft_vocab_size"])
def test_a_size_that_no_array_can_have_is_refused(path, key, value):
    change_config(path, **{key: value})
    message = refused(path)
    assert key in message
    assert str(value) in message


@pytest.mark.parametrize("sizes", [(2**30, 64), (2, 2**30)], ids=str)
def test_a_lookback_that_no_array_can_hold_is_refused(path, sizes):
    change_config(path, lookback_heads=sizes[0], lookback_size=sizes[1])
    assert "its sizes are larger than any array can be" in refused(path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "exit_dim"])
def test_a_size_that_the_tensors_do_not_have_is_refused(path, key):
    change_config(path, **{key: 48})
    message = refused(path)
    assert ".weight" in message
    assert "has shape" in message or "lacks the tensors input_proj" in message


def test_a_draft_vocabulary_that_the_output_layer_does_not_have_is_refused(path):
    change_config(path, draft_vocab_size=40)
    assert "no d2t" in refused(path)
    change_tensors(path, d2t=mx.zeros(40, mx.int64))
    assert f"{OUTPUT} has shape (97, 64), expected (40, 64)" in refused(path)


def test_a_draft_vocabulary_beyond_the_targets_is_refused(path):
    change_config(path, draft_vocab_size=200)
    change_tensors(path, lm_head__2__weight=mx.zeros((200, 64)))
    message = refused(path)
    assert "200" in message
    assert "97" in message


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (None, "None"),
        ([], "[]"),
        (3, "3"),
        ({}, "group_size"),
        ({"group_size": 32}, "bits"),
        ({"group_size": 32, "bits": 99}, "99"),
        ({"group_size": 32, "bits": 0}, "0"),
        ({"group_size": 32, "bits": -4}, "-4"),
        ({"group_size": 32, "bits": "4"}, "'4'"),
        ({"group_size": 32, "bits": 4.5}, "4.5"),
        ({"group_size": -32, "bits": 4}, "-32"),
        ({"group_size": 48, "bits": 4}, "48"),
    ],
    ids=str,
)
def test_quantisation_that_makes_no_sense_is_refused(path, settings, fault):
    quantize_file(path, 4)
    change_config(path, quantization=settings)
    message = refused(path)
    assert "config.json: quantization" in message
    assert fault in message


def test_groups_of_nothing_are_refused(path):
    """In a process of its own: dividing by this size would end it without an exception."""
    quantize_file(path, 4)
    change_config(path, quantization={"group_size": 0, "bits": 4})
    program = (
        "import sys, pathlib, redrafter_mlx, mlx.core as mx\n"
        "from redrafter_mlx.drafters.checkpoint import load_head\n"
        "try: load_head(pathlib.Path(sys.argv[1]), mx.float32)\n"
        "except redrafter_mlx.UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0
    assert "config.json: quantization" in done.stdout


@pytest.mark.parametrize("settings", [{"bits": 8}, {"group_size": 64}], ids=str)
def test_quantisation_that_the_tensors_do_not_have_is_refused(path, settings):
    output = tensors_of(path)[OUTPUT]
    names = ("lm_head.2.weight", "lm_head.2.scales", "lm_head.2.biases")
    change_tensors(path, **dict(zip(names, mx.quantize(output, 32, 4), strict=True)))
    change_config(path, quantization={"group_size": 32, "bits": 4} | settings)
    message = refused(path)
    assert "lm_head.2." in message
    assert "has shape" in message


def test_packed_weights_without_their_settings_are_refused(path):
    quantize_file(path, 4)
    change_config(path, quantization=...)
    assert "lm_head.2.scales" in refused(path)


# ---------------------------------------------------------------------------------------------
# Files


def test_a_head_without_weights_is_refused(path):
    (path / "model.safetensors").unlink()
    assert "holds no model*.safetensors" in refused(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "drafter.pt", "checkpoint.pth"])
def test_a_pytorch_file_in_place_of_weights_is_named_with_the_converter(path, name):
    (path / "model.safetensors").rename(path / name)
    message = refused(path)
    assert f"{name} is a PyTorch file" in message
    assert f"'redrafter_mlx.convert --input {path} --output DIR' converts it" in message


GOOD = (FULL / "model.safetensors").read_bytes()
HEADER = struct.unpack("<Q", GOOD[:8])[0]


def with_header_length(length: int) -> bytes:
    return struct.pack("<Q", length) + GOOD[8:]


def with_entry(**keys) -> bytes:
    """The good file with its header's entry of the output layer changed."""
    header = json.loads(GOOD[8 : 8 + HEADER])
    header[OUTPUT] |= keys
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + GOOD[8 + HEADER :]


DAMAGED = {
    "empty": b"",
    "one byte": b"x",
    "cut in the header": GOOD[:50],
    "cut in half": GOOD[: len(GOOD) // 2],
    "cut by one byte": GOOD[:-1],
    "random bytes": np.random.default_rng(0).bytes(5000),
    "git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "header of no bytes": with_header_length(0),
    "header one byte long": with_header_length(1),
    "header one byte too long": with_header_length(HEADER + 1),
    "header of 2**40 bytes": with_header_length(2**40),
    "header of 2**63 bytes": with_header_length(2**63),
    "header of 2**64 - 1 bytes": with_header_length(2**64 - 1),
    "header is a list": struct.pack("<Q", 2) + b"[]",
    "unknown type": with_entry(dtype="X9"),
    "shape is a word": with_entry(shape="large"),
    "shape larger than its data": with_entry(shape=[9700, 64]),
    "shape beyond any memory": with_entry(shape=[2**40, 2**40]),
    "data beyond the end": with_entry(data_offsets=[10**9, 10**9 + 97 * 64 * 4]),
    "negative offset": with_entry(data_offsets=[-8, 97 * 64 * 4 - 8]),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_name(path, content):
    (path / "model.safetensors").write_bytes(content)
    message = refused(path)
    assert f"{path / 'model.safetensors'}: is not a complete safetensors file" in message


@pytest.mark.parametrize("length", [HEADER - 1, HEADER - 8])
def test_data_that_begin_in_the_wrong_place_are_refused(path, length):
    """The header's padding hides that it is cut; the weights then are noise."""
    (path / "model.safetensors").write_bytes(with_header_length(length))
    assert refused(path)


def test_the_damaged_one_of_two_files_is_named(path):
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    (path / "model-00002-of-00002.safetensors").write_bytes(GOOD[:100])
    assert "model-00002-of-00002.safetensors: is not a complete" in refused(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_under_the_name_of_weights_is_refused_unopened(path, protocol, tmp_path):
    witness = tmp_path / "witness"
    with (path / "model.safetensors").open("wb") as file:
        pickle.dump(Trap(witness), file, protocol)
    assert "model.safetensors: is" in refused(path)
    assert not witness.exists()
    if protocol >= 2:  # what torch.save writes
        assert "pickled PyTorch file" in refused(path)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("length", [0x0380, 0x0480, 0x0580, 0x4B50], ids=hex)
def test_a_header_whose_length_looks_like_a_pickle_is_read(path, length):
    """Lengths are stored low byte first, and 0x80 0x03 is how pickles of protocol 3 start."""
    header = json.dumps(json.loads(GOOD[8 : 8 + HEADER]), separators=(",", ":")).encode()
    start = struct.pack("<Q", length) + header.ljust(length)
    (path / "model.safetensors").write_bytes(start + GOOD[8 + HEADER :])
    assert len(header) <= length
    load_head(path, mx.float32)


def test_a_zip_under_the_name_of_weights_is_refused(path):
    with zipfile.ZipFile(path / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    message = refused(path)
    assert "model.safetensors: is a pickled PyTorch file" in message
    assert f"redrafter_mlx.convert --input {path / 'model.safetensors'} --output" in message


def test_a_directory_under_the_name_of_weights_is_refused(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()
    assert str(path / "model.safetensors") in refused(path)


def test_a_link_to_nothing_under_the_name_of_weights_is_refused(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "nowhere")
    assert str(path / "model.safetensors") in refused(path)


# ---------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize("name", ["rnn_u.bias", "lm_head.0.linear.bias", OUTPUT])
def test_a_missing_tensor_is_named(path, name):
    change_tensors(path, name)
    assert f"lacks the tensors {name}" in refused(path)


def test_an_extra_tensor_is_named(path):
    change_tensors(path, rnn_v__weight=mx.zeros((32, 32)))
    assert "no part of the head uses: rnn_v.weight" in refused(path)


def test_a_file_without_tensors_is_refused(path):
    mx.save_safetensors(str(path / "model.safetensors"), {})
    assert "lacks the tensors" in refused(path)


def test_a_gap_between_the_blocks_is_refused(path):
    tensors = tensors_of(path)
    moved = {
        "lm_head.3.weight": tensors[OUTPUT],
        "lm_head.2.linear.weight": tensors["lm_head.1.linear.weight"],
        "lm_head.2.linear.bias": tensors["lm_head.1.linear.bias"],
    }
    gone = (OUTPUT, "lm_head.1.linear.weight", "lm_head.1.linear.bias")
    change_tensors(path, *gone, **moved)
    message = refused(path)
    assert "lm_head.1.linear.weight" in message
    assert "lacks the tensors" in message


def test_a_missing_last_block_is_refused(path):
    change_tensors(path, "lm_head.1.linear.weight", "lm_head.1.linear.bias")
    assert "lacks the tensors lm_head.1.weight" in refused(path)


@pytest.mark.parametrize("shape", [(97, 63), (96, 64), (64, 97), (97 * 64,), (1, 97, 64), ()])
def test_a_tensor_of_the_wrong_shape_is_named(path, shape):
    change_tensors(path, lm_head__2__weight=mx.zeros(shape))
    assert f"{OUTPUT} has shape {shape}, expected (97, 64)" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["rnn_u.bias", OUTPUT])
def test_a_single_value_that_is_not_finite_is_found(path, name, value):
    tensor = tensors_of(path)[name]
    last = mx.arange(tensor.size).reshape(tensor.shape) == tensor.size - 1
    change_tensors(path, **{name: mx.where(last, value, tensor)})
    assert f"{name} holds NaN or infinite values" in refused(path)


def test_a_value_that_the_type_of_the_target_cannot_hold_is_refused(path):
    change_tensors(path, rnn_u__bias=mx.full((32,), 1e5))
    load_head(path, mx.bfloat16)
    assert "rnn_u.bias" in refused(path, mx.float16)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.bool_, mx.complex64], ids=str)
def test_weights_that_are_no_real_numbers_are_refused(path, dtype):
    change_tensors(path, lm_head__2__weight=tensors_of(path)[OUTPUT].astype(dtype))
    assert OUTPUT in refused(path)


# ---------------------------------------------------------------------------------------------
# The draft vocabulary


@pytest.mark.parametrize("shape", [(39,), (41,), (40, 1), ()])
def test_offsets_of_another_shape_are_refused(path, shape):
    reduce_vocabulary(path)
    change_tensors(path, d2t=mx.zeros(shape, mx.int32))
    message = refused(path)
    assert f"d2t has shape {shape}" in message
    assert "40" in message


OFFSETS = np.array(DRAFT_IDS) - np.arange(40)


@pytest.mark.parametrize(
    ("place", "offset"),
    [
        (0, -1),  # id -1
        (39, 97 - 39),  # the first id beyond the vocabulary
        (1, OFFSETS[0] - 1),  # the id of its neighbour
        (0, 2**31 - 1),
        (39, 2**31 - 1),  # 32 bits cannot hold the sum
        (0, -(2**31)),
    ],
)
def test_offsets_that_lead_to_no_id_or_to_the_same_one_twice_are_refused(path, place, offset):
    reduce_vocabulary(path)
    offsets = OFFSETS.copy()
    offsets[place] = offset
    change_tensors(path, d2t=mx.array(offsets))
    message = refused(path)
    assert "d2t does not map to distinct ids below 97" in message


def test_offsets_beyond_32_bits_do_not_wrap_around(path):
    reduce_vocabulary(path)
    change_tensors(path, d2t=mx.array(OFFSETS.astype(np.int64) + 2**32))
    assert "d2t" in refused(path)


def test_offsets_that_are_no_whole_numbers_are_refused(path):
    reduce_vocabulary(path, list(range(40)))
    change_tensors(path, d2t=mx.full((40,), 0.5))
    assert "d2t" in refused(path)


def test_offsets_of_the_whole_vocabulary_may_be_zero(path):
    change_tensors(path, d2t=mx.zeros(97, mx.int32))
    _, d2t = load_head(path, mx.float32)
    assert d2t.tolist() == list(range(97))
