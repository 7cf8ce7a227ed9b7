"""The same plan with its steps issued in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from ...compiler.plan import Load, Plan, Store
from ...compiler.runtime.device.layout import DevicePlan

__all__ = ["reissued", "uses_of"]


def uses_of(plan: Plan) -> Mapping[str, list[int]]:
    """Steps that use each buffer, in order."""
    index = {op.name: i for i, op in enumerate(plan.graph.ops)}
    uses: dict[str, list[int]] = {}
    for step, instruction in enumerate(plan.instructions):
        if isinstance(instruction, Load | Store):
            touched: tuple[str, ...] = (instruction.buffer,)
        else:
            touched = plan.graph.touches[index[instruction.op]]
        for buffer in touched:
            uses.setdefault(buffer, []).append(step)
    return uses


def reissued(device_plan: DevicePlan, order: Sequence[int]) -> DevicePlan:
    """``device_plan`` with its steps in ``order``, which keeps every two that conflict in theirs; it loses its waits.

    Addresses stay. A residence lasts from the first step that uses it to the last, wherever these have come to be: as
    residences that share bytes conflict, those that followed one another still do.
    """
    plan = device_plan.plan
    position = {step: place for place, step in enumerate(order)}
    uses = uses_of(plan)
    residences = []
    for residence in plan.residences or ():
        places = [position[step] for step in uses[residence.buffer] if residence.begin <= step < residence.end]
        residences.append(msgspec.structs.replace(residence, begin=min(places), end=max(places) + 1))
    residences.sort(key=lambda r: (r.begin, r.buffer))
    steps = tuple(plan.instructions[step] for step in order)
    plan = msgspec.structs.replace(plan, instructions=steps, residences=tuple(residences))
    return replace(device_plan, plan=plan, waits=())
