"""What a memory limit makes wait: an action starts when enough of what was held before it has left."""

from __future__ import annotations

from collections.abc import Iterator

from ...compiler.pipelining.problem import PipelineProblem, Stage
from ...compiler.pipelining.schedule import ActionKind
from ...compiler.pipelining.tasks import Task

__all__ = ["kept", "room_of", "waits_of"]

#: (place of the task that frees, offset): the n-th action waits for the end of the (n - offset)-th of these.
Wait = tuple[int, int]


def room_of(problem: PipelineProblem, rank: int) -> int | None:
    """Bytes that ``rank`` has for what comes and goes; ``None`` without a limit."""
    if problem.memory_limit is None:
        return None
    return max(0, problem.memory_limit[rank] - problem.resident_bytes[rank])


def kept(stage: Stage) -> int:
    """Bytes that one microbatch holds at least from the start of F to the end of I: what is not offloaded."""
    return stage.until_input_gradient_bytes + stage.until_weight_gradient_bytes - stage.offloaded_bytes


def waits_of(problem: PipelineProblem, tasks: tuple[Task, ...]) -> dict[int, list[Wait]]:
    """For each F and I of a route, by its place in ``tasks``, what it waits for to keep the limit.

    Of what does not fit one is taken to fit.
    """
    waits: dict[int, list[Wait]] = {}
    if problem.memory_limit is None:
        return waits
    index = {(task.kind, task.stage): place for place, task in enumerate(tasks)}
    forwards = [task.stage for task in tasks if task.kind is ActionKind.FORWARD]
    for position, number in enumerate(forwards):
        rank = problem.stages[number].rank
        room = room_of(problem, rank)
        assert room is not None
        before = [other for other in forwards[: position + 1] if problem.stages[other].rank == rank]
        behind = [other for other in forwards[position:] if problem.stages[other].rank == rank]
        waits[index[ActionKind.FORWARD, number]] = [
            (index[kind, stage], offset) for kind, stage, offset in _at_forward(problem, number, before, room)
        ]
        waits[index[ActionKind.INPUT_GRADIENT, number]] = [
            (index[ActionKind.WEIGHT_GRADIENT, stage], offset)
            for stage, offset in _at_gradient(problem, number, before, behind, room)
        ]
    return waits


def _at_forward(
    problem: PipelineProblem, number: int, before: list[int], room: int
) -> Iterator[tuple[ActionKind, int, int]]:
    """At the start of the n-th F, n + 1 have passed each stage of the rank ``before`` it, itself included.

    Their I comes behind this F, so that of each one is open at least; of one stage at a time no more than fit beside.
    """
    for other in before:
        stage = problem.stages[other]
        left = room - problem.stages[number].offloaded_bytes  # the new one's bytes are there in full
        left -= sum(kept(problem.stages[beside]) for beside in before if beside != other)
        until_weight = stage.until_weight_gradient_bytes - stage.offloaded_bytes
        if kept(stage) > 0:
            yield ActionKind.INPUT_GRADIENT, other, max(1, left // kept(stage))
        if until_weight > 0:
            fit = (left - stage.until_input_gradient_bytes) // until_weight
            yield ActionKind.WEIGHT_GRADIENT, other, max(1, fit)


def _at_gradient(
    problem: PipelineProblem, number: int, before: list[int], behind: list[int], room: int
) -> Iterator[tuple[int, int]]:
    """At the start of the n-th I or B, of the stages ``before`` it and of its own one is open.

    Of the stages ``behind`` it n + 1 are past their I, and n of its own; those whose W is not done hold, besides what W
    needs, what only a split backward holds.
    """
    left = room - problem.stages[number].offloaded_bytes  # its own bytes are back
    left -= sum(kept(problem.stages[other]) for other in before)
    for other in behind:
        stage = problem.stages[other]
        pending = stage.until_weight_gradient_bytes + stage.between_gradients_bytes
        if pending > 0:
            yield other, max(0, left // pending) + (other == number)
