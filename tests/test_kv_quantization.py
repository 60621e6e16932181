"""--kv-bits: the same text as plain decoding with the same quantised cache."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.target.caches import LayerCaches
from support import ScriptedDrafter, generation, ids, tiny_prompt

WIDE = {"head_dim": 32, "hidden_size": 128}


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5"])
@pytest.mark.parametrize(("bits", "start"), [(8, 0), (4, 0), (4, 30), (2, 41)])
def test_trees_leave_the_text(name, bits, start):
    options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start}
    model, prompt = build(name, **WIDE), tiny_prompt(24)
    plain = ids(generation(model, prompt, max_tokens=60, kv=options))
    drafter = ScriptedDrafter(prompt + plain, right=3, wrong=1, decoys=True)
    run = generation(model, prompt, drafter, max_tokens=60, kv=options)
    assert ids(run) == plain
    assert run.stats.rounds < 60


def test_no_tree_reaches_over_where_quantisation_begins(monkeypatch):
    """However deep it is: Max-Gram's chains are as long as the budget."""
    kv = {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": 100}
    model, prompt = build("llama", **WIDE), tiny_prompt(24)
    plain = ids(generation(model, prompt, max_tokens=130, kv=kv))
    drafter = ScriptedDrafter(prompt + plain, right=90)
    run = generation(model, prompt, drafter, max_tokens=130, kv=kv)
    assert ids(run) == plain
    assert max(run.stats.sizes) > 16
    monkeypatch.setattr(LayerCaches, "takes", lambda *_: True)
    assert ids(generation(model, prompt, drafter, max_tokens=130, kv=kv)) != plain


def test_it_is_mlx_lms():
    model, prompt = build("llama", **WIDE), tiny_prompt(24)
    options = {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": 0}
    ours = ids(generation(model, prompt, max_tokens=60, kv=options))
    theirs = generate_step(mx.array(prompt), model, max_tokens=60, **options)
    assert ours == [token for token, _ in theirs]
    assert ours != ids(generation(model, prompt, max_tokens=60))


def test_memory_shrinks():
    from redrafter_mlx.target.adapter import Target
    from redrafter_mlx.target.cache import Quantization

    target, bytes_of = Target(build("llama", **WIDE)), {}
    for bits in (None, 8, 4):
        how = bits and Quantization(bits, 32, 0)
        context = target.prefill(tiny_prompt(90), chunk=16, caches=target.empty_caches(how))
        bytes_of[bits] = context.caches.nbytes
    assert bytes_of[4] < bytes_of[8] < 0.4 * bytes_of[None]


@pytest.mark.parametrize("flag", [{"kv_bits": 7}, {"kv_bits": 4, "kv_group_size": 48}])
def test_what_mlx_cannot_quantise_is_told(flag):
    with pytest.raises(UserError, match="mlx"):
        generation(build("llama"), [1, 2], max_tokens=2, kv=flag)
