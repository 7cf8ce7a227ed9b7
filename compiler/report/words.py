"""What the command line says in words: one function a command, from the facts that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..plan import relative_gap

if TYPE_CHECKING:
    from .pictures import CurvePoint

__all__ = ["curve_text", "execution_text", "outline", "verification_text"]


def execution_text(facts: Mapping[str, Any]) -> str:
    """What ``opweave run`` moved, the outputs' shapes, and how they compare with onnxruntime's."""
    moved = ", ".join(f"{kind} {facts[kind + '_bytes']:,} bytes" for kind in ("loaded", "stored", "streamed"))
    lines = [f"executed: {moved}"]
    lines += [f"output {name}: shape {shape}" for name, shape in facts["outputs"].items()]
    for c in facts.get("comparison", ()):
        verdict = "equal to onnxruntime" if c["equal"] else f"DIFFERENT from onnxruntime {c['reason']}"
        lines.append(f"output {c['name']}: {verdict} (largest error {c['max_error']:.3g}, allowed {c['allowed']:.3g})")
    if "not_compared" in facts:
        lines.append(f"NOT compared: {facts['not_compared']}")
    return "\n".join(lines)


def verification_text(facts: Mapping[str, Any]) -> str:
    """What ``opweave verify`` found: faults, the verdict, and bytes recounted."""
    lines = [f"fault: {fault}" for fault in facts["faults"]]
    lines.append(f"{'verified' if facts['ok'] else 'REFUSED'} at level {facts['level']}")
    names = ("compulsory_bytes", "additional_bytes", "peak_bytes")
    return "\n".join([*lines, *(f"{name.replace('_', ' ')}: {facts[name]:,}" for name in names)])


def curve_text(curve: Sequence[CurvePoint]) -> str:
    """The table of ``opweave fit``: one line a capacity, all in bytes."""
    lines = [f"{'scratchpad bytes':>18} {'additional bytes':>18} {'bound':>14} {'gap':>7}"]
    for p in curve:
        gap = relative_gap(p.additional_bytes, p.bound_bytes)
        lines.append(f"{p.capacity_bytes:>18,} {p.additional_bytes:>18,} {p.bound_bytes:>14,} {gap:>7.1%}")
    return "\n".join(lines)


def outline(value: Any, indent: int = 0) -> str:
    """Nested dictionaries and lists as indented lines."""
    pad = "  " * indent
    if isinstance(value, dict):
        return "\n".join(
            f"{pad}{k}:\n{outline(v, indent + 1)}" if isinstance(v, dict | list) else f"{pad}{k}: {v}"
            for k, v in value.items()
        )
    if isinstance(value, list):
        return "\n".join(f"{pad}- " + outline(v, indent + 1).lstrip() for v in value)
    return f"{pad}{value}"
