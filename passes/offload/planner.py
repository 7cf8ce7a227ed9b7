"""Plans within a memory limit: what stays on the device, what is streamed from the host, spilled and recomputed.

Everything that the caller gave up to the plan lies in host memory: weights and inputs are loaded, results stored. Some
weights may stay on the device from call to call; which ones is decided first (``residents``), in an order of least
peak. Residency, addresses and the time of each transfer are then decided by the passes that decide them anywhere, in
what is left of the limit, for a few good choices of residents; the fastest plan is kept.

What is allocated apart from the arena cannot move, and takes bytes from its first use to its last. Plans are first made
for the bytes that it leaves at each step, and placed as plans without transfers are (``device.placement``); where no
places are found, for one arena in the bytes that it leaves at every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import msgspec

from ...compiler.graph import Graph
from ...compiler.pipeline import Budget, confirm, run_pass
from ...compiler.plan import Certificate, Load, PassRecord, Plan
from ...compiler.runtime.device.layout import DevicePlan, allocated_bytes, lifetimes, live_bytes
from ...compiler.runtime.device.order import synchronisation
from ...compiler.simulate import latency_ns, simulate, timeline_summary
from ...compiler.verify import verify
from ...errors import Infeasible
from ...hw_models.cost import transfer_seconds
from ...hw_models.model import Direction, HardwareModel, aligned_bytes
from ..address.exact import ExactPlacement
from ..device.ordering import ordering
from ..latency.prefetch import Prefetch
from ..planner import place
from ..residency.ilp import IlpResidency
from ..residency.recompute import RecomputeResidency
from ..residency.workset import least_capacity
from .around import Around, placed_around
from .limited import LimitedPlan
from .reduction import with_residents, without_bytes
from .residents import LowerBound, choose_residents, lower_bound
from .stream import Stream

__all__ = ["LimitedPlan", "least_limit", "plan_within", "plans_within"]

SLACKS = (0.0, 1.0, 0.5, 2.0)  # times the largest streamed buffer that residents leave, because bytes have addresses
NAMED = 4  # buffers that a refusal lists of each kind
CLOSE = 0.01  # a plan this close to the bound is not improved


def plan_within(
    graph: Graph,
    apart: frozenset[str],
    machine: HardwareModel,
    limit_bytes: int,
    budget: Budget,
    *,
    candidates: frozenset[str] = frozenset(),
    kept_bytes: int = 0,
    hosts: frozenset[str] = frozenset(),
) -> LimitedPlan:
    """The fastest plan found for ``graph`` (a program's planning graph) in ``limit_bytes`` of ``machine``'s scratchpad.

    ``apart`` are buffers that cannot lie in the arena, and ``hosts`` those of them whose memory may hold others while
    they do not need it; ``candidates`` are sources that may stay on the device between calls, ``kept_bytes`` what is
    taken already. ``machine`` has one compute engine; copies run beside it, ordered by the plan's waits. Never fails
    because time ran out.

    Raises:
        Infeasible: no plan of the order works; names the operator that needs most, its buffers, and the least limit.
    """
    order = _order(graph, apart, machine, budget)
    problem = _Problem(graph, apart, machine, limit_bytes, kept_bytes, candidates, order, hosts & apart)
    problem.require_room()
    return problem.solve(budget)


def plans_within(
    graph: Graph,
    apart: frozenset[str],
    machine: HardwareModel,
    limits: Sequence[int],
    budget: Budget,
    *,
    candidates: frozenset[str] = frozenset(),
    kept_bytes: int = 0,
) -> tuple[LimitedPlan, ...]:
    """Plans within each of ``limits``, ascending: none is slower than one for a smaller limit. Raises Infeasible."""
    order = _order(graph, apart, machine, budget)
    found: list[LimitedPlan] = []
    for number, limit in enumerate(sorted(limits)):
        problem = _Problem(graph, apart, machine, limit, kept_bytes, candidates, order)
        problem.require_room()
        solved = problem.solve(budget.share(1 / (len(limits) - number)))
        if found and found[-1].latency_s < solved.latency_s:
            bound_s = min(solved.bound_s, found[-1].latency_s)
            solved = replace(found[-1], limit_bytes=limit, bound_s=bound_s)
        found.append(solved)
    return tuple(found)


def least_limit(graph: Graph, apart: frozenset[str], machine: HardwareModel, *, kept_bytes: int = 0) -> int:
    """Bytes of the least limit in which ``graph`` may run in program order: some operator needs them."""
    order = tuple(range(len(graph.ops)))
    return _Problem(graph, apart, machine, 1, kept_bytes, frozenset(), order).least_bytes


def _order(graph: Graph, apart: frozenset[str], machine: HardwareModel, budget: Budget) -> tuple[int, ...]:
    """An order of least peak, or program order if that is as good; sources play no part, as they come when needed."""
    sources = frozenset(name for name, base in graph.buffers.items() if base.role.is_source)
    plan = Plan.of_order(without_bytes(graph, sources), machine)
    found = ordering(plan, budget.share(0.3), search=True).order
    program = tuple(range(len(graph.ops)))
    least = [_Problem(graph, apart, machine, 1, 0, frozenset(), order).least_bytes for order in (found, program)]
    return found if least[0] <= least[1] else program


@dataclass(frozen=True)
class _Problem:
    graph: Graph
    apart: frozenset[str]
    machine: HardwareModel
    limit_bytes: int
    kept_bytes: int
    candidates: frozenset[str]
    order: tuple[int, ...]
    hosts: frozenset[str] = frozenset()

    @cached_property
    def alignment(self) -> int:
        """Bytes that every allocation and place is a multiple of."""
        return self.machine.scratchpad_memory.alignment_bytes

    @cached_property
    def reduced(self) -> Graph:
        """The graph without what is allocated apart."""
        return without_bytes(self.graph, self.apart)

    @cached_property
    def apart_bytes(self) -> tuple[int, ...]:
        """Bytes allocated apart at each position of the order."""
        ordered = Plan.of_order(self.graph, self.machine, self.order)
        resident = lifetimes(ordered, self.graph, self.apart)
        return live_bytes(msgspec.structs.replace(ordered, residences=resident))

    @cached_property
    def needs(self) -> tuple[int, ...]:
        """Bytes without which the operator at each position cannot run: what it touches, and what is apart by then."""
        buffers, touches = self.graph.buffers, self.graph.touches
        own = (
            sum(self._aligned(b) for b in touches[op] if b not in self.apart and buffers[b].nbytes) for op in self.order
        )
        return tuple(nbytes + apart for nbytes, apart in zip(own, self.apart_bytes, strict=True))

    @property
    def least_bytes(self) -> int:
        """The least limit that is not refused."""
        return self.kept_bytes + max(self.needs, default=0)

    @cached_property
    def sure_bytes(self) -> int:
        """A limit that works in any case: one arena for the largest working set beside the most that is apart."""
        arena = least_capacity(Plan.of_order(self.reduced, self.machine, self.order))
        return self.kept_bytes + max(self.apart_bytes, default=0) + aligned_bytes(arena, self.alignment)

    @property
    def room(self) -> int:
        """Bytes for residents, the arena and what is apart."""
        return (self.limit_bytes - self.kept_bytes) // self.alignment * self.alignment

    def require_room(self) -> None:
        """Raises Infeasible."""
        if self.least_bytes > self.limit_bytes:
            raise self._refusal(self.least_bytes)

    def _refusal(self, required: int) -> Infeasible:
        position = max(range(len(self.needs)), key=lambda p: self.needs[p])
        op = self.order[position]
        ordered = Plan.of_order(self.graph, self.machine, self.order)
        stays = [
            r.buffer for r in lifetimes(ordered, self.graph, self.apart) if r.begin <= position < r.end
        ]  # positions are steps of an order without transfers
        touched = [b for b in self.graph.touches[op] if self.graph.buffers[b].nbytes]
        across = [b for b in stays if b not in touched]
        beside = f"; beside it stay {self._named(across)}" if across else ""
        kept = f"; the caller keeps {self.kept_bytes}" if self.kept_bytes else ""
        return Infeasible(
            f"a memory limit of {self.limit_bytes} bytes is too low: operator {self.graph.ops[op].name!r} touches "
            f"{self._named(touched)}{beside}{kept}",
            required_bytes=required,
            available_bytes=self.limit_bytes,
            hint=f"the least limit that works is {required} bytes",
        )

    def _named(self, buffers: Sequence[str]) -> str:
        """The largest of some buffers with their bytes, and all of theirs."""
        largest = sorted(buffers, key=lambda b: (-self.graph.buffers[b].nbytes, b))
        listed = ", ".join(f"{b!r} {self.graph.buffers[b].nbytes}" for b in largest[:NAMED])
        more = f" and {len(largest) - NAMED} more" if len(largest) > NAMED else ""
        return f"{sum(self.graph.buffers[b].nbytes for b in buffers)} bytes ({listed}{more})"

    def stream(self, *, keep: bool, slack: int = 0) -> Stream:
        """The fluid model of streaming in the room there is."""
        return Stream.of(
            self.graph, self.machine, self.order, self.room + slack, self.candidates, keep=keep, staying=self.apart
        )

    def solve(self, budget: Budget) -> LimitedPlan:
        """The fastest of the plans for several choices of residents."""
        begin = time.monotonic()
        # Only the region laid last needs no padding: the bound may count it nowhere.
        found = lower_bound(self.stream(keep=False, slack=self.alignment), budget.share(0.2))
        bound = found._replace(seconds=found.seconds + self._tail_s())
        best: tuple[int, int, DevicePlan, frozenset[str]] | None = None
        for resident in self._choices(budget):
            for placed in self._plans(resident, budget.share(0.5), bound):
                rank = latency_ns(placed.plan), self._loaded(placed.plan)
                if best is None or rank < best[:2]:
                    best = *rank, placed, resident
            if best is not None and (self._is_close(best[0], bound) or budget.halted()):
                break
        if best is None:  # no places were found for what fits by count
            raise self._refusal(self.sure_bytes)
        return self._limited(best[2], best[3], bound, time.monotonic() - begin)

    def _is_close(self, nanoseconds: int, bound: LowerBound) -> bool:
        return nanoseconds <= bound.seconds * 1e9 * (1 + CLOSE)

    def _tail_s(self) -> float:
        """Seconds to store what the last operator makes for the caller."""
        graph, last = self.reduced, self.order[-1]
        storers = [engine for engine in self.machine.engines if engine.copies(Direction.STORE)]
        made = [b for b in graph.writes[last] if b in graph.output_buffers and graph.buffers[b].nbytes]
        return sum(min(transfer_seconds(graph.buffers[b].nbytes, e) for e in storers) for b in made) / len(storers)

    def _choices(self, budget: Budget) -> Iterator[frozenset[str]]:
        """Residents that the model of streaming finds good, the best first."""
        stream = self.stream(keep=True)
        if min(stream.rooms(()), default=0) < 0:  # not even what is held fits: some of it leaves, too
            stream = self.stream(keep=False)
        seen: set[frozenset[int]] = set()
        largest = 0
        for slack in SLACKS:
            less = stream.with_capacity(stream.capacity - int(slack * largest))
            chosen = choose_residents(less, budget.share(0.3))[0]
            streamed = [s.footprint for i, s in enumerate(stream.sources) if s.candidate and i not in chosen]
            largest = largest or max(streamed, default=0)
            if chosen not in seen:
                seen.add(chosen)
                yield frozenset(stream.sources[i].name for i in chosen)

    def _plans(self, resident: frozenset[str], budget: Budget, bound: LowerBound) -> Iterator[DevicePlan]:
        """Placed plans of the graph without ``resident``, within the limit."""
        graph = with_residents(self.graph, resident)
        room = self.room - self._footprint(resident)
        found: DevicePlan | None = None
        if any(self.apart_bytes):
            found = placed_around(graph, self._arguments, room, budget.share(0.6))
            if found is not None:
                yield found
                if self._is_close(latency_ns(found.plan), bound) or budget.halted():
                    return
        arena = room - max(self.apart_bytes, default=0)
        least = least_capacity(Plan.of_order(without_bytes(graph, self.apart), self.machine, self.order))
        if aligned_bytes(least, self.alignment) <= arena:
            yield from self._in_one_arena(graph, resident, arena, budget)

    @property
    def _arguments(self) -> Around:
        return Around(self.machine, self.order, self.apart, self.hosts)

    def _in_one_arena(
        self, graph: Graph, resident: frozenset[str], capacity: int, budget: Budget
    ) -> Iterator[DevicePlan]:
        """Plans with one arena beside the most that is allocated apart."""
        reduced = without_bytes(graph, self.apart)
        plan = Plan.of_order(reduced, self.machine.with_scratchpad(max(self.alignment, capacity)), self.order)
        placed = self._prefetched(place(plan, IlpResidency(), ExactPlacement(), budget.share(0.3)), budget.share(0.3))
        yield self._whole(placed, graph)
        spills = verify(msgspec.structs.replace(placed, passes=())).additional_bytes > 0
        if spills and not budget.halted():
            recomputing = place(plan, RecomputeResidency(objective="latency"), ExactPlacement(), budget.share(0.5))
            again = self._whole(self._prefetched(recomputing, budget), graph)
            if self._footprint(resident) + max(allocated_bytes(again), default=0) <= self.room:
                yield again  # recomputing may need what is apart for longer

    def _prefetched(self, placed: Plan, budget: Budget) -> Plan:
        return simulate(run_pass(Prefetch(), placed, budget))

    def _footprint(self, resident: frozenset[str]) -> int:
        return sum(map(self._aligned, resident))

    def _aligned(self, buffer: str) -> int:
        return aligned_bytes(self.graph.buffers[buffer].nbytes, self.alignment)

    def _loaded(self, plan: Plan) -> int:
        return sum(self.graph.buffers[i.buffer].nbytes for i in plan.instructions if isinstance(i, Load))

    def _whole(self, plan: Plan, graph: Graph) -> DevicePlan:
        """The plan with what is apart put back, each buffer in a range of its own behind the arena."""
        arena, behind = _arena(plan), aligned_bytes(_arena(plan), self.alignment)
        apart = []
        ranges: dict[str, int] = {}
        for residence in lifetimes(plan, graph, self.apart):
            ranges[residence.buffer] = behind
            apart.append(msgspec.structs.replace(residence, offset=behind))
            behind += aligned_bytes(graph.buffers[residence.buffer].nbytes, self.alignment)
        residences = sorted((*(plan.residences or ()), *apart), key=lambda r: (r.begin, r.buffer))
        machine = self.machine.with_scratchpad(max(behind, self.alignment))
        whole = msgspec.structs.replace(plan, graph=graph, machine=machine, residences=tuple(residences), passes=())
        return DevicePlan(simulate(whole), arena, MappingProxyType(ranges))

    def _limited(self, placed: DevicePlan, resident: frozenset[str], bound: LowerBound, seconds: float) -> LimitedPlan:
        timed = placed.plan
        value = latency_ns(timed)
        certificate = Certificate(
            "latency_ns", value, min(value, int(bound.seconds * 1e9)), bound.proved_by, "residency"
        )
        confirm("offload", timed, certificate)
        note = f"{len(resident)} of {len(self.candidates)} weights stay on the device"
        timed = timed.with_record(PassRecord("offload", seconds, certificate, note))
        timeline = timeline_summary(timed)
        placed = replace(placed, plan=timed)
        return LimitedPlan(
            device_plan=replace(placed, waits=synchronisation(placed)),
            resident=resident,
            limit_bytes=self.limit_bytes,
            least_bytes=self.least_bytes,
            resident_bytes=self._footprint(resident),
            kept_bytes=self.kept_bytes,
            latency_s=timeline.latency_s,
            bound_s=min(bound.seconds, timeline.latency_s),
            compute_s=timeline.compute_bound_s,
            transfer_s=timeline.transfer_bound_s,
            loaded_bytes=self._loaded(timed),
        )


def _arena(plan: Plan) -> int:
    ends = (r.offset + plan.graph.buffers[r.buffer].nbytes for r in plan.residences or () if r.offset is not None)
    return max(ends, default=0)
