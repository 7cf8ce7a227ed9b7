"""A schedule as a plan: operators that run, collectives that are started and waited for, with engines and times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from ...compiler.graph import Graph
from ...compiler.pipeline import confirm
from ...compiler.plan import Certificate, CollectiveStart, CollectiveWait, Instruction, PassRecord, Plan, Run
from ...hw_models.model import HardwareModel
from .problem import Schedule
from .task_graph import TaskGraph, task_graph

__all__ = ["issue_order", "to_plan"]

NAME = "overlap/choice"


def to_plan(graph: Graph, machine: HardwareModel, schedule: Schedule, *, seconds: float = 0.0, note: str = "") -> Plan:
    """The plan of ``schedule``, whose problem was made of ``graph`` and ``machine``; verified.

    Its graph has an operator for each task (`task_graph`). A collective is waited for right before the first operator
    that needs it, or must wait for it; one that none needs at the end. ``seconds`` is what deciding took.

    Raises:
        InternalError: the plan does not verify.
    """
    made = task_graph(graph, machine, schedule.problem, schedule.modes)
    plan = Plan(made.graph, machine, tuple(_instructions(schedule, made)))
    value = math.ceil(max((i.finish_s or 0.0 for i in plan.instructions), default=0.0) * 1e9)
    bound = min(value, math.floor(schedule.bound_s * 1e9))
    proved_by: Literal["cp", "analytic"] = "cp" if schedule.proved_by == "cp" else "analytic"
    certificate = Certificate("latency_ns", value, bound, proved_by, "order") if plan.instructions else None
    confirm(NAME, plan, None)
    return plan.with_record(PassRecord(NAME, seconds, certificate, note))


def _instructions(schedule: Schedule, made: TaskGraph) -> Iterator[Instruction]:
    tasks = schedule.problem.tasks
    flying: dict[str, int] = {}  # operators that were started and not waited for, and their tasks
    for index, waited in _with_waits(schedule, made):
        for name in waited:
            moment = schedule.finish_s[flying.pop(name)]
            yield CollectiveWait(name, "", moment, moment)
        task = tasks[index]
        span = (schedule.start_s[index], schedule.finish_s[index])
        if task.collective is None:
            yield Run(task.name, task.lane, *span)
        else:
            flying[task.name] = index
            yield CollectiveStart(task.name, task.lane, *span, mode=task.modes[schedule.modes[index]].name)
    for name, index in flying.items():
        yield CollectiveWait(name, "", schedule.finish_s[index], schedule.finish_s[index])


def _with_waits(schedule: Schedule, made: TaskGraph) -> Iterator[tuple[int, Sequence[str]]]:
    """Each task that is an operator, in the order of issue, with the collectives that must be waited for before it."""
    tasks, index_of = schedule.problem.tasks, {task.name: index for index, task in enumerate(schedule.problem.tasks)}
    more: dict[int, list[int]] = {}
    for first, then in schedule.waits:
        more.setdefault(index_of[made.operator[then]], []).append(first)
    needed: dict[int, list[int]] = {}
    for index, task in enumerate(tasks):
        needed.setdefault(index_of[made.operator[index]], []).extend(task.before)
    flying: set[str] = set()
    for index in schedule.order:
        if made.operator[index] != tasks[index].name:
            continue  # part of a collective
        names = dict.fromkeys(made.operator[other] for other in (*needed[index], *more.get(index, ())))
        waited = [name for name in names if name in flying]
        flying.difference_update(waited)
        yield index, waited
        if tasks[index].collective is not None:
            flying.add(tasks[index].name)


def issue_order(plan: Plan, schedule: Schedule, waits: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The operators of the graph, and ``waits`` of its collectives, in the order in which ``plan`` issues them.

    ``waits`` names, by collective, the calls of the module that wait for it. What a collective's mode absorbs comes
    right behind them.
    """
    tasks = schedule.problem.tasks
    ops = {task.name: task.ops for task in tasks}
    absorbed = {
        task.name: [op for other in task.modes[mode].absorbs for op in tasks[other].ops]
        for task, mode in zip(tasks, schedule.modes, strict=True)
    }
    order: list[str] = []
    for instruction in plan.instructions:
        if isinstance(instruction, CollectiveWait):
            order += [*waits.get(instruction.op, ()), *absorbed[instruction.op]]
        elif isinstance(instruction, Run | CollectiveStart):
            order += ops[instruction.op]
    return tuple(order)
