"""All-reduces of gradients behind the pipeline: finish first the stages whose gradients travel longest.

On a rank with several stages the network is a second machine behind compute: W of a stage on the one, then its
all-reduce on the other. W may be put off, so the rank may choose which stage is done first; for jobs that go through
two machines in that order Johnson's rule (Naval Research Logistics Quarterly 1, 1954) says how.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import msgspec

from ...compiler.pipeline import Budget
from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule
from ...compiler.pipelining.simulate import timed
from .solution import Attempt, Objective, PipelineSolution, value_of, within_limit
from .solve import solve

__all__ = ["exposed_ns", "finishing_early", "johnson", "overlap_reduction"]


def overlap_reduction(
    problem: PipelineProblem, budget: Budget, *, objective: Objective = "makespan"
) -> PipelineSolution:
    """The best schedule found when the all-reduces count, that is when stages say their ``reduce_ns``.

    Attempts begin with the best schedule that was found as if there were none, with them at its end, and with its W
    put in other orders; the best of these is where the search starts from.

    Raises:
        Infeasible: the memory limit cannot be kept.
    """
    begin = time.monotonic()
    unaware = solve(_without(problem), budget.share(0.3), objective=objective)
    hints = [msgspec.structs.replace(unaware.timed.schedule, problem=problem, method="unaware of all-reduces")]
    for name, first in _priorities(problem):
        hints.append(finishing_early(timed(hints[0]), first, name))
    lines = [timed(hint) for hint in hints]
    attempts = [Attempt(line.schedule.method, value_of(line, objective), 0.0) for line in lines if within_limit(line)]
    lines = sorted(filter(within_limit, lines), key=lambda line: value_of(line, objective))
    solution = solve(problem, budget, objective=objective, hints=[line.schedule for line in lines])
    return replace(solution, attempts=(*attempts, *solution.attempts), seconds=time.monotonic() - begin)


def exposed_ns(line: TimedSchedule) -> int:
    """How much later the step ends than without its all-reduces, in the problem's unit of time."""
    return line.makespan_ns - max((finish for finishes in line.finishes for finish in finishes), default=0)


def finishing_early(line: TimedSchedule, first: Callable[[int], float], name: str) -> PipelineSchedule:
    """The schedule with each rank's W, in the places where it does some, by their stages: the least ``first`` first.

    W of a stage stay in their order, and none comes before its I. Other actions keep their places; B counts as one of
    them. It may hold more or fewer bytes, and end later: judge what it returns.
    """
    schedule = line.schedule
    orders = tuple(_reordered(order, first) for order in schedule.orders)
    return msgspec.structs.replace(schedule, orders=orders, method=f"{schedule.method}, {name}")


def _reordered(order: Sequence[Action], first: Callable[[int], float]) -> tuple[Action, ...]:
    waiting: dict[int, deque[Action]] = defaultdict(deque)  # by stage, W whose I is done
    placed: list[Action] = []
    for action in order:
        if action.kind is ActionKind.WEIGHT_GRADIENT:
            stage = min((stage for stage, line in waiting.items() if line), key=lambda stage: (first(stage), stage))
            placed.append(waiting[stage].popleft())
            continue
        placed.append(action)
        if action.kind is ActionKind.INPUT_GRADIENT:
            waiting[action.stage].append(Action(action.stage, ActionKind.WEIGHT_GRADIENT, action.microbatch))
    return tuple(placed)


def _priorities(problem: PipelineProblem) -> Iterable[tuple[str, Callable[[int], float]]]:
    """Orders of stages to try; the first is Johnson's, of a stage's W of one microbatch and its all-reduce."""
    ranked = {stage: place for place, stage in enumerate(johnson(problem))}
    yield "W by Johnson's rule", ranked.__getitem__
    yield "W of late stages first", lambda stage: -stage
    yield "W of early stages first", lambda stage: stage


def johnson(problem: PipelineProblem) -> list[int]:
    """Stages in the order of Johnson's rule, by W of one microbatch and all-reduce.

    First those with less W than all-reduce, the least W first; then the others, the most all-reduce first.
    """

    def key(stage: int) -> tuple[int, int]:
        own = problem.stages[stage]
        if own.weight_gradient_ns < own.reduce_ns:
            return 0, own.weight_gradient_ns
        return 1, -own.reduce_ns

    return sorted(range(len(problem.stages)), key=key)


def _without(problem: PipelineProblem) -> PipelineProblem:
    stages = tuple(msgspec.structs.replace(stage, reduce_ns=0) for stage in problem.stages)
    return msgspec.structs.replace(problem, stages=stages)
