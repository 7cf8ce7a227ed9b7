"""The judge of orders of symbols, compiled by numba: starts and finishes, objective, and bytes above the limit.

Says what ``compiler.pipelining.simulate`` says; of copies out it counts the bytes until something waits for them, so
that without a limit its peaks are higher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._bare import STAMP, bare
from ._lanes import Integers, Lanes, Records

__all__ = ["STUCK", "Room", "clear", "commit", "index_of", "make_room", "objective_of", "play", "room_at", "room_for"]

STUCK = 1 << 61

BY_NODE = np.dtype([("finish", np.int64), ("queue", np.int64)])
BY_LANE = np.dtype([(name, np.int64) for name in ("done", "taken", "queued", STAMP)])
BY_RANK = np.dtype(
    [
        (name, np.int64)
        for name in ("place", "free", "copying", "held", "peak", "started", "first", "last", "leaves", "left")
    ]
)
LEAVING = np.dtype([("finish", np.int64), ("size", np.int64)])


class Room(NamedTuple):
    """Where ``play`` works and leaves what it found, sized once for a problem.

    ``node``: ``finish``, -1 while it is not done, and the ``queue`` of microbatches whose W is to come, of which by
    ``lane`` ``taken`` and ``queued`` are counted, beside those ``done``. ``rank``: the next ``place`` in its order,
    when compute and copies are ``free`` and ``copying``, bytes ``held`` and their ``peak``, whether it has ``started``,
    ``first`` start and ``last`` finish, and which of ``leaving``, the copies out, still count, from ``leaves`` up to
    ``left``. ``start`` is by place in the orders; ``reduced`` by stage when its last W is done, -1 if it has none.
    """

    node: Records
    lane: Records
    rank: Records
    leaving: Records
    start: Integers
    reduced: Integers


def room_for(lanes: Lanes) -> Room:
    """Room for the problem."""
    copies = int(lanes.lane["microbatches"][lanes.lane["copies"] > 0].sum()) + 1
    return Room(
        node=np.zeros(lanes.nodes, BY_NODE),
        lane=np.zeros(len(lanes.lane), BY_LANE),
        rank=np.zeros(len(lanes.limit), BY_RANK),
        leaving=np.zeros((len(lanes.limit), copies), LEAVING),
        start=np.zeros(lanes.nodes, np.int64),
        reduced=np.zeros(len(lanes.reduce), np.int64),
    )


@bare
def clear(room: Room) -> None:
    """Before the first action."""
    for k in range(len(room.node)):
        room.node[k].finish = -1
    for k in range(len(room.lane)):
        lane = room.lane[k]
        lane.done, lane.taken, lane.queued = 0, 0, 0
    for k in range(len(room.rank)):
        rank = room.rank[k]
        rank.place, rank.free, rank.copying, rank.held, rank.peak = 0, 0, 0, 0, 0
        rank.started, rank.first, rank.last, rank.leaves, rank.left = 0, 0, 0, 0, 0
    room.reduced[:] = -1


@bare
def room_at(lanes: Lanes, room: Room, lane: int, limit: int) -> Any:
    """When copies out will have made room on a rank for a task of ``lane``; -1 if there will be none.

    A copy back needs no wait: the copies out before it are done when it starts.
    """
    needed = lanes.lane[lane].allocates
    if needed == 0:
        return 0
    number = lanes.lane[lane].rank
    rank = room.rank[number]
    held, moment = rank.held + needed, 0
    for k in range(rank.leaves, rank.left):
        if held <= limit:
            break
        held -= room.leaving[number, k].size
        moment = room.leaving[number, k].finish
    if held > limit:
        return -1
    return 0 if lanes.lane[lane].copies else moment


@bare
def make_room(lanes: Lanes, room: Room, lane: int, limit: int) -> None:
    """Count as free what a task of ``lane`` has waited for, according to ``room_at``."""
    needed = lanes.lane[lane].allocates
    if needed == 0 or lanes.lane[lane].copies:
        return
    number = lanes.lane[lane].rank
    rank = room.rank[number]
    while rank.leaves < rank.left and rank.held + needed > limit:
        rank.held -= room.leaving[number, rank.leaves].size
        rank.leaves += 1


@bare
def ready_at(lanes: Lanes, room: Room, lane: int, index: int, skipped: int) -> Any:
    """When all is there that task ``index`` of ``lane`` follows, leaving lane ``skipped`` out; -1 if it is not."""
    earliest = 0
    for k in range(lanes.lane[lane].before, lanes.lane[lane].before_end):
        before = lanes.edges[k].lane
        if before == skipped:
            continue
        finish = room.node[lanes.lane[before].first + index].finish
        if finish < 0:
            return -1
        earliest = max(earliest, finish + lanes.edges[k].lag)
    return earliest


@bare
def index_of(lanes: Lanes, room: Room, lane: int) -> Any:
    """The microbatch, within its route, that the next action of ``lane`` means; -1 if there is none yet."""
    state = room.lane[lane]
    if lanes.lane[lane].whole < 0:
        return room.node[lanes.lane[lane].first + state.taken].queue if state.taken < state.queued else -1
    return state.done if state.done < lanes.lane[lane].microbatches else -1


@bare
def _hold(lanes: Lanes, room: Room, symbol: int, finish: int) -> None:
    """Count the bytes of an action that has been placed."""
    width = len(lanes.lane)
    lane = lanes.lane[symbol % width]
    rank = room.rank[lane.rank]
    if symbol >= width:
        rank.held += lane.allocates - lane.frees - lanes.lane[lane.half].frees
        return
    rank.held += lane.allocates
    if not lane.copies:
        if lane.allocates > 0:
            rank.peak = max(rank.peak, rank.held)
        rank.held -= lane.frees
        return
    gone = 0
    for k in range(rank.leaves, rank.left):
        gone += room.leaving[lane.rank, k].size
    if lane.allocates > 0:
        rank.peak = max(rank.peak, rank.held - gone)
    if lane.frees > 0:
        leaving = room.leaving[lane.rank, rank.left]
        leaving.finish, leaving.size = finish, lane.frees
        rank.left += 1


@bare
def commit(lanes: Lanes, room: Room, symbol: int, index: int, start: int) -> Any:
    """Do ``symbol`` for microbatch ``index`` from ``start`` on; returns its finish."""
    width = len(lanes.lane)
    number = symbol % width
    lane = lanes.lane[number]
    finish = start + (lane.whole if symbol >= width else lane.duration)
    room.node[lane.first + index].finish = finish
    _hold(lanes, room, symbol, finish)
    ends = lane.whole < 0  # a W
    if ends:
        room.lane[number].taken += 1
    else:
        room.lane[number].done += 1
    if symbol >= width:
        room.node[lanes.lane[lane.half].first + index].finish = finish
        ends = True
    elif lane.half >= 0 and not ends:
        room.node[lanes.lane[lane.half].first + room.lane[lane.half].queued].queue = index
        room.lane[lane.half].queued += 1
    rank = room.rank[lane.rank]
    if lane.copies:
        rank.copying = finish
    else:
        rank.free = finish
    rank.first = min(rank.first, start) if rank.started else start
    rank.started = 1
    rank.last = max(rank.last, finish)
    if ends:
        room.reduced[lane.stage] = max(room.reduced[lane.stage], finish)
    return finish


@bare
def _reduced(lanes: Lanes, room: Room, rank: int) -> Any:
    """When a rank's gradients are reduced: one stage at a time, the one that is ready first first."""
    free, before = 0, -1
    begin, end = lanes.stages_begin[rank], lanes.stages_begin[rank + 1]
    for _ in range(begin, end):
        chosen = -1
        for k in range(begin, end):
            stage = lanes.stages[k]
            ready = room.reduced[stage]
            later = before < 0 or ready > room.reduced[before] or (ready == room.reduced[before] and stage > before)
            if later and (chosen < 0 or ready < room.reduced[chosen]):
                chosen = stage
        if lanes.reduce[chosen] > 0 and room.reduced[chosen] >= 0:
            free = max(free, room.reduced[chosen]) + lanes.reduce[chosen]
        before = chosen
    return free


