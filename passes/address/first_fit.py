"""First fit: each residence at the lowest place that is free throughout its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .gaps import PRIORITIES, best_of
from .packing import Packing
from .placement import check_fullest_step, no_placement, placed

__all__ = ["FirstFit"]


@dataclass(frozen=True)
class FirstFit:
    """Place residences one by one at the lowest free offset, largest first by ``order``; ``best`` tries all orders.

    *Given* a plan with residences. *Result*: their offsets. Residences that share no step with others are packed
    apart. Orders: ``size`` (bytes), ``lifetime`` (steps), ``area`` (their product), ``begin`` (first step first).
    """

    order: Literal["best", "size", "lifetime", "area", "begin"] = "best"

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "address/first_fit"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Place all residences. Raises PlacementError when they end above the capacity, proven or not."""
        return place_by_gaps(plan, self.name, self.order, tightest=False)


def place_by_gaps(plan: Plan, name: str, order: str, *, tightest: bool) -> Decision:
    """Place each component of ``plan``'s residences in the best of the orders. Raises PlacementError."""
    packing = Packing.of(plan, name)
    bound = check_fullest_step(packing)
    offsets = [0] * len(packing.items)
    for items in packing.components():
        chosen = best_of(packing, items, PRIORITIES if order == "best" else (order,), tightest=tightest)
        for item, offset in zip(items, chosen, strict=True):
            offsets[item] = offset
    arena = packing.arena_bytes(packing.items, offsets)
    if arena > packing.capacity:
        above = [i for i, o in enumerate(offsets) if not packing.lies_within(i, o, packing.capacity)]
        around = {i for i in packing.items if any(packing.overlap(i, other) for other in above)}
        raise no_placement(packing, sorted(around), proven=False, required_bytes=arena)
    return placed(plan, packing, offsets, bound=bound)
