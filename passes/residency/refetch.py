"""No residency at all: every operator loads what it needs and stores what is needed later."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .emit import emit
from .gaps import GapProblem
from .workset import require_fit

__all__ = ["RefetchResidency"]


@dataclass(frozen=True)
class RefetchResidency:
    """Drop every gap: the baseline that keeps nothing between operators, and always finds addresses.

    *Given* an order. *Result*: residences that last for one operator each, so that each working set is laid out
    afresh; whatever fits the scratchpad operator by operator fits this way.
    """

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "residency/refetch"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Drop everything. Raises Infeasible when an operator does not fit alone."""
        require_fit(plan)
        problem = GapProblem.of(plan)
        dropped = range(len(problem.intervals))
        return Decision(emit(plan, problem, dropped), problem.certificate(dropped))
