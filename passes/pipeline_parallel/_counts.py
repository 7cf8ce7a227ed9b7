"""Rows over counts: how many of each task have started by each moment, whichever microbatches they were.

Microbatches of a route are alike, so which of them started does not matter: a time-indexed model needs one variable for
each task of a route and each step of time, however many microbatches there are.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from ...compiler.pipelining.schedule import ActionKind
from ._heads import Times
from ._lines import Lines, whole_useful
from ._memory import Held, held_by
from ._waits import room_of

__all__ = ["Counts", "Row", "counts_of"]

#: Terms (variable, factor) whose sum is at most the second.
Row = tuple[list[tuple[int, int]], int]


@dataclass(frozen=True)
class Counts:
    """Integers from 0 to ``high``, in ``rows``; variable 0 is how many starts are missing: a schedule misses none."""

    high: list[int]
    rows: list[Row]


def counts_of(lines: Lines, first: Times, last: Times, unit: int) -> Counts:
    """The rows for starts of each line's n-th from ``first`` to ``last``, in steps of ``unit``, rounded down.

    Rounded down, starts and ends of a schedule keep all rows: what overlaps in a step overlapped at its end.
    """
    writer = _Writer(lines, first, last, unit)
    for index in range(len(lines.lines)):
        writer.windows(index)
        writer.order(index)
    for machine in sorted({line.machine for line in lines.lines}):
        writer.machine(machine)
    for rank in range(lines.problem.ranks):
        writer.memory(rank)
    return Counts(writer.high, writer.rows)


@dataclass(frozen=True)
class _Sequence:
    """Starts of a line, or of whole backward passes: a variable for each moment from 0 to ``final``."""

    variable: int
    final: int
    duration: int

    def by(self, moment: int, factor: int = 1) -> list[tuple[int, int]]:
        """How many have started by ``moment``, as a term."""
        return [] if moment < 0 else [(self.variable + min(moment, self.final), factor)]

    def ended(self, moment: int, factor: int = 1) -> list[tuple[int, int]]:
        """How many have ended by ``moment``."""
        return self.by(moment - self.duration, factor)


class _Writer:
    def __init__(self, lines: Lines, first: Times, last: Times, unit: int) -> None:
        self.lines, self.unit = lines, unit
        self.first = [(times // unit).tolist() for times in first]
        self.last = [(times // unit).tolist() for times in last]
        self.end = max(times[-1] for times in self.last)
        self.high: list[int] = [max(line.count for line in lines.lines)]
        self.rows: list[Row] = []
        self.alone = [
            self._sequence(index, line.task.duration_ns // unit, self.last[index][-1])
            for index, line in enumerate(lines.lines)
        ]
        self.whole: dict[tuple[int, int], _Sequence] = {}
        for index, line in enumerate(lines.lines):
            if line.task.kind is ActionKind.INPUT_GRADIENT and whole_useful(lines.problem, line.task.stage):
                duration = lines.problem.stages[line.task.stage].whole_backward_ns // unit
                key = line.task.route, line.task.stage
                self.whole[key] = self._sequence(index, duration, self.last[index][-1])

    def _sequence(self, index: int, duration: int, final: int) -> _Sequence:
        sequence = _Sequence(len(self.high), max(0, final), duration)
        for moment in range(sequence.final + 1):
            self.high.append(bisect_right(self.first[index], moment))
            if moment:
                self.rows.append((sequence.by(moment - 1) + sequence.by(moment, -1), 0))
        return sequence

    def _started(self, index: int, moment: int, factor: int = 1) -> list[tuple[int, int]]:
        """Starts of a line's task, those in whole backward passes included if it is I."""
        line = self.lines.lines[index]
        whole = self.whole.get((line.task.route, line.task.stage))
        terms = self.alone[index].by(moment, factor)
        if whole is not None and line.task.kind is ActionKind.INPUT_GRADIENT:
            terms += whole.by(moment, factor)
        return terms

    def _ended(self, index: int, moment: int, factor: int = 1) -> list[tuple[int, int]]:
        """Ends of a line's task, those in whole backward passes included if it is I or W."""
        line = self.lines.lines[index]
        whole = self.whole.get((line.task.route, line.task.stage))
        terms = self.alone[index].ended(moment, factor)
        if whole is not None and line.task.kind in _HALVES:
            terms += whole.ended(moment, factor)
        return terms

    def windows(self, index: int) -> None:
        """The n-th starts at its latest when it has to; what is missing is counted."""
        line = self.lines.lines[index]
        mixed = (line.task.route, line.task.stage) in self.whole
        if mixed and line.task.kind is ActionKind.WEIGHT_GRADIENT:
            halves = self.alone[self._gradient(index)]
            self.rows.append(([*halves.by(self.end), *self.alone[index].by(self.end, -1), (0, -1)], 0))
            return
        for moment in sorted(set(self.last[index])):
            due = bisect_right(self.last[index], moment)
            self.rows.append(([*self._started(index, max(0, moment), -1), (0, -1)], -due))
        if mixed and line.task.kind is ActionKind.INPUT_GRADIENT:
            for moment in range(self.end):
                self.rows.append((self._started(index, moment), bisect_right(self.first[index], moment)))

    def _gradient(self, index: int) -> int:
        task = self.lines.lines[index].task
        wanted = task.route, task.stage, ActionKind.INPUT_GRADIENT
        return next(
            other
            for other, line in enumerate(self.lines.lines)
            if (line.task.route, line.task.stage, line.task.kind) == wanted
        )

    def order(self, index: int) -> None:
        """No more start than what they follow has ended."""
        line = self.lines.lines[index]
        weight = line.task.kind is ActionKind.WEIGHT_GRADIENT
        for edge in line.edges:
            if edge.memory:
                continue  # memory's rows say it
            lag = edge.lag // self.unit
            for moment in range(self.alone[index].final + 1):
                if weight:  # behind those I that are no whole backward
                    before = self.alone[edge.before].ended(moment - lag, -1)
                else:
                    before = self._ended(edge.before, moment - lag, -1)
                self.rows.append((self._started(index, moment) + before, 0))

    def machine(self, machine: tuple[int, bool]) -> None:
        """One at a time."""
        own = [sequence for sequence in self._sequences(machine) if sequence.duration]
        for moment in range(self.end + 1):
            terms = [term for sequence in own for term in sequence.by(moment) + sequence.ended(moment, -1)]
            self.rows.append((_merged(terms), 1))

    def _sequences(self, machine: tuple[int, bool]) -> list[_Sequence]:
        own = [self.alone[index] for index, line in enumerate(self.lines.lines) if line.machine == machine]
        stages = self.lines.problem.stages
        rank, copies = machine
        return own + [whole for (_, stage), whole in self.whole.items() if stages[stage].rank == rank and not copies]

    def memory(self, rank: int) -> None:
        """What has started to hold bytes, and not ended."""
        room = room_of(self.lines.problem, rank)
        held = held_by(self.lines, rank)
        if room is None or not held:
            return
        unit = math.gcd(*(item.bytes for item in held))
        for moment in range(self.end + 1):
            terms = [term for item in held for term in self._held(item, moment, item.bytes // unit)]
            self.rows.append((_merged(terms), room // unit))

    def _held(self, item: Held, moment: int, factor: int) -> list[tuple[int, int]]:
        if item.between:
            return self.alone[item.since].by(moment, factor) + self.alone[item.until].ended(moment, -factor)
        return self._started(item.since, moment, factor) + self._ended(item.until, moment, -factor)


def _merged(terms: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each variable once."""
    factors: dict[int, int] = {}
    for variable, factor in terms:
        factors[variable] = factors.get(variable, 0) + factor
    return [(variable, factor) for variable, factor in factors.items() if factor]


_HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
