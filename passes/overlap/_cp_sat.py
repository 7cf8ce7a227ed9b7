"""CP-SAT models minimised within a budget: limits, one worker where a clock may not decide, and Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ortools.sat.python import cp_model

from ...compiler.pipeline import Budget
from ...errors import InternalError

__all__ = ["Outcome", "minimised"]

POLL_S = 0.02  # how often a running solver is asked to stop, if it should


@dataclass(frozen=True)
class Outcome:
    """``value`` reads a variable or literal of the best solution, ``None`` without one; ``bound`` holds for all."""

    value: Callable[[Any], int] | None
    objective: float | None
    bound: float
    infeasible: bool = False


def minimised(model: cp_model.CpModel, budget: Budget, *, effort: float, relative_gap: float = 1e-3) -> Outcome:
    """Minimise within ``budget``, and within ``effort`` deterministic seconds where clocks should not decide.

    Solved by one worker on another thread, so that this one hears Ctrl-C and can tell the solver to stop.

    Raises:
        InternalError: CP-SAT rejects the model.
    """
    solver = cp_model.CpSolver()
    solver.parameters.random_seed = budget.seed
    solver.parameters.catch_sigint_signal = False
    solver.parameters.relative_gap_limit = relative_gap
    solver.parameters.num_workers = 1  # as is this: a second worker takes the first one's time for local search
    solver.parameters.linearization_level = 0  # measured on layers: proofs within seconds, otherwise none in a minute
    solver.parameters.max_time_in_seconds = budget.remaining_s
    if budget.deterministic:
        solver.parameters.max_deterministic_time = effort
    statuses: list[cp_model.CpSolverStatus] = []
    worker = threading.Thread(target=lambda: statuses.append(solver.solve(model)), daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(POLL_S)
        if budget.stop.is_set():
            solver.stop_search()
    status = statuses[0]
    if status == cp_model.MODEL_INVALID:
        raise InternalError(f"CP-SAT rejects a model: {model.validate()}", hint="please report this")
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Outcome(lambda v: int(solver.value(v)), solver.objective_value, solver.best_objective_bound)
    return Outcome(None, None, max(0.0, solver.best_objective_bound), status == cp_model.INFEASIBLE)
