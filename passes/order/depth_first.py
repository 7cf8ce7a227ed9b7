"""Each operand's whole history before the next operand's: post-order from the graph's ends."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .problem import OrderProblem, decide

__all__ = ["DepthFirstOrder"]


@dataclass(frozen=True)
class DepthFirstOrder:
    """Depth-first post-order from the operators nothing depends on, predecessors in program order.

    *Given* a plan. *Result*: an order in which an operator runs right after what it needed last; ignores sizes and
    the plan's own order.
    """

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "order/depth_first"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Order the operators; linear time."""
        problem = OrderProblem.of(plan)
        order: list[int] = []
        entered = [False] * len(problem.predecessors)
        for end in (op for op, after in enumerate(problem.successors) if not after):
            _visit(end, problem.predecessors, entered, order)
        return decide(plan, problem, order)


def _visit(end: int, predecessors: tuple[tuple[int, ...], ...], entered: list[bool], order: list[int]) -> None:
    """Append ``end`` after everything it depends on; an explicit stack, as graphs are deeper than Python recurses."""
    entered[end] = True
    stack = [(end, iter(predecessors[end]))]
    while stack:
        op, pending = stack[-1]
        child = next((p for p in pending if not entered[p]), None)
        if child is None:
            order.append(op)
            stack.pop()
        else:
            entered[child] = True
            stack.append((child, iter(predecessors[child])))
