"""Best fit: each residence in the smallest gap that holds it throughout its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .first_fit import place_by_gaps

__all__ = ["BestFit"]


@dataclass(frozen=True)
class BestFit:
    """Place residences one by one in the smallest gap that holds them, largest first by ``order``; ``best`` tries all.

    *Given* a plan with residences. *Result*: their offsets. Orders as in ``address/first_fit``; leaves large gaps
    whole for those that come later.
    """

    order: Literal["best", "size", "lifetime", "area", "begin"] = "best"

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "address/best_fit"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Place all residences. Raises PlacementError when they end above the capacity, proven or not."""
        return place_by_gaps(plan, self.name, self.order, tightest=True)
