"""Which steps wait for which: the events that keep a plan's meaning when its steps run on several engines.

Steps of one engine run one after another, in the plan's order. Two steps *conflict* when both access the same bytes
and one writes them, or when the host may hand memory that the first has used to the second. Each such pair must be
ordered, by the engines or by waits. What runs on other engines starts behind whatever came before the program, and the
program is done when all engines are: a boundary operator, which receives or returns, neither waits nor is waited for.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ....errors import PlanError
from ....hw_models.model import EngineKind
from ...graph import OpKind
from .conflicts import Access, accesses, predecessors
from .layout import DevicePlan

__all__ = ["recorded", "reduced", "synchronisation"]

_Steps = tuple[tuple[int, ...], ...]


def synchronisation(device_plan: DevicePlan, made: frozenset[str] = frozenset()) -> _Steps:
    """For each step, the earlier steps on other engines that must be done before it; no wait follows from others.

    ``made`` are the buffers that calls make for themselves, from the pool of the engine that runs the call; all others
    that are allocated apart come from the first compute engine's, and those handed over from an unknown one. A pool
    hands out at once what the host lets go of, while steps that use it may still be queued: users of what was taken
    from a pool wait for the users of all that it had got back before.

    Raises:
        PlanError: something that a step touches has no address, or a step no engine beside others that have one.
    """
    plan = device_plan.plan
    engines = [instruction.engine for instruction in plan.instructions]
    if len(set(engines)) == 1:
        return ((),) * len(engines)
    if "" in engines:
        raise PlanError(f"step {engines.index('')} names no engine, others do", hint="assign all steps or none")
    touched = accesses(plan)
    before = [set(steps) for steps in predecessors(touched)]
    for step, others in _reuse(device_plan, made, touched).items():
        before[step] |= others
    return reduced(engines, before)


def recorded(waits: Sequence[Sequence[int]]) -> frozenset[int]:
    """Steps that some step waits for: behind each of them an event is recorded."""
    return frozenset(step for steps in waits for step in steps)


def reduced(engines: Sequence[str], before: Sequence[Iterable[int]]) -> _Steps:
    """The fewest waits that put each step behind ``before`` it, given that engines run their steps in order.

    A step's clock says up to which step each engine is done before it starts. Of the steps that are needed, later ones
    come first: they may imply earlier ones, and are never implied by them.
    """
    clocks: list[dict[str, int]] = []  # when the step is done
    last: dict[str, int] = {}
    result: list[tuple[int, ...]] = []
    for step, (engine, needed) in enumerate(zip(engines, before, strict=True)):
        clock = dict(clocks[last[engine]]) if engine in last else {}
        waits: list[int] = []
        for other in sorted(needed, reverse=True):
            if clock.get(engines[other], -1) < other:
                waits.append(other)
                clock = {name: max(clock.get(name, -1), clocks[other].get(name, -1)) for name in clock | clocks[other]}
        result.append(tuple(sorted(waits)))
        clocks.append({**clock, engine: step})
        last[engine] = step
    return tuple(result)


@dataclass(frozen=True)
class _Allocation:
    """Memory taken from ``pool`` at step ``begin`` and freed to it before step ``end``; no pool: from any."""

    begin: int
    end: int
    pool: str | None
    first: int
    last: int


def _reuse(
    device_plan: DevicePlan, made: frozenset[str], touched: Sequence[Sequence[Access]]
) -> Mapping[int, frozenset[int]]:
    """For the users of storages allocated apart, the last users on each engine of memory that they may be given."""
    plan = device_plan.plan
    allocations = sorted(_allocations(device_plan, made), key=lambda a: a.begin)
    if not any(a.end < len(touched) for a in allocations):
        return {}
    memory = plan.machine.scratchpad
    spans = sorted(
        (a.begin, a.end, step)
        for step, items in enumerate(touched)
        for a in items
        if a.space == memory and a.begin < a.end
    )
    users = {a: _users(spans, a) for a in allocations}
    freed = sorted((a for a in allocations if a.end < len(touched)), key=lambda a: a.end)
    last: dict[str | None, dict[str, int]] = {}  # of each pool: the last user on each engine
    result: dict[int, frozenset[int]] = {}
    position = 0
    for allocation in allocations:
        while position < len(freed) and freed[position].end <= allocation.begin:
            known = last.setdefault(freed[position].pool, {})
            for step in users[freed[position]]:
                engine = plan.instructions[step].engine
                known[engine] = max(step, known.get(engine, -1))
            position += 1
        others = {step for pool in (None, allocation.pool) for step in last.get(pool, {}).values()}
        for step in users[allocation]:
            result[step] = result.get(step, frozenset()) | others
    return result


def _users(spans: Sequence[tuple[int, int, int]], allocation: _Allocation) -> tuple[int, ...]:
    """Steps that access an allocation's bytes while it is theirs."""
    begin = bisect.bisect_left(spans, (allocation.first,))
    end = bisect.bisect_left(spans, (allocation.last,))
    return tuple(sorted({step for _, _, step in spans[begin:end] if allocation.begin <= step < allocation.end}))


def _allocations(device_plan: DevicePlan, made: frozenset[str]) -> Iterator[_Allocation]:
    """Every allocation apart; what the caller gets is not freed before the end."""
    plan = device_plan.plan
    graph, steps = plan.graph, len(plan.instructions)
    main = plan.machine.engines_of(EngineKind.COMPUTE)[0].name
    boundary = [index for index, op in enumerate(graph.ops) if op.kind is OpKind.BOUNDARY]
    given = {name for index in boundary for name in graph.writes[index]}
    returned = {name for index in boundary for name in graph.reads[index]}
    for name, allocation in device_plan.allocations.items():
        first = device_plan.apart[name]
        last = first + graph.buffers[name].nbytes
        if name in made:  # anew by each recomputation
            for stay in (r for r in plan.residences or () if r.buffer == name):
                pool = plan.instructions[stay.begin].engine
                yield _Allocation(stay.begin, steps if name in returned else stay.end, pool, first, last)
        else:
            end = steps if name in returned else allocation.end
            is_given = name in given
            yield _Allocation(0 if is_given else allocation.begin, end, None if is_given else main, first, last)
