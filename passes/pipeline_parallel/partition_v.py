"""Cuts for a V, two stages a rank, that give the rank with most work the least: exactly, by bisection.

Ranks take layers from both ends of what is left, rank 0 first: whether all can keep to a bound is a matter of how much
is left, and less is never worse. Where stages may be empty, that is exact, and its least bound is one of all cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .partition_even import Evenness
from .partition_layers import Cuts, Line
from .solution import Objective

__all__ = ["Nested"]

Table = NDArray[np.int64]


@dataclass(frozen=True)
class Nested:
    """``line`` in a V, for ``objective``."""

    line: Line
    objective: Objective = "makespan"

    @property
    def applies(self) -> bool:
        """Whether the placement is a V."""
        down = tuple(range(self.line.ranks))
        return self.line.placement == (*down, *reversed(down))

    def least(self, *, empty: bool) -> tuple[int, Cuts] | None:
        """The least bound that all ranks can keep to, and cuts that do, with ``empty`` stages if allowed."""
        low, high = 0, 2 * self.line.microbatches * int(max(self._slow) * self._work[-1] + sum(self._shards)) + 1
        high += int(self._forward[-1])
        best = self._within(high, empty)
        if best is None:
            return None
        while low < high:
            middle = (low + high) // 2
            found = self._within(middle, empty)
            if found is None:
                low = middle + 1
            else:
                high, best = middle, found
        return high, best

    def _within(self, bound: int, empty: bool) -> Cuts | None:
        """Cuts for which no rank's bound is above ``bound``."""
        layers, ranks = len(self.line.layers), self.line.ranks
        left = np.arange(layers + 1)
        ends = np.where(left == 0, layers, -1)  # by layers gone on the left, the least layer that is gone on the right
        came: list[tuple[Table, Table]] = []
        for rank in range(ranks - 1):
            behind = 0 if empty else 2 * (ranks - 1 - rank)
            ends, before, last = self._step(rank, bound, ends, behind, 0 if empty else 1)
            came.append((before, last))
        whole = self._fits(ranks - 1, bound, ends)
        if not whole.any():
            return None
        start = int(np.flatnonzero(whole)[0])
        return self._cuts(came, start, int(ends[start]))

    def _step(self, rank: int, bound: int, ends: Table, behind: int, least: int) -> tuple[Table, Table, Table]:
        """What is left behind ``rank``; by layers gone on the left then, those before, and the end before."""
        start, then = np.arange(len(ends))[:, None], np.arange(len(ends))[None, :]
        end = np.maximum(ends, 0)[:, None]
        after = np.zeros_like(end * then)
        for sums, room in self._rooms(rank, bound):
            needed = sums[end] - (room[:, None] - (sums[then] - sums[start]))
            after = np.maximum(after, np.searchsorted(sums, needed, side="left"))
            after = np.where(room[:, None] < sums[then] - sums[start], len(ends) + 1, after)
        after = np.maximum(after, then + behind)
        possible = (ends[:, None] >= 0) & (then >= start + least) & (after <= end - least)
        after = np.where(possible, after, len(ends) + 1)
        before = np.argmin(after, axis=0)
        best = after[before, np.arange(len(ends))]
        return np.where(best <= len(ends), best, -1), before, ends[before]

    def _fits(self, rank: int, bound: int, ends: Table) -> NDArray[np.bool_]:
        """By layers gone on the left, whether ``rank`` can do all that is left."""
        start, end = np.arange(len(ends)), np.maximum(ends, 0)
        fits: NDArray[np.bool_] = (ends >= 0) & (end >= start)
        for sums, room in self._rooms(rank, bound):
            fits &= sums[end] - sums[np.minimum(start, end)] <= room
        return fits

    def _rooms(self, rank: int, bound: int) -> list[tuple[Table, Table]]:
        """What adds up over layers, with how much of it the rank may have, by its first layer."""
        head = self._forward if self.objective == "makespan" else np.zeros_like(self._forward)
        free = (bound - head) // self.line.microbatches - self._shards[rank]
        rounded = 0 if self._slow[rank] == 1.0 else 4  # F, I and W of two stages, half a unit each, and one of this
        rooms = [(self._work, np.floor((free + rounded) / self._slow[rank]).astype(np.int64))]
        if self.line.memory_limit is not None:
            rooms.append((self._held, np.full_like(self._held, self.line.memory_limit[rank])))
        return rooms

    def _cuts(self, came: list[tuple[Table, Table]], start: int, end: int) -> Cuts:
        middle = start + max(1, (end - start) // 2) if end - start > 1 else start
        cuts = [start, middle, end]
        for before, last in reversed(came):
            start, end = int(before[start]), int(last[start])
            cuts = [start, *cuts, end]
        return tuple(cuts[1:-1]) if self.line.ranks > 1 else (middle,)

    @property
    def _shards(self) -> tuple[int, ...]:
        return Evenness(self.line).shards

    @cached_property
    def _slow(self) -> tuple[float, ...]:
        return tuple(self.line.slow(rank) for rank in range(self.line.ranks))

    @cached_property
    def _work(self) -> Table:
        return np.cumsum([0, *(layer.work_ns for layer in self.line.layers)], dtype=np.int64)

    @cached_property
    def _forward(self) -> Table:
        """Least time before the rank that begins with a layer can start."""
        fastest = min(self._slow)
        forward = self.line.sums["forward_ns"]
        if fastest == 1.0:
            return forward
        slowed: Table = np.floor(forward * fastest).astype(np.int64) - len(self.line.placement)
        return np.maximum(0, slowed)

    @cached_property
    def _held(self) -> Table:
        names = ("parameter_bytes", "until_input_gradient_bytes", "until_weight_gradient_bytes")
        held: Table = np.sum([self.line.sums[name] for name in names], axis=0, dtype=np.int64)
        return held
