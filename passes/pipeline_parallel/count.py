"""A bound on the makespan by counting: no schedule is shorter if not even fractions of microbatches are.

The time-indexed model of `_counts`: as a linear program, solved by HiGHS, and with whole numbers, by CP-SAT. What is
shown to be infeasible within some time is a bound; rounding is down, so it holds for exact times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pulp
from ortools.sat.python import cp_model

from ...compiler.pipeline import Budget
from ...compiler.pipelining.problem import PipelineProblem
from ...errors import OptionError
from .._solver import highs
from ._counts import Counts, counts_of
from ._cp_sat import minimised
from ._lines import lines_of
from .bounds import View
from .solution import Bound

__all__ = ["bound_by_counting", "steps_for"]

_MISSING = 1e-3  # of a start: what a linear program has to miss before it counts as infeasible


def bound_by_counting(
    problem: PipelineProblem,
    budget: Budget,
    *,
    bound: Bound,
    most: int,
    unit: int,
    whole_numbers: bool = False,
    effort: float = 20.0,
) -> Bound:
    """The highest makespan bound that counting proves within ``budget``, at least ``bound``, at most ``most``.

    ``most`` is the makespan of a known schedule, ``unit`` the step that times are rounded down to: `steps_for` chooses.
    ``whole_numbers`` goes on, with CP-SAT, where the linear program finds nothing more; ``effort`` is its limit in
    deterministic seconds for each time, in deterministic mode only.

    Raises:
        OptionError: ``unit`` is less than 1.
    """
    if unit < 1:
        raise OptionError(f"times are to be rounded to steps of {unit}; the least is 1")
    view = View(lines_of(problem), thorough=True)
    proved = _highest(lambda end: _misses(view, end, unit, budget), bound.value // unit, most // unit, budget)
    best = Bound(proved * unit, "lp") if proved * unit > bound.value else bound
    if not whole_numbers:
        return best
    more = _highest(lambda end: _contradicts(view, end, unit, budget, effort), best.value // unit, most // unit, budget)
    return Bound(more * unit, "cp") if more * unit > best.value else best


def steps_for(problem: PipelineProblem, most: int, steps: int = 300) -> int:
    """The unit of at most ``steps`` in ``most`` that rounding the busiest rank's times down loses least by."""
    rank = max(range(problem.ranks), key=lambda index: problem.work_ns[index])
    lines = [line for line in lines_of(problem).lines if line.machine == (rank, False)]
    least = max(1, -(-most // steps))
    longest = max([line.duration for line in lines], default=1)

    def kept(unit: int) -> tuple[int, int]:
        return sum(line.count * (line.duration // unit) * unit for line in lines), unit

    candidates = {least, *(line.duration // parts for line in lines for parts in range(1, 1 + longest // least))}
    return max((unit for unit in candidates if unit >= least), key=kept)


def _highest(infeasible: Callable[[int], bool], low: int, high: int, budget: Budget) -> int:
    """The first step that is not shown to be infeasible, from ``low`` on: by steps that double, then by halves."""
    reach = 1
    while low < high and not budget.halted():
        probe = min(low + reach - 1, high - 1)
        if infeasible(probe):
            low, reach = probe + 1, 2 * reach
        elif probe == low:
            break
        else:
            high, reach = probe, max(1, reach // 4)
    return low


def _model(view: View, end: int, unit: int) -> Counts | None:
    """Schedules that end within step ``end``; ``None`` if a task has no time at all."""
    first, behind = view.ahead(None), view.behind(None)
    lines = view.lines
    latest = (end + 1) * unit - 1
    last = [latest - behind[index] - line.duration for index, line in enumerate(lines.lines)]
    if any(bool(np.any(early // unit > late // unit)) for early, late in zip(first, last, strict=True)):
        return None
    return counts_of(lines, first, last, unit)


def _misses(view: View, end: int, unit: int, budget: Budget) -> bool:
    """Whether the linear program shows that some starts come too late."""
    counts = _model(view, end, unit)
    if counts is None:
        return True
    problem = pulp.LpProblem("counts", pulp.LpMinimize)
    variables = [problem.add_variable(f"x{index}", 0, high) for index, high in enumerate(counts.high)]
    problem += variables[0]
    for terms, most in counts.rows:
        problem += pulp.LpAffineExpression([(variables[index], factor) for index, factor in terms]) <= most
    solution = highs.solve(problem, budget, relax=True)
    return solution.status == "optimal" and highs.less_tolerances(solution.bound, len(variables)) > _MISSING


def _contradicts(view: View, end: int, unit: int, budget: Budget, effort: float) -> bool:
    """Whether whole numbers show it."""
    counts = _model(view, end, unit)
    if counts is None:
        return True
    model = cp_model.CpModel()
    variables = [model.new_int_var(0, high if index else 0, "") for index, high in enumerate(counts.high)]
    for terms, most in counts.rows:
        model.add(sum(variables[index] * factor for index, factor in terms) <= most)
    outcome = minimised(model, budget, effort=effort, found=lambda _: None, bounded=lambda _: None)
    return outcome.status == "none"
