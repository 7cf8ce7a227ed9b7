"""Independent operators at the same time, on several queues of the compute engine, where that is predicted to pay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from ...compiler.graph import OpKind
from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan, Residence
from ...compiler.runtime.device.conflicts import accesses, predecessors
from ...compiler.runtime.device.layout import DevicePlan
from ...compiler.runtime.device.order import synchronisation
from ...compiler.simulate import simulate
from ...errors import OptionError
from ...hw_models.model import Concurrency, EngineKind
from .assignment import RULES, Rule, alone
from .fluid import run
from .spread import spread
from .tasks import bound_s, tasks_of

__all__ = ["CriticalPath", "StreamDecision"]


@dataclass(frozen=True)
class StreamDecision:
    """A plan with engines, times and waits; predicted seconds before and after, and a bound for every assignment.

    ``streams`` are the queues in use: 1 where more are not worth it, and the plan's order and places are those given.
    """

    device_plan: DevicePlan
    streams: int
    before_s: float
    after_s: float
    bound_s: float
    note: str


@dataclass(frozen=True)
class CriticalPath:
    """Run chains of dependent operators on queues of their own, the critical one without a break.

    *Given* a placed plan for a machine that states its concurrency. *Result*: the same order on the machine
    ``with_streams``, with times; other addresses where sharing bytes would keep operators from running at the same
    time; unchanged if less than ``margin`` of the seconds would be saved. At most ``streams`` queues; 0 is what the
    machine says.

    Method: list scheduling by upward rank (HEFT; Topcuoglu, Hariri and Wu, IEEE TPDS 13(3), 2002) with the order
    fixed, and by earliest start, for each number of queues, with addresses as given and spread (``spread``). Each
    assignment is timed with the waits it needs, operators slowing each other down (``fluid``); the fastest is kept.
    """

    streams: int = 0
    margin: float = 0.03

    def __post_init__(self) -> None:
        if self.streams < 0 or not 0 <= self.margin < 1:
            raise OptionError(
                f"{self.name}: options are streams={self.streams} and margin={self.margin}; streams takes 0 or more, "
                "margin 0 to below 1"
            )

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "streams/critical_path"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Assign queues; memory apart from the scratchpad plays no part.

        Raises:
            OptionError: the plan has no addresses yet, and the machine has several queues.
        """
        concurrency = plan.machine.concurrency
        if concurrency is None or self._count(concurrency) == 1:
            return Decision(plan, None, "one queue: the machine states no more, or no more were asked for")
        if plan.residences is None or any(r.offset is None for r in plan.residences):
            raise OptionError(f"{self.name}: the plan has no addresses yet", hint="place it first: address/exact")
        arena = plan.machine.scratchpad_memory.capacity_bytes
        found = self.assign(DevicePlan(plan, arena), frozenset(), budget)
        return Decision(found.device_plan.plan if found.streams > 1 else plan, None, found.note)

    def assign(
        self, device_plan: DevicePlan, made: frozenset[str], budget: Budget, *, extra_bytes: int = 0
    ) -> StreamDecision:
        """Engines, times and waits for a program's plan; ``made`` are the buffers that calls make for themselves.

        What the arena and the pools of all queues hold at most grows by no more than ``extra_bytes``.
        """
        plan = device_plan.plan
        concurrency = plan.machine.concurrency
        if concurrency is None:
            timed = _timed(replace(device_plan, plan=simulate(plan)), made)
            seconds = max((i.finish_s or 0.0 for i in timed.plan.instructions), default=0.0)
            return StreamDecision(timed, 1, seconds, seconds, 0.0, "the machine does not state its concurrency")
        search = _Search(device_plan, made, concurrency, extra_bytes)
        before = search.best
        for count in range(2, self._count(concurrency) + 1):
            for rule in RULES:
                if not budget.halted():
                    search.offer(rule, count)
        saved = 1 - search.best.seconds / before.seconds if before.seconds else 0.0
        chosen = search.best if saved > 0 and saved >= self.margin else before
        rest = f"at least {search.bound_s * 1e6:,.1f} on any number of queues"
        note = f"{chosen.count} of {self._count(concurrency)} queues: {chosen.seconds * 1e6:,.1f} us predicted, "
        note += f"{before.seconds * 1e6:,.1f} on one, {rest}"
        return StreamDecision(chosen.device_plan, chosen.count, before.seconds, chosen.seconds, search.bound_s, note)

    def _count(self, concurrency: Concurrency) -> int:
        return self.streams or concurrency.streams


@dataclass(frozen=True)
class _Assignment:
    device_plan: DevicePlan
    count: int
    seconds: float


