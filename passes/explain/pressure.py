"""Steps that prove a bound: positions whose shortages force transfers, no byte of which is counted twice.

At a position ``p`` the gaps across it must free ``need[p]`` bytes, so the cheapest choice that does (a covering
knapsack) moves at least its cost. Positions that share gaps must not both count them. Therefore each gap has a purse:
the bytes its load moves, and, shared with the other gaps of its version, those of the one store. A position counts
only what is left in the purses, and takes out of each what its proof needs, at most the position's own bound. Adding
up over positions is then valid for every residency: dropping a gap pays each position no more than the purse held.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..residency.formulation import undominated
from ..residency.gaps import GapProblem

__all__ = ["Force", "forces", "least_cover", "relaxed_cover"]

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
        self.version = [interval.version for interval in problem.intervals]
        self.load = [interval.nbytes for interval in problem.intervals]
        self.store = {i.version: i.nbytes for i in problem.intervals if i.version is not None}

    def left(self, i: int) -> int:
        version = self.version[i]
        return self.load[i] + (0 if version is None else self.store[version])

    def take(self, i: int, nbytes: int) -> None:
        """The load first: the store is of use to other gaps."""
        from_load = min(nbytes, self.load[i])
        self.load[i] -= from_load
        version = self.version[i]
        if version is not None:
            self.store[version] -= nbytes - from_load


def forces(problem: GapProblem) -> list[Force]:
    """Positions that together prove additional traffic beyond ``base_bytes``, those that prove most first.

    Greedy: the position that can prove most from the purses as they are, until none proves anything.
    """
    need = -problem.slack(())
    rows = [undominated(problem, frozenset(), need[d]) for d in range(need.shape[0])]
    across = _across(problem, np.unique(np.concatenate(rows)))
    purses = _Purses(problem)
    queue = [(-math.inf, p, d) for d, positions in enumerate(rows) for p in positions.tolist()]
    heapq.heapify(queue)
    found: list[Force] = []
    while queue:
        promised, p, d = heapq.heappop(queue)
        members = across[p]
        sizes = [problem.intervals[i].sizes[d] for i in members]
        costs = [purses.left(i) for i in members]
        fresh = relaxed_cover(sizes, costs, int(need[d, p]))
        if fresh == 0:
            continue
        if queue and -fresh > queue[0][0] and -fresh > promised:  # purses were emptied since it was promised
            heapq.heappush(queue, (-fresh, p, d))
            continue
        exact = least_cover(sizes, costs, int(need[d, p])) if len(found) < MAX_EXACT else fresh
        found.append(Force(p, d, exact))
        spans = [problem.intervals[i].end - problem.intervals[i].begin for i in members]
        for i, charge in zip(members, _charges(sizes, costs, int(need[d, p]), exact, spans), strict=True):
            purses.take(i, charge)
    return sorted(found, key=lambda force: (-force.nbytes, force.position))


def _across(problem: GapProblem, positions: NDArray[np.intp]) -> dict[int, list[int]]:
    """The gaps across each of ``positions``, which rise."""
    across: dict[int, list[int]] = {p: [] for p in positions.tolist()}
    for i, interval in enumerate(problem.intervals):
        first, behind = np.searchsorted(positions, (interval.begin, interval.end))
        for p in positions[first:behind].tolist():
            across[p].append(i)
    return across


def relaxed_cover(sizes: Sequence[int], costs: Sequence[int], need: int) -> int:
    """A lower bound on ``least_cover``: what must be taken is, and the rest may be taken in part; rounded up."""
    cost, need, rest = _compulsory(sizes, costs, need)
    if need <= 0:
        return cost
    items = sorted((costs[i] / min(sizes[i], need), min(sizes[i], need), costs[i]) for i in rest)
    left, fraction = need, 0.0
    for _, size, price in items:
        if left <= 0:
            break
        share = min(1.0, left / size)
        fraction += share * price
        left -= size
    return cost + math.ceil(fraction * (1 - 1e-12) - 1e-6)


def least_cover(sizes: Sequence[int], costs: Sequence[int], need: int) -> int:
    """The least total of ``costs`` over items whose ``sizes`` sum to at least ``need``, which all of them do.

    Exact up to 1,000,000 cells of dynamic programming, else the LP relaxation's value.
    """
    cost, rest_need, rest = _compulsory(sizes, costs, need)
    if rest_need <= 0:
        return cost
    unit = math.gcd(*(sizes[i] for i in rest))
    width = -(-rest_need // unit)
    if width * len(rest) > MAX_CELLS:
        return relaxed_cover(sizes, costs, need)
    unreachable = np.int64(2**62)
    best = np.full(width + 1, unreachable)  # by units still needed, the least cost so far
    best[width] = 0
    for i in rest:
        size = min(sizes[i] // unit, width)
        taken = np.full(width + 1, unreachable)
        taken[: width + 1 - size] = best[size:] + costs[i]
        taken[0] = best[: size + 1].min() + costs[i]
        np.minimum(best, taken, out=best)
    return cost + int(best[0])


def _charges(sizes: Sequence[int], costs: Sequence[int], need: int, proven: int, spans: Sequence[int]) -> list[int]:
    """As little of ``costs`` as still proves that ``proven`` must be paid.

    No more than all of it, and less if every choice with the item pays more than ``proven``: then what it pays too
    much is left in the purse. Items that span the most positions come first, as others may need them.
    """
    charges = [min(cost, proven) for cost in costs]
    if sum(sizes) // math.gcd(*sizes) * len(sizes) ** 2 > MAX_CELLS:
        return charges
    for i in sorted(range(len(sizes)), key=lambda i: -spans[i]):
        others = [k for k in range(len(sizes)) if k != i]
        rest = least_cover([sizes[k] for k in others], [charges[k] for k in others], need - sizes[i])
        charges[i] -= min(charges[i], max(0, charges[i] + rest - proven))
    return charges


def _compulsory(sizes: Sequence[int], costs: Sequence[int], need: int) -> tuple[int, int, list[int]]:
    """Cost of the items without which the others do not suffice, what they leave to cover, and the others."""
    total = sum(sizes)
    must = [i for i, size in enumerate(sizes) if total - size < need]
    chosen = set(must)
    rest = [i for i in range(len(sizes)) if i not in chosen and sizes[i] > 0]
    return sum(costs[i] for i in must), need - sum(sizes[i] for i in must), rest
