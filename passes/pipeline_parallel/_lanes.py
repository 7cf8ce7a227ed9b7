"""A pipeline problem as arrays: one lane for each task of a route, on which microbatches go in order.

A rank's order is then a sequence of symbols: lane ``k`` is written ``k``, and B of the lane ``k`` that is an I is
written ``k + lanes``. Which microbatch a symbol means is counted: the next one of the route, and of a W the oldest that
had its I alone. Microbatches of a route are alike, so no better schedule has them in another order.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule
from ...compiler.pipelining.tasks import Task, tasks_of

__all__ = ["KINDS", "Floats", "Integers", "Lanes", "Records", "lanes_of", "schedule_of", "sequences_of"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Records = NDArray[Any]

#: Kinds of a lane, by the number that ``Lanes.kind`` has.
KINDS = tuple(kind for kind in ActionKind if kind is not ActionKind.BACKWARD)
UNLIMITED = 1 << 60

LANE = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("rank", "stage", "route", "kind", "first", "microbatches", "offset"),
            *("duration", "allocates", "frees", "copies"),
            *("before", "before_end", "behind", "behind_end", "half", "gradient", "whole", "useful"),
        )
    ]
)
EDGE = np.dtype([("lane", np.int64), ("lag", np.int64)])


class Lanes(NamedTuple):
    """A problem as few arrays, as compiled functions hand each of them on.

    ``lane``, by lane: its ``rank``, ``stage``, ``route`` and ``kind``; nodes from ``first`` on are its tasks, one of
    each of the route's ``microbatches``, numbered in the problem from ``offset`` on; what one takes (``duration``),
    ``allocates`` and ``frees``; whether it ``copies``. Lane k follows the ``edges`` from ``before`` to ``before_end``,
    lanes each with the ``lag`` behind its end; those from ``behind`` to ``behind_end`` follow it. ``half`` of an I is
    its W, of a W its I, else -1; ``gradient`` is the I of the stage, -1 for a shard of the vocabulary. ``whole`` is
    what B takes, by I; -1 by W, else 0. ``useful`` says of an I that B is faster than I and W, or holds less.

    ``serial[r, q]``, by rank and route, are the lanes there in an order that one microbatch alone can be done in,
    padded by -1. ``limit`` is, by rank, what is left of the memory limit beside resident bytes. ``turn`` holds the
    place of each microbatch in the order in which unfinished ones could always be finished one by one, ``by_turn`` the
    inverse: route, and number within it. ``own`` lists lanes by rank, from ``own_begin`` on. ``reduce`` is, by stage,
    what the all-reduce takes; ``stages`` lists them by rank, from ``stages_begin`` on.
    """

    lane: Records
    edges: Records
    serial: Integers
    limit: Integers
    turn: Integers
    by_turn: Integers
    own: Integers
    own_begin: Integers
    reduce: Integers
    stages: Integers
    stages_begin: Integers

    @property
    def nodes(self) -> int:
        """Tasks of all microbatches."""
        return int(self.lane["microbatches"].sum())


def lanes_of(problem: PipelineProblem) -> Lanes:
    """``problem`` as arrays; precedence and bytes are those of ``tasks_of``."""
    tasks: list[Task] = []
    bases: list[int] = []
    for route in range(len(problem.routes)):
        bases.append(len(tasks))
        tasks += tasks_of(problem, route)
    half = _halves(tasks)
    lane = np.zeros(len(tasks), LANE)
    where = {(task.route, task.stage): k for k, task in enumerate(tasks) if task.kind is ActionKind.INPUT_GRADIENT}
    starts = np.cumsum([0, *(route.microbatches for route in problem.routes)]).tolist()
    first = 0
    for k, task in enumerate(tasks):
        number = problem.routes[task.route].microbatches
        shard = task.kind in (ActionKind.OUTPUT, ActionKind.OUTPUT_GRADIENT)
        gradient = -1 if shard else where[task.route, task.stage]
        known = (task.rank, task.stage, task.route, KINDS.index(task.kind), first, number, starts[task.route])
        amounts = (task.duration_ns, task.allocates_bytes, task.frees_bytes, task.kind.copies)
        lane[k] = (*known, *amounts, 0, 0, 0, 0, half[k], gradient, _whole(problem, task), _is_useful(problem, task))
        first += number
    limits = problem.memory_limit or (UNLIMITED,) * problem.ranks
    turn, by_turn = _turns(problem)
    own = [np.flatnonzero(lane["rank"] == rank) for rank in range(problem.ranks)]
    return Lanes(
        lane=lane,
        edges=_edges(lane, tasks, bases),
        serial=_serial(problem, tasks, half),
        limit=_integers(
            min(limit - held, UNLIMITED) for limit, held in zip(limits, problem.resident_bytes, strict=True)
        ),
        turn=turn,
        by_turn=by_turn,
        own=_integers(k for lanes in own for k in lanes),
        own_begin=_integers(np.cumsum([0, *map(len, own)])),
        reduce=_integers(stage.reduce_ns for stage in problem.stages),
        stages=_integers(stage for stages in problem.stages_of for stage in stages),
        stages_begin=_integers(np.cumsum([0, *map(len, problem.stages_of)])),
    )


def _integers(values: object) -> Integers:
    return np.array(list(values), np.int64)  # type: ignore[call-overload]


def _edges(lane: Records, tasks: list[Task], bases: list[int]) -> Records:
    """The edges of all lanes; says in ``lane`` where those of each begin and end."""
    before = [[(bases[task.route] + index, lag) for index, lag in task.after] for task in tasks]
    behind: list[list[tuple[int, int]]] = [[] for _ in tasks]
    for k, pairs in enumerate(before):
        for earlier, lag in pairs:
            behind[earlier].append((k, lag))
    edges: list[tuple[int, int]] = []
    for name, lists in (("before", before), ("behind", behind)):
        for k, pairs in enumerate(lists):
            lane[k][name] = len(edges)
            edges += pairs
            lane[k][f"{name}_end"] = len(edges)
    return np.array(edges, EDGE)


def _halves(tasks: list[Task]) -> list[int]:
    where = {(task.route, task.stage, task.kind): lane for lane, task in enumerate(tasks)}
    other = {
        ActionKind.INPUT_GRADIENT: ActionKind.WEIGHT_GRADIENT,
        ActionKind.WEIGHT_GRADIENT: ActionKind.INPUT_GRADIENT,
    }
    return [where[task.route, task.stage, other[task.kind]] if task.kind in other else -1 for task in tasks]


def _whole(problem: PipelineProblem, task: Task) -> int:
    if task.kind is ActionKind.WEIGHT_GRADIENT:
        return -1
    return problem.stages[task.stage].whole_backward_ns if task.kind is ActionKind.INPUT_GRADIENT else 0


def _is_useful(problem: PipelineProblem, task: Task) -> bool:
    if task.kind is not ActionKind.INPUT_GRADIENT:
        return False
    stage = problem.stages[task.stage]
    return stage.between_gradients_bytes > 0 or stage.whole_backward_ns < (
        stage.input_gradient_ns + stage.weight_gradient_ns
    )


def _serial(problem: PipelineProblem, tasks: list[Task], half: list[int]) -> Integers:
    """W right behind its I, everything else in the order of ``tasks_of``."""
    lists: dict[tuple[int, int], list[int]] = {}
    for lane, task in enumerate(tasks):
        if task.kind is ActionKind.WEIGHT_GRADIENT:
            continue
        own = lists.setdefault((task.rank, task.route), [])
        own.append(lane)
        if half[lane] >= 0:
            own.append(half[lane])
    for key, own in lists.items():
        lists[key] = _reloads_late(tasks, own)
    width = max(map(len, lists.values()))
    table = np.full((problem.ranks, len(problem.routes), width), -1, np.int64)
    for (rank, route), own in lists.items():
        table[rank, route, : len(own)] = own
    return table


def _reloads_late(tasks: list[Task], own: list[int]) -> list[int]:
    """A copy back is as late as it can be: right before the I that needs it."""
    back = {tasks[lane].stage: lane for lane in own if tasks[lane].kind is ActionKind.RELOAD}
    order = []
    for lane in own:
        if tasks[lane].kind is ActionKind.INPUT_GRADIENT and tasks[lane].stage in back:
            order.append(back[tasks[lane].stage])
        if tasks[lane].kind is not ActionKind.RELOAD:
            order.append(lane)
    return order


def _turns(problem: PipelineProblem) -> tuple[Integers, Integers]:
    """Microbatches of several routes side by side, each route's in order."""
    places = [
        ((index + 0.5) / route.microbatches, number, index)
        for number, route in enumerate(problem.routes)
        for index in range(route.microbatches)
    ]
    turn = np.zeros(len(places), np.int64)
    turn[sorted(range(len(places)), key=places.__getitem__)] = np.arange(len(places))
    return turn, np.array([place[1:] for place in sorted(places)], np.int64)


