"""python -m redrafter_mlx.server as a process, on a tiny model: start, answers, signals, errors."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import httpx
import mlx.core as mx
import openai
import pytest
from mlx_lm.utils import save_config, save_model

import families
from redrafter_mlx.drafters.max_gram import MaxGramDrafter
from redrafter_mlx.engine import Engine, load_served
from redrafter_mlx.loading import hub
from redrafter_mlx.server import __main__ as command
from scripted_engine import CHAT, SPECIAL, save_tokenizer, serving, wait_until
from support import generation

ROOT = Path(__file__).parents[1]
VOCABULARY = 300
USER = [{"role": "user", "content": "the end of the end of the end"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model that says bytes at random and never ends by itself."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.CONFIGS, "llama:bytes", {"vocab_size": VOCABULARY})
        model, config = families.build("llama:bytes"), families.config("llama:bytes")
    kept = mx.array([[float(len(SPECIAL) <= id < 256)] for id in range(VOCABULARY)])
    model.lm_head.weight = model.lm_head.weight * kept
    save_model(path, model)
    save_config(config | {"max_position_embeddings": 2048}, path / "config.json")
    save_tokenizer(path, CHAT, SPECIAL)
    return path


COMMAND = ("-m", "redrafter_mlx.server")


def start(tiny, *words, program=COMMAND, **how) -> tuple[subprocess.Popen, str]:
    """The command, or another program that runs it, in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, *program, "--model", str(tiny), "--port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | how,
    )
    line = process.stdout.readline()
    found = re.match(r"(http://\S+) serves (\S+)", line)
    if found is None:
        pytest.fail(line + process.communicate()[1])
    assert found[2] == str(tiny)
    return process, found[1]


def chat(address, **body):
    body = {"messages": USER, "max_tokens": 8} | body
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)


def end(process) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_sigterm_lets_the_running_request_end(tiny, tmp_path):
    saved = tmp_path / "texts"
    process, address = start(tiny, "--grace", "60", "--prompt-cache-dir", str(saved))
    body = {"messages": USER, "max_tokens": 300, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
        assert chat(address).status_code == 503
        rest = list(lines)
    assert '"finish_reason":"length"' in rest[-4]
    assert rest[-2] == "data: [DONE]"
    assert end(process)[0] == 0
    assert list(saved.iterdir())
    process, address = start(tiny, "--prompt-cache-dir", str(saved))
    usage = chat(address).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2
    process.kill()


def test_what_runs_is_cut_after_the_grace(tiny):
    process, address = start(tiny, "--grace", "0.2")
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(chat, address, max_tokens=1900) for _ in range(2)]
        wait_until(lambda: httpx.get(f"{address}/health").json()["running"] == 2)
        process.send_signal(signal.SIGTERM)
        codes = [reply.result().status_code for reply in replies]
    assert codes == [503, 503]
    assert end(process)[0] == 0


def test_ctrl_c_and_again(tiny):
    process, address = start(tiny, "--grace", "600")
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(chat, address, max_tokens=1900)
        wait_until(lambda: httpx.get(f"{address}/health").json()["running"] == 1)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
        process.send_signal(signal.SIGINT)
        code, err = end(process)
        assert reply.exception() is not None
    assert code == 130
    assert "Traceback" not in err


def test_keys_from_the_environment_and_flags_and_the_context(tiny):
    keys = ("--api-key", "a", "--api-key", "b")
    process, address = start(tiny, *keys, "--context", "64", REDRAFTER_MLX_API_KEY="c")
    for key, status in (("a", 200), ("b", 200), ("c", 200), ("d", 401)):
        reply = httpx.get(f"{address}/v1/models", headers={"x-api-key": key})
        assert reply.status_code == status
        assert status == 401 or reply.json()["data"][0]["redrafter"]["context"] == 64
    body = {"messages": [{"role": "user", "content": "a" * 100}]}
    headers = {"x-api-key": "a"}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    process.send_signal(signal.SIGTERM)
    code, err = end(process)
    assert code == 0
    assert "Traceback" not in err


