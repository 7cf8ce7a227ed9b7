"""The judge of orders of symbols, compiled by numba: starts and finishes, objective, and bytes above the limit.

Says what ``compiler.pipelining.simulate`` says; of copies out it counts the bytes until something waits for them, so
that without a limit its peaks are higher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._compiled import compiled
from ._lanes import Integers, Lanes

__all__ = ["Room", "STUCK", "Stages", "objective_of", "play", "room_for"]

STUCK = 1 << 61


class Stages(NamedTuple):
    """``stages`` of rank r are those from ``begin[r]`` to ``begin[r + 1]``."""

    stages: Integers
    begin: Integers


class Room(NamedTuple):
    """Where ``play`` works and leaves what it found, sized once for a problem.

    By node: ``finish``, -1 while it is not done; by lane: microbatches ``done``, the W to come (``queue``, by node, of
    which ``taken`` and ``queued`` are counted by lane). By rank: the next ``place``, when compute and copies are
    ``free`` and ``copying``, bytes ``held``, ``first`` start and ``last`` finish. ``start`` is by place in the orders.
    """

    finish: Integers
    done: Integers
    queue: Integers
    taken: Integers
    queued: Integers
    place: Integers
    free: Integers
    copying: Integers
    held: Integers
    peak: Integers
    first: Integers
    last: Integers
    start: Integers
    leaving: Integers
    leaving_bytes: Integers
    leaving_range: Integers
    reduced: Integers


def room_for(lanes: Lanes) -> Room:
    """Room for the problem."""
    ranks, width, nodes = len(lanes.limit), len(lanes.rank), lanes.nodes
    copies = int(lanes.microbatches[lanes.copies].sum()) + 1

    def zeros(*shape: int) -> Integers:
        return np.zeros(shape, np.int64)

    return Room(
        finish=zeros(nodes),
        done=zeros(width),
        queue=zeros(nodes),
        taken=zeros(width),
        queued=zeros(width),
        place=zeros(ranks),
        free=zeros(ranks),
        copying=zeros(ranks),
        held=zeros(ranks),
        peak=zeros(ranks),
        first=zeros(ranks),
        last=zeros(ranks),
        start=zeros(nodes),
        leaving=zeros(ranks, copies),
        leaving_bytes=zeros(ranks, copies),
        leaving_range=zeros(ranks, 2),
        reduced=zeros(len(lanes.reduce)),
    )


@compiled
def clear(room: Room) -> None:
    """Before the first action."""
    room.finish[:] = -1
    room.done[:] = 0
    room.taken[:] = 0
    room.queued[:] = 0
    room.place[:] = 0
    room.free[:] = 0
    room.copying[:] = 0
    room.held[:] = 0
    room.peak[:] = 0
    room.first[:] = -1
    room.last[:] = 0
    room.leaving_range[:] = 0
    room.reduced[:] = 0


@compiled
def room_at(lanes: Lanes, room: Room, lane: int, limit: int) -> Any:
    """When copies out will have made room on a rank for a task of ``lane``; -1 if there will be none.

    A copy back needs no wait: the copies out before it are done when it starts.
    """
    rank, needed = lanes.rank[lane], lanes.allocates[lane]
    if needed == 0:
        return 0
    held = room.held[rank] + needed
    moment = 0
    for k in range(room.leaving_range[rank, 0], room.leaving_range[rank, 1]):
        if held <= limit:
            break
        held -= room.leaving_bytes[rank, k]
        moment = room.leaving[rank, k]
    if held > limit:
        return -1
    return 0 if lanes.copies[lane] else moment


@compiled
def make_room(lanes: Lanes, room: Room, lane: int, limit: int) -> None:
    """Count as free what a task of ``lane`` has waited for, according to ``room_at``."""
    rank, needed = lanes.rank[lane], lanes.allocates[lane]
    if needed == 0 or lanes.copies[lane]:
        return
    head, tail = room.leaving_range[rank, 0], room.leaving_range[rank, 1]
    while head < tail and room.held[rank] + needed > limit:
        room.held[rank] -= room.leaving_bytes[rank, head]
        head += 1
    room.leaving_range[rank, 0] = head


@compiled
def ready_at(lanes: Lanes, room: Room, lane: int, index: int, skipped: int) -> Any:
    """When all is there that task ``index`` of ``lane`` follows, leaving lane ``skipped`` out; -1 if it is not."""
    earliest = 0
    for k in range(lanes.before_begin[lane], lanes.before_begin[lane + 1]):
        if lanes.before[k] == skipped:
            continue
        finish = room.finish[lanes.first[lanes.before[k]] + index]
        if finish < 0:
            return -1
        earliest = max(earliest, finish + lanes.lag[k])
    return earliest


@compiled
def index_of(lanes: Lanes, room: Room, lane: int) -> Any:
    """The microbatch, within its route, that the next action of ``lane`` means; -1 if there is none yet."""
    if lanes.half[lane] >= 0 and lanes.whole[lane] < 0:
        if room.taken[lane] >= room.queued[lane]:
            return -1
        return room.queue[lanes.first[lane] + room.taken[lane]]
    return room.done[lane] if room.done[lane] < lanes.microbatches[lane] else -1


@compiled
def _hold(lanes: Lanes, room: Room, symbol: int, finish: int) -> None:
    """Count the bytes of an action that has been placed."""
    width = len(lanes.rank)
    lane = symbol % width
    rank = lanes.rank[lane]
    if symbol >= width:
        room.held[rank] += lanes.allocates[lane] - lanes.frees[lane] - lanes.frees[lanes.half[lane]]
        return
    gone = 0
    tail = room.leaving_range[rank, 1]
    if lanes.copies[lane]:
        for k in range(room.leaving_range[rank, 0], tail):
            gone += room.leaving_bytes[rank, k]
    room.held[rank] += lanes.allocates[lane]
    if lanes.allocates[lane] > 0:
        room.peak[rank] = max(room.peak[rank], room.held[rank] - gone)
    if not lanes.copies[lane]:
        room.held[rank] -= lanes.frees[lane]
    elif lanes.frees[lane] > 0:
        room.leaving[rank, tail], room.leaving_bytes[rank, tail] = finish, lanes.frees[lane]
        room.leaving_range[rank, 1] = tail + 1


@compiled
def commit(lanes: Lanes, room: Room, symbol: int, index: int, start: int) -> Any:
    """Do ``symbol`` for microbatch ``index`` from ``start`` on; returns its finish."""
    width = len(lanes.rank)
    lane = symbol % width
    rank, half = lanes.rank[lane], lanes.half[lane]
    finish = start + (lanes.whole[lane] if symbol >= width else lanes.duration[lane])
    room.finish[lanes.first[lane] + index] = finish
    _hold(lanes, room, symbol, finish)
    ends = lanes.whole[lane] < 0  # a W
    if ends:
        room.taken[lane] += 1
    else:
        room.done[lane] += 1
    if symbol >= width:
        room.finish[lanes.first[half] + index] = finish
        ends = True
    elif half >= 0 and not ends:
        room.queue[lanes.first[half] + room.queued[half]] = index
        room.queued[half] += 1
    if lanes.copies[lane]:
        room.copying[rank] = finish
    else:
        room.free[rank] = finish
    room.first[rank] = start if room.first[rank] < 0 else min(room.first[rank], start)
    room.last[rank] = max(room.last[rank], finish)
    if ends:
        room.reduced[lanes.stage[lane]] = max(room.reduced[lanes.stage[lane]], finish)
    return finish


@compiled
def _reduced(lanes: Lanes, room: Room, desk: Stages, rank: int) -> Any:
    """When a rank's gradients are reduced: one stage at a time, the one that is ready first first."""
    free, before = 0, -1
    for _ in range(desk.begin[rank], desk.begin[rank + 1]):
        chosen = -1
        for k in range(desk.begin[rank], desk.begin[rank + 1]):
            stage = desk.stages[k]
            ready = room.reduced[stage]
            later = before < 0 or ready > room.reduced[before] or (ready == room.reduced[before] and stage > before)
            if later and (chosen < 0 or ready < room.reduced[chosen]):
                chosen = stage
        if lanes.reduce[chosen] > 0 and room.reduced[chosen] > 0:
            free = max(free, room.reduced[chosen]) + lanes.reduce[chosen]
        before = chosen
    return free


