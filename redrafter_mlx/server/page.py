"""The page at /, served from the package's own files; it loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

DIRECTORY = Path(__file__).parent / "page"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page:
    """Serves the files that exist when it is made, and no others."""

    def __init__(self):
        self._files = {path.name: path for path in DIRECTORY.iterdir() if path.suffix in TYPES}

    async def file(self, request: Request) -> Response:
        """GET / and GET /page/NAME."""
        path = self._files.get(request.path_params.get("name", "index.html"))
        if path is None:
            raise HTTPException(404)
        media = f"{TYPES[path.suffix]}; charset=utf-8"
        return Response(path.read_bytes(), media_type=media, headers=HEADERS)