@pytest.fixture
def refused(tiny, capsys):
    """(words) -> the line that the command ends with, code 2, before it listens."""

    def refused(*words, model=None):
        try:
            code = command.main(["--model", str(model or tiny), "--port", "0", *words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        return line

    return refused


def test_errors_are_one_line(refused, tmp_path, monkeypatch):
    assert "nothing" in refused(model=tmp_path / "nothing")
    assert "--no-draft" in refused("--no-draft", "--drafter", "max_gram")
    assert "--port 70000" in refused("--port", "70000")
    assert "--temp" in refused("--temp", "-1")
    assert "--extra-eos-token" in refused("--extra-eos-token", "<nothing>")
    assert "tokenize" in refused("--chat-template-config", '{"tokenize": true}')
    assert "--host" in refused("--host", "256.256.256.256")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}" in refused("--port", port)
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == "uvicorn" else find(name, *more)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert "pip install 'redrafter-mlx[server]'" in refused()


def test_help_names_the_defaults_that_hold():
    text = command.make_parser().format_help()
    assert "--max-tokens" in text
    assert "(default: 256)" not in text


@pytest.fixture(scope="module")
def real(tiny):
    """A server in this process, with the real engine."""
    engine = Engine(lambda: load_served(str(tiny), "max_gram")).start()
    with serving(engine) as (address, server):
        yield address, engine, server


def test_the_same_request_and_seed_give_the_same_text(real, tiny):
    """Eight at once, drafted and not, warm and cold, and as the library says it."""
    address, engine, _ = real
    tokenizer = engine.served.tokenizer
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)

    def say(number, **ours):
        return client.completions.create(
            model=str(tiny), prompt="the end of the end" * (1 + number % 4), max_tokens=24,
            temperature=0.9 * (number % 2), seed=number, extra_body={"redrafter": ours},
        ).choices[0].text  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(say, range(12)))
        plain = list(pool.map(lambda number: say(number, drafter="none"), range(12)))
        fixed = list(pool.map(lambda number: say(number, budget=8), range(12)))
    assert texts == plain == fixed
    assert len(set(texts)) > 6
    model, _ = hub.load(str(tiny))
    prompt = tokenizer.encode("the end of the end" * 2)
    run = generation(model, prompt, MaxGramDrafter(), max_tokens=24, temp=0.9, seed=1)
    detokenizer = tokenizer.detokenizer
    for token in run:
        detokenizer.add_token(token.id)
    detokenizer.finalize()
    assert detokenizer.text == texts[1]


def test_a_client_that_goes_frees_the_device(real):
    address, engine, _ = real
    body = {"messages": USER, "max_tokens": 1500, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())
    wait_until(lambda: engine.status()["running"] == 0)
    assert engine.totals.finished["cancelled"] >= 1


def test_details_of_real_rounds(real):
    address, *_ = real
    body = {"messages": USER, "max_tokens": 24, "stream": True,
            "redrafter": {"details": True, "budget": 8}}  # fmt: skip
    text = chat(address, **body).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    trees = [chunk["redrafter"]["tree"] for chunk in chunks if chunk["redrafter"]["tree"]]
    assert len(trees) == chunks[-1]["redrafter"]["stats"]["rounds"]
    for tree in trees:
        assert len(tree["tokens"]) == len(tree["parents"])
        assert tree["parents"][0] == -1
        assert tree["accepted"][0] == 0
    done = [chunk["redrafter"]["stats"]["prompt_done"] for chunk in chunks]
    assert done == sorted(done)
    assert done[-1] == chunks[-1]["redrafter"]["stats"]["prompt_tokens"]


def test_logprobs_of_the_model(real):
    address, *_ = real
    reply = chat(address, logprobs=True, top_logprobs=3).json()
    entries = reply["choices"][0]["logprobs"]["content"]
    assert len(entries) == 8
    for entry in entries:  # greedy: the token itself is the likeliest
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])


def test_the_demo_model_answers_both_apis(demo_path):
    """The one test with a real model, its template and the drafter that it gets by itself."""
    engine = Engine(lambda: load_served("demo")).start()
    with serving(engine) as (address, _):
        openais = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        anthropics = anthropic.Anthropic(base_url=address, api_key="-", max_retries=0)
        request = {
            "model": "demo",
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
            "max_tokens": 6,
            "extra_body": {"redrafter": {"budget": 6}},  # nothing is measured before
        }
        said = openais.chat.completions.create(**request)
        message = anthropics.messages.create(**request)
        text = said.choices[0].message.content
        assert message.content[0].text == text
        assert len(text.split()) > 2
        assert message.usage.cache_read_input_tokens > 0.8 * said.usage.prompt_tokens
