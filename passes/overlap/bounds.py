"""Makespans that no schedule of an overlap problem undercuts, whatever its order and modes; proofs in the docs.

Each task has a *head*, before which it cannot start, and a *tail*, the least that comes behind its end. For a lane, and
for a resource, heads, work and tails make a problem of one machine whose optimum with interruptions (Jackson's
preemptive schedule; Carlier, European Journal of Operational Research 11, 1982) is a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .._one_machine import preemptive
from .lower_bound import Least, least_of
from .problem import Problem

__all__ = ["bound_of", "bounds"]


def bound_of(problem: Problem) -> float:
    """The largest of ``bounds``, in seconds; 0 without tasks."""
    return max(bounds(problem).values(), default=0.0)


def bounds(problem: Problem) -> Mapping[str, float]:
    """Bounds in seconds by what proves them: ``path``, ``launches``, ``lane <name>``, ``resource <name>``."""
    if not problem.tasks:
        return {}
    least = least_of(problem)
    absorbable = frozenset(index for task in problem.tasks for mode in task.modes for index in mode.absorbs)
    launches = [0 if index in absorbable else task.launches for index, task in enumerate(problem.tasks)]
    heads = _heads(problem, least, launches)
    result = {"path": max(sum(parts) for parts in zip(heads, least.seconds, least.tail_s, strict=True))}
    result["launches"] = _launches(problem, least, launches)
    for name, work in least.work.items():
        result[name] = _one_machine((heads[index], spent, least.tail_s[index]) for index, spent in work.items())
    return result


def _heads(problem: Problem, least: Least, launches: list[int]) -> list[float]:
    """When each task can start at the earliest, as all that it hangs on was issued before it."""
    members: dict[int, int] = {}  # number of launches -> tasks that have as many, as bits
    for index, count in enumerate(launches):
        members[count] = members.get(count, 0) | 1 << index
    above: list[int] = []
    heads: list[float] = []
    for index, task in enumerate(problem.tasks):
        above.append(0)
        for other in task.before:
            above[index] |= above[other] | 1 << other
        issued = sum(count * (above[index] & same).bit_count() for count, same in members.items())
        head = max(least.head_s[index], issued * problem.issue_s if launches[index] else 0.0)
        for other, event in zip(task.before, least.events[index], strict=True):
            head = max(head, heads[other] + least.seconds[other] + event)
        heads.append(head)
    return heads


def _launches(problem: Problem, least: Least, launches: list[int]) -> float:
    """Whatever is issued last, all other launches are issued before it."""
    last = min(own - problem.issue_s * count for own, count in zip(least.seconds, launches, strict=True))
    return max(0.0, problem.issue_s * sum(launches) + last)


def _one_machine(jobs: Iterable[tuple[float, float, float]]) -> float:
    """Least makespan of jobs (head, work, tail) on one machine; those that take no time are none."""
    return preemptive((job for job in jobs if job[1] > 0), 0.0)
