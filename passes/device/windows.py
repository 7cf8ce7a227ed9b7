"""A better order by searching around its peak only: where the search over all operators does not end in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from ...compiler.pipeline import Budget
from ..order._peak_search import least_peak_order
from ..order.problem import OrderProblem

__all__ = ["improved", "live_bytes_of"]

FIRST_WIDTH = 32  # operators of a window; doubled where no window of that width helps
PLACES = (0.5, 0.2, 0.8)  # where in a window the peak lies, one after the other
SHARE = 0.2  # of the time left, for one window
EFFORT = 4_000  # down-sets expanded for one window in deterministic mode
WINDOWS = 24  # tried in deterministic mode


def improved(problem: OrderProblem, order: Sequence[int], bound: int, budget: Budget) -> tuple[int, ...]:
    """``order``, or one of a lower peak in aligned bytes; no lower than ``bound``, which holds for all orders.

    The operators around the step of the peak are put in the order of least peak among themselves, as
    ``order/least_peak`` does, all others staying where they are; again and again while that lowers a peak, then in
    wider windows.
    """
    current, width, failed, left = list(order), FIRST_WIDTH, 0, WINDOWS
    while left > 0 and not budget.halted():
        live = live_bytes_of(problem, current)
        peak = max(live, default=0)
        if peak <= bound:
            break
        begin = max(0, min(live.index(peak) - int(width * PLACES[failed]), len(current) - width))
        window = _reordered(problem, current, begin, begin + width, budget)
        left -= 1 if budget.deterministic else 0
        changed = [*current[:begin], *window, *current[begin + width :]]
        if max(live_bytes_of(problem, changed)[begin : begin + width]) < peak:
            current, failed = changed, 0
        elif width >= len(current):
            break
        else:
            failed = (failed + 1) % len(PLACES)
            width *= 1 if failed else 2
    return tuple(current)


def live_bytes_of(problem: OrderProblem, order: Sequence[int]) -> list[int]:
    """Aligned bytes that are live while each operator of ``order`` runs."""
    position = {op: step for step, op in enumerate(order)}
    change = [0] * (len(order) + 1)
    for users, size in zip(problem.users, problem.footprint, strict=True):
        if users:
            steps = [position[op] for op in users]
            change[min(steps)] += size
            change[max(steps) + 1] -= size
    return list(accumulate(change))[:-1]


def _reordered(problem: OrderProblem, order: Sequence[int], begin: int, end: int, budget: Budget) -> list[int]:
    """The operators at positions ``begin`` to ``end - 1`` in their order of least peak."""
    inside = list(order[begin:end])
    part = _part(problem, order, begin, end)
    found = least_peak_order(part, budget.share(SHARE), effort=EFFORT)
    return [inside[op - 1] for op in found.order if 0 < op <= len(inside)]


def _part(problem: OrderProblem, order: Sequence[int], begin: int, end: int) -> OrderProblem:
    """The problem of ordering a window alone.

    A first operator touches what is live before the window, a last one what is live behind it. What is live through it
    without being touched adds the same at every position, and is left out.
    """
    inside = order[begin:end]
    number = {op: index for index, op in enumerate(inside, 1)}
    earlier, later = set(order[:begin]), set(order[end:])
    chosen = [b for b in range(len(problem.users)) if any(op in number for op in problem.users[b])]
    enter = [b for b in chosen if any(op in earlier for op in problem.users[b])]
    leave = [b for b in chosen if any(op in later for op in problem.users[b])]
    index = {buffer: i for i, buffer in enumerate(chosen)}
    touched = [enter, *(problem.touches[op] for op in inside), leave]
    touches = tuple(tuple(index[b] for b in buffers) for buffers in touched)
    last = len(inside) + 1
    between = [(0, *sorted(number[p] for p in problem.predecessors[op] if p in number)) for op in inside]
    predecessors = ((), *between, tuple(range(last)))
    successors: list[list[int]] = [[] for _ in predecessors]
    users: list[list[int]] = [[] for _ in chosen]
    for op, (before, buffers) in enumerate(zip(predecessors, touches, strict=True)):
        for other in before:
            successors[other].append(op)
        for buffer in buffers:
            users[buffer].append(op)
    return replace(
        problem,
        predecessors=predecessors,
        successors=tuple(map(tuple, successors)),
        nbytes=tuple(problem.nbytes[b] for b in chosen),
        footprint=tuple(problem.footprint[b] for b in chosen),
        touches=touches,
        writes=tuple(frozenset[int]() for _ in touches),
        users=tuple(map(tuple, users)),
        is_source=tuple(problem.is_source[b] for b in chosen),
        final_writer=tuple(-1 for _ in chosen),
    )
