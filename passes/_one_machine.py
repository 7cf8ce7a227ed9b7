"""The least end of jobs on one machine that may interrupt them: what bounds schedules on an engine from below."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["preemptive"]

Time = TypeVar("Time", int, float)


def preemptive(jobs: Iterable[tuple[Time, Time, Time]], start: Time) -> Time:
    """When the last of ``jobs`` (head, work, tail) ends, the longest tail first (Jackson; Carlier 1982).

    ``start`` is what there is without jobs, and before it none begins: 0, of the times' own type.
    """
    waiting = sorted(jobs)
    ready: list[tuple[Time, Time]] = []  # minus the tail, and the work that is left
    now, end, place = start, start, 0
    while ready or place < len(waiting):
        if not ready:
            now = max(now, waiting[place][0])
        while place < len(waiting) and waiting[place][0] <= now:
            heapq.heappush(ready, (-waiting[place][2], waiting[place][1]))
            place += 1
        minus_tail, left = heapq.heappop(ready)
        until = waiting[place][0] if place < len(waiting) else now + left
        if now + left <= until:
            now += left
            end = max(end, now - minus_tail)
        else:
            heapq.heappush(ready, (minus_tail, left - (until - now)))
            now = until
    return end
