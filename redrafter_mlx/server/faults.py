"""What goes wrong with a request, in the shapes in which the two APIs tell it."""

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
    "background": "every request is answered at once",
    "best_of": "answers are not ranked; use n",
    "conversation": "the server keeps no conversations; send all messages",
    "echo": "the prompt is not repeated",
    "effort": "this model's chat template knows no such effort",
    "format": "answers cannot be held to a format: decoding is not constrained",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "include": "only message.output_text.logprobs can be included",
    "previous_response_id": "the server keeps no answers; send all messages",
    "prompt_cache_retention": "what was read of prompts is kept in memory",
    "response_format": "answers cannot be held to a format: decoding is not constrained",
    "service_tier": "there is one tier",
    "store": "the server keeps no answers",
    "strict": "calls cannot be held to a schema: decoding is not constrained",
    "suffix": "text is only written at the end",
    "summary": "reasoning is given as it is, not summarised",
    "thinking": "the length of reasoning cannot be bounded; adaptive and disabled are known",
    "tool_choice": "the model cannot be made to call a tool; auto and none can be honoured",
    "truncation": "nothing is left out of a prompt",
    "verbosity": "say in a message how long the answer should be",
}
"""Why fields, or values of them, cannot be honoured."""

NOT_TEXT = {
    "document", "file", "image", "image_url", "input_audio", "input_file", "input_image",
    "video", "video_url",
}  # fmt: skip


REFUSALS = ("extra_forbidden", "less_than_equal", "literal_error", "missing", "too_long")
MOST_FAULTS = 1000


class ApiError(Exception):
    """A request that is not answered.

    code         for programs; None: the status says it all
    param        name of the field that is to blame
    retry_after  seconds until it may be sent again; None: never as it is
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
        """That tell clients whether and when to try again."""
        if self.retry_after is not None:
            return {"Retry-After": str(math.ceil(self.retry_after))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def told(error: BaseException) -> ApiError:
    """Any error of an answer as one for its client; what nobody foresaw goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, Stopping):
        return stopping()
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    _log.error("a request failed: %s; --debug shows where", one_line(error), exc_info=_is_debug())
    return ApiError(500, f"the server failed: {one_line(error)}", "server_error")


def _is_debug() -> bool:
    return _log.isEnabledFor(logging.DEBUG)


def stopping() -> ApiError:
    """The server ends."""
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
    """An error as OpenAI's API tells it."""
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
    """An error as Anthropic's API tells it."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC.get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def of_validation(error: ValidationError, body: bytes) -> ApiError:
    """What is wrong with a request's body."""
    if error.error_count() > MOST_FAULTS:
        return ApiError(400, f"the body has {error.error_count()} mistakes", "invalid_value")
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        message = f"the body is not JSON: {found[0]['msg'].lower()}"
        return ApiError(400, message, "invalid_json")
    given = _parsed(body)
    paths = [_path(one["loc"], one["type"], given) for one in found]
    deepest = max(range(len(found)), key=lambda place: len(paths[place]))  # of a union's members
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
    """Where in the body an error is; pydantic's names of unions' members are left out of it."""
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
