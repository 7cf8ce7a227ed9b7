"""A bound for long graphs: the optima of stretches of an order, each on its own, added up.

Whatever the order, what it moves for some buffers while some operators run is no less than the best order of these
operators alone would move for them. Stretches that share no operator, with each buffer counted in one of them only,
bound different bytes, so their bounds add up. Time and memory grow with the number of stretches, not with the product
of their choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..order.problem import OrderProblem
from .search import BestFirst
from .states import StateSpace

__all__ = ["stretches", "windows_bounds"]


def stretches(cuts: Sequence[int], full: int) -> list[list[int]]:
    """The operators between neighbours of ``cuts``, bitmasks each within the next, and behind the last one."""
    found: list[list[int]] = []
    before = 0
    for done in (*cuts, full):
        found.append(_members(done & ~before))
        before = done
    return found


def _members(mask: int) -> list[int]:
    """The operators in ``mask``, in time that grows with their number and not with that of all positions in it."""
    found: list[int] = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found


def windows_bounds(
    problem: OrderProblem,
    capacity: int,
    windows: Sequence[Sequence[int]],
    states: int,
    halted: Callable[[], bool],
    known: Sequence[int],
) -> list[int]:
    """Bytes that every order moves for each of ``windows`` of operators, disjoint stretches of one topological order.

    Their sum is a bound. Each window's search ends after ``states`` were expanded, with the bound it has by then, or
    with what was ``known`` of it where that is more; windows that ``halted`` leaves out keep what was known.
    """
    owned = _owned(problem, windows)
    bounds = list(known)
    for number, window in enumerate(windows):
        if halted():
            break
        if owned[number]:
            part = _restricted(problem, sorted(window), owned[number])
            bounds[number] = _least(part, capacity, states, halted, known[number])
    return bounds


def _least(problem: OrderProblem, capacity: int, states: int, halted: Callable[[], bool], known: int) -> int:
    ceiling = problem.spill_bytes(range(len(problem.touches)))
    space = StateSpace(problem, capacity)
    search = BestFirst(space, space.root(), ceiling, bound=known)
    search.run(lambda: halted() or search.expanded >= states)
    return search.bound


def _owned(problem: OrderProblem, windows: Sequence[Sequence[int]]) -> list[set[int]]:
    """The buffers that count in each window: a buffer where most of its users are, two at least, earliest of equals."""
    window_of = {op: number for number, window in enumerate(windows) for op in window}
    owned: list[set[int]] = [set() for _ in windows]
    for buffer, users in enumerate(problem.users):
        counts: dict[int, int] = {}
        for op in users:
            if op in window_of:
                counts[window_of[op]] = counts.get(window_of[op], 0) + 1
        best = max(counts, key=lambda number: (counts[number], -number), default=-1)
        if best >= 0 and counts[best] > 1:
            owned[best].add(buffer)
    return owned


@dataclass
class _Buffers:
    """The buffers of a restricted problem, one list a field."""

    nbytes: list[int]
    footprint: list[int]
    users: list[tuple[int, ...]]
    is_source: list[bool]
    final_writer: list[int]

    def add(self, nbytes: int, footprint: int, users: tuple[int, ...], *, is_source: bool, final_writer: int) -> int:
        self.nbytes.append(nbytes)
        self.footprint.append(footprint)
        self.users.append(users)
        self.is_source.append(is_source)
        self.final_writer.append(final_writer)
        return len(self.users) - 1


def _restricted(problem: OrderProblem, ops: Sequence[int], owned: set[int]) -> OrderProblem:
    """``problem`` of the operators ``ops`` and the buffers ``owned`` alone: no order moves less for them than its best.

    What was made before lies in backing memory, and what is used behind the window is no longer needed. All other
    buffers that an operator touches take room while it runs, as one source that it alone reads, and cost nothing.
    """
    index = {op: i for i, op in enumerate(ops)}
    buffers = _Buffers([], [], [], [], [])
    number: dict[int, int] = {}
    for buffer in sorted(owned):
        users = tuple(index[op] for op in problem.users[buffer] if op in index)
        first = problem.users[buffer][0]
        number[buffer] = buffers.add(
            problem.nbytes[buffer],
            problem.footprint[buffer],
            users,
            is_source=problem.is_source[buffer] or first not in index,
            final_writer=index.get(problem.final_writer[buffer], -1),
        )
    touches: list[tuple[int, ...]] = []
    for op in ops:
        touched = [number[b] for b in problem.touches[op] if b in owned]
        others = sum(problem.footprint[b] for b in problem.touches[op] if b not in owned)
        if others:
            touched.append(buffers.add(0, others, (index[op],), is_source=True, final_writer=-1))
        touches.append(tuple(touched))
    return OrderProblem(
        capacity=problem.capacity,
        predecessors=tuple(tuple(index[p] for p in problem.predecessors[op] if p in index) for op in ops),
        successors=tuple(tuple(index[s] for s in problem.successors[op] if s in index) for op in ops),
        nbytes=tuple(buffers.nbytes),
        footprint=tuple(buffers.footprint),
        touches=tuple(touches),
        writes=tuple(frozenset(number[b] for b in problem.writes[op] if b in owned) for op in ops),
        users=tuple(buffers.users),
        is_source=tuple(buffers.is_source),
        final_writer=tuple(buffers.final_writer),
    )
