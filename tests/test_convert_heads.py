"""The converter and the kinds of heads that are published beside recurrent ones."""

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_heads import HEADS, reference

from convert.kinds import NAMES
from convert_heads import apple_config, apple_tensors, convert, read, run, settings, write, write_in
from families import build
from redrafter_mlx.drafters.kinds import KINDS, recognised
from redrafter_mlx.drafters.medusa import KIND as MEDUSA
from redrafter_mlx.drafters.published import load_published

ROOT = Path(__file__).parents[1]


def kind_at(path: Path):
    """The kind of a head in a directory, by its file of weights."""
    return recognised(settings(path), list(read(path)))


FIXTURES = sorted(file.parent.name for file in HEADS.glob("*/config.json"))
OWN = {"medusa": ["heads.0.1", "heads.1.1", "heads.2.1"], "eagle3": ["lm_head"]}


@pytest.fixture
def copied(tmp_path) -> Callable[[str], Path]:
    """Copies a fixture, to be damaged."""

    def copy(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file in HEADS.joinpath(name).iterdir():
            if file.suffix != ".npz":
                shutil.copy(file, path / file.name)
        return path

    return copy


def weights_in(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def change(path: Path, **tensors) -> None:
    """Sets tensors (`__` stands for a dot); None removes one."""
    changed = read(path) | {name.replace("__", "."): x for name, x in tensors.items()}
    kept = {name: x for name, x in changed.items() if x is not None}
    mx.save_safetensors(str(weights_in(path)), kept)


def configure(path: Path, **keys) -> None:
    (path / "config.json").write_text(json.dumps(settings(path) | keys))


def refused(capsys, *words) -> str:
    """The one-line error of a command that has to fail."""
    capsys.readouterr()
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error.removeprefix("python -m convert: error: ").rstrip("\n")


def module_of(path: Path):
    kind = kind_at(path)
    return load_published(kind, path, mx.float32)


def eagle3_logits(path: Path, name: str) -> np.ndarray:
    """(T, D) of the fixture's text, by a head that was made of it."""
    from mlx_lm.models.cache import KVCache

    head, _ = module_of(path)
    facts = reference(name)
    embedded = mx.array(facts["embed_tokens"])[mx.array(facts["tokens"][1:])]
    hidden = head.read(mx.array(facts["aux"]))
    caches = [KVCache() for _ in range(head.caches)]
    return np.array(head.outputs(head(embedded[None], hidden[None], "causal", caches)[0]))


def medusa_logits(path: Path, name: str) -> np.ndarray:
    """(K, P, D), likewise."""
    head, _ = module_of(path)
    facts = reference(name)
    found = head(mx.array(facts["hidden"]), head.config.heads)
    return np.array(found @ mx.array(facts["lm_head"]).T if head.config.shared else found)


LOGITS = {"eagle3": eagle3_logits, "medusa": medusa_logits}


# ---------------------------------------------------------------------------------------------
# There


@pytest.mark.parametrize("name", FIXTURES)
def test_every_kind_is_converted_described_and_loaded(name, tmp_path, capsys):
    """A result is a head again: a conversion of it changes nothing."""
    made = convert(HEADS / name, tmp_path / "made")
    kind = kind_at(made)
    assert {p.name for p in made.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    theirs, ours = read(HEADS / name), read(made)
    head, ids = load_published(kind, made, mx.float32)
    assert len(ids) == head.config.draft_vocab_size
    left_out = {n for n, mine in kind.ours(theirs).items() if mine in kind.unused}
    assert ours.keys() == kind.ours(theirs).keys() - left_out
    assert all(np.array_equal(ours[n].view(mx.uint8), theirs[n].view(mx.uint8)) for n in ours)
    given = settings(HEADS / name)
    given = kind.alone(given) if kind.inside else given
    found = settings(made)
    assert given == {key: found[key] for key in given}
    again = convert(made, tmp_path / "again", "--from", kind.name)
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run("inspect", made, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == kind.name
    assert found["bytes_per_draft_step"] == sum(found["bytes_by_part"].values())
    assert found["bytes_per_draft_step"] <= sum(x.nbytes for x in ours.values())
    assert run("inspect", made) == 0
    text = capsys.readouterr().out
    assert f"{kind.name} draft head" in text
    assert f"targets with hidden_size {found['hidden_size']}" in text


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FIXTURES)
def test_every_kind_is_packed_as_it_is_loaded(name, bits, tmp_path):
    words = ("--quantize", bits, "--group-size", "32", "--dtype", "float16")
    packed = convert(HEADS / name, tmp_path / "packed", *words)
    assert settings(packed)["quantization"] == {"group_size": 32, "bits": bits}
    tensors = read(packed)
    modules = [n.removesuffix(".scales") for n in tensors if n.endswith(".scales")]
    assert modules
    source = read(HEADS / name)
    for module in modules:
        expected = mx.quantize(source[f"{module}.weight"].astype(mx.float16), 32, bits)
        parts = [tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        assert all(np.array_equal(a, b) for a, b in zip(parts, expected, strict=True))
    module_of(packed)
    plain = convert(packed, tmp_path / "plain", "--dequantize")
    assert "quantization" not in settings(plain)
    assert {n: x.shape for n, x in read(plain).items()} == {
        n: x.shape for n, x in read(convert(HEADS / name, tmp_path / "whole")).items()
    }
    module_of(plain)


@pytest.mark.parametrize("name", [n for n in FIXTURES if n.startswith(tuple(LOGITS))])
def test_pytorch_files_compute_what_their_authors_code_does(name, tmp_path):
    """As they are published: EAGLE's pytorch_model.bin, Medusa's medusa_lm_head.pt in float16."""
    torch = pytest.importorskip("torch", reason="reading .bin and .pt files needs PyTorch")
    kind = kind_at(HEADS / name)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(HEADS / name / "config.json", source)
    file = "medusa_lm_head.pt" if kind is MEDUSA else "pytorch_model.bin"
    tensors = {n: torch.from_numpy(np.array(x)) for n, x in read(HEADS / name).items()}
    torch.save(tensors, source / file)
    made = convert(source, tmp_path / "made", "--verify")
    logits = LOGITS[kind.name](made, name)
    np.testing.assert_allclose(logits, reference(name)["logits"], atol=1e-4)
    single = convert(source / file, tmp_path / "single", "--from", kind.name)
    assert (single / "config.json").read_text() == (made / "config.json").read_text()


def test_medusa_settings_are_those_of_the_tensors(copied, tmp_path):
    """Published configs say 2 heads where the file has 5, and neither size."""
    source = copied("medusa")
    configure(source, medusa_num_heads=2)
    made = settings(convert(source, tmp_path / "made"))
    keys = ("medusa_num_heads", "medusa_num_layers", "hidden_size", "vocab_size")
    assert [made[key] for key in keys] == [3, 1, 32, 96]
    (source / "config.json").unlink()
    bare = settings(convert(source, tmp_path / "bare"))
    assert [bare[key] for key in keys] == [3, 1, 32, 96]


@pytest.mark.parametrize("start", ["medusa_heads.", "module.", "medusa_head."])
def test_what_a_tool_puts_before_the_names_is_left_out(start, copied, tmp_path):
    source = copied("medusa")
    tensors = read(source)
    mx.save_safetensors(str(weights_in(source)), {start + n: x for n, x in tensors.items()})
    assert read(convert(source, tmp_path / "made")).keys() == tensors.keys()


def test_a_medusa_head_inside_the_model_that_was_trained_with_it(copied, tmp_path, caplog):
    """Of its shards only that which holds the head is opened."""
    source = copied("medusa")
    tensors = {f"medusa_head.{n}": x for n, x in read(source).items()}
    weights_in(source).unlink()
    place = dict.fromkeys(tensors, "model-2.safetensors")
    place |= {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    write(source, tensors | {"lm_head.weight": mx.ones(3)}, None, "model-2.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    caplog.set_level("INFO", logger="redrafter_mlx")
    made = convert(source, tmp_path / "made")
    assert read(made).keys() == {n.removeprefix("medusa_head.") for n in tensors}
    assert "1 tensors of the target beside the head are left out" in caplog.text


def test_of_a_repo_only_the_shards_of_the_head_are_downloaded(copied, tmp_path, monkeypatch):
    from redrafter_mlx.loading import places

    source = copied("medusa")
    tensors = {f"medusa_head.{n}": x for n, x in read(source).items()}
    weights_in(source).unlink()
    place = dict.fromkeys(tensors, "model-2.safetensors")
    place["model.norm.weight"] = "model-1.safetensors"
    write(source, tensors, None, "model-2.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    asked = []
    fetch = lambda name, revision, allow_patterns: (asked.append(allow_patterns), source)[1]
    monkeypatch.setattr(places, "snapshot_download", fetch)
    assert run("--input", "org/name", "--output", tmp_path / "made") == 0
    index = ["config.json", "model.safetensors.index.json"]
    assert asked == [index, [*index, "model-2.safetensors"]]


# ---------------------------------------------------------------------------------------------
# Which kind


def test_medusa_says_from_which_of_the_two_it_is(copied, tmp_path, capsys):
    """A Medusa head has several numbered heads, or says how many; else it is a recurrent head."""
    several = copied("medusa")
    made = convert(several, tmp_path / "several", "--from", "medusa")
    assert kind_at(made) is MEDUSA
    config = apple_config(rnn=False)
    recurrent = write_in(tmp_path / "r", "medusa", config, apple_tensors(config))
    made = convert(recurrent, tmp_path / "recurrent", "--from", "medusa")
    assert settings(made)["model_type"] == "recurrent_drafting_drafter"
    config = apple_config()
    recurrence = write_in(tmp_path / "rnn", "medusa", config, apple_tensors(config))
    (recurrence / "config.json").write_text(json.dumps({"medusa_num_heads": 1}))
    made = convert(recurrence, tmp_path / "recurrence")
    assert settings(made)["rnn"] is True
    one = {n: x for n, x in read(several).items() if n.startswith("0.")}
    single = write(tmp_path / "one", one, None)
    convert(single, tmp_path / "single")
    assert settings(tmp_path / "single")["model_type"] == "recurrent_drafting_drafter"
    (single / "config.json").write_text(json.dumps({"medusa_num_heads": 1}))
    assert settings(convert(single, tmp_path / "said"))["medusa_num_heads"] == 1


@pytest.mark.parametrize(
    ("name", "said", "fault"),
    [
        ("medusa", "eagle3", "it looks like medusa: leave --from out"),
        ("medusa", "apple", "it looks like medusa: leave --from out"),
        ("eagle3", "medusa", "it looks like eagle3: leave --from out"),
        ("eagle3", "speculators", "it looks like eagle3: leave --from out"),
        ("eagle3_speculators", "medusa", "it looks like speculators: leave --from out"),
    ],
)
def test_a_head_of_another_kind_than_was_said(name, said, fault, tmp_path, capsys):
    source = HEADS / name
    found = refused(capsys, "--input", source, "--output", tmp_path / "out", "--from", said)
    where = f"{source}: is not in the layout --from {said}; "
    assert found == where + fault


def test_speculators_is_said_of_their_layout(tmp_path):
    source = HEADS / "eagle3_speculators"
    made = convert(source, tmp_path / "made", "--from", "speculators")
    assert "layers.0.hidden_norm.weight" in read(made)
    convert(source, tmp_path / "other", "--from", "eagle3")
    assert "converted by redrafter-mlx from speculators" in (made / "README.md").read_text()


def test_a_recurrent_head_is_of_no_other_kind(tmp_path, capsys):
    config = apple_config()
    head = write_in(tmp_path / "head", "apple", config, apple_tensors(config))
    for said in ("eagle3", "speculators"):
        found = refused(capsys, "--input", head, "--output", tmp_path / "out", "--from", said)
        assert found.endswith(f"--from {said}; it looks like apple: leave --from out")


# ---------------------------------------------------------------------------------------------
# Options


@pytest.fixture
def counts(tmp_path) -> Path:
    file = tmp_path / "counts.txt"
    file.write_text("\n".join(f"{i} {200 - i}" for i in range(96)))
    return file


@pytest.mark.parametrize("name", OWN)
def test_a_vocabulary_is_reduced_in_the_output_layers(name, counts, tmp_path, caplog):
    caplog.set_level("INFO", logger="redrafter_mlx")
    made = convert(HEADS / name, tmp_path / "made", "--draft-vocab", 8, counts)
    kind = kind_at(made)
    whole, ids = load_published(kind, HEADS / name, mx.float32)
    small, few = load_published(kind, made, mx.float32)
    assert few.tolist() == sorted(ids)[:8]
    assert settings(made)["draft_vocab_size"] == 8
    rows = [ids.tolist().index(i) for i in few.tolist()]
    for module in OWN[name]:
        get = lambda head, path=module: dict(head.named_modules())[path].weight
        assert np.array_equal(get(small), get(whole)[mx.array(rows)])
    np.testing.assert_allclose(
        LOGITS[kind.name](made, name), LOGITS[kind.name](HEADS / name, name)[..., rows], atol=1e-5
    )
    told = "d2t is written although other readers of this layout do not know it"
    assert (told in caplog.text) == (name == "medusa")


def test_of_a_head_that_reads_the_targets_output_only_the_ids_change(counts, tmp_path, capsys):
    source, target = HEADS / "medusa_shared", tmp_path / "target"
    words = ("--input", source, "--output", tmp_path / "no", "--draft-vocab", 8, counts)
    assert refused(capsys, *words) == (
        f"--draft-vocab: {source} does not tell the vocab_size of its target: give --target"
    )
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"hidden_size": 32, "vocab_size": 96}))
    words = ("--draft-vocab", 8, counts, "--target", target)
    from convert import target as of_target

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_target.Target, "tokenizer", lambda self: NoTokenizer)
        made = convert(source, tmp_path / "made", *words)
    head, ids = module_of(made)
    assert ids.tolist() == list(range(8))
    assert (head.config.vocab_size, head.config.draft_vocab_size) == (96, 8)
    assert read(made).keys() - read(source).keys() <= {"d2t"}


class NoTokenizer:
    eos_token_ids = ()


def test_an_eagle_without_an_output_layer_keeps_ids_of_the_target(copied, counts, tmp_path):
    source = copied("eagle3")
    change(source, lm_head__weight=None, d2t=None, t2d=None)
    configure(source, draft_vocab_size=None)
    made = convert(source, tmp_path / "made", "--draft-vocab", 8, counts)
    _, ids = module_of(made)
    assert ids.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--to", "apple"], "--to apple is for recurrent heads; {head} is a head of the kind "
         "medusa, which keeps its layout: leave --to out"),
        (["--keep-d2t"], "--keep-d2t is for recurrent heads; others keep it anyway: leave it out"),
        (["--dequantize"], "--dequantize: {head} is not quantised; leave it out"),
        (["--quantize", "4"], "--group-size 64: no layer of this head divides into such groups; "
         "give --group-size 32"),
        (["--from", "eagel"], "argument --from: invalid choice: 'eagel' (choose from "),
    ],
)  # fmt: skip
def test_options_that_cannot_be_honoured(words, fault, tmp_path, capsys):
    head = HEADS / "medusa"
    found = refused(capsys, "--input", head, "--output", tmp_path / "out", *words)
    assert found.startswith(fault.format(head=head))
    assert not (tmp_path / "out").exists()


