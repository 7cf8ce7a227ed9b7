"""List scheduling by memory: always the ready operator that lets the live bytes grow least."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipeline import Budget, Decision
from ...compiler.plan import Plan
from .problem import OrderProblem, decide

__all__ = ["GreedyOrder", "list_schedule"]


@dataclass(frozen=True)
class GreedyOrder:
    """Run the ready operator with the least growth in live bytes, then the least added meanwhile, then program order.

    *Given* a plan. *Result*: an order. With ``left[b]`` the users of buffer ``b`` still to run, operator ``i`` adds
    the footprints of its buffers that are not live yet and frees those it is the last to use; the growth is the
    difference.
    """

    @property
    def name(self) -> str:
        """Path name of the pass."""
        return "order/greedy"

    def apply(self, plan: Plan, budget: Budget) -> Decision:
        """Order the operators; time grows with operators times ready operators."""
        problem = OrderProblem.of(plan)
        return decide(plan, problem, list_schedule(problem))


def list_schedule(problem: OrderProblem) -> list[int]:
    """Operators by least growth in live bytes among those that are ready."""
    left = [len(users) for users in problem.users]
    waiting = [len(before) for before in problem.predecessors]
    ready = [op for op, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:
        op = min(ready, key=lambda i: (*_growth(problem, left, i), i))
        ready.remove(op)
        order.append(op)
        for buffer in problem.touches[op]:
            left[buffer] -= 1
        for after in problem.successors[op]:
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
    return order


def _growth(problem: OrderProblem, left: list[int], op: int) -> tuple[int, int]:
    touched = problem.touches[op]
    added = sum(problem.footprint[b] for b in touched if left[b] == len(problem.users[b]))
    freed = sum(problem.footprint[b] for b in touched if left[b] == 1)
    return added - freed, added
