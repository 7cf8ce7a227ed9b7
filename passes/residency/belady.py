"""Furthest next use: the classical replacement rule, here on whole buffers of different sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .emit import emit
from .eviction import evict, refill
from .gaps import GapProblem
from .workset import require_fit

__all__ = ["BeladyResidency", "furthest_next_use"]


@dataclass(frozen=True)
class BeladyResidency:
    """Where room is short, drop the buffer whose next use is furthest away.

    *Given* a plan with an order. *Result*: loads, stores and residences. Optimal for pages of one size (Belady,
    A study of replacement algorithms for a virtual-storage computer, 1966); with sizes and stores it is a heuristic.
    Drops that turn out unnecessary are taken back. ``reserve_bytes`` of the capacity are left free, except where an
    operator needs them, so that addresses find room.
    """

    reserve_bytes: int = 0

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "residency/belady"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide residency, in milliseconds whatever the budget. Raises Infeasible as ``require_fit``."""
        require_fit(plan)
        problem = GapProblem.of(plan, reserve_bytes=self.reserve_bytes)
        dropped = refill(problem, evict(problem, furthest_next_use))
        return Decision(emit(plan, problem, dropped), problem.certificate(dropped))


def furthest_next_use(
    problem: GapProblem,
    resident: Collection[int],
    shortage: Sequence[int],
    stored: Collection[tuple[str, int] | None],
) -> Sequence[int]:
    """The one resident interval that ends last; the larger one of several."""
    return [max(resident, key=lambda i: (problem.intervals[i].end, problem.intervals[i].nbytes, -i))]