class _Search:
    """The fastest assignment so far that keeps the limit on memory."""

    def __init__(
        self, device_plan: DevicePlan, made: frozenset[str], concurrency: Concurrency, extra_bytes: int
    ) -> None:
        plan = device_plan.plan
        self.given, self.made, self.concurrency = device_plan, made, concurrency
        self.tasks = tasks_of(plan, concurrency)
        self.sharing = predecessors(accesses(plan))
        self.apart = predecessors(accesses(plan, by_address=False))
        self.bound_s = bound_s(self.tasks, self.apart, concurrency)
        writes = {op.name: set(plan.graph.writes[index]) for index, op in enumerate(plan.graph.ops)}
        self.makers = frozenset(
            step
            for step, i in enumerate(plan.instructions)
            if not made.isdisjoint(writes.get(getattr(i, "op", ""), ()))
        )
        self.best = self._assigned(device_plan, alone(self.tasks), 1)
        self.limit = _held_bytes(self.best.device_plan, made) + extra_bytes
        frame = [index for index, op in enumerate(plan.graph.ops) if op.kind is OpKind.BOUNDARY]
        crossing = {name for index in frame for name in plan.graph.touches[index]}
        self.fixed_places = made | crossing

    def offer(self, rule: Rule, count: int) -> None:
        """Keep the fastest of what ``rule`` makes of the plan, if it is faster and holds no more than allowed."""
        for candidate in self._candidates(rule, count):
            if candidate.seconds < self.best.seconds and _held_bytes(candidate.device_plan, self.made) <= self.limit:
                self.best = candidate

    def _candidates(self, rule: Rule, count: int) -> Iterator[_Assignment]:
        for fixed in dict.fromkeys((frozenset[int](), self.makers)):
            queues = rule(self.tasks, self.sharing, fixed, count, self.concurrency)
            yield self._assigned(self.given, queues, count)
            queues = rule(self.tasks, self.apart, fixed, count, self.concurrency)
            times = run(self.tasks, self._names(queues, count), self.apart, self.concurrency)
            for movable, limit in (
                (self._in_arena, self._arena_limit()),
                (self._is_free, self._arena_limit(alone=True)),
            ):
                placed = spread(self.given, movable, times, limit)
                if placed is not None:
                    yield self._assigned(placed, queues, count)

    def _in_arena(self, residence: Residence) -> bool:
        return residence.offset is not None and residence.offset < self.given.arena_bytes

    def _is_free(self, residence: Residence) -> bool:
        """Whether a buffer may lie in the arena: it is not handed over, and no call's own."""
        return residence.buffer not in self.fixed_places

    def _arena_limit(self, *, alone: bool = False) -> int:
        """Bytes for the arena beside what is apart; ``alone``: without what could lie in the arena."""
        plan, apart = self.given.plan, self.given.apart
        if alone:
            stay = tuple(r for r in plan.residences or () if not self._is_free(r))
            plan = msgspec.structs.replace(plan, residences=stay)
            apart = {name: first for name, first in apart.items() if name in self.fixed_places}
        held = _held_bytes(replace(self.given, plan=plan, apart=apart), self.made) - self.given.arena_bytes
        return self.limit - held

    def _names(self, queues: list[int], count: int) -> list[str]:
        machine = self.given.plan.machine.with_streams(count)
        known = {engine.name for engine in self.given.plan.machine.engines}
        compute = [e.name for e in machine.engines_of(EngineKind.COMPUTE)]
        names = [compute[0], *(name for name in compute if name not in known)]
        return [task.engine or names[queue] for task, queue in zip(self.tasks, queues, strict=True)]

    def _assigned(self, device_plan: DevicePlan, queues: list[int], count: int) -> _Assignment:
        """The plan on these queues, timed with the waits that it needs."""
        names = self._names(queues, count)
        plan = device_plan.plan
        steps = tuple(msgspec.structs.replace(i, engine=name) for i, name in zip(plan.instructions, names, strict=True))
        plan = msgspec.structs.replace(plan, instructions=steps, machine=plan.machine.with_streams(count))
        waiting = _timed(replace(device_plan, plan=plan), self.made)
        times = run(self.tasks, names, waiting.waits, self.concurrency)
        steps = tuple(
            msgspec.structs.replace(i, start_s=start, finish_s=finish)
            for i, (start, finish) in zip(steps, times, strict=True)
        )
        plan = msgspec.structs.replace(plan, instructions=steps)
        seconds = max((finish for _, finish in times), default=0.0)
        used = len({name for name, task in zip(names, self.tasks, strict=True) if task.computes})
        return _Assignment(replace(waiting, plan=plan), max(1, used), seconds)


def _timed(device_plan: DevicePlan, made: frozenset[str]) -> DevicePlan:
    """With the waits that its engines make necessary."""
    return replace(device_plan, waits=synchronisation(device_plan, made))


def _held_bytes(device_plan: DevicePlan, made: frozenset[str]) -> int:
    """Bytes that the arena and the pools of all engines hold at most: what one has got back, no other may use."""
    plan = device_plan.plan
    main = plan.machine.engines_of(EngineKind.COMPUTE)[0].name
    changes: dict[str, dict[int, int]] = {}
    for name, allocation in device_plan.allocations.items():
        pool = plan.instructions[allocation.begin].engine if name in made else main
        change = changes.setdefault(pool, {})
        change[allocation.begin] = change.get(allocation.begin, 0) + allocation.nbytes
        change[allocation.end] = change.get(allocation.end, 0) - allocation.nbytes
    total = device_plan.arena_bytes
    for change in changes.values():
        live = peak = 0
        for step in sorted(change):
            live += change[step]
            peak = max(peak, live)
        total += peak
    return total
