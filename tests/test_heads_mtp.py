"""Multi-token-prediction heads: the reference's numbers, mlx-lm's own layers, the same text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import make_prompt_cache

from convert_heads import read, settings, write
from families import build, config
from redrafter_mlx.drafters.attention import AttentionDrafter, TextCache
from redrafter_mlx.drafters.kinds import recognised
from redrafter_mlx.drafters.mtp import KIND
from redrafter_mlx.drafters.published import load_published, shards_of
from redrafter_mlx.drafters.text import SharedVocabulary
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading.drafters import load_drafter
from redrafter_mlx.rounds.round import Trail, View
from redrafter_mlx.target.adapter import Target, adapt
from support import generation, ids, tiny_prompt

HEADS = Path(__file__).parent / "fixtures" / "heads"
FIXTURES = ["mtp_qwen3_next", "mtp_qwen3_5", "mtp_qwen3_5_moe"]
H, VOCAB, LENGTH = 64, 97, 12


# ---------------------------------------------------------------------------------------------
# The reference's numbers


def check_reference(path: Path, name: str, atol: float = 1e-4) -> None:
    """The head in `path` computes what the fixture says: the text, drafts, and the next round."""
    head, _ = load_published(KIND, path, mx.float32)
    facts = dict(np.load(HEADS / name / "reference.npz"))
    table, output = mx.array(facts["embedding"]), mx.array(facts["lm_head"])
    vocabulary = SharedVocabulary(mx.arange(len(output)), lambda hidden: hidden @ output.T)
    drafter = AttentionDrafter(head, vocabulary, lambda t: table[t], View((0,), table.shape[1]))
    logits = lambda hidden: vocabulary.project(head.outputs(hidden), {})
    text, states = facts["text"].tolist(), mx.array(facts["states"])

    cache = TextCache(head, drafter.embed, drafter.view)
    begun, memory = cache.of_whole(text, states[: len(text) - 1], 1)
    np.testing.assert_allclose(logits(begun), facts["prefill_logits"], atol=atol)

    steps = drafter.steps(begun[-1:], [*memory[:-1], memory[-1][-1:]])
    state = steps.advance(None, mx.array(text[-1:]))
    drafted = [mx.argmax(logits(state.hidden)).item()]
    for expected in facts["step_logits"]:
        state = steps.advance(state, mx.array(drafted[-1:]))
        np.testing.assert_allclose(logits(state.hidden)[0], expected, atol=atol)
        drafted.append(mx.argmax(logits(state.hidden)).item())
    assert drafted == facts["drafted"].tolist()

    found = cache.take_in(facts["next_tokens"].tolist(), states[len(text) - 1 :])
    np.testing.assert_allclose(logits(found), facts["next_logits"], atol=atol)


def rewritten(path: Path, name: str, rename=lambda n: n, change=lambda n, x: x, **config) -> Path:
    """A fixture with other names, values or settings."""
    tensors = {rename(n): change(n, x) for n, x in read(HEADS / name).items()}
    return write(path, tensors, settings(HEADS / name) | config)


@pytest.mark.parametrize("name", FIXTURES)
def test_it_computes_what_the_reference_does(name):
    check_reference(HEADS / name, name)


IS_NORM = r"mtp\..*norm(_embedding|_hidden)?\.weight"
CONVENTIONS = {
    "all": IS_NORM,
    "none": "",
    "but the layer's": r"mtp\.norm\.weight|mtp\..*[qk]_norm\.weight",
    "but the last": r"mtp\.(layers|pre_fc).*norm(_embedding|_hidden)?\.weight",
}


@pytest.mark.parametrize("added", CONVENTIONS.values(), ids=CONVENTIONS.keys())
@pytest.mark.parametrize("name", FIXTURES)
def test_norms_that_the_one_was_added_to_are_told_by_their_values(name, added, tmp_path):
    shift = lambda n, x: x + 1 if re.fullmatch(added, n) else x
    check_reference(rewritten(tmp_path, name, change=shift), name)


def test_norms_before_fc_may_damp(tmp_path):
    """Factors of 0.3 are no sign that the one is still to be added: the layer's norm tells."""
    name = "mtp_qwen3_5"
    factor = lambda n, x: x + 1 if re.fullmatch(IS_NORM, n) else x
    damp = lambda n, x: factor(n, x) * (0.3 if "pre_fc_norm_embedding" in n else 1)
    head, _ = load_published(KIND, rewritten(tmp_path, name, change=damp), mx.float32)
    raw = read(HEADS / name)["mtp.pre_fc_norm_embedding.weight"]
    np.testing.assert_allclose(head.norm_embedding.weight, 0.3 * (1 + raw), atol=1e-6)


