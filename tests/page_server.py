"""A server for tests of the page: scripted answers in the real server's format, no model.

The first word of what is asked, or of its last line, chooses the answer: one of `SCRIPTS`, or what
`PageServer` does with it. Rounds guess two tokens of the
text and keep them, every other round, so that all counts are known.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = Path(__file__).parents[1] / "redrafter_mlx" / "server" / "page"
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'"
)
KEY = "open-sesame"

MARKDOWN = """## Why the sky is blue

Sunlight holds **every colour**, and air scatters the short waves *far more* than the long ones:
the effect is called [Rayleigh scattering](https://en.wikipedia.org/wiki/Rayleigh_scattering).

1. Light comes in.
2. Air scatters what is blue:
   - a lot at noon,
   - less at dusk.
3. You see `blue` from everywhere.

| Colour | Wavelength | Scattered |
|:-------|-----------:|:---------:|
| Blue   |     450 nm |   strongly |
| Red    |     700 nm |   weakly   |

```python
def scattering(wavelength):
    return wavelength ** -4  # Rayleigh
```

> The sky is the daily bread of the eyes.

At sunset the way through the air is long, and most of the blue is lost on it."""

HOSTILE = """<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script>

[click](javascript:window.hacked=3) [data](data:text/html,<script>window.hacked=4</script>)
[quote](https://example.org/"onmouseover="window.hacked=5) <svg onload=window.hacked=6>

[good](https://example.org/good) and https://example.org/bare.

| a | b |
|---|---|
| <img src=x onerror=window.hacked=7> | [x](vbscript:window.hacked=8) |

```<img src=x onerror=window.hacked=9>
<b>not bold</b>
```

![picture](javascript:window.hacked=10)"""

THOUGHT = "<think>\nLet me see.\n</think>\n\nIt is **four**."

SCRIPTS = {
    "plain": "one two three four five six seven eight nine ten eleven twelve",
    "markdown": MARKDOWN,
    "hostile": HOSTILE,
    "long": "\n\n".join(f"Paragraph {n}: " + "many words in a row. " * 8 for n in range(25)),
    "forever": "\n\n".join(f"Paragraph {n} has few words." for n in range(20)) + "\n\n",
    "code": "```python\n" + "".join(f"value_{n} = {n} * {n}\n" for n in range(500)) + "```\n",
    "wide": f"| {'wide' * 60} | b |\n|---|---|\n| a | {'c' * 300} |\n\n`{'x' * 300}` {'y' * 300}",
    "think": THOUGHT,
    "apart": THOUGHT,  # a chunk for each piece, without marks, and one for the tree
}

AT_ONCE = ("long", "code")
"""Scripts that come as fast as they can."""


def tokens_of(text: str) -> list[str]:
    """Words with the blanks before them, and marks of channels whole."""
    return re.findall(r"</?think>|\s*[^\s<]+|\s+|<", text)


def rounds_of(text: str) -> list[list[tuple[str, bool]]]:
    """Rounds of (token, drafted): alternately two that were kept and an own one, and an own one."""
    tokens = tokens_of(text)
    rounds, at = [], 0
    while at < len(tokens):
        kept = 2 if len(rounds) % 2 == 0 else 0
        some = tokens[at : at + kept + 1]
        rounds.append([(token, place < kept) for place, token in enumerate(some)])
        at += len(some)
    return rounds


def tree_of(root: str, pieces: list[tuple[str, bool]]) -> dict:
    """The kept tokens on a path, and a wrong guess beside each of them."""
    tokens, parents, accepted, parent = [root], [-1], [0], 0
    for token, drafted in pieces:
        tokens += [token] if drafted else []
        parents += [parent] if drafted else []
        if drafted:
            accepted.append(len(tokens) - 1)
        wrong = [" perhaps", " not"] if drafted else [" no"]
        tokens += wrong
        parents += [parent, len(tokens) - len(wrong)] if drafted else [parent]
        parent = accepted[-1]
    return {"tokens": tokens, "parents": parents, "accepted": accepted}


class PageServer:
    """Serves the page and the scripts at http://127.0.0.1:`port` until `close`.

    models    names that it lists, that of the loaded one first
    requests  bodies of /v1/chat/completions, as they came
    left      how many streams their client has left before the end
    key       that requests must bear
    busy      whether requests are answered with 429
    reading   whether "prompt" goes on reading the prompt
    pause     seconds between two rounds
    """

    def __init__(self, pause: float = 0.01):
        self.pause = pause
        self.requests: list[dict] = []
        self.models = ["tiny-model"]
        self.left = 0
        self.key: str | None = None
        self.busy = self.reading = False
        app = Starlette(
            routes=[
                Route("/", lambda request: self._file("index.html")),
                Route("/page/{name}", lambda request: self._file(request.path_params["name"])),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def start(self) -> PageServer:
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
            if not self._thread.is_alive():
                raise RuntimeError("the page's test server did not start")
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        return self

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _file(self, name: str) -> Response:
        path = PAGE / name
        if "/" in name or not path.is_file():
            return Response(status_code=404)
        types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
        media = types.get(path.suffix, "text/html")
        return FileResponse(path, media_type=media, headers={"Content-Security-Policy": POLICY})

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "an API key is needed"}}, 401)
        return None

    async def _models(self, request: Request) -> Response:
        refusal = self._refusal(request)
        data = [{"id": name} for name in self.models]
        return refusal or JSONResponse({"object": "list", "data": data})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        if self.busy:
            error = {"error": {"message": "8 requests are waiting already"}}
            return JSONResponse(error, 429, headers={"Retry-After": "0.3"})
        word = body["messages"][-1]["content"].splitlines()[-1].split()[0].lower()
        if word == "refuse":
            return JSONResponse({"error": {"message": "the prompt has 9000 tokens: too long"}}, 400)
        return StreamingResponse(self._counted(word), media_type="text/event-stream")

    async def _counted(self, word: str) -> AsyncIterator[str]:
        try:
            async for chunk in self._stream(word):
                yield chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    async def _stream(self, word: str) -> AsyncIterator[dict | str]:
        yield ": the connection is alive\n\n"
        if word == "prompt":
            for done in (512, 1024, 1536):
                yield chunk_of({}, details([], None, stats_of(0, 0) | {"prompt_done": done}))
            while self.reading:
                await asyncio.sleep(0.01)
        rounds = rounds_of(SCRIPTS.get(word, SCRIPTS["plain"]))
        endless = itertools.cycle([*rounds, [(" ", False)]])
        written, root, thinking = 0, "?", False
        for n, pieces in enumerate(endless if word in ("endless", "forever") else rounds, start=1):
            await asyncio.sleep(0 if word in AT_ONCE else self.pause)
            written += len(pieces)
            stats, tree = stats_of(n, written), tree_of(root, pieces)
            delta = {"content": ""}
            for token, drafted in pieces:
                if token.strip() in ("<think>", "</think>"):
                    thinking = token.strip() == "<think>"
                    continue
                name = "reasoning_content" if thinking else "content"
                delta[name] = delta.get(name, "") + token
                if word == "apart":
                    yield chunk_of({name: token}, details([(token, drafted)], None, stats))
            if word == "apart":
                yield chunk_of({}, details([], tree, stats))
            else:
                yield chunk_of(delta, details(pieces, tree, stats))
            root = pieces[-1][0]
            if n == 3 and word == "fail":
                yield {"error": {"message": "the engine failed: out of memory"}}
                return
            if n == 3 and word == "drop":
                return
        yield chunk_of({}, None, "stop")
        usage = {"completion_tokens": written, "redrafter": {"rules": ["match"]}}
        yield {"choices": [], "usage": usage}
        yield "data: [DONE]\n\n"


def stats_of(rounds: int, tokens: int) -> dict:
    return {
        "generation_tps": 41.6,
        "plain_tps": 23.1,
        "tokens_per_round": round(tokens / max(rounds, 1), 2),
        "rounds": rounds,
        "generation_tokens": tokens,
        "prompt_done": 2048,
        "prompt_tokens": 2048,
        "cached_tokens": 256,
    }


def details(pieces: list[tuple[str, bool]], tree: dict | None, stats: dict) -> dict:
    said = [{"text": text, "drafted": drafted} for text, drafted in pieces]
    return {"pieces": said, "tree": tree, "stats": stats}


def chunk_of(delta: dict, redrafter: dict | None, reason: str | None = None) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}
    return chunk | ({"redrafter": redrafter} if redrafter else {})
