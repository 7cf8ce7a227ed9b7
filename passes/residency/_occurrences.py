"""When what could be computed again: the order with every recomputation that is considered written into it.

The order becomes a sequence of *events*: each operator's run, and before it the *slots* in which operators may run
again. A buffer's *uses* are the events that touch it, or may. ``docs/formulations/recomputing.md`` has the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ...compiler.graph import OpKind
from ...compiler.plan import Plan
from ...compiler.repeatable import is_repeatable
from ...hw_models.model import aligned_bytes
from ._prices import Prices
from .gaps import GapProblem, Lifetime

__all__ = ["Event", "Occurrences", "Track", "Use"]


@dataclass(frozen=True)
class Event:
    """The run of operator ``op`` at ``position`` of the order, or, if ``again``, a slot for it just before that."""

    op: int
    position: int
    again: bool


@dataclass(frozen=True)
class Use:
    """A buffer at an event: ``version`` is what it holds after it; ``creates`` says that the event begins its bytes."""

    event: int
    version: int
    creates: bool


@dataclass(frozen=True)
class Track:
    """One buffer along the events. ``sizes`` are its bytes by capacity dimension; a ``pinned`` one is never dropped."""

    lifetime: Lifetime
    uses: tuple[Use, ...]
    sizes: tuple[int, ...]
    pinned: bool


@dataclass(frozen=True)
class Occurrences:
    """Events in sequence and the uses of every planned buffer along them.

    While event ``e`` happens, at most ``ceilings[e][d]`` of dimension ``d`` may be resident: the capacity less
    ``reserve_bytes``, or what it touches and pins keep, or, for a slot, what the run before it may hold, if more.
    """

    plan: Plan
    problem: GapProblem
    events: tuple[Event, ...]
    tracks: tuple[Track, ...]
    limits: tuple[int, ...]  # capacity, by dimension
    reserve_bytes: int

    @classmethod
    def of(cls, plan: Plan, prices: Prices, depth: int, reserve_bytes: int) -> Occurrences:
        """The occurrences of ``plan``'s order, with chains of up to ``depth`` recomputations before each operator."""
        problem = GapProblem.of(plan, reserve_bytes=reserve_bytes)
        memory = plan.machine.scratchpad_memory
        limits = [aligned_bytes(memory.capacity_bytes, memory.alignment_bytes), memory.capacity_bytes]
        events = tuple(_Slots(plan, problem, prices, depth).events())
        return cls(
            plan,
            problem,
            events,
            tuple(_tracks(plan, problem, events)),
            tuple(limits[: problem.room.shape[0]]),
            reserve_bytes,
        )

    @cached_property
    def worksets(self) -> tuple[tuple[int, ...], ...]:
        """Bytes, by dimension, of what each event touches."""
        total = [[0] * len(self.limits) for _ in self.events]
        for track in self.tracks:
            for use in track.uses:
                for d, size in enumerate(track.sizes):
                    total[use.event][d] += size
        return tuple(map(tuple, total))

    @cached_property
    def ceilings(self) -> tuple[tuple[int, ...], ...]:
        """Bytes that may be resident, by event and dimension."""
        least = [list(touched) for touched in self.worksets]
        for track in self.tracks:
            uses = [use.event for use in track.uses]
            runs = [e for e in uses if not self.events[e].again]
            for e in set(range(runs[0], runs[-1])) - set(uses) if track.pinned else ():
                least[e] = [a + b for a, b in zip(least[e], track.sizes, strict=True)]
        found: list[tuple[int, ...]] = []
        limits = before = tuple(limit - self.reserve_bytes for limit in self.limits)
        for event, needed in zip(self.events, least, strict=True):
            found.append(tuple(map(min, self.limits, map(max, before if event.again else limits, needed))))
            if not event.again:
                before = found[-1]
        return tuple(found)


def _tracks(plan: Plan, problem: GapProblem, events: tuple[Event, ...]) -> Iterator[Track]:
    graph = plan.graph
    touched: dict[str, list[Use]] = {lifetime.buffer: [] for lifetime in problem.lifetimes}
    for e, event in enumerate(events):
        for buffer in graph.touches[event.op]:
            if buffer in touched:
                uses = touched[buffer]
                writes = buffer in graph.writes[event.op]
                version = uses[-1].version if uses else 0
                creates = writes and buffer in graph.ops[event.op].outputs
                uses.append(Use(e, version + (writes and not event.again), creates))
    pinned = {pin.buffer for pin in plan.pins if pin.resident}
    for lifetime in problem.lifetimes:
        padded = aligned_bytes(lifetime.nbytes, plan.machine.scratchpad_memory.alignment_bytes)
        sizes = (padded, lifetime.nbytes)[: problem.room.shape[0]]
        yield Track(lifetime, tuple(touched[lifetime.buffer]), sizes, lifetime.buffer in pinned)


@dataclass(frozen=True)
class _Slots:
    """Finds the recomputations worth considering."""

    plan: Plan
    problem: GapProblem
    prices: Prices
    depth: int

    def events(self) -> Iterator[Event]:
        """Slots and runs in sequence; slots of one position in the order of their operators' runs."""
        graph, order = self.plan.graph, self.plan.order
        current = dict.fromkeys(graph.buffers, 0)
        read: dict[int, dict[str, int]] = {}  # versions each operator read when it ran
        rank = {op: position for position, op in enumerate(order)}
        for position, op in enumerate(order):
            recent = frozenset(graph.touches[order[position - 1]] if position else ())

            def fresh(maker: int) -> bool:
                return maker in read and all(current[b] == v for b, v in read[maker].items())

            for again in sorted(self._before(op, recent, fresh), key=rank.__getitem__):
                yield Event(again, position, again=True)
            yield Event(op, position, again=False)
            read[op] = {b: current[b] for b in graph.reads[op]}
            current.update({b: current[b] + 1 for b in graph.writes[op]})

    def _before(self, op: int, recent: frozenset[str], fresh: Callable[[int], bool]) -> set[int]:
        """Operators that may run again before ``op``: they made something it needs, or one of them needs.

        What the operator just before used (``recent``) is there anyway. ``fresh`` says whether
        an operator has run and its operands still hold what it read.
        """
        graph = self.plan.graph
        found: set[int] = set()
        needed = set(graph.touches[op])
        wanted = needed - recent
        for _ in range(self.depth):
            makers = {self.maker[b] for b in wanted if b in self.maker} - found
            makers = {o for o in makers if fresh(o) and recent.isdisjoint(graph.writes[o])}
            found |= makers
            wanted = {b for o in makers for b in graph.reads[o]} - needed - recent
        return found

    @cached_property
    def maker(self) -> dict[str, int]:
        """The operator that may be recomputed for each buffer; absent where none may, or fetching is no dearer."""
        graph = self.plan.graph
        planned = {lifetime.buffer: lifetime for lifetime in self.problem.lifetimes}
        pinned = {pin.buffer for pin in self.plan.pins if pin.resident}
        writers: dict[str, int] = {}
        for written in graph.writes:
            for buffer in written:
                writers[buffer] = writers.get(buffer, 0) + 1
        made: dict[str, int] = {}
        for index, op in enumerate(graph.ops):
            written = graph.writes[index]
            own = all(writers[b] == 1 and b in op.outputs and b not in pinned for b in written)
            if not own or op.kind is not OpKind.COMPUTE or not is_repeatable(op):
                continue
            outputs = [planned[b] for b in written if b in planned]
            if self.prices.run_again(index) < sum(map(self.prices.fetch_at_most, outputs)):
                made.update(dict.fromkeys(written, index))
        return made
