"""A pipeline schedule in plain text: what it takes, how good that is proven to be, and what each rank does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..text import PROVERS
from ..units import format_bytes, format_count, format_percent, format_seconds, plural
from .facts import AttemptFacts, PipelineFacts, RankFacts, Shown, facts_of

__all__ = ["DIFFERENCES", "differences_text", "facts_text", "pipeline_text", "precise", "seconds_of", "worth"]

_WIDTH = 13  # of the column of topics
_MOST_ATTEMPTS = 8
_LONGEST = 24  # name of a column

#: What a comparison lists: name, field of ``PipelineFacts``, and the kind of figure.
DIFFERENCES = (
    ("makespan", "makespan_ns", "time"),
    ("span", "span_ns", "time"),
    ("bubble", "bubble", "share"),
    ("bubble of the span", "span_bubble", "share"),
    ("idle, all ranks", "idle_ns", "time"),
    ("waiting for transfers, all ranks", "wait_ns", "time"),
    ("highest peak", "peak_bytes", "bytes"),
    ("messages", "sent", "count"),
    ("bytes sent", "sent_bytes", "bytes"),
)


def pipeline_text(shown: Shown, other: Shown | None = None) -> str:
    """Figures of the schedule, overall and by rank, without a final line break; a table of differences to ``other``.

    Times are printed as nanoseconds in their largest fitting unit, which holds where the problem's unit is that.
    """
    return facts_text(facts_of(shown), None if other is None else facts_of(other))


def facts_text(facts: PipelineFacts, other: PipelineFacts | None = None) -> str:
    """The same of what has been counted already."""
    text = "\n".join(_printable(line) for line in (*_overall(facts), "", *_by_rank(facts.ranks)))
    return text if other is None else f"{text}\n\n{differences_text(facts, other)}"


def differences_text(facts: PipelineFacts, other: PipelineFacts) -> str:
    """A table of what differs, of each figure by how much of that of ``other``."""
    return "\n".join(_printable(line) for line in _differences(facts, other))


def seconds_of(time: int) -> str:
    """A time of the problem, counted in nanoseconds, as people read it."""
    return format_seconds(time * 1e-9)


def precise(time: int) -> str:
    """The same to five digits: what is compared differs by little."""
    for size, unit in ((10**9, "s"), (10**6, "ms"), (10**3, "us")):
        if time >= size:
            return f"{time / size:.{max(0, 5 - len(str(time // size)))}f} {unit}"
    return f"{time} ns"


def worth(facts: PipelineFacts) -> str:
    """How good the schedule is proven to be; empty where nothing was solved."""
    if facts.gap is None or facts.bound is None or facts.proved_by is None:
        return ""
    prover = PROVERS.get(facts.proved_by, facts.proved_by)
    quality = "optimal" if facts.gap == 0 else f"at most {format_percent(facts.gap)} could be saved"
    return f"{quality}: {facts.objective} at least {precise(facts.bound)} by {prover}"


def _overall(facts: PipelineFacts) -> Iterator[str]:
    counts = (plural(len(facts.ranks), "rank"), plural(facts.stages, "stage"), plural(facts.microbatches, "microbatch"))
    counted = ", ".join(counts).replace("microbatchs", "microbatches")
    yield _topic("schedule", f"{facts.title}: {counted}")
    yield _topic("makespan", f"{precise(facts.makespan_ns)}, bubble {_bubble(facts.bubble)}")
    yield _topic("span", f"{precise(facts.span_ns)}, bubble {_bubble(facts.span_bubble)}")
    if facts.gap is not None:
        yield _topic("proof", worth(facts))
    peak = max(facts.ranks, key=lambda rank: rank.peak_bytes)
    yield _topic("peak", f"{format_bytes(peak.peak_bytes)} on rank {peak.rank}")
    over = [rank for rank in facts.ranks if not rank.within]
    if over:
        yield _topic("", f"OVER THE LIMIT on {plural(len(over), 'rank')}: {', '.join(str(r.rank) for r in over)}")
    yield _topic("messages", f"{format_count(facts.sent)}, {format_bytes(facts.sent_bytes)}")
    records = _records(facts)
    for position, attempt in enumerate(records):
        taken = f"{attempt.method}: {precise(attempt.value or 0)}, in {format_seconds(attempt.seconds)}"
        yield _topic("tried" if position == 0 else "", taken)
    if len(facts.attempts) > len(records):
        yield _topic("" if records else "tried", f"and {plural(len(facts.attempts) - len(records), 'other')}")


def _records(facts: PipelineFacts) -> list[AttemptFacts]:
    """Attempts that were better than all before them; the last few."""
    records: list[AttemptFacts] = []
    for attempt in facts.attempts:
        if attempt.value is not None and (not records or attempt.value < (records[-1].value or 0)):
            records.append(attempt)
    return records[-_MOST_ATTEMPTS:]


def _bubble(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"  # papers give them to four decimals


def _topic(topic: str, line: str) -> str:
    return f"{topic:<{_WIDTH}}{line}"


def _by_rank(ranks: Sequence[RankFacts]) -> list[str]:
    """A table; columns of what no rank has are left out."""
    columns: list[tuple[str, list[str]]] = [
        ("rank", [str(r.rank) for r in ranks]),
        ("stages", [" ".join(map(str, r.stages)) for r in ranks]),
        ("work", [seconds_of(r.work_ns) for r in ranks]),
        ("idle", [seconds_of(r.idle_ns) for r in ranks]),
        ("of it waits", [seconds_of(r.wait_ns) for r in ranks]),
        ("span", [seconds_of(r.span_ns) for r in ranks]),
        ("copies", [seconds_of(r.copy_ns) for r in ranks] if any(r.copy_ns for r in ranks) else []),
        ("all-reduce", [seconds_of(r.reduce_ns) for r in ranks] if any(r.reduce_ns for r in ranks) else []),
        ("peak", [format_bytes(r.peak_bytes) for r in ranks]),
        ("of the limit", [_share(r) for r in ranks] if any(r.limit_bytes is not None for r in ranks) else []),
        ("sends", [format_count(r.sent) for r in ranks]),
        ("bytes sent", [format_bytes(r.sent_bytes) for r in ranks] if any(r.sent_bytes for r in ranks) else []),
    ]
    return _table([(name, cells) for name, cells in columns if cells])


def _share(rank: RankFacts) -> str:
    if rank.limit_bytes is None:
        return "none"
    return format_percent(rank.peak_bytes / rank.limit_bytes) if rank.limit_bytes else f"{rank.peak_bytes} of 0 B"


def _table(columns: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    widths = [max(len(name), *(len(cell) for cell in cells)) for name, cells in columns]
    rows = [[name for name, _ in columns], *map(list, zip(*(cells for _, cells in columns), strict=True))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _differences(facts: PipelineFacts, other: PipelineFacts) -> list[str]:
    rows = [(name, getattr(facts, field), getattr(other, field), kind) for name, field, kind in DIFFERENCES]
    return _table(
        [
            ("", [f"{name:<32}" for name, *_ in rows]),
            (_short(facts.method or "this"), [_figure(a, kind) for _, a, _, kind in rows]),
            (_short(other.method or "other"), [_figure(b, kind) for _, _, b, kind in rows]),
            ("difference", [_change(a, b, kind) for _, a, b, kind in rows]),
        ]
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."


def _figure(value: float, kind: str) -> str:
    if kind == "share":
        return _bubble(value)
    whole = int(value)
    return {"time": precise, "bytes": format_bytes, "count": format_count}[kind](whole)


def _change(value: float, base: float, kind: str) -> str:
    """``value`` against ``base``: points for shares, else per cent of the base."""
    if kind == "share":
        return f"{100 * (value - base):+.2f} points"
    return f"{100 * (value / base - 1):+.2f} %" if base else ("" if not value else "from none")


def _printable(line: str) -> str:
    """``line`` without control characters: names come from a file, and a terminal obeys what it is shown."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line).rstrip()
