"""Makespans and spans that no schedule of a pipeline problem undercuts, by arithmetic; proofs in the docs.

Heads and tails, the earliest start of a microbatch's task and the least that comes behind its end, follow from
precedence and from memory: a forward waits until what does not fit beside it has left. For each rank they make a
problem of one machine, whose optimum with interruptions (Jackson's preemptive schedule; Carlier, European Journal of
Operational Research 11, 1982) is a bound. It counts what idles before the first backward under a limit, and behind
the last forward.
"""

from __future__ import annotations

import numpy as np

from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import ActionKind
from .._one_machine import preemptive
from ._heads import NEVER, Times, heads, mirrored
from ._lines import Lines, lines_of
from ._phases import phases
from ._pressed import pressing_of
from .solution import Bound, Objective

__all__ = ["View", "lower_bound"]


def lower_bound(problem: PipelineProblem, objective: Objective = "makespan", *, thorough: bool = False) -> Bound:
    """What no schedule undercuts, in the problem's unit of time, whether backward passes are whole or in halves.

    Valid for any routes, vocabulary, copies to the host, all-reduces and memory limits, and if B is faster than I and
    W. Nothing says here that a limit cannot be kept at all: of what does not fit one is taken to fit. ``thorough``
    counts on each rank what has to be done before each start, which takes several times as long; it is left out where
    ranks and microbatches are so many that it would take more than seconds.
    """
    view = View(lines_of(problem), thorough=thorough)
    if objective == "makespan":
        starts, behind = view.ahead(None), view.behind(None)
        ends = [_machine(view.lines, starts, behind, rank) for rank in range(problem.ranks)]
        ends += [
            int(start[-1] + line.duration + tail[-1])
            for line, start, tail in zip(view.lines.lines, starts, behind, strict=True)
        ]
        return Bound(max(ends), "analytic")
    if thorough and sum(line.count for line in view.lines.lines) > _MOST_OF_SPANS:
        view = View(view.lines, thorough=False)
    spans = [_machine(view.lines, view.ahead(rank), view.behind(rank), rank) for rank in range(problem.ranks)]
    return Bound(max(0, *spans), "analytic")


_MOST_OF_SPANS = 6_000  # starts of all lines: heads and tails are found anew for each rank


class View:
    """Heads and tails of lines, from and to anywhere, or on one rank."""

    def __init__(self, lines: Lines, *, thorough: bool) -> None:
        self.lines = lines
        self._mirrored = mirrored(lines)
        self._forward = pressing_of(lines.lines) if thorough else None
        self._backward = pressing_of(self._mirrored) if thorough else None

    def ahead(self, rank: int | None) -> Times:
        """The earliest start of each line's n-th, from the step's start, or from the first start on ``rank``."""
        first = [0 if rank in (None, line.task.rank) else NEVER for line in self.lines.lines]
        return heads(self.lines.lines, first, self._forward)

    def behind(self, rank: int | None) -> Times:
        """The least that comes behind the end of each line's n-th, anywhere, or on ``rank``."""
        tails = zip(self.lines.lines, self.lines.tails, strict=True)
        last = [tail if rank in (None, line.task.rank) else NEVER for line, tail in tails]
        found = heads(self._mirrored, last[::-1], self._backward)
        return [times[::-1] for times in found[::-1]]


def _machine(lines: Lines, starts: Times, behind: Times, rank: int) -> int:
    """The least end of what ``rank`` computes, copies and reduces."""
    least = 0
    for machine in ((rank, False), (rank, True)):
        own = [index for index, line in enumerate(lines.lines) if line.machine == machine]
        if own:
            head = np.concatenate([starts[index] for index in own])
            tail = np.concatenate([behind[index] for index in own])
            work = np.concatenate([np.full(lines.lines[i].count, lines.lines[i].duration, np.int64) for i in own])
            least = max(least, preemptive(zip(head.tolist(), work.tolist(), tail.tolist(), strict=True), 0))
    return max(least, phases(lines, starts, behind, rank), _reduced(lines, starts, rank))


def _reduced(lines: Lines, starts: Times, rank: int) -> int:
    """The least end of the all-reduces of ``rank``, one behind the other, each behind the last W of its stage."""
    ready: dict[int, int] = {}
    for line, start in zip(lines.lines, starts, strict=True):
        if line.task.kind is ActionKind.WEIGHT_GRADIENT and line.task.rank == rank:
            ready[line.task.stage] = max(ready.get(line.task.stage, 0), int(start[-1]) + line.duration)
    end = 0
    for stage, done in sorted(ready.items(), key=lambda item: item[1]):
        if lines.problem.stages[stage].reduce_ns:
            end = max(end, done) + lines.problem.stages[stage].reduce_ns
    return end
