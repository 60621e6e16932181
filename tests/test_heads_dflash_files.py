"""Files of DFlash, DFlash 2 and DSpark heads: what is found in them, and what is wrong."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from families import build
from redrafter_mlx.drafters import dflash
from redrafter_mlx.drafters.block import Sight
from redrafter_mlx.drafters.kinds import recognised
from redrafter_mlx.drafters.published import load_published
from redrafter_mlx.errors import UserError
from redrafter_mlx.target.adapter import adapt
from test_heads_dflash import HEADS, NAMES, random_head


def edited(tmp_path: Path, name: str, change) -> Path:
    """A copy of a fixture after change(settings, tensors)."""
    path = tmp_path / "head"
    shutil.copytree(HEADS / name, path)
    settings = json.loads((path / "config.json").read_text())
    tensors = dict(mx.load(str(path / "model.safetensors")))
    change(settings, tensors)
    (path / "config.json").write_text(json.dumps(settings))
    mx.eval(tensors)
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    return path


def loads(tmp_path, name, change=lambda settings, tensors: None):
    return load_published(dflash.KIND, edited(tmp_path, name, change), mx.float32)


FAULTS = {
    "missing": (
        "dflash", lambda s, t: t.pop("layers.1.mlp.up_proj.weight"),
        "lacks the tensors layers.1.mlp.up_proj.weight",
    ),
    "shape": (
        "dflash", lambda s, t: t.update({"norm.weight": mx.ones(31)}), "norm.weight has shape",
    ),
    "stranger": (
        "dflash", lambda s, t: t.update({"layers.0.self_attn.sinks": mx.ones(4)}), "sinks",
    ),
    "codebook": (
        "dflash2",
        lambda s, t: t.update({"candidate_selector.successor_codebook": mx.ones((95, 8))}),
        "successor_codebook has shape",
    ),
    "no link": (
        "dflash2", lambda s, t: t.pop("candidate_selector.predecessor_codebook"), "candidate_sel",
    ),
    "mask": (
        "dflash", lambda s, t: s["dflash_config"].update(mask_token_id=96),
        "mask_token_id is 96, not a token id below 96",
    ),
    "no mask": ("dspark", lambda s, t: s.pop("mask_token_id"), "mask_token_id is None"),
    "markov": (
        "dspark", lambda s, t: s.update(markov_head_type="lstm"),
        "markov_head_type is 'lstm', not one of vanilla, gated, rnn",
    ),
    "gate": ("dspark", lambda s, t: s.update(markov_head_type="gated"), "gate_proj"),
    "layers": (
        "dflash", lambda s, t: s["dflash_config"].update(target_layer_ids=[1, 3]),
        "target_layer_ids",
    ),
    "no layers": (
        "dflash", lambda s, t: s["dflash_config"].update(target_layer_ids=["a"]),
        "not layer numbers",
    ),
    "window": ("dflash2", lambda s, t: s.pop("sliding_window"), "sliding_window is None"),
    "types": ("dflash", lambda s, t: s.update(layer_types=["linear"] * 2), "layer_types"),
    "block": ("dflash", lambda s, t: s.update(block_size=0), "block_size is 0"),
    "one": ("dflash", lambda s, t: s.update(block_size=1), "block_size is 1"),
    "group": ("dflash2", lambda s, t: s["dflash_config"].update(conv_group_size=7), "group"),
    "heads": ("dflash", lambda s, t: s.update(num_attention_heads=5), "num_attention_heads 5"),
    "many heads": ("dflash", lambda s, t: s.update(num_attention_heads=64), "heads"),
    "nested": ("dflash", lambda s, t: s.update(dflash_config=[1]), "dflash_config is [1]"),
    "cap": ("dflash", lambda s, t: s.update(final_logit_softcapping="a"), "softcapping is 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_head_is_refused_in_one_line(fault, tmp_path):
    name, change, words = FAULTS[fault]
    with pytest.raises(UserError) as error:
        loads(tmp_path, name, change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_head_for_a_deeper_target_is_refused():
    target = adapt(build("llama"))
    with pytest.raises(UserError, match="has 2 layers"):
        dflash._drafter(target, random_head(reads=(0, 2)), np.arange(97), {})
    other = random_head(vocab_size=98, draft_vocab_size=98)
    with pytest.raises(UserError, match="made for another target"):
        dflash._drafter(target, other, np.arange(98), {})


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_recognised_with_and_without_copies_of_the_targets_layers(name, tmp_path):
    path = edited(tmp_path, name, _with_copies)
    settings = json.loads((path / "config.json").read_text())
    assert recognised(settings, mx.load(str(path / "model.safetensors"))) is dflash.KIND
    head, _ = load_published(dflash.KIND, path, mx.bfloat16)
    weights = dict(tree_flatten(head.parameters()))
    assert not {"embed_tokens.weight", "lm_head.weight"} & weights.keys()
    assert not any("confidence" in name for name in weights)
    assert {x.dtype for x in weights.values()} == {mx.bfloat16}
    assert recognised({}, mx.load(str(HEADS / "eagle3" / "model.safetensors"))) is not dflash.KIND


def _with_copies(settings, tensors):
    facts = np.load(HEADS / "dflash" / "reference.npz")
    copies = {"embed_tokens.weight": facts["embedding"], "lm_head.weight": facts["lm_head"]}
    renamed = {f"model.{name}": x for name, x in tensors.items()}
    tensors.clear()
    tensors |= renamed | {f"model.{name}": mx.array(x) for name, x in copies.items()}


def test_a_head_of_speculators_is_the_same_head(tmp_path):
    """Its settings nest the other way, it numbers layers from 1, and has a draft vocabulary."""
    few = np.arange(0, 96, 8)

    def change(settings, tensors):
        nested = settings.pop("dflash_config")
        inner = dict(settings)
        settings.clear()
        settings |= {
            "speculators_model_type": "dflash",
            "aux_hidden_state_layer_ids": [i + 1 for i in nested["target_layer_ids"]],
            "mask_token_id": nested["mask_token_id"],
            "block_size": nested["block_size"],
            "draft_vocab_size": len(few),
            "transformer_layer_config": inner,
        }
        tensors["d2t"] = mx.array(few - np.arange(len(few)))
        tensors["t2d"] = mx.array(np.isin(np.arange(96), few))
        tensors["lm_head.weight"] = mx.ones((len(few), 32))

    theirs, _ = load_published(dflash.KIND, HEADS / "dflash_sliding", mx.float32)
    head, found = loads(tmp_path, "dflash_sliding", change)
    assert found.tolist() == few.tolist()
    assert head.config.draft_vocab_size == len(few)
    for field in ("layer", "sights", "reads", "mask_token_id", "block_size", "next_token"):
        assert getattr(head.config, field) == getattr(theirs.config, field)


def test_settings_are_found_where_old_and_new_files_have_them(tmp_path):
    def change(settings, tensors):
        del settings["dflash_config"]["target_layer_ids"]
        settings["input_embedding_scale"] = 2.0
        settings["rope_is_neox_style"] = False
        settings["architectures"] = ["Qwen3DSparkModel"]
        tensors["fc.weight"] = tensors["fc.weight"][:, :64]

    config = loads(tmp_path, "dflash", change)[0].config
    assert config.reads == (1, 5)  # spread over the 8 layers of its target
    assert config.embedding_scale == 2.0
    assert config.interleaved
    assert config.depths == config.block_size == 6


def test_sliding_layers_are_causal_unless_it_is_said_whether_they_are():
    of = lambda **given: dflash._sights(
        "x",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8} | given,
        2,
    )
    assert of() == of(is_causal=None) == (Sight(8, True), Sight(None, False))
    assert of(is_causal=False) == (Sight(8, False), Sight(None, False))
    assert of(is_causal=True) == (Sight(8, True), Sight(None, True))
    assert of(sliding_window_non_causal=True) == (Sight(8, False), Sight(None, False))
