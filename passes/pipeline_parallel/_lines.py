"""A pipeline problem relaxed to lines: one for each task of a route, whose microbatches follow each other in order.

What a schedule starts first of a task is called the task's 0th, whichever microbatch it is. If in every microbatch one
task follows another, then the n-th of the one follows the n-th of the other: the sorted times keep the lag (the
exchange argument; proof in docs/formulations/pipeline.md). So everything here holds for all schedules, in order or not.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import ActionKind
from ...compiler.pipelining.tasks import Task, tasks_of
from ._waits import waits_of

__all__ = ["Edge", "Line", "Lines", "lines_of", "whole_useful"]


@dataclass(frozen=True)
class Edge:
    """The n-th starts when the (n - ``offset``)-th of line ``before`` has ended, and ``lag`` passed.

    ``memory`` says that it is the limit which makes it wait, not a task of the same microbatch.
    """

    before: int
    lag: int
    offset: int = 0
    memory: bool = False


@dataclass(frozen=True)
class Line:
    """A task of a route: the least time that it takes, how often it is done, and what it follows."""

    task: Task
    duration: int
    count: int
    edges: tuple[Edge, ...]

    @property
    def machine(self) -> tuple[int, bool]:
        """The rank, and whether it is its copy engine."""
        return self.task.rank, self.task.kind.copies


@dataclass(frozen=True)
class Lines:
    """All lines, each behind those of its route that it follows in the same microbatch; ``reduce_ns`` by line."""

    problem: PipelineProblem
    lines: tuple[Line, ...]

    @property
    def tails(self) -> tuple[int, ...]:
        """What follows the last of each line at least: the all-reduce of the stage's gradients."""
        stages = self.problem.stages
        return tuple(
            stages[line.task.stage].reduce_ns if line.task.kind is ActionKind.WEIGHT_GRADIENT else 0
            for line in self.lines
        )


def lines_of(problem: PipelineProblem) -> Lines:
    """The lines of all routes, with what memory adds: a forward waits until what does not fit beside it has left."""
    lines: list[Line] = []
    for index, route in enumerate(problem.routes):
        tasks = tasks_of(problem, index)
        base = len(lines)
        memory = waits_of(problem, tasks)
        for place, task in enumerate(tasks):
            edges = [Edge(base + before, lag) for before, lag in task.after]
            edges += [Edge(base + before, 0, offset, memory=True) for before, offset in memory.get(place, ())]
            lines.append(Line(task, least_duration(problem, task), route.microbatches, tuple(edges)))
    return Lines(problem, tuple(lines))


def least_duration(problem: PipelineProblem, task: Task) -> int:
    """The least that ``task`` takes, alone or as half of a whole backward; the halves add up to the faster of both."""
    stage = problem.stages[task.stage] if task.kind in _HALVES else None
    if stage is None:
        return task.duration_ns
    first = min(stage.input_gradient_ns, stage.whole_backward_ns)
    if task.kind is ActionKind.INPUT_GRADIENT:
        return first
    return min(stage.input_gradient_ns + stage.weight_gradient_ns, stage.whole_backward_ns) - first


def whole_useful(problem: PipelineProblem, index: int) -> bool:
    """Whether a stage's whole backward can be of use: it is faster than its halves, or saves what lies between them."""
    stage = problem.stages[index]
    faster = stage.whole_backward_ns < stage.input_gradient_ns + stage.weight_gradient_ns
    return faster or (stage.between_gradients_bytes > 0 and problem.memory_limit is not None)


_HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
