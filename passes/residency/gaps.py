"""What a residency of a fixed order decides: for each gap between two uses of a buffer, keep it or drop it.

A *use* is an operator that reads or writes the buffer; a *position* is an index into the order. Between its uses ``k``
and ``k + 1`` a buffer either stays resident, or is dropped after use ``k`` and loaded again before use ``k + 1``; any
residency moves at least as many bytes as the one with the same gaps kept, so nothing else needs deciding. A dropped
gap costs one load, and one store for each *version* (the content left by one write) that backing memory does not
hold anyway: sources start there, and the last version of an output is stored whatever else is decided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...compiler.plan import Certificate, Plan, Run
from ...errors import Infeasible
from ...hw_models.model import aligned_bytes
from .workset import planned_buffers

__all__ = ["Cut", "Gap", "GapProblem", "Interval", "Lifetime", "base_bytes", "gaps_of_residences"]


class Gap(NamedTuple):
    """The stretch between use ``after`` and use ``after + 1`` of ``buffer``, counted along the order from 0."""

    buffer: str
    after: int


@dataclass(frozen=True)
class Cut:
    """Gaps that cannot all be kept together, because the residences they make cannot be placed together."""

    gaps: frozenset[Gap]


@dataclass(frozen=True)
class Lifetime:
    """The uses of one buffer: their ``positions``, and the version it holds after each of them.

    Versions count writes; 0 is a source's content before the first operator. ``backed`` are the versions that backing
    memory holds at no additional cost. ``stored_after`` is the use after which an output's last version is stored.
    """

    buffer: str
    nbytes: int
    is_source: bool
    positions: tuple[int, ...]
    versions: tuple[int, ...]
    backed: frozenset[int]
    stored_after: int | None


@dataclass(frozen=True)
class Interval:
    """One gap as the solvers see it.

    While positions ``begin`` to ``end - 1`` run, keeping it takes ``sizes[d]`` of capacity dimension ``d``. Dropping
    it moves ``nbytes``, and as many again, once for all gaps with the same ``version``, unless that is ``None``.
    """

    gap: Gap
    begin: int
    end: int
    nbytes: int
    sizes: tuple[int, ...]
    version: tuple[str, int] | None


@dataclass(frozen=True)
class GapProblem:
    """Every gap of one order on one machine, and the room that operators leave for keeping them.

    ``room[d, p]`` is what the working set of the operator at position ``p`` leaves of dimension ``d``. There is one
    dimension, bytes rounded up to the scratchpad's alignment, and a second one of plain bytes when the capacity is no
    multiple of the alignment; both are necessary for a placement. ``base_bytes`` is additional traffic that no
    residency avoids: streamed buffers read again, and sources that are only written. The gaps of a buffer that is
    pinned as resident are not among the ``intervals``: they are kept, and what they take is no part of the room.
    """

    lifetimes: tuple[Lifetime, ...]
    intervals: tuple[Interval, ...]
    room: NDArray[np.int64]
    base_bytes: int

    @classmethod
    def of(cls, plan: Plan, *, reserve_bytes: int = 0) -> GapProblem:
        """The problem of ``plan``'s order; ``reserve_bytes`` of the capacity are held back from keeping gaps.

        Raises:
            Infeasible: what is pinned as resident leaves some operator too little room.
        """
        memory = plan.machine.scratchpad_memory
        capacities = [aligned_bytes(memory.capacity_bytes, memory.alignment_bytes)]
        if capacities[0] != memory.capacity_bytes:
            capacities.append(memory.capacity_bytes)
        lifetimes = _lifetimes(plan)
        room = np.repeat(np.array(capacities, dtype=np.int64)[:, None] - reserve_bytes, len(plan.graph.ops), axis=1)
        intervals: list[Interval] = []
        staying = _staying(plan)
        for lifetime in lifetimes:
            sizes = (aligned_bytes(lifetime.nbytes, memory.alignment_bytes), lifetime.nbytes)[: len(capacities)]
            stays = lifetime.buffer in staying
            first, last = lifetime.positions[0], lifetime.positions[-1]
            room[:, range(first, last + 1) if stays else list(lifetime.positions)] -= np.array(sizes)[:, None]
            intervals.extend(() if stays else _intervals(lifetime, sizes))
        if staying:
            for capacity, left in zip(capacities, room + reserve_bytes, strict=True):
                _check_room(plan, lifetimes, left, capacity)
        return cls(lifetimes, tuple(intervals), np.maximum(room, 0), base_bytes(plan))

    @cached_property
    def index(self) -> dict[Gap, int]:
        """Index into ``intervals`` of each gap."""
        return {interval.gap: i for i, interval in enumerate(self.intervals)}

    def additional_bytes(self, dropped: Iterable[int]) -> int:
        """Additional traffic when the intervals ``dropped`` are dropped and all others kept."""
        chosen = [self.intervals[i] for i in dropped]
        stored = {interval.version: interval.nbytes for interval in chosen if interval.version is not None}
        return self.base_bytes + sum(interval.nbytes for interval in chosen) + sum(stored.values())

    def slack(self, dropped: Collection[int]) -> NDArray[np.int64]:
        """Capacity left over, by dimension and position, with all but ``dropped`` kept; negative is too much kept."""
        steps = np.zeros((self.room.shape[0], self.room.shape[1] + 1), dtype=np.int64)
        for i, interval in enumerate(self.intervals):
            if i not in dropped:
                steps[:, interval.begin] += interval.sizes
                steps[:, interval.end] -= interval.sizes
        left: NDArray[np.int64] = self.room - np.cumsum(steps, axis=1)[:, :-1]
        return left

    def certificate(self, dropped: Iterable[int]) -> Certificate:
        """The certificate of a heuristic's residency: its bound is what no residency avoids."""
        value = self.additional_bytes(dropped)
        return Certificate("additional_traffic_bytes", value, self.base_bytes, "analytic", "residency")


