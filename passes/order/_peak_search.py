"""The order of least peak, from both ends: levels of capacity that rise until an order fits, and probes above them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from ...compiler.pipeline import Budget, Progress
from ...compiler.plan import Certificate
from . import _reach as reach
from ._peak_arrays import BITS, COUNT, EXPANDED, LAST, NEVER, STACKED, Overwrites, graph_of, reached_of, scratch_of
from .problem import OrderProblem

__all__ = ["LeastPeak", "Overwrites", "aligned_peak", "certificate", "least_peak_order", "plain_bound"]

EFFORT = 200_000  # down-sets expanded in deterministic mode
INTERPRETED = 5_000  # operators times expansions, from each end, before machine code is worth its import
SLICE = 500  # expansions of the first compiled round, doubled every round
LONGEST_PROBE = 1 << 20  # expansions
POLL = 2_000_000  # operators times expansions between two looks at the clock
MEMORY_BYTES = 1 << 28  # for the down-sets of one end
WINDOW = 8  # words kept of a down-set at first; doubled where its operators are too far apart in program order
PROBES = (1.0, 0.5, 0.75)  # where between bound and peak probes are made, in turn


class LeastPeak(NamedTuple):
    """An order, its peak, and a bound that holds for every order; both in aligned bytes."""

    order: tuple[int, ...]
    peak: int
    bound: int


def least_peak_order(
    problem: OrderProblem,
    budget: Budget,
    *,
    overwrites: Overwrites | None = None,
    start: Sequence[int] | None = None,
    effort: int = EFFORT,
    floor: int = 0,
) -> LeastPeak:
    """The order whose largest sum of live bytes is least, with a bound proven over every order.

    Bytes are aligned ones: the ``footprint`` of ``problem``. A bound equal to the peak means that no order has a lower
    one, nor, with ``overwrites``, any choice of what is overwritten. Never fails because time ran out: the order is
    then the best found, at worst ``start`` (program order by default). Told to be deterministic, it stops after
    ``effort`` expanded down-sets instead of a time. ``floor`` is a bound that is known already.
    """
    count = len(problem.predecessors)
    first = tuple(range(count)) if start is None else tuple(start)
    allowed: Overwrites = overwrites if overwrites is not None else [()] * count
    search = _Search(problem, allowed, budget, effort, first, aligned_peak(problem, first, allowed), floor)
    search.run()
    return LeastPeak(search.order, search.peak, search.bound)


def plain_bound(
    problem: OrderProblem,
    found: LeastPeak,
    budget: Budget,
    *,
    overwrites: Overwrites | None = None,
    effort: int = EFFORT,
) -> int:
    """The bound of ``found`` in plain bytes, as certificates count them; another order may have the least of those."""
    if problem.footprint == problem.nbytes:
        return found.bound
    plain = replace(problem, footprint=problem.nbytes)
    # Where the most aligned bytes are live, all but their padding are plain.
    floor = found.bound - (sum(problem.footprint) - sum(problem.nbytes))
    start = found.order
    return least_peak_order(plain, budget, overwrites=overwrites, start=start, effort=effort, floor=floor).bound


def working_set_bound(problem: OrderProblem, sizes: Sequence[int], overwrites: Overwrites | None = None) -> int:
    """What the largest operator needs alone, bytes as ``sizes`` has them by buffer: a bound without any search."""
    allowed: Overwrites = overwrites if overwrites is not None else [()] * len(problem.touches)
    return max(
        (
            sum(sizes[b] for b in touched) - max((sizes[b] for b in replaced), default=0)
            for touched, replaced in zip(problem.touches, allowed, strict=True)
        ),
        default=0,
    )


def certificate(problem: OrderProblem, value: int, bound: int, overwrites: Overwrites | None = None) -> Certificate:
    """States a peak of ``value`` plain bytes, and ``bound`` with what proved it."""
    proved_by: Literal["analytic", "exhaustive"] = "exhaustive"
    if bound <= working_set_bound(problem, problem.nbytes, overwrites):
        proved_by = "analytic"
    return Certificate("peak_bytes", value, bound, proved_by, "order")


def aligned_peak(problem: OrderProblem, order: Sequence[int], overwrites: Overwrites | None = None) -> int:
    """Largest sum of live aligned bytes of ``order``, where results take the place of what they may overwrite."""
    left = [len(users) for users in problem.users]
    live = peak = 0
    for op in order:
        touched = problem.touches[op]
        live += sum(problem.footprint[b] for b in touched if left[b] == len(problem.users[b]))
        replaced = next((b for b in overwrites[op] if left[b] == 1), None) if overwrites else None
        peak = max(peak, live - (0 if replaced is None else problem.footprint[replaced]))
        for buffer in touched:
            left[buffer] -= 1
        live -= sum(problem.footprint[b] for b in touched if not left[b])
    return peak


@dataclass
class _Search:
    """The best order so far, its peak, and the bound proven."""

    problem: OrderProblem
    overwrites: Overwrites
    budget: Budget
    effort: int
    order: tuple[int, ...]
    peak: int
    bound: int = 0
    expanded: int = 0
    compiled: bool = field(default_factory=reach.is_compiled)
    begin: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Search from both ends in turn, for longer every round, and probe capacities in between."""
        problem = self.problem
        self.bound = max(self.bound, working_set_bound(problem, problem.footprint, self.overwrites))
        self._tell()
        if self.bound == self.peak:
            return
        ends = [_End(problem, self.overwrites, backward=backward) for backward in (False, True)]
        expansions = SLICE if self.compiled else max(1, INTERPRETED // len(self.order))
        turn = 0
        while not self._over() and expansions <= LONGEST_PROBE:
            for end in ends:
                self._advance(end, expansions)
            if turn:  # only hard graphs come to a second round
                self._probe(PROBES[turn % len(PROBES)], expansions, backward=turn % 2 == 0)
            turn += 1
            expansions = max(SLICE, 2 * expansions)
            self.compiled = True

    def _over(self) -> bool:
        if self.bound == self.peak or self.budget.stop.is_set():
            return True
        return self.expanded >= self.effort if self.budget.deterministic else not self.budget.remaining_s

    def _advance(self, end: _End, expansions: int) -> None:
        """Explore from ``end`` at the bound, which rises whenever everything within it has been reached in vain."""
        while expansions > 0 and not end.full and not self._over():
            end.raise_to(self.bound)
            expansions -= self._explore(end, expansions)

    def _probe(self, where: float, expansions: int, *, backward: bool) -> None:
        """Look for an order of a peak between bound and best, without having excluded all that lies below."""
        capacity = self.bound + int((self.peak - 1 - self.bound) * where)
        end = _End(self.problem, self.overwrites, backward=backward)
        end.raise_to(capacity)
        while expansions > 0 and not end.full and end.capacity < self.peak and not self._over():
            expansions -= self._explore(end, expansions)
            end.raise_to(self.bound)

    def _explore(self, end: _End, expansions: int) -> int:
        """Explore from ``end`` for at most so many ``expansions``; keeps what it finds, returns how many it took."""
        count = len(self.order)
        before = end.expanded
        status = end.explore(max(1, min(expansions, POLL // count)), compiled=self.compiled)
        if status == reach.FOUND:
            order = end.order()
            self.order, self.peak = order, aligned_peak(self.problem, order, self.overwrites)
            end.full = True
            self._tell()
        elif status == reach.CAPACITY_TOO_SMALL:
            self.bound = max(self.bound, min(end.next_capacity(), self.peak))
            self._tell()
        self.expanded += end.expanded - before
        return end.expanded - before

    def _tell(self) -> None:
        elapsed = time.monotonic() - self.begin
        self.budget.listen(Progress("order/least_peak", elapsed, self.peak, self.bound))


class _End:
    """Down-sets reached within ``capacity`` from the first operators on or, ``backward``, from the last ones."""

    def __init__(self, problem: OrderProblem, overwrites: Overwrites, *, backward: bool) -> None:
        self.capacity = 0
        self.full = False
        self._backward = backward
        self._graph = graph_of(problem, overwrites, backward=backward)
        self._words = -(-len(problem.predecessors) // BITS)
        self._expanded = 0
        self._start(min(WINDOW, self._words))

    def _start(self, window: int) -> None:
        """Begin, or begin again, with so many words a down-set."""
        self._reached = reached_of(self._graph, MEMORY_BYTES, window)
        self._scratch = scratch_of(self._graph)

    @property
    def expanded(self) -> int:
        """Down-sets expanded so far."""
        return self._expanded + int(self._reached.counters[EXPANDED])

    def raise_to(self, capacity: int) -> None:
        """Explore within ``capacity`` from now on: what it opens goes back to the stack."""
        if capacity <= self.capacity:
            return
        self.capacity = capacity
        r = self._reached
        opened = np.nonzero(r.blocked[: r.counters[COUNT]] <= capacity)[0]
        r.blocked[opened] = NEVER
        stacked = int(r.counters[STACKED])
        r.stack[stacked : stacked + len(opened)] = opened
        r.counters[STACKED] += len(opened)

    def next_capacity(self) -> int:
        """Least capacity at which there is more to reach, once everything within this one has been."""
        r = self._reached
        return int(r.blocked[: r.counters[COUNT]].min())

    def explore(self, expansions: int, *, compiled: bool) -> int:
        """Go on, for at most so many ``expansions``; returns what ``reach.explore`` does."""
        step = reach.compiled() if compiled else reach.explore
        status = int(step(self._graph, self._reached, self._scratch, self.capacity, expansions))
        self.full = self.full or status == reach.FULL
        if status == reach.WIDE:
            self._expanded = self.expanded
            self._start(min(2 * self._reached.bits.shape[1], self._words))
            return reach.UNFINISHED
        return status

    def order(self) -> tuple[int, ...]:
        """The operators as they ran up to the last down-set."""
        r = self._reached
        state = int(r.counters[LAST])
        order: list[int] = []
        while state > 0:
            order += r.log[r.log_start[state] : r.log_stop[state]].tolist()[::-1]
            state = int(r.parent[state])
        return tuple(len(order) - 1 - op for op in order) if self._backward else tuple(reversed(order))
