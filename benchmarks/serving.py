"""The server under load, beside mlx_lm.server with the same model: speed, latency, same text.

python -m benchmarks.serving --output serving.json

Both servers run at once and are asked in turn, so that the machine is the same for both: first with
1, 2, 4 and 8 clients at a time, then with a follow-up after a long history, cold and warm. Each of
our answers is compared with that of a lone request to a server that keeps nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import mlx.core as mx
from mlx.utils import tree_flatten

import redrafter_mlx
from redrafter_mlx.loading import hub

from . import prompts as prompt_files
from .machine import add_prompts, document, machine, parser, publish
from .tables import serving_tables

OURS, THEIRS, ALONE = "redrafter_mlx.server", "mlx_lm.server", "one by one"
READY_SECONDS = 180


@dataclass(frozen=True)
class Answered:
    """One request: seconds to the first and to the last word, number of tokens, and the text."""

    first: float
    last: float
    tokens: int
    text: str


def main(args: list[str] | None = None) -> int:
    made = parser(__doc__.split("\n")[0])
    add_prompts(made)
    made.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    made.add_argument("--requests", type=int, default=20, help="of each client")
    made.add_argument("--history", type=int, default=3000, help="tokens before a follow-up")
    flags = made.parse_args(args)
    chosen = prompt_files.read(flags.prompts, flags.per_category)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        same = _computed_alike(flags.model, directory / "model")
        ours = stack.enter_context(_serving(OURS, flags.model))
        theirs = stack.enter_context(_serving(THEIRS, same))
        servers = {OURS: (ours, None), THEIRS: (theirs, str(same))}
        found = asyncio.run(_measure(flags, [p.text for p in chosen], servers))
    with _serving(OURS, flags.model, "--cache-memory", "0", "--parallel", "1") as alone:
        texts = asyncio.run(_alone(alone, flags, [p.text for p in chosen]))
    found["other texts"] = sum(
        texts[text] != said for text, said in found.pop("said") if text in texts
    )
    publish(document("serving", flags, machine(), **found), flags.output, serving_tables)
    return int(found["other texts"] > 0)


def _computed_alike(model: str, path: Path) -> Path:
    """The model as we compute it (on a CPU in float32), in a directory that mlx-lm can load."""
    loaded, _ = redrafter_mlx.load(model)
    shutil.copytree(hub.resolve_target(model), path)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    tensors = dict(tree_flatten(loaded.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "mlx"})
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for key in {"quantization", "quantization_config"} & config.keys():
        for module in ("model.embed_tokens", "lm_head"):
            if f"{module}.scales" not in tensors:
                config[key][module] = False
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@contextmanager
def _serving(module: str, model: str | Path, *flags: str):
    """A server in its own process, with our BLAS even if it is mlx-lm's; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ["-c", f"import runpy, redrafter_mlx; runpy.run_module({module!r}, run_name='__main__')"]
    command = [sys.executable, *run, "--model", str(model), "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            try:
                httpx.get(f"{address}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() - began > READY_SECONDS:
                    raise SystemExit(f"{module} does not answer") from None
                time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(30)


async def _measure(flags: argparse.Namespace, texts: list[str], servers: dict) -> dict:
    rows, said = [], []
    async with httpx.AsyncClient(timeout=None) as client:
        for address, model in servers.values():  # warm-up
            await _ask(client, address, model, [_user(texts[0])], 8)
        for clients in flags.clients:
            for name, (address, model) in servers.items():
                began = time.perf_counter()
                answers = await asyncio.gather(
                    *(_one(client, address, model, flags, texts, i) for i in range(clients))
                )
                seconds = time.perf_counter() - began
                flat = [each for several in answers for each in several]
                rows.append(_row(name, clients, [a for _, a in flat], seconds))
                if name == OURS:
                    said += [(text, answer.text) for text, answer in flat]
        follow = {
            name: await _follow_up(client, address, model, flags, texts)
            for name, (address, model) in servers.items()
        }
    return {"rows": rows, "follow_up": follow, "said": said}


async def _one(client, address, model, flags, texts, number) -> list[tuple[str, Answered]]:
    """The answers to one client's requests, made one after the other."""
    found = []
    for turn in range(flags.requests):
        text = texts[(number * 7 + turn) % len(texts)]
        answer = await _ask(client, address, model, [_user(text)], flags.max_tokens)
        found.append((text, answer))
    return found


def _row(name: str, clients: int, answers: list[Answered], seconds: float) -> dict:
    return {
        "server": name,
        "clients": clients,
        "requests": len(answers),
        "tokens": sum(a.tokens for a in answers),
        "seconds": round(seconds, 3),
        "first_word": round(statistics.median(a.first for a in answers), 4),
        "last_word": round(statistics.median(a.last for a in answers), 4),
    }


async def _follow_up(client, address, model, flags, texts) -> dict:
    """A question after a long history, and then another one: answers cold and warm."""
    filler = " ".join(texts)
    while len(filler) < 4 * flags.history:
        filler += " " + filler
    history = [_user(filler[: 4 * flags.history] + "\nWhat is this about?")]
    cold = await _ask(client, address, model, history, 16)
    history += [{"role": "assistant", "content": cold.text}, _user("And in one word?")]
    warm = await _ask(client, address, model, history, 16)
    return {"cold": asdict(cold), "warm": asdict(warm)}


async def _alone(address: str, flags: argparse.Namespace, texts: list[str]) -> dict[str, str]:
    async with httpx.AsyncClient(timeout=None) as client:
        return {
            text: (await _ask(client, address, None, [_user(text)], flags.max_tokens)).text
            for text in texts
        }


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def _ask(client, address, model, messages, tokens) -> Answered:
    """One streamed chat completion at temperature 0."""
    body = {
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if model:
        body["model"] = model
    began, first, count, text = time.perf_counter(), None, 0, ""
    async with client.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk.get("choices", ()):
                said = choice.get("delta", {}).get("content") or ""
                first = first or (said and time.perf_counter() - began) or None
                text += said
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    return Answered(first or 0.0, time.perf_counter() - began, count, text)


if __name__ == "__main__":
    sys.exit(main())
