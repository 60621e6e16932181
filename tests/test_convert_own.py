"""Heads with what only this package knows, such as a tied output, in the converter."""

import mlx.core as mx
import numpy as np
import pytest

from convert_heads import convert, read, run, same_bits, settings
from redrafter_mlx.drafters.checkpoint import load_head, save_head
from redrafter_mlx.drafters.head import HeadConfig, RecurrentHead

IDS = [5, 90, 3, 41, 7, 8, 60]


@pytest.fixture(
    params=[((), False, 0), ((0, 3), True, 0), ((), True, 0), ((0,), True, 2)],
    ids=["tied", "both", "tied, rnn", "looks back"],
)
def source(request, tmp_path):
    """A head whose ids are in order of frequency, as training writes them."""
    fused, rnn, heads = request.param
    config = HeadConfig(97, 64, 64, 2, rnn, len(IDS), True, fused, heads, 32)
    mx.random.seed(0)
    (tmp_path / "head").mkdir()
    save_head(tmp_path / "head", RecurrentHead(config), mx.array(IDS), mx.float16)
    return tmp_path / "head"


def test_a_copy_is_bit_equal(source, tmp_path):
    copy = convert(source, tmp_path / "copy")
    assert same_bits(read(source), read(copy))
    assert settings(source).items() <= settings(copy).items()


def test_a_packed_head_computes_nearly_the_same(source, tmp_path):
    packed = convert(source, tmp_path / "packed", "--quantize", 8, "--group-size", 32)
    whole, d2t = load_head(source, mx.float32)
    small, same_d2t = load_head(packed, mx.float32)
    assert d2t.tolist() == same_d2t.tolist() == IDS
    assert whole.config == small.config
    hidden = mx.random.normal((3, whole.config.context_size))
    state = whole.advance(None, mx.random.normal((3, 64)))
    expected, got = (np.array(head(head.read(hidden), state)) for head in (whole, small))
    assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_verify_compares_what_the_targets_head_would_read(source, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    convert(source, tmp_path / "packed", "--quantize", 8, "--verify")
    assert "largest difference" in capsys.readouterr().out


def test_fewer_ids_are_kept_without_touching_weights(source, tmp_path):
    counts = tmp_path / "counts.txt"
    counts.write_text("41 9\n5 7\n96 5\n3 1\n")
    fewer = convert(source, tmp_path / "fewer", "--draft-vocab", 2, counts)
    head, d2t = load_head(fewer, mx.float32)
    assert sorted(d2t.tolist()) == [5, 41]
    assert head.config.draft_vocab_size == 2
    without_ids = lambda path: {k: v for k, v in read(path).items() if k != "d2t"}
    assert same_bits(without_ids(source), without_ids(fewer))


@pytest.mark.parametrize("layout", ["apple", "tensorrt-llm"])
def test_other_frameworks_cannot_have_it(source, tmp_path, layout, capsys):
    assert run("--input", source, "--output", tmp_path / "out", "--to", layout) == 2
    assert "--output-layer trained" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_it_is(source, capsys):
    assert run("inspect", source) == 0
    said = capsys.readouterr().out
    assert "rows of the target's own head" in said
    assert ("also reads layers 0" in said) == bool(settings(source).get("fused_layers"))
    assert ("2 attention heads" in said) == bool(settings(source).get("lookback_heads"))
