"""What became of a module's collectives, in words: exposed before and after, hidden by what, or why not."""

from __future__ import annotations

from collections.abc import Iterator

from ..overlap import CollectiveLine, Overlapped
from .units import format_bytes, format_percent, format_seconds, plural

__all__ = ["overlap_text"]

_MOST_LINES = 12
_MOST_NAMES = 3


def overlap_text(done: Overlapped, most_lines: int = _MOST_LINES) -> Iterator[str]:
    """Lines of plain text; at most so many collectives, those that expose most before first."""
    before_s, after_s = done.seconds
    exposed = [sum(line.exposed_before_s for line in done.lines), sum(line.exposed_after_s for line in done.lines)]
    gain = 1 - after_s / before_s if before_s else 0.0
    if done.reason:
        yield f"unchanged: {done.reason}"
    else:
        parts = f"cut into parts of {' + '.join(map(str, done.sizes))}" if done.sizes else "put in another order"
        change = f"{format_percent(abs(gain))} {'less' if gain >= 0 else 'more'}"
        yield f"{parts}: {format_seconds(before_s)} before, {format_seconds(after_s)} after, {change} (predicted)"
    count = plural(len(done.lines), "collective")
    yield f"{count}: {format_seconds(exposed[0])} exposed before, {format_seconds(exposed[1])} after"
    for operator, reason in done.joined:
        yield f"joined at {operator}: {reason}"
    ordered = sorted(done.lines, key=lambda line: -line.exposed_before_s)
    for line in ordered[:most_lines]:
        yield f"  {_line(line)}"
    if len(ordered) > most_lines:
        yield f"  and {len(ordered) - most_lines} more"


def _line(line: CollectiveLine) -> str:
    what = f"{line.op}: {line.kind.replace('_', '-')} of {format_bytes(line.nbytes)} in group {line.group}"
    seconds = f"{format_seconds(line.exposed_before_s)} -> {format_seconds(line.exposed_after_s)} exposed"
    text = f"{what}, {seconds}" + (f", by {line.mode}" if line.mode else "")
    if line.reason:
        return f"{text}; left alone: {line.reason}"
    more = len(line.hidden_by) - _MOST_NAMES
    names = ", ".join(line.hidden_by[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"{text}; hidden by {names}" if names else f"{text}; hidden by nothing"
