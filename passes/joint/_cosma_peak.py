"""COSMA's model of peak memory (MPMF): the order of least peak when nothing is moved twice."""

from __future__ import annotations

import time

from ...compiler.pipeline import Budget, Decision, Progress
from ...compiler.plan import Certificate, Plan
from .._solver.highs import whole_units
from ..order.problem import OrderProblem
from ._cosma_crossing import crossing_peak
from ._cosma_model import CosmaModel
from ._cosma_problem import CosmaProblem
from ._cosma_solutions import first_fetches
from ._cosma_solve import MAX_STEPS, ended, solved, too_large

__all__ = ["least_peak"]


def least_peak(name: str, plan: Plan, budget: Budget, *, cuts: bool) -> Decision:
    """Eq. 13 to 15: the order of least peak when every buffer stays from its first to its last use.

    ``cuts`` takes what is alive at one operator in every order as a bound; ``name`` is the pass that is told about.
    """
    begin = time.monotonic()
    problem = OrderProblem.of(plan)
    order, value, analytic = plan.order, problem.peak_bytes(plan.order), problem.largest_working_set()
    bound, note = analytic, ""
    if value > analytic and len(plan.graph.ops) > MAX_STEPS:
        note = f"a model of {len(plan.graph.ops)} steps is too large; this is the given order"
    elif value > analytic and budget.remaining_s > 0:
        of = CosmaProblem.of(plan, 0, fixed=False)
        if cuts:
            bound = analytic = max(analytic, crossing_peak(plan.graph, of))
        if value > bound:
            order, proven, note = _search_peak(name, of, problem, plan.order, budget)
            value, bound = problem.peak_bytes(order), max(bound, proven)
    elif value > analytic:
        note = "the time limit came first"
    budget.listen(Progress(name, time.monotonic() - begin, value, bound))
    certificate = Certificate("peak_bytes", value, bound, "ilp" if bound > analytic else "analytic", "order")
    return Decision(plan.with_order(order), certificate, note)


def _search_peak(
    name: str, of: CosmaProblem, problem: OrderProblem, start: tuple[int, ...], budget: Budget
) -> tuple[tuple[int, ...], int, str]:
    """An order no worse than ``start``, what no order's peak is below, and a remark."""
    if refusal := too_large("model", of, of.terms(), budget):
        return start, 0, refusal
    begin = time.monotonic()
    value = problem.peak_bytes(start)
    model = CosmaModel(of, peak=True)

    def listen(objective: float | None, bound: float | None) -> None:
        found = value if objective is None else min(value, of.unit * round(objective))
        proven = 0 if bound is None else min(found, of.unit * whole_units(bound, model.columns))
        budget.listen(Progress(name, time.monotonic() - begin, found, proven))

    solution = solved(model, model.start((start, first_fetches(of, start))), budget, listen)
    decided = model.decided(solution.values) if solution.values else None
    candidates = [start] if decided is None else [decided[0], start]
    best = min(candidates, key=problem.peak_bytes)
    proven = min(problem.peak_bytes(best), of.unit * whole_units(solution.bound, model.columns))
    return best, proven, f"{model.columns:,} columns, {ended(solution, budget)}"
