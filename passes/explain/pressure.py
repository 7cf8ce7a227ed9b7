"""Steps that prove a bound: positions whose shortages force transfers, no byte of which is counted twice.

At a position ``p`` the gaps across it must free ``need[p]`` bytes, so the cheapest choice that does (a covering
knapsack) moves at least its cost. Positions that share gaps must not both count them. Therefore each gap has a purse:
the bytes its load moves, and, shared with the other gaps of its version, those of the one store. A position counts
only what is left in the purses, and takes out of each what its proof needs, at most the position's own bound. Adding
up over positions is then valid for every residency: dropping a gap pays each position no more than the purse held.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..residency.formulation import undominated
from ..residency.gaps import GapProblem

__all__ = ["Force", "forces", "least_cover", "relaxed_cover"]

Integers = NDArray[np.int64]
MAX_CELLS = 1_000_000  # of one exact knapsack; larger ones count their LP relaxation
MAX_EXACT = 200  # knapsacks solved exactly; those behind them count their LP relaxation


@dataclass(frozen=True)
class Force:
    """``nbytes`` of additional traffic that position ``position`` proves in capacity dimension ``dimension``."""

    position: int
    dimension: int
    nbytes: int


class _Purses:
    """What each gap can still pay, in bytes: its load, and its version's store as long as no one took it."""

    def __init__(self, problem: GapProblem) -> None:
        numbers: dict[tuple[str, int], int] = {}
        versions = [i.version for i in problem.intervals]
        self.version = np.array([-1 if v is None else numbers.setdefault(v, len(numbers)) for v in versions], np.int64)
        self.load = np.array([i.nbytes for i in problem.intervals], np.int64)
        self.store = np.zeros(len(numbers) + 1, np.int64)  # the last one, for number -1, stays empty
        self.store[self.version] = np.where(self.version < 0, 0, self.load)

    def left(self, members: Integers) -> Integers:
        return self.load[members] + self.store[self.version[members]]

    def take(self, members: Integers, charges: Integers) -> None:
        """The load first: the store is of use to other gaps. A position has one gap of a version at most."""
        from_load = np.minimum(charges, self.load[members])
        self.load[members] -= from_load
        self.store[self.version[members]] -= charges - from_load


def forces(problem: GapProblem) -> list[Force]:
    """Positions that together prove additional traffic beyond ``base_bytes``, those that prove most first.

    Greedy: the position that can prove most from the purses as they are, until none proves anything.
    """
    if not problem.intervals:
        return []
    need = -problem.slack(())
    begin, end = (np.array([getattr(i, edge) for i in problem.intervals], np.int64) for edge in ("begin", "end"))
    sizes = np.array([i.sizes for i in problem.intervals], np.int64)
    purses = _Purses(problem)
    queue = _candidates(problem, need, 2 * int(sizes.max()))
    found: list[Force] = []
    while queue:
        promised, p, d = heapq.heappop(queue)
        members = np.flatnonzero((begin <= p) & (p < end))
        costs, needed = purses.left(members), int(need[d, p])
        fresh = relaxed_cover(sizes[members, d], costs, needed) if costs.any() else 0
        if fresh == 0:
            continue
        if queue and -fresh > queue[0][0] and fresh < -promised:  # purses were emptied since it was promised
            heapq.heappush(queue, (-fresh, p, d))
            continue
        proven = least_cover(sizes[members, d], costs, needed) if len(found) < MAX_EXACT else fresh
        found.append(Force(p, d, proven))
        longest_first = np.argsort(begin[members] - end[members], kind="stable")
        purses.take(members, _charges(sizes[members, d], costs, needed, proven, longest_first))
    return sorted(found, key=lambda force: (-force.nbytes, force.position))


def _candidates(problem: GapProblem, need: Integers, largest: int) -> list[tuple[int, int, int]]:
    """A heap of the positions that no other implies, each with a promise it cannot exceed, negated, and its dimension.

    Freeing what is needed takes less than the need and one more gap, each byte of which moves twice at most.
    """
    queue = [
        (-2 * int(need[d, p]) - 2 * largest, int(p), d)
        for d in range(need.shape[0])
        for p in undominated(problem, frozenset(), need[d])
    ]
    heapq.heapify(queue)
    return queue


def relaxed_cover(sizes: Integers, costs: Integers, need: int) -> int:
    """A lower bound on ``least_cover``: what must be taken is, and the rest may be taken in part; rounded up."""
    cost, need, rest = _compulsory(sizes, costs, need)
    if need <= 0:
        return cost
    size, price = np.minimum(sizes[rest], need), costs[rest]
    order = np.argsort(price / size, kind="stable")
    last = order[int(np.searchsorted(np.cumsum(size[order]), need))]  # the item with which there is enough
    # Its price by the byte is a dual solution. Any is, so that the bound holds though the order is one of floats.
    p, s = int(price[last]), int(size[last])
    largest = max(p, s, 1) * int(max(size.max(), price.max()))
    exact = (size, price) if largest * len(size) < 2**62 else (size.astype(object), price.astype(object))
    excess = int(np.maximum(p * exact[0] - s * exact[1], 0).sum())
    return cost + max(0, -((excess - p * need) // s))


def least_cover(sizes: Integers, costs: Integers, need: int) -> int:
    """The least total of ``costs`` over items whose ``sizes`` sum to at least ``need``, which all of them do.

    Exact up to 1,000,000 cells of dynamic programming, else the LP relaxation's value.
    """
    cost, rest_need, rest = _compulsory(sizes, costs, need)
    if rest_need <= 0:
        return cost
    unit = int(np.gcd.reduce(sizes[rest]))
    width = -(-rest_need // unit)
    if width * len(rest) > MAX_CELLS:
        return relaxed_cover(sizes, costs, need)
    unreachable = 2**62
    best = np.full(width + 1, unreachable, np.int64)  # by units still needed, the least cost so far
    best[width] = 0
    for i in rest:
        size = min(int(sizes[i]) // unit, width)
        taken = np.full(width + 1, unreachable, np.int64)
        taken[: width + 1 - size] = best[size:] + costs[i]
        taken[0] = best[: size + 1].min() + costs[i]
        np.minimum(best, taken, out=best)
    return cost + int(best[0])


def _charges(sizes: Integers, costs: Integers, need: int, proven: int, order: Integers) -> Integers:
    """As little of ``costs`` as still proves that ``proven`` must be paid.

    No more than all of it, and less if every choice with the item pays more than ``proven``: then what it pays too
    much is left in the purse. Items come in ``order``: first those that leave most to other positions.
    """
    charges = np.minimum(costs, proven)
    if need // int(np.gcd.reduce(sizes)) * len(sizes) ** 2 > MAX_CELLS:
        return charges
    for i in order:
        others = np.flatnonzero(np.arange(len(sizes)) != i)
        with_it = int(charges[i]) + least_cover(sizes[others], charges[others], need - int(sizes[i]))
        charges[i] -= min(int(charges[i]), max(0, with_it - proven))
    return charges


def _compulsory(sizes: Integers, costs: Integers, need: int) -> tuple[int, int, NDArray[np.intp]]:
    """Cost of the items without which the others do not suffice, what they leave to cover, and the others."""
    must = int(sizes.sum()) - sizes < need
    return int(costs[must].sum()), need - int(sizes[must].sum()), np.flatnonzero(~must)
