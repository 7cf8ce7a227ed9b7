"""Several problems that one choice leaves: solve those that may hold the best schedule, and bound all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from ...compiler.pipeline import Budget
from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import PipelineSchedule, TimedSchedule
from ...compiler.pipelining.simulate import timed
from ...errors import Infeasible
from ._lanes import schedule_of
from .bounds import lower_bound
from .list_schedule import filled, list_scheduled, rules_for, workshop_for
from .solution import Attempt, Bound, Objective, PipelineSolution, value_of, within_limit
from .solve import solve

__all__ = ["Choice", "best_choice", "quick"]

_RULES = 6  # list schedules by which a choice is rated


@dataclass(frozen=True)
class Choice:
    """One way to choose, and the problem that it leaves; ``hints`` makes schedules of it, if it is looked at.

    ``first`` says that it is solved before others are rated: list schedules alone would not do it justice.
    """

    name: str
    problem: PipelineProblem
    hints: Callable[[], Iterable[PipelineSchedule]] = tuple
    first: bool = False


@dataclass
class _Rated:
    choice: Choice
    bound: Bound
    best: TimedSchedule | None = None
    seconds: float = 0.0
    tried: bool = False
    impossible: Infeasible | None = None


def quick(problem: PipelineProblem, objective: Objective, rules: int = _RULES) -> TimedSchedule | None:
    """The best of a few list schedules within the memory limit; ``None`` if none of them keeps it."""
    shop = workshop_for(problem)
    found: list[TimedSchedule] = []
    for rule in islice(rules_for(shop), rules):
        made = list_scheduled(shop, filled(shop, rule))
        if made is not None:
            found.append(timed(schedule_of(problem, shop.lanes, *made, str(rule))))
    kept = [line for line in found if within_limit(line)]
    return min(kept, key=lambda line: value_of(line, objective), default=None)


def best_choice(
    choices: Sequence[Choice],
    budget: Budget,
    *,
    objective: Objective = "makespan",
    most_solved: int = 4,
    all_valued: bool = False,
    others: Bound | None = None,
) -> PipelineSolution:
    """The best schedule of any of the choices' problems; its problem says what was chosen.

    All are bounded; those that are ``first`` are solved; then all are rated by list schedules, in the order of their
    bounds, and the ``most_solved`` best of them solved. A choice whose bound reaches the best schedule known is left
    alone, unless ``all_valued``, which is for comparing them. ``others`` bounds choices that are not listed.
    The solution's bound holds for every choice; its attempts have one line for each that was looked at, by value.

    Raises:
        Infeasible: the memory limit can be kept with none of them.
    """
    begin = time.monotonic()
    rated = [_Rated(choice, lower_bound(choice.problem, objective)) for choice in choices]
    rated.sort(key=lambda one: one.bound.value)
    _solve_first([one for one in rated if one.choice.first], budget.share(0.4), objective)
    _rate(rated, budget.share(0.4), objective, all_valued=all_valued)
    _solve(rated, budget, objective, len(rated) if all_valued else most_solved, all_valued=all_valued)
    best = _best(rated, objective)
    if best is None:
        raise min((one.impossible for one in rated if one.impossible), key=lambda error: error.required_bytes)
    value = value_of(best, objective)
    bounds = [one.bound for one in rated if one.impossible is None] + ([others] if others else [])
    bound = min(bounds, key=lambda one: one.value)
    if bound.value > value:
        bound = Bound(value, bound.proved_by)
    tried = sorted((one for one in rated if one.tried), key=lambda one: _promise(one, objective))
    attempts = tuple(
        Attempt(one.choice.name, value_of(one.best, objective) if one.best else None, one.seconds) for one in tried
    )
    return PipelineSolution(best, objective, bound, attempts, time.monotonic() - begin)


def _best(rated: Sequence[_Rated], objective: Objective) -> TimedSchedule | None:
    found = [one.best for one in rated if one.best is not None]
    return min(found, key=lambda line: value_of(line, objective), default=None)


def _promise(one: _Rated, objective: Objective) -> tuple[float, int]:
    return (value_of(one.best, objective) if one.best else float("inf"), one.bound.value)


def _hopeless(one: _Rated, rated: Sequence[_Rated], objective: Objective) -> bool:
    best = _best(rated, objective)
    return best is not None and one.bound.value >= value_of(best, objective)


def _solve_first(rated: Sequence[_Rated], budget: Budget, objective: Objective) -> None:
    for place, one in enumerate(rated):
        if not _hopeless(one, rated, objective):
            _solve_one(one, budget.share(1 / (len(rated) - place)), objective)


def _rate(rated: Sequence[_Rated], budget: Budget, objective: Objective, *, all_valued: bool) -> None:
    for one in rated:
        begin = time.monotonic()
        wanted = not budget.stop.is_set() if all_valued else not (budget.halted() or _hopeless(one, rated, objective))
        known = [one.best] if one.best else []
        if wanted and not one.tried:
            known += filter(within_limit, map(timed, one.choice.hints()))
            line = quick(one.choice.problem, objective)
            known += [line] if line else []
        one.tried |= wanted
        one.best = min(known, key=lambda line: value_of(line, objective), default=None)
        one.seconds += time.monotonic() - begin


def _solve(rated: Sequence[_Rated], budget: Budget, objective: Objective, most: int, *, all_valued: bool) -> None:
    todo = sorted(rated, key=lambda one: _promise(one, objective))
    solved = 0
    for one in todo:
        found = _best(rated, objective) is not None
        if found and (solved >= most or budget.halted()):
            break
        if not all_valued and _hopeless(one, rated, objective) and one.best is not _best(rated, objective):
            continue
        if one.best and value_of(one.best, objective) <= one.bound.value:
            continue
        _solve_one(one, budget.share(1 / max(1, most - solved)), objective)
        solved += 1


def _solve_one(one: _Rated, budget: Budget, objective: Objective) -> None:
    begin = time.monotonic()
    one.tried = True
    hints = (one.best.schedule,) if one.best else ()
    try:
        solution = solve(one.choice.problem, budget, objective=objective, hints=hints)
    except Infeasible as error:
        one.impossible = error
    else:
        one.best = solution.timed
        one.bound = max(one.bound, solution.bound, key=lambda bound: bound.value)
    one.seconds += time.monotonic() - begin
