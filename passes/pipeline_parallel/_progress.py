"""What the methods of one search share: the bound, the best schedule so far, what was tried, and when to end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ...compiler.pipeline import Budget, Progress
from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import PipelineSchedule, TimedSchedule
from ...compiler.pipelining.simulate import timed
from ...errors import InternalError
from .bounds import lower_bound
from .solution import Attempt, Bound, Objective, PipelineSolution, value_of, within_limit

__all__ = ["Search"]

NAME = "pipeline_parallel/solve"


class Search:
    """A search for a schedule of ``problem``; ``best`` is the best within the limit so far, as the simulator says."""

    def __init__(self, problem: PipelineProblem, budget: Budget, objective: Objective) -> None:
        self.problem, self.budget, self.objective = problem, budget, objective
        self._begin = self._last = time.monotonic()
        self.bound: Bound = lower_bound(problem, objective, thorough=True)
        self.best: TimedSchedule | None = None
        self.attempts: list[Attempt] = []

    @property
    def value(self) -> int | None:
        """The best objective so far."""
        return None if self.best is None else value_of(self.best, self.objective)

    def done(self) -> bool:
        """Whether the bound is met, or a schedule known and the budget used up."""
        return self.best is not None and (
            value_of(self.best, self.objective) <= self.bound.value or self.budget.halted()
        )

    @contextmanager
    def share(self, fraction: float) -> Iterator[None]:
        """Let what is done within have ``fraction`` of the time that is left."""
        whole, self.budget = self.budget, self.budget.share(fraction)
        try:
            yield
        finally:
            self.budget = whole

    def offer(self, schedule: PipelineSchedule) -> bool:
        """Judge a schedule, note the attempt, and keep it if it is within the limit and the best; whether it is."""
        judged = timed(schedule)
        value = value_of(judged, self.objective) if within_limit(judged) else None
        better = value is not None and (self.value is None or value < self.value)
        if better:
            self.best = judged
        self.note(schedule.method, value)
        return better

    def note(self, method: str, value: int | None) -> None:
        """Record an attempt; its seconds are those since the last one. Tells the budget's listener."""
        now = time.monotonic()
        self.attempts.append(Attempt(method, value, now - self._last))
        self._last = now
        self.budget.listen(Progress(NAME, now - self._begin, self.value, self.bound.value))

    def raise_bound(self, bound: Bound) -> None:
        """Keep ``bound`` if it is higher than the one so far."""
        if bound.value > self.bound.value:
            self.bound = bound

    def solution(self) -> PipelineSolution:
        """The best schedule, with its bound."""
        if self.best is None:
            raise InternalError(
                f"no schedule of pipeline {self.problem.name!r} was found within a limit that can be kept",
                hint="please report this, with the problem",
            )
        if self.value is not None and self.bound.value > self.value:
            raise InternalError(
                f"a schedule of pipeline {self.problem.name!r} takes {self.value}, below the bound {self.bound.value}",
                hint="please report this, with the problem",
            )
        seconds = time.monotonic() - self._begin
        return PipelineSolution(self.best, self.objective, self.bound, tuple(self.attempts), seconds)