@compiled
def objective_of(lanes: Lanes, room: Room, stages: Stages, span: bool) -> Any:
    """Makespan or span, gradients reduced."""
    worst = 0
    for rank in range(len(lanes.limit)):
        last = max(room.last[rank], _reduced(lanes, room, stages, rank))
        worst = max(worst, last - room.first[rank] if span and room.first[rank] >= 0 else last)
    return worst


@compiled
def _next_start(lanes: Lanes, room: Room, symbol: int, index: int) -> Any:
    """When ``symbol`` starts for microbatch ``index``; -1 if that is not known yet."""
    width = len(lanes.rank)
    lane = symbol % width
    rank = lanes.rank[lane]
    start = ready_at(lanes, room, lane, index, -1)
    if start >= 0 and symbol >= width:
        other = ready_at(lanes, room, lanes.half[lane], index, lane)
        start = max(start, other) if other >= 0 else -1
    if start < 0:
        return -1
    start = max(start, room.free[rank])
    if lanes.copies[lane]:
        start = max(start, room.copying[rank])
    if symbol < width and lanes.allocates[lane] > 0:
        start = max(start, room_at(lanes, room, lane, lanes.limit[rank]))
        make_room(lanes, room, lane, lanes.limit[rank])
    return start


@compiled
def play(lanes: Lanes, room: Room, symbols: Integers, begin: Integers) -> Any:
    """Do the orders as early as can be; the most bytes above a limit, 0 or less if all keep it, or ``STUCK``."""
    clear(room)
    ranks = len(lanes.limit)
    done = 0
    room.place[:] = begin[:ranks]
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while room.place[rank] < begin[rank + 1]:
                symbol = symbols[room.place[rank]]
                index = index_of(lanes, room, symbol % len(lanes.rank))
                start = -1 if index < 0 else _next_start(lanes, room, symbol, index)
                if start < 0:
                    break
                commit(lanes, room, symbol, index, start)
                room.start[room.place[rank]] = start
                room.place[rank] += 1
                done += 1
                moved = True
    return np.max(room.peak - lanes.limit) if done == begin[ranks] else STUCK
