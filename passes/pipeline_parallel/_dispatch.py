"""List scheduling of a pipeline, compiled by numba: the rank that can start first does the best of what it can start.

It never deadlocks. Unfinished microbatches could be finished one by one, in the order of ``Lanes.turn``: before each
action that allocates the rank checks that this stays so on it, by what each of them holds and still needs to be
finished alone (the banker's algorithm of Dijkstra, EWD 108, in which microbatches borrow bytes). Each rank may look at
itself alone, as all of them keep to one order. What a copy to the host frees can be waited for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...compiler.pipelining.schedule import ActionKind
from .._compiled import compiled
from ._lanes import KINDS, Booleans, Floats, Integers, Lanes
from ._play import Room, clear, commit, index_of, make_room, room_at

__all__ = ["Desk", "Rules", "desk_for", "dispatch"]

SPLIT, WHOLE, EITHER = 0, 1, 2
_SHARDS = (KINDS.index(ActionKind.OUTPUT), KINDS.index(ActionKind.OUTPUT_GRADIENT))
NONE = -1
FAR = 1 << 62


class Rules(NamedTuple):
    """What decides among actions that can start.

    The least ``priority``, by node, goes first, ties to the one that can start earlier. A rank waits for an action of
    lane k for up to ``patience[k]`` beyond what it could start with. Lane k of kind F runs at most ``ahead[k]``
    microbatches ahead of its I. ``limit`` is by rank, as ``Lanes.limit`` or less. ``mode`` says by node of an I:
    0 split, 1 whole, 2 split if its bytes fit and whole otherwise. A reload may come ``early[k]`` microbatches before
    its I at most.
    """

    priority: Floats
    patience: Integers
    ahead: Integers
    limit: Integers
    mode: Integers
    early: Integers


class Desk(NamedTuple):
    """Where ``dispatch`` works. By node: predecessors that it is ``waiting`` for, and ``ready``. By rank and turn:
    bytes ``own`` of a microbatch, the most that it ``needs`` until it is finished, and actions ``left``. By rank: the
    ``lowest`` turn that is unfinished and the ``highest`` that holds anything, and its ``choice`` with its ``moment``,
    ``stale`` if something has changed since; by lane its ``offer`` (symbol, index, start). ``lanes_of`` and
    ``lanes_begin`` list lanes by rank, ``by_turn`` has route and index of each turn. ``symbols``, by rank from
    ``begin``, are the orders, ``size`` of them so far.
    """

    waiting: Integers
    ready: Integers
    own: Integers
    needs: Integers
    left: Integers
    lowest: Integers
    highest: Integers
    choice: Integers
    offer: Integers
    moment: Integers
    stale: Booleans
    lanes_of: Integers
    lanes_begin: Integers
    input_gradient: Integers
    by_turn: Integers
    symbols: Integers
    begin: Integers
    size: Integers


def desk_for(lanes: Lanes) -> Desk:
    """A desk for the problem."""
    ranks, turns, nodes = len(lanes.limit), len(lanes.turn), lanes.nodes
    by_rank = [np.flatnonzero(lanes.rank == rank) for rank in range(ranks)]
    work = [int(lanes.microbatches[own].sum()) for own in by_rank]
    by_turn = np.zeros((turns, 2), np.int64)
    for number, turn in enumerate(lanes.turn.tolist()):
        route = int(np.searchsorted(lanes.offset, number, side="right")) - 1
        by_turn[turn] = route, number - lanes.offset[route]

    def zeros(*shape: int) -> Integers:
        return np.zeros(shape, np.int64)

    return Desk(
        waiting=zeros(nodes),
        ready=zeros(nodes),
        own=zeros(ranks, turns),
        needs=zeros(ranks, turns),
        left=zeros(ranks, turns),
        lowest=zeros(ranks),
        highest=zeros(ranks),
        choice=zeros(ranks, 2),
        offer=zeros(len(lanes.rank), 3),
        moment=zeros(ranks),
        stale=np.zeros(ranks, np.bool_),
        lanes_of=np.concatenate(by_rank).astype(np.int64),
        lanes_begin=np.array(np.cumsum([0, *map(len, by_rank)]), np.int64),
        input_gradient=_input_gradients(lanes),
        by_turn=by_turn,
        symbols=zeros(nodes),
        begin=np.array(np.cumsum([0, *work]), np.int64),
        size=zeros(ranks),
    )


def _input_gradients(lanes: Lanes) -> Integers:
    """By lane, the I of its stage and route; -1 for a shard of the vocabulary."""
    found = {
        (int(lanes.route[k]), int(lanes.stage[k])): k
        for k in range(len(lanes.rank))
        if lanes.half[k] >= 0 <= lanes.whole[k]
    }
    return np.array(
        [
            -1 if lanes.kind[k] in _SHARDS else found[int(lanes.route[k]), int(lanes.stage[k])]
            for k in range(len(lanes.rank))
        ],
        np.int64,
    )


@compiled
def _need(lanes: Lanes, room: Room, rank: int, route: int, index: int, own: int, done: int) -> Any:
    """The most that a microbatch holds on a rank until it is finished there, alone and in serial order.

    ``done`` is a symbol that counts as done: its half, or both.
    """
    width = len(lanes.rank)
    held, most = own, own
    skip = -1  # the W of a B that has just been counted
    for k in range(lanes.serial.shape[2]):
        lane = lanes.serial[rank, route, k]
        if lane < 0:
            break
        if lane == skip or room.finish[lanes.first[lane] + index] >= 0:
            continue
        if done >= 0 and (lane == done % width or (done >= width and lane == lanes.half[done - width])):
            continue
        if lanes.useful[lane]:
            skip = lanes.half[lane]
            held += lanes.allocates[lane] - lanes.frees[lane] - lanes.frees[skip]
        else:
            held += lanes.allocates[lane]
            most = max(most, held)
            held -= lanes.frees[lane]
    return most


@compiled
def _change(lanes: Lanes, symbol: int) -> Any:
    """Bytes more, or fewer, that a rank holds behind an action."""
    lane = symbol % len(lanes.rank)
    change = lanes.allocates[lane] - lanes.frees[lane]
    return change - lanes.frees[lanes.half[lane]] if symbol >= len(lanes.rank) else change


@compiled
def _is_safe(lanes: Lanes, room: Room, desk: Desk, limit: int, symbol: int, index: int) -> Any:
    """Whether after ``symbol`` unfinished microbatches can still be finished one by one on its rank."""
    lane = symbol % len(lanes.rank)
    rank, route = lanes.rank[lane], lanes.route[lane]
    turn = lanes.turn[lanes.offset[route] + index]
    own = desk.own[rank, turn] + _change(lanes, symbol)
    need = _need(lanes, room, rank, route, index, own, symbol)
    later = 0
    for other in range(max(desk.highest[rank], turn), desk.lowest[rank] - 1, -1):
        if other == turn:
            if later + need > limit:
                return False
            later += own
        elif desk.left[rank, other] > 0:
            if later + desk.needs[rank, other] > limit:
                return False
            later += desk.own[rank, other]
    return True


@compiled
def _fits(lanes: Lanes, room: Room, desk: Desk, limit: int, lane: int, index: int) -> Any:
    """Whether a lane's bytes will be there without another action, and microbatches can be finished behind it."""
    if lanes.allocates[lane] == 0:
        return True
    return room_at(lanes, room, lane, limit) >= 0 and _is_safe(lanes, room, desk, limit, lane, index)


