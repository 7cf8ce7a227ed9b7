"""A program's plan in the form that its executor takes."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

from ....hw_models.model import aligned_bytes
from ...graph import Graph
from ...plan import Plan, Recompute, Residence, Run

__all__ = ["Allocation", "DevicePlan", "allocated_bytes", "lifetimes", "live_bytes"]


@dataclass(frozen=True)
class Allocation:
    """The memory of one storage that is allocated apart: ``nbytes``, aligned, during steps ``begin`` to ``end - 1``."""

    nbytes: int
    begin: int
    end: int


@dataclass(frozen=True)
class DevicePlan:
    """A plan of a program's planning graph, every residence placed.

    Offsets below ``arena_bytes`` are addresses in the arena. Storages that are allocated apart (outputs, what calls
    make for themselves, inputs handed over, and what the arena has no room for) own a range of offsets each, behind
    the arena: ``apart`` has its first byte. What is placed inside such a range lies in that storage's own memory, which
    is then allocated before the storage begins, or freed after it has ended (``allocations``). ``waits`` names, for
    each step, earlier steps on other engines that must be done before it; empty where there is only one engine.
    """

    plan: Plan
    arena_bytes: int
    apart: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    waits: tuple[tuple[int, ...], ...] = ()

    def __getstate__(self) -> dict[str, object]:
        """What is pickled: the fields, in types that can be."""
        return {known.name: getattr(self, known.name) for known in fields(self)} | {"apart": dict(self.apart)}

    @cached_property
    def allocations(self) -> Mapping[str, Allocation]:
        """When the memory of each storage that is allocated apart exists: while anything lies in it."""
        spans: dict[str, tuple[int, int]] = {}
        for residence in self.plan.residences or ():
            owner = None if residence.offset is None else self.owner(residence.offset)
            if owner is not None:
                begin, end = spans.get(owner, (residence.begin, residence.end))
                spans[owner] = min(begin, residence.begin), max(end, residence.end)
        alignment = self.plan.machine.scratchpad_memory.alignment_bytes
        nbytes = {name: aligned_bytes(self.plan.graph.buffers[name].nbytes, alignment) for name in spans}
        return MappingProxyType({name: Allocation(nbytes[name], *span) for name, span in spans.items()})

    def owner(self, offset: int) -> str | None:
        """The storage, allocated apart, in whose range ``offset`` lies; ``None`` for the arena."""
        if offset < self.arena_bytes:
            return None
        return self._owners[bisect.bisect_right(self._owners, offset, key=lambda owner: owner[0]) - 1][1]

    @cached_property
    def _owners(self) -> tuple[tuple[int, str], ...]:
        return tuple(sorted((first, name) for name, first in self.apart.items()))


def allocated_bytes(device_plan: DevicePlan) -> tuple[int, ...]:
    """Bytes that the process holds for the program at each step: the arena, and what is allocated apart by then."""
    spans = ((a.begin, a.end, a.nbytes) for a in device_plan.allocations.values())
    steps = len(device_plan.plan.instructions)
    return tuple(device_plan.arena_bytes + live for live in _profile(spans, steps))


def live_bytes(plan: Plan) -> tuple[int, ...]:
    """Bytes resident at each step of ``plan``, buffers as large as the machine's alignment makes them."""
    alignment = plan.machine.scratchpad_memory.alignment_bytes
    buffers = plan.graph.buffers
    residences = plan.residences or ()
    spans = ((r.begin, r.end, aligned_bytes(buffers[r.buffer].nbytes, alignment)) for r in residences)
    return _profile(spans, len(plan.instructions))


def lifetimes(plan: Plan, graph: Graph, buffers: Collection[str]) -> tuple[Residence, ...]:
    """A residence from the first to the last use in ``plan`` of each of ``buffers`` that has bytes in ``graph``.

    ``graph`` is the plan's own, or one with the same operators.
    """
    touches = {op.name: touched for op, touched in zip(graph.ops, graph.touches, strict=True)}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step, instruction in enumerate(plan.instructions):
        for buffer in touches[instruction.op] if isinstance(instruction, Run | Recompute) else ():
            if buffer in buffers and graph.buffers[buffer].nbytes:
                first.setdefault(buffer, step)
                last[buffer] = step + 1
    spans = sorted((begin, buffer) for buffer, begin in first.items())
    return tuple(Residence(buffer, plan.machine.scratchpad, begin, last[buffer]) for begin, buffer in spans)


def _profile(spans: Iterable[tuple[int, int, int]], steps: int) -> tuple[int, ...]:
    change = [0] * (steps + 1)
    for begin, end, nbytes in spans:
        change[begin] += nbytes
        change[end] -= nbytes
    return tuple(accumulate(change[:steps]))
