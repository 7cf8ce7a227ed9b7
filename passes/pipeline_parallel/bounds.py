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
from ._heads import NEVER, Times, heads, mirrored, preemptive
from ._lines import Lines, lines_of
from ._phases import phases
from .solution import Bound, Objective

__all__ = ["behind_on", "lower_bound"]


def lower_bound(problem: PipelineProblem, objective: Objective = "makespan") -> Bound:
    """What no schedule undercuts, in the problem's unit of time, whether backward passes are whole or in halves.

    Valid for any routes, vocabulary, copies to the host, all-reduces and memory limits, and if B is faster than I and
    W. Nothing says here that a limit cannot be kept at all: of what does not fit one is taken to fit.
    """
    lines = lines_of(problem)
    if objective == "makespan":
        starts, behind = heads(lines.lines, [0] * len(lines.lines)), behind_on(lines, None)
        ends = [_machine(lines, starts, behind, rank) for rank in range(problem.ranks)]
        ends += [
            int(start[-1] + line.duration + tail[-1])
            for line, start, tail in zip(lines.lines, starts, behind, strict=True)
        ]
        return Bound(max(ends), "analytic")
    spans = [_machine(lines, _ahead_on(lines, rank), behind_on(lines, rank), rank) for rank in range(problem.ranks)]
    return Bound(max(0, *spans) if spans else 0, "analytic")


def behind_on(lines: Lines, rank: int | None) -> Times:
    """The least that comes behind the end of each line's n-th: on ``rank``, or anywhere if ``None``."""
    own = [rank is None or line.task.rank == rank for line in lines.lines]
    last = [tail if known else NEVER for known, tail in zip(own, lines.tails, strict=True)]
    behind = heads(mirrored(lines), last[::-1])
    return [times[::-1] for times in behind[::-1]]


def _ahead_on(lines: Lines, rank: int) -> Times:
    """The least from the first start on ``rank`` to the start of each line's n-th."""
    return heads(lines.lines, [0 if line.task.rank == rank else NEVER for line in lines.lines])


def _machine(lines: Lines, starts: Times, behind: Times, rank: int) -> int:
    """The least end of what ``rank`` computes, copies and reduces."""
    least = 0
    for machine in ((rank, False), (rank, True)):
        own = [index for index, line in enumerate(lines.lines) if line.machine == machine]
        if own:
            head = np.concatenate([starts[index] for index in own])
            tail = np.concatenate([behind[index] for index in own])
            work = np.concatenate([np.full(lines.lines[i].count, lines.lines[i].duration, np.int64) for i in own])
            least = max(least, preemptive(head, work, tail))
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
