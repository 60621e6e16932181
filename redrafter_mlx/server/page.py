"""The page at /, from files of the package; it loads nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

DIRECTORY = Path(__file__).parent / "page"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page:
    """Serves the files that are there when it is made, and no others."""

    def __init__(self, directory: Path | None = None):
        directory = directory or DIRECTORY
        found = directory.iterdir() if directory.is_dir() else ()
        self._files = {path.name: path for path in found if path.suffix in TYPES}

    async def index(self, request: Request) -> Response:
        """GET /."""
        return self._response("index.html")

    async def file(self, request: Request) -> Response:
        """GET /page/NAME."""
        return self._response(request.path_params["name"])

    def _response(self, name: str) -> Response:
        path = self._files.get(name)
        if path is None:
            raise HTTPException(404)
        kind = TYPES[path.suffix]
        is_text = kind.startswith("text/") or kind.endswith(("json", "xml"))
        media = f"{kind}; charset=utf-8" if is_text else kind
        return Response(path.read_bytes(), media_type=media, headers=HEADERS)
