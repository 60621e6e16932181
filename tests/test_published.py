"""Published heads as drafters: the same text, caches that follow it, and heads that are refused."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from families import build
from published_heads import write, write_eagle3, write_medusa
from redrafter_mlx.config import DraftOptions
from redrafter_mlx.drafters.attention import AttentionDrafter, TextCache
from redrafter_mlx.drafters.kinds import recognised
from redrafter_mlx.drafters.medusa import MedusaDrafter
from redrafter_mlx.drafters.parallel import product
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.drafters.tensors import read_json, tensor_names
from redrafter_mlx.drafters.union import UnionDrafter
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import drafters, places
from redrafter_mlx.loading.known_heads import download_head, known_head, own_head, pairs
from redrafter_mlx.machine import device
from redrafter_mlx.target.adapter import adapt
from support import BUDGET, ScriptedDrafter, generation, ids, tiny_prompt

WRITERS = {"medusa": write_medusa, "eagle3": write_eagle3}
BUDGETS = [
    DraftOptions(beam_width=1, beam_length=3, budget=3),
    DraftOptions(beam_width=4, beam_length=6, budget=16),
    DraftOptions(beam_width=3, beam_length=4, budget=0),
    DraftOptions(),
]
SAMPLING = [
    {},
    {"temp": 0.8, "seed": 3},
    {"temp": 1.0, "seed": 4, "top_p": 0.9, "repetition_penalty": 1.2},
]


def loaded(kind: str, model, path, **settings):
    return drafters.load_drafter(str(WRITERS[kind](path, adapt(model), **settings)), model)


@pytest.mark.parametrize("sampling", SAMPLING, ids=lambda s: f"temp{s.get('temp', 0)}")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5", "lfm2", "falcon_h1"])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_text(kind, family, sampling, tmp_path):
    model, prompt = build(family), tiny_prompt(9)
    plain = ids(generation(model, prompt, **sampling))
    drafter = loaded(kind, model, tmp_path / "head")
    script = ScriptedDrafter(prompt + plain, right=2)
    for draft in BUDGETS:
        assert ids(generation(model, prompt, drafter, draft=draft, **sampling)) == plain
    both = UnionDrafter([script, drafter])
    assert ids(generation(model, prompt, both, draft=BUDGETS[1], **sampling)) == plain


@pytest.mark.parametrize("kind", WRITERS)
def test_drafts_that_are_drawn(kind, tmp_path):
    """Of the rule that weighs draws the text is another, but the same with the same draws."""
    model, prompt = build("llama"), tiny_prompt(9)
    drafter = loaded(kind, model, tmp_path / "head")
    runs = [
        ids(
            generation(model, prompt, drafter, draft=BUDGETS[1], temp=1.0, seed=5, rule="rejection")
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 40


@pytest.mark.parametrize("right", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_its_cache_is_that_of_a_fresh_start(family, right, tmp_path):
    """Whatever was accepted: after any rounds, keys and values are those of the text alone."""
    model, prompt = build(family), tiny_prompt(9)
    drafter = loaded("eagle3", model, tmp_path / "head")
    plain = ids(generation(model, prompt, max_tokens=60))
    both = UnionDrafter([ScriptedDrafter(prompt + plain, right, wrong=2, decoys=True), drafter])
    assert ids(generation(model, prompt, both, max_tokens=60, draft=BUDGETS[1])) == plain
    places = drafter._text._layers[0].offset
    assert places > 60
    context = adapt(model).prefill((prompt + plain)[: places + 1], 512)
    fresh = TextCache(drafter.head, drafter.embed, drafter.view)
    fresh.of(context.transcript, context.trail)
    for one, other in zip(drafter._text._layers, fresh._layers, strict=True):
        for name in ("keys", "values"):
            same = one[name] if isinstance(one, dict) else getattr(one, name)
            np.testing.assert_allclose(
                same[..., :places, :], getattr(other, name)[..., :places, :], atol=1e-4
            )


def test_a_long_text_grows_its_buffers(tmp_path):
    model = build("llama")
    drafter = loaded("eagle3", model, tmp_path / "head")
    context = adapt(model).prefill(tiny_prompt(1100), 512)
    begun, memory = drafter.begin(context)
    assert memory[0].shape[2] == 2048
    assert memory[-1].tolist() == [1099]
    whole, _ = drafter.replayed(tiny_prompt(1100), _captured(model, 1100), 1099)
    np.testing.assert_allclose(begun, whole, atol=1e-4)


def _captured(model, count: int) -> mx.array:
    """What is captured at the tokens of a prompt but the last, in one pass."""
    target = adapt(model)
    caches = target.empty_caches()
    caches.begin(count - 1, certain=True)
    return target.forward(mx.array(tiny_prompt(count))[None, :-1], caches).hidden[0]


def test_a_prompt_of_one_token(tmp_path):
    model = build("llama")
    plain = ids(generation(model, [5]))
    for kind in WRITERS:
        drafter = loaded(kind, model, tmp_path / kind)
        assert ids(generation(model, [5], drafter, draft=BUDGETS[1])) == plain


def test_several_heads_share_a_target(tmp_path):
    """Each reads its own layers; together they draft what they draft alone, and more."""
    model, prompt = build("llama"), tiny_prompt(9)
    plain = ids(generation(model, prompt))
    heads = [loaded(kind, model, tmp_path / kind) for kind in WRITERS]
    heads.append(drafters.load_drafter(str(tmp_path / "eagle3"), model))
    assert ids(generation(model, prompt, UnionDrafter(heads), draft=BUDGETS[1])) == plain


def test_a_reduced_vocabulary_proposes_only_its_ids(tmp_path):
    model = build("llama")
    drafter = loaded("eagle3", model, tmp_path / "head", draft_vocab=20)
    allowed = set(drafter.vocabulary.of(None)[0].tolist())
    assert len(allowed) == 20
    context = adapt(model).prefill(tiny_prompt(9), 512)
    tree = drafter.propose(context, BUDGET)
    assert len(tree) == BUDGET.nodes
    assert set(tree.tokens[1:].tolist()) <= allowed


def test_products_come_best_first():
    tokens = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    logprobs = np.log([[0.2, 0.5, 0.3], [0.9, 0.06, 0.04], [0.1, 0.2, 0.7]])
    found = product(0, tokens, logprobs)
    assert len(found.tokens) == 3 + 9 + 9
    every = {(): 0.0}
    for depth in range(3):
        every |= {
            (*path, int(t)): score + p
            for path, score in every.items()
            if len(path) == depth
            for t, p in zip(tokens[depth], logprobs[depth], strict=True)
        }
    best = sorted((score for path, score in every.items() if path), reverse=True)[:21]
    np.testing.assert_allclose(sorted(found.logprobs, reverse=True), best, atol=1e-9)
    paths = {-1: ()}
    for node, parent in enumerate(found.parents.tolist()):
        paths[node] = (*paths[parent], int(found.tokens[node]))
        assert found.logprobs[node] == pytest.approx(every[paths[node]])


def test_kinds_are_told_by_their_files(tmp_path):
    model = build("llama")
    eagle = write_eagle3(tmp_path / "e", adapt(model))
    assert isinstance(drafters.load_drafter(f"eagle3:{eagle}", model), AttentionDrafter)
    assert isinstance(loaded("medusa", model, tmp_path / "m"), MedusaDrafter)
    with pytest.raises(
        UserError, match=f"a head of the kind medusa but eagle3: give eagle3:{eagle}"
    ):
        drafters.load_drafter(f"medusa:{eagle}", model)
    with pytest.raises(UserError, match="model_type is 'llama'"):
        drafters.load_drafter(
            str(write(tmp_path / "x", {"model_type": "llama"}, {"a": mx.zeros(1)})), model
        )


def changed(path, settings=None, drop=(), **tensors):
    """The checkpoint with other settings or tensors."""
    now = dict(mx.load(str(path / "model.safetensors")))
    for name in drop:
        del now[name]
    config = json.loads((path / "config.json").read_text()) | (settings or {})
    write(path, config, {**now, **tensors})
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["norm.weight"]}, "lacks the tensors norm.weight"),
        (
            {"midlayer.self_attn.o_proj.weight": mx.zeros((3, 3))},
            r"o_proj.weight has shape \(3, 3\)",
        ),
        ({"norm.weight": mx.full((64,), float("nan"))}, "norm.weight holds NaN"),
        ({"norm.weight": mx.zeros((64,), mx.int32)}, "not floating-point numbers"),
        ({"more.weight": mx.zeros(3)}, r"no part of the head uses \(eagle3\): more.weight"),
        ({"layers.0.hidden_norm.weight": mx.zeros(64)}, "are the same tensor"),
        ({"d2t": mx.full((20,), 99)}, "d2t does not map to distinct ids below 97"),
        ({"d2t": mx.zeros((7,), mx.int64)}, r"d2t has shape \(7,\)"),
        ({"settings": {"num_attention_heads": 0}}, "num_attention_heads is 0"),
        ({"settings": {"vocab_size": 120}}, "its vocab_size is 120, that of llama is 97"),
        (
            {"settings": {"hidden_size": 32}},
            "hidden_size is 32 in config.json and 64 by the tensors",
        ),
        ({"settings": {"eagle_aux_hidden_state_layer_ids": [2, "x"]}}, "not layer numbers"),
        ({"settings": {"eagle_aux_hidden_state_layer_ids": [2, 9, 40]}}, "llama has 2 layers"),
        ({"settings": {"rope_theta": "big"}}, "rope_theta is 'big'"),
    ],
)
def test_heads_that_cannot_be_are_refused(change, message, tmp_path):
    model = build("llama")
    path = write_eagle3(tmp_path / "head", adapt(model), draft_vocab=20)
    with pytest.raises(UserError, match=message) as refused:
        drafters.load_drafter(changed(path, **change), model)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_sixteen_and_eight_bits(tmp_path):
    """In a 16-bit target a head computes in 16 bits; packed weights stay packed."""
    from mlx import nn
    from mlx.utils import tree_flatten

    from redrafter_mlx.drafters import eagle3
    from redrafter_mlx.drafters.published import load_published

    path = write_eagle3(tmp_path / "head", adapt(build("llama")))
    head, _ = load_published(eagle3.KIND, path, mx.float32)
    nn.quantize(
        head,
        32,
        8,
        class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[1] % 32 == 0,
    )
    weights = {n.replace("layers.0.", "midlayer."): x for n, x in tree_flatten(head.parameters())}
    config = json.loads((path / "config.json").read_text())
    write(path, config | {"quantization": {"group_size": 32, "bits": 8}}, weights)
    packed, _ = load_published(eagle3.KIND, path, mx.bfloat16)
    assert "scales" in packed.fc
    assert packed.fc.scales.dtype == mx.bfloat16
    model = build("llama", dtype=mx.bfloat16)
    drafter = drafters.load_drafter(str(path), model)
    assert len(ids(generation(model, tiny_prompt(9), drafter, draft=BUDGETS[1]))) == 40


def test_known_pairs_are_data_with_their_source():
    for pair in pairs():
        assert set(pair) == {"target", "head", "source"}
        assert pair["source"].startswith("https://")
        assert known_head(f"mlx-community/{pair['target']}-4bit") is not None
    assert known_head("mlx-community/Qwen3-8B-4bit") == "z-lab/Qwen3-8B-DFlash-b16"
    assert known_head("Qwen/Qwen3-8B-Base") is None
    assert known_head("/models/Qwen3-8B-MLX-8bit") == "z-lab/Qwen3-8B-DFlash-b16"
    assert known_head("") is None


def test_auto_takes_the_head_beside_a_model(tmp_path, caplog):
    model = build("llama")
    model._redrafter_name, model._redrafter_directory = "org/name", tmp_path
    assert own_head("org/name", tmp_path) is None
    write_eagle3(tmp_path / "drafter", adapt(model))
    union = drafters.load_drafter("auto", model)
    assert [type(m).__name__ for m in union.members] == ["AttentionDrafter", "MaxGramDrafter"]
    other = build("llama", hidden_size=32)
    other._redrafter_name, other._redrafter_directory = "org/name", tmp_path
    assert type(drafters.load_drafter("auto", other)).__name__ == "MaxGramDrafter"
    assert "made for another target" in caplog.text


HEADS = Path(__file__).parent / "fixtures" / "heads"


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repo of a target with its head in one of three shards; what was asked for."""
    stored, cached, asked = tmp_path / "repo", tmp_path / "cached", []
    stored.mkdir()
    cached.mkdir()
    source = HEADS / "mtp_qwen3_5"
    shutil.copy(source / "config.json", stored)
    shards = {
        "model-00001.safetensors": {"model.embed_tokens.weight": mx.zeros((96, 32))},
        "model-00002.safetensors": dict(mx.load(str(source / "model.safetensors"))),
        "model-00003.safetensors": {"lm_head.weight": mx.zeros((96, 32))},
    }
    shards["model-00002.safetensors"]["model.norm.weight"] = mx.zeros(32)
    for file, tensors in shards.items():
        mx.save_safetensors(str(stored / file), tensors)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = stored / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))

    def snapshot(name, revision, patterns, accepted):
        asked.append(patterns)
        for file in stored.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copy(file, cached)
        return cached

    monkeypatch.setattr(places, "snapshot", snapshot)
    return asked, cached


