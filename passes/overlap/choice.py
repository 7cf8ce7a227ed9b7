"""Whether to cut a program into parts, where, and in which order and modes to run it: what is predicted to be fastest.

The alternatives are the program as it is, put into another order, and cut at the points that `points` proposes. Each is
stated as a problem of its own, since parts of another size cost otherwise, and scheduled; the best is improved. What
saves less than ``margin`` is left alone, and a cut must save that much over the best order without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...compiler.graph import Graph
from ...compiler.pipeline import Budget
from ...errors import OptionError, SplitRefused
from ...hw_models.model import HardwareModel
from .improve import better_modes, climbed, uniform
from .list_schedule import Answer, as_schedule, given, merit
from .problem import Problem, Schedule, Task
from .simulate import Simulator
from .tasks import problem_of

__all__ = ["Alternative", "Choice", "Overlap", "restricted"]

SMALL = 120  # tasks up to which a problem is solved as one, not layer by layer


@dataclass(frozen=True)
class Alternative:
    """A program that computes what is wanted: its ``graph``, and the part of the cut that each operator belongs to.

    ``sizes`` are the parts in tokens, empty where nothing is cut. ``origin`` says of operators which of the program as
    given they stand for, where the name is another, and ``joined`` where a cut ended, with the reason. ``program`` is
    whatever the caller wants back.
    """

    graph: Graph
    parts: Mapping[str, int] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    joined: tuple[tuple[str, str], ...] = ()
    program: Any = None


@dataclass(frozen=True)
class Choice:
    """The ``alternative`` that was chosen and its ``schedule``, and the ``before`` of the program as given.

    ``reason`` says why nothing was changed, and is empty where something was. ``tried`` are all that was considered:
    sizes, and the makespan in seconds before the best was improved, or why there is none.
    """

    alternative: Alternative
    schedule: Schedule
    before: Schedule
    reason: str
    tried: tuple[tuple[tuple[int, ...], float | str], ...]
    seconds: float


#: Makes the alternative with parts of these sizes.
Cut = Callable[[tuple[int, ...]], Alternative]


@dataclass(frozen=True)
class Overlap:
    """How the choice is made.

    ``margin`` is the least predicted gain, as a fraction of the time before. ``algorithms`` are the names of those that
    collectives may be done by, all the machine's where empty. ``memory_limit_bytes`` bounds the bytes that the program
    has allocated at a time. ``streams`` says that a collective starts behind whatever was issued before (`simulate`).
    ``effort`` bounds the search in tasks that are timed, ``solver_effort`` that of constraint programming in its own
    seconds, ``most_operators`` the operators of all cuts that are tried: no clock, so that all ranks decide alike.

    Raises:
        OptionError: a value is out of range.
    """

    margin: float = 0.03
    algorithms: tuple[str, ...] = ()
    memory_limit_bytes: int | None = None
    streams: bool = True
    effort: int = 1_000_000
    solver_effort: float = 0.3
    most_operators: int = 6_000

    def __post_init__(self) -> None:
        if not self.margin < 1 or self.effort < 0 or self.most_operators < 0:
            raise OptionError(
                f"overlap: margin is {self.margin}, effort {self.effort} and most_operators {self.most_operators}; "
                "expected below 1, and 0 or more"
            )

    def choose(
        self,
        program: Alternative,
        machine: HardwareModel,
        cut: Cut | None = None,
        points: Iterable[tuple[int, ...]] = (),
        *,
        forced: bool = False,
        budget: Budget | None = None,
    ) -> Choice:
        """The fastest of ``program`` and its cuts at ``points``, the most promising of which come first.

        A cut that is refused is passed over; with ``forced`` the first of ``points`` is taken whatever it costs, and a
        refusal is raised.

        Raises:
            Infeasible: nothing keeps the memory limit, not even the program as it is given.
            MachineError: the machine has no such collectives.
            SplitRefused: a cut that was forced is refused.
        """
        begin = time.monotonic()
        budget = budget or Budget.of_seconds(3600.0, deterministic=True)
        before = self._before(program, machine)
        tried: list[tuple[tuple[int, ...], float | str]] = []
        whole = self._tried(program, machine, budget)
        tried.append(((), whole.answer[0]))
        best, left = whole, self.most_operators
        for sizes in points if cut is not None else ():
            if budget.halted() or left < 0:
                break
            assert cut is not None
            try:
                found = self._tried(cut(sizes), machine, budget)
            except (SplitRefused, OptionError) as refusal:
                if forced:
                    raise
                tried.append((sizes, refusal.message))
                continue
            left -= len(found.alternative.graph.ops)
            tried.append((sizes, found.answer[0]))
            if forced or found.better_than(best):
                best = found
            if forced:
                break
        chosen, schedule, reason = self._decided(before, whole, best, forced, budget)
        return Choice(chosen, schedule, before, reason, tuple(tried), time.monotonic() - begin)

    def _problem(self, alternative: Alternative, machine: HardwareModel) -> Problem:
        limit = self.memory_limit_bytes
        problem = problem_of(alternative.graph, machine, parts=alternative.parts, memory_limit_bytes=limit)
        return restricted(problem, self.algorithms) if self.algorithms else problem

    def _before(self, program: Alternative, machine: HardwareModel) -> Schedule:
        """The program as it is given, which waits for each collective at once; memory is what it is."""
        problem = replace(self._problem(program, machine), memory_limit_bytes=None)
        simulator = Simulator(problem, streams=self.streams)
        return as_schedule(simulator, given(simulator, synchronous=True))

    def _tried(self, alternative: Alternative, machine: HardwareModel, budget: Budget) -> _Candidate:
        simulator = Simulator(self._problem(alternative, machine), streams=self.streams)
        return _Candidate(alternative, simulator, uniform(simulator, budget))

    def _decided(
        self, before: Schedule, whole: _Candidate, best: _Candidate, forced: bool, budget: Budget
    ) -> tuple[Alternative, Schedule, str]:
        whole = whole.improved(budget, self.effort)
        cut = best.alternative is not whole.alternative
        best = best.improved(budget, self.effort) if cut else whole
        limit = self.memory_limit_bytes
        fits = limit is None or before.peak_bytes <= limit
        unsplit_fits = limit is None or whole.answer[1] <= limit
        enough = before.makespan_s * self.margin
        if best is not whole and not forced and unsplit_fits and whole.answer[0] - best.answer[0] < enough:
            best = whole  # a cut is not worth its trouble where an order alone does nearly as well
        gain = before.makespan_s - best.answer[0]
        if fits and not forced and (gain < enough or gain <= 0):
            share = 100 * gain / before.makespan_s if before.makespan_s else 0.0
            reason = f"gain {share:.1f} % is below the margin of {100 * self.margin:.3g} %"
            return whole.alternative, before, reason
        return best.alternative, self._proved(as_schedule(best.simulator, best.answer), budget), ""

    def _proved(self, schedule: Schedule, budget: Budget) -> Schedule:
        """``schedule``, or a better one, with the bound of constraint programming where that is higher."""
        if len(schedule.problem.tasks) <= SMALL:
            from .exact import ExactOverlap

            return ExactOverlap(self.solver_effort, SMALL, self.streams).schedule(schedule.problem, budget, schedule)
        from .periodic import PeriodicOverlap

        return PeriodicOverlap(self.solver_effort, streams=self.streams).schedule(schedule.problem, budget, schedule)


@dataclass(frozen=True)
class _Candidate:
    alternative: Alternative
    simulator: Simulator
    answer: Answer

    def better_than(self, other: _Candidate) -> bool:
        limit = self.simulator.problem.memory_limit_bytes
        return merit(self.answer, limit) < merit(other.answer, limit)

    def improved(self, budget: Budget, effort: int) -> _Candidate:
        modes = better_modes(self.simulator, budget, self.answer)
        return replace(self, answer=climbed(self.simulator, modes, budget, effort))


def restricted(problem: Problem, algorithms: Collection[str]) -> Problem:
    """``problem`` whose collectives are done by ``algorithms`` only, or as given where none of their modes is."""
    return replace(problem, tasks=tuple(_restricted(task, algorithms) for task in problem.tasks))


def _restricted(task: Task, algorithms: Collection[str]) -> Task:
    if task.collective is None:
        return task
    kept: Sequence[int] = [i for i, mode in enumerate(task.modes) if mode.name.partition("/")[0] in algorithms]
    if task.given_mode not in kept:
        plain = [i for i in kept if not task.modes[i].absorbs]
        given_mode = plain[0] if plain else task.given_mode
        kept = sorted({*kept, given_mode})
    else:
        given_mode = task.given_mode
    return replace(task, modes=tuple(task.modes[i] for i in kept), given_mode=kept.index(given_mode))
