"""The order whose live bytes never rise as high as any other order's must, proven where the search ends by itself."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from ...errors import OptionError
from ._peak_search import EFFORT, LeastPeak, certificate, least_peak_order, plain_bound
from .problem import OrderProblem

__all__ = ["LeastPeak", "LeastPeakOrder", "least_peak_order"]


@dataclass(frozen=True)
class LeastPeakOrder:
    """Find the order of least peak memory, with a bound that holds for every order.

    *Given* a plan. *Result*: the order of least peak, live bytes counted as the scratchpad's alignment rounds them up;
    never worse than the plan's own.

    Formulation: ``live(D)`` bytes are live after the down-set ``D`` of operators ran, whatever their order, and
    ``during(D, o)`` while ``o`` runs next. An order is a path of down-sets from none to all, and its peak the largest
    ``during`` on it. Down-sets are reached within a capacity that begins at the largest working set and, when nothing
    more can be reached, rises to the least that opens another one: a lower bound on every order's peak until the path
    is complete, and then the optimum. A chain of operators, each made ready by the one before, that ends with no more
    live bytes than it began with is run at once and nothing else is tried: ``live`` is submodular, so it can be moved
    to here in any order that fits. The same is done from the last operators backwards, in turns, and both ends share
    the capacity. ``effort`` is the number of down-sets expanded in deterministic mode; otherwise time is the limit.
    """

    effort: int = EFFORT

    def __post_init__(self) -> None:
        if self.effort < 1:
            raise OptionError(f"order/least_peak: option 'effort' is {self.effort}; it takes 1 or more")

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "order/least_peak"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Search within ``budget``; returns the best order found when it ends or is told to stop."""
        problem = OrderProblem.of(plan)
        found = least_peak_order(problem, budget, start=plan.order, effort=self.effort)
        bound = plain_bound(problem, found, budget, effort=self.effort)
        note = ""
        if problem.footprint != problem.nbytes:
            note = f"{found.peak:,} bytes as aligned, at least {found.bound:,} in any order"
        proven = certificate(problem, problem.peak_bytes(found.order), bound)
        return Decision(plan.with_order(found.order), proven, note)
