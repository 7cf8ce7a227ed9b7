"""Large-neighbourhood search on an order: windows of it are ordered afresh and kept when no worse."""

from __future__ import annotations

import random
from collections.abc import Callable

from .down_sets import DownSets, Rule
from .problem import OrderProblem

__all__ = ["improve"]

SMALLEST_WINDOW = 8
LARGEST_WINDOW = 400
WIDTHS = (1, 4, 16)


def improve(
    problem: OrderProblem,
    order: list[int],
    *,
    patience: int,
    seed: int,
    halted: Callable[[], bool],
    found: Callable[[int], None],
) -> list[int]:
    """Search from ``order`` until ``patience`` windows in a row improved nothing, nothing spills, or ``halted``.

    Windows, beam widths and rules are drawn from ``seed``; a capacity below the real one makes a rule look ahead
    for memory, one above it lets it overlook small excesses. ``found`` hears every improved spill estimate, bytes.
    """
    down_sets = DownSets(problem)
    draw = random.Random(seed)  # seeded: a search needs variety, not secrecy
    best = problem.spill_bytes(order)
    fruitless = 0
    while best and fruitless < patience and not halted():
        fruitless += 1
        begin, end = _window(draw, len(order))
        window = order[begin:end]
        ties = [draw.random() for _ in order]
        rule, width = _rule(draw, problem.capacity), draw.choice(WIDTHS)
        fresh = down_sets.order(rule, width, halted, prefix=order[:begin], operators=window, ties=ties)
        if fresh is None or fresh == window:
            continue
        candidate = [*order[:begin], *fresh, *order[end:]]
        spill = problem.spill_bytes(candidate)
        if spill <= best:  # sideways moves too: plateaus are wide, as most reorderings change no spill
            order = candidate
        if spill < best:
            best, fruitless = spill, 0
            found(best)
    return order


def _window(draw: random.Random, count: int) -> tuple[int, int]:
    """A random stretch; short ones are as likely as long ones (log-uniform)."""
    largest = max(SMALLEST_WINDOW, min(LARGEST_WINDOW, count // 3))
    length = int(SMALLEST_WINDOW * (largest / SMALLEST_WINDOW) ** draw.random())
    begin = draw.randrange(max(1, count - length + 1))
    return begin, begin + length


def _rule(draw: random.Random, capacity: int) -> Rule:
    return Rule(
        capacity=int(capacity * draw.uniform(0.6, 1.1)),
        returning=draw.random() < 0.7,
        weight=draw.choice((0.0, 0.5, 1.0)),
        eager=draw.random() < 0.7,
    )
