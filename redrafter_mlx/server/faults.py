"""What can go wrong with a request, in the shape in which each API reports it."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from pydantic import ValidationError

from redrafter_mlx.engine import QueueFull, Stopping
from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import one_line

_log = logging.getLogger("redrafter_mlx")

CANNOT = {
    "audio": "this server answers with text only",
    "background": "requests are answered while the client waits",
    "best_of": "answers are not ranked; use n",
    "conversation": "the server keeps no conversations; send all messages",
    "echo": "the prompt is not repeated",
    "effort": "this model's chat template knows no such effort",
    "format": "answers cannot be held to a format: decoding is not constrained",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "include": "only message.output_text.logprobs can be included",
    "previous_response_id": "the server keeps no answers; send all messages",
    "prompt_cache_retention": "the caches of prompts are kept in memory",
    "response_format": "answers cannot be held to a format: decoding is not constrained",
    "service_tier": "there is only one tier",
    "store": "the server keeps no answers",
    "strict": "calls cannot be held to a schema: decoding is not constrained",
    "suffix": "text can only be added at the end",
    "summary": "reasoning is given as it is, not summarised",
    "thinking": "the length of reasoning cannot be bounded; use adaptive or disabled",
    "tool_choice": "the model cannot be made to call a tool; use auto or none",
    "truncation": "prompts are never shortened",
    "verbosity": "say in a message how long the answer should be",
}
"""Why fields, or some of their values, cannot be honoured."""

NOT_TEXT = {
    "document", "file", "image", "image_url", "input_audio", "input_file", "input_image",
    "video", "video_url",
}  # fmt: skip

REFUSALS = ("extra_forbidden", "less_than_equal", "literal_error", "missing", "too_long")
MOST_FAULTS = 1000


class ApiError(Exception):
    """The reason why a request is not answered.

    code         for programs; None if the status says it all
    param        name of the field that is to blame
    retry_after  seconds until the request may be sent again; None if it will not succeed as it is
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.retry_after = param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers that tell clients whether and when to try again."""
        if self.retry_after is not None:
            return {"Retry-After": str(math.ceil(self.retry_after))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def as_api_error(error: BaseException) -> ApiError:
    """Any error, in a form for the client; an unexpected one is logged as well."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, Stopping):
        return stopping()
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    is_debug = _log.isEnabledFor(logging.DEBUG)
    _log.error("a request failed: %s; --debug shows where", one_line(error), exc_info=is_debug)
    return ApiError(500, f"the server failed: {one_line(error)}", "server_error")


def stopping() -> ApiError:
    """The error for requests while the server is shutting down."""
    message = "the server is stopping and takes no more requests"
    return ApiError(503, message, "server_stopping", retry_after=5)


_OPENAI = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def openai_shape(error: ApiError) -> dict[str, Any]:
    """An error as OpenAI's API reports it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic_shape(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's API reports it."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC.get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def of_validation(error: ValidationError, body: bytes) -> ApiError:
    """What is wrong with a request's body, by the most specific of pydantic's complaints."""
    if error.error_count() > MOST_FAULTS:
        return ApiError(400, f"the body has {error.error_count()} mistakes", "invalid_value")
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        message = f"the body is not JSON: {found[0]['msg'].lower()}"
        return ApiError(400, message, "invalid_json")
    given = _parsed(body)
    paths = [_path(one["loc"], one["type"], given) for one in found]
    # Each member of a union complains; the one that got furthest is the one that was meant.
    deepest = max(range(len(found)), key=lambda place: len(paths[place]))
    first, path = found[deepest], paths[deepest]
    kind, given = first["type"], first.get("input")
    name = next((part for part in reversed(path) if isinstance(part, str)), "")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    shown = param or "the body"
    unread = given.get("type") if isinstance(given, dict) else given
    if isinstance(unread, str) and unread in NOT_TEXT:
        return ApiError(400, f"{shown}: {unread} cannot be read: this server reads text only",
                        "unsupported_content", param)  # fmt: skip
    reason = next((CANNOT[part] for part in reversed(path) if part in CANNOT), None)
    if reason is not None and kind in REFUSALS:
        return ApiError(400, f"{shown} cannot be honoured: {reason}", "unsupported_value", param)
    if kind == "extra_forbidden":
        message = f"{shown} is not known here: leave {name} out"
        return ApiError(400, message, "unknown_parameter", param)
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{shown}: {message}", "invalid_value", param or None)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _path(location: tuple, kind: str, here: Any) -> list[str | int]:
    """Where in the body an error is, without the names that pydantic gives to members of unions."""
    path = []
    for place, step in enumerate(location):
        is_last = place == len(location) - 1
        if _holds(here, step):
            here = here[step]
        elif not (is_last and kind == "missing"):
            continue
        path.append(step)
    return path


def _holds(here: Any, step: str | int) -> bool:
    if isinstance(here, list):
        return isinstance(step, int) and step < len(here)
    return isinstance(here, dict) and step in here