SPECULATORS = {
    "fc": "input_proj",
    "norm": "final_layernorm",
    "pre_fc_norm_hidden": "hidden_layernorm",
    "pre_fc_norm_embedding": "token_layernorm",
}


def speculators_name(name: str) -> str:
    module, _, parameter = name.removeprefix("mtp.").rpartition(".")
    inner = SPECULATORS.get(module, module.removeprefix("layers.0."))
    return f"mtp_layers.0.{inner}.{parameter}" if name.startswith("mtp.") else name


RENAMED = {
    "taken out by mlx-vlm": lambda name: name.removeprefix("mtp."),
    "nested": lambda name: f"language_model.{name}",
    "speculators": speculators_name,
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED.keys())
@pytest.mark.parametrize("name", FIXTURES)
def test_other_names_of_the_same_tensors(name, rename, tmp_path):
    path = rewritten(tmp_path, name, rename)
    given = settings(path)
    text = given.get("text_config", given)
    if rename is speculators_name:
        given = {"speculators_model_type": "mtp", "transformer_layer_config": text}
    elif "text_config" in given:
        given = given | {"model_type": "qwen3_5_mtp"}
    (path / "config.json").write_text(json.dumps(given))
    check_reference(path, name)


def test_experts_may_be_fused_or_one_by_one(tmp_path):
    split = {}
    for name, x in read(HEADS / "mtp_qwen3_5_moe").items():
        place, is_expert, kind = name.partition(".experts.")
        for number, expert in enumerate(x if is_expert else ()):
            matrices = mx.split(expert, 2) if kind == "gate_up_proj" else [expert]
            for matrix, of in zip(matrices, kind.replace("gate_up", "gate").split(), strict=False):
                split[f"{place}.experts.{number}.{of}.weight"] = matrix
            if len(matrices) == 2:
                split[f"{place}.experts.{number}.up_proj.weight"] = matrices[1]
        if not is_expert:
            split[name] = x
    assert sum(".experts." in name for name in split) == 12
    path = write(tmp_path, split, settings(HEADS / "mtp_qwen3_5_moe"))
    check_reference(path, "mtp_qwen3_5_moe")