def test_only_the_shards_that_hold_a_head_are_downloaded(repo):
    asked, cached = repo
    assert download_head("org/name", None, "") == cached
    assert asked[-1] == ["config.json", "model.safetensors.index.json", "model-00002.safetensors"]
    kind = recognised(read_json(cached / "config.json"), tensor_names(cached))
    head, ids = load_published(kind, cached, mx.float32)
    assert kind.name == "mtp"
    assert len(ids) == head.config.vocab_size == 96


def test_auto_finds_the_head_inside_a_model(repo):
    """In the original checkpoint, which mlx-lm loads without it."""
    _, cached = repo
    download_head("org/name", None, "")
    assert own_head("org/name", cached) == cached
    (cached / "model-00002.safetensors").unlink()
    assert own_head("org/name", cached) is None


@pytest.mark.parametrize("kind", WRITERS)
def test_a_draft_waits_for_the_device_once(kind, tmp_path, monkeypatch):
    model = build("llama")
    drafter = loaded(kind, model, tmp_path / "head")
    context = adapt(model).prefill(tiny_prompt(30), 512)
    waits, finish = [], device.finish
    monkeypatch.setattr(device, "finish", lambda *arrays: waits.append(finish(*arrays)))
    assert len(drafter.propose(context, BUDGET)) == BUDGET.nodes
    assert len(waits) == 1


def test_a_medusa_head_on_the_targets_output_layer_tells_no_vocabulary(tmp_path):
    """As its trainer writes it: blocks alone, and a config.json without sizes."""
    model, prompt = build("llama"), tiny_prompt(9)
    path = write_medusa(tmp_path / "head", adapt(model))
    tensors = mx.load(str(path / "model.safetensors"))
    blocks = {name: x for name, x in tensors.items() if ".linear." in name}
    write(path, {"medusa_num_heads": 3, "medusa_num_layers": 1, "version": "2"}, blocks)
    drafter = drafters.load_drafter(str(path), model)
    assert drafter.vocabulary.of(None)[0].size == 97
    plain = ids(generation(model, prompt))
    assert ids(generation(model, prompt, drafter, draft=BUDGETS[1])) == plain
