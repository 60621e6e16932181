"""Metadata of a GGUF file as mlx-lm's configuration, scaled RoPE above all."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from gguf_writer import F32, HEAD_DIM, Gguf, tiny, tiny_metadata
from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.config import model_config
from redrafter_mlx.gguf.file import read_gguf

BASE = 500000.0


def config(tmp_path, gguf: Gguf) -> dict:
    return model_config(read_gguf(gguf.write(tmp_path / "tiny.gguf")))


def rope(config: dict):
    """mlx-lm's RoPE of a configuration, and its frequencies by rotating unit vectors."""
    return initialize_rope(
        config["head_dim"],
        config["rope_theta"],
        config["rope_traditional"],
        config.get("rope_scaling"),
        config["max_position_embeddings"],
    )


def rotated(config: dict, position: int) -> np.ndarray:
    """(head_dim / 2, 2): where (1, 0) of each neighbouring pair goes at a position."""
    x = mx.zeros((1, 1, 1, config["head_dim"]))
    x[..., 0::2] = 1
    return np.array(rope(config)(x, offset=position)).reshape(-1, 2)


def expected(angles: np.ndarray, scale: float = 1.0) -> np.ndarray:
    return scale * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def frequencies(dims: int = HEAD_DIM, base: float = BASE) -> np.ndarray:
    return base ** (-np.arange(0, dims, 2) / dims)


def llama3_factors(factor: float, dims: int = HEAD_DIM) -> np.ndarray:
    """As the converter of llama.cpp writes them, one branch per case."""
    factors = []
    for frequency in frequencies(dims):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def with_factors(factors: np.ndarray, **changes: object) -> Gguf:
    gguf = tiny(llama__rope__freq_base=BASE, **changes)
    gguf.tensors["rope_freqs.weight"] = (F32, factors.astype(np.float32))
    return gguf


def test_unscaled(tmp_path):
    made = config(tmp_path, tiny(llama__rope__freq_base=BASE))
    assert "rope_scaling" not in made
    assert np.allclose(rotated(made, 7), expected(7 * frequencies()), atol=1e-5)


@pytest.mark.parametrize("key", ["llama__rope__scaling__factor", "llama__rope__scale_linear"])
@pytest.mark.parametrize("kind", [{}, {"llama__rope__scaling__type": "linear"}])
def test_linear_scaling(tmp_path, key, kind):
    made = config(tmp_path, tiny(llama__rope__freq_base=BASE, **{key: 4.0}, **kind))
    assert np.allclose(rotated(made, 50), expected(50 * frequencies() / 4), atol=1e-5)


def test_scaling_of_type_none_is_none(tmp_path):
    changes = {"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}
    assert "rope_scaling" not in config(tmp_path, tiny(**changes))


def test_yarn(tmp_path):
    """Against ggml's formulas: corrected dimensions, a ramp between them, a longer vector."""
    changes = {
        "llama__rope__freq_base": BASE,
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 8.0,
        "llama__rope__scaling__original_context_length": 4096,
    }
    made = config(tmp_path, tiny(**changes))

    def dimension(turns: float) -> float:
        return HEAD_DIM * np.log(4096 / (turns * 2 * np.pi)) / (2 * np.log(BASE))

    low, high = np.floor(dimension(32)), np.ceil(dimension(1))
    ramp = 1 - np.clip((np.arange(HEAD_DIM // 2) - low) / (high - low), 0, 1)
    angles = 50 * frequencies() * ((1 - ramp) / 8 + ramp)
    assert 0 < ramp.sum() < HEAD_DIM // 2
    assert np.allclose(rotated(made, 50), expected(angles, 1 + 0.1 * np.log(8)), atol=1e-5)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("dims", [16, 64, 128])
def test_llama3_factors(tmp_path, factor, dims):
    gguf = with_factors(
        llama3_factors(factor, dims),
        llama__attention__key_length=dims,
        llama__attention__value_length=dims,
    )
    made = config(tmp_path, gguf)
    assert made["rope_scaling"]["factor"] == factor
    angles = 3 * frequencies(dims) / llama3_factors(factor, dims)
    assert np.allclose(rotated(made, 3), expected(angles), atol=1e-5)


def test_factors_of_one_scale_nothing(tmp_path):
    assert "rope_scaling" not in config(tmp_path, with_factors(np.ones(HEAD_DIM // 2)))


def refused(tmp_path, gguf: Gguf) -> str:
    with pytest.raises(UserError) as caught:
        config(tmp_path, gguf)
    message = str(caught.value)
    assert "tiny.gguf" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "factors",
    [np.linspace(1, 8, HEAD_DIM // 2), llama3_factors(8.0, 32), llama3_factors(8.0)[::-1]],
    ids=["ramp", "too many", "reversed"],
)
def test_other_factors_are_refused(tmp_path, factors):
    assert "rope_freqs.weight" in refused(tmp_path, with_factors(factors))


def test_factors_next_to_scaling_are_refused(tmp_path):
    gguf = with_factors(llama3_factors(8.0), llama__rope__scaling__factor=2.0)
    assert "rope_freqs.weight next to 'linear'" in refused(tmp_path, gguf)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general.architecture": "mamba"}, "'mamba'"),
        ({"general.architecture": None}, "general.architecture"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 0}, "llama.block_count = 0"),
        ({"llama.block_count": "two"}, "llama.block_count = 'two'"),
        ({"llama.feed_forward_length": [96, 96]}, "llama.feed_forward_length = [96, 96]"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads, 3 key heads"),
        ({"llama.attention.value_length": 8}, "keys of 16 and values of 8"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon = 0.0"),
        ({"llama.rope.freq_base": 1.0}, "llama.rope.freq_base = 1.0"),
        ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base = inf"),
        ({"llama.rope.scaling.factor": float("nan")}, "llama.rope.scaling.factor = nan"),
        ({"llama.rope.dimension_count": 8}, "8 of 16"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor = 2.0"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"tokenizer.ggml.tokens": 5}, "tokenizer.ggml.tokens"),
    ],
)
def test_what_a_llama_cannot_be_is_refused(tmp_path, changes, named):
    assert named in refused(tmp_path, Gguf(tiny_metadata(**changes), tiny().tensors))
