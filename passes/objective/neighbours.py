"""Orders near an order: an operator elsewhere within its freedom, or a window of it shuffled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Dependencies", "neighbour", "one_moved"]

LARGEST_WINDOW = 64


def neighbour(graph: Dependencies, order: Sequence[int], draw: random.Random) -> list[int]:
    """Another valid order of ``graph``, drawn at random; ``order`` itself where nothing can move."""
    return one_moved(graph, order, draw) if draw.random() < 0.5 else _shuffled(graph, order, draw)


class Dependencies(Protocol):
    """Operators by index with those they depend on, and those that depend on them."""

    @property
    def predecessors(self) -> Sequence[Sequence[int]]:
        """Operators each operator comes after."""

    @property
    def successors(self) -> Sequence[Sequence[int]]:
        """Operators each operator comes before."""


def one_moved(graph: Dependencies, order: Sequence[int], draw: random.Random) -> list[int]:
    """``order`` with one operator, drawn at random, somewhere between its neighbours in the graph, or where it was."""
    place = {op: position for position, op in enumerate(order)}
    position = draw.randrange(len(order))
    op = order[position]
    first = max((place[before] + 1 for before in graph.predecessors[op]), default=0)
    last = min((place[behind] - 1 for behind in graph.successors[op]), default=len(order) - 1)
    target = draw.randint(first, last)
    rest = [other for other in order if other != op]
    return [*rest[:target], op, *rest[target:]]


def _shuffled(graph: Dependencies, order: Sequence[int], draw: random.Random) -> list[int]:
    """A window in another valid order; short windows are as likely as long ones (log-uniform)."""
    longest = min(LARGEST_WINDOW, len(order))
    length = min(longest, max(2, int(2 * (longest / 2) ** draw.random())))
    begin = draw.randrange(len(order) - length + 1)
    window = order[begin : begin + length]
    inside = set(window)
    waiting = {op: sum(before in inside for before in graph.predecessors[op]) for op in window}
    ready = [op for op in window if not waiting[op]]
    fresh: list[int] = []
    while ready:
        op = ready.pop(draw.randrange(len(ready)))
        fresh.append(op)
        for behind in graph.successors[op]:
            if behind in inside:
                waiting[behind] -= 1
                if not waiting[behind]:
                    ready.append(behind)
    return [*order[:begin], *fresh, *order[begin + length :]]