@compiled
def _allowed(lanes: Lanes, room: Room, desk: Desk, rules: Rules, lane: int, index: int) -> Any:
    """The symbol that ``lane`` may do now, -1 if none."""
    limit = rules.limit[lanes.rank[lane]]
    gradient = desk.input_gradient[lane]
    if lanes.half[lane] < 0:
        if gradient >= 0 and lanes.copies[lane] and lanes.allocates[lane] > 0:
            if index - room.done[gradient] >= rules.early[lane]:
                return NONE
        elif gradient >= 0 and not lanes.copies[lane] and index - room.done[gradient] >= rules.ahead[lane]:
            return NONE
    elif lanes.whole[lane] >= 0:
        mode = rules.mode[lanes.first[lane] + index]
        if mode == WHOLE or (mode == EITHER and not _fits(lanes, room, desk, limit, lane, index)):
            return lane + len(lanes.rank)
        if _fits(lanes, room, desk, limit, lane, index):
            return lane
        return lane + len(lanes.rank) if lanes.useful[lane] else NONE
    return lane if _fits(lanes, room, desk, limit, lane, index) else NONE


@compiled
def _soonest(lanes: Lanes, room: Room, desk: Desk, rules: Rules, lane: int, index: int) -> Any:
    """When ``lane`` could start its next task, -1 if that is not known yet."""
    node = lanes.first[lane] + index
    if index < 0 or desk.waiting[node] > 0:
        return NONE
    rank = lanes.rank[lane]
    start = max(desk.ready[node], room.free[rank])
    if lanes.copies[lane]:
        start = max(start, room.copying[rank])
    if room.leaving_range[rank, 0] < room.leaving_range[rank, 1]:
        start = max(start, room_at(lanes, room, lane, rules.limit[rank]))
    return start


