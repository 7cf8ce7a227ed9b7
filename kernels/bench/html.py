"""One self-contained page of what was measured: figures, pictures, style and script, without network or server.

A content security policy lets nothing run but the page's own script, by its hash; whatever was measured enters the
document as text only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from .figures import COLUMNS, Comparison, Line
from .providers import OURS
from .rows import Row
from .session import CALIBRATION

__all__ = ["page"]

_NUMBERS = frozenset(COLUMNS[5:-1])


def page(
    head: Mapping[str, Any],
    rows: Sequence[Row],
    lines: Sequence[Line],
    pictures: Mapping[str, bytes],
    comparisons: Sequence[Comparison] = (),
    left_out: Mapping[str, str] | None = None,
) -> str:
    """The whole document; ``left_out`` says by case what there was no time for."""
    folder = resources.files(__package__).joinpath("page")
    style, script = (folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'"
    machine = {**head.get("machine", {}), **head.get("versions", {})}
    wanted = ("accelerator", "processor", "torch", "triton", "liger-kernel")
    facts = [f"commit {head.get('commit', 'unknown')}", *(f"{n} {machine[n]}" for n in wanted if n in machine)]
    parts = {
        "policy": policy,
        "title": f"Kernels on {escape(str(machine.get('accelerator', 'a GPU')))}",
        "style": style,
        "script": script,
        "facts": escape(" · ".join(map(str, facts))),
        "device": _device(rows),
        "comparison": _compared(comparisons),
        "figures": _figures(lines),
        "left_out": _left_out(left_out or {}),
        "pictures": "".join(_image(name, data) for name, data in pictures.items()),
    }
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _image(name: str, data: bytes) -> str:
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _table(head: Iterable[str], lines: Iterable[str], kind: str = "") -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _device(rows: Sequence[Row]) -> str:
    lines = [
        f'<tr><td>{escape(row.provider)}</td><td class="number">{_shown(row.value)}</td>'
        f'<td class="number">{_shown(row.bound)}</td><td>{escape(row.unit)}</td></tr>'
        for row in rows
        if row.case == CALIBRATION
    ]
    return _table(("", "measured", "data sheet", ""), lines)


def _figures(lines: Sequence[Line]) -> str:
    found = []
    for line in lines:
        cells = "".join(_cell(name, value) for name, value in zip(COLUMNS, line.cells, strict=True))
        found.append(f'<tr class="{"ours" if line.provider == OURS else ""}">{cells}</tr>')
    return _table([name.replace("_", " ") for name in COLUMNS], found, "sortable")


def _cell(name: str, value: object) -> str:
    if name in _NUMBERS:
        number = "" if value is None else repr(value)
        return f'<td class="number" data-value="{number}">{_shown(value)}</td>'
    return f'<td class="{"note" if name == "note" else ""}">{escape(str(value))}</td>'


def _shown(value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _compared(found: Sequence[Comparison]) -> str:
    if not found:
        return ""
    lines = []
    for item in found:
        ratio = "-" if item.ratio is None else f"{item.ratio:.3f}"
        cells = (item.case, item.provider, _shown(item.before_ms), _shown(item.now_ms), ratio, f"{item.threshold:.0%}")
        text = "".join(f"<td>{escape(cell)}</td>" for cell in (*cells, item.verdict))
        lines.append(f'<tr class="{item.verdict.lower()}">{text}</tr>')
    head = ("case", "provider", "before ms", "now ms", "ratio", "threshold", "")
    return f'<section><h2>Compared</h2><div class="wide">{_table(head, lines)}</div></section>'


def _left_out(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ""
    items = "".join(f"<li>{escape(case)}: {escape(what)}</li>" for case, what in left_out.items())
    return f"<details><summary>Left out for want of time: {len(left_out)} cases</summary><ul>{items}</ul></details>"
