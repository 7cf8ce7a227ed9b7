"""Placement by search with restarts: canonical placements, in many orders of preference, each for a limited time.

Which placement a search meets first depends on the order in which it tries items, and its time varies by orders of
magnitude. So each of a few orders is tried for a number of nodes, then for twice as many, and in between the same
orders with random changes for numbers of nodes that follow Luby's sequence (Luby, Sinclair & Zuckerman, 1993). A
search that ends by itself has tried everything, whatever its order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...compiler.pipeline import Budget
from .canonical import BY_PREFERENCE, BY_SLACK, IMPOSSIBLE, PLACED, search
from .no_overlap import POLL_S, Answer, Verdict
from .packing import Packing, Range

__all__ = ["fit_by_search"]

FIRST_LIMIT = 1_000  # nodes of the first, shortest searches
NOISE = 0.05  # standard deviation of random changes to a preference, as a share of all ranks
NODES_PER_SECOND = 100_000  # what one deterministic second is taken for

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _Try:
    """One search: how it orders items, and its limit in nodes."""

    preference: Floats
    rule: int
    limit: int


def fit_by_search(packing: Packing, items: Sequence[int], capacity: int, budget: Budget, *, seconds: float) -> Answer:
    """Place ``items`` so that all end within ``capacity`` bytes.

    ``seconds`` are wall seconds, or ``NODES_PER_SECOND`` nodes each if the budget asks for determinism.
    """
    ranges = _beside_fixed(packing, items, [packing.offsets(i, capacity) for i in items])
    if not all(ranges):
        return Answer(Verdict.IMPOSSIBLE)
    problem = _Problem.of(packing, items, ranges)
    deadline = time.monotonic() + seconds
    nodes = round(seconds * NODES_PER_SECOND) if budget.deterministic else sys.maxsize

    def over() -> bool:
        return budget.stop.is_set() or (not budget.deterministic and time.monotonic() >= deadline)

    with ThreadPoolExecutor(1) as thread:
        for attempt in problem.tries(np.random.default_rng(budget.seed)):
            if over() or nodes <= 0:
                break
            verdict, offsets, used = problem.run(attempt, min(nodes, attempt.limit), thread, over)
            nodes -= used
            if verdict == PLACED:
                return Answer(Verdict.PLACED, offsets)
            if verdict == IMPOSSIBLE:
                return Answer(Verdict.IMPOSSIBLE)
    return Answer(Verdict.UNKNOWN)


@dataclass(frozen=True)
class _Problem:
    """The arrays that ``canonical.search`` takes; item ``k`` is ``items[k]``, lengths are in units of ``scale``."""

    size: Integers
    low: Integers
    high: Integers
    window: Integers
    first: Integers
    behind: Integers
    sections: int
    capacity: int
    scale: int
    preferences: tuple[Floats, ...]

    @classmethod
    def of(cls, packing: Packing, items: Sequence[int], ranges: Sequence[Sequence[Range]]) -> _Problem:
        """Sections of the items' steps, and units divided by what they have in common; ``ranges`` are of offsets."""
        first, behind = _sections(packing, items)
        scale = packing.divisor(items)
        size = np.array([packing.units[i] // scale for i in items], np.int64)
        return cls(
            size=size,
            low=np.array([low // scale for allowed in ranges for low, _ in allowed], np.int64),
            high=np.array([high // scale for allowed in ranges for _, high in allowed], np.int64),
            window=np.cumsum([0, *(len(allowed) for allowed in ranges)], dtype=np.int64),
            first=first,
            behind=behind,
            sections=int(behind.max()),
            capacity=max(int(units) + allowed[-1][1] // scale for units, allowed in zip(size, ranges, strict=True)),
            scale=scale,
            preferences=_preferences(size, first, behind),
        )

    def tries(self, random: np.random.Generator) -> Iterator[_Try]:
        """Searches to make, without end."""
        count = len(self.size)
        number, limit = 0, FIRST_LIMIT
        while True:
            for rule in (BY_PREFERENCE, BY_SLACK):
                for preference in self.preferences:
                    yield _Try(preference, rule, limit)
            changed = 2 * len(self.preferences) * limit
            while changed > 0:
                number += 1
                nodes = FIRST_LIMIT * _luby(number)
                changed -= nodes
                preference = self.preferences[int(random.integers(len(self.preferences)))]
                rule = BY_SLACK if random.integers(2) else BY_PREFERENCE
                yield _Try(preference + random.normal(0, count * NOISE, count), rule, nodes)
            limit *= 2

    def run(
        self, attempt: _Try, limit: int, thread: ThreadPoolExecutor, over: Callable[[], bool]
    ) -> tuple[int, tuple[int, ...], int]:
        """Verdict, offsets in units by item, and nodes used; ``over`` is asked now and then whether to stop."""
        count = len(self.size)
        offset = self.low[self.window[:-1]]
        control = np.array([limit, 0], np.int64)
        rank = np.empty(count, np.int64)
        rank[np.argsort(-attempt.preference, kind="stable")] = np.arange(count)
        future = thread.submit(
            search,
            *(np.argsort(self.first, kind="stable"), 0, -1, offset, self.size, self.low, self.high, self.window),
            *(
                self.first,
                self.behind,
                rank,
                attempt.preference,
                attempt.rule,
                self.capacity,
                np.zeros(self.sections, np.int64),
                control,
            ),
        )
        while not wait([future], timeout=POLL_S).done:
            control[1] = int(over())
        offsets = tuple(int(o) * self.scale for o in offset)
        return int(future.result()), offsets, limit - max(0, int(control[0]))


def _beside_fixed(
    packing: Packing, items: Sequence[int], ranges: Sequence[tuple[Range, ...]]
) -> list[tuple[Range, ...]]:
    """``ranges`` of offsets without those at which an item would overlap another one that has no choice."""
    left = list(ranges)
    for k, fixed in enumerate(items):
        if sum(high - low + 1 for low, high in ranges[k]) != 1:
            continue
        place = ranges[k][0][0]
        for other, item in enumerate(items):
            if other != k and packing.overlap(fixed, item):
                below, above = place - packing.units[item], place + packing.units[fixed]
                pieces = [(low, min(high, below)) for low, high in left[other]]
                pieces += [(max(low, above), high) for low, high in left[other]]
                left[other] = tuple(sorted((low, high) for low, high in pieces if low <= high))
    return left


def _sections(packing: Packing, items: Sequence[int]) -> tuple[Integers, Integers]:
    """The half-open range of sections of each item, one section for each largest set of items that are live together.

    Any other step holds a subset of such a set, and so bounds nothing that it does not.
    """
    first, behind = np.zeros(len(items), np.int64), np.zeros(len(items), np.int64)
    events: dict[int, tuple[list[int], list[int]]] = {}
    for k, item in enumerate(items):
        events.setdefault(packing.begins[item], ([], []))[0].append(k)
        events.setdefault(packing.ends[item], ([], []))[1].append(k)
    section = 0
    grown = False
    for step in sorted(events):
        coming, going = events[step]
        if going and grown:
            section, grown = section + 1, False
        behind[going] = section
        first[coming] = section
        grown = grown or bool(coming)
    return first, behind


def _preferences(size: Integers, first: Integers, behind: Integers) -> tuple[Floats, ...]:
    """Orders in which to try items, as ranks; the higher one comes first.

    By first and last section, number of sections (``span``), size, area, and how full the item's sections are: the
    fullest (``crowd``), on average, or together. Each order solves some real instance by far the soonest.
    """
    fill = np.zeros(int(behind.max()), np.int64)
    for a, b, units in zip(first, behind, size, strict=True):
        fill[a:b] += units
    ranges = list(zip(first, behind, strict=True))
    crowd = np.array([fill[a:b].max() for a, b in ranges])
    average = np.array([fill[a:b].mean() for a, b in ranges])
    together = np.array([fill[a:b].sum() for a, b in ranges])
    span = behind - first
    keys = (
        (behind, -first, size),
        (-first, behind, size),
        (-first, -behind, size),
        (-first, crowd, size),
        (crowd, together, size),
        (crowd, behind, size),
        (behind, crowd, average),
        (size * span, span),
    )
    ranks = []
    for key in keys:
        rank = np.empty(len(size))
        rank[np.lexsort(key[::-1])] = np.arange(len(size))
        ranks.append(rank)
    return tuple(ranks)


def _luby(number: int) -> int:
    """Luby's sequence from 1 on: 1, 1, 2, 1, 1, 2, 4, ..."""
    power = 1 << number.bit_length()
    if number == power - 1:
        return power // 2
    return _luby(number - power // 2 + 1)
