"""Better schedules by local search: modes of all collectives of a kind at once, then single moves; deterministic.

Collectives that look alike (what they are, and what is computed before and behind them) get one mode, tried kind by
kind with the list scheduler's rules; that carries over from one layer to the next. Then single tasks move, and single
collectives change their mode, where that makes nothing slower.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from ...compiler.pipeline import Budget, Progress
from ._climb import climb
from .bounds import bound_of
from .list_schedule import NO_LIMIT, Answer, as_schedule, best_order, merit, reordered
from .problem import Problem, Schedule
from .simulate import Indices, Simulator, given_modes

__all__ = ["alike", "better_modes", "climbed", "improved", "uniform"]

NAME = "overlap/improve"
ROUNDS = 3  # over all kinds, at most
CHUNK = 200_000  # tasks timed between two looks at the budget


def improved(problem: Problem, budget: Budget, *, streams: bool = True, effort: int = 1_000_000) -> Schedule:
    """The best schedule found: list scheduling, modes by kind, then single moves for ``effort`` timed tasks.

    Never slower than the given order in the given modes, if that keeps the limit on memory. The same for the same
    problem unless ``budget`` ends it by its clock.

    Raises:
        Infeasible: nothing that was tried keeps ``memory_limit_bytes``.
    """
    simulator = Simulator(problem, streams=streams)
    report = _Report(budget, bound_of(problem))
    best = better_modes(simulator, budget)
    report(best)
    best = climbed(simulator, best, budget, effort, report)
    return as_schedule(simulator, best)


class _Report:
    """Tells the budget's listener of every better answer, in nanoseconds."""

    def __init__(self, budget: Budget, bound_s: float) -> None:
        self.budget, self.bound_s, self.begin = budget, bound_s, time.monotonic()

    def __call__(self, answer: Answer) -> None:
        elapsed = time.monotonic() - self.begin
        self.budget.listen(Progress(NAME, elapsed, round(answer[0] * 1e9), int(self.bound_s * 1e9)))


def alike(problem: Problem) -> Sequence[Sequence[int]]:
    """Collectives with a choice of modes, in sets of those that look alike: their modes and their neighbours' times."""
    behind: list[list[float]] = [[] for _ in problem.tasks]
    for task in problem.tasks:
        for other in task.before:
            behind[other].append(_seconds(task.modes[task.given_mode].seconds))
    kinds: dict[Hashable, list[int]] = {}
    for index, task in enumerate(problem.tasks):
        if task.collective is None or len(task.modes) < 2:
            continue
        ahead = [problem.tasks[other].modes[problem.tasks[other].given_mode].seconds for other in task.before]
        names = tuple((mode.name, _seconds(mode.seconds)) for mode in task.modes)
        kind = (task.lane, names, tuple(sorted(map(_seconds, ahead))), tuple(sorted(behind[index])))
        kinds.setdefault(kind, []).append(index)
    return tuple(kinds.values())


def _seconds(value: float) -> float:
    """To six digits: layers that differ by rounding alone are alike."""
    return float(f"{value:.6g}")


def uniform(simulator: Simulator, budget: Budget) -> Answer:
    """The best order with one mode, by name, for all collectives that have it; the others keep the given mode."""
    problem = simulator.problem
    limit = problem.memory_limit_bytes
    best = best_order(simulator, given_modes(problem))
    kinds = alike(problem)
    for name in dict.fromkeys(m.name for kind in kinds for m in problem.tasks[kind[0]].modes):
        if budget.halted():
            break
        modes = _named(problem, kinds, name)
        best = min(best, *reordered(simulator, best, modes), key=lambda answer: merit(answer, limit))
    return min(best, best_order(simulator, best[3]), key=lambda answer: merit(answer, limit))


def better_modes(simulator: Simulator, budget: Budget, start: Answer | None = None) -> Answer:
    """The best order, with one mode for each kind of collectives: from ``start``, kind by kind."""
    problem = simulator.problem
    limit = problem.memory_limit_bytes
    best = uniform(simulator, budget) if start is None else start
    for _ in range(ROUNDS):
        before = best
        for kind in alike(problem):
            for mode in range(len(problem.tasks[kind[0]].modes)):
                if budget.halted():
                    return best
                modes = _with(best[3], kind, mode)
                if modes != tuple(best[3]):
                    best = min(best, *reordered(simulator, best, modes), key=lambda answer: merit(answer, limit))
        if merit(best, limit) == merit(before, limit):
            break
    return best


def _named(problem: Problem, kinds: Sequence[Sequence[int]], name: str) -> tuple[int, ...]:
    """The mode ``name`` wherever there is one, the given mode elsewhere."""
    modes = list(given_modes(problem))
    for kind in kinds:
        for index in kind:
            numbers: Mapping[str, int] = {mode.name: k for k, mode in enumerate(problem.tasks[index].modes)}
            modes[index] = numbers.get(name, modes[index])
    return tuple(modes)


def _with(modes: Indices, kind: Sequence[int], mode: int) -> tuple[int, ...]:
    changed = [int(m) for m in modes]
    for index in kind:
        changed[index] = mode
    return tuple(changed)


def climbed(simulator: Simulator, answer: Answer, budget: Budget, effort: int, report: _Report | None = None) -> Answer:
    """``answer`` after moves of single tasks, for ``effort`` timed tasks in all."""
    problem, limit = simulator.problem, simulator.problem.memory_limit_bytes
    count = len(problem.tasks)
    if not count or not effort or merit(answer, limit)[0] > 0:
        return answer
    best = answer
    tries, seed = max(1, min(CHUNK, effort) // count), budget.seed + 1
    waits = np.asarray(best[4], np.int64).reshape(-1, 2)
    for _ in range(max(0, effort // (tries * count))):
        if budget.halted():
            break
        order, modes, _ = climb(
            simulator.arrays,
            np.asarray(best[2], np.int64),
            np.asarray(best[3], np.int64),
            waits,
            simulator.streams,
            NO_LIMIT if limit is None else limit,
            tries,
            seed,
        )
        found = (*simulator.measure(order, modes, waits), order, modes, waits)
        seed += 1
        if merit(found, limit) <= merit(best, limit):
            if report is not None and found[0] < best[0]:
                report(found)
            best = found
    return best
