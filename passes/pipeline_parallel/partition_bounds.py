"""What no choice of cuts undercuts: bounds of single stages, and the cuts for which the worst of them is least.

A stage has a bound that only its first and its last layer decide: what comes before and behind it in the model does not
depend on where that is cut. With one stage a rank, the cuts that make the largest of them least follow by dynamic
programming (docs/formulations/pipeline-partition.md), and no schedule of any cuts is faster.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .partition_layers import Cuts, Line, scaled
from .solution import Objective

__all__ = ["NEVER", "Chain"]

Table = NDArray[np.int64]
NEVER = 1 << 60


@dataclass(frozen=True)
class Chain:
    """Bounds of the stages of ``line``, each alone, for ``objective``."""

    line: Line
    objective: Objective = "makespan"

    @cached_property
    def stage_bounds(self) -> Table:
        """By stage, first layer and end: no schedule in which this is a stage is faster; ``NEVER`` if there is none."""
        stages, layers = len(self.line.placement), len(self.line.layers)
        found = np.full((stages, layers, layers + 1), NEVER, np.int64)
        first, end = np.arange(layers)[:, None], np.arange(layers + 1)[None, :]
        broken = np.zeros((layers, layers + 1), np.bool_)
        for tied in self.line.ties.values() if self._is_alone else ():
            inside = sum(((first <= layer) & (layer < end)).astype(np.int64) for layer in tied)
            broken |= (inside > 0) & (inside < len(tied))
        for stage in range(stages):
            possible = (first < end) & (first >= stage) & (end <= layers - (stages - 1 - stage)) & ~broken
            possible &= (first == 0) if stage == 0 else True
            possible &= (end == layers) if stage == stages - 1 else True
            found[stage] = np.where(possible, self._bounds(stage), NEVER)
        return found

    @cached_property
    def _is_alone(self) -> bool:
        """Whether every rank has one stage."""
        return len(self.line.placement) == self.line.ranks

    @cached_property
    def behind(self) -> Table:
        """By stage and first layer, the least that the worst of this stage and those behind it can be."""
        stages, layers = len(self.line.placement), len(self.line.layers)
        least = np.full((stages + 1, layers + 1), NEVER, np.int64)
        least[stages, layers] = 0
        for stage in reversed(range(stages)):
            worst = np.maximum(self.stage_bounds[stage], least[stage + 1][None, :])
            least[stage, :layers] = worst.min(axis=1)
        return least

    @property
    def bound(self) -> int:
        """No schedule of any cuts is faster; ``NEVER`` if no cuts are possible."""
        return int(self.behind[0, 0])

    def best_first(self) -> Iterator[tuple[int, Cuts]]:
        """All cuts with the worst bound of their stages, the least first; among equals, the more even ones."""
        stages, squares = len(self.line.placement), self._squares
        heap: list[tuple[int, float, int, Cuts, float]] = [(self.bound, 0.0, 0, (), 0.0)]
        while heap:
            worst, _, stage, cuts, uneven = heapq.heappop(heap)
            if worst >= NEVER:
                return
            if stage == stages:
                yield worst, cuts[:-1]
                continue
            first = cuts[-1] if cuts else 0
            for end in range(first + 1, len(self.line.layers) + 1):
                own = int(self.stage_bounds[stage, first, end])
                most = max(worst, own, int(self.behind[stage + 1, end]))
                if most < NEVER:
                    spread = uneven + float(own) ** 2
                    whole = spread + float(squares[stage + 1, end])
                    heapq.heappush(heap, (most, whole, stage + 1, (*cuts, end), spread))

    @cached_property
    def _squares(self) -> NDArray[np.float64]:
        """By stage and first layer, the least sum of the squares of the bounds of this stage and those behind it."""
        stages, layers = len(self.line.placement), len(self.line.layers)
        least = np.full((stages + 1, layers + 1), np.inf)
        least[stages, layers] = 0.0
        for stage in reversed(range(stages)):
            own = np.where(self.stage_bounds[stage] < NEVER, self.stage_bounds[stage].astype(np.float64) ** 2, np.inf)
            least[stage, :layers] = (own + least[stage + 1][None, :]).min(axis=1)
        return least

    def _bounds(self, stage: int) -> Table:
        """By first layer and end, whether possible or not."""
        line, many, rank = self.line, self.line.microbatches, self.line.placement[stage]
        forward, whole = self._time("forward_ns", rank), self._time("whole_backward_ns", rank)
        halves = self._time("input_gradient_ns", rank) + self._time("weight_gradient_ns", rank)
        shards = 0 if line.vocabulary is None else line.vocabulary.output_ns[rank] + line.vocabulary.gradient_ns[rank]
        work: Table = many * (forward + np.minimum(whole, halves) + shards) + self._sum("reduce_ns")
        if self.objective == "makespan":
            work = work + self._before(stage)[:, None]
        if line.memory_limit is None:
            return work
        room = line.memory_limit[rank] - self._sum("parameter_bytes")
        until_input = self._sum("until_input_gradient_bytes")
        held = until_input + self._sum("until_weight_gradient_bytes")
        back = np.minimum(self._time("input_gradient_ns", rank), whole)
        turn = forward + self._way_back(stage)[None, :]
        if self._is_alone and line.vocabulary is None:
            ahead = np.where(held > 0, np.minimum(many, room // np.maximum(held, 1)), many)
            work = work + np.maximum(0, turn - ahead * forward)
        until = until_input * (turn + back) + (held - until_input) * (turn + np.minimum(halves, whole))
        kept = -(-many * until // np.maximum(room, 1)) + self._sum("reduce_ns")
        if self.objective == "makespan":
            kept = kept + self._before(stage)[:, None]
        work = np.maximum(work, kept)
        possible: Table = np.where(room < held, NEVER, work)
        return possible

    def _sum(self, name: str) -> Table:
        sums = self.line.sums[name]
        difference: Table = sums[None, :] - sums[:-1, None]
        return difference

    def _time(self, name: str, rank: int) -> Table:
        return scaled(self._sum(name), self.line.slow(rank))

    def _before(self, stage: int) -> Table:
        """By first layer, the least before the first microbatch can be at this stage."""
        return self._fastest(self._forward[:-1]) + (0 if self._hops_are_free else stage * self._least_send[0])

    def _way_back(self, stage: int) -> Table:
        """By end, the least from the end of F of a microbatch to when its I can start."""
        hops = 0 if self._hops_are_free else len(self.line.placement) - 1 - stage
        computing = self._forward[-1] - self._forward + self._backward[-1] - self._backward
        return self._fastest(computing) + hops * sum(self._least_send)

    @cached_property
    def _forward(self) -> Table:
        return np.cumsum([0, *(layer.forward_ns for layer in self.line.layers)], dtype=np.int64)

    @cached_property
    def _backward(self) -> Table:
        back = [min(layer.input_gradient_ns, layer.whole_backward_ns) for layer in self.line.layers]
        return np.cumsum([0, *back], dtype=np.int64)

    @cached_property
    def _least_send(self) -> tuple[int, int]:
        layers = self.line.layers[:-1]
        forward = min((layer.forward_send_ns for layer in layers), default=0)
        return forward, min((layer.backward_send_ns for layer in layers), default=0)

    @cached_property
    def _hops_are_free(self) -> bool:
        """Stages that follow one another are on one rank somewhere, as in the middle of a V."""
        return any(one == other for one, other in zip(self.line.placement, self.line.placement[1:], strict=False))

    def _fastest(self, time: Table) -> Table:
        """A bound of ``time`` whatever is computed where: rounding may take off half a unit, of two times a stage."""
        slow = min(self.line.slowness, default=1.0)
        least: Table = np.floor(time * slow).astype(np.int64) - len(self.line.placement)
        return np.asarray(time if slow == 1.0 else np.maximum(0, least))
