"""What the probe finds is kept for models from files, until what computes them differs."""

import mlx.core as mx
import pytest

from families import build
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import CACHE_VARIABLE
from redrafter_mlx.target import adapter, fingerprint, probe
from redrafter_mlx.target.adapter import adapt


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "probes"


@pytest.fixture
def probed(monkeypatch):
    """The targets that were probed."""
    targets = []
    real = probe.probe_parity

    def counting(target):
        targets.append(target)
        return real(target)

    monkeypatch.setattr(probe, "probe_parity", counting)
    monkeypatch.setattr(adapter, "probe_parity", counting)
    return targets


def from_files(name="llama", **config):
    """A model as the loader leaves it; always the same weights."""
    mx.random.seed(3)
    model = build(name)
    for key, value in config.items():
        setattr(model.args, key, value)
    model._redrafter_directory = "somewhere"
    return model


def test_a_model_from_files_is_probed_once(probed):
    first, second = adapt(from_files()), adapt(from_files())
    assert first.model is not second.model
    assert len(probed) == 1
    assert second.parity == first.parity


def test_a_model_made_in_memory_is_probed_each_time(probed, cache):
    adapt(build("llama"))
    adapt(build("llama"))
    assert len(probed) == 2
    assert not cache.exists()


def other_weights(monkeypatch):
    model = from_files()
    model.lm_head.weight = model.lm_head.weight * 2
    return model


def other_type(monkeypatch):
    model = from_files()
    model.set_dtype(mx.bfloat16)
    return model


def other_config(monkeypatch):
    return from_files(rope_theta=17.0)


def other_family(monkeypatch):
    return from_files("qwen2")


def other_class(monkeypatch):
    model = from_files()
    attention = model.layers[1].self_attn
    attention.__class__ = type("Mended", (type(attention),), {})
    return model


def patched(monkeypatch):
    """A method that lies in another file."""
    model = from_files()
    attention = type(model.layers[0].self_attn)
    real = attention.__call__
    monkeypatch.setattr(attention, "__call__", lambda *given, **more: real(*given, **more))
    return model


def other_code(monkeypatch):
    monkeypatch.setattr(fingerprint, "OURS", (*fingerprint.OURS, "pricing"))
    return from_files()


def other_mlx(monkeypatch):
    monkeypatch.setattr(mx, "__version__", "0.0.1")
    return from_files()


@pytest.mark.parametrize(
    "other",
    [
        other_weights, other_type, other_config, other_family, other_class, patched, other_code,
        other_mlx,
    ],
)  # fmt: skip
def test_another_model_or_other_code_is_probed(other, probed, monkeypatch):
    adapt(from_files())
    adapt(other(monkeypatch))
    assert len(probed) == 2


def test_code_that_is_in_no_file_is_probed_each_time(probed, monkeypatch):
    def model():
        made = from_files()
        scope = {}
        exec("def __call__(self, *given, **more): return self.inner(*given, **more)", scope)
        kind = type(made.layers[0].mlp)
        members = {"__call__": scope["__call__"], "inner": kind.__call__}
        made.layers[0].mlp.__class__ = type("Typed", (kind,), members)
        return made

    adapt(model())
    adapt(model())
    assert len(probed) == 2


def test_a_refusal_is_not_kept(monkeypatch, probed, cache):
    monkeypatch.setattr(probe, "differences", lambda target: (0.5, 0.5))
    for _ in range(2):
        with pytest.raises(UserError, match="differ from one-path logits"):
            adapt(from_files())
    assert len(probed) == 2
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"difference": 1}', '{"difference": 2, "allowed": 1, "logits": 0}',
     '{"difference": NaN, "allowed": 1, "logits": 0}', '{"difference": "0", "allowed": 1, '
     '"logits": 0}', "\0"],
)  # fmt: skip
def test_a_damaged_finding_is_found_again(content, probed, cache):
    kept = adapt(from_files()).parity
    (path,) = cache.iterdir()
    path.write_text(content)
    assert adapt(from_files()).parity == kept
    assert len(probed) == 2
    adapt(from_files())
    assert len(probed) == 2, "it was written again"


def test_where_nothing_can_be_kept_it_is_probed_each_time(probed, cache):
    cache.parent.parent.joinpath("cache").write_text("a file")
    adapt(from_files())
    adapt(from_files())
    assert len(probed) == 2


def test_a_leader_of_several_processes_probes(probed, monkeypatch):
    adapt(from_files())
    monkeypatch.setattr(adapter.parallel, "leader", object)
    monkeypatch.setattr(probe, "differences", lambda target: (0.0, 0.0))
    adapt(from_files())
    assert len(probed) == 2
