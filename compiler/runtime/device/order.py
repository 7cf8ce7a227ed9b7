"""Which steps wait for which: the events that keep a plan's meaning when its steps run on several engines.

Steps of one engine run one after another, in the plan's order. Two steps *conflict* when both access the same bytes and
one writes them, or when the host may hand memory that the first has used to the second. Each pair that conflicts must be
ordered, by the engines or by waits. What runs on other engines starts behind whatever came before the program, and the
program is done when all engines are: a boundary operator, which receives or returns, neither waits nor is waited for.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....errors import PlanError
from ...graph import OpKind
from ...plan import Load, Plan, Recompute, Residence, Run
from .layout import DevicePlan

if TYPE_CHECKING:
    from .program import Program

__all__ = ["Access", "accesses", "predecessors", "random_linear_extension", "recorded", "reduced", "synchronisation"]

_Steps = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Access:
    """Bytes ``begin`` to ``end - 1`` of ``space``, which a step reads or ``writes``."""

    space: str
    begin: int
    end: int
    writes: bool


def synchronisation(program: Program, device_plan: DevicePlan) -> _Steps:
    """For each step, the earlier steps on other engines that must be done before it; no wait follows from others.

    ``program`` is the one that ``device_plan`` plans, with integers for its sizes. A storage that is allocated apart
    takes memory from the pool of the engine that allocates it: the engine of the call that makes it, the first compute
    engine for what the host allocates. A pool hands out at once what the host lets go of, while steps that use it may
    still be queued: users of storages from a pool wait for the users of all that were freed to it before.

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
    for step, others in _reuse(program, device_plan, touched).items():
        before[step] |= others
    return reduced(engines, before)


def recorded(waits: Sequence[Sequence[int]]) -> frozenset[int]:
    """Steps that some step waits for: behind each of them an event is recorded."""
    return frozenset(step for steps in waits for step in steps)


def accesses(plan: Plan, *, by_address: bool = True) -> list[tuple[Access, ...]]:
    """What each step accesses: bytes of the scratchpad, of a buffer's copy in backing memory, and tensors without bytes.

    Without ``by_address`` each buffer has bytes of its own, as if nothing shared an address. Boundary operators access
    nothing.

    Raises:
        PlanError: a buffer that is accessed has no residence at that step, or one without an offset.
    """
    places = _Places(plan, by_address)
    index = {op.name: i for i, op in enumerate(plan.graph.ops)}
    result: list[tuple[Access, ...]] = []
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, Run | Recompute):
            op = index[instruction.op]
            if plan.graph.ops[op].kind is OpKind.BOUNDARY:
                result.append(())
                continue
            read = [places.of(buffer, step, writes=False) for buffer in plan.graph.reads[op]]
            result.append((*read, *(places.of(buffer, step, writes=True) for buffer in plan.graph.writes[op])))
        else:
            loads = isinstance(instruction, Load)
            backing = places.backing(instruction.buffer, writes=not loads)
            result.append((backing, places.of(instruction.buffer, step, writes=loads)))
    return result


class _Places:
    def __init__(self, plan: Plan, by_address: bool) -> None:
        self.nbytes = {name: base.nbytes for name, base in plan.graph.buffers.items()}
        self.streamed = frozenset(plan.streamed)
        self.by_address = by_address
        self.residences: dict[str, list[Residence]] = {}
        for residence in sorted(plan.residences or (), key=lambda r: r.begin):
            self.residences.setdefault(residence.buffer, []).append(residence)

    def of(self, buffer: str, step: int, *, writes: bool) -> Access:
        """The bytes of ``buffer`` at ``step``."""
        nbytes = self.nbytes[buffer]
        if buffer in self.streamed:
            return self.backing(buffer, writes=writes)
        if nbytes == 0 or not self.by_address:
            return Access(f"buffer {buffer}", 0, 1, writes)
        stays = self.residences.get(buffer, [])
        position = bisect.bisect_right(stays, step, key=lambda r: r.begin) - 1
        if position < 0 or stays[position].end <= step or stays[position].offset is None:
            raise PlanError(f"buffer {buffer!r} has no address at step {step}, which uses it")
        first = stays[position].offset or 0
        return Access(stays[position].memory, first, first + nbytes, writes)

    def backing(self, buffer: str, *, writes: bool) -> Access:
        """The copy of ``buffer`` in backing memory."""
        return Access(f"backing {buffer}", 0, 1, writes)


def predecessors(touched: Sequence[Sequence[Access]]) -> list[tuple[int, ...]]:
    """For each step the earlier ones it conflicts with; of those that are ordered among themselves, the last suffice.

    These are the last writer of each byte, and for a step that writes it all readers since.
    """
    spaces: dict[str, _Bytes] = {}
    result: list[tuple[int, ...]] = []
    for step, items in enumerate(touched):
        before: set[int] = set()
        for access in items:
            before |= spaces.setdefault(access.space, _Bytes()).access(access, step)
        result.append(tuple(sorted(before - {step})))
    return result


