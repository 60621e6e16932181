"""The server's OpenAPI description, made from the schemas that check its requests."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_OBJECT = {"type": "object"}
_STREAMS = "; a stream of server-sent events if `stream` is true"
_PLAIN = {
    "/health": ("Whether the server takes requests", "application/json"),
    "/metrics": ("Counts for Prometheus", "text/plain"),
    "/v1/models": ("The models that requests may name", "application/json"),
    "/v1/models/{id}": ("One of these models", "application/json"),
    "/openapi.json": ("This description", "application/json"),
}
_FAULTS = {
    "400": "The request cannot be honoured; the message says why",
    "401": "The key is missing or wrong",
    "403": "This web page or host name is not allowed",
    "404": "No such model",
    "408": "The request was sent, or its answer read, too slowly",
    "413": "The request is too large",
    "429": "Too many requests are waiting; Retry-After says when to try again",
    "503": "The server is stopping",
    "504": "The answer took too long",
}


def document(posts: Mapping[str, tuple[type[BaseModel], str]]) -> dict[str, Any]:
    """The OpenAPI description.

    posts  route -> schema of its body, summary
    """
    schemas = [(schema, "validation") for schema, _ in posts.values()]
    refs, defined = models_json_schema(schemas, ref_template="#/components/schemas/{model}")
    paths = {route: {"get": _get(route, *described)} for route, described in _PLAIN.items()}
    for route, (schema, summary) in posts.items():
        paths[route] = {"post": _post(route, refs[schema, "validation"], summary)}
    key = {"type": "http", "scheme": "bearer"}
    other = {"type": "apiKey", "in": "header", "name": "x-api-key"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "redrafter-mlx", "version": version("redrafter-mlx")},
        "paths": paths,
        "components": {
            "schemas": defined.get("$defs", {}),
            "securitySchemes": {"key": key, "x-api-key": other},
        },
        "security": [{}, {"key": []}, {"x-api-key": []}],
    }


def _get(route: str, summary: str, media: str) -> dict[str, Any]:
    operation = {"summary": summary, "operationId": _name("get", route)}
    if "{id}" in route:
        schema = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
    schema = {"type": "string"} if media == "text/plain" else _OBJECT
    return operation | {"responses": _responses("Done", {media: {"schema": schema}})}


def _post(route: str, schema: dict[str, Any], summary: str) -> dict[str, Any]:
    media: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if not route.endswith("count_tokens"):
        summary += _STREAMS
        media["text/event-stream"] = {}
    return {
        "summary": summary,
        "operationId": _name("post", route),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": _responses("The answer", media),
    }


def _responses(described: str, media: dict[str, Any]) -> dict[str, Any]:
    fault = {"application/json": {"schema": _OBJECT}}
    return {"200": {"description": described, "content": media}} | {
        status: {"description": why, "content": fault} for status, why in _FAULTS.items()
    }


def _name(method: str, route: str) -> str:
    return "_".join([method, *route.strip("/").replace("{id}", "one").replace(".", "_").split("/")])
