"""`/openapi.json`, made from the endpoints and from the very types that validate their bodies."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from mn.formats.codecs import MEDIA_JSON, MEDIA_PROBLEM
from mn.formats.errors import OUTCOMES
from mn_gateway.endpoints import Endpoint
from mn_gateway.views import Problem

Document = dict[str, Any]
_PATH_PART = re.compile(r"\{(\w+)\}")
_REF = "#/components/schemas/{name}"


def document(endpoints: Iterable[Endpoint]) -> Document:
    """The OpenAPI 3.1 document of these endpoints."""
    endpoints = tuple(endpoints)
    schemas, components = _schemas(endpoints)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MirrorNeuron",
            "version": importlib.metadata.version("mirrorneuron"),
            "description": "Functions on your own machines. Every error is a problem document (RFC 9457); "
            "its `type` is `/problems/<slug>`.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "mnk_…"}},
        },
    }


def _schemas(endpoints: Iterable[Endpoint]) -> tuple[dict[Any, Any], dict[str, Any]]:
    kinds: list[Any] = [Problem]
    for endpoint in endpoints:
        kinds += [kind for kind in (endpoint.body, endpoint.query) if kind is not None]
        kinds += [kind for _, kind in endpoint.answers.values() if isinstance(kind, type)]
    unique = list(dict.fromkeys(kinds))
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    return dict(zip(unique, schemas, strict=True)), components


def _operation(endpoint: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method.lower()}{re.sub('[^a-z]+', '_', endpoint.path)}".rstrip("_"),
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
        "responses": _responses(endpoint, schemas),
    }
    if endpoint.scope:
        operation["security"] = [{"key": []}]
        operation["description"] = f"Needs the scope `{endpoint.scope}`."
    if parameters := _parameters(endpoint):
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content = {MEDIA_JSON: {"schema": schemas[endpoint.body]}}
        operation["requestBody"] = {"required": endpoint.body_required, "content": content}
    elif endpoint.body_media:
        content = {media: {"schema": _any_of(media)} for media in endpoint.body_media}
        operation["requestBody"] = {"required": endpoint.body_required, "content": content}
    return operation


def _any_of(media: str) -> dict[str, Any]:
    return {} if media == MEDIA_JSON else {"type": "string"} if media.startswith("text/") else {"format": "binary"}


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PATH_PART.findall(endpoint.path)
    ]
    schema, components = msgspec.json.schema_components([endpoint.query])
    properties = components[schema[0]["$ref"].rpartition("/")[2]].get("properties", {})
    for name, wanted in properties.items():
        described = {key: value for key, value in wanted.items() if key != "description"}
        if options := described.get("anyOf"):
            described = next(option for option in options if option.get("type") != "null")
        described.pop("default", None)
        parameters.append(
            {
                "name": name,
                "in": "query",
                "description": wanted.get("description", ""),
                "schema": {key: value for key, value in described.items() if key != "description"},
            }
        )
    for name, (meaning, kind) in endpoint.headers.items():
        parameters.append({"name": name, "in": "header", "description": meaning, "schema": kind})
    return parameters


def _responses(endpoint: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, (meaning, kind) in endpoint.answers.items():
        responses[str(status)] = {"description": meaning}
        if isinstance(kind, tuple):
            responses[str(status)]["content"] = {media: {"schema": _any_of(media)} for media in kind}
        elif kind is not None:
            responses[str(status)]["content"] = {MEDIA_JSON: {"schema": schemas[kind]}}
    for status in sorted(_problem_statuses(endpoint)):
        titles = sorted({outcome.title for outcome in OUTCOMES.values() if outcome.status == status})
        responses[str(status)] = {
            "description": "; ".join(titles) or "The method is not allowed here",
            "content": {MEDIA_PROBLEM: {"schema": schemas[Problem]}},
        }
    return responses


def _problem_statuses(endpoint: Endpoint) -> set[int]:
    statuses = {403, 405, 422, 500, *endpoint.errors}
    if endpoint.scope:
        statuses |= {401, 502, 503, 504}
    if endpoint.body is not None:
        statuses |= {400, 413}
    return statuses