@compiled
def _choose(lanes: Lanes, room: Room, desk: Desk, rules: Rules, rank: int) -> None:
    """Set the rank's choice among what it may start."""
    desk.choice[rank, 0] = NONE
    desk.stale[rank] = False
    begin, end = desk.lanes_begin[rank], desk.lanes_begin[rank + 1]
    soonest = FAR
    for k in range(begin, end):
        lane = desk.lanes_of[k]
        index = index_of(lanes, room, lane)
        start = _soonest(lanes, room, desk, rules, lane, index)
        symbol = NONE if start < 0 else _allowed(lanes, room, desk, rules, lane, index)
        desk.offer[lane, 0], desk.offer[lane, 1], desk.offer[lane, 2] = symbol, index, start
        if symbol >= 0:
            soonest = min(soonest, start)
    best, moment = np.inf, soonest
    for k in range(begin, end):
        lane = desk.lanes_of[k]
        symbol, index, start = desk.offer[lane]
        if symbol < 0 or start > soonest + rules.patience[lane]:
            continue
        priority = rules.priority[lanes.first[lane] + index]
        if priority < best or (priority == best and start < moment):
            best, moment = priority, start
            desk.choice[rank, 0], desk.choice[rank, 1] = symbol, index
    desk.moment[rank] = moment


@compiled
def _arrive(lanes: Lanes, desk: Desk, lane: int, index: int, finish: int) -> None:
    """Tell what follows task ``index`` of ``lane`` that it is done at ``finish``."""
    for k in range(lanes.behind_begin[lane], lanes.behind_begin[lane + 1]):
        node = lanes.first[lanes.behind[k]] + index
        desk.waiting[node] -= 1
        desk.ready[node] = max(desk.ready[node], finish + lanes.behind_lag[k])
        desk.stale[lanes.rank[lanes.behind[k]]] = True


@compiled
def _begin(lanes: Lanes, room: Room, desk: Desk) -> None:
    clear(room)
    desk.ready[:] = 0
    desk.own[:] = 0
    desk.left[:] = 0
    desk.lowest[:] = 0
    desk.highest[:] = -1
    desk.stale[:] = True
    desk.size[:] = 0
    for lane in range(len(lanes.rank)):
        first, count = lanes.first[lane], lanes.microbatches[lane]
        desk.waiting[first : first + count] = lanes.before_begin[lane + 1] - lanes.before_begin[lane]
        offset = lanes.offset[lanes.route[lane]]
        for index in range(count):
            desk.left[lanes.rank[lane], lanes.turn[offset + index]] += 1
    for rank in range(len(lanes.limit)):
        for turn in range(len(lanes.turn)):
            route, index = desk.by_turn[turn]
            desk.needs[rank, turn] = _need(lanes, room, rank, route, index, 0, NONE)


@compiled
def _do(lanes: Lanes, room: Room, desk: Desk, rules: Rules, rank: int) -> None:
    """Do what ``rank`` has chosen."""
    width = len(lanes.rank)
    symbol, index, start = desk.choice[rank, 0], desk.choice[rank, 1], desk.moment[rank]
    lane = symbol % width
    make_room(lanes, room, lane, rules.limit[rank])
    finish = commit(lanes, room, symbol, index, start)
    turn = lanes.turn[lanes.offset[lanes.route[lane]] + index]
    desk.own[rank, turn] += _change(lanes, symbol)
    desk.left[rank, turn] -= 2 if symbol >= width else 1
    desk.needs[rank, turn] = _need(lanes, room, rank, lanes.route[lane], index, desk.own[rank, turn], NONE)
    if desk.own[rank, turn] > 0:
        desk.highest[rank] = max(desk.highest[rank], turn)
    while desk.lowest[rank] < len(lanes.turn) and desk.left[rank, desk.lowest[rank]] == 0:
        desk.lowest[rank] += 1
    _arrive(lanes, desk, lane, index, finish)
    if symbol >= width:
        _arrive(lanes, desk, lanes.half[lane], index, finish)
    desk.symbols[desk.begin[rank] + desk.size[rank]] = symbol
    desk.size[rank] += 1
    desk.stale[rank] = True


@compiled
def dispatch(lanes: Lanes, room: Room, desk: Desk, rules: Rules) -> Any:
    """Make orders, in ``desk.symbols``; says whether all could be done. Rank r has ``desk.size[r]`` symbols."""
    _begin(lanes, room, desk)
    ranks = len(lanes.limit)
    left = 0
    for lane in range(len(lanes.rank)):
        left += lanes.microbatches[lane]
    while left > 0:
        chosen = -1
        for rank in range(ranks):
            if desk.stale[rank]:
                _choose(lanes, room, desk, rules, rank)
            if desk.choice[rank, 0] >= 0 and (chosen < 0 or desk.moment[rank] < desk.moment[chosen]):
                chosen = rank
        if chosen < 0:
            return False
        left -= 2 if desk.choice[chosen, 0] >= len(lanes.rank) else 1
        _do(lanes, room, desk, rules, chosen)
    return True
