"""Large-neighbourhood search on an order: windows of it are ordered afresh, mostly where something is evicted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from .down_sets import DownSets, Rule
from .problem import Eviction, OrderProblem

__all__ = ["improve"]

SMALLEST_WINDOW = 8
LARGEST_WINDOW = 400
WIDTHS = (1, 4, 16)
AIMED = 0.7  # share of windows that lie where a buffer is evicted or fetched again
TEMPERATURE = 0.003  # a rise of this part of the best spill is accepted with probability 1/e
RETURN_AFTER = 300  # windows without a new best order, after which the search goes back to the best


def improve(
    problem: OrderProblem,
    order: list[int],
    *,
    patience: int,
    seed: int,
    halted: Callable[[], bool],
    found: Callable[[int], None],
) -> list[int]:
    """Search from ``order`` until ``patience`` windows in a row gave no new best, nothing spills, or ``halted``.

    Windows, beam widths and rules are drawn from ``seed``; a capacity below the real one makes a rule look ahead
    for memory, one above it lets it overlook small excesses. Slightly worse orders are accepted at times (simulated
    annealing), the best is returned. ``found`` hears every improved spill estimate, bytes.
    """
    down_sets = DownSets(problem)
    draw = random.Random(seed)  # seeded: a search needs variety, not secrecy
    evictions = problem.evictions(order)
    spill = lowest = _spill(evictions)
    best, fruitless = (order, evictions), 0
    while lowest and fruitless < patience and not halted():
        fruitless += 1
        if fruitless % RETURN_AFTER == 0:
            (order, evictions), spill = best, lowest
        begin, end = _window(draw, len(order), evictions)
        window = order[begin:end]
        ties = [draw.random() for _ in order]
        rule, width = _rule(draw, problem.capacity), draw.choice(WIDTHS)
        fresh = down_sets.order(rule, width, halted, prefix=order[:begin], operators=window, ties=ties)
        if fresh is None or fresh == window:
            continue
        candidate = [*order[:begin], *fresh, *order[end:]]
        expected = problem.evictions(candidate)
        rise = _spill(expected) - spill
        if rise <= 0 or draw.random() < math.exp(-rise / (TEMPERATURE * lowest)):
            order, evictions, spill = candidate, expected, spill + rise
        if spill < lowest:
            best, lowest, fruitless = (order, evictions), spill, 0
            found(lowest)
    return best[0]


def _spill(evictions: Sequence[Eviction]) -> int:
    return sum(eviction.nbytes for eviction in evictions)


def _window(draw: random.Random, count: int, evictions: Sequence[Eviction]) -> tuple[int, int]:
    """A stretch of positions; short ones are as likely as long ones (log-uniform)."""
    largest = max(SMALLEST_WINDOW, min(LARGEST_WINDOW, count // 3))
    length = min(count, int(SMALLEST_WINDOW * (largest / SMALLEST_WINDOW) ** draw.random()))
    begin = draw.randrange(count - length + 1)
    if evictions and draw.random() < AIMED:
        eviction = draw.choice(evictions)
        middle = draw.choice((eviction.step, eviction.next_use, (eviction.step + eviction.next_use) // 2))
        begin = min(max(0, middle - draw.randrange(length + 1)), count - length)
    return begin, begin + length


def _rule(draw: random.Random, capacity: int) -> Rule:
    return Rule(
        capacity=int(capacity * draw.uniform(0.6, 1.1)),
        returning=draw.random() < 0.7,
        weight=draw.choice((0.0, 0.5, 1.0)),
        eager=draw.random() < 0.7,
    )
