"""List scheduling of a pipeline, compiled by numba: the rank that can start first does the best of what it can start.

It never deadlocks. Unfinished microbatches could be finished one by one, in the order of ``Lanes.turn``: before each
action that allocates the rank checks that this stays so on it, by what each of them holds and still needs to be
finished alone (the banker's algorithm of Dijkstra, EWD 108, in which microbatches borrow bytes). Each rank may look at
itself alone, as all of them keep to one order. What a copy to the host frees can be waited for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._bare import bare
from ._lanes import Floats, Integers, Lanes, Records
from ._play import Room, clear, commit, index_of, make_room, room_at

__all__ = ["EITHER", "SPLIT", "WHOLE", "Desk", "Rules", "desk_for", "dispatch", "need"]

SPLIT, WHOLE, EITHER = 0, 1, 2
NONE = -1
FAR = 1 << 62

BY_NODE = np.dtype([("waiting", np.int64), ("ready", np.int64)])
SHARE = np.dtype([("own", np.int64), ("needs", np.int64), ("left", np.int64)])
BY_RANK = np.dtype(
    [(name, np.int64) for name in ("lowest", "highest", "symbol", "index", "moment", "stale", "begin", "size")]
)
OFFER = np.dtype([("symbol", np.int64), ("index", np.int64), ("start", np.int64)])


class Rules(NamedTuple):
    """What decides among actions that can start.

    The least ``priority``, by node, goes first, ties to the one that can start earlier. A rank waits for an action of
    lane k for up to ``patience[k]`` beyond what it could start with. Lane k of kind F runs at most ``ahead[k]``
    microbatches ahead of its I, and one that copies back as well. ``limit`` is by rank, as ``Lanes.limit`` or less.
    ``mode`` says by node of an I: 0 split, 1 whole, 2 split if its bytes fit and whole otherwise.
    """

    priority: Floats
    patience: Integers
    ahead: Integers
    limit: Integers
    mode: Integers


class Desk(NamedTuple):
    """Where ``dispatch`` works.

    ``node``: predecessors that it is ``waiting`` for, and when it is ``ready``. ``share``, by rank and turn: bytes
    that a microbatch holds as its ``own``, the most that it ``needs`` until it is finished, actions ``left``. ``rank``:
    the ``lowest`` turn that is unfinished and the ``highest`` that holds anything; its choice, ``symbol`` and ``index``
    at a ``moment``, ``stale`` if something has changed since; where its orders ``begin``, and their ``size``. ``offer``
    is, by lane, what it could do. ``symbols`` are the orders.
    """

    node: Records
    share: Records
    rank: Records
    offer: Records
    symbols: Integers


def desk_for(lanes: Lanes) -> Desk:
    """A desk for the problem."""
    ranks = np.zeros(len(lanes.limit), BY_RANK)
    work = [int(lanes.lane["microbatches"][lanes.lane["rank"] == rank].sum()) for rank in range(len(ranks))]
    ranks["begin"] = np.cumsum([0, *work[:-1]])
    return Desk(
        node=np.zeros(lanes.nodes, BY_NODE),
        share=np.zeros((len(ranks), len(lanes.turn)), SHARE),
        rank=ranks,
        offer=np.zeros(len(lanes.lane), OFFER),
        symbols=np.zeros(lanes.nodes, np.int64),
    )


@bare
def need(lanes: Lanes, room: Room, rank: int, route: int, index: int, own: int, done: int) -> Any:
    """The most that a microbatch holds on a rank until it is finished there, alone and in serial order.

    The lane ``done`` counts as done, -1 for none.
    """
    held, most = own, own
    skip = -1  # the W of a B that has just been counted
    for k in range(lanes.serial.shape[2]):
        number = lanes.serial[rank, route, k]
        if number < 0:
            break
        lane = lanes.lane[number]
        if number in (skip, done) or room.node[lane.first + index].finish >= 0:
            continue
        held += lane.allocates
        if lane.useful:
            skip = lane.half
            held -= lane.frees + lanes.lane[skip].frees
        else:
            most = max(most, held)
            held -= lane.frees
    return most


@bare
def _is_safe(lanes: Lanes, room: Room, desk: Desk, limit: int, number: int, index: int) -> Any:
    """Whether after a task of a lane unfinished microbatches can still be finished one by one on its rank."""
    lane = lanes.lane[number]
    rank = lane.rank
    turn = lanes.turn[lane.offset + index]
    own = desk.share[rank, turn].own + lane.allocates - lane.frees
    most = need(lanes, room, rank, lane.route, index, own, number)
    later = 0
    for other in range(max(desk.rank[rank].highest, turn), desk.rank[rank].lowest - 1, -1):
        share = desk.share[rank, other]
        if other == turn:
            if later + most > limit:
                return False
            later += own
        elif share.left > 0:
            if later + share.needs > limit:
                return False
            later += share.own
    return True


@bare
def _fits(lanes: Lanes, room: Room, desk: Desk, limit: int, lane: int, index: int) -> Any:
    """Whether a lane's bytes will be there without another action, and microbatches can be finished behind it."""
    if lanes.lane[lane].allocates == 0:
        return True
    return room_at(lanes, room, lane, limit) >= 0 and _is_safe(lanes, room, desk, limit, lane, index)


@bare
def _allowed(lanes: Lanes, room: Room, desk: Desk, rules: Rules, number: int, index: int) -> Any:
    """The symbol that a lane may do now, -1 if none."""
    lane = lanes.lane[number]
    if lane.whole < 0:
        return number
    limit = rules.limit[lane.rank]
    if lane.half < 0:
        if lane.gradient >= 0 and index - room.lane[lane.gradient].done >= rules.ahead[number]:
            return NONE
        return number if _fits(lanes, room, desk, limit, number, index) else NONE
    mode = rules.mode[lane.first + index]
    if mode != 1 and _fits(lanes, room, desk, limit, number, index):
        return number
    return number + len(lanes.lane) if mode != 0 or lane.useful else NONE


