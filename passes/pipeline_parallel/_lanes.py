"""A pipeline problem as arrays: one lane for each task of a route, on which microbatches go in order.

A rank's order is then a sequence of symbols: lane ``k`` is written ``k``, and B of the lane ``k`` that is an I is
written ``k + lanes``. Which microbatch a symbol means is counted: the next one of the route, and of a W the oldest that
had its I alone. Microbatches of a route are alike, so no better schedule has them in another order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...compiler.pipelining.problem import PipelineProblem
from ...compiler.pipelining.schedule import Action, ActionKind, PipelineSchedule
from ...compiler.pipelining.tasks import Task, tasks_of

__all__ = ["KINDS", "Booleans", "Floats", "Integers", "Lanes", "lanes_of", "schedule_of", "sequences_of"]

Booleans = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Kinds of a lane, by the number that ``Lanes.kind`` has.
KINDS = tuple(kind for kind in ActionKind if kind is not ActionKind.BACKWARD)
UNLIMITED = 1 << 60


class Lanes(NamedTuple):
    """By lane: its ``rank``, ``stage``, ``route`` and ``kind``; nodes from ``first`` on are its tasks, one of each of
    the route's ``microbatches``; what one takes, ``allocates`` and ``frees``; and whether it ``copies``.

    Lane k follows ``before[before_begin[k]:before_begin[k + 1]]``, each ``lag`` later; ``behind`` is the inverse.
    ``half`` of an I is its W, of a W its I, else -1. ``whole`` is what B takes, by I; -1 by W, else 0. ``useful`` says
    of an I that B is faster than I and W, or holds less. ``serial[r, q]``, by rank and route, are the lanes there in
    an order that one microbatch alone can be done in, padded by -1.

    By rank: ``limit`` is what is left of the memory limit beside resident bytes. ``turn`` holds the number of each
    microbatch in the order in which unfinished ones could always be finished one by one, ``offset`` the first
    microbatch of each route. ``reduce`` is, by stage, what the all-reduce takes.
    """

    rank: Integers
    stage: Integers
    route: Integers
    kind: Integers
    first: Integers
    microbatches: Integers
    duration: Integers
    allocates: Integers
    frees: Integers
    copies: Booleans
    before_begin: Integers
    before: Integers
    lag: Integers
    behind_begin: Integers
    behind: Integers
    behind_lag: Integers
    half: Integers
    whole: Integers
    useful: Booleans
    serial: Integers
    limit: Integers
    turn: Integers
    offset: Integers
    reduce: Integers

    @property
    def nodes(self) -> int:
        """Tasks of all microbatches."""
        return int(self.microbatches.sum())


def lanes_of(problem: PipelineProblem) -> Lanes:
    """``problem`` as arrays; precedence and bytes are those of ``tasks_of``."""
    tasks: list[Task] = []
    bases: list[int] = []
    for route in range(len(problem.routes)):
        bases.append(len(tasks))
        tasks += tasks_of(problem, route)
    count = [problem.routes[task.route].microbatches for task in tasks]
    before = [[(bases[task.route] + index, lag) for index, lag in task.after] for task in tasks]
    behind: list[list[tuple[int, int]]] = [[] for _ in tasks]
    for lane, pairs in enumerate(before):
        for earlier, lag in pairs:
            behind[earlier].append((lane, lag))
    half = _halves(tasks)
    resident = problem.resident_bytes
    limits = problem.memory_limit or (UNLIMITED,) * problem.ranks
    return Lanes(
        rank=_integers(task.rank for task in tasks),
        stage=_integers(task.stage for task in tasks),
        route=_integers(task.route for task in tasks),
        kind=_integers(KINDS.index(task.kind) for task in tasks),
        first=_integers(np.concatenate([[0], np.cumsum(count)[:-1]])),
        microbatches=_integers(count),
        duration=_integers(task.duration_ns for task in tasks),
        allocates=_integers(task.allocates_bytes for task in tasks),
        frees=_integers(task.frees_bytes for task in tasks),
        copies=np.array([task.kind.copies for task in tasks], np.bool_),
        **_edges("before", "lag", before),
        **_edges("behind", "behind_lag", behind),
        half=_integers(half),
        whole=_integers(_whole(problem, task) for task in tasks),
        useful=np.array([_is_useful(problem, task) for task in tasks], np.bool_),
        serial=_serial(problem, tasks, half),
        limit=_integers(min(limit - held, UNLIMITED) for limit, held in zip(limits, resident, strict=True)),
        turn=_turns(problem),
        offset=_integers(np.cumsum([0, *(route.microbatches for route in problem.routes)])),
        reduce=_integers(stage.reduce_ns for stage in problem.stages),
    )


def _integers(values: object) -> Integers:
    return np.array(list(values), np.int64)  # type: ignore[call-overload]


def _edges(name: str, lag: str, edges: list[list[tuple[int, int]]]) -> dict[str, Integers]:
    flat = [pair for pairs in edges for pair in pairs]
    return {
        f"{name}_begin": _integers(np.cumsum([0, *map(len, edges)])),
        name: _integers(lane for lane, _ in flat),
        lag: _integers(lag for _, lag in flat),
    }


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


def _turns(problem: PipelineProblem) -> Integers:
    """Microbatches of several routes side by side, each route's in order."""
    places = [
        ((index + 0.5) / route.microbatches, number)
        for number, route in enumerate(problem.routes)
        for index in range(route.microbatches)
    ]
    turn = np.zeros(len(places), np.int64)
    turn[sorted(range(len(places)), key=places.__getitem__)] = np.arange(len(places))
    return turn


def schedule_of(
    problem: PipelineProblem, lanes: Lanes, symbols: Integers, begin: Integers, method: str
) -> PipelineSchedule:
    """The schedule whose rank r does ``symbols[begin[r]:begin[r + 1]]``."""
    width = len(lanes.rank)
    done = [0] * width
    waiting: dict[int, list[int]] = {}
    orders = []
    for rank in range(problem.ranks):
        order = []
        for symbol in symbols[begin[rank] : begin[rank + 1]].tolist():
            lane = symbol % width
            kind = KINDS[lanes.kind[lane]]
            if kind is ActionKind.WEIGHT_GRADIENT:
                index = waiting[lane].pop(0)
            else:
                index = done[lane]
                done[lane] += 1
            if symbol >= width:
                kind = ActionKind.BACKWARD
            elif kind is ActionKind.INPUT_GRADIENT:
                waiting.setdefault(int(lanes.half[lane]), []).append(index)
            order.append(Action(int(lanes.stage[lane]), kind, int(lanes.offset[lanes.route[lane]]) + index))
        orders.append(tuple(order))
    return PipelineSchedule(problem, tuple(orders), method)


def sequences_of(lanes: Lanes, schedule: PipelineSchedule) -> tuple[Integers, Integers]:
    """``symbols`` and ``begin`` of a schedule; microbatches of a route get the order in which lanes come."""
    width = len(lanes.rank)
    lane_of = {(int(lanes.route[lane]), int(lanes.stage[lane]), KINDS[lanes.kind[lane]]): lane for lane in range(width)}
    routes = schedule.problem.route_of
    symbols = []
    begin = [0]
    for order in schedule.orders:
        for action in order:
            whole = action.kind is ActionKind.BACKWARD
            kind = ActionKind.INPUT_GRADIENT if whole else action.kind
            symbols.append(lane_of[routes[action.microbatch], action.stage, kind] + (width if whole else 0))
        begin.append(len(symbols))
    return _integers(symbols), _integers(begin)
