"""Eviction along an order: walk it once, and drop gaps wherever the operators leave too little room for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from .gaps import GapProblem

__all__ = ["Chooser", "evict", "refill"]

#: Picks victims: given the problem, the intervals resident across the position, the shortage by capacity dimension, and
#: those dropped before, it returns at least one of the resident ones.
Chooser = Callable[[GapProblem, Sequence[int], Sequence[int], Collection[int]], Sequence[int]]


def evict(problem: GapProblem, choose: Chooser) -> set[int]:
    """Indices of the intervals dropped when ``choose`` picks the victims, walking the order from front to back."""
    starting: dict[int, list[int]] = {}
    for i, interval in enumerate(problem.intervals):
        if interval.begin < interval.end:
            starting.setdefault(interval.begin, []).append(i)
    resident: list[int] = []
    dropped: set[int] = set()
    for position in range(problem.room.shape[1]):
        resident = [i for i in resident if problem.intervals[i].end > position] + starting.get(position, [])
        shortage = _shortage(problem, resident, position)
        while max(shortage) > 0:
            dropped.update(choose(problem, resident, shortage, dropped))
            resident = [i for i in resident if i not in dropped]
            shortage = _shortage(problem, resident, position)
    return dropped


def _shortage(problem: GapProblem, resident: Sequence[int], position: int) -> list[int]:
    return [
        sum(problem.intervals[i].sizes[d] for i in resident) - int(room)
        for d, room in enumerate(problem.room[:, position])
    ]


def refill(problem: GapProblem, dropped: Collection[int]) -> set[int]:
    """Keep dropped intervals again where there is room after all, the most bytes saved first.

    A victim leaves room from its last use on, not only from where it was chosen, so a walk drops more than it must.
    """
    left = set(dropped)
    slack = problem.slack(left)
    saving = _savings(problem, left)
    for i in sorted(left, key=lambda i: (-saving[i], i)):
        interval = problem.intervals[i]
        window = slack[:, interval.begin : interval.end]
        if all((window[d] >= size).all() for d, size in enumerate(interval.sizes)):
            window -= np.array(interval.sizes)[:, None]
            left.discard(i)
    return left


def _savings(problem: GapProblem, dropped: Collection[int]) -> dict[int, int]:
    """Bytes saved by keeping each dropped interval again: its load, and its share of the store of its version."""
    sharers = Counter(problem.intervals[i].version for i in dropped)
    return {
        i: interval.nbytes + (0 if interval.version is None else interval.nbytes // sharers[interval.version])
        for i, interval in ((i, problem.intervals[i]) for i in dropped)
    }
