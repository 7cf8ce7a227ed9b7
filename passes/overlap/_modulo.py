"""A layer's modulo schedule as a CP-SAT model: the least period in which every layer does the same, one behind another.

Task ``i`` of layer ``k`` starts at ``offset[i] + (stage[i] + k) * period`` with ``0 <= offset[i] < period`` (software
pipelining: Rau, MICRO 1994). A lane takes each task and its copy one period later without overlap. Sharing of resources
enters as their work per period alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ortools.sat.python import cp_model

from .problem import Problem
from .repeats import Repeat

__all__ = ["Modulo", "least_period_s"]

UNITS = 20_000  # of the longest period
STAGES = 4  # layers in flight at the same time, at most


def least_period_s(problem: Problem, repeat: Repeat) -> float:
    """Seconds a layer that no schedule undercuts as layers go on: a full lane or resource, or a cycle of waiting."""
    tasks = problem.tasks[repeat.begin : repeat.begin + repeat.period]
    absorbed = {(j - repeat.begin) % repeat.period for task in tasks for mode in task.modes for j in mode.absorbs}
    seconds = [0.0 if i in absorbed else min(mode.seconds for mode in task.modes) for i, task in enumerate(tasks)]
    work: dict[tuple[str, str], float] = {}
    for i, task in enumerate(tasks):
        work["lane", task.lane] = work.get(("lane", task.lane), 0.0) + seconds[i]
        for name in {name for mode in task.modes for name in mode.needs} if i not in absorbed else ():
            least = min(mode.seconds * mode.needs.get(name, 0.0) for mode in task.modes)
            work["resource", name] = work.get(("resource", name), 0.0) + least
    return max(*work.values(), _cycle_s(seconds, repeat))


def _cycle_s(seconds: list[float], repeat: Repeat) -> float:
    """The most seconds a layer of any cycle of dependencies, by bisection (Lawler 1976), rounded down."""
    low, high = 0.0, sum(seconds)
    for _ in range(40):
        period = (low + high) / 2
        longest = [0.0] * len(seconds)
        for _ in range(len(seconds) + 1):
            changed = False
            for first, then, distance in repeat.edges:
                reached = longest[first] + seconds[first] - distance * period
                if reached > longest[then] + 1e-15:
                    longest[then], changed = reached, True
            if not changed:
                break
        low, high = (period, high) if changed else (low, period)
    return low


@dataclass
class Modulo:
    """The model of one layer of ``problem``; times in units of ``unit_s``, ``modes[i][m]`` true for the mode."""

    problem: Problem
    repeat: Repeat
    model: cp_model.CpModel = field(default_factory=cp_model.CpModel)
    modes: list[list[Any]] = field(default_factory=list)
    offset: list[Any] = field(default_factory=list)
    stage: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = self.problem.tasks[self.repeat.begin : self.repeat.begin + self.repeat.period]
        longest_s = sum(max(mode.seconds for mode in task.modes) for task in self.tasks)
        self.unit_s = max(longest_s, 1e-12) / UNITS
        self.period = self.model.new_int_var(1, 2 * UNITS, "period")
        self._choose_modes()
        self._add_lanes()
        for first, then, distance in self.repeat.edges:
            self._add_edge(first, then, distance)
        self._add_work()
        depth = self.model.new_int_var(0, STAGES - 1, "depth")
        self.model.add_max_equality(depth, self.stage)
        self.model.minimize(
            self.period * self.repeat.count + depth * self._units(least_period_s(self.problem, self.repeat))
        )

    def _units(self, seconds: float) -> int:
        return math.ceil(seconds / self.unit_s)

    def _choose_modes(self) -> None:
        absorbers: dict[int, list[Any]] = {}
        for i, task in enumerate(self.tasks):
            modes = [self.model.new_bool_var(f"mode_{i}_{m}") for m in range(len(task.modes))]
            self.model.add_exactly_one(modes)
            self.modes.append(modes)
            for mode, literal in zip(task.modes, modes, strict=True):
                for j in mode.absorbs:  # of this layer, or of one behind it
                    absorbers.setdefault((j - self.repeat.begin) % self.repeat.period, []).append(literal)
        self.absorbed = {j: sum(literals) for j, literals in absorbers.items()}
        self.length = []
        for i, task in enumerate(self.tasks):
            length = self.model.new_int_var(0, UNITS, f"length_{i}")
            alone = sum(self._units(m.seconds) * x for m, x in zip(task.modes, self.modes[i], strict=True))
            if i in self.absorbed:
                here = self.model.new_bool_var(f"here_{i}")
                self.model.add(self.absorbed[i] + here == 1)
                self.model.add(length == alone).only_enforce_if(here)
                self.model.add(length == 0).only_enforce_if(~here)
            else:
                self.model.add(length == alone)
            self.length.append(length)

    def _add_lanes(self) -> None:
        lanes: dict[str, list[Any]] = {}
        for i, task in enumerate(self.tasks):
            offset = self.model.new_int_var(0, 2 * UNITS, f"offset_{i}")
            self.model.add(offset < self.period)
            self.offset.append(offset)
            self.stage.append(self.model.new_int_var(0, STAGES - 1, f"stage_{i}"))
            again = self.model.new_int_var(0, 4 * UNITS, f"again_{i}")
            self.model.add(again == offset + self.period)
            for start, name in ((offset, "now"), (again, "next")):
                end = self.model.new_int_var(0, 5 * UNITS, f"end_{name}_{i}")
                interval = self.model.new_interval_var(start, self.length[i], end, f"{name}_{i}")
                lanes.setdefault(task.lane, []).append(interval)
        for intervals in lanes.values():
            self.model.add_no_overlap(intervals)

    def _add_edge(self, first: int, then: int, distance: int) -> None:
        """offset[then] >= offset[first] + length[first] + behind * period, where behind <= 0 counts layers."""
        done = self.offset[first] + self.length[first] + self._units(self._event_s(first, then))
        behind = self.stage[first] - self.stage[then] - distance
        same, next_ = (self.model.new_bool_var(f"{name}_{first}_{then}_{distance}") for name in ("same", "next"))
        self.model.add(behind <= 0)
        self.model.add(behind == 0).only_enforce_if(same)
        self.model.add(behind <= -1).only_enforce_if(~same)
        self.model.add(self.offset[then] >= done).only_enforce_if(same)
        self.model.add(self.offset[then] + self.period >= done).only_enforce_if(next_)
        self.model.add(behind <= -2).only_enforce_if([~same, ~next_])

    def _event_s(self, first: int, then: int) -> float:
        return self.problem.event_s * (self.tasks[first].lane != self.tasks[then].lane)

    def _add_work(self) -> None:
        """The period is no less than each lane's and each resource's work."""
        for lane in dict.fromkeys(task.lane for task in self.tasks):
            mine = [length for task, length in zip(self.tasks, self.length, strict=True) if task.lane == lane]
            self.model.add(self.period >= sum(mine))
        for name in dict.fromkeys(name for task in self.tasks for mode in task.modes for name in mode.needs):
            spent = [
                self._units(mode.seconds * mode.needs.get(name, 0.0)) * literal
                for i, task in enumerate(self.tasks)
                if i not in self.absorbed
                for mode, literal in zip(task.modes, self.modes[i], strict=True)
            ]
            self.model.add(self.period >= sum(spent))

    def answer(self, value: Callable[[Any], int]) -> tuple[list[float], list[float], list[int], float]:
        """Starts and lengths in seconds and modes of the tasks of the first layer, and the period in seconds."""
        period = value(self.period)
        starts = [(value(o) + value(s) * period) * self.unit_s for o, s in zip(self.offset, self.stage, strict=True)]
        lengths = [value(length) * self.unit_s for length in self.length]
        modes = [next(m for m, literal in enumerate(literals) if value(literal)) for literals in self.modes]
        return starts, lengths, modes, period * self.unit_s
