"""Where each buffer lies: in the arena, or in memory that is allocated apart."""

from __future__ import annotations

from types import MappingProxyType

import msgspec

from ...compiler.pipeline import Budget
from ...compiler.plan import Plan
from ...compiler.runtime.device.layout import DevicePlan
from ..address.gaps import PRIORITIES, best_of
from ..address.packing import Packing

__all__ = ["place"]


def place(plan: Plan, apart: frozenset[str], hosts: frozenset[str], budget: Budget) -> DevicePlan:
    """Offsets for ``plan``'s residences."""
    residences = plan.residences or ()
    memory = plan.machine.scratchpad_memory
    alignment = memory.alignment_bytes
    nbytes = {name: -(-base.nbytes // alignment) * alignment for name, base in plan.graph.buffers.items()}
    inside = [r for r in residences if r.buffer not in apart]
    room = msgspec.structs.replace(memory, capacity_bytes=sum(nbytes.values()) or alignment, banks_bytes=())
    packing = Packing.of_spans(plan, room, [(r.buffer, r.begin, r.end) for r in inside])
    offsets = [o * alignment for o in best_of(packing, packing.items, PRIORITIES)]
    place_of = dict(zip((r.buffer for r in inside), offsets, strict=True))
    arena = max((place_of[r.buffer] + nbytes[r.buffer] for r in inside), default=0)
    behind = arena
    ranges: dict[str, int] = {}
    for residence in residences:
        if residence.buffer in apart:
            ranges[residence.buffer] = behind
            behind += nbytes[residence.buffer]
    place_of.update(ranges)
    machine = plan.machine.with_scratchpad(max(behind, alignment))
    placed = tuple(msgspec.structs.replace(r, offset=place_of[r.buffer]) for r in residences)
    return DevicePlan(
        msgspec.structs.replace(plan, machine=machine, residences=placed), arena, MappingProxyType(ranges)
    )
