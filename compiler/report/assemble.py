"""A page in one file that needs neither network nor server: data, style and script, which every kind of page shares.

A content security policy lets nothing run but the page's own script, by its hash; the data is inert JSON, and names
enter the document as text only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from importlib.resources.abc import Traversable

__all__ = ["assembled", "harmless"]


def assembled(
    template: str, styles: Sequence[Traversable], scripts: Sequence[Traversable], *, title: str, summary: str, data: str
) -> str:
    """``template`` with its places filled; ``scripts`` become one, in the order of their names.

    ``title`` and ``summary`` are plain text, ``data`` is JSON that went through ``harmless``.
    """
    ordered = sorted(scripts, key=lambda file: file.name)
    script = "\n".join(['"use strict";', "(() => {", *(f.read_text(encoding="utf-8") for f in ordered), "})();"])
    style = "\n".join(file.read_text(encoding="utf-8") for file in styles)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "summary": html.escape(summary),
        "data": data,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def harmless(text: bytes) -> bytes:
    """JSON without any character that could end the script element, or a line of old JavaScript, around it."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
