"""What every schedule of an overlap problem spends: seconds, heads, tails and work, of which `bounds` makes bounds.

Whatever the order and the modes, in the fluid model of `simulate`: a chain of dependencies takes at least the sum of
its tasks alone; a lane does one task at a time; and what runs at one moment needs at most the whole of a resource, so
that the sum of needs times seconds passes in no less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .problem import Problem

__all__ = ["Least", "least_of"]

EXACT_CHAINS = 400  # tasks up to which all that comes before a task is counted, not the longest chain alone


@dataclass(frozen=True)
class Least:
    """What every schedule spends: by task, ``seconds`` alone, ``head_s`` before it starts, ``tail_s`` behind it.

    ``work`` holds, by lane and by resource, the least seconds that each task occupies it; ``events`` the seconds
    between each task and those it waits for, in the order of ``Task.before``.
    """

    seconds: tuple[float, ...]
    head_s: tuple[float, ...]
    tail_s: tuple[float, ...]
    work: dict[str, dict[int, float]]
    events: tuple[tuple[float, ...], ...]


def least_of(problem: Problem) -> Least:
    """Heads, tails and work, each task in whatever mode is the least for it."""
    absorbable = _absorbable(problem)
    seconds = [0.0 if i in absorbable else min(m.seconds for m in t.modes) for i, t in enumerate(problem.tasks)]
    work = _work(problem, seconds, absorbable)
    events = tuple(
        tuple(problem.event_s * (problem.tasks[j].lane != task.lane and not absorbable & {i, j}) for j in task.before)
        for i, task in enumerate(problem.tasks)
    )
    forward = [list(zip(task.before, costs, strict=True)) for task, costs in zip(problem.tasks, events, strict=True)]
    backward: list[list[tuple[int, float]]] = [[] for _ in forward]
    for i, edges in enumerate(forward):
        for j, cost in edges:
            backward[j].append((i, cost))
    count = len(forward)
    heads = _heads(seconds, forward, range(count), work)
    tails = _heads(seconds, backward, range(count - 1, -1, -1), work)
    return Least(tuple(seconds), heads, tails, work, events)


def _absorbable(problem: Problem) -> frozenset[int]:
    return frozenset(i for task in problem.tasks for mode in task.modes for i in mode.absorbs)


def _work(problem: Problem, seconds: Sequence[float], absorbable: frozenset[int]) -> dict[str, dict[int, float]]:
    work: dict[str, dict[int, float]] = {}
    for i, task in enumerate(problem.tasks):
        work.setdefault(f"lane {task.lane}", {})[i] = seconds[i]
        for resource in {name for mode in task.modes for name in mode.needs}:
            if i not in absorbable:
                spent = min(mode.seconds * mode.needs.get(resource, 0.0) for mode in task.modes)
                work.setdefault(f"resource {resource}", {})[i] = spent
    return work


def _heads(
    seconds: Sequence[float],
    edges: Sequence[Sequence[tuple[int, float]]],
    order: Iterable[int],
    work: dict[str, dict[int, float]],
) -> tuple[float, ...]:
    """Seconds before each task starts: its longest chain, or all that comes before it on one lane or resource."""
    heads = [0.0] * len(seconds)
    before = [0] * len(seconds)
    users = [(sum(1 << i for i in spent), spent) for spent in work.values()]
    for i in order:
        for j, cost in edges[i]:
            heads[i] = max(heads[i], heads[j] + seconds[j] + cost)
            before[i] |= before[j] | 1 << j
        if len(seconds) > EXACT_CHAINS:
            continue
        for mask, spent in users:
            common = _bits(before[i] & mask)
            if common:
                heads[i] = max(heads[i], min(heads[k] for k in common) + sum(spent[k] for k in common))
    return tuple(heads)


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found
