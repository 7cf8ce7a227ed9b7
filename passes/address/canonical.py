"""Search over canonical placements, compiled by numba: the inner loop of ``restarts.fit_by_search``.

In a *canonical* placement every item lies on the floor of a window or on top of another, and items are placed by
rising offset, equal offsets by rank. Take a placement whose offsets have the least sum: it is canonical, and whenever
an item's turn comes, no lower offset is open to it. So it suffices to search placements where each item lies at the
lowest offset that those placed before leave it.
MiniMalloc (Moffitt, "MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning", ASPLOS
2023) searches such placements, with bounds by section of time, dominance and decomposition. The bound here is
stronger than a section's sum: its items are jobs on one machine, released at the lowest offset each can still have,
that must be done by the capacity; in order of release they are done as early as any order has them.

Arrays are by item and in units, if not said otherwise. Sections are the stretches between two times at which items
come or go; ``first`` and ``behind`` are the half-open range of an item's sections. Offsets ``low[w]`` to ``high[w]``
are allowed to item ``i`` for ``w`` from ``window[i]`` to ``window[i + 1] - 1``, rising: one range for most items,
several where there are banks or pins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._compiled import compiled

__all__ = ["BY_PREFERENCE", "BY_SLACK", "IMPOSSIBLE", "PLACED", "STOPPED", "search"]

PLACED, IMPOSSIBLE, STOPPED = 1, 0, -1
BY_PREFERENCE, BY_SLACK = 0, 1  # which of several candidates at one offset comes first
OFFSET_WEIGHT = 1e6  # lower offsets before any rule
NOWHERE = 2**60  # the offset of an item that has no place left

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@compiled
def search(
    items: Integers,  # of one component, by first section
    floor: int,  # offset of the item placed last, and its rank
    last: int,
    offset: Integers,  # the lowest an item can still have; where it lies, once placed
    size: Integers,
    low: Integers,  # by window
    high: Integers,
    window: Integers,
    first: Integers,
    behind: Integers,
    rank: Integers,
    preference: Floats,
    rule: int,
    capacity: int,
    filled: Integers,  # by section: scratch
    control: Integers,  # nodes left; not 0 to stop
) -> Any:
    """Place ``items``: PLACED, with their offsets; IMPOSSIBLE; or STOPPED, when told to or when nodes ran out."""
    control[0] -= 1
    if control[0] < 0 or control[1] != 0:
        return STOPPED
    if not _may_fit(items, floor, offset, size, low, high, window, first, behind, capacity, filled):
        return IMPOSSIBLE
    chosen = _candidates(items, floor, last, offset, size, first, behind, rank, preference, rule, capacity, filled)
    rest = np.empty(len(items) - 1, np.int64)
    before = np.empty(len(items) - 1, np.int64)
    for i in chosen:
        _put(i, items, rest, before, offset, size, low, high, window, first, behind)
        verdict = PLACED
        start = 0
        while start < len(rest) and verdict == PLACED:  # parts that share no section are placed one by one
            stop = _part_end(rest, start, first, behind)
            verdict = search(rest[start:stop].copy(), offset[i], rank[i], offset, size, low, high, window,
                             first, behind, rank, preference, rule, capacity, filled, control)  # fmt: skip
            start = stop
        if verdict == PLACED:
            return PLACED
        for k in range(len(rest)):
            offset[rest[k]] = before[k]
        if verdict == STOPPED:
            return STOPPED
    return IMPOSSIBLE


@compiled
def _may_fit(
    items: Integers,
    floor: int,
    offset: Integers,
    size: Integers,
    low: Integers,
    high: Integers,
    window: Integers,
    first: Integers,
    behind: Integers,
    capacity: int,
    filled: Integers,
) -> Any:
    """Whether no item and no section proves that ``items`` cannot be placed; leaves in ``filled`` what each reaches."""
    release = np.empty(len(items), np.int64)
    for k in range(len(items)):
        i = items[k]
        release[k] = _lifted(i, max(offset[i], floor), low, high, window)
        if release[k] == NOWHERE:
            return False
        filled[first[i] : behind[i]] = 0
    for k in np.argsort(release):
        i = items[k]
        for s in range(first[i], behind[i]):
            filled[s] = max(filled[s], release[k]) + size[i]
            if filled[s] > capacity:
                return False
    return True


@compiled
def _candidates(
    items: Integers,
    floor: int,
    last: int,
    offset: Integers,
    size: Integers,
    first: Integers,
    behind: Integers,
    rank: Integers,
    preference: Floats,
    rule: int,
    capacity: int,
    filled: Integers,
) -> Any:
    """Items that may come next in a canonical placement, the most promising first.

    Left out is an item that begins where another one could already have ended: that one could be slid below it, and the
    placement is found where that one comes first.
    """
    reach = (offset[items] + size[items]).min()
    chosen = np.empty(len(items), np.int64)
    key = np.empty(len(items), np.float64)
    count = 0
    for i in items:
        if offset[i] >= reach or offset[i] < floor or (offset[i] == floor and rank[i] <= last):
            continue
        chosen[count] = i
        key[count] = offset[i] * OFFSET_WEIGHT - preference[i]
        if rule == BY_SLACK:
            slack = capacity - filled[first[i] : behind[i]].max()
            key[count] = offset[i] * OFFSET_WEIGHT + slack - preference[i] / OFFSET_WEIGHT
        count += 1
    return chosen[:count][np.argsort(key[:count])]


@compiled
def _put(
    item: int,
    items: Integers,
    rest: Integers,
    before: Integers,
    offset: Integers,
    size: Integers,
    low: Integers,
    high: Integers,
    window: Integers,
    first: Integers,
    behind: Integers,
) -> None:
    """Place ``item`` where it is: others go to ``rest``, their offsets to ``before``, and it lifts what it meets."""
    top = offset[item] + size[item]
    k = 0
    for other in items:
        if other != item:
            rest[k], before[k] = other, offset[other]
            k += 1
            if first[other] < behind[item] and first[item] < behind[other]:
                offset[other] = _lifted(other, max(offset[other], top), low, high, window)


@compiled
def _lifted(item: int, least: int, low: Integers, high: Integers, window: Integers) -> Any:
    """The lowest offset, from ``least`` on, that is allowed to ``item``."""
    for w in range(window[item], window[item + 1]):
        if least <= high[w]:
            return max(least, low[w])
    return NOWHERE


@compiled
def _part_end(items: Integers, start: int, first: Integers, behind: Integers) -> Any:
    """Position behind the items from ``start`` on that hang together by shared sections."""
    stop = start + 1
    until = behind[items[start]]
    while stop < len(items) and first[items[stop]] < until:
        until = max(until, behind[items[stop]])
        stop += 1
    return stop