def in_fp8(weight: mx.array, block: int) -> tuple[mx.array, mx.array, mx.array]:
    """FP8 numbers, one scale for each block, and the weight that they stand for."""
    rows, columns = (-(-size // block) for size in weight.shape)
    scale = mx.random.uniform(0.5, 2.0, (rows, columns), key=mx.random.key(weight.size))
    each = mx.repeat(mx.repeat(scale, block, 0), block, 1)[: weight.shape[0], : weight.shape[1]]
    packed = mx.to_fp8(weight / each)
    return packed, scale, (mx.from_fp8(packed, mx.float32) * each).astype(mx.bfloat16)


def test_scaled_blocks_of_fp8(tmp_path):
    """Blocks that do not fill the matrix, and one norm and router that are no FP8."""
    packed, plain = {}, {}
    for name, x in read(HEADS / "mtp_qwen3_next").items():
        packed[name] = plain[name] = x
        if x.ndim == 2 and re.search(r"_proj\.weight$", name):
            packed[name], packed[f"{name}_scale_inv"], plain[name] = in_fp8(x, 24)
    given = settings(HEADS / "mtp_qwen3_next")
    packing = {"quant_method": "fp8", "weight_block_size": [24, 24]}
    write(tmp_path / "packed", packed, given | {"quantization_config": packing})
    write(tmp_path / "plain", plain, given)
    one, two = (load_published(KIND, tmp_path / n, mx.float32)[0] for n in ("packed", "plain"))
    for (name, a), (_, b) in zip(*(tree_flatten(h.parameters()) for h in (one, two)), strict=True):
        np.testing.assert_array_equal(a, b, name)


@pytest.mark.parametrize("name", FIXTURES)
def test_quantised_with_eight_bits_it_is_close(name, tmp_path):
    """As an MLX conversion would keep it, with the router in six bits of its own."""
    head, _ = load_published(KIND, HEADS / name, mx.float32)
    facts = dict(np.load(HEADS / name / "reference.npz"))
    router = {"group_size": 32, "bits": 6}

    def packing(path: str, module: nn.Module):
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return router if fits and path.endswith("mlp.gate") else fits

    nn.quantize(head, 32, 8, class_predicate=packing)
    theirs = {"norm_embedding": "pre_fc_norm_embedding", "norm_hidden": "pre_fc_norm_hidden"}
    tensors = {}
    for path, x in tree_flatten(head.parameters()):
        module, _, rest = path.partition(".")
        tensors[f"mtp.{theirs.get(module, module)}.{rest}".replace("layer.", "layers.0.")] = x
    given = {"group_size": 32, "bits": 8, "mtp.layers.0.mlp.gate": router}
    path = write(tmp_path, tensors, settings(HEADS / name) | {"quantization": given})
    again, _ = load_published(KIND, path, mx.float32)
    assert again.fc.bits == 8
    assert "gate" not in again.layer.mlp or again.layer.mlp.gate.bits == 6

    table, output = mx.array(facts["embedding"]), mx.array(facts["lm_head"])
    cache = TextCache(again, lambda t: table[t], View((0,), table.shape[1]))
    tokens = facts["prefill_tokens"].tolist()
    found, _ = cache.of_whole([0, *tokens], mx.array(facts["states"][: len(tokens)]), 1)
    error = np.abs(np.array(found @ output.T) - facts["prefill_logits"])
    assert 0 < error.max() < 0.1


# ---------------------------------------------------------------------------------------------
# mlx-lm's own layers. The head's layer is one of a tiny model's own; what is around it is random.

QWEN = ("mtp.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.{k}.")
EXTRA = ("model.layers.{n}.", "eh_proj", "enorm", "hnorm", "shared_head.norm", "")
MIMO = (
    "model.mtp_layers.{k}.", "input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm",
    "",
)  # fmt: skip
ERNIE = (
    "model.", "mtp_linear_proj.{k}", "mtp_emb_norm.{k}", "mtp_hidden_norm.{k}", None,
    "mtp_block.{k}.",
)  # fmt: skip
PLACES = {
    "qwen3_next": QWEN,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "deepseek_v3": EXTRA,
    "deepseek_v32": EXTRA,
    "glm4_moe": EXTRA,
    "glm4_moe_lite": EXTRA,
    "glm_moe_dsa": EXTRA,
    "mimo": MIMO,
    "ernie4_5_moe": ERNIE,
}


def random_parts(seed: int) -> dict[str, mx.array]:
    """What is around the layer; the norms as factors."""
    rng = np.random.default_rng(seed)
    norm = lambda: mx.array(1 + 0.2 * rng.standard_normal(H, np.float32))
    fc = mx.array(rng.standard_normal((H, 2 * H), np.float32) / np.sqrt(2 * H))
    return {"fc": fc, "embedding": norm(), "hidden": norm(), "norm": norm()}


def its_layer(name: str, model: nn.Module) -> nn.Module:
    """The model's own layer that is of the head's kind."""
    return model.layers[its_place(name)]


def its_place(name: str) -> int:
    return 0 if name == "ernie4_5_moe" else -1


def published(
    name: str, model: nn.Module, parts: dict[str, mx.array], k: int = 0
) -> dict[str, mx.array]:
    """The tensors of the head number k, as the model's authors publish them."""
    text = config(name)
    text = text.get("text_config", text)
    place = PLACES[name][0].format(n=text["num_hidden_layers"] + k, k=k)
    fc, embedding, hidden, norm, inner = (x and x.format(k=k) for x in PLACES[name][1:])
    given = {fc: parts["fc"], embedding: parts["embedding"], hidden: parts["hidden"]}
    if norm:
        given[norm] = parts["norm"]
    tensors = {f"{place}{n}.weight": x for n, x in given.items()}
    latent = {}
    for path, x in tree_flatten(its_layer(name, model).parameters()):
        if ".switch_mlp." in path:
            before, _, after = path.partition("switch_mlp.")
            each = {f"{before}experts.{i}.{after}": x[i] for i in range(len(x))}
        elif "embed_q" in path or "unembed_out" in path:
            each, latent[path] = {}, x
        else:
            each = {path: x}
        tensors |= {f"{place}{inner}{n}": x for n, x in each.items()}
    if latent:  # (heads, latent, nope) and (heads, value, latent)
        keys, values = latent["self_attn.embed_q.weight"], latent["self_attn.unembed_out.weight"]
        both = mx.concatenate([keys.swapaxes(1, 2), values], axis=1)
        tensors[f"{place}{inner}self_attn.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
    is_raw = lambda n: "qwen" in name and re.search(r"norm(_embedding|_hidden)?\.weight$", n)
    return {n: x - 1 if is_raw(n) else x for n, x in tensors.items()}


def made(path: Path, name: str, model: nn.Module, seed: int = 0) -> dict[str, mx.array]:
    """Write a head that fits the model; what is around its layer."""
    parts = random_parts(seed)
    write(path, published(name, model, parts), config(name))
    return parts


def by_hand(name: str, model: nn.Module, parts: dict, embedded: mx.array, hidden: mx.array):
    """(T, h) of mlx-lm's layer itself after (T, h) embeddings and (T, h) states, from nothing."""
    eps = its_layer(name, model).input_layernorm.eps
    joined = [
        mx.fast.rms_norm(embedded, parts["embedding"], eps),
        mx.fast.rms_norm(hidden, parts["hidden"], eps),
    ]
    x = mx.concatenate(joined[::-1] if name == "mimo" else joined, axis=-1) @ parts["fc"].T
    mask = create_causal_mask(len(x)) if len(x) > 1 else None
    cache = make_prompt_cache(model)[its_place(name)]
    x = its_layer(name, model)(x[None], mask, cache)[0]
    return x if name == "ernie4_5_moe" else mx.fast.rms_norm(x, parts["norm"], eps)


def replayed_by(path):
    """A drafter, embeddings (V, H), states (T, H), a text, what it begins with, its memory."""
    head, _ = load_published(KIND, path, mx.float32)
    rng = np.random.default_rng(1)
    table = mx.array(rng.standard_normal((VOCAB, H), np.float32))
    states = mx.array(rng.standard_normal((LENGTH, H), np.float32))
    text = tiny_prompt(LENGTH + 1)
    drafter = AttentionDrafter(head, None, lambda t: table[t], View((0,), H))
    begun, memory = drafter.replayed(text, states, 1)
    return drafter, table, states, text, begun, memory


@pytest.mark.parametrize("name", PLACES)
def test_it_computes_what_mlx_lms_layer_does(name, tmp_path):
    """All places of a text, then two drafts of it, side by side and two deep."""
    model = build(name)
    parts = made(tmp_path, name, model)
    drafter, table, states, text, begun, memory = replayed_by(tmp_path)
    expected = by_hand(name, model, parts, table[mx.array(text[1:])], states)
    np.testing.assert_allclose(begun, expected, atol=1e-4)

    steps = drafter.steps(begun[-1:], [*memory[:-1], memory[-1][-1:]])
    root = steps.advance(None, mx.array(text[-1:]))
    twice = mx.array([0, 0])
    pairs = [mx.array([3, 50]), mx.array([71, 8])]
    first = steps.advance(root[twice], pairs[0])
    second = steps.advance(first, pairs[1])
    for row in range(2):
        embedded = table[mx.array(text[1:] + [tokens[row].item() for tokens in pairs])]
        before = mx.concatenate([states, begun[-1:], first.hidden[row : row + 1]])
        expected = by_hand(name, model, parts, embedded, before)
        np.testing.assert_allclose(first.hidden[row], expected[-2], atol=1e-4)
        np.testing.assert_allclose(second.hidden[row], expected[-1], atol=1e-4)


def test_the_routers_bias_stays_in_full_precision(tmp_path):
    made(tmp_path, "glm4_moe", build("glm4_moe"))
    head, _ = load_published(KIND, tmp_path, mx.bfloat16)
    assert head.layer.mlp.gate.e_score_correction_bias.dtype == mx.float32
    assert head.layer.mlp.gate.weight.dtype == mx.bfloat16


def test_ernies_layer_is_dense_whichever_of_the_targets_are(tmp_path):
    parts = random_parts(0)
    given = config("ernie4_5_moe") | {"moe_layer_start_index": 0}
    write(tmp_path, published("ernie4_5_moe", build("ernie4_5_moe"), parts), given)
    head, _ = load_published(KIND, tmp_path, mx.float32)
    assert "switch_mlp" not in head.layer.mlp


# ---------------------------------------------------------------------------------------------
# Drafting for a target


def drafter_of(model: nn.Module, path: Path, name: str, **sizes) -> AttentionDrafter:
    made(path, name, model)
    head, d2t = load_published(KIND, path, mx.float32)
    return KIND.drafter(adapt(model), head, d2t, {})


TARGETS = ["qwen3_5", "qwen3_next", "qwen3_5_moe", "deepseek_v3", "glm4_moe", "glm_moe_dsa"]


@pytest.mark.parametrize("name", TARGETS)
def test_the_text_is_that_of_plain_decoding(name, tmp_path):
    model = build(name)
    plain = [ids(generation(model, tiny_prompt(), **sampling)) for sampling in ({}, DRAWN)]
    drafter = drafter_of(model, tmp_path, name)
    for sampling, expected in zip(({}, DRAWN), plain, strict=True):
        run = generation(model, tiny_prompt(), drafter, **sampling)
        assert ids(run) == expected
        assert run.stats.nodes > 2 * run.stats.rounds, "nothing was drafted"


DRAWN = {"temp": 0.8, "seed": 5}


@pytest.mark.parametrize("name", TARGETS)
def test_after_any_rounds_it_keeps_what_a_fresh_start_would(name, tmp_path):
    model = build(name)
    drafter = drafter_of(model, tmp_path, name)
    text = tiny_prompt() + ids(generation(model, tiny_prompt(), drafter, **DRAWN))
    kept = drafter._text._layers
    places = kept[0].offset
    assert places > len(text) - 12
    target, trail = adapt(model), Trail()
    target.read(text[:places], target.empty_caches(), 64, trail=trail)
    fresh = TextCache(drafter.head, drafter.embed, drafter.view)
    fresh.of_whole(text[: places + 1], trail.since(0, fresh), 1)
    for ours, theirs in zip(kept, fresh._layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            a, b = (np.array(x[..., :places, :]) for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3", "mimo", "ernie4_5_moe"])
def test_it_reads_what_the_targets_own_head_does(name, tmp_path):
    """The state after the target's last norm, its embedding, and its output layer."""
    model = build(name)
    parts = made(tmp_path, name, model)
    text = tiny_prompt(LENGTH + 1)
    inner = model.model
    states = inner(mx.array([text[:-1]]))[0]
    expected = by_hand(name, model, parts, inner.embed_tokens(mx.array(text[1:])), states)
    language = getattr(model, "language_model", model)
    tied = "lm_head" not in language
    expected = inner.embed_tokens.as_linear(expected) if tied else language.lm_head(expected)

    head, d2t = load_published(KIND, tmp_path, mx.float32)
    target = Target(model)
    drafter = KIND.drafter(target, head, d2t, {})
    begun, _ = drafter.begin(target.prefill(text, chunk=5))
    rows = drafter.vocabulary.of(None)[1]
    found = drafter.vocabulary.project(head.outputs(begun), rows)
    np.testing.assert_allclose(found[0], expected[-1], atol=1e-3)


def test_a_reduced_vocabulary_uses_rows_of_the_targets_head(tmp_path):
    model = build("qwen3_5")
    plain = ids(generation(model, tiny_prompt()))
    chosen = np.arange(0, VOCAB, 2)
    tensors = published("qwen3_5", model, random_parts(0))
    tensors["d2t"] = mx.array(chosen - np.arange(len(chosen)))
    write(tmp_path, tensors, config("qwen3_5") | {"draft_vocab_size": len(chosen)})
    head, found = load_published(KIND, tmp_path, mx.float32)
    assert found.tolist() == chosen.tolist()
    drafter = KIND.drafter(adapt(model), head, found, {})
    assert ids(generation(model, tiny_prompt(), drafter)) == plain


# ---------------------------------------------------------------------------------------------
# Which tensors are the head's


def shipped(path: Path, name: str) -> dict[str, str]:
    """A whole model with its head in it, in files that separate what belongs together."""
    model = build(name)
    own = {n: x for n, x in tree_flatten(model.parameters()) if not n.startswith("lm_head")}
    head = published(name, model, random_parts(0))
    files = {"model-1-of-3.safetensors": own, "model-2-of-3.safetensors": {}, "mtp.safetensors": {}}
    for number, (tensor, x) in enumerate(sorted(head.items())):
        files[("model-2-of-3.safetensors", "mtp.safetensors")[number % 2]][tensor] = x
    for file, tensors in files.items():
        write(path, tensors, config(name), file)
    return {tensor: file for file, tensors in files.items() for tensor in tensors}


@pytest.mark.parametrize("name", ["qwen3_5", "deepseek_v3"])
def test_taken_out_without_its_settings_the_targets_describe_it(name, tmp_path):
    """A repo with nothing but the head's tensors, as some publish it."""
    model = build(name)
    plain = ids(generation(model, tiny_prompt()))
    alone = tmp_path / "head"
    write(alone, published(name, model, random_parts(0)), None, "mtp.safetensors")
    with pytest.raises(UserError, match=r"head/config\.json: cannot be read"):
        load_drafter(f"mtp:{alone}", model)

    write(tmp_path / "target", {}, config(name))
    model._redrafter_directory = tmp_path / "target"
    drafter = load_drafter(f"mtp:{alone}", model)
    assert ids(generation(model, tiny_prompt(), drafter)) == plain

    other = build("llama")
    write(tmp_path / "other", {}, {"model_type": "llama"})
    other._redrafter_directory = tmp_path / "other"
    with pytest.raises(UserError, match=r"of a 'llama' model.*so the target's was read"):
        load_drafter(f"mtp:{alone}", other)
    with pytest.raises(UserError, match=r"no config\.json with a model_type says of which model"):
        load_published(KIND, alone, mx.float32, {})


@pytest.mark.parametrize("name", PLACES)
def test_its_files_and_settings_are_enough_to_build_it_again(name, tmp_path):
    weight_map = shipped(tmp_path / "whole", name)
    shards = shards_of(KIND, weight_map)
    assert shards.keys() == {"model-2-of-3.safetensors", "mtp.safetensors"}
    tensors = {}
    for file, names in shards.items():
        found = mx.load(str(tmp_path / "whole" / file))
        tensors |= {tensor: found[tensor] for tensor in names}
    write(tmp_path / "alone", tensors, KIND.alone(settings(tmp_path / "whole")))
    assert recognised(settings(tmp_path / "alone"), tensors) is KIND
    heads = [load_published(KIND, tmp_path / n, mx.float32)[0] for n in ("whole", "alone")]
    one, two = (tree_flatten(head.parameters()) for head in heads)
    assert [n for n, _ in one] == [n for n, _ in two]
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True))
    assert heads[1].layer(mx.ones((1, 1, H)), None, None).shape == (1, 1, H)


def test_copies_of_the_embedding_and_of_the_output_layer_are_not_read():
    names = {
        "model.layers.61.hnorm.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
        "model.layers.61.shared_head.norm.weight",
        "model.layers.61.self_attn.rotary_emb.inv_freq",
        "model.layers.6.self_attn.o_proj.weight",
        "model.embed_tokens.weight",
    }
    assert KIND.ours(names) == {
        "model.layers.61.hnorm.weight": "norm_hidden.weight",
        "model.layers.61.shared_head.norm.weight": "norm.weight",
    }


def test_kinds_are_told_apart():
    for path in (file.parent for file in HEADS.glob("*/config.json")):
        if path.is_dir():
            kind = recognised(settings(path), read(path))
            assert (kind is KIND) == path.name.startswith("mtp"), path.name


# ---------------------------------------------------------------------------------------------
# What cannot be used


def refused(path: Path) -> str:
    with pytest.raises(UserError) as told:
        load_published(KIND, path, mx.float32)
    message = str(told.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


MISSING = {
    "mtp.fc.weight": "lacks the tensors fc.weight",
    "mtp.norm.weight": "lacks the tensors norm.weight",
    "mtp.layers.0.input_layernorm.weight": "lacks the tensors layer.input_layernorm.weight",
    "mtp.layers.0.self_attn.k_proj.weight": "lacks the tensors layer.self_attn.k_proj.weight",
    "mtp.layers.0.mlp.experts.1.up_proj.weight": "lacks layer.mlp.switch_mlp.up_proj.weight of "
    "expert 1",
    "mtp.layers.0.mlp.experts.3.up_proj.weight": "layer.mlp.switch_mlp.up_proj.weight has shape "
    "(3, 16, 32), expected (4, 16, 32)",
}


@pytest.mark.parametrize("missing", MISSING)
def test_a_missing_tensor(missing, tmp_path):
    tensors = read(HEADS / "mtp_qwen3_next")
    del tensors[missing]
    path = write(tmp_path, tensors, settings(HEADS / "mtp_qwen3_next"))
    assert MISSING[missing] in refused(path)


WRONG = {
    "fc": (r"mtp\.fc\.weight", lambda x: x[:, 1:], "fc.weight has shape (32, 63)"),
    "norm": (r"mtp\.norm\.weight", lambda x: x[1:], "norm.weight has shape (31,)"),
    "one expert": (
        r".*experts\.1\.up_proj\.weight", lambda x: x[1:], "do not fit together"
    ),
    "experts": (
        r".*experts\.\d\.up_proj\.weight", lambda x: x[1:], "up_proj.weight has shape (4, 15, 32)"
    ),
    "not finite": (r".*k_proj\.weight", lambda x: x * mx.inf, "NaN or infinite"),
    "whole numbers": (r".*k_proj\.weight", lambda x: x.astype(mx.int32), "not floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_tensor_that_does_not_fit(wrong, tmp_path):
    pattern, damage, fault = WRONG[wrong]
    change = lambda n, x: damage(x) if re.fullmatch(pattern, n) else x
    assert fault in refused(rewritten(tmp_path, "mtp_qwen3_next", change=change))


def test_a_latent_projection_that_does_not_fit(tmp_path):
    tensors = published("deepseek_v3", build("deepseek_v3"), random_parts(0))
    name = "model.layers.3.self_attn.kv_b_proj.weight"
    tensors[name] = tensors[name][1:]
    path = write(tmp_path, tensors, config("deepseek_v3"))
    assert "the tensors of the head do not fit together" in refused(path)


SETTINGS = {
    "family": ({"model_type": "llama"}, "'llama' model, and how that computes is not"),
    "no family": ({"model_type": None}, "no config.json with a model_type says of which model"),
    "sizes": ({"hidden_size": "many"}, "does not describe a qwen3_next model"),
    "missing": ({"num_attention_heads": None}, "does not describe a qwen3_next model"),
    "vocabulary": ({"vocab_size": 0}, "vocab_size is 0, not a positive number"),
    "block": ({"quantization_config": {"weight_block_size": 0}}, "weight_block_size is 0"),
}


@pytest.mark.parametrize("wrong", SETTINGS)
def test_settings_that_make_no_sense(wrong, tmp_path):
    given, fault = SETTINGS[wrong]
    assert fault in refused(rewritten(tmp_path, "mtp_qwen3_next", **given))


def test_a_module_packed_in_groups_of_nothing(tmp_path):
    """Dividing by this size would end the process."""
    weight = read(HEADS / "mtp_qwen3_5")["mtp.fc.weight"]
    packed = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, 32, 8), strict=True))
    tensors = read(HEADS / "mtp_qwen3_5") | {f"mtp.fc.{n}": x for n, x in packed.items()}
    packing = {"group_size": 32, "bits": 8, "mtp.fc": {"group_size": 0, "bits": 8}}
    path = write(tmp_path, tensors, settings(HEADS / "mtp_qwen3_5") | {"quantization": packing})
    assert "positive whole numbers" in refused(path)


def test_the_head_of_another_target():
    head, d2t = load_published(KIND, HEADS / "mtp_qwen3_5", mx.float32)
    with pytest.raises(UserError, match="made for another target: its hidden_size is 32, that of"):
        KIND.drafter(adapt(build("qwen3_5")), head, d2t, {})
