"""The server around the protocols: who may ask, limits, clients that go, models that change."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from redrafter_mlx.errors import UserError
from redrafter_mlx.server import app, asking, page, replies
from redrafter_mlx.server.options import ServerOptions
from scripted_engine import ScriptedEngine, serving, wait_until

CHAT = {"messages": [{"role": "user", "content": "Hallo"}]}
MESSAGE = CHAT | {"max_tokens": 10_000}
LONG = "abcdefgh " * 100


@pytest.fixture
def start(tokenizer):
    """(what it says, options) -> a running server: address, engine, Server."""

    @contextmanager
    def start(text="x", engine=None, make=None, allowed=None, **options):
        script = text if callable(text) else lambda _: text
        engine = ScriptedEngine(tokenizer, script, **(engine or {}))
        given = ServerOptions(port=0, **options)
        with serving(engine, given, make=make, allowed=allowed) as (address, server):
            yield address, engine, server

    return start


def post(address, body=CHAT, path="/v1/chat/completions", **how):
    return httpx.post(address + path, json=body, timeout=30, **how)


def message_of(reply) -> str:
    return reply.json()["error"]["message"]


def connect(address, path="/v1/chat/completions", body=CHAT, length=None, **options):
    """A socket that has sent a request."""
    data = json.dumps(body).encode()
    host, port = address.removeprefix("http://").split(":")
    client = socket.socket()
    for option, value in options.items():
        client.setsockopt(socket.SOL_SOCKET, getattr(socket, option), value)
    client.connect((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    client.sendall(f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data)
    return client


# ---------------------------------------------------------------------------------------------
# Who may ask


def test_keys(start):
    with start(api_key=("one", "two")) as (address, *_):
        for headers in ({"Authorization": "Bearer two"}, {"x-api-key": "one"}):
            assert post(address, headers=headers).status_code == 200
        for headers in ({}, {"Authorization": "Bearer on"}, {"x-api-key": "onetwo"},
                        {"Authorization": "Basic two"}, {"x-api-key": b"\xff"}):  # fmt: skip
            reply = post(address, headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
        reply = post(address, MESSAGE, "/v1/messages")
        assert (reply.status_code, reply.json()["error"]["type"]) == (401, "authentication_error")
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
            assert httpx.get(address + path).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200


def test_pages_of_others_may_not_ask(start):
    with start() as (address, *_):
        reply = post(address, headers={"Origin": "https://evil.example"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "wrong_origin")
        assert "--cors https://evil.example" in message_of(reply)
        assert post(address, headers={"Origin": address}).status_code == 200
        preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        reply = httpx.options(f"{address}/v1/chat/completions", headers=preflight)
        assert "access-control-allow-origin" not in reply.headers
        reply = post(address, headers={"Host": "evil.example"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "wrong_host")


def test_pages_that_are_named_may_ask(start):
    origin = "https://chat.example"
    with start(cors=(origin,), api_key=("key",)) as (address, *_):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        reply = httpx.options(f"{address}/v1/chat/completions", headers=headers)
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
        reply = post(address, headers={"Origin": origin, "x-api-key": "key"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
        reply = post(address, headers={"Origin": "https://other.example", "x-api-key": "key"})
        assert reply.status_code == 403


# ---------------------------------------------------------------------------------------------
# Limits and bad bodies


def test_large_bodies_are_not_read(start):
    with start(max_body=0.01) as (address, engine, _):
        reply = post(address, CHAT | {"user": "a" * 20_000})
        assert reply.status_code == 413
        assert "--max-body" in message_of(reply)
        reply = httpx.post(f"{address}/v1/messages", content=(b" " * 1000 for _ in range(30)))
        assert (reply.status_code, reply.json()["error"]["type"]) == (413, "request_too_large")
        client = connect(address, length=10_000_000_000)
        assert b" 413 " in client.recv(10_000)  # although most of it never came
        client.close()
        assert not engine.requests


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"messages": "\xc3"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"messages": ' * 1000 + b"1" + b"}" * 1000,
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": ""}]}',
        b"null",
        b'"text"',
        b'{"seed": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": ""}]}',
        b'{"messages": [' + b"1," * 100_000 + b"1]}",
        json.dumps({str(number): 0 for number in range(50_000)}).encode(),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_bad_bodies_are_told(start_once, path, body):
    reply = httpx.post(start_once + path, content=body, timeout=30)
    assert reply.status_code == 400
    assert len(message_of(reply)) < 1000
    assert "\n" not in message_of(reply)


@pytest.fixture(scope="module")
def start_once(tokenizer):
    with serving(ScriptedEngine(tokenizer, lambda _: "x")) as (address, _):
        yield address


def test_unknown_routes_and_methods(start_once):
    reply = httpx.get(f"{start_once}/v1/chat/completions")
    assert (reply.status_code, reply.json()["error"]["type"]) == (405, "invalid_request_error")
    reply = httpx.post(f"{start_once}/v1/messages/batches", json={})
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")
    assert httpx.get(f"{start_once}/page/../app.py").status_code == 404
    assert httpx.get(f"{start_once}/page/%2e%2e%2fapp.py").status_code == 404


def test_a_full_queue(start):
    with start(LONG, engine={"queue": 2, "seconds": 0.05}) as (address, engine, _):
        clients = [connect(address), connect(address)]
        wait_until(lambda: engine.running == 2)
        reply = post(address)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")
        assert reply.json()["error"]["type"] == "rate_limit_error"
        reply = post(address, MESSAGE, "/v1/messages")
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
        clients.pop().close()
        wait_until(lambda: engine.running == 1)
        running = len(engine.requests)
        assert post(address, CHAT | {"n": 2}).status_code == 429
        assert len(engine.requests) == running + 1
        wait_until(lambda: engine.running == 1)  # the one that had been taken is let go
        clients.pop().close()


def test_a_request_that_takes_too_long(start):
    with start(LONG, engine={"seconds": 0.02}, request_timeout=0.4) as (address, engine, _):
        reply = post(address)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        assert reply.headers["x-should-retry"] == "false"
        reply = post(address, CHAT | {"stream": True})
        assert reply.status_code == 200
        assert '"code":"timeout"' in reply.text
        reply = post(address, MESSAGE | {"stream": True}, "/v1/messages")
        assert '"type":"timeout_error"' in reply.text.splitlines()[-2]
        wait_until(lambda: engine.running == 0)


# ---------------------------------------------------------------------------------------------
# Clients that go, read slowly, or never finish asking


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGE), ("/v1/completions",
      {"prompt": ["a", "b"], "n": 2}), ("/v1/responses", {"input": "a"})],
)  # fmt: skip
def test_a_client_that_goes_frees_the_engine(start, path, body, stream):
    with start(LONG, engine={"seconds": 0.05}) as (address, engine, server):
        client = connect(address, path, body | {"stream": stream})
        wait_until(lambda: engine.running == (4 if "prompt" in body else 1))
        if stream:
            assert b"text/event-stream" in client.recv(10_000)
        client.close()
        wait_until(lambda: engine.running == 0)
        assert set(engine.totals.finished) == {"cancelled"}
        wait_until(lambda: server.metrics.gone == 1)
        assert post(address, CHAT | {"max_tokens": 3}).status_code == 200


def test_a_client_that_does_not_read(start, monkeypatch):
    """Its answer ends when too much of it is unread; others do not notice."""
    monkeypatch.setattr(asking, "MOST_UNREAD", 50)
    engine = {"step": 400, "context": None}
    script = lambda request: "x" * (600_000 if request.generation.max_tokens != 3 else 3)
    with start(script, engine=engine) as (address, engine, server):
        body = CHAT | {"stream": True, "redrafter": {"details": True}, "max_tokens": 600_000}
        client = connect(address, body=body, SO_RCVBUF=4096)
        wait_until(lambda: engine.tickets and engine.tickets[0].is_cancelled, 60)
        assert post(address, CHAT | {"max_tokens": 3}).status_code == 200
        client.close()
        wait_until(lambda: server.metrics.responses["/v1/chat/completions", 408] == 1)


def test_a_client_that_reads_nothing_is_let_go_of(start, monkeypatch):
    monkeypatch.setattr(app, "SEND_SECONDS", 0.3)
    with start("x" * 600_000, {"step": 400, "context": None}) as (address, engine, server):
        body = CHAT | {"stream": True, "redrafter": {"details": True}, "max_tokens": 600_000}
        client = connect(address, body=body, SO_RCVBUF=4096)
        wait_until(lambda: server.metrics.gone == 1, 60)
        wait_until(lambda: engine.running == 0)
        client.close()


def test_half_a_request_holds_nothing_up(start, monkeypatch):
    monkeypatch.setattr(replies, "BODY_SECONDS", 0.5)
    with start() as (address, engine, _):
        clients = [connect(address, length=100_000) for _ in range(20)]
        head = socket.create_connection(address.removeprefix("http://").split(":"))
        head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.")
        assert post(address).status_code == 200
        assert len(engine.requests) == 1
        assert b" 408 " in clients[0].recv(10_000)
        clients[1].close()
        assert post(address).status_code == 200
        for client in [*clients, head]:
            client.close()


def test_signs_of_life_while_a_prompt_is_read(start, monkeypatch):
    monkeypatch.setattr(app, "BEAT_SECONDS", 0.05)
    with start(engine={"seconds": 0.4}) as (address, *_):
        reply = post(address, CHAT | {"stream": True})
        assert ": the answer is still to come" in reply.text.splitlines()
        reply = post(address, MESSAGE | {"stream": True}, "/v1/messages")
        assert "event: ping" in reply.text.splitlines()


def test_bad_requests_of_sockets_leave_the_server_alive(start):
    with start() as (address, *_):
        where = tuple(address.removeprefix("http://").split(":"))
        for data in (b"\x16\x03\x01", b"GET\r\n\r\n", b"POST / HTTP/9\r\n\r\n", b"\0" * 100_000):
            with socket.create_connection(where) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
        assert post(address).status_code == 200


# ---------------------------------------------------------------------------------------------
# Stopping, models, what it tells of itself


def test_stopping_lets_running_requests_end(start):
    with start(LONG[:60], engine={"seconds": 0.05}) as (address, engine, server):
        replies = []
        running = threading.Thread(target=lambda: replies.append(post(address)))
        running.start()
        wait_until(lambda: engine.running == 1)
        server.is_stopping = True
        reply = post(address)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "server_stopping")
        assert reply.headers["retry-after"] == "5"
        assert httpx.get(f"{address}/health").status_code == 503
        engine.stop(grace=60)
        running.join()
        assert replies[0].json()["choices"][0]["message"]["content"] == LONG[:60]


def test_what_is_cut_is_told(start):
    with start(LONG, engine={"seconds": 0.05}) as (address, engine, _):
        replies = []
        asked = [CHAT, CHAT | {"stream": True}]
        threads = [
            threading.Thread(target=lambda body=body: replies.append(post(address, body)))
            for body in asked
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: engine.running == 2)
        time.sleep(0.2)
        engine.stop(grace=0)
        for thread in threads:
            thread.join()
        assert sorted(reply.status_code for reply in replies) == [200, 503]
        assert all('"server_stopping"' in reply.text for reply in replies)


def test_another_model_comes_when_the_running_requests_have_ended(start, tokenizer):
    made = []

    def make(name):
        if name == "org/broken":
            raise UserError("it is broken")
        made.append(ScriptedEngine(tokenizer, lambda _: f"I am {name}", name=name))
        return made[-1]

    with start(LONG[:60], {"seconds": 0.05}, make, ()) as (address, engine, _):
        say = lambda model: post(address, CHAT | {"model": model})
        content = lambda reply: reply.json()["choices"][0]["message"]["content"]
        replies = []
        first = threading.Thread(target=lambda: replies.append(say("scripted")))
        first.start()
        wait_until(lambda: engine.running == 1)
        assert content(say("org/second")) == "I am org/second"
        first.join(1)
        assert content(replies[0]) == LONG[:60]
        assert not engine.is_alive
        assert content(say("scripted")) == "I am scripted"
        for name in ("/etc", "../model", "./a/b", "a", "a/b/c", "tests/..", "x" * 1000):
            reply = say(name)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
        reply = say("org/broken")
        assert reply.status_code == 400
        assert "broken" in message_of(reply)
        assert content(say("scripted")) == "I am scripted"


def test_only_models_that_are_named(start, tokenizer):
    make = lambda name: ScriptedEngine(tokenizer, lambda _: name, name=name)
    with start(make=make, allowed=["org/a"]) as (address, *_):
        models = httpx.get(f"{address}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["scripted", "org/a"]
        assert [model["redrafter"]["loaded"] for model in models] == [True, False]
        assert post(address, CHAT | {"model": "org/a"}).status_code == 200
        assert post(address, CHAT | {"model": "org/b"}).status_code == 404
        assert httpx.get(f"{address}/v1/models/org/a").json()["redrafter"]["loaded"]


def test_waiting_for_a_model_has_an_end(start, tokenizer, monkeypatch):
    monkeypatch.setattr(app, "SLOW_SECONDS", 0.1)
    made = []

    def make(name):
        time.sleep(1.5)
        made.append(ScriptedEngine(tokenizer, lambda _: name, name=name))
        return made[-1]

    with start("x", make=make, allowed=(), request_timeout=0.3) as (address, *_):
        reply = post(address, CHAT | {"model": "org/second"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        wait_until(lambda: made)  # it is loaded all the same
        wait_until(lambda: httpx.get(f"{address}/health").json().get("model") == "org/second")


def test_metrics_are_of_prometheus_form(start):
    with start() as (address, *_):
        post(address)
        post(address, {})
        reply = httpx.get(f"{address}/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [0-9.e+-]+')
    lines = reply.text.splitlines()
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in lines)
    route = 'redrafter_http_responses_total{route="/v1/chat/completions",status='
    assert f'{route}"200"}} 1' in lines
    assert f'{route}"400"}} 1' in lines
    assert 'redrafter_requests_finished_total{reason="stop"} 1' in lines


def test_the_page_is_served_from_its_files(start, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("<p>Hallo")
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "secret.py").write_text("1")
    monkeypatch.setattr(page, "DIRECTORY", tmp_path)
    with start(api_key=("key",)) as (address, *_):  # the page asks for the key by itself
        reply = httpx.get(address)
        assert (reply.status_code, reply.text) == (200, "<p>Hallo")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        reply = httpx.get(f"{address}/page/app.js")
        assert reply.headers["content-type"] == "text/javascript; charset=utf-8"
        for name in ("secret.py", "nothing.js", "%2e%2e/index.html", ""):
            assert httpx.get(f"{address}/page/{name}").status_code == 404


@pytest.mark.parametrize("shown", [False, True])
def test_logs_hold_text_only_if_asked(start, caplog, shown):
    caplog.set_level(logging.DEBUG, "redrafter_mlx")
    body = {"messages": [{"role": "user", "content": "geheime Frage"}]}
    with start("geheime Antwort", log_text=shown) as (address, *_):
        post(address, body)
        post(address, body | {"stream": True, "redrafter": {"details": False}})
        post(address, body | {"geheimes Feld": 1})
    assert ("geheim" in caplog.text) == shown
    assert "POST /v1/chat/completions 200" in caplog.text
