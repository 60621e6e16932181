"""PyTorch files: read without running their code; and --verify, which computes in both worlds."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert_heads import (
    GOLDEN,
    NAMES,
    apple_config,
    apple_tensors,
    config_in,
    convert,
    read,
    run,
    same_bits,
    settings,
    tensors_in,
    write_in,
)
from redrafter_mlx.drafters.checkpoint import load_head

torch = pytest.importorskip("torch", reason="reading .bin and .pt files needs PyTorch")

CONFIG = apple_config()
ROOT = Path(__file__).parents[1]


def as_torch(x: mx.array) -> "torch.Tensor":
    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def pickled(path: Path, layout: str, config: dict, tensors: dict, file="pytorch_model.bin", **how):
    """A head as torch.save writes it."""
    path.mkdir()
    named = tensors_in(layout, tensors, config["num_draft_layers"])
    torch.save({name: as_torch(x) for name, x in named.items()}, path / file, **how)
    (path / "config.json").write_text(json.dumps(config_in(layout, config)))
    return path


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_pickled_heads_of_every_layout(layout, dtype, file, tmp_path):
    config = apple_config(draft=40)
    tensors = apple_tensors(config, dtype)
    source = pickled(tmp_path / "source", layout, config, tensors, file)
    assert same_bits(read(convert(source, tmp_path / "ours")), tensors)
    assert same_bits(read(convert(source / file, tmp_path / "from_file")), tensors)


@pytest.mark.parametrize("case", ["full_exit", "projected_exit", "sum_state"])
def test_golden_logits_come_out_of_a_pickled_head(case, tmp_path):
    tensors = mx.load(str(GOLDEN / case / "model.safetensors"))
    source = pickled(tmp_path / "source", "lm-heads", settings(GOLDEN / case), tensors, "model.pt")
    head, _ = load_head(convert(source, tmp_path / "ours", "--verify"), mx.float32)
    expected = mx.load(str(GOLDEN / case / "expected.safetensors"))
    got, reference = np.array(head.exit(expected["head_input"])), np.array(expected["head_logits"])
    assert np.abs(got - reference).max() < 1e-5 * np.abs(reference).max()


def test_older_archives_nested_dictionaries_and_shards(tmp_path):
    tensors = apple_tensors(CONFIG)
    old = pickled(tmp_path / "old", "apple", CONFIG, tensors, _use_new_zipfile_serialization=False)
    assert same_bits(read(convert(old, tmp_path / "a")), tensors)
    nested = {"epoch": 3, "state_dict": {n: as_torch(x) for n, x in tensors.items()}}
    torch.save(nested, old / "pytorch_model.bin")
    assert same_bits(read(convert(old, tmp_path / "b")), tensors)
    (old / "pytorch_model.bin").unlink()
    place = {n: f"pytorch_model-{n.startswith('rnn')}.bin" for n in tensors}
    for file in set(place.values()):
        torch.save({n: as_torch(x) for n, x in tensors.items() if place[n] == file}, old / file)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    assert same_bits(read(convert(old, tmp_path / "c")), tensors)


def test_views_and_transposed_tensors_are_read_as_they_look(tmp_path):
    tensors = apple_tensors(CONFIG)
    source = pickled(tmp_path / "source", "apple", CONFIG, tensors)
    named = {name: as_torch(x) for name, x in tensors.items()}
    named["rnn_w.weight"] = named["rnn_w.weight"].T.contiguous().T
    named["rnn_u.weight"] = torch.cat([named["rnn_u.weight"]] * 2)[32:]
    torch.save(named, source / "pytorch_model.bin")
    assert same_bits(read(convert(source, tmp_path / "ours")), tensors)


# ---------------------------------------------------------------------------------------------
# Hostile


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch '{self.witness}'",)


@pytest.fixture
def head(tmp_path) -> Path:
    return pickled(tmp_path / "head", "apple", CONFIG, apple_tensors(CONFIG))


def refused(capsys, head: Path) -> str:
    output = head.parent / "out"
    assert run("--input", head, "--output", output) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert not output.exists()
    file = head / "pytorch_model.bin"
    start = f"python -m convert: error: {file}: "
    assert captured.err.startswith(start)
    return captured.err[len(start) : -1]


@pytest.mark.parametrize("how", ["new", "old", "plain pickle"])
def test_a_pickle_bomb_does_not_go_off(how, head, capsys):
    witness = head.parent / "witness"
    bomb = {"rnn_u.bias": Trap(witness)}
    file = head / "pytorch_model.bin"
    if how == "plain pickle":
        file.write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        torch.save(bomb, file, _use_new_zipfile_serialization=how == "new")
    # The same file does go off with the loader of the standard library:
    data = pickle.dumps(bomb, protocol=2)
    pickle.loads(data)
    assert witness.exists()
    witness.unlink()
    assert refused(capsys, head) == (
        "wants to run posix.system when it is opened: refused; get the head elsewhere"
    )
    assert not witness.exists()


def test_a_whole_module_is_refused(head, capsys):
    torch.save(torch.nn.Linear(2, 2), head / "pytorch_model.bin")
    assert refused(capsys, head) == (
        "wants to run torch.nn.modules.linear.Linear when it is opened: refused; get the head "
        "elsewhere"
    )


def stretched() -> dict:
    """Few bytes that claim to be many."""
    return {"lm_head.2.weight": torch.zeros(1).expand(2**20, 2**20)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; get it again"),
        ([torch.zeros(2)], "holds a list, not tensors by name"),
        ({}, "holds a dict, not tensors by name"),
        ({"rnn_u.bias": 3}, "holds things that are not tensors: rnn_u.bias"),
        (stretched(), "lm_head.2.weight claims the shape (1048576, 1048576), its data are 4 bytes"),
        (
            {"a": torch.zeros(3, dtype=torch.complex64)},
            "a is a torch.strided tensor of complex64, not plain numbers",
        ),
        (
            {"a": torch.eye(3).to_sparse()},
            "a is a torch.sparse_coo tensor of float32, not plain numbers",
        ),
    ],
    ids=["0 bytes", "list", "empty", "number", "stretched", "complex", "sparse"],
)
def test_files_that_hold_something_else(content, message, head, capsys):
    file = head / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert refused(capsys, head) == message


def test_damaged_archives_are_told(head, capsys):
    file = head / "pytorch_model.bin"
    good = file.read_bytes()
    place = good.index(b"PK\x01\x02") + 6  # the version of the format, in the table of contents
    newer = good[:place] + b"\x78" + good[place + 1 :]
    for data in (good[:-1], good[: len(good) // 2], b"garbage" * 100, good[:3], newer):
        file.write_bytes(data)
        found = refused(capsys, head)
        assert "is not a complete PyTorch file" in found or found.startswith("is damaged")


def test_a_compressed_archive_is_refused(head, capsys):
    """A few kilobytes can unpack to any size."""
    file = head / "pytorch_model.bin"
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(file) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    file.write_bytes(packed.getvalue())
    assert "is compressed, which torch.save never does" in refused(capsys, head)


def test_a_link_out_of_the_directory_is_refused(head, capsys):
    outside = head.parent / "outside.bin"
    shutil.move(head / "pytorch_model.bin", outside)
    (head / "pytorch_model.bin").symlink_to(outside)
    message = f"is a link to {outside.resolve()}, outside {head}; copy the file there"
    assert refused(capsys, head) == message


# ---------------------------------------------------------------------------------------------
# --verify


VERIFIED = {
    "copy": [],
    "float16": ["--dtype", "float16"],
    "bfloat16": ["--dtype", "bfloat16"],
    "8 bits": ["--quantize", "8", "--group-size", "32"],
    "4 bits": ["--quantize", "4", "--group-size", "32"],
    "export": ["--to", "tensorrt-llm"],
}


@pytest.mark.parametrize("flags", VERIFIED.values(), ids=VERIFIED)
@pytest.mark.parametrize("case", ["full_exit", "projected_exit", "sum_state"])
def test_verify_prints_the_difference(case, flags, tmp_path, capsys):
    if "--quantize" in flags and case == "projected_exit":
        flags = [*flags[:2]]  # rows of 24 and 40 divide into no groups
        assert run("--input", GOLDEN / case, "--output", tmp_path / "o", *flags, "--verify") == 2
        return
    convert(GOLDEN / case, tmp_path / "out", *flags, "--verify")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("verify: largest difference ")
    relative = float(first.split(" of the largest logit")[0].rpartition(" ")[2])
    assert relative < (0.5 if "4" in flags else 0.05 if flags and "--to" not in flags else 1e-5)


def test_verify_of_a_reduced_and_packed_head(tmp_path, capsys):
    config = apple_config(draft=40)
    source = write_in(tmp_path / "source", "apple", config, apple_tensors(config))
    (tmp_path / "counts.txt").write_text("\n".join(f"{i} 1" for i in range(97)))
    packed = convert(source, tmp_path / "packed", "--quantize", "8", "--group-size", "32")
    words = ("--draft-vocab", tmp_path / "counts.txt", "--dequantize", "--verify")
    capsys.readouterr()
    convert(packed, tmp_path / "out", *words)
    assert "(limit 0.0001)" in capsys.readouterr().out


def swap_recurrence(name: str) -> str:
    """A converter that confuses the two matrices of the recurrence."""
    return {"rnn_w.weight": "rnn_u.weight", "rnn_u.weight": "rnn_w.weight"}.get(name, name)


@pytest.mark.parametrize("flags", VERIFIED.values(), ids=VERIFIED)
def test_verify_finds_a_converter_that_confuses_tensors(flags, tmp_path, capsys, monkeypatch):
    from convert.layouts import Layout

    source = write_in(tmp_path / "source", "apple", CONFIG, apple_tensors(CONFIG))
    theirs = Layout.theirs
    wrong = lambda self, name, blocks: theirs(self, swap_recurrence(name), blocks)
    monkeypatch.setattr(Layout, "theirs", wrong)
    if "--quantize" in flags:  # else the parts of one layer would be mixed
        monkeypatch.setattr("convert.conversion.jobs", swapped_blocks)
        monkeypatch.setattr(Layout, "theirs", theirs)
    assert run("--input", source, "--output", tmp_path / "out", *flags, "--verify") == 2
    error = capsys.readouterr().err
    assert "--verify: the result does not compute what the source computes" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def swapped_blocks(head, recipe):
    """Jobs that take each matrix of the recurrence for the other."""
    from convert.weights import jobs

    tensors = {swap_recurrence(name): tensor for name, tensor in head.tensors.items()}
    return jobs(dataclasses.replace(head, tensors=tensors), recipe)


# ---------------------------------------------------------------------------------------------
# Without torch


def test_without_torch_the_way_to_get_it_is_told(head, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--input", head, "--output", tmp_path / "out"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "python -m convert: error: reading pytorch_model.bin needs PyTorch, which is not "
        "installed: pip install torch\n"
    )
