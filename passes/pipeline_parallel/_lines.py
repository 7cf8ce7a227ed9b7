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

__all__ = ["Edge", "Line", "Lines", "lines_of", "room_of", "whole_useful"]


@dataclass(frozen=True)
class Edge:
    """The n-th starts when the (n - ``offset``)-th of line ``before`` has ended, and ``lag`` passed."""

    before: int
    lag: int
    offset: int = 0


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
        memory = _waits(problem, tasks)
        for place, task in enumerate(tasks):
            edges = [Edge(base + before, lag) for before, lag in task.after]
            edges += [Edge(base + before, 0, offset) for before, offset in memory.get(place, ())]
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


def room_of(problem: PipelineProblem, rank: int) -> int | None:
    """Bytes that ``rank`` has for what comes and goes; ``None`` without a limit."""
    if problem.memory_limit is None:
        return None
    return max(0, problem.memory_limit[rank] - problem.resident_bytes[rank])


def whole_useful(problem: PipelineProblem, index: int) -> bool:
    """Whether a stage's whole backward can be of use: it is faster than its halves, or saves what lies between them."""
    stage = problem.stages[index]
    faster = stage.whole_backward_ns < stage.input_gradient_ns + stage.weight_gradient_ns
    return faster or (stage.between_gradients_bytes > 0 and problem.memory_limit is not None)


_HALVES = (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)


def _waits(problem: PipelineProblem, tasks: tuple[Task, ...]) -> dict[int, list[tuple[int, int]]]:
    """For each forward, (freeing task, offset): how many may be held at its start, so which have left before.

    At the start of the n-th F of a stage, of every stage of the rank that its microbatches have passed before n + 1 are
    there or gone; what is open in between holds its bytes at least once, and at most so many fit beside it.
    """
    if problem.memory_limit is None:
        return {}
    forwards = [place for place, task in enumerate(tasks) if task.kind is ActionKind.FORWARD]
    index = {(task.kind, task.stage): place for place, task in enumerate(tasks)}
    waits: dict[int, list[tuple[int, int]]] = {}
    for position, place in enumerate(forwards):
        rank = tasks[place].rank
        room = room_of(problem, rank)
        assert room is not None
        passed = [tasks[other].stage for other in forwards[: position + 1] if tasks[other].rank == rank]
        for stage_index in passed:
            stage = problem.stages[stage_index]
            kept = stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes - stage.offloaded_bytes
            # the new one's bytes in full; of the others that are open what cannot be offloaded
            arriving = problem.stages[tasks[place].stage].offloaded_bytes
            beside = sum(_kept(problem, other) for other in passed if other != stage_index)
            left = room - beside - arriving
            until_weight = stage.until_weight_gradient_bytes - stage.offloaded_bytes
            found = waits.setdefault(place, [])
            if kept > 0:
                found.append((index[ActionKind.INPUT_GRADIENT, stage_index], max(1, left // kept)))
            if until_weight > 0:
                fit = (left - stage.until_input_gradient_bytes) // until_weight
                found.append((index[ActionKind.WEIGHT_GRADIENT, stage_index], max(1, fit)))
    return waits


def _kept(problem: PipelineProblem, stage_index: int) -> int:
    stage = problem.stages[stage_index]
    return stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes - stage.offloaded_bytes
