"""In which order a list scheduler prefers tasks: time to the next collective, critical path, parts, program order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .arrays import Integers
from .problem import Problem
from .simulate import Indices

__all__ = ["preferences", "seconds_of", "to_next_collective", "upward_ranks"]


def seconds_of(problem: Problem, modes: Indices) -> list[float]:
    """Seconds of each task alone; none for what a chosen mode absorbs."""
    chosen = [task.modes[mode] for task, mode in zip(problem.tasks, modes, strict=True)]
    absorbed = {index for mode in chosen for index in mode.absorbs}
    return [0.0 if index in absorbed else mode.seconds for index, mode in enumerate(chosen)]


def upward_ranks(problem: Problem, seconds: Sequence[float]) -> list[float]:
    """Seconds from the start of each task to the end of the longest chain behind it (HEFT's upward rank)."""
    behind = [0.0] * len(problem.tasks)
    for index in range(len(problem.tasks) - 1, -1, -1):
        for other in problem.tasks[index].before:
            behind[other] = max(behind[other], behind[index] + seconds[index])
    return [after + own for after, own in zip(behind, seconds, strict=True)]


def to_next_collective(problem: Problem, seconds: Sequence[float]) -> list[float]:
    """Seconds of work, its own included, from each task to the nearest collective behind it; 0 for a collective."""
    nearest = [0.0 if task.collective is not None else math.inf for task in problem.tasks]
    for index in range(len(problem.tasks) - 1, -1, -1):
        for other in problem.tasks[index].before:
            if problem.tasks[other].collective is None:
                nearest[other] = min(nearest[other], nearest[index] + seconds[other])
    return nearest


def preferences(problem: Problem, modes: Indices) -> tuple[tuple[str, Integers], ...]:
    """Rules by name, each with the rank of every task: the lowest is issued first.

    ``nearest``: the shortest time to the next collective, then the longest chain behind. ``critical``: the longest
    chain. ``parts``: the first part of a split whenever it can go on. ``program``: the order that was given.
    """
    seconds = seconds_of(problem, modes)
    chain = [-rank for rank in upward_ranks(problem, seconds)]
    nearest = to_next_collective(problem, seconds)
    index = range(len(problem.tasks))
    part = [task.part for task in problem.tasks]
    keys: dict[str, list[tuple[float, ...]]] = {
        "nearest": [(nearest[i], chain[i], i) for i in index],
        "critical": [(chain[i], nearest[i], i) for i in index],
        "parts": [(part[i], nearest[i], chain[i], i) for i in index],
        "program": [(float(i),) for i in index],
    }
    result = []
    for name, key in keys.items():
        ranks = np.empty(len(key), np.int64)
        ranks[sorted(index, key=key.__getitem__)] = np.arange(len(key))
        result.append((name, ranks))
    return tuple(result)
