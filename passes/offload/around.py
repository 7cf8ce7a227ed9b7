"""Plans that move what they must around buffers that are allocated apart and stay from first to last use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from ...compiler.graph import Graph, OpKind
from ...compiler.pipeline import Budget, run_pass
from ...compiler.plan import Pin, Plan, Residence
from ...compiler.runtime.device.layout import DevicePlan, allocated_bytes
from ...compiler.simulate import simulate
from ...compiler.verify import verify
from ...errors import Infeasible
from ...hw_models.model import HardwareModel
from ..device.placement import place
from ..latency.prefetch import Prefetch
from ..residency.ilp import IlpResidency
from ..residency.recompute import RecomputeResidency

__all__ = ["Around", "placed_around"]

RESERVES = (0, 32, 12, 6)  # n-th parts of the room left free, because bytes have addresses; 0: none


@dataclass(frozen=True)
class Around:
    """What plans have in common: the machine, the order, and what is ``apart``; ``hosts`` may hold others meanwhile."""

    machine: HardwareModel
    order: tuple[int, ...]
    apart: frozenset[str]
    hosts: frozenset[str]


def placed_around(graph: Graph, around: Around, room: int, budget: Budget) -> DevicePlan | None:
    """The fastest plan of ``graph`` found whose arena and storages apart never take more than ``room`` bytes together.

    Residency counts bytes: the sum of what is resident at a step is at most the room, less a reserve that grows until
    places are found. ``None`` where none are.
    """
    for reserve in RESERVES:
        capacity = room - (room // reserve if reserve else 0)
        found = [*_within(graph, around, capacity, room, budget.share(0.4))]
        if found:
            return min(found, key=_seconds)
        if budget.halted():
            return None
    return None


def _within(graph: Graph, around: Around, capacity: int, room: int, budget: Budget) -> Iterator[DevicePlan]:
    """Placed plans in which no more than ``capacity`` bytes are resident at once, as counted."""
    alignment = around.machine.scratchpad_memory.alignment_bytes
    capacity = max(alignment, capacity // alignment * alignment)
    ordered = Plan.of_order(graph, around.machine.with_scratchpad(capacity), around.order)
    pins = tuple(Pin(name, resident=True) for name in sorted(around.apart) if graph.buffers[name].nbytes)
    ordered = msgspec.structs.replace(ordered, pins=pins)
    try:
        resident = run_pass(IlpResidency(), ordered, budget.share(0.4))
        spills = verify(msgspec.structs.replace(resident, passes=())).additional_bytes > 0
        yield from _placed(resident, around, room, budget.share(0.5))
        if spills and not budget.halted():
            again = run_pass(RecomputeResidency(objective="latency"), ordered, budget.share(0.5))
            yield from _placed(again, around, room, budget)
    except Infeasible:  # the reserve leaves some operator too little
        return


def _placed(resident: Plan, around: Around, room: int, budget: Budget) -> Iterator[DevicePlan]:
    """``resident`` with its transfers where compute hides them, if places are found; and as it is, if not then."""
    for plan in (run_pass(Prefetch(), resident, budget.share(0.5)), resident):
        framed = _framed(plan)
        found = place(
            msgspec.structs.replace(framed, pins=(), passes=()), around.apart, around.hosts, budget, limit_bytes=room
        )
        if max(allocated_bytes(found), default=found.arena_bytes) <= room and _is_unique(found):
            yield replace(found, plan=simulate(found.plan))
            return


def _is_unique(placed: DevicePlan) -> bool:
    """Whether no buffer has memory of its own and other residences beside: its name stands for one allocation."""
    stays = Counter(residence.buffer for residence in placed.plan.residences or ())
    return all(stays[name] == 1 for name in placed.apart)


def _framed(plan: Plan) -> Plan:
    """``plan`` with what receives first and what returns last: transfers between them, where memory is as they say."""
    boundary = {op.name: -1 if not op.inputs else 1 for op in plan.graph.ops if op.kind is OpKind.BOUNDARY}
    sides = [boundary.get(getattr(instruction, "op", ""), 0) for instruction in plan.instructions]  # 0: in between
    steps = sorted(range(len(sides)), key=lambda step: (sides[step], step))
    number = {step: position for position, step in enumerate(steps)}
    touched = {op.name: set(touches) for op, touches in zip(plan.graph.ops, plan.graph.touches, strict=True)}
    moved = []
    for residence in plan.residences or ():
        inside = [
            number[step]
            for step in range(residence.begin, residence.end)
            if not sides[step] or residence.buffer in touched[getattr(plan.instructions[step], "op", "")]
        ]
        moved.append(Residence(residence.buffer, residence.memory, min(inside), max(inside) + 1))
    moved.sort(key=lambda residence: (residence.begin, residence.buffer))
    instructions = tuple(plan.instructions[step] for step in steps)
    return msgspec.structs.replace(plan, instructions=instructions, residences=tuple(moved))


def _seconds(placed: DevicePlan) -> float:
    return max((i.finish_s or 0.0 for i in placed.plan.instructions), default=0.0)
