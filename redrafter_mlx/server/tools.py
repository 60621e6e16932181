"""Tools: which ones a model is offered, and the calls in what it says."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from redrafter_mlx.server.faults import ApiError


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    arguments  JSON of an object
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: secrets.token_hex(5)[:9])  # as some templates demand

    @property
    def input(self) -> dict[str, Any]:
        """Its arguments as an object."""
        return json.loads(self.arguments)


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request, in the form that chat templates take.

    single  whether an answer ends with its first call
    """

    tools: Sequence[Mapping[str, Any]] = ()
    single: bool = False

    def calls(self, tokenizer: TokenizerWrapper, text: str) -> list[Call]:
        """The calls in the text between a model's tool-call marks; none if it is not a call.

        A call that is incomplete or names an unknown tool does not count: the client could do
        nothing with it, and gets it as text.
        """
        names = {tool["function"]["name"] for tool in self.tools}
        try:
            found = tokenizer.tool_parser(text, list(self.tools))
            found = found if isinstance(found, list) else [found]
            calls = [_call(one) for one in found]
        except Exception:  # mlx-lm's parsers raise anything on text they do not expect
            return []
        return calls if all(call.name in names for call in calls) else []


def _call(parsed: Mapping[str, Any]) -> Call:
    arguments = parsed.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # raises for half a surrogate pair, which cannot be sent
    return Call(str(parsed["name"]), text)


def toolbox(
    tokenizer: TokenizerWrapper,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | None,
    parallel: bool | None,
) -> Toolbox:
    """The tools that the model is offered.

    tools     each with "name", "description" and "parameters"
    choice    "none": it is offered no tool
    parallel  False: at most one call in an answer

    Raises ApiError if the model's calls could not be told apart from text.
    """
    if not tools or choice == "none":
        return Toolbox()
    if not tokenizer.has_tool_calling:
        raise ApiError(
            400,
            "tools: this model's calls cannot be read: mlx-lm knows no tool parser for its chat "
            "template; leave tools out or serve another model",
            "unsupported_value",
            "tools",
        )
    functions = [{key: value for key, value in tool.items() if value is not None} for tool in tools]
    templated = [{"type": "function", "function": function} for function in functions]
    return Toolbox(templated, single=parallel is False)


def called(id: str, name: str, arguments: Any, param: str) -> dict[str, Any]:
    """An earlier call as chat templates take it.

    arguments  an object, or its JSON
    param      the field that holds them, for errors

    Raises ApiError if they are not a JSON object.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{param} is not JSON: {error}", "invalid_value", param) from error
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{param} is not a JSON object", "invalid_value", param)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def new_id(kind: str) -> str:
    """A new unique id, such as msg_0f3a... for the kind `msg`."""
    return f"{kind}_{secrets.token_hex(12)}"
