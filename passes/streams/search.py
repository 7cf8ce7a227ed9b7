"""The search for the fastest assignment of steps to queues."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from ...compiler.graph import OpKind
from ...compiler.pipeline import Budget
from ...compiler.plan import Residence
from ...compiler.runtime.device.conflicts import accesses, predecessors
from ...compiler.runtime.device.layout import DevicePlan
from ...compiler.runtime.device.order import synchronisation
from ...hw_models.model import Concurrency, EngineKind
from .assignment import Rule, alone
from .fluid import run
from .reissue import reissued
from .spread import spread
from .tasks import Task, bound_s, tasks_of, upward_ranks

__all__ = ["Assignment", "Search", "held_bytes", "with_waits"]


NO_GAIN = 1e-3  # of the bound: what a search for less is not worth


@dataclass(frozen=True)
class Assignment:
    """A plan with engines, waits and times; its tasks and queues, by step."""

    device_plan: DevicePlan
    tasks: tuple[Task, ...]
    queues: tuple[int, ...]
    count: int
    seconds: float

    @property
    def streams(self) -> int:
        """Queues in use."""
        return len({queue for queue, task in zip(self.queues, self.tasks, strict=True) if task.computes}) or 1


class Search:
    """The fastest assignment so far that keeps the limit on memory; ``effort`` is the number of steps to time."""

    def __init__(
        self, device_plan: DevicePlan, made: frozenset[str], concurrency: Concurrency, extra_bytes: int, effort: int
    ) -> None:
        plan = device_plan.plan
        self.left = effort
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
        self.best = self._assigned(device_plan, self.tasks, alone(self.tasks), 1)
        self.limit = held_bytes(self.best.device_plan, made) + extra_bytes
        frame = [index for index, op in enumerate(plan.graph.ops) if op.kind is OpKind.BOUNDARY]
        self.fixed_places = made | {name for index in frame for name in plan.graph.touches[index]}

    def offer(self, rule: Rule, count: int, budget: Budget) -> None:
        """Keep the fastest of what ``rule`` makes of the plan, if it is faster and holds no more than allowed."""
        for candidate in self._candidates(rule, count):
            self._keep(candidate)
            if budget.halted() or self.is_done():
                return
            self._keep(self._by_start(candidate))

    def is_done(self) -> bool:
        """Whether nothing is left to try, or to gain."""
        return self.left <= 0 or self.best.seconds <= self.bound_s * (1 + NO_GAIN)

    def _keep(self, assignment: Assignment) -> None:
        faster = assignment.seconds < self.best.seconds
        if faster and held_bytes(assignment.device_plan, self.made) <= self.limit:
            self.best = assignment

    def _candidates(self, rule: Rule, count: int) -> Iterator[Assignment]:
        """With steps that make their own memory anywhere, or on queue 0; with addresses as given, or spread."""
        for fixed in dict.fromkeys((frozenset[int](), self.makers)):
            queues = rule(self.tasks, self.sharing, fixed, count, self.concurrency)
            yield self._assigned(self.given, self.tasks, queues, count)
            queues = rule(self.tasks, self.apart, fixed, count, self.concurrency)
            given = range(len(self.tasks))
            by_start = self._start_order(self.tasks, queues, count, self.apart)
            for order, movable in ((given, self._in_arena), (given, self._is_free), (by_start, self._is_free)):
                yield from self._spread(order, queues, count, movable)

    def _spread(
        self, order: Sequence[int], queues: Sequence[int], count: int, movable: Callable[[Residence], bool]
    ) -> Iterator[Assignment]:
        """The plan issued in ``order``, at addresses that suit these queues, if there is room."""
        device_plan = reissued(self.given, order)
        tasks, queues = tuple(self.tasks[step] for step in order), [queues[step] for step in order]
        before = predecessors(accesses(device_plan.plan, by_address=False))
        times = run(tasks, self._names(tasks, queues, count), before, self.concurrency)
        placed = spread(device_plan, movable, times, self._arena_limit(alone=movable == self._is_free))
        if placed is not None:
            yield self._assigned(placed, tasks, queues, count)

    def _by_start(self, given: Assignment) -> Assignment:
        """The same queues and addresses, with steps issued by their start."""
        order = self._start_order(given.tasks, given.queues, given.count, given.device_plan.waits)
        tasks = tuple(given.tasks[step] for step in order)
        queues = [given.queues[step] for step in order]
        return self._assigned(reissued(given.device_plan, order), tasks, queues, given.count)

    def _start_order(
        self, tasks: Sequence[Task], queues: Sequence[int], count: int, waits: Sequence[Sequence[int]]
    ) -> list[int]:
        """Steps in the order they could start in if issuing was free, those with long chains behind them first."""
        names = self._names(tasks, queues, count)
        times = run(tasks, names, waits, msgspec.structs.replace(self.concurrency, issue_s=0.0))
        before = _with_queues(tasks, names, waits)
        ranks = upward_ranks(tasks, before)
        frame = [task.returns - task.receives for task in tasks]
        return _extension(before, [(frame[s], times[s][0], -ranks[s], s) for s in range(len(tasks))])

    def _in_arena(self, residence: Residence) -> bool:
        return residence.offset is not None and residence.offset < self.given.arena_bytes

    def _is_free(self, residence: Residence) -> bool:
        """Whether a buffer may lie in the arena: it is not handed over, and no call's own."""
        return residence.buffer not in self.fixed_places

    def _arena_limit(self, *, alone: bool) -> int:
        """Bytes for the arena beside what is apart; ``alone``: without what could lie in the arena."""
        plan, apart = self.given.plan, self.given.apart
        if alone:
            stay = tuple(r for r in plan.residences or () if not self._is_free(r))
            plan = msgspec.structs.replace(plan, residences=stay)
            apart = {name: first for name, first in apart.items() if name in self.fixed_places}
        held = held_bytes(replace(self.given, plan=plan, apart=apart), self.made) - self.given.arena_bytes
        return self.limit - held

    def _names(self, tasks: Sequence[Task], queues: Sequence[int], count: int) -> list[str]:
        known = {engine.name for engine in self.given.plan.machine.engines}
        compute = [e.name for e in self.given.plan.machine.with_streams(count).engines_of(EngineKind.COMPUTE)]
        names = [compute[0], *(name for name in compute if name not in known)]
        return [task.engine or names[queue] for task, queue in zip(tasks, queues, strict=True)]

    def _assigned(
        self, device_plan: DevicePlan, tasks: tuple[Task, ...], queues: Sequence[int], count: int
    ) -> Assignment:
        """The plan on these queues, timed with the waits that it needs."""
        self.left -= len(tasks)
        names = self._names(tasks, queues, count)
        plan, machine = device_plan.plan, self.given.plan.machine.with_streams(count)
        machine = msgspec.structs.replace(device_plan.plan.machine, engines=machine.engines)
        steps = tuple(msgspec.structs.replace(i, engine=name) for i, name in zip(plan.instructions, names, strict=True))
        plan = msgspec.structs.replace(plan, instructions=steps, machine=machine)
        waiting = with_waits(replace(device_plan, plan=plan), self.made)
        times = run(tasks, names, waiting.waits, self.concurrency)
        steps = tuple(
            msgspec.structs.replace(i, start_s=start, finish_s=finish)
            for i, (start, finish) in zip(steps, times, strict=True)
        )
        plan = msgspec.structs.replace(plan, instructions=steps)
        seconds = max((finish for _, finish in times), default=0.0)
        return Assignment(replace(waiting, plan=plan), tasks, tuple(queues), count, seconds)


def _with_queues(tasks: Sequence[Task], names: Sequence[str], waits: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """``waits`` and, for each step that takes time, the one before it on its queue."""
    last: dict[str, int] = {}
    before: list[tuple[int, ...]] = []
    for step, name in enumerate(names):
        if tasks[step].receives or tasks[step].returns:
            before.append(())
            continue
        before.append((*waits[step], *((last[name],) if name in last else ())))
        last[name] = step
    return before


def _extension(before: Sequence[Sequence[int]], keys: Sequence[tuple[float, ...]]) -> list[int]:
    """Steps behind those ``before`` them, otherwise by their keys."""
    missing = [len(set(others)) for others in before]
    behind: list[list[int]] = [[] for _ in before]
    for step, others in enumerate(before):
        for other in set(others):
            behind[other].append(step)
    ready = [(keys[step], step) for step, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        _, step = heapq.heappop(ready)
        order.append(step)
        for other in behind[step]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (keys[other], other))
    return order


def with_waits(device_plan: DevicePlan, made: frozenset[str]) -> DevicePlan:
    """With the waits that its engines make necessary."""
    return replace(device_plan, waits=synchronisation(device_plan, made))


def held_bytes(device_plan: DevicePlan, made: frozenset[str]) -> int:
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
