"""The relaxation of an overlap problem as a CP-SAT model; docs/formulations/overlap-exact.md states it likewise.

Every schedule of the fluid model, its times rounded down to whole units, satisfies the model with no later end. So the
least end is a bound on the makespan, and the order of its starts a good order of issue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ortools.sat.python import cp_model

from ._sharing import PARTS, Rival, Sharing, ancestors
from .lower_bound import Least
from .problem import Problem, Schedule

__all__ = ["Relaxed"]

UNITS = 20_000  # of the horizon: rounding down costs a bound at most one unit a task of its longest chain
LAUNCH_BOUND = 0.1  # the host's queue is part of the model if launches take that part of the horizon


@dataclass
class Relaxed:
    """The model of ``problem``, in which no task ends behind ``horizon_s``; ``least`` are its heads and tails.

    ``chosen[i][m]`` is true for the mode, ``absorbed[i]`` if another task does it; ``start``, ``length``, ``end`` are
    in units of ``unit_s``.
    """

    problem: Problem
    least: Least
    horizon_s: float
    model: cp_model.CpModel = field(default_factory=cp_model.CpModel)
    chosen: list[list[Any]] = field(default_factory=list)
    absorbed: dict[int, Any] = field(default_factory=dict)
    start: list[Any] = field(default_factory=list)
    length: list[Any] = field(default_factory=list)
    end: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unit_s = self.horizon_s / UNITS
        before = ancestors(self.problem)
        related = list(before)
        for i, mask in enumerate(before):
            for j in range(i):
                if mask >> j & 1:
                    related[j] |= 1 << i
        self.sharing = Sharing(self.problem, related)
        self._choose_modes()
        self._add_times()
        self._add_edges()
        self._add_lanes()
        self._add_sharing()
        self._add_energy()
        self._add_memory()
        self._add_launches()

    def units(self, seconds: float) -> int:
        """Whole units within ``seconds``."""
        return max(0, math.floor(seconds / self.unit_s * (1 - 1e-12)))

    def _choose_modes(self) -> None:
        absorbers: dict[int, list[Any]] = {}
        for i, task in enumerate(self.problem.tasks):
            modes = range(len(task.modes))
            self.chosen.append([self.model.new_bool_var(f"mode_{i}_{m}") for m in modes] if len(modes) > 1 else [True])
            self.model.add_exactly_one(self.chosen[i])
            for mode, literal in zip(task.modes, self.chosen[i], strict=True):
                for j in mode.absorbs:
                    absorbers.setdefault(j, []).append(literal)
        for j, literals in absorbers.items():
            self.absorbed[j] = self.model.new_bool_var(f"absorbed_{j}")
            self.model.add(sum(literals) == self.absorbed[j])

    def _alone(self, i: int) -> Any:
        """Units that the task takes alone in its mode."""
        seconds = [self.units(mode.seconds) for mode in self.problem.tasks[i].modes]
        return sum(spent * literal for spent, literal in zip(seconds, self.chosen[i], strict=True))

    def _add_times(self) -> None:
        least = self.least
        for i, task in enumerate(self.problem.tasks):
            head, tail = self.units(least.head_s[i]), self.units(least.tail_s[i])
            shortest = self.units(least.seconds[i])
            start = self.model.new_int_var(head, UNITS - tail - shortest, f"start_{i}")
            end = self.model.new_int_var(head + shortest, UNITS - tail, f"end_{i}")
            length = self.model.new_int_var(shortest, UNITS - tail - head, f"length_{i}")
            self.model.add(start + length == end)
            loses = any(map(self.sharing.loses, task.modes)) and any(self.sharing.rivals(i))
            here = [~self.absorbed[i]] if i in self.absorbed else []
            row = length >= self._alone(i) if loses else length == self._alone(i)
            self.model.add(row).only_enforce_if(here)
            if i in self.absorbed:
                self.model.add(length == 0).only_enforce_if(self.absorbed[i])
            self.start.append(start)
            self.end.append(end)
            self.length.append(length)
        self.makespan = self.model.new_int_var(0, UNITS, "makespan")
        self.model.add_max_equality(self.makespan, self.end or [0])
        self.model.minimize(self.makespan)

    def _add_edges(self) -> None:
        tasks = self.problem.tasks
        for i, task in enumerate(tasks):
            for j, event_s in zip(task.before, self.least.events[i], strict=True):
                self.model.add(self.start[i] >= self.end[j] + self.units(event_s))
            for mode, literal in zip(task.modes, self.chosen[i], strict=True):
                for j in mode.absorbs:
                    self.model.add(self.end[j] == self.end[i]).only_enforce_if(literal)
                    for k in tasks[j].before:
                        if k != i and k not in mode.absorbs:
                            self.model.add(self.start[i] >= self.end[k]).only_enforce_if(literal)

    def _add_lanes(self) -> None:
        lanes: dict[str, list[Any]] = {}
        for i, task in enumerate(self.problem.tasks):
            span = self.start[i], self.length[i], self.end[i]
            if i in self.absorbed:
                interval = self.model.new_optional_interval_var(*span, ~self.absorbed[i], f"lane_{i}")
            else:
                interval = self.model.new_interval_var(*span, f"lane_{i}")
            lanes.setdefault(task.lane, []).append(interval)
        for intervals in lanes.values():
            self.model.add_no_overlap(intervals)

    def _add_sharing(self) -> None:
        """need_c * loss_c + sum(need_k * loss_k) >= sum(excess * overlap), k on one lane, as `_sharing` says."""
        overlaps: dict[tuple[int, int], Any] = {}
        for i in range(len(self.problem.tasks)):
            groups: dict[tuple[str, str], list[Rival]] = {}
            for rival in self.sharing.rivals(i):
                lane = self.problem.tasks[rival.task].lane
                groups.setdefault((rival.resource, lane), []).append(rival)
            for (resource, _), rivals in groups.items():
                lost = self._priced_loss(i, resource)
                needed: Any = 0
                for rival in rivals:
                    pair = min(i, rival.task), max(i, rival.task)
                    if pair not in overlaps:
                        overlaps[pair] = self._overlap(*pair)
                    lost += self._priced_loss(rival.task, resource)
                    needed += self._priced_overlap(i, rival, overlaps[pair])
                self.model.add(lost + self._rounding((i, *(rival.task for rival in rivals)), resource) >= needed)

    def _overlap(self, i: int, j: int) -> Any:
        first = self.model.new_int_var(0, UNITS, f"first_end_{i}_{j}")
        last = self.model.new_int_var(0, UNITS, f"last_start_{i}_{j}")
        self.model.add_min_equality(first, [self.end[i], self.end[j]])
        self.model.add_max_equality(last, [self.start[i], self.start[j]])
        overlap = self.model.new_int_var(0, UNITS, f"overlap_{i}_{j}")
        self.model.add(overlap >= first - last - 1)  # rounding may have added one
        return overlap

    def _rounding(self, tasks: Iterable[int], resource: str) -> int:
        """What rounding may have taken from the sum of priced losses: a unit of each task that loses."""
        return sum(max(self._prices(i, resource)) for i in tasks)

    def _prices(self, i: int, resource: str) -> list[int]:
        """Parts of the resource that a lost unit counts for, by mode; 0 in modes that lose nothing."""
        modes = self.problem.tasks[i].modes
        return [math.ceil(m.needs.get(resource, 0.0) * PARTS) if self.sharing.loses(m) else 0 for m in modes]

    def _priced_loss(self, i: int, resource: str) -> Any:
        """At most the need, in parts, times the units lost; 0 in modes that lose nothing."""
        prices = self._prices(i, resource)
        loss = self.length[i] - self._alone(i)
        if i in self.absorbed or len(set(prices)) > 1:
            priced = self.model.new_int_var(0, PARTS * UNITS, f"lost_{i}_{resource}")
            for price, literal in zip(prices, self.chosen[i], strict=True):
                self.model.add(priced <= price * loss).only_enforce_if(self._present(i, literal))
            if i in self.absorbed:
                self.model.add(priced == 0).only_enforce_if(self.absorbed[i])
            return priced
        return prices[0] * loss

    def _present(self, i: int, *literals: Any) -> list[Any]:
        absent = [~self.absorbed[i]] if i in self.absorbed else []
        return [literal for literal in (*literals, *absent) if literal is not True]

    def _priced_overlap(self, i: int, rival: Rival, overlap: Any) -> Any:
        pairs = len(self.chosen[i]) * len(self.chosen[rival.task])
        if pairs == 1:
            return rival.excess[0, 0] * overlap
        most = max(rival.excess.values())
        priced = self.model.new_int_var(0, most * UNITS, f"excess_{i}_{rival.task}_{rival.resource}")
        if len(rival.excess) == pairs:
            self.model.add(priced >= min(rival.excess.values()) * overlap)
        for (own, other), excess in rival.excess.items():
            literals = [x for x in (self.chosen[i][own], self.chosen[rival.task][other]) if x is not True]
            self.model.add(priced >= excess * overlap).only_enforce_if(literals)
        return priced

    def _add_energy(self) -> None:
        """What `bounds` says of lanes and resources, for the modes chosen: implied, but found late."""
        for name, users in self.least.work.items():
            head = self.units(min(self.least.head_s[i] for i in users))
            tail = self.units(min(self.least.tail_s[i] for i in users))
            kind, _, key = name.partition(" ")
            if kind == "lane":
                spent = sum(self.length[i] for i in users)
            else:
                spent = sum(
                    self.units(mode.seconds * mode.needs.get(key, 0.0)) * literal
                    for i in users
                    for mode, literal in zip(self.problem.tasks[i].modes, self.chosen[i], strict=True)
                )
            if kind == "resource" or not set(users) & set(self.absorbed):
                self.model.add(self.makespan >= head + spent + tail)

    def _add_memory(self) -> None:
        limit = self.problem.memory_limit_bytes
        if limit is None:
            return
        users: dict[int, list[int]] = {}
        for i, task in enumerate(self.problem.tasks):
            for freed in task.frees:
                users.setdefault(freed, []).append(i)
        grain = max(1, limit // UNITS)
        times, changes = [], []
        for i, task in enumerate(self.problem.tasks):
            if task.allocates_bytes < grain:
                continue
            times.append(self.start[i])
            changes.append(task.allocates_bytes // grain)
            if i in users:
                death = self.model.new_int_var(0, UNITS, f"death_{i}")
                self.model.add_max_equality(death, [self.end[k] for k in (i, *users[i])])
                times.append(death)
                changes.append(-(task.allocates_bytes // grain))
        if sum(change for change in changes if change > 0) > limit // grain:
            self.model.add_reservoir_constraint(times, changes, -sum(map(abs, changes)), -(-limit // grain))

    def _add_launches(self) -> None:
        """The host issues one task's launches after another's; each starts when its first has been issued."""
        issue_s, tasks = self.problem.issue_s, self.problem.tasks
        queued = [i for i, task in enumerate(tasks) if task.launches and i not in self.absorbed]
        if issue_s * sum(tasks[i].launches for i in queued) < LAUNCH_BOUND * self.horizon_s:
            return
        intervals = []
        for i in queued:
            issued = self.model.new_int_var(0, UNITS, f"issued_{i}")
            self.model.add(issued <= self.start[i])
            intervals.append(
                self.model.new_fixed_size_interval_var(issued, self.units(issue_s * tasks[i].launches), f"host_{i}")
            )
        self.model.add_no_overlap(intervals)

    def hint(self, schedule: Schedule) -> None:
        """Tell the solver a schedule to begin with."""
        for i, mode in enumerate(schedule.modes):
            for m, literal in enumerate(self.chosen[i]):
                if literal is not True:
                    self.model.add_hint(literal, m == mode)
            self.model.add_hint(self.start[i], min(UNITS, self.units(schedule.start_s[i])))
            self.model.add_hint(self.end[i], min(UNITS, self.units(schedule.finish_s[i])))

    def answer(self, value: Callable[[Any], int]) -> tuple[list[int], list[int], list[int]]:
        """Starts and ends in units, and modes; ``value`` reads a variable of the solution."""
        modes = [
            next(m for m, literal in enumerate(literals) if literal is True or value(literal))
            for literals in self.chosen
        ]
        return [value(start) for start in self.start], [value(end) for end in self.end], modes
