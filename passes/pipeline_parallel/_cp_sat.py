"""A CP-SAT model minimised within a budget: progress told, Ctrl-C heard, repeatable where that is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ortools.sat.python import cp_model

from ...compiler.pipeline import Budget
from ...errors import InternalError

__all__ = ["Outcome", "Reader", "minimised"]

POLL_S = 0.02  # how often a running solver is asked to stop, if it should

#: Reads the value of a variable or literal in a solution.
Reader = Callable[[Any], int]


@dataclass(frozen=True)
class Outcome:
    """``bound`` holds for all solutions; ``"none"`` says that there are none, ``"unknown"`` that none was found."""

    status: Literal["optimal", "found", "none", "unknown"]
    bound: float


def minimised(
    model: cp_model.CpModel,
    budget: Budget,
    *,
    effort: float,
    found: Callable[[Reader], None],
    bounded: Callable[[float], None],
) -> Outcome:
    """Minimise within ``budget``, and within ``effort`` deterministic seconds where clocks should not decide.

    ``found`` gets each better solution, ``bounded`` each better bound, on the solver's threads. The solver has a thread
    of its own, so that this one hears Ctrl-C and can tell it to stop.

    Raises:
        InternalError: CP-SAT rejects the model.
    """
    solver = _solver(budget, effort)
    solver.best_bound_callback = bounded
    told = _Told(found)
    statuses: list[cp_model.CpSolverStatus] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            statuses.append(solver.solve(model, told))
        except BaseException as error:  # handed over to the caller's thread
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True, name="cp-sat")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            if budget.halted():
                solver.stop_search()
    except BaseException:
        solver.stop_search()
        thread.join()
        raise
    for failure in (*told.failures, *failures):
        raise failure
    return _outcome(model, solver, statuses[0])


def _solver(budget: Budget, effort: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.random_seed = budget.seed % 2**31
    parameters.catch_sigint_signal = False
    parameters.num_workers = 1 if budget.deterministic else max(1, budget.workers)
    if budget.deterministic:
        parameters.max_deterministic_time = effort
    else:
        parameters.max_time_in_seconds = budget.remaining_s
    return solver


def _outcome(model: cp_model.CpModel, solver: cp_model.CpSolver, status: cp_model.CpSolverStatus) -> Outcome:
    if status == cp_model.MODEL_INVALID:
        raise InternalError(f"CP-SAT rejects a model: {model.validate()}", hint="please report this")
    names: dict[Any, Literal["optimal", "found", "none"]] = {
        cp_model.OPTIMAL: "optimal",
        cp_model.FEASIBLE: "found",
        cp_model.INFEASIBLE: "none",
    }
    return Outcome(names.get(status, "unknown"), solver.best_objective_bound)


class _Told(cp_model.CpSolverSolutionCallback):
    """Hands solutions on; an exception there must not go through the solver's C++, so it is kept and raised later."""

    def __init__(self, found: Callable[[Reader], None]) -> None:
        super().__init__()
        self._found = found
        self.failures: list[BaseException] = []

    def on_solution_callback(self) -> None:
        try:
            self._found(lambda variable: int(self.value(variable)))
        except BaseException as error:  # raised in the caller's thread
            self.failures.append(error)
            self.stop_search()
