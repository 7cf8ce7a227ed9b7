"""Templates: what each rank does once in every period, for one microbatch of each route, with CP-SAT.

In the long run a schedule that repeats is all there is, and its period what counts. Given a period P, a task k of
microbatch n starts at ``P * (n + turn[k]) + phase[k]``, counted from the rank's own ``offset``:

* variables: ``turn[k] >= 0``; ``0 <= phase[k] <= P - duration[k]``; ``0 <= offset[r] < P``; ``first[j, k]`` for two
  tasks of a rank, whether j's phase is before k's;
* one at a time: the intervals at ``phase`` on a rank do not overlap (copies apart);
* precedence: ``start[k] >= start[j] + duration[j] + lag``, where ``start = offset + P * turn + phase``;
* memory: when k of any microbatch starts, tasks j of all microbatches have started ``first[j, k] - turn[j]`` times,
  up to a number that is the same for all j and cancels out, as a microbatch frees what it allocates. So the bytes held
  then are ``sum(allocates[j] * (first[j, k] - turn[j])) - sum(frees[j] * (first[j, k] - turn[j]))``, exactly;
* objective: the end of a microbatch's last task, from its start.

That the order within a period fixes the bytes held is what Qi et al., arXiv 2405.15362, use by hand: their building
blocks are such templates. Modulo scheduling is Rau's (MICRO 1994), from compilers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from ...compiler.pipeline import Budget
from ._cp_sat import Reader, minimised
from ._lanes import Integers, Lanes

__all__ = ["Template", "template"]


@dataclass(frozen=True)
class Template:
    """``starts`` of one microbatch's tasks, by lane; the next microbatch follows a ``period`` later.

    ``whole`` says that backward passes are whole; a W then has its I's start.
    """

    period: int
    starts: Integers
    whole: bool


def template(lanes: Lanes, period: int, whole: bool, budget: Budget, effort: float) -> tuple[Template | None, bool]:
    """The shortest template with ``period`` that was found, and whether one with this period may exist at all.

    ``effort`` is CP-SAT's deterministic time. Every route has as many microbatches as the others.
    """
    model = _Model(lanes, period, whole)
    best: list[Integers] = []

    def keep(value: Reader) -> None:
        best.append(np.array([value(start) for start in model.start], np.int64))

    outcome = minimised(model.model, budget, effort=effort, found=keep, bounded=lambda _: None)
    if not best:
        return None, outcome.status != "none"
    return Template(period, best[-1] - best[-1].min(), whole), True


class _Model:
    def __init__(self, lanes: Lanes, period: int, whole: bool) -> None:
        self.lanes, self.period, self.whole = lanes, period, whole
        self.model = cp_model.CpModel()
        self.used = [k for k, lane in enumerate(lanes.lane) if not (whole and lane["whole"] < 0)]
        turns = 4 * len(lanes.limit) + 4
        lane = lanes.lane
        self.duration = [int(line["whole"]) if whole and line["half"] >= 0 else int(line["duration"]) for line in lane]
        self.offset = [self.model.new_int_var(0, period - 1, "") for _ in lanes.limit]
        self.turn = {k: self.model.new_int_var(0, turns, "") for k in self.used}
        self.phase = {k: self.model.new_int_var(0, period - self.duration[k], "") for k in self.used}
        at = {k: self.offset[lane[k]["rank"]] + period * self.turn[k] + self.phase[k] for k in self.used}
        self.start = [at[k] if k in at else at[int(lane[k]["half"])] for k in range(len(lane))]
        for rank in range(len(lanes.limit)):
            self._one_at_a_time(rank)
        self._precedence()
        last = self.model.new_int_var(0, period * (turns + 2), "")
        for k in self.used:
            self.model.add(last >= self.start[k] + self.duration[k])
        self.model.minimize(last)

    def _one_at_a_time(self, rank: int) -> None:
        lane = self.lanes.lane
        own = [k for k in self.used if lane[k]["rank"] == rank]
        for copies in (False, True):
            self.model.add_no_overlap(
                self.model.new_fixed_size_interval_var(self.phase[k], self.duration[k], "")
                for k in own
                if bool(lane[k]["copies"]) == copies
            )
        if self.lanes.limit[rank] < 1 << 59:
            self._memory(rank, own)

    def _memory(self, rank: int, own: list[int]) -> None:
        first: dict[tuple[int, int], cp_model.IntVar] = {}
        for j in own:
            for k in own:
                if j < k:
                    first[j, k] = before = self.model.new_bool_var("")
                    self.model.add(self.phase[j] + self.duration[j] <= self.phase[k]).only_enforce_if(before)
                    self.model.add(self.phase[k] + self.duration[k] <= self.phase[j]).only_enforce_if(~before)
        for k in own:
            if not self._allocates(k):
                continue
            held = []
            for j in own:
                ahead = 0 if j == k else first[j, k] if j < k else 1 - first[k, j]
                held.append(self._allocates(j) * ((1 if j == k else ahead) - self.turn[j]))
                held.append(-self._frees(j) * (ahead - self.turn[j]))
            self.model.add(sum(held) <= int(self.lanes.limit[rank]))

    def _allocates(self, k: int) -> int:
        line = self.lanes.lane[k]
        return 0 if self.whole and line["half"] >= 0 else int(line["allocates"])

    def _frees(self, k: int) -> int:
        line = self.lanes.lane[k]
        if self.whole and line["half"] >= 0:
            return int(line["frees"] + self.lanes.lane[line["half"]]["frees"] - line["allocates"])
        return int(line["frees"])

    def _precedence(self) -> None:
        lane = self.lanes.lane
        for k in self.used:
            for edge in self.lanes.edges[lane[k]["before"] : lane[k]["before_end"]]:
                j = int(edge["lane"])
                self.model.add(self.start[k] >= self.start[j] + self.duration[j] + int(edge["lag"]))
