"""PuLP models solved by HiGHS: one call in, and warm start, time limit, stop, progress and bound besides.

PuLP's own adapter copies a model row by row, passes no incumbent in and no bound out. HiGHS looks at its clock only
between certain steps, so the run has a thread of its own: when the time is up and HiGHS does not come back, the caller
gets the best solution HiGHS has reported, and the thread ends at HiGHS's next check. A fresh thread also means a
fresh HiGHS scheduler, which otherwise refuses another number of workers within one process.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import highspy
import numpy as np
import pulp
from numpy.typing import NDArray

from ...compiler.pipeline import Budget
from ...errors import InternalError

__all__ = ["Listener", "Solution", "less_tolerances", "solve", "whole_units"]

#: Called in the caller's thread with the incumbent's objective and the proven bound, each ``None`` while unknown.
Listener = Callable[[float | None, float | None], None]

GRACE_S = 0.5  # how long HiGHS may take to notice that its time is up
POLL_S = 0.02  # how often the caller looks for progress, a stop, or the deadline


@dataclass(frozen=True)
class Solution:
    """What HiGHS found: ``values`` by variable name, their ``objective``, and the proven ``bound`` on any objective.

    ``values`` is empty and ``objective`` ``None`` when no solution was found; ``bound`` is infinite on the safe side
    when nothing was proven. ``status`` is ``"optimal"`` within ``absolute_gap``, ``"feasible"`` when a limit or a stop
    came first, ``"infeasible"``, or ``"unknown"``.
    """

    status: Literal["optimal", "feasible", "infeasible", "unknown"]
    values: Mapping[str, float]
    objective: float | None
    bound: float


def solve(
    problem: pulp.LpProblem,
    budget: Budget,
    *,
    start: Mapping[str, float] | None = None,
    relax: bool = False,
    absolute_gap: float = 0.0,
    max_nodes: int | None = None,
    listen: Listener | None = None,
) -> Solution:
    """Solve ``problem`` within ``budget``; never fails because time ran out or a stop was asked for.

    ``start`` is a solution to begin with, complete or not. ``relax`` drops integrality. The search ends when
    incumbent and bound are no further apart than ``absolute_gap``. ``max_nodes`` limits the search tree by work
    instead of time. ``budget.deterministic`` means one worker.

    Raises:
        InternalError: HiGHS rejects the model or the options.
    """
    run = _HighsRun(problem, budget, start or {}, relax=relax, absolute_gap=absolute_gap, max_nodes=max_nodes)
    if not run.names:
        return Solution("optimal", {}, run.offset, run.offset)
    if budget.remaining_s <= 0:
        return run.outcome_so_far()
    return run.wait(listen or (lambda incumbent, bound: None))


def less_tolerances(bound: float, columns: int) -> float:
    """``bound`` less what the solver's tolerances may have added in a model of ``columns`` variables.

    Each reduced cost may be off by the dual tolerance, 1e-7, over a range of 1; sums by a few units in the last place.
    """
    return bound - 1e-6 - 1e-7 * columns - 1e-9 * abs(bound)


def whole_units(bound: float, columns: int) -> int:
    """The least whole number from 0 that ``bound`` proves where objectives are whole; 0 if nothing is proven."""
    return max(0, math.ceil(less_tolerances(bound, columns))) if math.isfinite(bound) else 0


@dataclass
class _State:
    """What the solver thread has told so far."""

    values: NDArray[np.float64] | None = None
    objective: float | None = None
    bound: float | None = None
    solution: Solution | None = None
    failure: BaseException | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class _HighsRun:
    """One model in one HiGHS instance in one thread."""

    def __init__(
        self,
        problem: pulp.LpProblem,
        budget: Budget,
        start: Mapping[str, float],
        *,
        relax: bool,
        absolute_gap: float,
        max_nodes: int | None,
    ) -> None:
        variables = problem.variables()
        self.names = [variable.name for variable in variables]
        self.offset = float(problem.objective.constant)
        self.minimise = problem.sense == pulp.LpMinimize
        self.is_integer = not relax and any(variable.cat == pulp.LpInteger for variable in variables)
        self.budget = budget
        self.state = _State()
        self.highs = highspy.Highs()
        for option, value in _options(budget, absolute_gap, max_nodes).items():
            _require(self.highs.setOptionValue(option, value), f"option {option} = {value}")
        if self.names:
            _require(self.highs.passModel(*_arrays(problem, variables, relax=relax)), "the model")
        known = [i for i, name in enumerate(self.names) if name in start]
        if known:
            values = np.array([start[self.names[i]] for i in known], dtype=np.float64)
            _require(self.highs.setSolution(len(known), np.array(known, dtype=np.int32), values), "the warm start")

    def wait(self, listen: Listener) -> Solution:
        """Run to the end, the deadline or the stop, whichever comes first."""
        thread = threading.Thread(target=self._run, name="highs")
        thread.start()
        told: tuple[float | None, float | None] = (None, None)
        try:
            patience = GRACE_S
            while not self.state.done.wait(POLL_S) and patience > 0:
                now = self.state.objective, self.state.bound
                if now != told:
                    told = now
                    listen(*now)
                if self.budget.remaining_s <= 0:
                    self.state.cancelled.set()
                    patience -= POLL_S
        finally:
            self.state.cancelled.set()
        if self.state.failure is not None:
            raise self.state.failure
        return self.state.solution or self.outcome_so_far()

    def outcome_so_far(self) -> Solution:
        """What has been reported by callbacks; nothing before the first one."""
        bound = self._nothing_proven() if self.state.bound is None else self.state.bound
        if self.state.values is None:
            return Solution("unknown", {}, None, bound)
        return Solution("feasible", self._named(self.state.values), self.state.objective, bound)

    def _run(self) -> None:
        try:
            self._subscribe()
            _require(self.highs.run(), "the run")
            self.state.solution = self._result()
        except BaseException as error:  # handed over to the caller's thread
            self.state.failure = error
        finally:
            self.state.done.set()

    def _subscribe(self) -> None:
        def interrupt(event: Any) -> None:
            if self.state.cancelled.is_set():
                event.data_in.user_interrupt = True

        def improved(event: Any) -> None:
            self.state.values = np.array(event.data_out.mip_solution, dtype=np.float64)
            self.state.objective = float(event.data_out.objective_function_value)

        def searched(event: Any) -> None:
            interrupt(event)
            bound = float(event.data_out.mip_dual_bound)
            if math.isfinite(bound):
                self.state.bound = bound

        self.highs.cbSimplexInterrupt += interrupt
        self.highs.cbIpmInterrupt += interrupt
        if self.is_integer:
            self.highs.cbMipImprovingSolution += improved
            self.highs.cbMipInterrupt += searched

    def _result(self) -> Solution:
        status = self.highs.getModelStatus()
        info = self.highs.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return Solution("infeasible", {}, None, -self._nothing_proven())
        optimal = status == highspy.HighsModelStatus.kOptimal
        objective = float(info.objective_function_value)
        if self.is_integer:
            bound = float(info.mip_dual_bound)
            bound = bound if math.isfinite(bound) else self._nothing_proven()
        else:
            bound = objective if optimal else self._nothing_proven()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return Solution("unknown", {}, None, bound)
        values = np.array(self.highs.getSolution().col_value, dtype=np.float64)
        return Solution("optimal" if optimal else "feasible", self._named(values), objective, bound)

    def _named(self, values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def _nothing_proven(self) -> float:
        return -math.inf if self.minimise else math.inf


def _options(budget: Budget, absolute_gap: float, max_nodes: int | None) -> dict[str, object]:
    options: dict[str, object] = {
        "output_flag": False,
        "threads": 1 if budget.deterministic else max(1, budget.workers),
        "random_seed": budget.seed % 2**31,
        "time_limit": max(budget.deadline - time.monotonic(), 0.0),
        "mip_rel_gap": 0.0,
        "mip_abs_gap": absolute_gap,
        "mip_detect_symmetry": False,  # does not look at the clock: measured 34 s against a limit of 5 s
    }
    if max_nodes is not None:
        options["mip_max_nodes"] = max_nodes
    return options


def _arrays(problem: pulp.LpProblem, variables: list[Any], *, relax: bool) -> tuple[Any, ...]:
    """The arguments of ``Highs.passModel``: sizes, offset, costs, bounds, and the rows in compressed form."""
    column = {variable: i for i, variable in enumerate(variables)}
    cost = np.zeros(len(variables))
    for variable, coefficient in problem.objective.items():
        cost[column[variable]] = coefficient
    rows = problem.constraints()
    starts: list[int] = [0]
    indices: list[int] = []
    values: list[float] = []
    for row in rows:
        indices.extend(column[variable] for variable in row)
        values.extend(row.values())
        starts.append(len(indices))
    rhs = np.array([-row.constant for row in rows], dtype=np.float64)
    senses = np.array([row.sense for row in rows], dtype=np.int64)
    integrality = [0 if relax or variable.cat != pulp.LpInteger else 1 for variable in variables]
    return (
        len(variables),
        len(rows),
        len(indices),
        int(highspy.MatrixFormat.kRowwise),
        int(highspy.ObjSense.kMinimize if problem.sense == pulp.LpMinimize else highspy.ObjSense.kMaximize),
        float(problem.objective.constant),
        cost,
        np.array([-np.inf if v.lowBound is None else v.lowBound for v in variables], dtype=np.float64),
        np.array([np.inf if v.upBound is None else v.upBound for v in variables], dtype=np.float64),
        np.where(senses == pulp.LpConstraintLE, -np.inf, rhs),
        np.where(senses == pulp.LpConstraintGE, np.inf, rhs),
        np.array(starts[:-1], dtype=np.int32),
        np.array(indices, dtype=np.int32),
        np.array(values, dtype=np.float64),
        np.array(integrality, dtype=np.int32),
    )


def _require(status: object, what: str) -> None:
    if status == highspy.HighsStatus.kError:
        raise InternalError(f"HiGHS rejects {what}", hint="please report this")
