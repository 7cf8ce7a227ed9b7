"""What every method for pipeline schedules returns: the best schedule found, and the bound that was proved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import TimedSchedule

__all__ = ["Attempt", "Bound", "Objective", "Proof", "PipelineSolution", "value_of", "within_limit"]

Objective = Literal["makespan", "span"]
Proof = Literal["analytic", "cp", "ilp", "lp"]


@dataclass(frozen=True)
class Bound:
    """No schedule of the problem has a lower objective than ``value``; ``proved_by`` says what shows it."""

    value: int
    proved_by: Proof


@dataclass(frozen=True)
class Attempt:
    """One method that was tried: the objective that it reached, ``None`` if it found nothing, and its seconds."""

    method: str
    value: int | None
    seconds: float


@dataclass(frozen=True)
class PipelineSolution:
    """The best schedule found within the memory limit, and how far from the best that there is it may be."""

    timed: TimedSchedule
    objective: Objective
    bound: Bound
    attempts: tuple[Attempt, ...] = ()
    seconds: float = 0.0

    @property
    def value(self) -> int:
        """The objective, as the simulator counts it."""
        return value_of(self.timed, self.objective)

    @property
    def gap(self) -> float:
        """``(value - bound) / value``; 0 is optimal."""
        return max(0.0, (self.value - self.bound.value) / self.value) if self.value else 0.0


def value_of(timed: TimedSchedule, objective: Objective) -> int:
    """The objective of a schedule, in the problem's unit of time."""
    return timed.makespan_ns if objective == "makespan" else timed.span_ns


def within_limit(timed: TimedSchedule) -> bool:
    """Whether every rank holds no more than it may."""
    problem: PipelineProblem = timed.schedule.problem
    return problem.memory_limit is None or all(
        peak <= limit for peak, limit in zip(timed.peak_bytes, problem.memory_limit, strict=True)
    )
