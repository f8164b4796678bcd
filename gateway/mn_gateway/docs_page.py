"""`/docs`: the OpenAPI document as one readable page, with nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from html import escape
from typing import Any

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{margin-bottom:0}h2{margin-top:2.5rem;text-transform:capitalize;border-bottom:1px solid #d8dee6}
details{border:1px solid #d8dee6;border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer}code,pre{font:14px/1.4 ui-monospace,monospace}
pre{overflow-x:auto;background:#f3f5f8;padding:.6rem;border-radius:6px}
.m{display:inline-block;min-width:4.5rem;font-weight:700}.s{color:#5a6675}
table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0;vertical-align:top}
@media(prefers-color-scheme:dark){body{background:#14181f;color:#dde3ec}pre{background:#1f2530}
details,h2{border-color:#353d4a}.s{color:#98a4b5}a{color:#8ab4f8}}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_EXAMPLE = """curl -s $MN_URL/v1/functions/square/invoke -H "Authorization: Bearer $MN_KEY" -d '{"x": 12}'"""


def render_page(document: dict[str, Any]) -> bytes:
    """The page as HTML."""
    return _render(json.dumps(document))


@lru_cache(maxsize=4)
def _render(text: str) -> bytes:
    document = json.loads(text)
    tags: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tags.setdefault(operation["tags"][0], []).append(_operation(method.upper(), path, operation))
    sections = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in tags.items())
    types = "".join(
        f"<details id='{escape(name)}'><summary><code>{escape(name)}</code></summary>"
        f"<pre>{escape(json.dumps(schema, indent=1, ensure_ascii=False))}</pre></details>"
        for name, schema in document["components"]["schemas"].items()
    )
    info = document["info"]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])}</h1><p class='s'>Version {escape(info['version'])} · "
        f"<a href='/openapi.json'>openapi.json</a></p><p>{escape(info['description'])}</p>"
        f"<p>A key goes into the <code>Authorization</code> header:</p><pre>{escape(_EXAMPLE)}</pre>"
        f"{sections}<h2>Types</h2>{types}</body></html>"
    )
    return page.encode()


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"<p>{escape(operation.get('description', 'Needs no key.'))}</p>"]
    if parameters := operation.get("parameters"):
        rows = "".join(
            f"<tr><td><code>{escape(p['name'])}</code></td><td class='s'>{escape(p['in'])}</td>"
            f"<td>{escape(p.get('description', ''))}</td></tr>"
            for p in parameters
        )
        parts.append(f"<table>{rows}</table>")
    if body := operation.get("requestBody"):
        parts.append(f"<p>Body: {_content(body)}</p>")
    rows = "".join(
        f"<tr><td><code>{escape(status)}</code></td><td>{escape(answer['description'])}</td><td>{_content(answer)}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    parts.append(f"<table>{rows}</table>")
    return (
        f"<details><summary><span class='m'>{escape(method)}</span><code>{escape(path)}</code> "
        f"<span class='s'>{escape(operation['summary'])}</span></summary>{''.join(parts)}</details>"
    )


def _content(part: dict[str, Any]) -> str:
    shown = []
    for media, value in part.get("content", {}).items():
        name = value.get("schema", {}).get("$ref", "").rpartition("/")[2]
        link = f" <a href='#{escape(name)}'>{escape(name)}</a>" if name else ""
        shown.append(f"<code>{escape(media)}</code>{link}")
    return ", ".join(shown)
