"""The layers of a problem: runs of tasks that repeat with one period, as far as their edges to near tasks do, too."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .problem import Problem

__all__ = ["Repeat", "repeats"]

REACH = 2  # periods: what a task waits for from further back does not belong to the layers
LEAST_COUNT = 3  # layers that are worth solving one for all


@dataclass(frozen=True)
class Repeat:
    """Tasks ``begin`` to ``begin + period * count``: task ``i`` and task ``i + period`` are alike.

    ``edges`` are (first, then, distance): in each layer, position ``then`` waits for position ``first`` of the layer
    ``distance`` earlier.
    """

    begin: int
    period: int
    count: int
    edges: tuple[tuple[int, int, int], ...]

    @property
    def end(self) -> int:
        """The first task behind the last layer."""
        return self.begin + self.period * self.count


def repeats(problem: Problem) -> tuple[Repeat, ...]:
    """Runs of layers, in order: the one that covers the most tasks, and so on before and behind it.

    A longer period counts only where it covers at least as much more as it is long: two layers are not one.
    """
    kinds = _kinds(problem)
    found: list[Repeat] = []

    def search(begin: int, end: int) -> None:
        best = _longest(problem, kinds, begin, end)
        if best is not None:
            search(begin, best.begin)
            found.append(best)
            search(best.end, end)

    search(0, len(problem.tasks))
    return tuple(found)


def _kinds(problem: Problem) -> NDArray[np.int64]:
    """Numbers that are equal for tasks that differ in names, parts of the graph and edges only."""
    numbers: dict[Hashable, int] = {}
    kinds = []
    for i, task in enumerate(problem.tasks):
        modes = tuple(
            (m.seconds, tuple(sorted(m.needs.items())), m.fixed, tuple(j - i for j in m.absorbs)) for m in task.modes
        )
        what = task.collective and (task.collective.kind, task.collective.group, task.collective.nbytes)
        key = task.lane, modes, what, task.launches, task.allocates_bytes, task.part, task.given_mode
        kinds.append(numbers.setdefault(key, len(numbers)))
    return np.array(kinds, np.int64)


def _longest(problem: Problem, kinds: NDArray[np.int64], begin: int, end: int) -> Repeat | None:
    best: tuple[int, int, int] | None = None  # tasks covered, period, where they begin
    for period in range(1, (end - begin) // LEAST_COUNT + 1):
        alike = kinds[begin : end - period] == kinds[begin + period : end]
        longest = _run(alike)[1]
        if longest < (LEAST_COUNT - 1) * period or (best is not None and longest <= best[0]):
            continue
        for i in np.flatnonzero(alike):
            alike[i] = _near(problem, begin + int(i), period) == _near(problem, begin + int(i) + period, period)
        first, length = _run(alike)
        covered = (length + period) // period * period
        if covered >= LEAST_COUNT * period and (best is None or covered > best[0]):
            best = covered, period, begin + first
    if best is None:
        return None
    covered, period, first = best
    count = covered // period
    return Repeat(first, period, count, _edges(problem, first, period, count))


def _near(problem: Problem, i: int, period: int) -> frozenset[int]:
    """How far back lies what the task waits for, up to ``REACH`` periods."""
    return frozenset(i - j for j in problem.tasks[i].before if i - j <= REACH * period)


def _run(alike: NDArray[np.bool_]) -> tuple[int, int]:
    """Where the longest run of true values begins, and its length."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], alike, [False])).astype(np.int8)))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    longest = int(np.argmax(lengths))
    return int(edges[2 * longest]), int(lengths[longest])


def _edges(problem: Problem, begin: int, period: int, count: int) -> tuple[tuple[int, int, int], ...]:
    """From the last layer, which has all the layers before it that there are."""
    last = begin + (count - 1) * period
    found = []
    for then in range(period):
        for distance in sorted(_near(problem, last + then, period)):
            j = last + then - distance
            if j >= begin:
                found.append(((j - begin) % period, then, (count - 1) - (j - begin) // period))
    return tuple(found)
