"""Each operand's whole history before the next operand's: post-order from the graph's ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .problem import OrderProblem, decide

__all__ = ["DepthFirstOrder"]


@dataclass(frozen=True)
class DepthFirstOrder:
    """Depth-first post-order from the operators nothing depends on; predecessors in the order their results are read.

    *Given* a plan. *Result*: an order in which an operator runs right after what it needed last, as a recursive
    evaluation of the outputs would; ignores sizes and the plan's own order.
    """

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "order/depth_first"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Order the operators; linear time."""
        problem = OrderProblem.of(plan)
        predecessors = [_in_operand_order(problem, op) for op in range(len(problem.predecessors))]
        order: list[int] = []
        entered = [False] * len(problem.predecessors)
        for end in (op for op, after in enumerate(problem.successors) if not after):
            _visit(end, predecessors, entered, order)
        return decide(plan, problem, order)


def _in_operand_order(problem: OrderProblem, op: int) -> list[int]:
    """Predecessors by the first operand of ``op`` that they wrote; those that only have to be past come last."""
    touched = problem.touches[op]

    def position(before: int) -> int:
        return next((k for k, b in enumerate(touched) if b in problem.writes[before]), len(touched))

    return sorted(problem.predecessors[op], key=lambda before: (position(before), before))


def _visit(end: int, predecessors: Sequence[Sequence[int]], entered: list[bool], order: list[int]) -> None:
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