class _Bytes:
    """Disjoint ranges of bytes in order, each with its last writer, -1 for none, and its readers since."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int, int, frozenset[int]]] = []

    def access(self, access: Access, step: int) -> set[int]:
        """Note an access; returns the steps that must come before."""
        low, inside, high = self._cut(access.begin, access.end)
        before = {writer for _, _, writer, _ in inside if writer >= 0}
        if access.writes:
            before.update(*(readers for _, _, _, readers in inside))
            inside = [(access.begin, access.end, step, frozenset())]
        else:
            inside = [(begin, end, writer, readers | {step}) for begin, end, writer, readers in inside]
        self.ranges[low:high] = inside
        return before

    def _cut(self, begin: int, end: int) -> tuple[int, list[tuple[int, int, int, frozenset[int]]], int]:
        """Ranges that make up ``[begin, end)`` exactly, and the positions they belong between."""
        for at in (begin, end):
            position = bisect.bisect_right(self.ranges, at, key=lambda r: r[0]) - 1
            if position >= 0 and self.ranges[position][0] < at < self.ranges[position][1]:
                first, last, writer, readers = self.ranges[position]
                self.ranges[position : position + 1] = [(first, at, writer, readers), (at, last, writer, readers)]
        low = bisect.bisect_left(self.ranges, begin, key=lambda r: r[0])
        high = bisect.bisect_left(self.ranges, end, key=lambda r: r[0])
        inside: list[tuple[int, int, int, frozenset[int]]] = []
        reached = begin
        for known in [*self.ranges[low:high], (end, end, -1, frozenset[int]())]:
            if reached < known[0]:
                inside.append((reached, known[0], -1, frozenset()))
            if known[0] < known[1]:
                inside.append(known)
            reached = known[1]
        return low, inside, high


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
    program: Program, device_plan: DevicePlan, touched: Sequence[Sequence[Access]]
) -> Mapping[int, frozenset[int]]:
    """For the users of storages allocated apart, the last users on each engine of memory that they may be given."""
    plan = device_plan.plan
    allocations = sorted(_allocations(program, device_plan), key=lambda a: a.begin)
    if not any(a.end < len(touched) for a in allocations):
        return {}
    memory = plan.machine.scratchpad
    spans = sorted(
        (a.begin, a.end, step) for step, items in enumerate(touched) for a in items if a.space == memory and a.begin < a.end
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
            result[step] = result.get(step, frozenset()) | {other for other in others if other < step}
    return result


def _users(spans: Sequence[tuple[int, int, int]], allocation: _Allocation) -> tuple[int, ...]:
    """Steps that access an allocation's bytes while it is theirs."""
    begin = bisect.bisect_left(spans, (allocation.first,))
    end = bisect.bisect_left(spans, (allocation.last,))
    return tuple(sorted({step for _, _, step in spans[begin:end] if allocation.begin <= step < allocation.end}))


def _allocations(program: Program, device_plan: DevicePlan) -> Iterator[_Allocation]:
    """Every allocation apart; what the caller gets is not freed before the end."""
    plan = device_plan.plan
    steps = len(plan.instructions)
    main = next(e.name for e in plan.machine.engines if e.kind == "compute")
    returned = {program.views[name].storage for name in _names(program.outputs)}
    placed = sorted((r for r in plan.residences or () if r.offset is not None), key=lambda r: r.offset or 0)
    for name, first in device_plan.apart.items():
        last = first + plan.graph.buffers[name].nbytes
        low = bisect.bisect_left(placed, first, key=lambda r: r.offset or 0)
        high = bisect.bisect_left(placed, last, key=lambda r: r.offset or 0)
        stays = placed[low:high]
        origin = program.storages[name].origin
        if not stays:
            continue
        if origin == "call":  # made anew by each recomputation
            for stay in stays:
                end = steps if name in returned else stay.end
                yield _Allocation(stay.begin, end, plan.instructions[stay.begin].engine, first, last)
            continue
        end = steps if name in returned else max(r.end for r in stays)
        yield _Allocation(min(r.begin for r in stays), end, None if origin == "given" else main, first, last)


def _names(outputs: Iterable[object]) -> Iterator[str]:
    for item in outputs:
        name = getattr(item, "name", None)
        if isinstance(name, str):
            yield name


def random_linear_extension(
    plan: Plan, waits: Sequence[Sequence[int]], rng: random.Random
) -> tuple[int, ...]:
    """The plan's steps in an order that its engines and ``waits`` admit, each step that may come next equally likely.

    What receives comes first and what returns last, as the program begins and ends there.
    """
    boundary = {op.name: not op.inputs for op in plan.graph.ops if op.kind is OpKind.BOUNDARY}
    kinds = [boundary.get(i.op) if isinstance(i, Run | Recompute) else None for i in plan.instructions]
    inner = [step for step, kind in enumerate(kinds) if kind is None]
    remaining = {step: set(waits[step]) if waits else set() for step in inner}
    last: dict[str, int] = {}
    for step in inner:
        engine = plan.instructions[step].engine
        remaining[step] |= {last[engine]} if engine in last else set()
        last[engine] = step
    followers: dict[int, list[int]] = {}
    for step, before in remaining.items():
        for other in before:
            followers.setdefault(other, []).append(step)
    ready = [step for step, before in remaining.items() if not before]
    order: list[int] = []
    while ready:
        step = ready.pop(rng.randrange(len(ready)))
        order.append(step)
        for follower in followers.get(step, ()):
            remaining[follower].discard(step)
            if not remaining[follower]:
                ready.append(follower)
    received = [step for step, kind in enumerate(kinds) if kind]
    return (*received, *order, *(step for step, kind in enumerate(kinds) if kind is False))
