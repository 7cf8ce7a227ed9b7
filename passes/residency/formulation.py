"""The gap ILP: what is left to decide after reductions, as independent blocks, and each block as a PuLP model.

Variables are ``drop[i]``, binary, for each open interval ``i``, and ``store[v]`` for each version ``v`` that several
of them share. ``docs/formulations.md`` says why each constraint and each reduction is valid.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import pulp

from ...errors import OptionError
from .gaps import Cut, Gap, GapProblem

__all__ = ["Block", "Reduction", "Row", "build", "objective_unit", "reduce"]

DOMINANCE_WINDOW = 64  # how many neighbouring positions a capacity row is compared with


@dataclass(frozen=True)
class Row:
    """At least ``need`` of the capacity freed by dropping: ``sum(size * drop[i] for i, size in terms) >= need``."""

    terms: tuple[tuple[int, int], ...]
    need: int

    def satisfied_by(self, dropped: Collection[int]) -> bool:
        """Whether dropping exactly ``dropped`` frees enough; in exact integers."""
        return sum(size for i, size in self.terms if i in dropped) >= self.need


@dataclass(frozen=True)
class Block:
    """Open intervals that no constraint connects to any other block's.

    ``cost`` is what dropping each one moves, in bytes; ``shared`` are the versions whose one store, of the given
    bytes, is paid when any of the listed intervals is dropped. ``rows`` are capacity rows and placement cuts.
    """

    cost: Mapping[int, int]
    shared: tuple[tuple[int, tuple[int, ...]], ...]
    rows: tuple[Row, ...]

    def moved_bytes(self, dropped: Collection[int]) -> int:
        """Bytes moved when exactly ``dropped`` of the block's intervals are dropped."""
        stores = sum(nbytes for nbytes, sharers in self.shared if any(i in dropped for i in sharers))
        return stores + sum(nbytes for i, nbytes in self.cost.items() if i in dropped)


@dataclass(frozen=True)
class Reduction:
    """Intervals that every residency drops, and blocks of those still open; all others can always be kept."""

    dropped: frozenset[int]
    blocks: tuple[Block, ...]


def reduce(problem: GapProblem, cuts: Iterable[Cut] = ()) -> Reduction:
    """Decide what needs no search. Raises OptionError for a cut that names a gap the order does not have."""
    forced = _larger_than_room(problem)
    rows = [*_capacity_rows(problem, forced), *_cut_rows(problem, cuts, forced)]
    open_intervals = sorted({i for row in rows for i, _ in row.terms})
    cost, shared = _costs(problem, forced, open_intervals)
    return Reduction(forced, tuple(_blocks(cost, shared, rows)))


