"""The adapter and its cache: positions, windows, growth, precision, refusals."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine import device
from redrafter_mlx.rounds.round import Verdict
from redrafter_mlx.rounds.tree import TokenTree
from redrafter_mlx.target.adapter import Target, adapt
from redrafter_mlx.target.cache import BLOCK, Branches, TreeCache
from redrafter_mlx.target.lineage import Lineage
from redrafter_mlx.target.probe import differences
from support import ScriptedDrafter, generation, ids, random_drafter, tiny_prompt

TREE = TokenTree.best(5, [1, 2, 3, 4, 6], [-1, -1, 0, 0, 1], [-1, -2, -3, -4, -5], budget=6)


def test_hidden_states_are_what_the_head_reads():
    model = build("llama")
    target = adapt(model)
    prompt = tiny_prompt(10)
    outcome = target.verify(target.prefill(prompt, chunk=4), TREE)
    assert mx.abs(model.lm_head(outcome.hidden) - outcome.logits).max().item() < 1e-5


def test_the_context_after_a_path_is_that_of_a_fresh_prefill():
    target = adapt(build("llama"))
    context = target.prefill(tiny_prompt(10), chunk=64)
    outcome = target.verify(context, TREE)
    for path in TREE.paths():
        again = target.prefill(tiny_prompt(10), chunk=64)
        outcome = target.verify(again, TREE)
        after = target.commit(again, TREE, outcome, Verdict(path, mx.array([9]), 9))
        text = [*tiny_prompt(10)[:-1], *TREE.tokens[path].tolist(), 9]
        text[9] = tiny_prompt(10)[-1]  # the root is the pending token, whatever the tree says
        fresh = target.prefill(text, chunk=64)
        assert after.position == fresh.position
        assert after.transcript.tokens == fresh.transcript.tokens
        assert mx.abs(after.hidden - fresh.hidden).max().item() < 1e-4


def test_chunks_of_a_prompt_make_no_difference():
    target = adapt(build("llama:sliding"))
    prompt = tiny_prompt(50)
    whole = target.prefill(prompt, chunk=64).hidden
    for chunk in (1, 7, 49):
        assert mx.abs(target.prefill(prompt, chunk).hidden - whole).max().item() < 1e-4


def test_prefill_never_evaluates_the_logits_of_the_prompt():
    """Peak memory stays far below the prompt's logits."""
    model = build("llama")
    model.lm_head = nn.Linear(64, 50_000, bias=False)
    model.model.embed_tokens = nn.Embedding(50_000, 64)
    target = Target(model)
    prompt = tiny_prompt(600)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    target.prefill(prompt, chunk=200)
    assert mx.get_peak_memory() - before < 200 * 50_000 * 4 / 4


@pytest.mark.parametrize("name", ["llama", "llama:sliding", "gemma3n"])
def test_long_texts_outgrow_the_buffers(monkeypatch, name):
    """Several blocks of generated text: buffers grow, windows drop what nobody sees any more."""
    model, prompt, n = build(name), tiny_prompt(20), 2 * BLOCK + 50
    plain = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=n)]
    drafter = ScriptedDrafter(prompt + plain, right=5, wrong=1, decoys=True)
    run = generation(model, prompt, drafter, max_tokens=n)
    made = []
    monkeypatch.setattr(Target, "empty_caches", spy(Target.empty_caches, made))
    assert ids(run) == plain
    for cache in made[-1].layers:
        assert cache.keys.shape[2] <= (2 * BLOCK if cache.window else 3 * BLOCK)


def spy(function, results):
    def wrapper(*args):
        results.append(function(*args))
        return results[-1]

    return wrapper


def test_a_window_drops_rows_only_when_they_are_out_of_sight():
    cache = TreeCache(window=8)
    rows = mx.arange(3 * BLOCK, dtype=mx.float32).reshape(1, 1, -1, 1)
    for start in range(0, 3 * BLOCK, 16):
        cache.begin(16)
        mask = cache.make_mask(16, return_array=True)
        chunk = rows[:, :, start : start + 16]
        keys, _ = cache.update_and_fetch(chunk, chunk)
        assert mask is None or isinstance(mask, str) or mask.shape[-1] == keys.shape[2]
        seen = keys[0, 0, :, 0].tolist()
        assert seen[-16 - min(start, 7) :] == list(range(start - min(start, 7), start + 16))
        cache.commit(range(16))
    assert cache.keys.shape[2] <= 2 * BLOCK


def test_the_tree_mask_follows_depths_not_rows():
    mask = np.array(Branches(TREE, length=3).mask(0, None))
    assert mask[:, :3].all()
    assert (mask[:, 3:] == Lineage(TREE.parents).mask).all()
    windowed = np.array(Branches(TREE, length=3).mask(0, 2))
    for row, depth in enumerate(TREE.depths):
        assert windowed[row, :3].tolist() == [3 + depth - column < 2 for column in range(3)]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_low_precision_targets_pass_the_probe(dtype, bits):
    model = build("llama", dtype=dtype)
    if bits:
        fits = lambda name, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
        nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)
    difference, _ = differences(Target(model), prefix=20)
    print(f"{dtype} {bits}: {difference:.2g} deviations")
    assert difference < 0.1
    run = generation(model, tiny_prompt(10), random_drafter(model), max_tokens=24)
    assert len(ids(run)) == 24


@pytest.mark.parametrize("name", ["deepseek_v41", "minimax_m3_vl"])
def test_models_that_cannot_branch_still_decode_plainly(name):
    model, prompt = build(name), tiny_prompt(10)
    theirs = [token for token, _ in generate_step(mx.array(prompt), build(name), max_tokens=12)]
    assert ids(generation(model, prompt, max_tokens=12)) == theirs
    with pytest.raises(UserError, match="--no-draft"):
        adapt(model)


def test_a_model_that_ignores_positions_is_caught_by_the_probe():
    """A rope that takes an offset and drops it: silently wrong but for the probe."""
    model = build("llama")

    class Deaf(nn.RoPE):
        def __call__(self, x, offset=0):
            return super().__call__(x, offset if isinstance(offset, int) else 0)

    for layer in model.layers:
        layer.self_attn.rope = Deaf(16)
    with pytest.raises(UserError, match="differ from one-path logits"):
        Target(model)


def test_a_target_is_made_once_and_leaves_the_model_usable():
    model, prompt = build("llama"), tiny_prompt(10)
    before = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=12)]
    parameters = sorted(name for name, _ in nn.utils.tree_flatten(model.parameters()))
    assert adapt(model) is adapt(model)
    after = [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=12)]
    assert after == before
    assert parameters == sorted(name for name, _ in nn.utils.tree_flatten(model.parameters()))
    assert type(model.lm_head) is nn.Linear


def test_read_gives_all_arrays_at_once():
    one, two = device.read(mx.array([1, 2]), mx.array([0.5]))
    assert one.tolist() == [1, 2]
    assert two.tolist() == [0.5]