@bare
def objective_of(lanes: Lanes, room: Room, span: bool) -> Any:
    """Makespan or span, gradients reduced."""
    worst = 0
    for rank in range(len(lanes.limit)):
        last = max(room.rank[rank].last, _reduced(lanes, room, rank))
        worst = max(worst, last - room.rank[rank].first if span else last)
    return worst


@bare
def _next_start(lanes: Lanes, room: Room, symbol: int, index: int) -> Any:
    """When ``symbol`` starts for microbatch ``index``; -1 if that is not known yet."""
    width = len(lanes.lane)
    number = symbol % width
    lane = lanes.lane[number]
    start = ready_at(lanes, room, number, index, -1)
    if start >= 0 and symbol >= width:
        other = ready_at(lanes, room, lane.half, index, number)
        start = max(start, other) if other >= 0 else -1
    if start < 0:
        return -1
    rank = room.rank[lane.rank]
    start = max(start, rank.free)
    if lane.copies:
        start = max(start, rank.copying)
    if rank.leaves < rank.left and symbol < width:
        start = max(start, room_at(lanes, room, number, lanes.limit[lane.rank]))
        make_room(lanes, room, number, lanes.limit[lane.rank])
    return start


@bare
def play(lanes: Lanes, room: Room, symbols: Integers, begin: Integers) -> Any:
    """Do the orders as early as can be, places for nothing (-1) left out.

    Returns the most bytes above a limit, 0 or less if all keep it, or ``STUCK``.
    """
    clear(room)
    ranks = len(lanes.limit)
    done = 0
    for rank in range(ranks):
        room.rank[rank].place = begin[rank]
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            place = room.rank[rank].place
            while place < begin[rank + 1]:
                symbol = symbols[place]
                if symbol < 0:  # a place for nothing
                    place += 1
                    done += 1
                    continue
                index = index_of(lanes, room, symbol % len(lanes.lane))
                start = -1 if index < 0 else _next_start(lanes, room, symbol, index)
                if start < 0:
                    break
                commit(lanes, room, symbol, index, start)
                room.start[place] = start
                place += 1
                done += 1
                moved = True
            room.rank[rank].place = place
    above = -STUCK
    for rank in range(ranks):
        above = max(above, room.rank[rank].peak - lanes.limit[rank])
    return above if done == begin[ranks] else STUCK