def build(block: Block, unit: int) -> pulp.LpProblem:
    """``block`` as a model whose objective is bytes moved, in units of ``unit`` bytes."""
    problem = pulp.LpProblem("residency", pulp.LpMinimize)
    # variables
    drop = {i: problem.add_variable(f"drop_{i}", 0, 1, pulp.LpBinary) for i in block.cost}
    store = [problem.add_variable(f"store_{v}", 0, 1) for v in range(len(block.shared))]
    # objective
    terms = [(drop[i], nbytes // unit) for i, nbytes in block.cost.items()]
    terms += [(store[v], nbytes // unit) for v, (nbytes, _) in enumerate(block.shared)]
    problem += pulp.LpAffineExpression(terms), "bytes_moved"
    # capacity, and placement cuts
    for r, row in enumerate(block.rows):
        problem += pulp.LpAffineExpression([(drop[i], size) for i, size in row.terms]) >= row.need, f"free_{r}"
    # a version is stored once any of its gaps is dropped
    for v, (_, sharers) in enumerate(block.shared):
        for i in sharers:
            problem += pulp.LpAffineExpression([(store[v], 1), (drop[i], -1)]) >= 0, f"store_{v}_{i}"
    return problem


def objective_unit(block: Block) -> int:
    """The greatest number of bytes that divides everything the block can move."""
    return math.gcd(*block.cost.values(), *(nbytes for nbytes, _ in block.shared))


def _larger_than_room(problem: GapProblem) -> frozenset[int]:
    """Intervals that some operator leaves too little room for, whatever else is dropped."""
    return frozenset(
        i
        for i, interval in enumerate(problem.intervals)
        if any((problem.room[d, interval.begin : interval.end] < size).any() for d, size in enumerate(interval.sizes))
    )


def _capacity_rows(problem: GapProblem, forced: frozenset[int]) -> list[Row]:
    starting: dict[int, list[int]] = {}
    for i, interval in enumerate(problem.intervals):
        if i not in forced and interval.begin < interval.end:
            starting.setdefault(interval.begin, []).append(i)
    spanning: list[int] = []
    found: list[list[tuple[int, int, tuple[int, ...]]]] = [[] for _ in problem.room]
    for position in range(problem.room.shape[1]):
        spanning = [i for i in spanning if problem.intervals[i].end > position] + starting.get(position, [])
        for d, room in enumerate(problem.room[:, position]):
            need = sum(problem.intervals[i].sizes[d] for i in spanning) - int(room)
            if need > 0:
                found[d].append((sum(1 << i for i in spanning), need, tuple(spanning)))
    return [
        _scaled([(i, problem.intervals[i].sizes[d]) for i in members], need)
        for d, candidates in enumerate(found)
        for _, need, members in _undominated(candidates)
    ]


def _undominated(rows: list[tuple[int, int, tuple[int, ...]]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Rows that no neighbour implies: one over a subset of the intervals (a mask) that needs at least as much freed."""
    kept = []
    for r, (mask, need, members) in enumerate(rows):
        window = range(max(0, r - DOMINANCE_WINDOW), min(len(rows), r + DOMINANCE_WINDOW + 1))
        if not any(
            rows[q][0] | mask == mask and rows[q][1] >= need and ((rows[q][0], rows[q][1]) != (mask, need) or q < r)
            for q in window
            if q != r
        ):
            kept.append((mask, need, members))
    return kept


def _scaled(terms: list[tuple[int, int]], need: int) -> Row:
    """The row divided by the sizes' common divisor, its need rounded up, and no size larger than the need."""
    unit = math.gcd(*(size for _, size in terms))
    scaled = -(-need // unit)
    return Row(tuple((i, min(size // unit, scaled)) for i, size in terms), scaled)


def _cut_rows(problem: GapProblem, cuts: Iterable[Cut], forced: frozenset[int]) -> Iterable[Row]:
    """At least one gap of each cut is dropped; those that hold a dropped one anyway are left out."""
    for cut in cuts:
        unknown = sorted(gap for gap in cut.gaps if gap not in problem.index)
        if unknown or not cut.gaps:
            raise OptionError(
                f"option 'cuts' of pass 'residency/ilp' holds a cut that {_fault_of(unknown)}",
                hint="cuts hold for the order they were found in, and for no other",
            )
        members = sorted(problem.index[gap] for gap in cut.gaps)
        if forced.isdisjoint(members):
            yield Row(tuple((i, 1) for i in members), 1)


def _fault_of(unknown: list[Gap]) -> str:
    if not unknown:
        return "names no gap, so that nothing could satisfy it"
    buffer, after = unknown[0]
    return f"names the gap after use {after} of buffer {buffer!r}, which this order does not have"


def _costs(
    problem: GapProblem, forced: frozenset[int], open_intervals: list[int]
) -> tuple[dict[int, int], list[tuple[int, tuple[int, ...]]]]:
    """Bytes that dropping each open interval moves, and the stores that several of them share."""
    paid = {problem.intervals[i].version for i in forced} | {None}
    cost = {i: problem.intervals[i].nbytes for i in open_intervals}
    sharers: dict[tuple[str, int], list[int]] = {}
    for i in open_intervals:
        version = problem.intervals[i].version
        if version is not None and version not in paid:
            sharers.setdefault(version, []).append(i)
    shared = []
    for members in sharers.values():
        nbytes = problem.intervals[members[0]].nbytes
        if len(members) == 1:
            cost[members[0]] += nbytes
        else:
            shared.append((nbytes, tuple(members)))
    return cost, shared


def _blocks(cost: dict[int, int], shared: list[tuple[int, tuple[int, ...]]], rows: list[Row]) -> Iterable[Block]:
    """The connected parts, in the order of their first interval."""
    parent = {i: i for i in cost}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for members in [*([i for i, _ in row.terms] for row in rows), *(list(sharers) for _, sharers in shared)]:
        for i in members[1:]:
            a, b = sorted((root(members[0]), root(i)))
            parent[b] = a
    parts: dict[int, list[int]] = {}
    for i in cost:
        parts.setdefault(root(i), []).append(i)
    rows_of: dict[int, list[Row]] = {}
    for row in rows:
        rows_of.setdefault(root(row.terms[0][0]), []).append(row)
    shared_of: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for nbytes, sharers in shared:
        shared_of.setdefault(root(sharers[0]), []).append((nbytes, sharers))
    for first, members in parts.items():
        part_cost = {i: cost[i] for i in members}
        yield Block(part_cost, tuple(shared_of.get(first, ())), tuple(rows_of.get(first, ())))
