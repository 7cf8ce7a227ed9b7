"""Least cost for the room made: the replacement rule that counts what a victim will cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .emit import emit
from .eviction import evict, refill
from .gaps import GapProblem
from .workset import require_fit

__all__ = ["LeastCostResidency", "least_cost"]


@dataclass(frozen=True)
class LeastCostResidency:
    """Where room is short, drop what costs least: one buffer that is large enough, or several, cheap by the byte.

    *Given* a plan with an order. *Result*: loads, stores and residences. Dropping a buffer whose version backing memory
    holds costs one load, any other a store as well; ties go to the furthest next use. Drops that turn out unnecessary
    are taken back. ``reserve_bytes`` of the capacity are left free, except where an operator needs them, so that
    addresses find room.
    """

    reserve_bytes: int = 0

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "residency/least_cost"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Decide residency, in milliseconds whatever the budget. Raises Infeasible as ``require_fit``."""
        require_fit(plan)
        problem = GapProblem.of(plan, reserve_bytes=self.reserve_bytes)
        dropped = refill(problem, evict(problem, least_cost))
        return Decision(emit(plan, problem, dropped), problem.certificate(dropped))


def least_cost(
    problem: GapProblem,
    resident: Collection[int],
    shortage: Sequence[int],
    stored: Collection[tuple[str, int] | None],
) -> Sequence[int]:
    """The cheaper of the cheapest sufficient interval alone, and cheap ones by the byte until there is room."""
    cost = {i: problem.intervals[i].nbytes * (1 if problem.intervals[i].version in stored else 2) for i in resident}

    def by_rate(i: int) -> tuple[float, int, int]:
        return cost[i] / problem.intervals[i].nbytes, -problem.intervals[i].end, i

    several: list[int] = []
    for i in sorted(resident, key=by_rate):
        several.append(i)
        if _enough(problem, several, shortage):
            break
    sufficient = [i for i in resident if _enough(problem, [i], shortage)]
    single = min(sufficient, key=lambda i: (cost[i], -problem.intervals[i].end, i), default=None)
    if single is None or sum(cost[i] for i in several) < cost[single]:
        return several
    return [single]


def _enough(problem: GapProblem, victims: Sequence[int], shortage: Sequence[int]) -> bool:
    return all(sum(problem.intervals[i].sizes[d] for i in victims) >= short for d, short in enumerate(shortage))
