"""The best order and modes of one layer, with a bound, by constraint programming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...compiler.pipeline import Budget
from ...errors import OptionError
from ._cp_sat import Outcome, minimised
from ._relaxed import Relaxed
from .bounds import bound_of
from .lower_bound import least_of
from .problem import Problem, Schedule
from .simulate import Simulator, given_modes

__all__ = ["ExactOverlap", "orders_of"]

SLACK = 1e-9  # sums of doubles: what a bound is lowered by


@dataclass(frozen=True)
class ExactOverlap:
    """The best schedule of a small problem, with a bound on all of them.

    *Given* a problem of at most ``max_tasks`` tasks and, if there is one, a schedule to begin with. *Result*: the best
    schedule found, never worse than that one, with the bound of `bounds` or, where it is higher, of the CP-SAT
    model of `_relaxed`. The fluid sharing of resources is not linear; the model is a relaxation of it, so its bound
    holds for the fluid model, and its answers are orders of issue that `simulate` evaluates. Where each task shares
    with one fixed mode at a time the two agree, and the gap closes.

    ``effort`` is the limit in CP-SAT's deterministic seconds, used in deterministic mode only. ``streams`` is that of
    `simulate`; the bound holds for both.
    """

    effort: float = 0.5
    max_tasks: int = 160
    streams: bool = True

    def __post_init__(self) -> None:
        if self.effort <= 0 or self.max_tasks < 0:
            raise OptionError(
                f"overlap/exact: effort is {self.effort} and max_tasks {self.max_tasks}; expected more than 0, and 0 on"
            )

    @property
    def name(self) -> str:
        """Path name of the method."""
        return "overlap/exact"

    def schedule(self, problem: Problem, budget: Budget, start: Schedule | None = None) -> Schedule:
        """The best schedule found; that of the program's order, or ``start``, where time ends or the problem is large.

        Raises:
            InternalError: the problem contradicts itself.
        """
        simulator = Simulator(problem, streams=self.streams)
        best = start or simulator.timed(range(len(problem.tasks)), given_modes(problem))
        bound_s = max(bound_of(problem), best.bound_s)
        best = replace(best, bound_s=min(bound_s * (1 - SLACK), best.makespan_s))
        if not problem.tasks or len(problem.tasks) > self.max_tasks or budget.halted() or _done(best):
            return best
        relaxed = Relaxed(problem, least_of(problem), _horizon_s(problem, best))
        relaxed.hint(best)
        outcome = minimised(relaxed.model, budget, effort=self.effort)
        if outcome.bound * relaxed.unit_s * (1 - SLACK) > best.bound_s:
            best = replace(best, bound_s=outcome.bound * relaxed.unit_s * (1 - SLACK), proved_by="cp")
        best = self._improved(simulator, relaxed, outcome, best)
        return replace(best, bound_s=min(best.bound_s, best.makespan_s))

    def _improved(self, simulator: Simulator, relaxed: Relaxed, outcome: Outcome, best: Schedule) -> Schedule:
        """``best``, or what the solver's answer becomes in the simulator if that is better."""
        if outcome.value is None:
            return best
        starts, ends, modes = relaxed.answer(outcome.value)
        for order in orders_of(relaxed.problem, starts, ends, modes):
            seconds, peak = simulator.measure(order, modes)
            limit = relaxed.problem.memory_limit_bytes
            if seconds < best.makespan_s and (limit is None or peak <= limit):
                found = simulator.timed(order, modes)
                best = replace(found, bound_s=best.bound_s, proved_by=best.proved_by)
        return best


def orders_of(
    problem: Problem, starts: Sequence[float], ends: Sequence[float], modes: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Orders of issue that planned times stand for: by start; and each collective as soon as it is ready.

    A collective's stream waits for what was computed before its place in the order, so one that starts while something
    computes is issued before that. On its lane it stays behind those that start earlier.
    """
    tasks = problem.tasks
    behind = {j: i for i, mode in enumerate(modes) for j in tasks[i].modes[mode].absorbs}

    def order(keys: Sequence[tuple[float, int]]) -> tuple[int, ...]:
        late = list(keys)
        for i, task in enumerate(tasks):
            late[i] = max([late[i], *(late[j] for j in (*task.before, *([behind[i]] if i in behind else ())))])
        return tuple(sorted(range(len(tasks)), key=lambda i: (late[i], i)))

    yield order([(start, 1) for start in starts])
    ready = [(start, 1) for start in starts]
    latest: dict[str, tuple[float, int]] = {}
    rounding = 1e-9 * max(ends, default=0.0)  # what follows at once may be said to start a trifle before that end
    for i in sorted(range(len(tasks)), key=lambda i: (starts[i], i)):
        if tasks[i].collective is not None:
            others = [j for k in (i, *tasks[i].modes[modes[i]].absorbs) for j in tasks[k].before if j != i]
            key = max((ends[j] for j in others if behind.get(j) != i), default=0.0) - rounding, 0
            ready[i] = latest[tasks[i].lane] = max(key, latest.get(tasks[i].lane, key))
    yield order(ready)


def _horizon_s(problem: Problem, best: Schedule) -> float:
    """When the best schedule known ends, and a little later, for it must stay possible in rounded times."""
    return best.makespan_s * (1 + 1e-6) + 1e-12


def _done(best: Schedule) -> bool:
    return best.makespan_s <= best.bound_s * (1 + 1e-6)
