"""The least arena of given residences: how small a scratchpad holds them, and what proves that none smaller does."""

from __future__ import annotations

import msgspec

from ...compiler.pipeline import Budget, run_pass
from ...compiler.plan import Certificate, Plan
from .exact import ExactPlacement
from .packing import Packing

__all__ = ["least_arena"]


def least_arena(plan: Plan, budget: Budget) -> tuple[Plan, Certificate]:
    """Place the residences of ``plan`` in the least arena that can be found, whatever the machine's capacity.

    Returns:
        The placed plan, on the same machine with a scratchpad of just the arena, and the certificate ``arena_bytes``
        (scope ``address``): its bound is at least the bytes of the fullest step; gap 0 means that no smaller scratchpad
        holds these residences. A scratchpad with banks stays as it is, and the arena is the end of its highest region.

    Raises:
        OptionError: the plan has no residences yet.
        PlacementError: they cannot be placed in the machine's banks, or around its pins, at any size.
    """
    packing = Packing.of(plan, "address/exact")
    machine = plan.machine
    banked = bool(machine.scratchpad_memory.banks_bytes)
    if not banked:
        pinned = max((pin.offset or 0 for pin in plan.pins), default=0)
        ample = pinned + sum(packing.units) * packing.alignment
        machine = machine.with_scratchpad(max(machine.scratchpad_memory.capacity_bytes, ample))
    placed = run_pass(ExactPlacement(minimize=True), msgspec.structs.replace(plan, machine=machine), budget)
    certificate = placed.certificates[-1]
    if not banked:
        placed = msgspec.structs.replace(placed, machine=plan.machine.with_scratchpad(max(1, certificate.value)))
    return placed, certificate