def test_a_kind_may_be_without_a_vocabulary_to_reduce(counts, tmp_path, capsys, monkeypatch):
    without = dataclasses.replace(MEDUSA, outputs=lambda config: None)
    monkeypatch.setitem(KINDS, "medusa", without)
    words = ("--input", HEADS / "medusa", "--output", tmp_path / "out")
    assert refused(capsys, *words, "--draft-vocab", 8, counts) == (
        "--draft-vocab: a head of the kind medusa proposes what its target can say; leave it out"
    )


@pytest.mark.parametrize("name", ["medusa", "medusa_shared", "eagle3"])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_a_target_of_other_sizes_is_refused(name, key, tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(
        json.dumps({"hidden_size": 32, "vocab_size": 96} | {key: 7})
    )
    words = ("--input", HEADS / name, "--output", tmp_path / "out", "--target", target)
    if (name, key) == ("medusa_shared", "vocab_size"):
        assert run(*words) == 0  # it has none of its own
        assert settings(tmp_path / "out")["vocab_size"] == 7
        return
    size = {"hidden_size": 32, "vocab_size": 96}[key]
    assert refused(capsys, *words) == (
        f"--target {target} has {key} 7, the head was made for {size}: it belongs to another target"
    )


# ---------------------------------------------------------------------------------------------
# --verify

ROUNDED = {
    "copy": [],
    "bfloat16": ["--dtype", "bfloat16"],
    "8 bits": ["--quantize", "8", "--group-size", "32"],
    "4 bits": ["--quantize", "4", "--group-size", "32"],
}
SWAPPED = {
    "medusa": ("heads.0.1.weight", "heads.2.1.weight"),
    "medusa_shared": ("heads.0.0.linear.weight", "heads.1.0.linear.weight"),
    "eagle3": ("layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"),
    "eagle3_speculators_layers": ("layers.1.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
    "dflash2": (
        "candidate_selector.predecessor_codebook",
        "candidate_selector.successor_codebook",
    ),
    "dflash2 convolutions": (
        "layers.0.attention_conv.base_kernel",
        "layers.0.mlp_conv.base_kernel",
    ),
    "dspark": ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight"),
    "mtp_qwen3_next": (
        "layer.mlp.experts.0.up_proj.weight",
        "layer.mlp.experts.1.up_proj.weight",
    ),
    "mtp_qwen3_next gates": (
        "layer.mlp.experts.2.gate_proj.weight",
        "layer.mlp.experts.2.up_proj.weight",
    ),
    "mtp_qwen3_5_moe": (
        "layer.mlp.shared_expert.up_proj.weight",
        "layer.mlp.shared_expert.gate_proj.weight",
    ),
}


def relative_of(capsys, source: Path, output: Path, *words) -> float:
    """The difference that --verify prints, as a part of the largest number."""
    capsys.readouterr()
    convert(source, output, *words, "--verify")
    first = capsys.readouterr().out.splitlines()[0]
    return float(first.split(" of the largest logit")[0].rpartition(" ")[2])


@pytest.mark.parametrize("flags", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("name", FIXTURES)
def test_verify_prints_the_difference(name, flags, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    relative = relative_of(capsys, HEADS / name, tmp_path / "out", *flags)
    assert relative < (0.5 if "4" in flags else 0.1 if "8" in flags else 0.06 if flags else 1e-5)


def confuse(monkeypatch, one: str, other: str) -> None:
    """Make the converter write each of two tensors by the other's name."""
    from convert.published import Published

    theirs = Published._theirs
    swap = lambda self, n: theirs(self, {one: other, other: one}.get(n, n))
    monkeypatch.setattr(Published, "_theirs", swap)


@pytest.mark.parametrize("name", SWAPPED)
def test_verify_finds_a_converter_that_confuses_tensors(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    confuse(monkeypatch, *SWAPPED[name])
    source = HEADS / name.split()[0]
    words = ("--input", source, "--output", tmp_path / "out", "--dtype", "bfloat16")
    found = refused(capsys, *words, "--verify")
    assert found.startswith("--verify: the result does not compute what the source computes: ")
    assert not (tmp_path / "out").exists()


def test_verify_of_a_packed_source_and_a_reduced_vocabulary(counts, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    packed = convert(HEADS / "eagle3", tmp_path / "packed", "--quantize", 8, "--group-size", "32")
    capsys.readouterr()
    convert(packed, tmp_path / "out", "--draft-vocab", 8, counts, "--dequantize", "--verify")
    assert "(limit 0.0001)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_verify_of_the_other_markov_heads(kind, copied, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    path = copied("dspark")
    h, rank = 32, 8
    columns, rows = (h + rank, rank) if kind == "gated" else (2 * rank + h, 3 * rank)
    layer = "gate_proj" if kind == "gated" else "joint_proj"
    rng = np.random.default_rng(0)
    configure(path, markov_head_type=kind)
    change(
        path,
        **{
            f"markov_head__{layer}__weight": mx.array(
                rng.standard_normal((rows, columns), np.float32)
            ),
            f"markov_head__{layer}__bias": mx.array(rng.standard_normal(rows, np.float32)),
        },
    )
    assert relative_of(capsys, path, tmp_path / "out") < 1e-5


def test_verify_of_positions_that_turn_neighbouring_columns(copied, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    path = copied("dflash2")
    configure(path, rope_is_neox_style=False)
    assert relative_of(capsys, path, tmp_path / "out") < 1e-5


def test_verify_of_a_markov_head_of_fewer_ids(counts, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    words = ("--draft-vocab", 8, counts)
    assert relative_of(capsys, HEADS / "dspark", tmp_path / "out", *words) < 1e-5


@pytest.mark.parametrize("name", ["mtp_qwen3_5", "mtp_qwen3_5_moe"])
def test_verify_of_norms_that_the_one_was_added_to(name, copied, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    path = copied(name)
    is_norm = lambda n: n.startswith("mtp.") and "norm" in n
    change(path, **{n: x + 1 for n, x in read(path).items() if is_norm(n)})
    assert relative_of(capsys, path, tmp_path / "out") < 1e-5


MTP_FAMILIES = {
    "deepseek_v3": ("mlp.shared_experts.up_proj", "mlp.shared_experts.gate_proj"),
    "deepseek_v32": ("input_layernorm", "post_attention_layernorm"),
    "glm4_moe": ("self_attn.k_proj", "self_attn.v_proj"),
    "glm4_moe_lite": ("mlp.shared_experts.up_proj", "mlp.shared_experts.gate_proj"),
    "glm_moe_dsa": ("mlp.experts.0.down_proj", "mlp.experts.1.down_proj"),
    "mimo": ("mlp.up_proj", "mlp.gate_proj"),
    "ernie4_5_moe": ("self_attn.k_proj", "self_attn.v_proj"),
}
"""Of each family two modules of the layer that have one shape."""


def mtp_head(path: Path, name: str, **given) -> Path:
    """A head of a family, as its authors publish it; its sparse attention chooses all places."""
    from test_heads_mtp import made

    made(path, name, build(name, **given))
    configure(path, index_topk=2048, **given)
    return path


@pytest.mark.parametrize("name", MTP_FAMILIES)
def test_verify_of_every_family_of_mtp_heads(name, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    path = mtp_head(tmp_path / "head", name)
    assert relative_of(capsys, path, tmp_path / "out") < 1e-5
    assert relative_of(capsys, path, tmp_path / "small", "--quantize", 8, "--group-size", 32) < 0.1


@pytest.mark.parametrize("name", ["deepseek_v3", "mimo", "qwen3_5"])
def test_verify_of_several_mtp_heads(name, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    from test_heads_mtp_depths import write_heads

    write_heads(tmp_path / "head", name)
    assert relative_of(capsys, tmp_path / "head", tmp_path / "out") < 1e-5


@pytest.mark.parametrize("latent", [None, 32])
def test_verify_of_the_mtp_head_of_nemotron_h(latent, tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    from test_heads_mtp_nemotron import made

    made(tmp_path / "head", build("nemotron_h", moe_latent_size=latent), moe_latent_size=latent)
    assert relative_of(capsys, tmp_path / "head", tmp_path / "out") < 1e-5


@pytest.mark.parametrize("settings", [{"mscale": 1.0, "mscale_all_dim": 0.7}, {"beta_fast": 8}])
def test_verify_of_stretched_positions(settings, tmp_path, capsys):
    """YaRN, as DeepSeek has it, which weighs scores too."""
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, **settings}
    path = mtp_head(tmp_path / "head", "deepseek_v3", rope_scaling=scaling)
    assert relative_of(capsys, path, tmp_path / "out") < 1e-5


@pytest.mark.parametrize("name", MTP_FAMILIES)
def test_verify_finds_confused_tensors_of_every_family(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    path = mtp_head(tmp_path / "head", name)
    confuse(monkeypatch, *(f"layer.{part}.weight" for part in MTP_FAMILIES[name]))
    words = ("--input", path, "--output", tmp_path / "out", "--verify")
    assert refused(capsys, *words).startswith("--verify: the result does not compute")


def test_verify_of_sparse_attention_that_chooses_is_refused(tmp_path, capsys):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    path = mtp_head(tmp_path / "head", "glm_moe_dsa")
    configure(path, index_topk=8)
    words = ("--input", path, "--output", tmp_path / "out", "--verify")
    assert refused(capsys, *words) == (
        "--verify has no formula for this head of the kind mtp: leave it out"
    )


def test_verify_of_a_kind_without_a_formula_is_refused(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch", reason="--verify needs PyTorch")
    from convert.torch_heads import FORMULAS

    monkeypatch.delitem(FORMULAS, "medusa")
    words = ("--input", HEADS / "medusa", "--output", tmp_path / "out", "--verify")
    assert refused(capsys, *words) == (
        "--verify has no formula for heads of the kind medusa: leave it out"
    )


# ---------------------------------------------------------------------------------------------
# Hostile


def with_nan(name: str):
    def damage(path: Path) -> None:
        array = np.array(read(path)[name])
        array.reshape(-1)[-1] = np.nan
        change(path, **{name: mx.array(array)})

    return damage


def cut(path: Path) -> None:
    weights_in(path).write_bytes(weights_in(path).read_bytes()[:-1])


def huge_header(path: Path) -> None:
    weights_in(path).write_bytes(struct.pack("<Q", 2**40) + b"{}" * 50)


def missing_shard(path: Path) -> None:
    place = dict.fromkeys(read(path), "model-1.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def of(**tensors):
    return lambda path: change(path, **tensors)


def with_settings(**keys):
    return lambda path: configure(path, **keys)


NOT_COMPLETE = "{file}: is not a complete safetensors file: "
HOSTILE = {
    "medusa: wrong shape": (
        "medusa", of(**{"1.0.linear.weight": mx.zeros((31, 32))}),
        "{head}: 1.0.linear.weight has shape (31, 32), expected (32, 32)",
    ),
    "medusa: missing": (
        "medusa", of(**{"1.0.linear.bias": None}), "{head}: lacks the tensors 1.0.linear.bias",
    ),
    "medusa: unknown": (
        "medusa", of(**{"1.0.attention.weight": mx.zeros(2), "x": mx.zeros(2)}),
        "{head}: holds tensors that no part of the head uses (medusa): 1.0.attention.weight, "
        "x",
    ),
    "medusa: twice": (
        "medusa", of(**{"medusa_heads.1.1.weight": mx.zeros((96, 32))}),
        "{head}: 1.1.weight and medusa_heads.1.1.weight are the same tensor",
    ),
    "medusa: NaN": (
        "medusa", with_nan("2.1.weight"),
        "{file}: 2.1.weight holds NaN or infinite values; get the head again",
    ),
    "medusa: whole numbers": (
        "medusa", of(**{"2.1.weight": mx.zeros((96, 32), mx.int32)}),
        "{head}: 2.1.weight holds I32, not F32, F16, BF16",
    ),
    "medusa: a head numbered like no other": (
        "medusa", of(**{"999999999999.1.weight": mx.zeros((96, 32))}),
        "{head}: heads.999999999999.1.weight has a number beyond the 10 tensors there are",
    ),
    "medusa: no rows": (
        "medusa", of(**{"0.1.weight": mx.zeros((0, 32))}), "{head}: 0.1.weight has shape (0, 32)",
    ),
    "medusa: vocab_size is a word": (
        "medusa", with_settings(vocab_size="many"),
        "{head}: vocab_size is 'many', not a positive number",
    ),
    "medusa: vocab_size is too small": (
        "medusa", with_settings(vocab_size=50),
        "{head}: draft_vocab_size 96 is above vocab_size 50",
    ),
    "medusa: truncated": ("medusa", cut, NOT_COMPLETE + "its header describes"),
    "medusa: huge header": ("medusa", huge_header, NOT_COMPLETE + "its header claims"),
    "eagle3: wrong shape": (
        "eagle3", of(midlayer__self_attn__o_proj__weight=mx.zeros((32, 31))),
        "{head}: midlayer.self_attn.o_proj.weight has shape (32, 31), expected (32, 32)",
    ),
    "eagle3: missing": (
        "eagle3", of(midlayer__mlp__up_proj__weight=None, norm__weight=None),
        "{head}: lacks the tensors midlayer.mlp.up_proj.weight, norm.weight",
    ),
    "eagle3: unknown": (
        "eagle3", of(rotary=mx.zeros(2)),
        "{head}: holds tensors that no part of the head uses (eagle3): rotary",
    ),
    "eagle3: twice": (
        "eagle3", of(layers__0__input_layernorm__weight=mx.zeros(32)),
        "{head}: layers.0.input_layernorm.weight and midlayer.input_layernorm.weight are the same "
        "tensor",
    ),
    "eagle3: NaN": (
        "eagle3", with_nan("fc.weight"),
        "{file}: fc.weight holds NaN or infinite values; get the head again",
    ),
    "eagle3: ids beyond the vocabulary": (
        "eagle3", of(d2t=mx.full((40,), 90, mx.int64)),
        "{head}: d2t does not map to distinct ids below 96",
    ),
    "eagle3: an id twice": (
        "eagle3", of(d2t=mx.array([0, -1] + [0] * 38)),
        "{head}: d2t does not map to distinct ids below 96",
    ),
    "eagle3: ids of another number": (
        "eagle3", of(d2t=mx.zeros(39, mx.int64)),
        "{head}: d2t has shape (39,), draft_vocab_size is 40",
    ),
    "eagle3: ids in halves": (
        "eagle3", of(d2t=mx.zeros(40, mx.bfloat16)),
        "{head}: d2t holds BF16, not whole numbers",
    ),
    "eagle3: no ids": (
        "eagle3", of(d2t=None),
        "{head}: has a draft_vocab_size but no d2t to say which ids it holds",
    ),
    "eagle3: heads that do not divide": (
        "eagle3", with_settings(num_attention_heads=5),
        "{head}: 32 queries and 16 keys do not divide into num_attention_heads 5 of one size",
    ),
    "eagle3: eps is a word": (
        "eagle3", with_settings(rms_norm_eps="small"),
        "{head}: config.json and tensors do not make a head of the kind eagle3: could not convert",
    ),
    "eagle3: a layer beyond any number": (
        "eagle3", of(layers__12345678__mlp__up_proj__weight=mx.zeros((48, 32))),
        "{head}: layers.12345678.mlp.up_proj.weight has a number beyond the 14 tensors",
    ),
    "eagle3: packed without settings": (
        "eagle3", of(fc__scales=mx.zeros((32, 3))),
        "{head}/config.json: quantization None is unusable: ",
    ),
    "eagle3: no settings": (
        "eagle3", lambda path: (path / "config.json").unlink(),
        "{head}: num_attention_heads is None, not a positive number",
    ),
    "mtp: a base of positions that is none": (
        "mtp_qwen3_next", with_settings(rope_theta=["x"]),
        "{head}: config.json and tensors do not make a head of the kind mtp: rope()",
    ),
    "mtp: a number of experts that is none": (
        "mtp_qwen3_next", with_settings(num_experts_per_tok=None),
        "{head}: config.json and tensors do not make a head of the kind mtp: bad operand",
    ),
    "eagle3: a missing shard": (
        "eagle3", missing_shard,
        "{head}/model.safetensors.index.json: names model-1.safetensors, which is missing; get the "
        "head again",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_head_is_refused_and_nothing_is_written(
    name, damage, message, copied, tmp_path, capsys
):
    head = copied(name)
    damage(head)
    before = sorted(tmp_path.rglob("*"))
    found = refused(capsys, "--input", head, "--output", tmp_path / "new" / "out")
    assert found.startswith(message.format(head=head, file=weights_in(head)))
    assert sorted(tmp_path.rglob("*")) == before
    assert run("inspect", head) == (0 if "NaN" in message else 2)
    told = capsys.readouterr().out
    assert "NaN" in message or f"problem: {found}" in told


def test_a_damaged_head_is_named_by_what_it_lacks_if_its_kind_is_said(copied, tmp_path, capsys):
    head = copied("eagle3")
    change(head, fc__weight=None)
    words = ("--input", head, "--output", tmp_path / "out")
    assert "no draft head in any known layout" in refused(capsys, *words)
    found = refused(capsys, *words, "--from", "eagle3")
    assert found == f"{head}: lacks the tensors fc.weight"


class Trap:
    def __reduce__(self):
        return print, ("it went off",)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_is_not_run(file, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="reading .bin and .pt files needs PyTorch")
    torch.save({"0.0.linear.weight": Trap()}, tmp_path / file)
    found = refused(capsys, "--input", tmp_path, "--output", tmp_path / "out")
    assert found.startswith(f"{tmp_path / file}: wants to run ")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# The command


def test_every_kind_is_in_the_docs_and_in_the_help(capsys):
    text = (ROOT / "docs" / "conversion.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []
    assert run("--help") == 0
    told = capsys.readouterr().out
    assert all(f"{kind.name}:" in told for kind in KINDS.values())


def test_the_card_says_what_kind_it_is_and_for_what(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"hidden_size": 32, "vocab_size": 96}))
    card = (
        convert(HEADS / "eagle3", tmp_path / "made", "--target", target) / "README.md"
    ).read_text()
    assert "\n- mlx\n- eagle3\n- speculative-decoding\n" in card
    assert f"- Target: {target}." in card
    assert "- T2d is dropped: d2t says the same.\n" in card
    assert "draft vocabulary: 40 of 96 ids" in card
