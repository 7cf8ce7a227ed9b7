"""A program's plan in the form that its executor takes."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from types import MappingProxyType

from ...plan import Plan

__all__ = ["Allocation", "DevicePlan", "allocated_bytes", "live_bytes"]


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
        owners = sorted((first, name) for name, first in self.apart.items())
        firsts = [first for first, _ in owners]
        spans: dict[str, tuple[int, int]] = {}
        for residence in self.plan.residences or ():
            if residence.offset is not None and residence.offset >= self.arena_bytes:
                owner = owners[bisect.bisect_right(firsts, residence.offset) - 1][1]
                begin, end = spans.get(owner, (residence.begin, residence.end))
                spans[owner] = min(begin, residence.begin), max(end, residence.end)
        alignment = self.plan.machine.scratchpad_memory.alignment_bytes
        nbytes = {name: -(-base.nbytes // alignment) * alignment for name, base in self.plan.graph.buffers.items()}
        return MappingProxyType({name: Allocation(nbytes[name], *span) for name, span in spans.items()})


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
    spans = ((r.begin, r.end, -(-buffers[r.buffer].nbytes // alignment) * alignment) for r in residences)
    return _profile(spans, len(plan.instructions))


def _profile(spans: Iterable[tuple[int, int, int]], steps: int) -> tuple[int, ...]:
    change = [0] * (steps + 1)
    for begin, end, nbytes in spans:
        change[begin] += nbytes
        change[end] -= nbytes
    return tuple(accumulate(change[:steps]))
