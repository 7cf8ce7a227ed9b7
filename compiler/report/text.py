"""A plan in plain text: what it needs, what it moves, how good that is proven to be, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..plan import Plan
from ..verify import Verification
from .digest import CertificateFacts, Digest, MovedBuffer, digest
from .units import format_bytes, format_count, format_flops, format_percent, format_seconds, plural

__all__ = ["LEVELS", "OBJECTIVES", "PROVERS", "SCOPES", "UNSPILLED", "summary", "summary_dict"]

_MOST_BUFFERS = 8
_MOST_FAULTS = 10
_WIDTH = 13  # of the column of topics

#: What a certificate's fields, and the levels of a plan, mean in words.
SCOPES = {
    "order": "over every order, residency and placement of the graph",
    "residency": "over every residency of this order",
    "recompute": "over every residency of this order with the recomputations considered",
    "address": "over every placement of these residences",
}
UNSPILLED = "over every order, with nothing spilled"  # orders are compared by peak without what a residency does
PROVERS = {
    "ilp": "integer programming",
    "lp": "an LP relaxation",
    "cp": "constraint programming",
    "exhaustive": "exhaustive search",
    "analytic": "an analytic argument",
}
LEVELS = {
    "order": "order decided",
    "residency": "order and residency decided",
    "address": "order, residency and addresses decided",
    "timed": "order, residency, addresses and times decided",
}
OBJECTIVES = {
    "additional_traffic_bytes": "additional traffic",
    "peak_bytes": "peak",
    "arena_bytes": "arena",
    "latency_ns": "simulated latency in ns",
}


def summary(plan: Plan, verification: Verification | None = None) -> str:
    """The facts of ``plan`` as plain text, without a final line break; ``verification`` spares verifying it again."""
    facts = digest(plan, verification)
    sections = (
        _faults(facts),
        _head(facts),
        _traffic(facts),
        _proofs(facts),
        _time(facts),
        _passes(facts),
        _import(facts),
        _buffers(facts),
    )
    return "\n".join(_printable(line) for section in sections for line in section)


def summary_dict(plan: Plan, verification: Verification | None = None) -> dict[str, Any]:
    """The same facts as plain dictionaries, lists, numbers and strings, ready for JSON."""
    return digest(plan, verification).to_dict()


def _printable(line: str) -> str:
    """``line`` without control characters: names come from a model, and a terminal obeys what it is shown."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _topic(topic: str, lines: Iterable[str]) -> Iterator[str]:
    for position, line in enumerate(lines):
        yield f"{topic if position == 0 else '':<{_WIDTH}}{line}".rstrip()


def _faults(facts: Digest) -> Iterator[str]:
    if facts.faults:
        lines = [f"{f.fault}{'' if f.step is None else f' at step {f.step}'}: {f.message}" for f in facts.faults]
        more = [f"... and {plural(len(lines) - _MOST_FAULTS, 'more fault')}"] if len(lines) > _MOST_FAULTS else []
        yield f"THIS PLAN IS WRONG: {plural(len(facts.faults), 'fault')}"
        yield from (f"  {line}" for line in (*lines[:_MOST_FAULTS], *more))
        yield ""


#: Names of instructions, as plans have them, in words.
_INSTRUCTIONS = {
    "run": "run",
    "recompute": "recompute",
    "load": "load",
    "store": "store",
    "collectivestart": "collective",
    "collectivewait": "wait",
}


def _head(facts: Digest) -> Iterator[str]:
    model, machine = facts.model, facts.machine
    yield from _topic(
        "model",
        [
            f"{model.name}: {plural(model.operators, 'operator')}, "
            f"{plural(model.buffers, 'buffer')}, {format_flops(model.flops)}"
        ],
    )
    verdict = "verified" if facts.verified else "DOES NOT VERIFY"
    moves = ", ".join(
        plural(facts.instructions[kind], word) for kind, word in _INSTRUCTIONS.items() if kind in facts.instructions
    )
    yield from _topic("plan", [f"{LEVELS[facts.level]}, {verdict}; {moves or 'no instructions'}"])
    share = format_percent(facts.peak_bytes / machine.capacity_bytes)
    lines = [
        f"{machine.name}, {format_bytes(machine.capacity_bytes)} of {machine.scratchpad}",
        f"peak {format_bytes(facts.peak_bytes)} ({format_count(facts.peak_bytes)} B), {share} of the capacity",
    ]
    if facts.level == "order":
        lines[-1] = f"peak without spilling {format_bytes(facts.peak_bytes)}, {share} of the capacity"
    if facts.arena_bytes > facts.peak_bytes:
        lines.append(f"addresses reach {format_bytes(facts.arena_bytes)}")
    yield from _topic("machine", lines)


