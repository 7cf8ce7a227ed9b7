"""What became of each collective: exposed before and after, hidden by what, or why it was left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .plan import CollectiveStart, Plan, Recompute, Run

__all__ = ["CollectiveLine", "exposed_seconds", "lines_of"]


@dataclass(frozen=True)
class CollectiveLine:
    """One collective, ``op`` of the module as it was given; its parts after a split count together.

    ``before_s`` and ``after_s`` are the seconds in which only communication ran, as predicted for the plan before and
    the plan that was chosen; where several collectives are in flight they share such time equally. ``hidden_by`` names
    the operators that ran while it was in flight, the longest first. ``mode`` is how it is done. ``reason`` says why
    it was left as it was, and is empty where it was not.
    """

    op: str
    kind: str
    group: str
    nbytes: int
    exposed_before_s: float
    exposed_after_s: float
    hidden_by: tuple[str, ...] = ()
    mode: str = ""
    reason: str = ""


def exposed_seconds(plan: Plan) -> Mapping[str, float]:
    """Seconds of each collective of a timed ``plan`` in which no compute engine runs, by operator.

    What several collectives expose at one time counts for each in equal parts, so that the sum is the time in which
    nothing but communication runs.
    """
    exposed = dict.fromkeys((name for name, _, _ in _flying(plan)), 0.0)
    changes: list[tuple[float, int, str]] = []  # when something begins (1) or ends (-1); what, "" for compute
    for name, start, finish in [*_flying(plan), *(("", *span) for span in _computing(plan))]:
        changes += [(start, 1, name), (finish, -1, name)]
    changes.sort()
    running, inside, since = 0, dict[str, None](), 0.0
    for moment, change, name in changes:
        if not running:
            for other in inside:
                exposed[other] += (moment - since) / len(inside)
        since = moment
        if not name:
            running += change
        elif change > 0:
            inside[name] = None
        else:
            inside.pop(name, None)
    return exposed


def lines_of(before: Plan, after: Plan, origin: Mapping[str, str], reasons: Mapping[str, str]) -> list[CollectiveLine]:
    """A line for each collective of ``before``, in its order; both plans are timed.

    ``origin`` says of operators of ``after`` which of ``before`` they are parts of, where the name is another;
    ``reasons`` why some of ``before`` were left alone.
    """
    was, now = exposed_seconds(before), exposed_seconds(after)
    modes = {i.op: i.mode for i in after.instructions if isinstance(i, CollectiveStart)}
    parts: dict[str, list[str]] = {}
    for name in now:
        parts.setdefault(origin.get(name, name), []).append(name)
    lines = []
    for op in before.graph.ops:
        if op.collective is None:
            continue
        own = parts.get(op.name, [])
        line = CollectiveLine(op.name, op.collective.kind.value, op.collective.group, op.collective.nbytes, 0.0, 0.0)
        lines.append(
            replace(
                line,
                exposed_before_s=was.get(op.name, 0.0),
                exposed_after_s=sum(now[name] for name in own),
                hidden_by=tuple(_hiding(after, own)),
                mode=" + ".join(dict.fromkeys(modes[name] for name in own if modes.get(name))),
                reason=reasons.get(op.name, ""),
            )
        )
    return lines


def _flying(plan: Plan) -> list[tuple[str, float, float]]:
    collectives = {op.name for op in plan.graph.ops if op.collective is not None}
    return [
        (i.op, i.start_s or 0.0, i.finish_s or 0.0)
        for i in plan.instructions
        if isinstance(i, CollectiveStart | Run) and i.op in collectives
    ]


def _computing(plan: Plan) -> Iterator[tuple[float, float]]:
    collectives = {op.name for op in plan.graph.ops if op.collective is not None}
    for i in plan.instructions:
        if isinstance(i, Run | Recompute) and i.op not in collectives and (i.finish_s or 0.0) > (i.start_s or 0.0):
            yield i.start_s or 0.0, i.finish_s or 0.0


def _hiding(plan: Plan, collectives: Sequence[str]) -> Iterator[str]:
    """Operators that compute while one of ``collectives`` is in flight, the longest in common first."""
    flying = [(start, finish) for name, start, finish in _flying(plan) if name in collectives]
    common: dict[str, float] = {}
    others = {op.name for op in plan.graph.ops if op.collective is not None}
    for i in plan.instructions:
        if isinstance(i, Run | Recompute) and i.op not in others:
            own = (i.start_s or 0.0, i.finish_s or 0.0)
            seconds = sum(max(0.0, min(own[1], finish) - max(own[0], start)) for start, finish in flying)
            if seconds > 0:
                common[i.op] = common.get(i.op, 0.0) + seconds
    yield from sorted(common, key=lambda name: -common[name])