def gaps_of_residences(plan: Plan, indices: Iterable[int]) -> Cut:
    """The cut that follows when the residences with these ``indices`` into ``plan.residences`` cannot be placed.

    It holds every gap kept inside them: a residency that keeps all of these has each of the buffers resident during
    the same operators again, so the same residences, or longer ones, would have to be placed together. Gaps that a pin
    keeps are left out, as they are kept in any case.
    """
    staying = _staying(plan)
    chosen = [i for i in indices if (plan.residences or ())[i].buffer not in staying]
    residences = [(plan.residences or ())[i] for i in chosen]
    steps_of: dict[str, list[int]] = {residence.buffer: [] for residence in residences}
    touches = {op.name: touched for op, touched in zip(plan.graph.ops, plan.graph.touches, strict=True)}
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, Run):
            for buffer in touches[instruction.op]:
                if buffer in steps_of:
                    steps_of[buffer].append(step)
    gaps: set[Gap] = set()
    for residence in residences:
        inside = [k for k, step in enumerate(steps_of[residence.buffer]) if residence.begin <= step < residence.end]
        gaps.update(Gap(residence.buffer, k) for k in inside[:-1])
    return Cut(frozenset(gaps))


def _staying(plan: Plan) -> frozenset[str]:
    """Buffers that are pinned as resident from their first to their last use."""
    return frozenset(pin.buffer for pin in plan.pins if pin.resident)


def _check_room(plan: Plan, lifetimes: Iterable[Lifetime], room: NDArray[np.int64], capacity: int) -> None:
    """``capacity`` has ``room`` for each operator beside what is pinned as resident across it. Raises Infeasible."""
    position = int(np.argmin(room))
    missing = -int(room[position])
    if missing <= 0:
        return
    memory = plan.machine.scratchpad_memory
    op = plan.order[position]
    across = {
        lifetime.buffer: lifetime.nbytes
        for lifetime in lifetimes
        if lifetime.buffer in _staying(plan)
        and lifetime.positions[0] < position < lifetime.positions[-1]
        and lifetime.buffer not in plan.graph.touches[op]
    }
    pinned = ", ".join(f"{name!r} {nbytes}" for name, nbytes in sorted(across.items(), key=lambda term: -term[1]))
    required = capacity + missing
    raise Infeasible(
        f"operator {plan.graph.ops[op].name!r} and what is pinned as resident across it ({pinned or 'nothing'}) need "
        f"{required} bytes, but memory {memory.name!r} has {memory.capacity_bytes}",
        required_bytes=required,
        available_bytes=memory.capacity_bytes,
        hint="pin less as resident, or plan for a larger scratchpad",
    )


def _lifetimes(plan: Plan) -> tuple[Lifetime, ...]:
    graph = plan.graph
    uses: dict[str, list[tuple[int, bool]]] = {name: [] for name in planned_buffers(plan)}
    for position, op in enumerate(plan.order):
        for buffer in graph.touches[op]:
            if buffer in uses:
                uses[buffer].append((position, buffer in graph.writes[op]))
    return tuple(_lifetime(plan, buffer, found) for buffer, found in uses.items() if found)


def _lifetime(plan: Plan, buffer: str, uses: list[tuple[int, bool]]) -> Lifetime:
    base = plan.graph.buffers[buffer]
    versions: list[int] = []
    for _, writes in uses:
        versions.append((versions[-1] if versions else 0) + writes)
    is_output = buffer in plan.graph.output_buffers
    backed = {0} if base.role.is_source else set()
    if is_output:
        backed.add(versions[-1])
    return Lifetime(
        buffer,
        base.nbytes,
        base.role.is_source,
        tuple(position for position, _ in uses),
        tuple(versions),
        frozenset(backed),
        versions.index(versions[-1]) if is_output else None,
    )


def _intervals(lifetime: Lifetime, sizes: tuple[int, ...]) -> Iterable[Interval]:
    for after, (begin, end) in enumerate(zip(lifetime.positions, lifetime.positions[1:], strict=False)):
        version = lifetime.versions[after]
        yield Interval(
            Gap(lifetime.buffer, after),
            begin + 1,
            end,
            lifetime.nbytes,
            sizes,
            None if version in lifetime.backed else (lifetime.buffer, version),
        )


def base_bytes(plan: Plan) -> int:
    """Additional traffic of ``plan``'s graph that no order and no residency avoids, in bytes."""
    graph = plan.graph
    readers = dict.fromkeys(graph.buffers, 0)
    written: set[str] = set()
    for reads, writes in zip(graph.reads, graph.writes, strict=True):
        written.update(writes)
        for buffer in reads:
            readers[buffer] += 1
    again = sum((readers[b] - 1) * graph.buffers[b].nbytes for b in plan.streamed if readers[b])
    only_written = sum(
        base.nbytes
        for name, base in graph.buffers.items()
        if base.role.is_source and name in written and not readers[name]
    )
    return again + only_written
