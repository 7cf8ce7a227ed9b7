"""The order the plan already has."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .problem import OrderProblem, decide

__all__ = ["GivenOrder"]


@dataclass(frozen=True)
class GivenOrder:
    """Keep the plan's own order: the model's program order, unless an earlier pass chose another.

    *Given* a plan. *Result*: its operators in the order it runs them; residences and offsets are dropped.
    """

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "order/given"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Keep the order and state its peak."""
        return decide(plan, OrderProblem.of(plan), plan.order)
