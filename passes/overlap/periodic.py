"""Many equal layers: one period solved for all of them, and the whole composed and timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...compiler.pipeline import Budget
from ...errors import OptionError
from ._cp_sat import minimised
from ._modulo import Modulo, least_period_s
from .bounds import bound_of
from .exact import orders_of
from .problem import Problem, Schedule
from .repeats import Repeat, repeats
from .simulate import Simulator, given_modes

__all__ = ["Period", "PeriodicOverlap"]

LEAST_PART = 0.1  # of all tasks: shorter runs of layers stay as they are


@dataclass(frozen=True)
class Period:
    """One layer's place in the whole: its task ``i`` starts at ``start_s[i] + k * period_s`` in layer ``k``.

    ``bound_s`` are seconds a layer that no schedule undercuts as layers go on.
    """

    repeat: Repeat
    start_s: tuple[float, ...]
    length_s: tuple[float, ...]
    modes: tuple[int, ...]
    period_s: float
    bound_s: float


@dataclass(frozen=True)
class PeriodicOverlap:
    """A schedule of a problem of many layers, made from modulo schedules of one layer each.

    *Given* a problem and, if there is one, a schedule to begin with. *Result*: the better of that and of the schedule
    whose runs of layers go one behind another with the least period; timed by `simulate`, with the bound of
    `bounds` on all schedules. What comes before, between and behind the runs stays in the program's order.

    ``effort`` is the limit for one run in CP-SAT's deterministic seconds, used in deterministic mode only; ``streams``
    is that of `simulate`; longer periods than ``max_tasks`` are left alone.
    """

    effort: float = 0.3
    max_tasks: int = 200
    streams: bool = True

    def __post_init__(self) -> None:
        if self.effort <= 0 or self.max_tasks < 0:
            raise OptionError(
                f"overlap/periodic: effort is {self.effort} and max_tasks {self.max_tasks}; expected above 0, and 0 on"
            )

    @property
    def name(self) -> str:
        """Path name of the method."""
        return "overlap/periodic"

    def schedule(self, problem: Problem, budget: Budget, start: Schedule | None = None) -> Schedule:
        """The best schedule found; ``start``, or that of the program's order, where no layers repeat.

        Raises:
            InternalError: the problem contradicts itself.
        """
        simulator = Simulator(problem, streams=self.streams)
        best = start or simulator.timed(range(len(problem.tasks)), given_modes(problem))
        best = replace(best, bound_s=min(max(best.bound_s, bound_of(problem)), best.makespan_s))
        periods = self.periods(problem, budget)
        if not periods:
            return best
        starts, ends = _times(problem, periods)
        for modes in _ways(problem, _modes(problem, periods, best.modes), best.modes):
            for order in orders_of(problem, starts, ends, modes):
                seconds, peak = simulator.measure(order, modes)
                limit = problem.memory_limit_bytes
                if seconds < best.makespan_s and (limit is None or peak <= limit):
                    found = simulator.timed(order, modes)
                    best = replace(found, bound_s=min(best.bound_s, seconds), proved_by=best.proved_by)
        return best

    def periods(self, problem: Problem, budget: Budget) -> tuple[Period, ...]:
        """A modulo schedule for each run of layers for which one was found in time."""
        enough = len(problem.tasks) * LEAST_PART
        runs = [run for run in repeats(problem) if run.period <= self.max_tasks and run.end - run.begin >= enough]
        found: list[Period] = []
        for left, run in zip(range(len(runs), 0, -1), runs, strict=True):
            if budget.halted():
                break
            modulo = Modulo(problem, run)
            outcome = minimised(modulo.model, budget.share(1 / left), effort=self.effort)
            if outcome.value is not None:
                starts, lengths, modes, period_s = modulo.answer(outcome.value)
                bound_s = least_period_s(problem, run)
                found.append(Period(run, tuple(starts), tuple(lengths), tuple(modes), period_s, bound_s))
        return tuple(found)


def _modes(problem: Problem, periods: Sequence[Period], otherwise: Sequence[int]) -> tuple[int, ...]:
    modes = list(otherwise)
    for period in periods:
        for i in range(period.repeat.begin, period.repeat.end):
            modes[i] = period.modes[(i - period.repeat.begin) % period.repeat.period]
    return tuple(modes)


def _ways(problem: Problem, planned: Sequence[int], known: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Modes to try: those planned, those known, and by name one for all tasks that have it, the rest as planned.

    What tasks take from one another is no part of the plan but their work, so that a faster mode may be better.
    """
    yield tuple(planned)
    yield tuple(known)
    names = [[mode.name for mode in task.modes] for task in problem.tasks]
    for name in dict.fromkeys(name for own in names if len(own) > 1 for name in own):
        yield tuple(own.index(name) if name in own else mode for own, mode in zip(names, planned, strict=True))


def _times(problem: Problem, periods: Sequence[Period]) -> tuple[list[float], list[float]]:
    """Planned starts and ends: runs one behind another, all else between them, in the order of the program."""
    starts = [0.0] * len(problem.tasks)
    ends = [0.0] * len(problem.tasks)
    now, done = 0.0, 0
    for period in periods:
        run = period.repeat
        for i in range(done, run.begin):
            starts[i] = ends[i] = now
        for i in range(run.begin, run.end):
            layer, position = divmod(i - run.begin, run.period)
            starts[i] = now + period.start_s[position] + layer * period.period_s
            ends[i] = starts[i] + period.length_s[position]
        now, done = max(ends[run.begin : run.end]), run.end
    for i in range(done, len(problem.tasks)):
        starts[i] = ends[i] = now
    return starts, ends
