"""Copies to the host and back put into a schedule that has none: out at once, back just in time."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict

import msgspec

from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule, TimedSchedule

__all__ = ["away", "with_copies", "without_copies"]


def without_copies(problem: PipelineProblem) -> PipelineProblem:
    """``problem``, nothing of which is offloaded."""
    stages = tuple(
        msgspec.structs.replace(stage, offloaded_bytes=0, offload_ns=0, reload_ns=0) for stage in problem.stages
    )
    return msgspec.structs.replace(problem, stages=stages)


def away(problem: PipelineProblem, parts: int = 1) -> PipelineProblem:
    """``problem`` in which a ``parts``-th of what could be offloaded is not held at all, and nothing copied.

    A schedule of ``problem``, whichever stages offload, is one of the problem with all away when its copies are left
    out, and holds no more: a bound of that problem is one of every choice.
    """
    stages = tuple(
        msgspec.structs.replace(
            stage,
            until_weight_gradient_bytes=stage.until_weight_gradient_bytes - stage.offloaded_bytes // parts,
            offloaded_bytes=0,
            offload_ns=0,
            reload_ns=0,
        )
        for stage in problem.stages
    )
    return msgspec.structs.replace(problem, stages=stages)


def with_copies(line: TimedSchedule, problem: PipelineProblem, slack_ns: int = 0) -> PipelineSchedule:
    """The schedule of ``problem`` with ``line``'s computing actions, ``problem``'s copies put in.

    A copy out is issued behind its F. A copy back is issued as late as lets it end ``slack_ns`` before its I starts in
    ``line``, copies back being done one after the other; copies out that are in its way may still make it late.
    """
    orders = tuple(
        _with_copies(problem, order, starts, finishes, slack_ns)
        for order, starts, finishes in zip(line.schedule.orders, line.starts, line.finishes, strict=True)
    )
    return PipelineSchedule(problem, orders, f"{line.schedule.method} with copies")


def _with_copies(
    problem: PipelineProblem,
    order: tuple[Action, ...],
    starts: tuple[int, ...],
    finishes: tuple[int, ...],
    slack_ns: int,
) -> tuple[Action, ...]:
    place_of = {action: place for place, action in enumerate(order)}
    issued: dict[int, list[Action]] = defaultdict(list)  # before the action at a place
    latest: int | None = None
    for place in reversed(range(len(order))):
        action = order[place]
        if action.kind not in (ActionKind.INPUT_GRADIENT, ActionKind.BACKWARD):
            continue
        stage = problem.stages[action.stage]
        if not stage.offloaded_bytes:
            continue
        deadline = starts[place] - slack_ns
        latest = min(deadline, deadline if latest is None else latest) - stage.reload_ns
        forward = place_of[Action(action.stage, ActionKind.FORWARD, action.microbatch)]
        # Issued when the actions before its place are done; behind its F at least, before its I at most.
        behind = min(max(bisect_right(finishes, latest), forward + 1), place)
        issued[behind].append(Action(action.stage, ActionKind.RELOAD, action.microbatch))
    made: list[Action] = []
    for place, action in enumerate(order):
        made += reversed(issued[place])
        made.append(action)
        if action.kind is ActionKind.FORWARD and problem.stages[action.stage].offloaded_bytes:
            made.append(Action(action.stage, ActionKind.OFFLOAD, action.microbatch))
    return tuple(made)
