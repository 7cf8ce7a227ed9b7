"""What the gap ILP has to decide: everything that needs no search settled, and the rest in independent blocks.

``docs/formulations/residency.md`` says why each reduction is valid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import OptionError
from .gaps import Cut, Gap, GapProblem

__all__ = ["Block", "Capacity", "Reduction", "Span", "reduce", "undominated"]

Span = tuple[int, int, int]  # first row, row behind the last, size


@dataclass(frozen=True)
class Capacity:
    """Rows of one capacity dimension: at row ``r`` the dropped intervals that span it must free ``need[r]`` bytes.

    ``spans`` gives each interval's rows, which are consecutive, and its bytes.
    """

    need: NDArray[np.int64]
    spans: Mapping[int, Span]

    def freed(self, dropped: Iterable[int]) -> NDArray[np.int64]:
        """Bytes freed at each row by dropping ``dropped``; exact."""
        steps = np.zeros(len(self.need) + 1, dtype=np.int64)
        for i in dropped:
            if i in self.spans:
                first, behind, size = self.spans[i]
                steps[first] += size
                steps[behind] -= size
        freed: NDArray[np.int64] = np.cumsum(steps)[:-1]
        return freed

    def members(self) -> list[list[int]]:
        """The intervals that span each row."""
        rows: list[list[int]] = [[] for _ in self.need]
        for i, (first, behind, _) in self.spans.items():
            for row in range(first, behind):
                rows[row].append(i)
        return rows


@dataclass(frozen=True)
class Block:
    """Open intervals that no constraint connects to any other block's.

    ``cost`` is what dropping each one moves, in bytes; ``shared`` are the versions whose one store, of the given
    bytes, is paid when any of the listed intervals is dropped. Of each of ``cuts`` one must be dropped.
    """

    cost: Mapping[int, int]
    shared: tuple[tuple[int, tuple[int, ...]], ...]
    capacities: tuple[Capacity, ...]
    cuts: tuple[frozenset[int], ...]

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
    capacities = [_capacity(problem, forced, d) for d in range(problem.room.shape[0])]
    cut_sets = [members for members in (_members(problem, cut) for cut in cuts) if forced.isdisjoint(members)]
    open_intervals = sorted(set().union(*(c.spans for c in capacities), *cut_sets))
    cost, shared = _costs(problem, forced, open_intervals)
    return Reduction(forced, tuple(_blocks(cost, shared, capacities, cut_sets)))


def _larger_than_room(problem: GapProblem) -> frozenset[int]:
    """Intervals that some operator leaves too little room for, whatever else is dropped."""
    return frozenset(
        i
        for i, interval in enumerate(problem.intervals)
        if any((problem.room[d, interval.begin : interval.end] < size).any() for d, size in enumerate(interval.sizes))
    )


def _capacity(problem: GapProblem, forced: frozenset[int], d: int) -> Capacity:
    """The rows that no other row implies, and the intervals that span any of them."""
    need = -problem.slack(forced)[d]
    rows = undominated(problem, forced, need)
    before = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(need)))))  # rows at positions below each
    spans = {
        i: (int(before[interval.begin]), int(before[interval.end]), interval.sizes[d])
        for i, interval in enumerate(problem.intervals)
        if i not in forced and before[interval.begin] < before[interval.end]
    }
    return Capacity(need[rows], spans)


def undominated(problem: GapProblem, forced: frozenset[int], need: NDArray[np.int64]) -> NDArray[np.intp]:
    """Positions whose ``need`` is above 0 and not implied by another one's, once ``forced`` intervals are dropped.

    What frees enough at ``q`` frees enough at ``p`` if ``p`` needs no more and every interval across ``q`` is across
    ``p`` too, that is, if ``p`` lies between the latest begin and the earliest end of the intervals across ``q``.
    """
    across = [interval for i, interval in enumerate(problem.intervals) if i not in forced]
    latest_begin, earliest_end = np.zeros(len(need), dtype=np.intp), np.full(len(need), len(need), dtype=np.intp)
    for interval in sorted(across, key=lambda interval: interval.begin):
        latest_begin[interval.begin : interval.end] = interval.begin
    for interval in sorted(across, key=lambda interval: -interval.end):
        earliest_end[interval.begin : interval.end] = interval.end
    alive = need > 0
    for q in np.flatnonzero(alive):
        if alive[q]:
            window = slice(latest_begin[q], earliest_end[q])
            alive[window] &= need[window] > need[q]
            alive[q] = True
    return np.flatnonzero(alive)


def _members(problem: GapProblem, cut: Cut) -> frozenset[int]:
    unknown = sorted(gap for gap in cut.gaps if gap not in problem.index)
    if unknown or not cut.gaps:
        raise OptionError(
            f"option 'cuts' of pass 'residency/ilp' holds a cut that {_fault_of(unknown)}",
            hint="cuts hold for the order they were found in, and for no other",
        )
    return frozenset(problem.index[gap] for gap in cut.gaps)


def _fault_of(unknown: list[Gap]) -> str:
    if not unknown:
        return "names no gap, so that nothing could satisfy it"
    return f"names the gap after use {unknown[0].after} of buffer {unknown[0].buffer!r}, which this order does not have"


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


def _blocks(
    cost: dict[int, int],
    shared: list[tuple[int, tuple[int, ...]]],
    capacities: list[Capacity],
    cuts: list[frozenset[int]],
) -> Iterable[Block]:
    """The connected parts, in the order of their first interval."""
    groups = [sharers for _, sharers in shared] + [tuple(sorted(cut)) for cut in cuts]
    for capacity in capacities:
        groups.extend(_chains(capacity))
    root_of = _connected(cost, groups)
    parts: dict[int, list[int]] = {}
    for i in cost:
        parts.setdefault(root_of[i], []).append(i)
    for root, members in parts.items():
        yield Block(
            {i: cost[i] for i in members},
            tuple((nbytes, sharers) for nbytes, sharers in shared if root_of[sharers[0]] == root),
            tuple(_restricted(capacity, members) for capacity in capacities),
            tuple(cut for cut in cuts if root_of[min(cut)] == root),
        )


def _chains(capacity: Capacity) -> Iterable[tuple[int, int]]:
    """Pairs of intervals that share a row, enough to connect all that do."""
    reach, furthest = -1, -1
    for i, (first, behind, _) in sorted(capacity.spans.items(), key=lambda item: item[1][0]):
        if first < reach:
            yield furthest, i
        if behind > reach:
            reach, furthest = behind, i


def _connected(nodes: Iterable[int], groups: Iterable[Sequence[int]]) -> dict[int, int]:
    """The representative of each node's connected part: its smallest member."""
    parent = {i: i for i in nodes}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for members in groups:
        for i in members[1:]:
            low, high = sorted((root(members[0]), root(i)))
            parent[high] = low
    return {i: root(i) for i in parent}


def _restricted(capacity: Capacity, members: Iterable[int]) -> Capacity:
    """The rows that ``members``, a connected part, span, numbered from 0."""
    spans = {i: capacity.spans[i] for i in members if i in capacity.spans}
    spanned = np.zeros(len(capacity.need), dtype=bool)
    for first, behind, _ in spans.values():
        spanned[first:behind] = True
    before = np.concatenate(([0], np.cumsum(spanned)))
    return Capacity(
        capacity.need[spanned],
        {i: (int(before[first]), int(before[behind]), size) for i, (first, behind, size) in spans.items()},
    )
