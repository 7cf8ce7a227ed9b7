"""Least cost for the room made: the replacement rule that counts what a victim will cost."""

from __future__ import annotations

import heapq
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
    intervals = problem.intervals
    cost = {i: intervals[i].nbytes * (1 if intervals[i].version in stored else 2) for i in resident}
    by_rate = [(cost[i] / intervals[i].nbytes, -intervals[i].end, i) for i in resident]
    heapq.heapify(by_rate)
    several: list[int] = []
    left = list(shortage)
    while by_rate and max(left) > 0:
        several.append(heapq.heappop(by_rate)[2])
        left = [short - size for short, size in zip(left, intervals[several[-1]].sizes, strict=True)]
    sufficient = [i for i in resident if not any(map(int.__lt__, intervals[i].sizes, shortage))]
    single = min(sufficient, key=lambda i: (cost[i], -intervals[i].end, i), default=None)
    if single is None or sum(cost[i] for i in several) < cost[single]:
        return several
    return [single]
