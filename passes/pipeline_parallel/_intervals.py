"""Constraint programming over starts: every action an interval, one at a time on a rank, bytes below the limit.

The n-th of a line is taken before its n+1-th, which loses nothing (see ``_lines``): microbatches of one route are
alike. A backward passes whole, as one action, where that may be of use: if it is faster than its halves, or if between
them the gradients take memory that is limited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ortools.sat.python import cp_model

from ...compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from ._heads import Times
from ._lines import Line, Lines, whole_useful
from ._memory import Held, held_by
from ._waits import room_of

__all__ = ["Grid", "Intervals"]


@dataclass(frozen=True)
class Grid:
    """Time in steps of ``unit``, rounded down; a line's starts lie from ``first`` to ``last``, in the problem's unit.

    Rounded down, a schedule stays feasible, as ``floor(a + b) >= floor(a) + floor(b)``: bounds hold, while orders are
    judged by the simulator.
    """

    unit: int
    first: Times
    last: Times

    def down(self, amount: int) -> int:
        """So many steps, rounded down."""
        return amount // self.unit


class Intervals:
    """The model of ``lines``: ``makespan``, or ``span``, is to be minimised and at least ``least``."""

    def __init__(self, lines: Lines, grid: Grid, *, span: bool, least: int, most: int | None) -> None:
        self.lines, self.problem, self.grid = lines, lines.problem, grid
        self.model = cp_model.CpModel()
        self.start: list[list[Any]] = []
        self.end: list[list[Any]] = []
        self.whole: dict[tuple[int, int], list[Any]] = {}  # (route, stage) -> by microbatch, whether B does both halves
        self.value = self.model.new_int_var(grid.down(least), self._far if most is None else grid.down(most), "value")
        machines: dict[tuple[int, bool], list[Any]] = {}
        for index, line in enumerate(lines.lines):
            self._variables(index, line, machines.setdefault(line.machine, []))
        for intervals in machines.values():
            self.model.add_no_overlap(intervals)
        for index, line in enumerate(lines.lines):
            self._order(index, line)
        for rank in range(self.problem.ranks):
            self._memory(rank)
        self._objective(span)
        self.model.minimize(self.value)

    def _variables(self, index: int, line: Line, intervals: list[Any]) -> None:
        key = line.task.route, line.task.stage
        duration = self.grid.down(line.task.duration_ns)
        first, last = (times[index].tolist() for times in (self.grid.first, self.grid.last))
        later = duration if self._modes(line) is not None else 0  # a W that a whole backward does is put at its end
        starts = [
            self.model.new_int_var(self.grid.down(low), self.grid.down(high) + later, "")
            for low, high in zip(first, last, strict=True)
        ]
        self.start.append(starts)
        if line.task.kind is ActionKind.INPUT_GRADIENT and whole_useful(self.problem, line.task.stage):
            stage = self.problem.stages[line.task.stage]
            self.whole[key] = [self.model.new_bool_var("") for _ in range(line.count)]
            both = self.grid.down(stage.whole_backward_ns)
            self.end.append([self.model.new_int_var(0, self._far, "") for _ in starts])
            for start, end, whole in zip(starts, self.end[-1], self.whole[key], strict=True):
                size = duration + (both - duration) * whole
                intervals.append(self.model.new_interval_var(start, size, end, ""))
        elif line.task.kind is ActionKind.WEIGHT_GRADIENT and key in self.whole:
            self.end.append([self.model.new_int_var(0, self._far, "") for _ in starts])
            for start, end, whole in zip(starts, self.end[-1], self.whole[key], strict=True):
                intervals.append(self.model.new_optional_fixed_size_interval_var(start, duration, whole.negated(), ""))
                self.model.add(end == start + duration - duration * whole)
        else:
            self.end.append([start + duration for start in starts])
            intervals += [self.model.new_fixed_size_interval_var(start, duration, "") for start in starts]

    @cached_property
    def _far(self) -> int:
        """No earlier than anything ends, whichever way backwards go, or any all-reduce."""
        ends = [
            self.grid.down(int(times[-1])) + self.grid.down(line.task.duration_ns)
            for line, times in zip(self.lines.lines, self.grid.last, strict=True)
        ]
        return max(ends) + sum(
            self.grid.down(stage.whole_backward_ns + stage.weight_gradient_ns + stage.reduce_ns)
            for stage in self.problem.stages
        )

    def _order(self, index: int, line: Line) -> None:
        """Each behind what it follows in its microbatch, behind what has to leave before it, and behind the n-1-th."""
        starts = self.start[index]
        for edge in line.edges:
            before = self.lines.lines[edge.before]
            if edge.memory and self._modes(before) is not None and before.task.kind is ActionKind.WEIGHT_GRADIENT:
                continue  # with some backward passes whole, the n-th W is not that of the n-th I
            lag = self.grid.down(edge.lag)
            for n in range(edge.offset, line.count):
                self.model.add(starts[n] >= self.end[edge.before][n - edge.offset] + lag)
        modes = self._modes(line)
        for n in range(1, line.count):
            row = self.model.add(starts[n] >= self.end[index][n - 1])
            if modes is not None and line.task.kind is ActionKind.WEIGHT_GRADIENT:
                row.only_enforce_if(modes[n - 1].negated(), modes[n].negated())
        if modes is not None and line.task.kind is ActionKind.WEIGHT_GRADIENT:
            gradients = self._line(ActionKind.INPUT_GRADIENT, line)
            for n, whole in enumerate(modes):
                self.model.add(starts[n] == self.end[gradients][n]).only_enforce_if(whole)

    def _modes(self, line: Line) -> list[Any] | None:
        return self.whole.get((line.task.route, line.task.stage)) if line.task.kind in _HALVES else None

    def _line(self, kind: ActionKind, like: Line) -> int:
        return next(
            index
            for index, line in enumerate(self.lines.lines)
            if (line.task.kind, line.task.route, line.task.stage) == (kind, like.task.route, like.task.stage)
        )

    def _memory(self, rank: int) -> None:
        """Bytes from the start of one action to the end of another, all of a rank at most its room."""
        room = room_of(self.problem, rank)
        held = held_by(self.lines, rank)
        if room is None or self._kept_by_order(held, room):
            return
        intervals, bytes_ = [], []
        for item in held:
            modes = self.whole.get(item.key)
            for n, start in enumerate(self.start[item.since]):
                end = self.end[item.until][n]
                length = self.model.new_int_var(0, self._far, "")
                if item.between and modes is not None:
                    there = modes[n].negated()
                    intervals.append(self.model.new_optional_interval_var(start, length, end, there, ""))
                else:
                    intervals.append(self.model.new_interval_var(start, length, end, ""))
                bytes_.append(item.bytes)
        if intervals:
            self.model.add_cumulative(intervals, bytes_, room)

    def _kept_by_order(self, held: Sequence[Held], room: int) -> bool:
        """Whether the edges of memory already say all: one line holds bytes here, in one piece."""
        if len(held) != 1 or held[0].key in self.whole or held[0].bytes > room:
            return False
        return self.lines.lines[held[0].since].task.kind is ActionKind.FORWARD

    def _objective(self, span: bool) -> None:
        for rank in range(self.problem.ranks):
            own = [index for index, line in enumerate(self.lines.lines) if line.task.rank == rank]
            if not own:
                continue
            begin: Any = 0
            if span:
                begin = self.model.new_int_var(0, self._far, f"begin{rank}")
                for index in own:
                    self.model.add(begin <= self.start[index][0])
            for index in own:
                for end in self._last(index):
                    self.model.add(self.value >= end - begin)
            self._reduced(rank, own, begin)

    def _last(self, index: int) -> list[Any]:
        """The end of the line; with some backward passes whole, any W may be the last."""
        line = self.lines.lines[index]
        mixed = line.task.kind is ActionKind.WEIGHT_GRADIENT and self._modes(line) is not None
        return self.end[index] if mixed else self.end[index][-1:]

    def _reduced(self, rank: int, own: Sequence[int], begin: Any) -> None:
        """One all-reduce of the rank's stages at a time, each behind all W of its stage."""
        stages: dict[int, list[int]] = {}
        for index in own:
            line = self.lines.lines[index]
            if line.task.kind is ActionKind.WEIGHT_GRADIENT and self.problem.stages[line.task.stage].reduce_ns:
                stages.setdefault(line.task.stage, []).append(index)
        intervals = []
        for stage, indices in stages.items():
            duration = self.grid.down(self.problem.stages[stage].reduce_ns)
            far = self._far + sum(self.grid.down(other.reduce_ns) for other in self.problem.stages)
            start = self.model.new_int_var(0, far, f"reduce{stage}")
            for index in indices:
                for end in self._last(index):
                    self.model.add(start >= end)
            intervals.append(self.model.new_fixed_size_interval_var(start, duration, ""))
            self.model.add(self.value >= start + duration - begin)
        self.model.add_no_overlap(intervals)

    def hint(self, timed: TimedSchedule) -> None:
        """Begin at ``timed``, whose microbatches are taken in the order of each line."""
        times: dict[tuple[int, int, ActionKind], list[tuple[int, bool]]] = {}
        for order, starts in zip(timed.schedule.orders, timed.starts, strict=True):
            for action, start in zip(order, starts, strict=True):
                whole = action.kind is ActionKind.BACKWARD
                kind = ActionKind.INPUT_GRADIENT if whole else action.kind
                route = self.problem.route_of[action.microbatch]
                times.setdefault((route, action.stage, kind), []).append((start, whole))
        for index, line in enumerate(self.lines.lines):
            key = line.task.route, line.task.stage
            found = sorted(times.get((*key, line.task.kind), []))
            modes = self._modes(line)
            if modes is not None and line.task.kind is ActionKind.INPUT_GRADIENT:
                for (_, whole), variable in zip(found, modes, strict=True):
                    self.model.add_hint(variable, whole)
            if len(found) == line.count:
                for (start, _), variable in zip(found, self.start[index], strict=True):
                    self.model.add_hint(variable, self.grid.down(start))

    def schedules(self, value: Callable[[Any], int]) -> tuple[PipelineSchedule, ...]:
        """The orders that a solution stands for; two where copies run beside what a rank computes."""
        items: list[list[tuple[tuple[int, int, int, int], bool, Action]]] = [[] for _ in range(self.problem.ranks)]
        base = [0]
        for route in self.problem.routes:
            base.append(base[-1] + route.microbatches)
        for index, line in enumerate(self.lines.lines):
            modes = self._modes(line)
            for n in range(line.count):
                kind = line.task.kind
                if modes is not None and value(modes[n]):
                    if kind is ActionKind.WEIGHT_GRADIENT:
                        continue
                    kind = ActionKind.BACKWARD
                key = value(self.start[index][n]), value(self.end[index][n]), n, index
                microbatch = base[line.task.route] + n
                items[line.task.rank].append((key, kind.copies, Action(line.task.stage, kind, microbatch)))
        return tuple(
            PipelineSchedule(self.problem, tuple(_ordered(own, early=early) for own in items), "cp")
            for early in ((False, True) if any(copy for own in items for _, copy, _ in own) else (False,))
        )


_HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)


def _ordered(items: Sequence[tuple[tuple[int, int, int, int], bool, Action]], *, early: bool) -> tuple[Action, ...]:
    """By start; ``early``: a copy goes before the computation that runs when it starts, if that is not its operand."""
    places: dict[Action, tuple[int, ...]] = {}
    for key, copies, action in sorted(items):
        place: tuple[int, ...] = (*key[:2], 0, *key)
        running = [other[0] for other, also, _ in items if not also and other[0] < key[0] < other[1]]
        if copies and early and running:
            place = (running[0], running[0], 1, *key)  # behind what takes no time then, before what takes some
        if copies:
            before = ActionKind.FORWARD if action.kind is ActionKind.OFFLOAD else ActionKind.OFFLOAD
            place = max(place, (*places[Action(action.stage, before, action.microbatch)], 0))
        places[action] = place
    return tuple(sorted(places, key=lambda action: places[action]))
