"""The best schedule of a small pipeline problem, with a bound, by constraint programming."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from ...compiler.pipeline import Budget, Progress
from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from ...compiler.pipelining.simulate import timed
from ...compiler.pipelining.tasks import tasks_of
from ...errors import Infeasible, InternalError, OptionError
from ._cp_sat import Reader, minimised
from ._heads import Times
from ._intervals import Grid, Intervals
from ._lines import Edge, Lines, lines_of
from .bounds import View
from .solution import Bound, Objective, value_of, within_limit

__all__ = ["solve_exact"]

_NAME = "pipeline/exact"


def solve_exact(
    problem: PipelineProblem,
    objective: Objective,
    budget: Budget,
    *,
    hint: TimedSchedule | None = None,
    bound: Bound,
    effort: float = 20.0,
    steps: int | None = None,
) -> tuple[PipelineSchedule | None, Bound]:
    """The best schedule found within ``budget`` that keeps the memory limit, and the best bound proved.

    The schedule is better than ``hint``, or ``None`` if no better one was found; without one that keeps the limit it
    is the best found, or ``None``. Nothing is lost by the model: each task takes the microbatches of a route in order,
    as they are alike; routes are interleaved in any way; backward passes are whole or in halves, each as is best.
    The simulator judges what is found. Starting later than possible is not in the schedule's language, so the bound may
    stay below the best schedule where that would pay: for copies to the host, and for the first start of a span.

    ``steps`` is the number of steps that time is rounded to, none if ``None``; rounding is down, so the bound holds.
    ``effort`` is the limit in CP-SAT's deterministic seconds, used in deterministic mode only. ``budget.listen`` hears
    of every better schedule and bound, from the solver's threads.

    Raises:
        OptionError: ``hint`` is of another problem, or ``steps`` is less than 1.
        Infeasible: no schedule keeps the memory limit.
    """
    if hint is not None and hint.schedule.problem != problem:
        raise OptionError(f"the hint is a schedule of {hint.schedule.problem.name!r}, not of {problem.name!r}")
    if steps is not None and steps < 1:
        raise OptionError(f"time is to be rounded to {steps} steps; the least is 1")
    begin = hint if hint is not None and within_limit(hint) else _one_by_one(problem)
    best = _Best(None if begin is hint else begin.schedule, value_of(begin, objective))
    if not within_limit(begin):
        best = _Best(None, None)
    if (best.value is not None and best.value <= bound.value) or budget.halted():
        return best.schedule, bound
    lines = lines_of(problem)
    grid = _grid(lines, objective, best.value, steps)
    model = Intervals(lines, grid, span=objective == "span", least=bound.value, most=best.value)
    if best.value is not None:
        model.hint(begin)
    run = _Run(model, objective, budget, best, bound)
    outcome = minimised(model.model, budget, effort=effort, found=run.found, bounded=run.bounded)
    if outcome.status == "none" and best.value is not None:
        raise InternalError(
            f"the model of {problem.name!r} has no solution within {best.value}, as {begin.schedule.method!r} is",
            hint="please report this, with the problem",
        )
    if outcome.status == "none":
        raise _infeasible(problem, begin)
    run.bounded(outcome.bound)
    return run.best.schedule, run.bound


def _one_by_one(problem: PipelineProblem) -> TimedSchedule:
    """One microbatch after the other, backward passes whole: no schedule without copies holds fewer bytes at a time."""
    orders: list[list[Action]] = [[] for _ in range(problem.ranks)]
    for microbatch, route in enumerate(problem.route_of):
        for task in tasks_of(problem, route):
            kind = ActionKind.BACKWARD if task.kind is ActionKind.INPUT_GRADIENT else task.kind
            if kind is not ActionKind.WEIGHT_GRADIENT:
                orders[task.rank].append(Action(task.stage, kind, microbatch))
    return timed(PipelineSchedule(problem, tuple(tuple(order) for order in orders), "one by one"))


def _infeasible(problem: PipelineProblem, known: TimedSchedule) -> Infeasible:
    limits = problem.memory_limit or known.peak_bytes
    rank = max(range(problem.ranks), key=lambda r: known.peak_bytes[r] - limits[r])
    return Infeasible(
        f"no schedule of {problem.name!r} keeps within the memory limit; one microbatch at a time takes "
        f"{known.peak_bytes[rank]} bytes on rank {rank}, which has {limits[rank]}",
        required_bytes=known.peak_bytes[rank],
        available_bytes=limits[rank],
        hint="raise the limit, cut the model in more stages, or offload",
    )


@dataclass
class _Best:
    schedule: PipelineSchedule | None
    value: int | None


class _Run:
    """What is known while the solver runs; told by its threads, one at a time."""

    def __init__(self, model: Intervals, objective: Objective, budget: Budget, best: _Best, bound: Bound) -> None:
        self.model, self.objective, self.budget = model, objective, budget
        self.best, self.bound = best, bound
        self.begin = time.monotonic()
        self.lock = threading.Lock()

    def found(self, value: Reader) -> None:
        """Judge a solution on exact times."""
        with self.lock:
            for schedule in self.model.schedules(value):
                judged = timed(schedule)
                reached = value_of(judged, self.objective)
                if within_limit(judged) and (self.best.value is None or reached < self.best.value):
                    self.best = _Best(schedule, reached)
                    self._tell()

    def bounded(self, steps: float) -> None:
        """Take a bound, in steps."""
        proved = round(steps) * self.model.grid.unit
        with self.lock:
            if self.best.value is not None:
                proved = min(proved, self.best.value)
            if proved > self.bound.value:
                self.bound = Bound(proved, "cp")
                self._tell()

    def _tell(self) -> None:
        elapsed = time.monotonic() - self.begin
        self.budget.listen(Progress(_NAME, elapsed, self.best.value, self.bound.value))


def _grid(lines: Lines, objective: Objective, most: int | None, steps: int | None) -> Grid:
    """When lines may start in a schedule whose objective is at most ``most``."""
    horizon = _everything(lines)
    view = View(lines, thorough=True)
    first = view.ahead(None)
    behind = [np.zeros(line.count, np.int64) for line in lines.lines]
    if most is not None and objective == "makespan":
        horizon, behind = min(horizon, most), view.behind(None)
    elif most is not None:
        # the first action of a rank waits for nothing, or for another rank, which is done when its span is over
        lag = max(edge.lag for line in lines.lines for edge in (*line.edges, Edge(0, 0)))
        horizon = min(horizon, lines.problem.ranks * (most + lag))
    last: Times = [
        np.maximum(first[index], horizon - behind[index] - line.duration) for index, line in enumerate(lines.lines)
    ]
    unit = int(np.gcd.reduce(_amounts(lines))) if steps is None else -(-horizon // steps)
    return Grid(max(1, unit), first, last)


def _everything(lines: Lines) -> int:
    """No schedule in which everything starts as early as it can takes longer than all there is, one after another."""
    stages = lines.problem.stages
    total = sum(stage.reduce_ns for stage in stages)
    for line in lines.lines:
        lag = max((edge.lag for edge in line.edges), default=0)
        whole = stages[line.task.stage].whole_backward_ns if line.task.kind.value == "I" else 0
        total += line.count * (max(line.task.duration_ns, whole) + lag)
    return total


def _amounts(lines: Lines) -> list[int]:
    """All times of the problem."""
    found = [0]
    for line in lines.lines:
        found += [line.task.duration_ns, *(edge.lag for edge in line.edges)]
    for stage in lines.problem.stages:
        found += [stage.whole_backward_ns, stage.reduce_ns]
    return found
