"""Cuts that divide work evenly over ranks, whatever stages each has: by moving cuts until no move helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .partition_layers import Cuts, Line
from .solution import Objective

__all__ = ["Evenness", "even", "neighbours"]

MOST_MOVES = 30_000


@dataclass(frozen=True)
class Evenness:
    """How even cuts of ``line`` are: what each rank has to do for a step, and what comes before it."""

    line: Line
    objective: Objective = "makespan"

    @property
    def bound(self) -> int:
        """No rank bound of any cuts has a lower maximum: all work, and the layer with most, on the fastest ranks."""
        line = self.line
        slow = [line.slow(rank) for rank in range(line.ranks)]
        layers = [layer.work_ns for layer in line.layers]
        rounded = 0 if set(slow) == {1.0} else 2 * len(line.placement)  # F, I and W of each stage, half a unit each
        even = (sum(layers) + sum(self.shards) - rounded) / sum(1 / factor for factor in slow) if layers else 0.0
        longest = max(layers) * min(slow) - rounded
        return line.microbatches * max(0, int(even), int(longest))

    def key(self, cuts: Cuts) -> tuple[int, int, int]:
        """Smaller is better: bytes above a limit, the largest rank bound, and how uneven stages are."""
        line = self.line
        loads, heads = list(self.shards), [-1] * line.ranks
        held, uneven = [0] * line.ranks, 0
        for (first, end), rank in zip(line.bounds_of(cuts), line.placement, strict=True):
            own = round((self._work[end] - self._work[first]) * line.slow(rank))
            loads[rank] += own
            uneven += own * own
            held[rank] += self._held[end] - self._held[first]
            if heads[rank] < 0:
                heads[rank] = self._forward[first] if self.objective == "makespan" else 0
        above = sum(max(0, own - limit) for own, limit in zip(held, line.memory_limit or held, strict=True))
        bounds = [head + line.microbatches * load for head, load in zip(heads, loads, strict=True)]
        return above, max(bounds), uneven + sum(load * load for load in loads)

    def evened(self, cuts: Cuts) -> Cuts:
        """``cuts`` moved, a layer at a time, until no move makes them more even, or enough have been tried."""
        best, tried, improved = self.key(cuts), 0, True
        while improved and tried < MOST_MOVES:
            improved = False
            for start, end, step in _moves(len(cuts)):
                moved = _moved(cuts, start, end, step)
                tried += 1
                if self.line.is_legal(moved) and (key := self.key(moved)) < best:
                    best, cuts, improved = key, moved, True
        return cuts

    @cached_property
    def shards(self) -> tuple[int, ...]:
        """By rank, what shards of the vocabulary take for a microbatch."""
        vocabulary = self.line.vocabulary
        if vocabulary is None:
            return (0,) * self.line.ranks
        return tuple(map(sum, zip(vocabulary.output_ns, vocabulary.gradient_ns, strict=True)))

    @cached_property
    def _work(self) -> list[int]:
        return [0, *np.cumsum([layer.work_ns for layer in self.line.layers]).tolist()]

    @cached_property
    def _forward(self) -> list[int]:
        return self.line.sums["forward_ns"].tolist()  # type: ignore[no-any-return]

    @cached_property
    def _held(self) -> list[int]:
        names = ("parameter_bytes", "until_input_gradient_bytes", "until_weight_gradient_bytes")
        return np.sum([self.line.sums[name] for name in names], axis=0).tolist()  # type: ignore[no-any-return]


def even(line: Line) -> Cuts:
    """As even as one pass from left to right makes stages."""
    work = np.cumsum([layer.work_ns for layer in line.layers])
    stages, cuts = len(line.placement), [0]
    for stage in range(1, stages):
        nearest = int(np.argmin(np.abs(work - work[-1] * stage / stages))) + 1
        cuts.append(min(max(nearest, cuts[-1] + 1), len(line.layers) - (stages - stage)))
    return tuple(cuts[1:])


def neighbours(line: Line, cuts: Cuts) -> Iterator[Cuts]:
    """Cuts with one, or several that follow one another, moved by a layer or two."""
    found = (_moved(cuts, start, end, many * step) for start, end, step in _moves(len(cuts)) for many in (1, 2))
    return (moved for moved in found if line.is_legal(moved))


def _moves(cuts: int) -> Iterator[tuple[int, int, int]]:
    """First and end of those that are moved, and which way; few before many."""
    for number in range(1, cuts + 1):
        for first in range(cuts - number + 1):
            yield from ((first, first + number, -1), (first, first + number, 1))


def _moved(cuts: Cuts, start: int, end: int, step: int) -> Cuts:
    return (*cuts[:start], *(cut + step for cut in cuts[start:end]), *cuts[end:])
