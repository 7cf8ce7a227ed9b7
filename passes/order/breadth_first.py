"""Level by level: every operator as soon as all its predecessors' level is done."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .problem import OrderProblem, decide, depths

__all__ = ["BreadthFirstOrder"]


@dataclass(frozen=True)
class BreadthFirstOrder:
    """Operators by level, a level being the longest path of dependencies that leads to it; then program order.

    *Given* a plan. *Result*: an order that keeps all branches equally far; a baseline that usually needs the most
    memory. Ignores sizes and the plan's own order.
    """

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "order/breadth_first"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Order the operators; linear time."""
        problem = OrderProblem.of(plan)
        level = depths(problem.predecessors)
        return decide(plan, problem, sorted(range(len(level)), key=lambda op: (level[op], op)))
