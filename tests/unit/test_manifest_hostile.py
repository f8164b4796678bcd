"""Manifests that are made to harm whoever reads, keeps or shows them."""

from __future__ import annotations

import json

import pytest

from mn.formats.errors import InvalidRequest
from mn.formats.manifest import parse_manifest

HEAD = b'{"manifest_version": "1", "name": "f", "entry": "app:f", '


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 500_000,
        HEAD + b'"parameters": ' + b"[" * 500_000,
        HEAD + b'"doc": "\xff"}',
        HEAD + b'"timeout_s": 1e999}',
        HEAD + b'"retries": ' + b"9" * 5000 + b"}",
        HEAD + b'"parameters": [{"x": ' + b"[" * 300 + b"]" * 300 + b"}]}",
        HEAD + b'"parameters": [{"x": ' + b"9" * 30 + b"}]}",
        HEAD + b'"parameters": [' + b"{}," * 300 + b"{}]}",
        b"",
        b"\x00" * 100,
    ],
)
def test_it_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"manifest\.json"):
        parse_manifest(data)


def test_a_parameters_texts_are_fine() -> None:
    parameters = [{"name": "x", "kind": "POSITIONAL_OR_KEYWORD", "annotation": "int", "default": None}]
    data = {"manifest_version": "1", "name": "f", "entry": "app:f", "parameters": parameters}
    assert parse_manifest(json.dumps(data).encode()).functions[0].parameters == tuple(parameters)