def schedule_of(
    problem: PipelineProblem, lanes: Lanes, symbols: Integers, begin: Integers, method: str
) -> PipelineSchedule:
    """The schedule whose rank r does ``symbols[begin[r]:begin[r + 1]]``, those below 0 left out."""
    width = len(lanes.lane)
    done = [0] * width
    waiting: dict[int, deque[int]] = {}
    columns = ("stage", "kind", "half", "offset")
    stage, kinds, half, offset = (lanes.lane[name].tolist() for name in columns)
    orders = []
    for rank in range(problem.ranks):
        order = []
        for symbol in symbols[begin[rank] : begin[rank + 1]].tolist():
            if symbol < 0:
                continue
            lane = symbol % width
            kind = KINDS[kinds[lane]]
            if kind is ActionKind.WEIGHT_GRADIENT:
                index = waiting[lane].popleft()
            else:
                index = done[lane]
                done[lane] += 1
            if symbol >= width:
                kind = ActionKind.BACKWARD
            elif kind is ActionKind.INPUT_GRADIENT:
                waiting.setdefault(half[lane], deque()).append(index)
            order.append(Action(stage[lane], kind, offset[lane] + index))
        orders.append(tuple(order))
    return PipelineSchedule(problem, tuple(orders), method)


def sequences_of(lanes: Lanes, schedule: PipelineSchedule) -> tuple[Integers, Integers]:
    """``symbols`` and ``begin`` of a schedule, with a place for each task: behind B is one for nothing, -1.

    Microbatches of a route get the order in which lanes come.
    """
    width = len(lanes.lane)
    lane_of = {(line["route"], line["stage"], KINDS[line["kind"]]): k for k, line in enumerate(lanes.lane)}
    routes = schedule.problem.route_of
    symbols = []
    begin = [0]
    for order in schedule.orders:
        for action in order:
            whole = action.kind is ActionKind.BACKWARD
            kind = ActionKind.INPUT_GRADIENT if whole else action.kind
            symbols.append(lane_of[routes[action.microbatch], action.stage, kind] + (width if whole else 0))
            symbols += [-1] * whole
        begin.append(len(symbols))
    return _integers(symbols), _integers(begin)