def _traffic(facts: Digest) -> Iterator[str]:
    traffic = facts.traffic
    if facts.level == "order":
        compulsory = f"{format_bytes(traffic.compulsory_bytes)} ({format_count(traffic.compulsory_bytes)} B) compulsory"
        yield from _topic("traffic", [f"{compulsory}; additional traffic is not decided"])
        return
    ways = {"loaded": traffic.loaded_bytes, "stored": traffic.stored_bytes, "streamed": traffic.streamed_bytes}
    rows = (
        ("compulsory", traffic.compulsory_bytes, ""),
        ("additional", traffic.additional_bytes, _share(traffic.additional_bytes, traffic.total_bytes)),
        ("total", traffic.total_bytes, ", ".join(f"{format_bytes(n)} {way}" for way, n in ways.items() if n)),
    )
    yield from _topic("traffic", [f"{n:<11}{format_bytes(v):>11}  {format_count(v):>17} B  {r}" for n, v, r in rows])


def _share(part: int, whole: int) -> str:
    return f"{format_percent(part / whole)} of the total" if whole else ""


def _proofs(facts: Digest) -> Iterator[str]:
    lines: list[str] = []
    for c in facts.certificates:
        lines += _proof(c)
    yield from _topic("proof", lines or ["none of the passes proved a bound"])


def _proof(c: CertificateFacts) -> Iterator[str]:
    unit = " B" if c.objective.endswith("_bytes") else ""
    yield f"{c.pass_name}: {OBJECTIVES[c.objective]} {format_count(c.value)}{unit}, bound {format_count(c.bound)}{unit}"
    quality = "optimal" if c.gap == 0 else f"gap {format_percent(c.gap)}"
    remark = "" if c.stands else "; of the plan before later passes"
    unspilled = c.scope == "order" and c.objective in ("peak_bytes", "arena_bytes")
    yield f"  {quality} {UNSPILLED if unspilled else SCOPES[c.scope]}, by {PROVERS[c.proved_by]}{remark}"


def _time(facts: Digest) -> Iterator[str]:
    time = facts.time
    if time is None:
        return
    reached = f"{format_percent(time.bound_s / time.latency_s)} of the roofline" if time.latency_s else "no work"
    terms = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in time.terms.items())
    yield from _topic(
        "time",
        [
            f"simulated latency {format_seconds(time.latency_s)}, {reached}",
            f"roofline bound {format_seconds(time.bound_s)}, set by {time.bound_by} ({terms})",
            *(
                f"{e.name:<11} busy {format_seconds(e.busy_s):>9} {format_percent(e.utilisation):>8}"
                for e in time.engines
            ),
        ],
    )


def _passes(facts: Digest) -> Iterator[str]:
    width = max((len(p.name) for p in facts.passes), default=0)
    yield from _topic(
        "passes",
        (f"{p.name:<{width}}  {format_seconds(p.seconds):>9}{'  ' + p.note if p.note else ''}" for p in facts.passes),
    )


def _import(facts: Digest) -> Iterator[str]:
    counted = {kind: sum(types.values()) for kind, types in facts.operators.items() if types}
    if not counted:
        return
    lines = [", ".join(f"{format_count(count)} {kind}" for kind, count in counted.items())]
    for kind, types in facts.operators.items():
        if kind != "native" and types:
            listed = sorted(types.items(), key=lambda item: (-item[1], item[0]))
            lines.append(f"{kind}: {', '.join(f'{name} {format_count(count)}' for name, count in listed)}")
    yield from _topic("imported", lines)


def _buffers(facts: Digest) -> Iterator[str]:
    most = [row for row in facts.moved if row.additional_bytes > 0]
    lines = [_buffer(row) for row in most[:_MOST_BUFFERS]]
    if len(most) > _MOST_BUFFERS:
        rest = sum(row.additional_bytes for row in most[_MOST_BUFFERS:])
        lines.append(f"{format_bytes(rest):>11}  {plural(len(most) - _MOST_BUFFERS, 'other')}")
    yield from _topic("additional", lines)


def _buffer(row: MovedBuffer) -> str:
    return f"{format_bytes(row.additional_bytes):>11}  {row.buffer} ({row.role}, {format_bytes(row.nbytes)})"
