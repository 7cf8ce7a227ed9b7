"""Orders near an order: an operator elsewhere within its freedom, or a window of it shuffled."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...compiler.graph import Graph

__all__ = ["neighbour"]

LARGEST_WINDOW = 64


def neighbour(graph: Graph, order: Sequence[int], draw: random.Random) -> list[int]:
    """Another valid order of ``graph``, drawn at random; ``order`` itself where nothing can move."""
    return _moved(graph, order, draw) if draw.random() < 0.5 else _shuffled(graph, order, draw)


def _moved(graph: Graph, order: Sequence[int], draw: random.Random) -> list[int]:
    place = {op: position for position, op in enumerate(order)}
    position = draw.randrange(len(order))
    op = order[position]
    first = max((place[before] + 1 for before in graph.predecessors[op]), default=0)
    last = min((place[behind] - 1 for behind in graph.successors[op]), default=len(order) - 1)
    target = draw.randint(first, last)
    rest = [other for other in order if other != op]
    return [*rest[:target], op, *rest[target:]]


def _shuffled(graph: Graph, order: Sequence[int], draw: random.Random) -> list[int]:
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
