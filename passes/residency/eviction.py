"""Eviction along an order: walk it once, and drop gaps wherever the operators leave too little room for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from .gaps import GapProblem

__all__ = ["Chooser", "evict", "refill"]

#: Picks victims: given the problem, the intervals resident across the position, the shortage by capacity dimension,
#: and the versions stored before, it returns at least one of the resident ones.
Chooser = Callable[[GapProblem, Collection[int], Sequence[int], Collection[tuple[str, int] | None]], Sequence[int]]


def evict(problem: GapProblem, choose: Chooser) -> set[int]:
    """Indices of the intervals dropped when ``choose`` picks the victims, walking the order from front to back."""
    positions = problem.room.shape[1]
    begins: list[list[int]] = [[] for _ in range(positions + 1)]
    ends: list[list[int]] = [[] for _ in range(positions + 1)]
    for i, interval in enumerate(problem.intervals):
        if interval.begin < interval.end:
            begins[interval.begin].append(i)
            ends[interval.end].append(i)
    resident: dict[int, None] = {}  # a set in the order of insertion
    used = np.zeros(problem.room.shape[0], dtype=np.int64)
    dropped: set[int] = set()
    stored: set[tuple[str, int] | None] = {None}

    def remove(i: int) -> None:
        del resident[i]
        used[:] -= problem.intervals[i].sizes

    for position in range(positions):
        for i in ends[position]:
            if i in resident:
                remove(i)
        for i in begins[position]:
            resident[i] = None
            used += problem.intervals[i].sizes
        while (used > problem.room[:, position]).any():
            for i in choose(problem, resident, (used - problem.room[:, position]).tolist(), stored):
                remove(i)
                dropped.add(i)
                stored.add(problem.intervals[i].version)
    return dropped


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