@bare
def _soonest(lanes: Lanes, room: Room, desk: Desk, rules: Rules, number: int, index: int) -> Any:
    """When a lane could start its next task, -1 if that is not known yet."""
    lane = lanes.lane[number]
    if index < 0 or desk.node[lane.first + index].waiting > 0:
        return NONE
    rank = room.rank[lane.rank]
    start = max(desk.node[lane.first + index].ready, rank.free)
    if lane.copies:
        start = max(start, rank.copying)
    if rank.leaves < rank.left:
        start = max(start, room_at(lanes, room, number, rules.limit[lane.rank]))
    return start


@bare
def _choose(lanes: Lanes, room: Room, desk: Desk, rules: Rules, rank: int) -> None:
    """Set the rank's choice among what it may start."""
    own = desk.rank[rank]
    own.symbol, own.stale = NONE, 0
    begin, end = lanes.own_begin[rank], lanes.own_begin[rank + 1]
    soonest = FAR
    for k in range(begin, end):
        lane = lanes.own[k]
        offer = desk.offer[lane]
        offer.symbol = NONE
        index = index_of(lanes, room, lane)
        start = _soonest(lanes, room, desk, rules, lane, index)
        # What is farther off than any patience need not be looked at.
        if start < 0 or start > soonest + rules.patience[lane]:
            continue
        offer.symbol = _allowed(lanes, room, desk, rules, lane, index)
        offer.index, offer.start = index, start
        if offer.symbol >= 0:
            soonest = min(soonest, start)
    best, moment = np.inf, soonest
    for k in range(begin, end):
        lane = lanes.own[k]
        offer = desk.offer[lane]
        if offer.symbol < 0 or offer.start > soonest + rules.patience[lane]:
            continue
        priority = rules.priority[lanes.lane[lane].first + offer.index]
        if priority < best or (priority == best and offer.start < moment):
            best, moment = priority, offer.start
            own.symbol, own.index = offer.symbol, offer.index
    own.moment = moment


@bare
def _arrive(lanes: Lanes, desk: Desk, lane: int, index: int, finish: int) -> None:
    """Tell what follows task ``index`` of ``lane`` that it is done at ``finish``."""
    for k in range(lanes.lane[lane].behind, lanes.lane[lane].behind_end):
        behind = lanes.lane[lanes.edges[k].lane]
        node = desk.node[behind.first + index]
        node.waiting -= 1
        node.ready = max(node.ready, finish + lanes.edges[k].lag)
        desk.rank[behind.rank].stale = 1


@bare
def _begin(lanes: Lanes, room: Room, desk: Desk) -> Any:
    """Clear room and desk; returns how many tasks there are."""
    clear(room)
    tasks = 0
    for rank in range(len(lanes.limit)):
        own = desk.rank[rank]
        own.lowest, own.highest, own.stale, own.size = 0, -1, 1, 0
        for turn in range(len(lanes.turn)):
            route, index = lanes.by_turn[turn, 0], lanes.by_turn[turn, 1]
            share = desk.share[rank, turn]
            share.own, share.left = 0, 0
            share.needs = need(lanes, room, rank, route, index, 0, NONE)
    for k in range(len(lanes.lane)):
        lane = lanes.lane[k]
        tasks += lane.microbatches
        for index in range(lane.microbatches):
            node = desk.node[lane.first + index]
            node.waiting, node.ready = lane.before_end - lane.before, 0
            desk.share[lane.rank, lanes.turn[lane.offset + index]].left += 1
    return tasks


@bare
def _do(lanes: Lanes, room: Room, desk: Desk, rules: Rules, rank: int) -> None:
    """Do what ``rank`` has chosen."""
    width = len(lanes.lane)
    own = desk.rank[rank]
    symbol, index = own.symbol, own.index
    number = symbol % width
    lane = lanes.lane[number]
    make_room(lanes, room, number, rules.limit[rank])
    finish = commit(lanes, room, symbol, index, own.moment)
    turn = lanes.turn[lane.offset + index]
    share = desk.share[rank, turn]
    share.own += lane.allocates - lane.frees
    share.left -= 1
    _arrive(lanes, desk, number, index, finish)
    if symbol >= width:
        share.own -= lanes.lane[lane.half].frees
        share.left -= 1
        _arrive(lanes, desk, lane.half, index, finish)
    share.needs = need(lanes, room, rank, lane.route, index, share.own, NONE)
    if share.own > 0:
        own.highest = max(own.highest, turn)
    while own.lowest < len(lanes.turn) and desk.share[rank, own.lowest].left == 0:
        own.lowest += 1
    desk.symbols[own.begin + own.size] = symbol
    own.size += 1
    own.stale = 1


@bare
def dispatch(lanes: Lanes, room: Room, desk: Desk, rules: Rules) -> Any:
    """Make orders, in ``desk.symbols``; says whether all could be done."""
    ranks = len(lanes.limit)
    left = _begin(lanes, room, desk)
    while left > 0:
        chosen, moment = -1, FAR
        for rank in range(ranks):
            own = desk.rank[rank]
            if own.stale:
                _choose(lanes, room, desk, rules, rank)
            if own.symbol >= 0 and own.moment < moment:
                chosen, moment = rank, own.moment
        if chosen < 0:
            return False
        left -= 2 if desk.rank[chosen].symbol >= len(lanes.lane) else 1
        _do(lanes, room, desk, rules, chosen)
    return True
