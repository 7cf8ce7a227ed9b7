"""What two tasks cost one another when they run at the same time, for the integer programs of overlap.

With rates ``v`` in [0, 1], what runs satisfies ``sum of need * v <= 1`` on each resource, so tasks ``c`` and ``k`` lose
``need_c * (1 - v_c) + need_k * (1 - v_k) >= need_c + need_k - 1`` at every moment of their overlap. Summed over time,
and over tasks ``k`` of one lane, which are never there at the same time:

    need_c * loss_c + sum over k of need_k * loss_k  >=  sum over k of (need_c + need_k - 1) * overlap(c, k)

where a task's loss is how much longer it takes than alone. A fixed mode that nothing else fixed can slow has no loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .problem import Mode, Problem

__all__ = ["PARTS", "Rival", "Sharing", "ancestors"]

PARTS = 10_000  # needs are whole ten-thousandths in the integer programs


@dataclass(frozen=True)
class Rival:
    """A task, the resource, and by pair of modes (own, the other's) what both need beyond the whole, in parts."""

    task: int
    resource: str
    excess: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Sharing:
    """Who shares what with whom in ``problem``; ``related``, as bits, are those that never run beside each task."""

    problem: Problem
    related: Sequence[int]

    @cached_property
    def firm(self) -> bool:
        """Whether fixed modes are never slowed: even the largest of every lane together need no more than there is."""
        largest: dict[str, dict[str, float]] = {}
        for task in self.problem.tasks:
            for mode in task.modes:
                for resource, need in mode.needs.items() if mode.fixed else ():
                    lanes = largest.setdefault(resource, {})
                    lanes[task.lane] = max(lanes.get(task.lane, 0.0), need)
        return all(sum(lanes.values()) <= 1.0 for lanes in largest.values())

    def loses(self, mode: Mode) -> bool:
        """Whether something that runs beside it can slow a task in this mode."""
        return not (mode.fixed and self.firm)

    def rivals(self, task: int) -> Iterator[Rival]:
        """Those on other lanes with which ``task`` needs more of a resource than there is, in some pair of modes."""
        own = self.problem.tasks[task]
        for other, rival in enumerate(self.problem.tasks):
            if other == task or rival.lane == own.lane or self.related[task] >> other & 1:
                continue
            for resource in sorted({name for mode in own.modes for name in mode.needs}):
                excess = {
                    (i, j): more
                    for i, mode in enumerate(own.modes)
                    for j, beside in enumerate(rival.modes)
                    if (more := _excess(mode, beside, resource)) > 0
                }
                if excess:
                    yield Rival(other, resource, excess)


def _excess(mode: Mode, beside: Mode, resource: str) -> int:
    """Parts by which both exceed the whole: needs rounded up where they are a loss's price, down here."""
    need, other = mode.needs.get(resource, 0.0), beside.needs.get(resource, 0.0)
    return math.floor((need + other - 1.0) * PARTS + 1e-9) if need and other else 0


def ancestors(problem: Problem) -> list[int]:
    """By task, as bits, those that are done before it starts in every schedule."""
    found: list[int] = []
    for task in problem.tasks:
        mask = 0
        for other in task.before:
            mask |= found[other] | 1 << other
        found.append(mask)
    return found
